"""A request to an engine of ours by `connections`, for whoever reads the reply in his own time."""

from __future__ import annotations

import asyncio

from gateway.connections import Connection, Connections, NoHttp, UpstreamLost, is_sse

HELD_BYTES = 2**18  # of a reply that nobody reads; the rest waits in the engine


class NearReply:
    """The reply to one request, which has begun. Whoever got it closes it."""

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_sse = False
        self._connection: Connection | None = connection  # as long as there is more of it
        self._parts: list[bytes] = []
        self._size = 0
        self._why: UpstreamLost | None = None  # there is no more of it
        self._waiter: asyncio.Future[None] | None = None

    async def begin(self) -> None:
        """Until there is a head, and something behind it.

        Raises:
            UpstreamLost: there will be none.
        """
        while not self.status:
            await self._next()

    async def read(self) -> bytes:
        """The next bytes of the body as they came; empty at its end.

        Raises:
            UpstreamLost: the body broke off.
        """
        while not self._parts:
            if self._connection is None and self._why is None:
                return b""
            await self._next()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts, self._size = [], 0
        if self._connection is not None:
            self._connection.pause(is_paused=False)
        return data

    def close(self) -> None:
        """Done with it: before its end the engine sees us leave."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    async def _next(self) -> None:
        if self._why is not None:
            raise self._why
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- what the connection tells

    def took(self, connection: Connection, parts: list[bytes], *, is_whole: bool) -> None:
        """The next bytes."""
        if not self.status:
            self.status, self.headers = connection.status, connection.headers
            self.is_sse = is_sse(connection.headers)
        self._parts += filter(None, parts)
        self._size += sum(map(len, parts))
        if is_whole:
            self._connection = None
        elif self._size > HELD_BYTES:
            connection.pause(is_paused=True)
        self._wake()

    def lost(self, why: UpstreamLost) -> None:
        """There will be no more."""
        self._connection, self._why = None, why
        self._wake()

    def write_paused(self, *, is_paused: bool) -> None:
        """The engine takes the request slower than it was sent; all of it is on its way already."""


async def ask(connections: Connections, head: bytes, body: bytes) -> NearReply:
    """Send a request and wait for its reply; once more on a new connection if it is lost before a byte of it.

    Raises:
        UpstreamLost: there is none.
        CannotAsk: as we could not connect.
    """
    connection = connections.take() or await connections.connect()
    for is_last in (False, True):
        reply = NearReply(connection)
        connection.ask(reply, head, body)
        try:
            await reply.begin()
        except UpstreamLost as exc:
            if is_last or connection.has_head or connections.is_closed or isinstance(exc, NoHttp):
                raise
        except BaseException:
            reply.close()
            raise
        else:
            return reply
        connection = await connections.connect()
    raise AssertionError("unreachable")
