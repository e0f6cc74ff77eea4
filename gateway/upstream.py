"""The HTTP client to one replica. Bytes in, bytes out; every way to fail becomes UpstreamLost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import aiohttp
from aiohttp import ClientError, ClientResponse, ClientTimeout, DummyCookieJar

from engines.base import Endpoint

# llama-server and uvicorn close idle connections after 5 s: be first, so that a request never meets a dead one.
KEEPALIVE_S = 4.0
CONNECT_LIMIT_S = 5.0
PROBE_LIMIT_S = 3.0


class UpstreamLost(Exception):
    """The connection to the replica could not be made, or broke."""


class Upstream:
    """A pool of connections to one replica. Close it to break all requests that are on it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._base = "http://replica" if endpoint.socket else f"http://{endpoint.host}:{endpoint.port}"
        self._authorization = ("authorization", f"Bearer {endpoint.api_key}")
        connector: aiohttp.BaseConnector
        if endpoint.socket:
            connector = aiohttp.UnixConnector(endpoint.socket, limit=0, keepalive_timeout=KEEPALIVE_S)
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_S),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=2**18,
        )

    async def send(
        self, method: str, path: str, headers: Iterable[tuple[str, str]] = (), body: bytes | None = None
    ) -> ClientResponse:
        """Send a request and wait for the head of the reply; the caller reads and closes it.

        Raises:
            UpstreamLost: no head arrived.
        """
        try:
            return await self._session.request(
                method,
                self._base + path,
                headers=[*headers, self._authorization],
                data=body,
                allow_redirects=False,
            )
        except (ClientError, OSError, RuntimeError) as exc:  # RuntimeError: the session was closed
            raise UpstreamLost(str(exc) or type(exc).__name__) from exc

    async def probe(self, path: str) -> int | None:
        """The status that the path answers with now; None if nothing answers."""
        try:
            async with asyncio.timeout(PROBE_LIMIT_S):
                response = await self.send("GET", path)
        except (UpstreamLost, TimeoutError):
            return None
        response.close()
        return response.status

    async def close(self) -> None:
        """Close all connections; whoever reads from one sees UpstreamLost."""
        await self._session.close()


async def read_chunk(response: ClientResponse) -> bytes:
    """The next bytes of the body as they came; empty at its end.

    Raises:
        UpstreamLost: the body broke off.
    """
    try:
        return await response.content.readany()
    except (ClientError, OSError) as exc:
        raise UpstreamLost(str(exc) or type(exc).__name__) from exc
