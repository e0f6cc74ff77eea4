"""From tokens to what clients read: text piece by piece, where it ends, and which part is thinking or a tool call."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engines.workers.tool_calls import Form, Types

BROKEN = "\ufffd"  # what a character's first bytes decode to before its last has come


class Text:
    """The text of tokens that come one by one, up to the first of the `stop` texts.

    What may be the beginning of a stop text is held back until it is known.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = [text for text in stop if text]
        self._tokens: list[int] = []
        self._begin = self._read = 0  # tokens from `begin` on give context, those before `read` are told
        self._held = ""
        self.is_stopped = False

    def add(self, tokens: Sequence[int], *, is_last: bool) -> str:
        """The text that is new and certain."""
        if self.is_stopped:
            return ""
        self._tokens += tokens
        told = self._decode(self._tokens[self._begin : self._read])
        whole = self._decode(self._tokens[self._begin :])
        if is_last or not whole.endswith(BROKEN):
            self._held += whole[len(told) :]
            self._begin, self._read = self._read, len(self._tokens)
        return self._certain(is_last)

    def _certain(self, is_last: bool) -> str:
        ends = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if ends:
            self.is_stopped = True
            sure, self._held = self._held[: min(ends)], ""
            return sure
        keep = 0 if is_last else max((overlap(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure


def overlap(text: str, mark: str) -> int:
    """How many characters at the text's end may be the beginning of the mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


class Splitter(Protocol):
    """Tells of text that comes piece by piece what is of one kind and what is not."""

    inside: bool

    def add(self, text: str, *, is_last: bool) -> list[tuple[bool, str]]:
        """(whether of that kind, text), one for each stretch."""


class Parts:
    """Splits text that comes piece by piece into what is between two tags and what is not; an empty end never comes."""

    def __init__(self, start: str, end: str, *, inside: bool = False, once: bool = False) -> None:
        self._start, self._end, self._once = start, end, once
        self.inside = inside
        self._is_done = False
        self._held = ""

    def add(self, text: str, *, is_last: bool) -> list[tuple[bool, str]]:
        """(whether between the tags, text), one for each stretch, empty ones too; tags themselves are left out."""
        self._held += text
        found: list[tuple[bool, str]] = []
        while True:
            mark = self._end if self.inside else self._start
            at = -1 if self._is_done or not mark else self._held.find(mark)
            if at < 0:
                break
            found.append((self.inside, self._held[:at]))
            self._held = self._held[at + len(mark) :]
            self._is_done = self.inside and self._once
            self.inside = not self.inside
        keep = 0 if is_last or self._is_done else overlap(self._held, mark)
        cut = len(self._held) - keep
        found.append((self.inside, self._held[:cut]))
        self._held = self._held[cut:]
        return found


class Whole:
    """Tells whether a text as a whole, which comes piece by piece, begins with one of the openings."""

    def __init__(self, openings: tuple[str, ...]) -> None:
        self._openings = openings
        self._held: str | None = ""
        self.inside = False

    def add(self, text: str, *, is_last: bool) -> list[tuple[bool, str]]:
        """As `Parts.add`."""
        if self._held is None:
            return [(self.inside, text)]
        self._held += text
        begin = self._held.lstrip()
        self.inside = begin.startswith(self._openings)
        if not self.inside and not is_last and any(one.startswith(begin) for one in self._openings):
            return []
        whole, self._held = self._held, None
        return [(self.inside, whole)]


class Message:
    """What a chat's answer holds, out of its text: deltas in OpenAI's form."""

    def __init__(
        self,
        *,
        tags: tuple[str, str] | None = None,
        is_thinking: bool = False,
        form: Form | None = None,
        types: Types | None = None,
    ) -> None:
        self._thinking = Parts(*tags, inside=is_thinking, once=True) if tags else None
        self._form, self._types = form, types or {}
        self._tools: Splitter | None = None
        if form:
            self._tools = Whole(form.openings) if form.openings else Parts(form.start, form.end)
        self._call = ""
        self._at_begin = True
        self.calls = 0

    def add(self, text: str, *, is_last: bool = False) -> list[dict[str, Any]]:
        """The deltas that the text makes."""
        parts = self._thinking.add(text, is_last=is_last) if self._thinking else [(False, text)]
        deltas: list[dict[str, Any]] = []
        for is_thought, part in parts:
            if is_thought:
                deltas += [{"reasoning_content": part}] if part else []
            else:
                deltas += self._answer(part, is_last=is_last)
        return deltas

    def _answer(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        if self._tools is None:
            return self._content(text)
        deltas: list[dict[str, Any]] = []
        for is_call, part in self._tools.add(text, is_last=is_last):
            if is_call:
                self._call += part
            else:
                deltas += self._end_call() + self._content(part)
        return deltas + self._end_call(is_whole=not self._tools.inside) if is_last else deltas

    def _content(self, text: str) -> list[dict[str, Any]]:
        if self._at_begin and self._thinking:
            text = text.lstrip("\n")  # what stands between the thinking and the answer
        if self.calls and not text.strip():
            return []  # and between two calls
        self._at_begin = self._at_begin and not text
        return [{"content": text}] if text else []

    def _end_call(self, *, is_whole: bool = True) -> list[dict[str, Any]]:
        text, self._call = self._call, ""
        if self._form is None or not text.strip():
            return []
        try:
            calls = self._form.read(text, self._types)
            if self._form.openings and any(name not in self._types for name, _ in calls):
                raise ValueError(text)  # an answer in JSON, and no call
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError):
            return [{"content": self._form.start + text + (self._form.end if is_whole else "")}]
        return [self._as_call(name, arguments) for name, arguments in calls]

    def _as_call(self, name: str, arguments: Any) -> dict[str, Any]:
        self.calls += 1
        has_short_ids = self._form is not None and self._form.has_short_ids
        told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        random = uuid.uuid4().hex
        return {
            "tool_calls": [
                {
                    "index": self.calls - 1,
                    "id": random[:9] if has_short_ids else f"call_{random[:24]}",
                    "type": "function",
                    "function": {"name": name, "arguments": told},
                }
            ]
        }


def message_of(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A whole message out of its deltas."""
    content = "".join(delta.get("content", "") for delta in deltas)
    thinking = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls = [
        {key: value for key, value in call.items() if key != "index"}
        for delta in deltas
        for call in delta.get("tool_calls", ())
    ]
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = calls
    return message
