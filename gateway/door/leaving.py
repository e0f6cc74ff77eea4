"""Clients that leave while nothing is read of them: the loop tells it only of connections that it reads.

Reading is paused for whoever sends more than can be taken now: a next request before the first is answered, or a body
faster than it is passed on. The system knows the end of a connection all the same, and one more epoll tells it, which
the loop watches as any other descriptor. Where there is none (not Linux) it is noticed once reading goes on.
"""

from __future__ import annotations

import asyncio
import select
from contextlib import suppress
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.flow_control import FlowControl

HAS_EPOLL = hasattr(select, "epoll")


class Leavers:
    """All that are not read, of one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._flows: dict[int, WatchedFlow] = {}
        self._epoll = select.epoll()
        loop.add_reader(self._epoll.fileno(), self._look)

    def watch(self, descriptor: int, flow: WatchedFlow) -> None:
        """Tell the flow once when the other end is gone; again only after it is watched again."""
        events = select.EPOLLRDHUP | select.EPOLLONESHOT
        if self._flows.get(descriptor) is flow:
            self._epoll.modify(descriptor, events)
        else:
            self._flows[descriptor] = flow
            self._epoll.register(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Its connection is at its end."""
        if self._flows.pop(descriptor, None) is not None:
            with suppress(OSError):  # it is closed already
                self._epoll.unregister(descriptor)

    def _look(self) -> None:
        for descriptor, events in self._epoll.poll(0):
            if (flow := self._flows.get(descriptor)) is not None:
                flow.left(is_broken=bool(events & (select.EPOLLHUP | select.EPOLLERR)))


class WatchedFlow(FlowControl):
    """Of a connection that is watched as long as it is not read."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(transport)
        self._loop = loop
        self._descriptor = -1

    def pause_reading(self) -> None:
        if not self.read_paused:
            super().pause_reading()
            self._watch()

    def _watch(self) -> None:
        if self._descriptor < 0:
            socket = self._transport.get_extra_info("socket")
            if socket is None or not HAS_EPOLL or self._transport.is_closing():
                return
            self._descriptor = socket.fileno()
        leavers_of(self._loop).watch(self._descriptor, self)

    def forget(self) -> None:
        """The connection is at its end."""
        if self._descriptor >= 0:
            leavers_of(self._loop).forget(self._descriptor)
            self._descriptor = -1

    def left(self, *, is_broken: bool) -> None:
        """The other end sends no more. As if the end had been read: what is on its way still goes out."""
        if self.read_paused or is_broken:
            (self._transport.abort if is_broken else self._transport.close)()


_leavers: WeakKeyDictionary[asyncio.AbstractEventLoop, Leavers] = WeakKeyDictionary()


def leavers_of(loop: asyncio.AbstractEventLoop) -> Leavers:
    """Those of the loop."""
    leavers = _leavers.get(loop)
    if leavers is None:
        leavers = _leavers[loop] = Leavers(loop)
    return leavers
