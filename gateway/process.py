"""Our short-lived children, such as downloads and builds: each is a process group, and none outlives us.

Knows nothing of models. Engines, which may outlive us, are in `kept.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec
import psutil

from engines.environments import child_environment, module_argv
from gateway.keeper import MARK_VARIABLE

LINE_LIMIT_BYTES = 16 * 2**20  # of what a child says through a pipe; lists of files are long
TAIL_LINES = 12
TAIL_BLOCK_BYTES = 8192
TAIL_LIMIT_BYTES = 16 * 2**20
END_PAUSE_S = 0.02
KILLED_LIMIT_S = 5.0  # a process that the kernel holds longer is not waited for
WATCHDOG_PAUSE_S = 0.5

logger = logging.getLogger("hostler.process")


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended: `code` from 0 up, or the number of a signal; neither if nobody saw it."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is None and self.code is None:
            return "an end that nobody saw, as its keeper was killed"
        if self.signal is None:
            return f"exit code {self.code}"
        name = signal.Signals(self.signal).name if self.signal in set(signal.Signals) else "without a name"
        return f"signal {self.signal} ({name})"


def is_alive(pid: int) -> bool:
    """Whether a process is there that has not ended, be it that nobody has asked how."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):  # too many files are open: nobody is declared dead for that
        return True


class CannotStart(Exception):
    """A program cannot be started; `is_final` if trying again cannot help."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


class Child:
    """A running process group. Made by `start`; whoever made it calls `end`."""

    def __init__(self, process: asyncio.subprocess.Process, grace_s: float) -> None:
        self.pid = process.pid
        self.grace_s = grace_s  # from SIGTERM to SIGKILL; may be cut short while it runs
        self.stdout = process.stdout
        self.stderr = process.stderr
        self._process = process

    async def wait(self) -> Exit:
        """Until the process has ended, then how."""
        code = await self._process.wait()
        return Exit(code=code) if code >= 0 else Exit(signal=-code)

    async def end(self) -> None:
        """End the group and reap it, whatever happens to the caller meanwhile."""
        ending = asyncio.ensure_future(self._end())
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:  # impatience: no more grace
            self._signal(signal.SIGKILL)
            await ending
            raise

    async def _end(self) -> None:
        """TERM the group, wait, KILL what is left of it, reap."""
        self._signal(signal.SIGTERM)
        started = time.monotonic()
        while self._is_alive() and time.monotonic() - started < self.grace_s:
            await asyncio.sleep(END_PAUSE_S)
        self._signal(signal.SIGKILL)
        await self._process.wait()
        killed = time.monotonic()
        while self._is_alive() and time.monotonic() - killed < KILLED_LIMIT_S:  # others give their memory back, too
            await asyncio.sleep(END_PAUSE_S)

    def _is_alive(self) -> bool:
        """Whether the leader runs, or any other member of its group; the dead that nobody has reaped do not count."""
        if self._process.returncode is None:
            return True
        return self._signal(0) and any(_is_alive_in(self.pid, pid) for pid in psutil.pids())

    def _signal(self, number: int) -> bool:
        """Signal the group; whether there is any process in it."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # the latter on macOS, for zombies
            return False
        return True


class NoProcess:
    """In place of the process of what is served elsewhere: it uses nothing, and ends when it is told to."""

    pid = None
    grace_s = 0.0
    is_running = True

    def __init__(self) -> None:
        self._is_killed = asyncio.Event()

    async def wait(self) -> Exit:
        """Until `kill`."""
        await self._is_killed.wait()
        return Exit(code=0)

    def log_tail(self, lines: int = TAIL_LINES) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def cpu_s(self) -> float | None:
        """Nobody knows."""
        return None

    def kill(self) -> None:
        """Count as ended."""
        self._is_killed.set()


async def start(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    folder: Path,
    cwd: str | None = None,
    grace_s: float,
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
) -> Child:
    """Start a program in a process group of its own. A cancel meanwhile leaves nothing behind.

    Args:
        env: added to the gateway's own environment.
        folder: the gateway's run folder, by which the watchdog knows our children.
        cwd: the working folder, if that is not the run folder.
        grace_s: from SIGTERM to SIGKILL.
    Raises:
        CannotStart: with the reason.
    """
    if cwd and not os.path.isdir(cwd):
        raise CannotStart(f"{argv[0]} cannot be started: there is no working folder {cwd}", is_final=True)
    creating = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=child_environment(env) | {MARK_VARIABLE: str(folder)},
            cwd=cwd or folder,
            start_new_session=True,
            limit=LINE_LIMIT_BYTES,
        )
    )
    try:
        return Child(await asyncio.shield(creating), grace_s)
    except asyncio.CancelledError:  # it may come to life all the same
        with contextlib.suppress(OSError):
            await Child(await creating, 0).end()
        raise
    except OSError as exc:
        is_final = exc.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC) and folder.exists()
        raise CannotStart(f"{argv[0]} cannot be started: {exc.strerror}", is_final=is_final) from exc


def _is_alive_in(group: int, pid: int) -> bool:
    try:
        return os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def tail(log: Path, lines: int, *, start: int = 0, end: int | None = None) -> tuple[str, ...]:
    """The last lines of a log between two bytes; empty if there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            size = size if end is None else min(end, size)
            start = start if start <= size else 0  # the log was emptied meanwhile
            block = TAIL_BLOCK_BYTES
            while True:
                begin = max(start, size - block)
                file.seek(begin)
                text = file.read(size - begin)
                if begin == start or text.count(b"\n") > lines or block >= TAIL_LIMIT_BYTES:
                    break
                block *= 4
    except OSError:
        return ()
    return tuple(text.decode(errors="replace").splitlines()[-lines:]) if lines else ()


@contextlib.asynccontextmanager
async def watchdog(folder: Path) -> AsyncIterator[None]:
    """For the length of the block, a process stands by to end our children should we be killed."""
    process = await _start_watchdog(folder)

    async def keep() -> None:
        nonlocal process
        while True:
            await process.wait()
            logger.warning("The watchdog has ended, and is started again.")
            await asyncio.sleep(WATCHDOG_PAUSE_S)
            process = await _start_watchdog(folder)

    keeper = asyncio.create_task(keep())
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _start_watchdog(folder: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *module_argv("gateway.watchdog"),
        str(folder),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env=child_environment({}),
        start_new_session=True,
    )


def memory_bytes(leader: int) -> int | None:
    """The resident memory of a process and its descendants; None once it is gone."""
    try:
        process = psutil.Process(leader)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    except psutil.Error:
        return None
