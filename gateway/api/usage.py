"""How many tokens a request took, as its engine says: read off the ends of the reply, which nobody parses for it.

Engines tell it at a reply's end, in the last events of a stream, or before anything else. A quote inside a text is
escaped, so that what an answer says is never taken for it. Those that tell it of a stream only if asked to are asked,
and what they say is taken out again. Of a stream that broke off the tokens are counted that have come.
"""

from __future__ import annotations

import re
from contextlib import suppress

import msgspec

END_BYTES = 1024  # of the reply's beginning, and of its end

# As OpenAI has it, as Anthropic and OpenAI's newer form have it, and what llama.cpp tells where nobody has asked.
TOKENS = re.compile(rb'"(prompt|input|completion|output)_tokens": ?(\d{1,12})')
TIMINGS = re.compile(rb'"(cache_n|prompt_n|predicted_n)": ?(\d{1,12})')
REASON = re.compile(rb'"(?:finish|stop)_reason": ?"(\w{1,40})"')
REASONS = {
    word: word.decode()
    for word in (
        b"abort content_filter end_turn function_call length max_tokens pause_turn refusal repetition stop "
        b"stop_sequence tool_calls tool_use"
    ).split()
}


ASKING = b'{"stream_options":{"include_usage":true},'
EVENT = re.compile(rb"^data: ?(\{[^\r\n]*\})(?:\r?\n){2}", re.MULTILINE)


def asked_for(body: bytes) -> bytes:
    """The request for a stream, a JSON object that has no `stream_options`, with the wish to be told."""
    begin = body.index(b"{") + 1
    return ASKING + body[begin:]


def without(events: bytes) -> bytes:
    """Some of a stream without the event that only tells it."""
    return EVENT.sub(_unless_told, events) if b'"usage"' in events else events


class _Told(msgspec.Struct):
    """An event that tells it."""

    choices: list[msgspec.Raw]
    usage: dict[str, msgspec.Raw]


_decode_told = msgspec.json.Decoder(_Told).decode


def _unless_told(event: re.Match[bytes]) -> bytes:
    if b'"usage"' in event[1] and b"[]" in event[1]:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if not _decode_told(event[1]).choices:
                return b""
    return event[0]


def read(begin: bytes, end: bytes) -> tuple[int | None, int | None, str | None]:
    """Tokens of the prompt, those of the reply, and why the engine said no more; None is what was not told.

    The first and the last bytes of the reply tell it; the last know better.
    """
    prompt = completion = None
    at = end.rfind(b'"usage"')
    if at >= 0:
        prompt, completion = _tokens(end, at)
    elif (at := end.rfind(b'"timings"')) >= 0:
        timings = {name: int(count) for name, count in TIMINGS.findall(end, at)}
        completion = timings.get(b"predicted_n")
        if b"prompt_n" in timings:
            prompt = timings[b"prompt_n"] + timings.get(b"cache_n", 0)
    if prompt is None and (at := begin.find(b'"usage"')) >= 0:
        prompt, _ = _tokens(begin, at)
    return prompt, completion, _reason(end) or _reason(begin)


def end_of(*chunks: bytes) -> bytes:
    """The last bytes of these."""
    end = b""
    for chunk in reversed(chunks):
        if (lacking := END_BYTES - len(end)) <= 0:
            break
        end = chunk[-lacking:] + end
    return end


def count_in(mark: bytes, begin: bytes, end: bytes) -> int:
    """How often it is there, where one may be all that the other is."""
    return end.count(mark) + (0 if end.startswith(begin) else begin.count(mark))


def _tokens(data: bytes, at: int) -> tuple[int | None, int | None]:
    """Of the prompt and of the reply, as the first behind that place say."""
    told = dict(reversed(TOKENS.findall(data, at)))
    prompt, completion = told.get(b"prompt") or told.get(b"input"), told.get(b"completion") or told.get(b"output")
    return prompt and int(prompt), completion and int(completion)


def _reason(data: bytes) -> str | None:
    at = data.rfind(b'_reason":"')
    if at < 0:
        at = data.rfind(b'_reason": "')
    said = REASON.search(data, max(0, at - len('"finish'))) if at >= 0 else None
    if said is None:
        return None
    return REASONS.get(said[1], "other")
