"""One operating-system process group as a block: leaving it in any way ends the group.

Knows nothing of models. Logs cost nothing: the child's stdout and stderr are the log file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec
import psutil

from engines.environments import child_environment, module_argv
from gateway.limits import OUT_OF_DISK
from gateway.watchdog import MARK_VARIABLE

LOG_LIMIT_BYTES = 16 * 2**20
LOG_PAUSE_S = 30.0
LINE_LIMIT_BYTES = 16 * 2**20  # of what a child says through a pipe; lists of files are long
TAIL_LINES = 12
TAIL_BLOCK_BYTES = 8192
END_PAUSE_S = 0.02
KILLED_LIMIT_S = 5.0  # a process that the kernel holds longer is not waited for
WATCHDOG_PAUSE_S = 0.5

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


class CannotStart(Exception):
    """A program cannot be started; `is_final` if trying again cannot help."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


class EngineProcess:
    """A running process group. Made by `start`; whoever made it calls `end`."""

    def __init__(self, process: asyncio.subprocess.Process, grace_s: float) -> None:
        self.pid = process.pid
        self.grace_s = grace_s  # from SIGTERM to SIGKILL; may be cut short while it runs
        self.stdout = process.stdout
        self.stderr = process.stderr
        self.log: Path | None = None
        self._log_start = 0
        self._process = process

    async def wait(self) -> Exit:
        """Until the process has ended, then how."""
        code = await self._process.wait()
        return Exit(code=code) if code >= 0 else Exit(signal=-code)

    def log_to(self, log: Path, start: int) -> None:
        """Say where its log is, and from which byte on."""
        self.log, self._log_start = log, start

    def log_tail(self, lines: int = TAIL_LINES) -> tuple[str, ...]:
        """The last lines that this process wrote."""
        return tail(self.log, lines, start=self._log_start) if self.log else ()

    def cpu_s(self) -> float | None:
        """The processor time that it and its descendants have used; None once it is gone."""
        try:
            process = psutil.Process(self.pid)
            family = [process, *process.children(recursive=True)]
            return sum(times.user + times.system for times in (member.cpu_times() for member in family))
        except psutil.Error:
            return None

    def kill(self) -> None:
        """End the group without grace."""
        self.grace_s = 0
        self._signal(signal.SIGKILL)

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
) -> EngineProcess:
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
        return EngineProcess(await asyncio.shield(creating), grace_s)
    except asyncio.CancelledError:  # it may come to life all the same
        with contextlib.suppress(OSError):
            await EngineProcess(await creating, 0).end()
        raise
    except OSError as exc:
        is_final = exc.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC) and folder.exists()
        raise CannotStart(f"{argv[0]} cannot be started: {exc.strerror}", is_final=is_final) from exc


@contextlib.asynccontextmanager
async def engine_process(
    argv: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    *,
    folder: Path,
    cwd: str | None = None,
    grace_s: float = 10.0,
) -> AsyncIterator[EngineProcess]:
    """A program that writes to a log, for the length of the block; see `start`.

    Raises:
        CannotStart: with the reason.
        OSError: the log cannot be written.
    """
    with _open_log(log, f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(argv)}\n") as file:
        log_start = file.tell()
        running = await start(argv, env, folder=folder, cwd=cwd, grace_s=grace_s, stdout=file, stderr=file)
    running.log_to(log, log_start)
    keeper = asyncio.create_task(_keep_small(log))
    try:
        yield running
    finally:
        keeper.cancel()
        await running.end()
        await asyncio.gather(keeper, return_exceptions=True)


def _open_log(log: Path, first_line: str) -> IO[bytes]:
    """The log to add to; on a full disk nothing, as a program that cannot write may end: a model is worth more."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("ab", buffering=0)
        try:
            file.write(first_line.encode())
        except OSError:
            file.close()
            raise
    except OSError as exc:
        if exc.errno not in OUT_OF_DISK:
            raise
        logger.error("The disk is full, so what the engine says is not kept in %s. Make room, and start it again.", log)
        return open(os.devnull, "ab", buffering=0)
    return file


def _is_alive_in(group: int, pid: int) -> bool:
    try:
        return os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


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
                if begin == start or text.count(b"\n") > lines or block >= LOG_LIMIT_BYTES:
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
