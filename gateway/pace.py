"""How long requests take on a replica, from how many it answers at a time and how many it has ended."""

from __future__ import annotations

import math

REMEMBERED = 64  # requests; what was longer ago counts less and less


class Pace:
    """Counted as requests begin and end. Little's law: on average, one takes what all took together by their number."""

    __slots__ = ("_at", "_ended", "_request_s")

    def __init__(self) -> None:
        self._at = 0.0
        self._request_s = 0.0  # of all requests together
        self._ended = 0.0

    def begin(self, in_flight: int, now: float) -> None:
        """One more begins; so many were in flight up to now."""
        self._request_s += in_flight * (now - self._at)
        self._at = now

    def end(self, in_flight: int, now: float) -> None:
        """One of so many has ended."""
        self._request_s += in_flight * (now - self._at)
        self._at = now
        self._ended += 1
        if self._ended >= REMEMBERED:
            self._ended /= 2
            self._request_s /= 2

    def rest_s(self, in_flight: int, now: float) -> float:
        """How long until the last of those in flight is expected to end, if no other begins.

        Ends that come at random leave the last of n about 1 + ln n times as long as one takes.
        """
        if not in_flight:
            return 0.0
        request_s = self._request_s + in_flight * (now - self._at)
        return request_s / max(1.0, self._ended) * (1 + math.log(in_flight))
