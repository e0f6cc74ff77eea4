"""uvicorn's protocol, but that it learns of every client that leaves, and waits for none for ever. Of both ways."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.door.leaving import WatchedFlow
from gateway.errors import HeadTooLarge, body_of, envelope

if TYPE_CHECKING:
    from gateway.fleet import Fleet

logger = logging.getLogger("hostler.door")

SWEEP_S = 1.0
STALL_LIMIT_S = 60.0  # of a request that has begun to come, and of an answer that waits to be read
HEAD_LIMIT_BYTES = 128 * 1024  # what comes at once may be more


class Sweeper:
    """Looks at all connections once a second, for all timers that each would else have."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    async def sweep(self, clients: Collection[asyncio.Protocol]) -> None:
        """End those that are quiet for too long, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for client in [client for client in clients if isinstance(client, WatchedProtocol)]:
                client.end_if_quiet(now)
            self.close_idle()

    def close_idle(self) -> None:
        """Close those to engines that nobody has used for long."""
        for deployment in self.fleet.deployments():
            for replica in deployment.replicas:
                if replica.upstream is not None:
                    replica.upstream.connections.close_idle()


class WatchedProtocol(HttpToolsProtocol):
    """One connection."""

    # There may be thousands, each with more attributes than Python shares the names of.
    __slots__ = (
        *("_answered", "_has_head", "_head_bytes", "_idle_since", "_is_coming", "_last_look", "_size", "_watched"),
    )

    def __init__(self, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._watched: WatchedFlow
        self._answered: RequestResponseCycle | None = None  # uvicorn's own `cycle` is of the request that came last
        self._is_coming = False  # a request has begun, and not all of it is there
        self._has_head = False
        self._head_bytes = 0  # that have come since it began, and are not all of it
        self._size = 0  # of its body so far
        self._last_look: tuple[float, int] | None = None  # when we first saw what has not changed since
        self._idle_since: float | None = time.monotonic()  # no request has come since; None where uvicorn has the clock

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._watched = WatchedFlow(transport, self.loop)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watched.forget()
        if (cycle := self._answered) is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_coming and not self._has_head:
            if self._head_bytes > HEAD_LIMIT_BYTES:
                self._refuse_head()
                return
            self._head_bytes += len(data)
        super().data_received(data)

    def _refuse_head(self) -> None:
        refusal = HeadTooLarge(f"The request's headers are larger than {HEAD_LIMIT_BYTES} bytes.")
        if self.is_answering:  # a second reply would be taken for some of that one
            self.transport.close()
            return
        content = envelope(body_of(refusal))
        lines = [STATUS_LINE[refusal.status]]
        lines += [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
        lines.append(b"content-type: application/json\r\ncontent-length: %d\r\n" % len(content))
        self.transport.write(b"".join([*lines, b"connection: close\r\n\r\n", content]))
        self.transport.close()

    def end_if_quiet(self, now: float) -> None:
        """End it if it is kept for nothing, if its request does not come on, or if nobody reads what is told."""
        if unsent := self.transport.get_write_buffer_size():
            if self._stands_still(now, -unsent):
                logger.info("A client read nothing of its answer for %g s; its connection is ended.", STALL_LIMIT_S)
                self.transport.abort()
        elif self._idle_since is not None:
            if now - self._idle_since > self.timeout_keep_alive:
                self.transport.close()
        elif not self._is_owed():
            self._last_look = None
        elif self._stands_still(now, len(self.headers) + self._size):
            logger.info("A client sent nothing more of its request for %g s; its connection is closed.", STALL_LIMIT_S)
            self.transport.close()

    def _stands_still(self, now: float, progress: int) -> bool:
        if self._last_look is None or self._last_look[1] != progress:
            self._last_look = now, progress
        return now - self._last_look[0] > STALL_LIMIT_S

    def _is_owed(self) -> bool:
        """Whether it is the client's turn to go on with its request."""
        if not self._is_coming or self.flow.read_paused:
            return False
        if not self._has_head:
            return not self.is_answering
        return not self.pipeline and (self.cycle is None or not self.cycle.waiting_for_100_continue)

    def is_between_requests(self) -> bool:
        """Whether nothing of a request was read, and all are answered."""
        cycle = self.cycle
        is_answered = cycle is None or (cycle.response_complete and not cycle.more_body)
        return is_answered and not self._is_coming and not self.pipeline

    @property
    def is_answering(self) -> bool:
        """Whether a request is at work that has all its head."""
        return self.cycle is not None and not self.cycle.response_complete

    # --- what the parser tells

    def on_message_begin(self) -> None:
        self._request_begins()
        super().on_message_begin()

    def _request_begins(self) -> None:
        self._idle_since = self._last_look = None
        self._is_coming, self._has_head = True, False
        self._head_bytes = self._size = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # else it stands behind the body, and has no say in what is decided by the head
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_head = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_coming = False
        super().on_message_complete()
        if not (self.is_answering or self.pipeline):  # it was answered before it was whole, which stopped the clock
            self._idle_since = time.monotonic()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)
