"""When the settings are read again: on SIGHUP, and once their file has changed and stayed so."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from gateway.config import digest_of
from gateway.errors import HostlerError
from gateway.fleet import Fleet

logger = logging.getLogger("hostler.watch")

PAUSE_S = 1.0


class Look(NamedTuple):
    """A file as it was seen; all None if there was none. By its own links, wherever they point now."""

    mtime_ns: int | None
    inode: int | None
    size: int | None
    digest: str | None


class Watch:
    """Looks at the settings file about once a second, unless `watch_settings` is off.

    A file that was just written is read at the next look, if it still is the same: so a half of it is never read.
    While another gateway takes over nothing is read, and once it has, the settings are its affair.

    Args:
        end: ends the gateway; called when the terminal that it runs in is closed.
        pass_on: has the gateway that took over read them again.
    """

    def __init__(self, fleet: Fleet, *, end: Callable[[], None], pass_on: Callable[[], None]) -> None:
        self._fleet = fleet
        self._end = end
        self._pass_on = pass_on
        self._asked = asyncio.Event()
        self._known = fleet.source.digest_at_start
        self._last: Look | None = None

    async def run(self) -> None:
        """Until cancelled."""
        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as under nohup
        ends_with_terminal = has_terminal() and not is_ignored
        loop = asyncio.get_running_loop()

        def hang_up() -> None:
            if ends_with_terminal and not has_terminal():
                self._end()
            else:
                self._asked.set()

        def heard(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(hang_up)

        # Not by the loop, which would let go of the signal for an instant before another one takes it.
        before = signal.signal(signal.SIGHUP, heard)
        try:
            while True:
                await self._once_it_is_time()
        finally:
            if signal.getsignal(signal.SIGHUP) is heard:
                signal.signal(signal.SIGHUP, before)

    async def _once_it_is_time(self) -> None:
        try:
            async with asyncio.timeout(PAUSE_S):
                await self._asked.wait()
        except TimeoutError:
            if not await self._has_changed():
                return
        if (next_door := self._fleet.next_door) is not None and await asyncio.shield(next_door) is not None:
            if self._asked.is_set():
                self._asked.clear()
                self._pass_on()
            return
        self._asked.clear()
        try:
            if (file := self._fleet.source.file) is not None:
                self._known = await asyncio.to_thread(digest_of, file)
            await self._fleet.reread()
        except HostlerError:  # told already
            return
        except Exception:
            logger.exception("The settings could not be taken up, by a fault of the gateway; it goes on as before.")

    async def _has_changed(self) -> bool:
        """Whether the file says something new, and did so at the last look too."""
        file = self._fleet.source.file
        if file is None or not self._fleet.settings.watch_settings:
            return False
        last, self._last = self._last, await asyncio.to_thread(look_at, file, self._last)
        return self._last == last and self._last.digest != self._known


def look_at(file: Path, last: Look | None = None) -> Look:
    """The file as it is; it is only read if it is other than at the last look."""
    try:
        stat = file.stat()
    except OSError:
        return Look(None, None, None, None)
    seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
    return last if last is not None and seen == last[:3] else Look(*seen, digest_of(file))


def has_terminal() -> bool:
    """Whether this process has a terminal that is still there."""
    try:
        with open("/dev/tty", "rb"):
            return True
    except OSError:
        return False
