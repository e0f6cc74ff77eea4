"""Sound for the tests: what to say, how to have it heard, and how well it was."""

from __future__ import annotations

import io
import re
import wave
from typing import Any

import aiohttp
from harness import Answer, Gateway

TEXT = "The quick brown fox jumps over the lazy dog. Please open the window and bring me seven apples before noon."


async def hear(gateway: Gateway, sound: bytes | None, path: str = "transcriptions", **fields: Any) -> Answer:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in ({"model": "ear"} | fields).items():
        for one in value if isinstance(value, list) else [value]:
            form.add_field(name, one)
    if sound is not None:
        form.add_field("file", sound, filename="sound")
    limit = aiohttp.ClientTimeout(total=160)  # a busy machine hears slowly
    async with gateway.session.post(f"{gateway.address}/v1/audio/{path}", data=form, timeout=limit) as response:
        return Answer(response.status, response.headers, await response.read())


def n_wrong(heard: str, text: str = TEXT) -> int:
    """How many words of the text were not heard as they were said."""
    said, found = (re.findall(r"[a-z']+|\d+", one.lower()) for one in (text, heard))
    costs = list(range(len(found) + 1))
    for i, word in enumerate(said, 1):
        above, costs[0] = costs[0], i
        for j, other in enumerate(found, 1):
            above, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, above + (word != other))
    return costs[-1]


def repeated(sound: bytes, times: int) -> bytes:
    """A wav, several times over."""
    with wave.open(io.BytesIO(sound)) as one:
        frames, about = one.readframes(one.getnframes()), one.getparams()
    content = io.BytesIO()
    with wave.open(content, "wb") as many:
        many.setparams(about)
        many.writeframes(frames * times)
    return content.getvalue()
