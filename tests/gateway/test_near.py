"""Engines of ours as they are asked for everything but a splice: probes, sleep, the plain way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from harness import StartGateway

from engines.base import Endpoint
from gateway.connections import NoHttp, UpstreamLost
from gateway.near import HELD_BYTES
from gateway.upstream import Upstream

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def engine(tmp_path: Path, serve: Serve) -> AsyncIterator[Upstream]:
    """An upstream to what is served so, each connection by a call."""
    path = str(tmp_path / "e.sock")
    tasks: set[asyncio.Task[None]] = set()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve_one, path)
    upstream = Upstream(Endpoint(socket=path, api_key="k"))
    try:
        yield upstream
    finally:
        await upstream.close()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(upstream: Upstream, method: str = "GET", body: bytes | None = None) -> bytes:
    reply = await upstream.send(method, "/x?y", [("x-a", "b")], body)
    try:
        parts = []
        while part := await reply.read():
            parts.append(part)
        return b"".join(parts)
    finally:
        reply.close()


async def test_requests_go_out_with_all_that_is_theirs_on_a_connection_that_is_kept(tmp_path: Path) -> None:
    heads = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            heads.append(head)
            if b"content-length: 3" in head:
                assert await reader.readexactly(3) == b"abc"
            writer.write(OK)

    async with engine(tmp_path, serve) as upstream:
        assert await whole(upstream) == b"{}"
        assert await whole(upstream, "POST", b"abc") == b"{}"
        assert await whole(upstream, "POST") == b"{}"
        assert upstream.sent == 3
        assert upstream.in_flight == 0
    assert connections == 1
    assert heads[0] == b"GET /x?y HTTP/1.1\r\nx-a: b\r\nauthorization: Bearer k\r\nhost: replica\r\n\r\n"
    assert heads[1].endswith(b"content-length: 3\r\n\r\n")
    assert heads[2].endswith(b"content-length: 0\r\n\r\n")


async def test_who_is_lost_before_a_byte_is_asked_once_more(tmp_path: Path) -> None:
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append(0)
        if len(asked) not in (2, 4, 5):
            writer.write(OK)
            if len(asked) < 4:
                await reader.readuntil(b"\r\n\r\n")  # and gives no answer to the next
                asked.append(0)

    async with engine(tmp_path, serve) as upstream:
        assert await whole(upstream) == b"{}"
        assert await whole(upstream) == b"{}"
    assert len(asked) == 3


async def test_who_is_lost_twice_or_in_the_midst_is_lost(tmp_path: Path) -> None:
    asked = 0
    said = [b"", b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n123", b"no HTTP\r\n\r\n"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said[asked])
        asked += 1

    async with engine(tmp_path, serve) as upstream:
        with pytest.raises(UpstreamLost, match="disconnected"):
            await whole(upstream)
        with pytest.raises(UpstreamLost, match="broke in the middle"):
            await whole(upstream)
        with pytest.raises(NoHttp):
            await whole(upstream)
    assert asked == 4


async def test_who_is_lost_behind_a_head_is_not_asked_again(tmp_path: Path) -> None:
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append(0)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")

    async with engine(tmp_path, serve) as upstream:
        with pytest.raises(UpstreamLost, match="broke in the middle"):
            await whole(upstream)
    assert len(asked) == 1


async def test_the_endpoints_own_headers_take_the_place_of_equal_ones(tmp_path: Path) -> None:
    heads = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            heads.append(head)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n" if head.startswith(b"HEAD") else OK)

    async with engine(tmp_path, serve) as upstream:
        given = [("host", "theirs"), ("authorization", "Bearer theirs")]
        for method in ("GET", "HEAD"):
            heard = upstream.heard
            reply = await asyncio.wait_for(upstream.send(method, "/x", given), 5)
            assert await asyncio.wait_for(reply.read(), 5) == (b"{}" if method == "GET" else b"")
            reply.close()
            assert upstream.heard > heard
    for head in heads:
        lines = head.lower().split(b"\r\n")
        assert [line for line in lines if line.startswith((b"host", b"auth"))] in (
            [b"host: theirs", b"authorization: bearer k"],
            [b"authorization: bearer k", b"host: theirs"],
        )


async def test_who_leaves_early_is_seen_to_leave(tmp_path: Path) -> None:
    has_left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\n\n")
        assert await reader.read() == b""
        has_left.set()

    async with engine(tmp_path, serve) as upstream:
        reply = await upstream.send("GET", "/x")
        assert reply.is_sse
        assert await reply.read() == b"data: 1\n\n"
        assert upstream.in_flight == 1
        reply.close()
        await asyncio.wait_for(has_left.wait(), 5)
        assert upstream.in_flight == 0


async def test_who_gives_up_before_there_is_a_reply_leaves_nothing_in_flight(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with engine(tmp_path, serve) as upstream:
        assert await upstream.probe("/x", 0.1) is None
        assert upstream.in_flight == 0
        await asyncio.sleep(0.05)
        assert not upstream.connections.open
        asking = asyncio.ensure_future(upstream.send("GET", "/x"))
        await asyncio.sleep(0.05)
        await upstream.close()
        with pytest.raises(UpstreamLost, match="was stopped"):
            await asking


async def test_a_reply_that_nobody_reads_waits_in_the_engine(tmp_path: Path) -> None:
    size = 40 * HELD_BYTES
    written = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(40):
            writer.write(b"x" * HELD_BYTES)
            await writer.drain()
            written += HELD_BYTES
        await reader.read()

    async with engine(tmp_path, serve) as upstream:
        reply = await upstream.send("GET", "/x")
        await asyncio.sleep(0.3)
        assert written < size / 4
        got = 0
        while part := await reply.read():
            got += len(part)
        assert got == size
        reply.close()
        assert len(upstream.connections.idle) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a process has loaded is read off /proc")
async def test_a_gateway_whose_engines_are_its_own_never_loads_aiohttp(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    assert (await gateway.complete()).status == 200
    assert (await gateway.post("/v1/completions?x=y", {"model": "fake", "prompt": "x"})).status == 200
    assert (await gateway.get("/v1/replicas")).status == 200
    assert "aiohttp" not in Path(f"/proc/{gateway.process.pid}/maps").read_text()
