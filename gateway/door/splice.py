"""One easy request and its reply, from socket to socket. Decides nothing: `Exchange` does.

As long as no byte has gone to the client, whatever goes wrong is told to the plain route, which goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from gateway.api.exchange import (
    BODILESS,
    ENGINE_ERROR_LIMIT_BYTES,
    NOT_FORWARDED,
    RESTARTED_MIDWAY,
    Asked,
    Exchange,
    Headers,
    Lost,
    in_utf8,
    with_length,
)
from gateway.api.ways import Way
from gateway.connections import JOINED_BYTES, CannotAsk, Connection, KnownReply, NoHttp, UpstreamLost, is_sse
from gateway.errors import HandedOver, HostlerError, ShuttingDown, body_of, envelope
from gateway.fleet import Fleet
from gateway.replica import Replica
from gateway.upstream import Upstream

logger = logging.getLogger("hostler.inference")

CLOSE = b"connection: close\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
LAST_CHUNK = b"0\r\n\r\n"


class Client(Protocol):
    """The client's connection, as its splice sees it."""

    transport: asyncio.Transport
    tasks: set[asyncio.Task[None]]
    loop: asyncio.AbstractEventLoop
    flow: FlowControl

    def default_head(self) -> bytes:
        """What every reply's head begins with, below its status."""

    def replay(self, splice: Splice, lost: Lost | None) -> None:
        """Have the plain route answer; no byte has gone to the client."""

    def spliced(self, splice: Splice, outcome: int, seconds: float) -> None:
        """It is over."""


class KnownLines(Protocol):
    """Headers that were passed on before."""

    def passed_on(self, own_names: frozenset[bytes]) -> bytes:
        """As lines of a head, without those that the engine gets from us."""


class _Nobody:
    """Who waits for a message in uvicorn's cycles; here nobody does."""

    def set(self) -> None:
        """Nothing happens."""


