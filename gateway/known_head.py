"""Heads of messages that a connection has seen before, all but the length that they tell.

Clients and engines write each head of theirs as the last one. Of one that is known, byte for byte, all that was read
still holds, and what follows it is as long as it says: no parser need see it. Learning one costs a fifth of a request,
so that it begins with a connection's second, and ends where no two are alike.
"""

from __future__ import annotations

LENGTHS = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
LENGTH = b"content-length"
END = b"\r\n\r\n"
DIGITS_LIMIT = 12
KEPT_LIMIT_BYTES = 16 * 1024  # of one that is kept, in some forms, as long as its connection is
STRANGE_LIMIT = 8  # heads in a row that no other was like


class KnownHead:
    """One of them."""

    __slots__ = ("_at", "_before", "_behind", "_digits", "_headers", "_place", "body_at")

    def __init__(self, before: bytes, behind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """`before` and `behind` are the head around the length."""
        self._before, self._at, self._behind = before, len(before), behind
        self._headers = headers
        self._place = [name for name, _ in headers].index(LENGTH)
        # Of the last message that was told to have it.
        self._digits = b""
        self.body_at = 0

    def rest(self, data: bytes) -> int:
        """How much of its body a message still lacks that begins with these bytes.

        Less than nothing if it has another head, or another message follows.
        """
        at = self._at
        end = data.find(b"\r", at, at + DIGITS_LIMIT)
        digits = data[at:end]
        if not (data.startswith(self._before) and digits.isdigit() and data.startswith(self._behind, end)):
            return -1
        self.body_at = body_at = end + len(self._behind)
        self._digits = digits
        return int(digits) + body_at - len(data)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the last message that was told to have it."""
        headers = self._headers.copy()
        headers[self._place] = LENGTH, self._digits
        return headers


def is_worth_learning(strange: int) -> bool:
    """Whether a head is, where so many in a row were not known, from 0 for the first of all."""
    return 0 < strange <= STRANGE_LIMIT


def around_length(data: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes] | None:
    """The head that these bytes begin with, before and behind the length that it tells.

    None if there is none, or it is not that of the headers, or too large to be kept.
    """
    end = data.find(END, 0, KEPT_LIMIT_BYTES) + len(END)
    for name in LENGTHS:
        if (at := data.find(name, 0, end)) >= 0:
            at += len(name)
            behind = data.index(b"\r", at)
            return (data[:at], data[behind:end]) if (LENGTH, data[at:behind]) in headers else None
    return None
