"""The public paths of inference: what is read of each request, and what little is changed on its way and back.

Bytes pass through. What is read is the head (which model, streamed or not); what is changed is told here, path by
path, as pure functions of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import UNSET, Raw

from gateway.api import images, rerank
from gateway.api.heads import ChatHead, Head, InputHead, PromptHead, RerankHead, WebUiHead
from gateway.errors import BadRequest

if TYPE_CHECKING:
    from gateway.api.exchange import Exchange

JOINED = ("stop", "stop_token_ids")  # the defaults' are added to a request's own
DONE = b"data: [DONE]\n\n"
EMPTY_DELTA, DELTA = b'"delta":{}', b'"delta":{"content":""}'


def as_it_is(body: bytes, head: Any, defaults: Mapping[str, Any]) -> bytes:
    """Most requests."""
    return body


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One public path.

    `upstream` is the engine's path if it differs for all engines. `adapt` makes the body that the engine gets of the
    client's; `opening` gives what goes behind the first brace of a reply's JSON; `rewrite` makes the client's reply out
    of the engine's whole one, in a thread; `chunk` changes what is streamed, `events` the whole events of a stream that
    may be large, in a thread. `token_mark` stands once before each token of a stream, and `tells_usage` says that the
    end of one tells their number if `stream_options` ask for it. `abilities` choose a model for a request that names
    none. `is_chat` says that the reply holds messages, whose words engines differ in.
    """

    path: str
    model_types: tuple[str, ...]
    method: Literal["POST", "GET"] = "POST"
    head: type[Head] = Head
    takes: Literal["json", "form", "either", "query"] = "json"
    streams: bool = True
    upstream: str | None = None
    adapt: Callable[[bytes, Any, Mapping[str, Any]], bytes] = as_it_is
    opening: Callable[[Exchange], bytes] | None = None
    rewrite: Callable[[bytes, Exchange], bytes] | None = None
    chunk: Callable[[bytes], bytes] | None = None
    events: Callable[[bytes, Exchange], bytes] | None = None
    token_mark: bytes = b""
    tells_usage: bool = False
    abilities: tuple[str, ...] = ()
    is_chat: bool = False
    error_event: bytes = b""
    done: bytes = DONE


# --- requests


def with_defaults(body: bytes, head: Head, defaults: Mapping[str, Any]) -> bytes:
    """What the family says for every request, and `enable_thinking` where templates look for it.

    Raises:
        BadRequest: `chat_template_kwargs` is no object.
    """
    if not defaults and head.enable_thinking is None:
        return body
    if head.enable_thinking is None and all(getattr(head, name, UNSET) is UNSET for name in defaults):
        return b"{" + msgspec.json.encode(defaults)[1:-1] + b"," + body.lstrip()[1:]
    fields = msgspec.json.decode(body, type=dict[str, Raw])
    for name, value in defaults.items():
        given = msgspec.json.decode(fields[name]) if name in fields else None
        if given is None or name in JOINED:
            fields[name] = Raw(msgspec.json.encode(value if given is None else _joined(given, value)))
    if head.enable_thinking is not None:
        del fields["enable_thinking"]
        thinking = {"enable_thinking": head.enable_thinking, "thinking": head.enable_thinking}
        kwargs = _template_kwargs(fields.get("chat_template_kwargs", Raw(b"null")))
        fields["chat_template_kwargs"] = Raw(msgspec.json.encode(thinking | kwargs))
    return msgspec.json.encode(fields)


def _template_kwargs(given: Raw) -> dict[str, Any]:
    """What templates are given, which clients also write as text."""
    kwargs = msgspec.json.decode(given)
    try:
        kwargs = msgspec.json.decode(kwargs) if isinstance(kwargs, str) and kwargs else kwargs
    except (msgspec.DecodeError, RecursionError) as exc:
        raise BadRequest(f"`chat_template_kwargs` is not valid JSON: {exc}.", param="chat_template_kwargs") from exc
    if kwargs and not isinstance(kwargs, dict):
        raise BadRequest("`chat_template_kwargs` is a JSON object.", param="chat_template_kwargs")
    return kwargs or {}


def _joined(given: Any, more: Any) -> Any:
    """A request's own list, or single text, with more at its end; what is no list stays the request's."""
    if not isinstance(more, list):
        return given
    own = given if isinstance(given, list) else [given]
    return [*own, *(one for one in more if one not in own)]


def with_adapter(body: bytes, chosen: Mapping[str, Any]) -> bytes:
    """`lora_name` in the words of the engine."""
    fields = msgspec.json.decode(body, type=dict[str, Raw])
    del fields["lora_name"]
    return msgspec.json.encode(fields | {name: Raw(msgspec.json.encode(value)) for name, value in chosen.items()})


def with_content(body: bytes, head: Head, defaults: Mapping[str, Any]) -> bytes:
    """`prompt` under llama.cpp's name for it too."""
    fields = msgspec.json.decode(body, type=dict[str, Raw])
    if "prompt" in fields:
        fields.setdefault("content", fields["prompt"])
    return msgspec.json.encode(fields)


# --- replies


def with_replica(exchange: Exchange) -> bytes:
    """Which copy answered, as Xinference's clients read it."""
    name = exchange.replica_name
    return b'"model_replica":' + msgspec.json.encode(name) + b","


