"""Rankings in every form that clients send and read: Jina's, Cohere's (v1 and v2) and Xinference's."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.api.heads import RerankHead
from gateway.errors import BadRequest

if TYPE_CHECKING:
    from gateway.api.exchange import Exchange

OURS = frozenset({"kwargs", "top_n", "return_documents", "return_len", "max_chunks_per_doc"})


def as_engines_take_it(body: bytes, head: RerankHead, defaults: Mapping[str, Any]) -> bytes:
    """The body without nulls, its `kwargs` beside the rest, and texts in place of objects that hold nothing else.

    Raises:
        BadRequest: a boolean, a number or `kwargs` is none.
    """
    fields = msgspec.json.decode(body)
    kwargs = fields.get("kwargs") or {}
    if isinstance(kwargs, str):
        try:
            kwargs = msgspec.json.decode(kwargs)
        except msgspec.DecodeError as exc:
            raise BadRequest(f"`kwargs` is not valid JSON: {exc}.", param="kwargs") from exc
    if not isinstance(kwargs, dict):
        raise BadRequest("`kwargs` is a JSON object, written as text.", param="kwargs")
    _number(head.top_n, "top_n")
    for name in ("return_documents", "return_len"):
        _flag(getattr(head, name), name)
    if not head.documents:
        raise BadRequest("`documents` is empty: there is nothing to rank.", param="documents")
    sent = {name: value for name, value in (fields | kwargs).items() if name not in OURS and value is not None}
    sent["query"] = _text_of(fields["query"])
    sent["documents"] = [_text_of(document) for document in fields["documents"]]
    return msgspec.json.encode(sent)


def as_clients_read_it(reply: bytes, exchange: Exchange) -> bytes:
    """An engine's scores: sorted, cut to `top_n`, with documents and lengths where they were asked for."""
    said = msgspec.json.decode(reply)
    head: RerankHead = exchange.head
    scores = [
        (float(result.get("relevance_score", result.get("score"))), result["index"]) for result in said["results"]
    ]
    scores.sort(key=lambda scored: (-scored[0], scored[1]))
    has_documents = _flag(head.return_documents, "return_documents")
    results = [
        {
            "index": index,
            "relevance_score": score,
            "document": _as_object(msgspec.json.decode(head.documents[index])) if has_documents else None,
        }
        for score, index in scores[: _number(head.top_n, "top_n")]
    ]
    usage = said.get("usage") or {}
    n_tokens = usage.get("total_tokens", usage.get("prompt_tokens", 0))
    tokens = {"input_tokens": n_tokens, "output_tokens": n_tokens} if _flag(head.return_len, "return_len") else None
    return msgspec.json.encode(
        {
            "id": said.get("id") or str(uuid.uuid4()),
            "model": exchange.deployment.launch.uid,
            "results": results,
            "usage": {"prompt_tokens": usage.get("prompt_tokens", n_tokens), "total_tokens": n_tokens},
            "meta": {"api_version": None, "billed_units": None, "tokens": tokens, "warnings": None},
        }
    )


def _text_of(document: Any) -> Any:
    return document["text"] if isinstance(document, dict) and set(document) == {"text"} else document


def _as_object(document: Any) -> Any:
    return {"text": document} if isinstance(document, str) else document


def _flag(value: Any, name: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    if str(value).lower() in ("true", "1"):
        return True
    if str(value).lower() in ("false", "0", ""):
        return False
    raise BadRequest(f"`{name}` is true or false, not {value!r}.", param=name)


def _number(value: Any, name: str) -> int | None:
    if value is None:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise BadRequest(f"`{name}` is a whole number from 1 on, not {value!r}.", param=name)
    return number
