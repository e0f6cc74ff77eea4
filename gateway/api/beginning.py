"""The beginning of a large JSON request, so that its head is known before the rest has come.

A client may say fields in any order. So whoever passes the rest on goes on looking at its names, and at nothing else.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from gateway.api.affinity import MESSAGES_READ
from gateway.api.heads import ChatHead, PromptHead

STRUCTURE = re.compile(rb'["{}\[\]]')
# Runs of what is short, where looking for each quote would cost more; what is long is jumped over.
TEXTS = re.compile(rb'(?:[^"{}\[\]]*+"[^"\\]{0,200}+")++')
ESCAPES = re.compile(rb'(?:[^"\\]{0,200}+\\.)++', re.DOTALL)
EMPTY = {b"[": b"[]", b"{": b"{}", b'"': b'""'}
BETWEEN = re.compile(r"[\s,]*")  # two items
DECODER = json.JSONDecoder()
NAME_LIMIT_BYTES = 300  # longer ones are none that we know
BACKSLASH = ord("\\")


class Fields:
    """The names of an object's own fields, as its bytes come; what stands in the fields is jumped over."""

    def __init__(self) -> None:
        self.size = 0  # bytes so far
        self.name_end = 0  # how many of them, up to the end of the last whole name
        self._depth = 0
        self._is_text = False
        self._is_name = False  # the text is one
        self._expects_name = False
        self._is_odd = False  # what came ends with a backslash that stands for itself with the next byte
        self._name = b""

    def is_in_value(self) -> bool:
        """Whether the value of the last name has begun, and is no number or word."""
        return self._depth > 1 or (self._is_text and not self._is_name)

    def feed(self, data: bytes) -> list[bytes]:
        """The names that are whole with these bytes."""
        names: list[bytes] = []
        at, size = 0, len(data)
        while at < size:
            if self._is_text:
                end = self._end_of_text(data, at)
                if self._is_name and len(self._name) < NAME_LIMIT_BYTES:
                    self._name += data[at : size if end < 0 else end]
                if end < 0:
                    break
                if self._is_name:
                    names.append(_unescaped(self._name))
                    self.name_end = self.size + end + 1
                self._is_text = self._is_name = False
                at = end + 1
                continue
            found = STRUCTURE.search(data, at)
            until = found.start() if found else size
            if self._depth == 1 and data.find(b",", at, until) >= 0:
                self._expects_name = True
            if found is None:
                break
            mark = found[0]
            if mark == b'"' and self._depth > 1 and (run := TEXTS.match(data, until)):
                at = run.end()
                continue
            if mark == b'"':
                self._is_text = True
                self._is_name = self._depth == 1 and self._expects_name
                self._expects_name, self._name = False, b""
            elif mark in b"{[":
                self._depth += 1
                self._expects_name = self._depth == 1
            else:
                self._depth -= 1
            at = until + 1
        self.size += size
        return names

    def _end_of_text(self, data: bytes, at: int) -> int:
        """Where its closing quote is; negative if it has not come."""
        if self._is_odd:
            at += 1
            self._is_odd = False
        while True:
            end = data.find(b'"', at)
            begin = until = len(data) if end < 0 else end
            while begin > at and data[begin - 1] == BACKSLASH:
                begin -= 1
            is_odd = (until - begin) % 2 == 1
            if end < 0:
                self._is_odd = is_odd
                return end
            if not is_odd:
                return end
            run = ESCAPES.match(data, end + 1)
            at = run.end() if run else end + 1


def as_whole(begun: bytes, fields: Fields) -> bytes | None:
    """What has come of a request, as an object whose last value is empty; None if it ends between two values."""
    if not fields.is_in_value():
        return None
    colon, _, value = begun[fields.name_end :].partition(b":")
    empty = EMPTY.get(value.lstrip()[:1])
    if colon.strip() or empty is None:
        return None
    return begun[: fields.name_end] + b":" + empty + b"}"


def with_last_value(head: Any, begun: bytes, fields: Fields) -> Any:
    """The head with what has come of its last value, where `as_whole` has an empty one: conversations are told apart
    by how they begin.
    """
    value = begun[fields.name_end :].partition(b":")[2].lstrip()
    if isinstance(head, ChatHead) and not head.messages:
        return msgspec.structs.replace(head, messages=_items(value))
    if isinstance(head, PromptHead) and bytes(head.prompt) == EMPTY[b'"']:
        return msgspec.structs.replace(head, prompt=msgspec.Raw(value))
    return head


def _items(array: bytes) -> list[msgspec.Raw]:
    """The first items of an array, of which the last may be one that has only begun."""
    text = array.decode("latin-1")  # a character for each byte
    items: list[msgspec.Raw] = []
    at = 1
    while len(items) < MESSAGES_READ and (at := BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        try:
            _, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = len(text)
        items.append(msgspec.Raw(array[at:end]))
        at = end
    return items


def _unescaped(name: bytes) -> bytes:
    if b"\\" not in name:
        return name
    try:
        return msgspec.json.decode(b'"' + name + b'"', type=str).encode()
    except (msgspec.DecodeError, UnicodeError):
        return name