class Splice(Exchange):
    """One request and its reply. For uvicorn it poses as the cycle that the connection is in."""

    __slots__ = (
        *("_client", "_connection", "_has_begun", "_is_chunked", "_is_second", "_life", "_parts", "_replica", "_size"),
        *("_task", "_top", "_upstream", "disconnected", "keep_alive", "known", "response_complete", "rest", "sent"),
    )
    message_event = _Nobody()
    more_body = waiting_for_100_continue = False

    def __init__(
        self, fleet: Fleet, way: Way, asked: Asked, headers: Headers, request_id: bytes, client: Client, sent: bytes
    ) -> None:
        """`sent` is the body as the client sent it."""
        super().__init__(fleet, way, asked, headers, request_id)
        self.sent = sent
        self._client = client
        self.rest = 0  # bytes of the request's body that are still to come
        self.keep_alive = True
        self.known: KnownLines | None = None  # the client's headers, if they have been asked with before
        self.response_complete = self.disconnected = False
        self._replica: Replica  # once it begins
        self._upstream: Upstream
        self._life = 0
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_second = False  # the request has been sent once before
        self._has_begun = False  # the reply's first bytes have come
        self._parts: list[bytes] | None = None  # of a reply that is needed as a whole
        self._size = 0
        self._top = b""  # the head that goes out with the next bytes
        self._is_chunked = False

    def begin(self, replica: Replica, upstream: Upstream) -> None:
        """Ask the replica, which is counted as in use."""
        self.phase = "waiting"
        self._replica, self._upstream, self._life = replica, upstream, replica.starts
        self.replica_name = replica.name
        upstream.connections.sent += 1
        try:
            connection = self._reused(upstream)
            if connection is None:
                self._connect()
            else:
                self._ask(connection)
        except Exception:
            self.fail()

    @property
    def replica(self) -> Replica:
        """Which answers."""
        return self._replica

    # --- to the engine

    def _reused(self, upstream: Upstream) -> Connection | None:
        return upstream.connections.take()

    def _ask(self, connection: Connection) -> None:
        self._connection = connection
        if self._client.flow.write_paused:
            connection.pause(is_paused=True)
        upstream = self._upstream
        lines = self.known.passed_on(upstream.own_names) if self.known else passed_on(self.headers, upstream.own_names)
        head = b"%b%bx-request-id: %b\r\n%b" % (
            upstream.opening(self.terms.upstream_path),
            lines,
            self.request_id,
            self.measure(),
        )
        connection.ask(self, head, self.body, self.rest)

    def measure(self) -> bytes:
        """The end of the head, which says how long the body is."""
        return b"content-length: %d\r\n\r\n" % (len(self.body) + self.rest)

    def _connect(self) -> None:
        self._task = self._client.loop.create_task(self._ask_anew())
        self._own(self._task)

    def _own(self, task: asyncio.Task[None]) -> None:
        self._client.tasks.add(task)
        task.add_done_callback(self._client.tasks.discard)

    async def _ask_anew(self) -> None:
        try:
            try:
                connection = await self._upstream.connections.connect()
            finally:
                self._task = None
            self._ask(connection)
        except UpstreamLost as exc:
            self.lost(exc)
        except Exception:
            self.fail()

    def write_paused(self, *, is_paused: bool) -> None:
        """The engine takes the request's body slower than it was sent; it is all on its way already."""

    # --- from the engine

    def took(self, connection: Connection, parts: list[bytes], *, is_whole: bool) -> None:
        """The next bytes of the reply."""
        try:
            if is_whole:
                self._connection = None
            if not self._has_begun:
                self._has_begun = True
                self.begins()
                if connection.is_known and self._tells_known(connection.known, parts[0]):
                    return
                self._begin_reply(connection, parts)
            if self._parts is not None:
                self._collect(connection, parts, is_whole=is_whole)
            else:
                self._pass_on(parts, is_whole=is_whole)
        except Exception:
            self.fail()

    def _pass_on(self, parts: list[bytes], *, is_whole: bool) -> None:
        if self.is_sse:
            chunk = self.streamed(parts[0] if len(parts) == 1 else b"".join(parts))
            if is_whole:
                chunk += self.held
            elif self._is_chunked and 0 < len(chunk) <= JOINED_BYTES and not self._top:  # most of a stream
                self._client.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                return
            parts = [chunk] if chunk else []
        else:
            for part in parts:
                self.heard(part)
        self._write(parts, is_last=is_whole)
        if is_whole:
            self._end(self.status, was_served=True)

    def _begin_reply(self, connection: Connection, parts: list[bytes]) -> None:
        if connection.status >= 400:
            self._parts = []
            return
        self.is_sse = is_sse(connection.headers)
        headers = self.returned(connection.status, connection.headers, self._replica)
        if not self.is_sse and self.changes_json(headers):
            if self.terms.is_read_whole:
                self._parts = []
                return
            parts[:1] = [self.opened(part, headers) for part in parts[:1]]
        self._start(connection.status, headers)
        known = connection.known if connection.is_known else None
        if known is not None and not self.terms.changes_json:
            known.told = _around_length(headers)

    def _tells_known(self, known: KnownReply | None, body: bytes) -> bool:
        """Whether the whole reply, whose head is as one before, needs no second look: then it is on its way."""
        if known is None or known.told is None or self.terms.changes_json or not self.keep_alive:
            return False
        self.status, self.phase = known.status, "answering"
        self.heard(body)
        before, behind = known.told
        head = b"%b%b%b%d%bx-request-id: %b\r\n\r\n" % (
            STATUS_LINE[known.status],
            self._client.default_head(),
            before,
            len(body),
            behind,
            self.request_id,
        )
        if len(body) > JOINED_BYTES:
            self._client.transport.writelines((head, body))
        else:
            self._client.transport.write(head + body)
        self._end(known.status, was_served=True)
        return True

    def _collect(self, connection: Connection, parts: list[bytes], *, is_whole: bool) -> None:
        """A reply that is changed as a whole; of an error so much as is read of it."""
        assert self._parts is not None
        self._parts += parts
        status = connection.status
        if status >= 400:
            self._size += sum(map(len, parts))
            if not is_whole and self._size < ENGINE_ERROR_LIMIT_BYTES:
                return
            self._drop()
            told, headers, payload = self.refusal(status, connection.headers, b"".join(self._parts))
        elif is_whole:
            payload = self.renamed(b"".join(self._parts))
            told, headers = status, self.returned(status, connection.headers, self._replica)
            with_length(headers, len(payload))
            payload = self.opened(payload, headers)
            self.heard(payload)
        else:
            return
        self._start(told, headers)
        self._write([payload], is_last=True)
        self._end(self.status, was_served=status < 500)

    def lost(self, why: UpstreamLost) -> None:
        """The engine's connection is gone before the end of the reply."""
        try:
            self._lose(why)
        except Exception:
            self.fail()

    def _lose(self, why: UpstreamLost) -> None:
        connection, self._connection = self._connection, None
        if self.status:
            self._task = self._client.loop.create_task(self._mourn(why))
            self._own(self._task)
        elif (
            self._is_second
            or self._upstream.connections.is_closed
            or isinstance(why, CannotAsk | NoHttp)
            or isinstance(why.__cause__, TimeoutError)
            or (connection is not None and connection.has_head)
        ):
            self._give_up(why)
        else:
            self._is_second = True
            self._connect()

    def _give_up(self, why: UpstreamLost | None) -> None:
        """What becomes of the request now is for the plain route to say."""
        self.response_complete = True
        self.deployment.release(self._replica, was_served=False)
        lost = None
        if why is not None:
            lost = Lost(self.deployment, self._replica, self._life, why, self.started)
        self._client.replay(self, lost)

    def fail(self) -> None:
        """A fault of the gateway is being handled: nothing may be left open, or counted as in use.

        The plain route answers if no byte has gone to the client; else the connection ends.
        """
        logger.exception("A fault of the gateway at %s, on the short way", self.way.path)
        self._drop()
        self._cancel()
        try:
            if self.response_complete:
                self._client.transport.close()
            elif self._top or not self.status:
                self.status, self._top = 0, b""
                self._give_up(None)
            else:
                self.keep_alive = False
                self._end(500, was_served=False)
        except Exception:
            logger.exception("Another one; the client's connection is closed")
            self._client.transport.close()

    async def _mourn(self, why: UpstreamLost) -> None:
        try:
            await self._tell_loss(why)
        except Exception:
            self.fail()

    async def _tell_loss(self, why: UpstreamLost) -> None:
        """Tell the client that there is no more, and why."""
        reason: HostlerError
        try:
            await self.raise_loss(self._replica, self._life, why, is_last=True)
            return
        except HandedOver:
            reason = ShuttingDown(RESTARTED_MIDWAY)
        except HostlerError as exc:
            reason = exc
        self.status = reason.status
        if self.is_sse:
            self._write([self.as_event(envelope(body_of(reason)))], is_last=True)
        else:
            logger.warning("%s: the reply broke off: %s", self.uid, reason)
            self._client.transport.close()
        self._task = None
        self._end(self.status, was_served=False)

    # --- to the client

    def _start(self, status: int, headers: Headers) -> None:
        self.status, self.phase = status, "answering"
        lines = [STATUS_LINE[status], self._client.default_head()]
        is_measured = status in BODILESS
        for name, value in headers:
            if name == b"content-length":
                is_measured = True
            lines += (name, b": ", value, b"\r\n")
        lines += (b"x-request-id: ", self.request_id, b"\r\n")
        if not self.keep_alive:
            lines.append(CLOSE)
        if not is_measured:
            self._is_chunked = True
            lines.append(CHUNKED)
        lines.append(b"\r\n")
        self._top = b"".join(lines)

    def _write(self, parts: list[bytes], *, is_last: bool) -> None:
        """Send some of the body, with the head if it has not gone yet."""
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        if self._is_chunked:
            if size:
                parts = [b"%x\r\n" % size, *parts, b"\r\n"]
            if is_last:
                parts.append(LAST_CHUNK)
        if self._top:
            parts.insert(0, self._top)
            self._top = b""
        if len(parts) == 1:
            self._client.transport.write(parts[0])
        elif size > JOINED_BYTES:
            self._client.transport.writelines(parts)
        elif parts:
            self._client.transport.write(b"".join(parts))

    def client_paused(self, *, is_paused: bool) -> None:
        """The client reads slower than the engine writes, or no longer so."""
        if self._connection is not None:
            self._connection.pause(is_paused=is_paused)

    def client_left(self) -> None:
        """Nobody waits for the answer any more: the engine is to stop at once."""
        if self.response_complete:
            return
        self._drop()
        self._cancel()
        try:
            self.has_left = True
            self._end(499, was_served=False)
        except Exception:
            self.fail()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    def _end(self, outcome: int, *, was_served: bool) -> None:
        self.response_complete = True
        self.deployment.release(self._replica, was_served=was_served)
        self._client.spliced(self, outcome, self.count(outcome))


def passed_on(headers: Headers, own_names: frozenset[bytes]) -> bytes:
    """What the engine gets of them, as lines of a head; of some names it gets our own."""
    lines: list[bytes] = []
    for name, value in headers:
        if name not in NOT_FORWARDED and name not in own_names:
            lines += (name, b": ", value, b"\r\n")
    joined = b"".join(lines)
    return joined if joined.isascii() else b"\r\n".join(map(in_utf8, joined.split(b"\r\n")))


def _around_length(headers: Headers) -> tuple[bytes, bytes] | None:
    """Their lines in a head, before and behind the number of bytes in the body."""
    names = [name for name, _ in headers]
    if b"content-length" not in names:
        return None
    at = names.index(b"content-length")
    before, behind = (
        b"".join([b"%b: %b\r\n" % header for header in part]) for part in (headers[:at], headers[at + 1 :])
    )
    return before + b"content-length: ", b"\r\n" + behind
