"""Connections that one gateway passes on to the next, where that ends itself meanwhile, or has no more open files."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway import passed_on
from gateway.door.watched import Sweeper, WatchedProtocol
from gateway.handover import HandoverFailed
from gateway.server import Server


async def test_who_ends_has_all_that_was_passed_on_and_is_given_no_more() -> None:
    config = uvicorn.Config(cast(Any, None), lifespan="off")
    config.load()
    ours, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, ours:
        server = Server(config, cast(Any, None), listener, -1)
        server.lifespan = config.lifespan_class(config)
        taking = asyncio.create_task(server.take(theirs.detach()))
        await asyncio.sleep(0)
        clients = []
        for _ in range(100):
            clients.append(socket.create_connection(listener.getsockname()))
            with listener.accept()[0] as accepted:
                socket.send_fds(ours, [b"c"], [accepted.fileno()])
        await server.end_taking()
        assert len(server.server_state.connections) == len(clients)
        with pytest.raises(BrokenPipeError):
            socket.send_fds(ours, [b"c"], [clients[0].fileno()])
        await asyncio.wait_for(taking, 1)
        for connection in list(server.server_state.connections):
            connection.shutdown()
        for client in clients:
            client.close()


@pytest.mark.parametrize("protocol", [HttpToolsProtocol, WatchedProtocol])
async def test_who_asks_nothing_by_a_connection_that_was_passed_on_is_not_kept_for_ever(
    protocol: type[asyncio.Protocol],
) -> None:
    config = uvicorn.Config(cast(Any, None), lifespan="off", http=protocol, timeout_keep_alive=1)
    config.load()
    ours, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, ours:
        server = Server(config, cast(Any, None), listener, -1)
        server.lifespan = config.lifespan_class(config)
        sweeping = asyncio.create_task(
            Sweeper(SimpleNamespace(deployments=list)).sweep(server.server_state.connections)
        )
        taking = asyncio.create_task(server.take(theirs.detach()))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        with listener.accept()[0] as accepted:
            socket.send_fds(ours, [b"c"], [accepted.fileno()])
        assert await asyncio.wait_for(reader.read(), 5) == b""
        sweeping.cancel()
        writer.close()
        await server.end_taking()
        await taking


async def test_the_more_connections_there_are_the_less_often_all_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = uvicorn.Config(cast(Any, None), lifespan="off")
    config.load()
    looks = 0

    def look(connections: object, channel: object) -> int:
        nonlocal looks
        looks += 1
        time.sleep(0.02)
        return 0

    monkeypatch.setattr(passed_on, "pass_on", look)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(config, cast(Any, None), listener, -1)
        server.successor = cast(Any, SimpleNamespace(channel=None))
        until = time.monotonic() + 1
        while time.monotonic() < until:
            server._pass_connections_on()
            await asyncio.sleep(0.005)
    assert 2 <= looks <= 4


async def test_a_handover_that_is_cancelled_while_it_is_given_up_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = uvicorn.Config(cast(Any, None), lifespan="off")
    config.load()
    doors: list[asyncio.Future[object]] = []

    class Failing:
        async def until_prepared(self) -> None:
            return

        async def go(self) -> None:
            doors.append(fleet.next_door)
            raise HandoverFailed("it does not serve")

        async def give_up(self) -> None:
            await asyncio.Event().wait()

    async def start(*args: object, **more: object) -> Failing:
        return Failing()

    async def pause() -> None:
        return

    monkeypatch.setattr("gateway.server.Successor.start", start)
    fleet: Any = SimpleNamespace(next_door=None, node=SimpleNamespace(pause=pause, go_on=lambda: None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(config, fleet, listener, -1)
        handing = asyncio.create_task(server._hand_over())
        while not doors:
            await asyncio.sleep(0)
        handing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handing
    assert fleet.next_door is None
    assert await asyncio.wait_for(doors[0], 1) is None


async def test_who_has_too_many_files_open_tells_what_is_lost_and_takes_what_comes_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, theirs = socket.socketpair()
    (one, _one), (two, _two) = socket.socketpair(), socket.socketpair()
    served = asyncio.get_running_loop().create_future()

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            served.set_result(transport)

    with ours, theirs, one, _one, two, _two:
        taking = asyncio.create_task(passed_on.take(theirs, Protocol))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(free := os.dup(ours.fileno()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            socket.send_fds(ours, [b"c"], [one.fileno()])
            await asyncio.sleep(0.1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert "too many files are open" in caplog.text
        socket.send_fds(ours, [b"c"], [two.fileno()])
        (await asyncio.wait_for(served, 5)).close()
        ours.close()
        await asyncio.wait_for(taking, 5)
