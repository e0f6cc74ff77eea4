"""Reads a request's body, within limits."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope

from gateway.errors import BadRequest, BodyTooLarge, UnsupportedBody


async def read_object(request: Request, limit_bytes: int, what: str = "The body") -> dict[str, Any]:
    """The body, a JSON object; no body is an empty one.

    Args:
        what: it is, for the user who reads that it is none.
    Raises:
        BadRequest: it is something else; or as `read_body`.
    """
    content = await read_body(request.scope, request.receive, limit_bytes)
    try:
        return msgspec.json.decode(content or b"{}", type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"{what} is no JSON object: {exc}.") from exc


async def read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """The whole body of the request.

    Raises:
        BodyTooLarge: before more than `limit_bytes` are kept.
        UnsupportedBody: it is compressed.
        BadRequest: the client left in the middle of it.
    """
    refusal = too_large(limit_bytes)
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > limit_bytes:
            raise refusal
        if name == b"content-encoding" and value.lower() != b"identity":
            raise UnsupportedBody("Compressed request bodies are not taken: send it without content-encoding.")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("The client left before the whole body had come.")
        part = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise refusal
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def too_large(limit_bytes: int) -> BodyTooLarge:
    """The refusal of a body that is larger than this."""
    return BodyTooLarge(f"The request body is larger than `max_body_bytes` ({limit_bytes} bytes) allows.")
