"""What is read of requests: the head. The rest of a body passes through unread."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.errors import BadRequest

ModelName = Annotated[str, Meta(max_length=200)]

MISSING_FIELD = re.compile("Object missing required field `(.+)`")
FIELD_LIMIT_BYTES = 64 * 1024  # of a form's field that is read


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Of any request."""

    model: ModelName
    stream: bool | None = None
    stop: Raw | UnsetType = UNSET
    stop_token_ids: Raw | UnsetType = UNSET
    enable_thinking: bool | None = None
    lora_name: str | None = None
    stream_options: Raw | UnsetType = UNSET


class ChatHead(Head, frozen=True, kw_only=True):
    """Of a chat, in OpenAI's and in Anthropic's form."""

    messages: list[Raw]


class PromptHead(Head, frozen=True, kw_only=True):
    """Of a completion, or of a picture or film to be made."""

    prompt: Raw
    response_format: Any = None


class InputHead(Head, frozen=True, kw_only=True):
    """Of an embedding, of speech, or of a response in OpenAI's newer form."""

    input: Raw


class RerankHead(Head, frozen=True, kw_only=True):
    """Of a ranking, in the forms of Jina, Cohere and Xinference; booleans may be texts."""

    query: Raw
    documents: list[Raw]
    top_n: Any = None
    return_documents: Any = None
    return_len: Any = None


class WebUiHead(Head, frozen=True, kw_only=True):
    """Of the SD web UI, which knows models as checkpoints."""

    model: ModelName = ""
    override_settings: dict[str, Any] | None = None

    @property
    def named(self) -> str:
        """The model that the request itself names, or nothing."""
        return self.model or str((self.override_settings or {}).get("sd_model_checkpoint") or "")


class FormHead(msgspec.Struct, frozen=True, kw_only=True):
    """Of a multipart form or of a query, which may leave the model to the gateway.

    Which files it needs is for the engine to say.
    """

    model: ModelName = ""
    stream: bool | None = None
    response_format: str | None = None


def read_head(decoder: msgspec.json.Decoder[Any], body: bytes, path: str) -> Any:
    """The head of a JSON body.

    Raises:
        BadRequest: it is no JSON object, or lacks what `path` needs.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        text, _, place = str(exc).partition(" - at `$.")
        if missing := MISSING_FIELD.match(text):
            raise BadRequest(f"The request has no `{missing[1]}`, which {path} needs.", param=missing[1]) from exc
        raise BadRequest(f"The request body: {exc}.", param=place.rstrip("`") or None) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"The request body is not valid JSON: {exc}.") from exc


def read_query_head(query: bytes) -> FormHead:
    """The head of a request that is a path and a query."""
    return FormHead(model=dict(parse_qsl(query.decode("latin-1"))).get("model", ""))


def is_form(content_type: bytes) -> bool:
    """Whether the body is a multipart form."""
    return content_type[:19].lower() == b"multipart/form-data"


def read_form_head(content_type: bytes, body: bytes) -> FormHead:
    """The head of a multipart form.

    Raises:
        BadRequest: it is damaged, or a field has a value that it cannot have.
    """
    fields = _fields(content_type, body, frozenset(FormHead.__struct_fields__))
    try:
        return msgspec.convert(fields, FormHead, strict=False)
    except msgspec.ValidationError as exc:
        text, _, place = str(exc).partition(" - at `$.")
        raise BadRequest(f"The form's field `{place.rstrip('`')}`: {text}.", param=place.rstrip("`") or None) from exc


def _fields(content_type: bytes, body: bytes, wanted: frozenset[str]) -> dict[str, str]:
    """The values of the form's fields of these names; files are passed over."""
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary")
    if not boundary:
        raise BadRequest("The multipart form's content-type names no boundary.")
    found: dict[str, str] = {}
    header, value = bytearray(), bytearray()
    name: str | None = None
    content: bytearray | None = None

    def end_header() -> None:
        nonlocal name
        if bytes(header).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(value))
            named = options.get(b"name", b"").decode(errors="replace")
            name = named if named in wanted and b"filename" not in options else None
        header.clear()
        value.clear()

    def begin_content() -> None:
        nonlocal content
        content = bytearray() if name else None

    def add(data: bytes, start: int, end: int) -> None:
        if content is not None:
            if len(content) + end - start > FIELD_LIMIT_BYTES:
                raise BadRequest(f"The form's field `{name}` is too long.", param=name)
            content.extend(data[start:end])

    def end_content() -> None:
        nonlocal name, content
        if name and content is not None:
            found[name] = content.decode(errors="replace")
        name = content = None

    parser = MultipartParser(
        boundary,
        {
            "on_header_field": lambda data, start, end: header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: value.extend(data[start:end]),
            "on_header_end": end_header,
            "on_headers_finished": begin_content,
            "on_part_data": add,
            "on_part_end": end_content,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as exc:
        raise BadRequest(f"The multipart form cannot be read: {exc}.") from exc
    return found
