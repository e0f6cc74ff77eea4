"""The HTTP client to one replica. Bytes in, bytes out; every way to fail becomes UpstreamLost.

Engines of ours are asked by `connections`; what is served elsewhere, by aiohttp, which knows of TLS, proxies and
redirects. It takes 13 MiB and a tenth of a second to import: that waits until something elsewhere is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import msgspec

from engines.base import Endpoint
from gateway import near
from gateway.connections import (
    BROKE_OFF,
    CONNECT_LIMIT_S,
    DISCONNECTED,
    KEEPALIVE_S,
    CannotAsk,
    Connections,
    NoHttp,
    UpstreamLost,
)
from gateway.limits import OUT_OF_FILES

if TYPE_CHECKING:
    import aiohttp

ASK_LIMIT_S = 5.0


class Reply(Protocol):
    """The reply to one request, whose head has come. Whoever got it closes it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    is_sse: bool

    async def read(self) -> bytes:
        """The next bytes of the body as they came; empty at its end.

        Raises:
            UpstreamLost: the body broke off.
        """

    def close(self) -> None:
        """Done with it: at its end the connection is kept, before that the engine sees us leave."""


class FarReply:
    """That of what is served elsewhere."""

    def __init__(self, response: aiohttp.ClientResponse, upstream: Upstream) -> None:
        self.status = response.status
        self.headers = [(name.lower(), value) for name, value in response.raw_headers]
        self.is_sse = response.content_type == "text/event-stream" and "content-encoding" not in response.headers
        self._response = response
        self._upstream = upstream
        upstream.count_sign()
        upstream.replies.add(self)

    async def read(self) -> bytes:
        try:
            chunk = await self._response.content.readany()
        except _failures() as exc:
            raise _lost(exc) from exc
        self._upstream.count_sign()
        return chunk

    def close(self) -> None:
        self._upstream.replies.discard(self)
        self._response.close()

    def abort(self) -> None:
        """Break it off: whoever reads sees UpstreamLost."""
        from aiohttp import ClientConnectionError

        self._response.content.set_exception(ClientConnectionError("the replica was stopped"))
        self._response.close()