def with_content_in_deltas(chunk: bytes) -> bytes:
    """An empty delta gets the empty content that LangChain's client reads of each."""
    return chunk.replace(EMPTY_DELTA, DELTA) if EMPTY_DELTA in chunk else chunk


def replaced(data: bytes, words: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The reply in the words of clients. Keys only: within a JSON text no quote stands without a backslash."""
    for word, ours in words:
        data = data.replace(word, ours)
    return data


LLM = ("LLM",)
IMAGE = ("image",)
AUDIO = ("audio",)
VIDEO = ("video",)
ANY = ("LLM", "embedding", "rerank", "image", "audio", "video", "flexible")
EDITS = ("image2image", "inpainting")

WAYS: tuple[Way, ...] = (
    Way(
        path="/v1/chat/completions",
        model_types=LLM,
        head=ChatHead,
        adapt=with_defaults,
        chunk=with_content_in_deltas,
        token_mark=b'content":"',
        tells_usage=True,
        is_chat=True,
    ),
    Way(
        path="/v1/completions",
        model_types=LLM,
        head=PromptHead,
        adapt=with_defaults,
        token_mark=b'"text":"',
        tells_usage=True,
    ),
    Way(path="/v1/responses", model_types=LLM, head=InputHead, token_mark=b'"delta":"'),
    *[
        Way(
            path=path,
            upstream="/v1/messages",
            model_types=LLM,
            head=ChatHead,
            error_event=b"event: error\n",
            done=b"",
            token_mark=b'"text":"',
        )
        for path in ("/v1/messages", "/anthropic/v1/messages")
    ],
    Way(path="/v1/messages/count_tokens", model_types=LLM, head=ChatHead),
    Way(
        path="/anthropic/v1/messages/count_tokens",
        upstream="/v1/messages/count_tokens",
        model_types=LLM,
        head=ChatHead,
    ),
    Way(path="/tokenize", model_types=(*LLM, "embedding", "rerank"), adapt=with_content),
    Way(path="/detokenize", model_types=(*LLM, "embedding", "rerank")),
    Way(path="/v1/embeddings", model_types=(*LLM, "embedding"), head=InputHead, streams=False, opening=with_replica),
    Way(path="/v1/convert_ids_to_tokens", model_types=(*LLM, "embedding", "rerank"), head=InputHead),
    *[
        Way(
            path=path,
            upstream="/v1/rerank",
            model_types=(*LLM, "embedding", "rerank"),
            head=RerankHead,
            adapt=rerank.as_engines_take_it,
            rewrite=rerank.as_clients_read_it,
        )
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    ],
    Way(path="/v1/score", model_types=(*LLM, "embedding", "rerank")),
    Way(
        path="/v1/images/generations",
        model_types=IMAGE,
        head=PromptHead,
        rewrite=images.with_urls,
        events=images.events_with_urls,
        error_event=b"event: error\n",
        done=b"",
    ),
    Way(path="/v1/images/variations", model_types=IMAGE, takes="form", rewrite=images.with_urls),
    Way(path="/v1/images/inpainting", model_types=IMAGE, takes="form", rewrite=images.with_urls),
    Way(
        path="/v1/images/edits",
        model_types=IMAGE,
        takes="form",
        rewrite=images.with_urls,
        events=images.events_with_urls,
        error_event=b"event: error\n",
        done=b"",
        abilities=EDITS,
    ),
    Way(path="/v1/images/ocr", model_types=IMAGE, takes="form", abilities=("ocr",)),
    Way(path="/v1/audio/transcriptions", model_types=(*AUDIO, *LLM), takes="form"),
    Way(path="/v1/audio/translations", model_types=(*AUDIO, *LLM), takes="form"),
    # Its streams are of sound, which has no place for comments.
    Way(path="/v1/audio/speech", model_types=AUDIO, head=InputHead, takes="either", streams=False),
    Way(path="/v1/audio/voices", model_types=AUDIO, method="GET", takes="query", streams=False),
    Way(path="/v1/audio/embeddings", model_types=(*AUDIO, "embedding"), takes="form"),
    Way(path="/v1/video/generations", model_types=VIDEO, head=PromptHead, rewrite=images.with_urls),
    Way(
        path="/v1/video/generations/image",
        model_types=VIDEO,
        takes="form",
        rewrite=images.with_urls,
    ),
    Way(path="/v1/video/generations/flf", model_types=VIDEO, takes="form", rewrite=images.with_urls),
    Way(path="/v1/flexible/infers", model_types=("flexible",)),
)

# Those of the SD web UI, whose requests name their model in ways of their own: see `webui.py`.
WEBUI_WAYS: tuple[Way, ...] = tuple(
    Way(path=path, model_types=IMAGE, head=WebUiHead, streams=False)
    for path in ("/sdapi/v1/txt2img", "/sdapi/v1/img2img")
)


def check_served(way: Way, uid: str, model_type: str) -> None:
    """Raises BadRequest if models of that type answer no such request."""
    if model_type not in way.model_types:
        wanted = " or ".join(dict.fromkeys(way.model_types))
        raise BadRequest(
            f"The model {uid!r} is of type {model_type}, and {way.path} is for {wanted} models. `hostler list` shows "
            "the types.",
            param="model",
        )
