"""Heads of messages that a connection has seen before, all but the length that they tell.

Clients and engines write each head of theirs as the last one. Of one that is known, byte for byte, all that was read
still holds, and what follows it is as long as it says: no parser need see it.
"""

from __future__ import annotations

LENGTHS = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
END = b"\r\n\r\n"
DIGITS_LIMIT = 12


class KnownHead:
    """One of them."""

    __slots__ = ("_at", "_before", "_behind", "body_at", "headers")

    def __init__(self, before: bytes, behind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """`before` and `behind` are the head around the length; `headers` are shared, and nobody changes them."""
        self._before, self._at, self._behind = before, len(before), behind
        self.headers = headers
        self.body_at = 0  # in the last message that was told to have it

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
        return int(digits) + body_at - len(data)


def around_length(data: bytes) -> tuple[bytes, bytes] | None:
    """The head that these bytes begin with, before and behind the length that it tells; None if there is none."""
    end = data.find(END) + len(END)
    for name in LENGTHS:
        if (at := data.find(name, 0, end)) >= 0:
            at += len(name)
            return data[:at], data[data.index(b"\r", at) : end]
    return None