class Upstream:
    """A pool of connections to one replica. Close it to break all requests that are on it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.replies: set[FarReply] = set()  # that nobody has closed yet
        self.connections = Connections(endpoint)  # to an engine of ours
        self._heard = 0
        self._asked = 0  # requests whose reply has not begun
        self._sent = 0
        self.last_loss = ""  # why the last probe got no answer
        self.url_of = endpoint.url_of
        self.is_elsewhere = endpoint.url is not None
        self._host = "replica" if endpoint.socket else f"{endpoint.host}:{endpoint.port}"
        self._own_headers = [*endpoint.headers.items()]
        if endpoint.api_key:
            self._own_headers.append(("authorization", f"Bearer {endpoint.api_key}"))
        self._own_names = frozenset(name.lower() for name, _ in self._own_headers)
        self.own_names = frozenset(name.encode("latin-1") for name in self._own_names)
        self._openings: dict[str, bytes] = {}
        self._endpoint = endpoint
        self._proxy = _proxy_for(endpoint.url)
        self._is_closed = False
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None  # never uses a connection twice

    async def send(
        self, method: str, path: str, headers: Iterable[tuple[str, str]] = (), body: bytes | None = None
    ) -> Reply:
        """Send a request and wait for the head of the reply; the caller reads and closes it.

        The endpoint's own headers take the place of equal ones among `headers`, whose names are in small letters.
        An engine may close an idle connection just when we use it again. That says nothing of the engine, so a
        request that is lost goes out once more, on a new connection.

        Raises:
            UpstreamLost: no head arrived.
            CannotAsk: as we could not connect.
        """
        sent = [header for header in headers if header[0] not in self._own_names] + self._own_headers
        self._asked += 1
        self._sent += 1
        try:
            if not self.is_elsewhere and method != "HEAD":  # whose reply ends where no parser of ours expects it
                return await near.ask(self.connections, self._head(method, path, sent, body), body or b"")
            if self._session is None:
                self._session = await self._first_session()
            try:
                return await self._send(self._session, method, path, sent, body)
            except UpstreamLost as exc:
                is_final = isinstance(exc, CannotAsk | NoHttp) or isinstance(exc.__cause__, TimeoutError)
                if self._is_closed or is_final:
                    raise
            if self._fresh is None:
                self._fresh = _session(self._endpoint, force_close=True)
            return await self._send(self._fresh, method, path, sent, body)
        finally:
            self._asked -= 1

    def opening(self, path: str) -> bytes:
        """How the head of a POST to a public path begins that goes out by `connections`, up to the client's headers."""
        opening = self._openings.get(path)
        if opening is None:
            own = "".join(f"{name}: {value}\r\n" for name, value in self._own_headers)
            opening = self._openings[path] = f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\n{own}".encode("latin-1")
        return opening

    def _head(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None) -> bytes:
        lines = [f"{method} {path} HTTP/1.1\r\n", *[f"{name}: {value}\r\n" for name, value in headers]]
        if not any(name == "host" for name, _ in headers):
            lines.append(f"host: {self._host}\r\n")
        if body is not None or method != "GET":
            lines.append(f"content-length: {len(body or b'')}\r\n")
        return "".join([*lines, "\r\n"]).encode()

    async def _first_session(self) -> aiohttp.ClientSession:
        await asyncio.to_thread(import_module, "aiohttp")  # others are served meanwhile
        if self._is_closed:
            raise UpstreamLost("the replica was stopped")
        return self._session or _session(self._endpoint)

    @property
    def in_flight(self) -> int:
        """Requests that are not at their end."""
        return self._asked + len(self.replies) + self.connections.asking

    @property
    def sent(self) -> int:
        """Requests so far."""
        return self._sent + self.connections.sent

    @property
    def heard(self) -> int:
        """Grows with each sign of life."""
        return self._heard + self.connections.heard

    def count_sign(self) -> None:
        """It lives."""
        self._heard += 1

    async def _send(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        headers: list[tuple[str, str]],
        body: bytes | None,
    ) -> FarReply:
        try:
            response = await session.request(
                method, self.url_of(path), headers=headers, data=body, allow_redirects=False, proxy=self._proxy
            )
        except _failures() as exc:
            raise _lost(exc) from exc
        return FarReply(response, self)

    async def probe(self, path: str, limit_s: float) -> int | None:
        """The status that the path answers with now; None if nothing answers.

        Raises:
            CannotAsk: we have no connection to ask by.
        """
        try:
            async with asyncio.timeout(limit_s):
                reply = await self.send("GET", path)
        except CannotAsk:
            raise
        except (UpstreamLost, TimeoutError) as exc:
            self.last_loss = str(exc)
            return None
        reply.close()
        return reply.status

    async def ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The JSON that it answers with soon; None if it refuses, or says nothing that can be read."""
        headers = [("content-type", "application/json")] if body else []
        try:
            async with asyncio.timeout(ASK_LIMIT_S):
                reply = await self.send(method, path, headers, body)
                try:
                    parts = []
                    while part := await reply.read():
                        parts.append(part)
                finally:
                    reply.close()
            return msgspec.json.decode(b"".join(parts)) if reply.status == 200 else None
        except (UpstreamLost, TimeoutError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    async def close(self) -> None:
        """Close all connections; whoever waits for one sees UpstreamLost."""
        self._is_closed = True
        self.connections.close()
        for reply in tuple(self.replies):
            reply.abort()
        for session in filter(None, (self._session, self._fresh)):
            await session.close()


@cache
def _failures() -> tuple[type[Exception], ...]:
    """All that aiohttp raises where a request fails."""
    from aiohttp import ClientError

    return ClientError, OSError, RuntimeError  # RuntimeError: the session was closed


def _lost(exc: Exception) -> UpstreamLost:
    """How it is told, in the words of `connections`."""
    from aiohttp import ClientPayloadError, ClientResponseError, ServerDisconnectedError

    if isinstance(exc, ClientPayloadError):
        return UpstreamLost(BROKE_OFF)
    if isinstance(exc, ServerDisconnectedError):
        return UpstreamLost(DISCONNECTED)
    if isinstance(exc, ClientResponseError):
        reason = exc.message.partition("\n")[0].rstrip(":")
        return NoHttp(f"what it said is no HTTP: {reason}")
    is_ours = isinstance(exc, OSError) and exc.errno in OUT_OF_FILES
    return (CannotAsk if is_ours else UpstreamLost)(str(exc) or type(exc).__name__)


def _session(endpoint: Endpoint, *, force_close: bool = False) -> aiohttp.ClientSession:
    import aiohttp

    keepalive_s = None if force_close else KEEPALIVE_S
    connector: aiohttp.BaseConnector
    if endpoint.socket:
        connector = aiohttp.UnixConnector(
            endpoint.socket, limit=0, force_close=force_close, keepalive_timeout=keepalive_s
        )
    else:
        connector = aiohttp.TCPConnector(limit=0, force_close=force_close, keepalive_timeout=keepalive_s)
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_S, sock_read=endpoint.silence_s),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        read_bufsize=2**18,
    )


def _proxy_for(url: str | None) -> str | None:
    """The proxy of the environment through which an address elsewhere is reached."""
    parts = urlsplit(url or "")
    if not parts.hostname or proxy_bypass(parts.hostname):
        return None
    return getproxies().get(parts.scheme)
