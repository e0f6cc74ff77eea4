"""Pictures and films: engines give them as base64; clients that want URLs get those of files, served for a while."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from gateway.api.inference import Exchange


def with_urls(reply: bytes, exchange: Exchange) -> bytes:
    """The reply with each `b64_json` put into a file and its `url` in its place, unless base64 was asked for."""
    if exchange.head.response_format == "b64_json":
        return reply
    said: dict[str, Any] = msgspec.json.decode(reply)
    for item in said.get("data") or ():
        if not isinstance(item, dict) or not item.get("b64_json"):
            continue
        try:
            content = base64.b64decode(item["b64_json"], validate=True)
        except (binascii.Error, ValueError):
            continue  # not ours to mend
        name = exchange.fleet.files.keep(content)
        item |= {"url": f"{exchange.public_url}/v1/files/{name}", "b64_json": None}
    return msgspec.json.encode(said)
