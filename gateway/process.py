"""One operating-system process group as a block: leaving it in any way ends the group.

Knows nothing of models. Logs cost nothing: the child's stdout and stderr are the log file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

from engines.environments import child_environment, worker_argv
from gateway.watchdog import MARK_VARIABLE

LOG_LIMIT_BYTES = 16 * 2**20
LOG_PAUSE_S = 30.0
TAIL_LINES = 12
TAIL_BLOCK_BYTES = 8192
END_PAUSE_S = 0.02

logger = logging.getLogger("hostler.process")


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended: `code` from 0 up, or the number of a signal."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit code {self.code}"
        name = signal.Signals(self.signal).name if self.signal in set(signal.Signals) else "without a name"
        return f"signal {self.signal} ({name})"


class EngineProcess:
    """A running process group. Made by `engine_process`, which also ends it."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, log_start: int, grace_s: float) -> None:
        self.pid = process.pid
        self.log = log
        self.grace_s = grace_s  # from SIGTERM to SIGKILL; may be cut short while it runs
        self._process = process
        self._log_start = log_start

    async def wait(self) -> Exit:
        """Until the process has ended, then how."""
        code = await self._process.wait()
        return Exit(code=code) if code >= 0 else Exit(signal=-code)

    def log_tail(self, lines: int = TAIL_LINES) -> tuple[str, ...]:
        """The last lines that this process wrote."""
        return tail(self.log, lines, start=self._log_start)

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


@contextlib.asynccontextmanager
async def engine_process(
    argv: Sequence[str], env: Mapping[str, str], log: Path, *, folder: Path, grace_s: float = 10.0
) -> AsyncIterator[EngineProcess]:
    """Run a program in a process group of its own for the length of the block.

    Args:
        env: added to the gateway's own environment.
        log: what the program writes is appended here.
        folder: the gateway's run folder, by which the watchdog knows our children.
        grace_s: from SIGTERM to SIGKILL.
    Raises:
        OSError: it cannot be started.
    """
    starting = asyncio.ensure_future(_start(argv, marked_environment(env, folder), log, folder, grace_s))
    try:
        running = await asyncio.shield(starting)
    except asyncio.CancelledError:  # it may have come to life all the same
        with contextlib.suppress(OSError):
            running = await starting
            running.grace_s = 0
            await running.end()
        raise
    keeper = asyncio.create_task(_keep_small(log))
    try:
        yield running
    finally:
        keeper.cancel()
        await running.end()
        await asyncio.gather(keeper, return_exceptions=True)


async def _start(argv: Sequence[str], env: Mapping[str, str], log: Path, folder: Path, grace_s: float) -> EngineProcess:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(argv)}\n".encode())
        file.flush()
        log_start = file.tell()
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=env,
            cwd=folder,
            start_new_session=True,
        )
    return EngineProcess(process, log, log_start, grace_s)


def _is_alive_in(group: int, pid: int) -> bool:
    try:
        return os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def marked_environment(env: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment of every child of ours, see gateway/watchdog.py."""
    return child_environment(env) | {MARK_VARIABLE: str(folder)}


async def _keep_small(log: Path) -> None:
    """Put a full log aside from time to time, so that at most two are kept.

    The process goes on writing to the same file, in append mode, so it is copied and emptied, not renamed.
    """
    while True:
        try:
            if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
                await asyncio.to_thread(shutil.copyfile, log, log.with_suffix(".old.log"))
                os.truncate(log, 0)
        except OSError as exc:
            logger.warning("The log %s cannot be put aside, so it goes on growing: %s", log, exc)
        await asyncio.sleep(LOG_PAUSE_S)


def tail(log: Path, lines: int, *, start: int = 0) -> tuple[str, ...]:
    """The last lines of a log, from byte `start` on; empty if there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = start if start <= size else 0  # the log was emptied meanwhile
            block = TAIL_BLOCK_BYTES
            while True:
                begin = max(start, size - block)
                file.seek(begin)
                text = file.read(size - begin)
                if begin == start or text.count(b"\n") > lines or block >= LOG_LIMIT_BYTES:
                    break
                block *= 4
    except OSError:
        return ()
    return tuple(text.decode(errors="replace").splitlines()[-lines:]) if lines else ()


@contextlib.asynccontextmanager
async def watchdog(folder: Path) -> AsyncIterator[None]:
    """For the length of the block, a process stands by to end our children should we be killed."""
    process = await asyncio.create_subprocess_exec(
        *worker_argv("gateway.watchdog"),
        str(folder),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env=child_environment({}),
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def memory_bytes(leader: int) -> int | None:
    """The resident memory of a process and its descendants; None once it is gone."""
    try:
        process = psutil.Process(leader)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    except psutil.Error:
        return None
