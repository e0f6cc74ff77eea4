"""Connections on which a client waits with its next request: the gateway that takes over gets them, as they are.

To close one is to lose the request that may be on its way: the client cannot know whether it was answered, so HTTP lets
it try again only what does no harm twice. What is passed on stays open, and what was sent meanwhile is read there.

They travel over the pair of sockets of the handover, once the new gateway serves: a byte for each, and the descriptor.
The one file that knows when uvicorn's own protocol is between two requests; ours says so itself, and connections of
other protocols are left alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger("hostler.passed_on")

AT_ONCE = 64  # the system takes some more with one message


def pass_on(connections: Iterable[Any], channel: socket.socket) -> int:
    """Give away those between two requests, as many as the channel takes now; how many.

    Raises:
        OSError: nobody is there to take them.
    """
    idle = [one for one in connections if is_between_requests(one)]
    passed = 0
    while batch := idle[passed : passed + AT_ONCE]:
        descriptors = [one.transport.get_extra_info("socket").fileno() for one in batch]
        try:
            socket.send_fds(channel, [b"c"], descriptors)
        except BlockingIOError:
            break
        for one in batch:
            one.transport.abort()  # our descriptor alone: the connection has another one now
        passed += len(batch)
    return passed


def is_between_requests(connection: Any) -> bool:
    """Whether nothing of a request was read from it, and all that was answered is on its way."""
    if not isinstance(connection, HttpToolsProtocol) or connection.transport is None:
        return False
    if connection.transport.is_closing() or connection.transport.get_write_buffer_size():
        return False
    if (says := getattr(connection, "is_between_requests", None)) is not None:
        return says() is True
    if (cycle := connection.cycle) is None:
        return connection.scope is None
    is_answered = cycle.response_complete and not cycle.more_body and not connection.pipeline
    return is_answered and cycle.scope is connection.scope  # else another request has begun to come


async def take(channel: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
    """Go on with what the gateway before us passes on, until it has no more."""
    loop = asyncio.get_running_loop()
    channel.setblocking(False)
    taken = 0
    while (descriptors := await _next(loop, channel)) is not None:
        for descriptor in descriptors:
            with suppress(OSError):  # it was closed meanwhile
                _, made = await loop.connect_accepted_socket(protocol, socket.socket(fileno=descriptor))
                _close_if_idle(loop, made)
                taken += 1
    if taken:
        logger.info("%d connections of clients were taken over.", taken)


def _close_if_idle(loop: asyncio.AbstractEventLoop, connection: Any) -> None:
    """As it would be after an answer; a new connection of uvicorn's has no such limit, and ours knows its own."""
    if not isinstance(connection, HttpToolsProtocol) or hasattr(connection, "end_if_quiet"):
        return
    if connection.scope is None:
        connection.timeout_keep_alive_task = loop.call_later(
            connection.timeout_keep_alive, connection.timeout_keep_alive_handler
        )


async def _next(loop: asyncio.AbstractEventLoop, channel: socket.socket) -> list[int] | None:
    """The next descriptors; None at the end."""
    while True:
        try:
            said, descriptors, flags, _ = socket.recv_fds(channel, 1, AT_ONCE)
        except BlockingIOError:
            readable = loop.create_future()
            loop.add_reader(channel, _set, readable)
            try:
                await readable
            finally:
                loop.remove_reader(channel)
        except OSError:
            return None
        else:
            if flags & socket.MSG_CTRUNC:
                logger.error("Connections of clients are lost, as too many files are open: raise `ulimit -n`.")
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            return descriptors if said else None


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
