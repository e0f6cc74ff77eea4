"""Connections to one replica, each used for one request after the other. Bytes in, bytes out; knows no models.

A reply is parsed only as far as to know its head and its end. Whoever holds the other end of a splice takes the bytes
here as they come; `gateway/near.py` reads them for everything that may take its time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

import httptools

from engines.base import Endpoint
from gateway.known_head import KnownHead, around_length, is_worth_learning
from gateway.limits import OUT_OF_FILES

# llama-server and uvicorn close idle connections after 5 s: be first, so that a request never meets a dead one.
KEEPALIVE_S = 4.0
CONNECT_LIMIT_S = 5.0
DISCONNECTED = "Server disconnected"
LAST_WORDS_BYTES = 64 * 1024  # at a time
BROKE_OFF = "its connection broke in the middle of the reply"


class UpstreamLost(Exception):
    """The connection to the replica could not be made, or broke."""


class CannotAsk(UpstreamLost):
    """We could not open a connection, for want of open files; it says nothing of the replica."""


class NoHttp(UpstreamLost):
    """What the replica said is no HTTP. It has the request, which is not sent again."""


class Taker(Protocol):
    """Whose request is on a connection."""

    def took(self, connection: Connection, parts: list[bytes], *, is_whole: bool) -> None:
        """More of the reply has come, the end with `is_whole`; its head is in `status` and `headers`."""

    def lost(self, why: UpstreamLost) -> None:
        """There will be no more of it."""

    def write_paused(self, *, is_paused: bool) -> None:
        """The engine reads slower than we write, or no longer so."""


class KnownReply(KnownHead):
    """The head of a whole reply. `told` is what its taker has made of it."""

    __slots__ = ("status", "told")

    def __init__(self, before: bytes, behind: bytes, headers: list[tuple[bytes, bytes]], status: int) -> None:
        super().__init__(before, behind, headers)
        self.status = status
        self.told: tuple[bytes, bytes] | None = None


class Connection(asyncio.Protocol):
    """One connection: a request at a time, and its reply."""

    __slots__ = (
        *("_connections", "_has_head", "_headers", "_idle_since", "_is_first", "_is_interim", "_is_kept", "_is_odd"),
        *("_is_read_paused", "_is_upload", "_is_whole", "_parser", "_parts", "_rest", "_strange", "_taker"),
        *("_transport", "is_known", "known", "status"),
    )

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # until it is made
        self._taker: Taker | None = None
        self._is_odd = False  # it says what nobody asked for, so it is not used again
        self._is_kept = False  # the engine keeps it open after the reply
        self._is_read_paused = False
        self._rest = 0  # bytes of the request that nobody has sent yet
        self._is_upload = False  # it was made for one, and others are there for what is small
        self._is_interim = False
        self._is_first = False  # nothing of the reply has come
        self._is_whole = False
        self._has_head = False
        self._parts: list[bytes] = []
        self.status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self.known: KnownReply | None = None  # the head of a whole reply before
        self.is_known = False  # this reply has it, but for its length
        self._strange = -1  # replies in a row whose head was not known
        self._idle_since = 0.0

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the reply whose head has come."""
        return self.known.headers() if self.known and self.is_known else self._headers

    @property
    def has_head(self) -> bool:
        """Whether the head of the reply has come."""
        return self._has_head

    def is_fit(self) -> bool:
        """Whether the engine will most likely still answer by it."""
        return time.monotonic() - self._idle_since < KEEPALIVE_S and not self._transport.is_closing()

    def ask(self, taker: Taker, head: bytes, body: bytes, rest: int = 0) -> None:
        """Send a request; of its body `rest` bytes come by `more`."""
        self._taker = taker
        self._rest = rest
        self._is_upload = rest > 0
        self._has_head = self._is_whole = self._is_kept = self.is_known = False
        self._is_first = True
        self._headers = []
        self._connections.asking += 1
        if len(body) > JOINED_BYTES:
            self._transport.writelines((head, body))
        else:
            self._transport.write(head + body)

    def more(self, part: bytes, *, is_last: bool = False) -> None:
        """More of the request's body; the end of one whose length was not told says so."""
        self._rest = 0 if is_last else self._rest - len(part)
        self._transport.write(part)

    def pause(self, *, is_paused: bool) -> None:
        """Whether the reply is to wait, as nobody takes it."""
        if is_paused != self._is_read_paused and not self._transport.is_closing():
            self._is_read_paused = is_paused
            (self._transport.pause_reading if is_paused else self._transport.resume_reading)()

    def abandon(self) -> None:
        """Break it off at once: whoever asked has left."""
        self._end()
        self._transport.abort()

    # --- what the loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._connections.open.add(self)

    def data_received(self, data: bytes) -> None:
        connections = self._connections
        connections.heard += 1
        taker = self._taker
        if taker is None:
            self._transport.abort()
            return
        if is_first := self._is_first:
            self._is_first = False
        try:
            if not (is_first and self._is_known(data)):
                self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._is_odd = True
            if not self._is_whole:
                self._lose(NoHttp(f"what it said is no HTTP: {exc or type(exc).__name__}"))
                self._transport.abort()
                return
        if self._has_head:
            parts, self._parts = self._parts, []
            if self._is_whole:
                self._end()
                if is_first and not self.is_known:
                    self._learn(data)
                self._give_back()
                taker.took(self, parts, is_whole=True)
            elif parts:
                taker.took(self, parts, is_whole=False)

    def _is_known(self, data: bytes) -> bool:
        """Whether it is a whole reply with a head as the last one's."""
        known = self.known
        if known is None or known.rest(data):
            return False
        self.status = known.status
        self._strange = 0
        self._parts = [data[known.body_at :]]
        self._has_head = self._is_whole = self._is_kept = self.is_known = True
        return True

    def _learn(self, data: bytes) -> None:
        self.known = None
        self._strange += 1
        is_usual = self._is_kept and not self._is_odd and self.status == 200
        if is_usual and is_worth_learning(self._strange) and (head := around_length(data, self._headers)):
            known = KnownReply(*head, self._headers, self.status)
            if not known.rest(data):  # else it is a head before that of the reply
                self.known = known

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.forget(self)
        if self._taker is not None and exc is not None:
            self._hear_last_words()
        if self._taker is None:
            return
        if exc is None and self._has_head and self._ends_with_connection():
            taker, self._is_whole = self._taker, True
            self._end()
            taker.took(self, [], is_whole=True)
            return
        why = BROKE_OFF if self._has_head else str(exc or "") or DISCONNECTED
        self._lose(UpstreamLost(why))

    def _hear_last_words(self) -> None:
        """An engine that refuses a body before it has all of it may answer and close, and it is our write that fails.

        The loop then reads no more, but its socket is open until this returns.
        """
        if (socket := self._transport.get_extra_info("socket")) is None:
            return
        with suppress(OSError):
            while self._taker is not None and (data := os.read(socket.fileno(), LAST_WORDS_BYTES)):
                self.data_received(data)

    def pause_writing(self) -> None:
        if self._taker:
            self._taker.write_paused(is_paused=True)

    def resume_writing(self) -> None:
        if self._taker:
            self._taker.write_paused(is_paused=False)

    # --- what the parser tells

    def on_message_begin(self) -> None:
        if self._is_whole:
            self._is_odd = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._is_interim = True
            self._headers = []
        elif not self._is_whole:
            self.status = status
            self._has_head = True

    def on_body(self, body: bytes) -> None:
        if not self._is_whole:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._is_interim:
            self._is_interim = False
        elif not self._is_whole:
            self._is_whole = True
            self._is_kept = self._parser.should_keep_alive()  # afterwards it always says no

    # ---

    def _ends_with_connection(self) -> bool:
        return not any(
            name == b"content-length" or (name == b"transfer-encoding" and b"chunked" in value.lower())
            for name, value in self.headers
        )

    def _end(self) -> None:
        if self._taker is not None:
            self._taker = None
            self._connections.asking -= 1

    def _lose(self, why: UpstreamLost) -> None:
        taker = self._taker
        self._end()
        if taker is not None:
            taker.lost(why)

    def _give_back(self) -> None:
        if self._rest:  # it has answered before the request was whole
            self._transport.abort()
            return
        if self._is_read_paused:
            self.pause(is_paused=False)
        is_spare = self._is_upload and self._connections.idle
        if not self._is_kept or self._is_odd or is_spare or self._transport.is_closing():
            self._transport.close()
            return
        if self._transport.get_write_buffer_size():  # the next request would wait behind a body that nobody needs
            self._transport.abort()
            return
        self._idle_since = time.monotonic()
        self._connections.idle.append(self)

    def break_off(self, why: UpstreamLost) -> None:
        """End it from our side: whoever waits for it learns why."""
        self._lose(why)
        self._transport.abort()


