"""What is passed on to a gateway that begins to end itself is there when it passes on what it has; nothing after it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest
import uvicorn

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
