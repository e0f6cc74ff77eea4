"""Clients that do not come on, or whose heads have no end, whichever way their requests take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from both_ends import Wire, ends
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from gateway.door.watched import HEAD_LIMIT_BYTES, STALL_LIMIT_S, WatchedProtocol

__all__ = ["ends"]

HEAD = b"POST /of/the/plain/way HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n"


class App:
    """Reads a request, if it is to, and answers when it is told to."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.answers = asyncio.Event()
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = scope["headers"]
        reading = asyncio.create_task(self.read(receive))
        await self.answers.wait()
        reading.cancel()
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    async def read(self, receive: Receive) -> None:
        await self.reads.wait()
        while (await receive())["type"] != "http.disconnect":
            pass


@pytest.fixture(params=["plain", "auto"])
async def client(ends: SimpleNamespace, request: pytest.FixtureRequest) -> AsyncIterator[WatchedProtocol]:
    """One of either way; `app` answers it, by `transport`."""
    protocol: WatchedProtocol = ends.client
    if request.param == "plain":
        config = uvicorn.Config(lambda: None, log_config=None, lifespan="off", interface="asgi3", ws="none")
        config.load()
        loop = asyncio.get_running_loop()
        protocol = WatchedProtocol(config=config, server_state=ServerState(), app_state={}, _loop=loop)
        protocol.connection_made(Wire())  # type: ignore[arg-type]
    protocol.app = App()  # type: ignore[assignment]
    yield protocol
    protocol.app.answers.set()  # type: ignore[attr-defined]
    protocol.connection_lost(None)
    await asyncio.gather(*protocol.tasks)


def is_closed_after(client: WatchedProtocol, *times_s: float) -> bool:
    """Whether it is, looked at after so many seconds."""
    begin = client.loop.time()
    for after_s in times_s:
        client.end_if_quiet(begin + after_s)
    return client.transport.is_closing()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_head_without_end_is_refused(client: WatchedProtocol) -> None:
    client.data_received(HEAD[:-2])
    for _ in range(1 + HEAD_LIMIT_BYTES // 60_000):
        client.data_received(b"x-a: %b\r\n" % (b"a" * 60_000))
    assert not client.transport.is_closing()
    client.data_received(b"x-a: a\r\n")
    assert client.transport.sent.startswith(b"HTTP/1.1 431 ")  # type: ignore[attr-defined]
    assert b"head_too_large" in client.transport.sent  # type: ignore[attr-defined]
    assert client.transport.is_closing()


@pytest.mark.parametrize("sent", [HEAD[:9], HEAD[:-1], HEAD, HEAD + b"x" * 100])
async def test_a_request_that_does_not_come_on_is_not_waited_for(client: WatchedProtocol, sent: bytes) -> None:
    client.data_received(sent)
    client.app.reads.set()  # type: ignore[attr-defined]
    await settle()
    assert not is_closed_after(client, 0, STALL_LIMIT_S - 1)
    client.data_received((HEAD + b"x" * 200)[len(sent) :][:60])
    assert not is_closed_after(client, STALL_LIMIT_S, 2 * STALL_LIMIT_S - 1)
    assert is_closed_after(client, 2 * STALL_LIMIT_S + 1)


async def test_who_is_not_read_or_not_told_to_go_on_is_waited_for(client: WatchedProtocol) -> None:
    asks = HEAD.replace(b"localhost", b"localhost\r\nexpect: 100-continue")
    client.data_received(asks)
    await settle()
    assert not is_closed_after(client, 0, 1000)
    client.data_received(b"x" * 70_000)  # more than is taken before the app reads
    assert client.flow.read_paused
    assert not is_closed_after(client, 2000, 3000)
    client.app.reads.set()  # type: ignore[attr-defined]
    await settle()
    assert is_closed_after(client, 4000, 4000 + STALL_LIMIT_S + 1)


async def test_an_answer_may_take_its_time_and_half_a_request_behind_it_too(client: WatchedProtocol) -> None:
    client.app.reads.set()  # type: ignore[attr-defined]
    client.data_received(HEAD + b"x" * 100_000)
    assert not is_closed_after(client, 0, 1000)
    for part in (HEAD[:20], HEAD[20:] + b"x"):
        client.data_received(part)
        await settle()
        assert not is_closed_after(client, 2000, 3000)


async def test_a_connection_that_asks_nothing_is_closed(client: WatchedProtocol) -> None:
    assert not is_closed_after(client, client.timeout_keep_alive - 1)
    assert is_closed_after(client, client.timeout_keep_alive + 1)


async def test_an_answer_before_the_end_of_the_request_stops_neither_clock(client: WatchedProtocol) -> None:
    client.data_received(HEAD + b"x")
    client.app.answers.set()  # type: ignore[attr-defined]
    await settle()
    assert client.cycle.response_complete
    assert not is_closed_after(client, 0, STALL_LIMIT_S - 1)
    client.data_received(b"x" * 99_999)
    assert not is_closed_after(client, client.timeout_keep_alive - 1)
    assert is_closed_after(client, client.timeout_keep_alive + 1)


async def test_an_answer_that_nobody_reads_ends(client: WatchedProtocol) -> None:
    client.app.reads.set()  # type: ignore[attr-defined]
    client.data_received(HEAD + b"x" * 100_000)
    wire: Any = client.transport
    for wire.unsent in (3000, 2000, 1000, 0):
        assert not is_closed_after(client, 1000 - wire.unsent, 1000 - wire.unsent + STALL_LIMIT_S - 1)
    assert not is_closed_after(client, 2000, 3000)
    wire.unsent = 500
    assert is_closed_after(client, 4000, 4000 + STALL_LIMIT_S + 1)
    assert wire.end == "aborted"  # to close it would wait for who does not read


async def test_what_stands_behind_a_body_has_no_say(client: WatchedProtocol) -> None:
    chunked = HEAD.replace(b"content-length: 100000", b"transfer-encoding: chunked")
    client.data_received(chunked + b"1\r\nx\r\n0\r\nauthorization: Bearer theirs\r\nhost: other\r\n\r\n")
    await settle()
    assert [value for name, value in client.app.headers if name == b"host"] == [b"localhost"]  # type: ignore[attr-defined]
    assert b"authorization" not in dict(client.app.headers)  # type: ignore[attr-defined]