JOINED_BYTES = 64 * 1024  # up to here it is cheaper to copy a body than to send it apart


class Connections:
    """All connections to one replica; the one used last is used next."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.open: set[Connection] = set()
        self.idle: list[Connection] = []
        self.asking = 0  # requests that are not at their end
        self.sent = 0  # requests so far
        self.heard = 0  # grows with each sign of life
        self.is_closed = False

    def take(self) -> Connection | None:
        """One that is open and was used a moment ago; None if there is none."""
        if self.idle:
            connection = self.idle.pop()
            if connection.is_fit():
                return connection
            self.idle.append(connection)
            self.close_idle()
        return None

    def close_idle(self) -> None:
        """Close those that nobody has used for KEEPALIVE_S, or that are ending already."""
        stale = [one for one in self.idle if not one.is_fit()]
        self.idle = [one for one in self.idle if one not in stale]
        for one in stale:
            one.abandon()

    async def connect(self) -> Connection:
        """A new one.

        Raises:
            UpstreamLost, CannotAsk: it could not be made.
        """
        if self.is_closed:
            raise UpstreamLost("the replica was stopped")
        loop = asyncio.get_running_loop()
        endpoint = self._endpoint

        def make() -> Connection:
            return Connection(self)

        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                if endpoint.socket:
                    _, connection = await loop.create_unix_connection(make, endpoint.socket)
                else:
                    _, connection = await loop.create_connection(make, endpoint.host, endpoint.port)
        except TimeoutError as exc:
            raise UpstreamLost(f"no connection within {CONNECT_LIMIT_S:g} s") from exc
        except OSError as exc:
            is_ours = exc.errno in OUT_OF_FILES
            raise (CannotAsk if is_ours else UpstreamLost)(str(exc) or type(exc).__name__) from exc
        if self.is_closed:
            connection.abandon()
            raise UpstreamLost("the replica was stopped")
        return connection

    def forget(self, connection: Connection) -> None:
        """It is gone."""
        self.open.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    def close(self) -> None:
        """Close all; whoever waits for one learns it."""
        self.is_closed = True
        for connection in tuple(self.open):
            connection.break_off(UpstreamLost("the replica was stopped"))


def is_sse(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a reply of that head is a stream of events."""
    kind = None
    for name, value in headers:
        if name == b"content-encoding":
            return False
        if name == b"content-type" and kind is None:
            kind = value.partition(b";")[0].strip().lower()
    return kind == b"text/event-stream"
