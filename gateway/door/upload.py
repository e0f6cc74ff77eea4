"""A large request whose body is passed on while it comes. Knows what to do when that cannot be taken back.

Its connection is a fresh one, as a request that is lost on the way could not be sent again. A body that comes in chunks
goes on in chunks; the end of each is sent with what follows.
"""

from __future__ import annotations

import sys
from typing import Any

from gateway.api.beginning import Fields
from gateway.api.body import too_large
from gateway.api.exchange import RESTARTED_MIDWAY
from gateway.connections import Connection, UpstreamLost
from gateway.door.splice import Splice
from gateway.errors import HandedOver, HostlerError, SendAgain, ShuttingDown, answer
from gateway.upstream import Upstream

ENDLESS = sys.maxsize  # the rest of a body whose length is not told


class Upload(Splice):
    """One such request and its reply."""

    def __init__(self, *of_splice: Any, fields: Fields, rest: int) -> None:
        """`fields` have seen the body so far, of which `rest` bytes are still to come, or ENDLESS."""
        super().__init__(*of_splice)
        self._is_second = True  # it is never sent again from here
        self._is_too_large = False
        self._is_under_way = False  # what has come of the body is with the engine, and no longer here
        self.rest = rest
        self._comes_chunked = rest == ENDLESS
        self._fields = fields

    def more(self, part: bytes) -> None:
        """The next bytes of the request's body."""
        if not self._comes_chunked:
            self.rest -= len(part)
        if self.response_complete:
            return
        try:
            if not self._is_under_way:
                self.sent += part
                self.body += part
            names = self._fields.feed(part)
            if b"stream_options" in names:  # the client's own count, as the last ones; else nobody has asked, and
                self.hides_usage = False  # the tokens of a `stream` that comes late are counted by their events
            if not self.status and not self.terms.asked_by.isdisjoint(names):
                self._have_it_sent_again()
            elif self._is_under_way and self._connection is not None:
                self._connection.more(b"\r\n%x\r\n%b" % (len(part), part) if self._comes_chunked else part)
        except Exception:
            self.fail()

    def ends(self) -> None:
        """All of the request's body has come."""
        if not self.rest:
            return
        self.rest = 0
        if self._is_under_way and self._connection is not None:
            try:
                self._connection.more(b"\r\n0\r\n\r\n", is_last=True)
            except Exception:
                self.fail()

    def refuse_size(self, limit_bytes: int) -> None:
        """More has come than may."""
        self._is_too_large = True
        self._refuse_midway(too_large(limit_bytes))

    def _refuse_midway(self, reason: HostlerError) -> None:
        """It cannot go on so; the plain route says it where nothing has gone yet."""
        if self.response_complete:
            return
        self._cancel()
        self._drop()
        if not self._is_under_way:
            self._give_up(None)
        elif self.status:  # a second head would be taken for some of the answer
            self._client.transport.close()
        else:
            self._refuse(reason)

    def _have_it_sent_again(self) -> None:
        """What we would have had to know before stands behind what has gone already."""
        self.terms.is_asked_late = True
        known = ", ".join(sorted(name.decode() for name in self.terms.asked_by))
        self._refuse_midway(
            SendAgain(
                f"Send it again, and it is taken as it is. The request was on its way already when one of {known} "
                "came. Such fields cost less where they stand before what is large."
            )
        )

    # --- as splices do, but with a body that is not all there

    def _reused(self, upstream: Upstream) -> Connection | None:
        self._client.flow.pause_reading()  # until there is a connection
        return None

    def measure(self) -> bytes:
        if self._comes_chunked and self.rest:
            return b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(self.body)
        return super().measure()

    def _ask(self, connection: Connection) -> None:
        self._client.flow.resume_reading()  # before the engine may pause it
        super()._ask(connection)
        self._is_under_way = True
        self.sent = self.body = b""
        self.head = None  # which holds some of it, too

    def write_paused(self, *, is_paused: bool) -> None:
        if is_paused and self.rest:  # else nothing of it is read any more but that the client leaves
            self._client.flow.pause_reading()
        elif not is_paused:
            self._client.flow.resume_reading()

    def _give_up(self, why: UpstreamLost | None) -> None:
        if not self._is_under_way:
            super()._give_up(why)
            self._client.flow.resume_reading()
        elif why is None:
            self._refuse(HostlerError("The gateway could not pass the request or its answer on; its log says more."))
        else:
            self._task = self._client.loop.create_task(self._mourn(why))
            self._own(self._task)

    async def _tell_loss(self, why: UpstreamLost) -> None:
        if self.status:
            await super()._tell_loss(why)
            return
        reason: HostlerError
        try:
            await self.raise_loss(self._replica, self._life, why, is_last=True)
            return
        except HandedOver:
            reason = ShuttingDown(RESTARTED_MIDWAY)
        except HostlerError as exc:
            reason = exc
        self._task = None
        self._refuse(reason)

    def _refuse(self, reason: HostlerError) -> None:
        told = answer(reason)
        self._start(told.status_code, told.raw_headers)
        self._write([bytes(told.body)], is_last=True)
        self._end(reason.status, was_served=False)

    def count(self, outcome: int) -> float:
        """Who leaves before the whole request has come, or sends too much, has asked nothing."""
        return 0.0 if self.rest and (self.has_left or self._is_too_large) else super().count(outcome)
