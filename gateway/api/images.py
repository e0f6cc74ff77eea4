"""Pictures and films: engines give them as base64; clients that want URLs get those of files, served for a while."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from gateway.api.exchange import Exchange


def with_urls(reply: bytes, exchange: Exchange) -> bytes:
    """The reply with each `b64_json` put into a file and its `url` in its place, unless base64 was asked for."""
    if exchange.head.response_format == "b64_json":
        return reply
    said: dict[str, Any] = msgspec.json.decode(reply)
    _put_away(said, exchange)
    return msgspec.json.encode(said)


def events_with_urls(events: bytes, exchange: Exchange) -> bytes:
    """The same for whole events of a stream."""
    if exchange.head.response_format == "b64_json" or b'"b64_json"' not in events:
        return events
    return b"\n".join(_line_with_urls(line, exchange) for line in events.split(b"\n"))


def _line_with_urls(line: bytes, exchange: Exchange) -> bytes:
    if not line.startswith(b"data:") or b'"b64_json"' not in line:
        return line
    return b"data: " + with_urls(line[len(b"data:") :], exchange)


def _put_away(said: dict[str, Any], exchange: Exchange) -> None:
    for item in said.get("data") or ():
        if not isinstance(item, dict) or not item.get("b64_json"):
            continue
        try:
            content = base64.b64decode(item["b64_json"], validate=True)
        except (binascii.Error, ValueError):
            continue  # not ours to mend
        name = exchange.fleet.files.keep(content)
        item |= {"url": f"{exchange.public_url}/v1/files/{name}", "b64_json": None}
