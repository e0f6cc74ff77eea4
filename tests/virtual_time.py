"""A loop whose clock jumps to the next thing that is to happen: hours of waiting pass at once, and always the same."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import time
from collections.abc import Iterator
from unittest import mock


class Stuck(AssertionError):
    """Somebody waits, and nothing is ever going to happen."""


class _Selector(selectors.SelectSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if timeout is None and not found:
            raise Stuck("nothing is ever going to happen")
        if not found:
            self.loop.clock += timeout or 0.0
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """Threads and processes have no place in it."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.clock = 1000.0
        super().__init__(selector)

    def time(self) -> float:
        """Seconds, of its own."""
        return self.clock


@contextlib.contextmanager
def virtual_time() -> Iterator[VirtualLoop]:
    """For the length of the block, the monotonic clock is that of a new loop."""
    loop = VirtualLoop()
    with mock.patch.object(time, "monotonic", loop.time):
        try:
            yield loop
        finally:
            while tasks := asyncio.all_tasks(loop):
                for task in tasks:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(tasks, timeout=60))
            loop.close()
