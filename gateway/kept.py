"""An engine as a block: the process group of an engine, which a keeper holds, whoever started it.

What we started and what another gateway has left to us is one thing here: two processes that are not our children,
known by their pid and their start. Leaving the block in any way ends the engine, but for a gateway that ends and leaves
its engines to the next one. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

from engines.environments import child_environment
from gateway import lives
from gateway.keeper import END_NOW, MARK_VARIABLE, marked, signal_one
from gateway.lives import Found, Hold, Life, RunFolder, Started
from gateway.process import END_PAUSE_S, KILLED_LIMIT_S, TAIL_LINES, CannotStart, Exit, is_alive, tail

KEEPER = Path(__file__).with_name("keeper.py")
ANSWER_LIMIT_S = 30.0  # for a keeper to say whether its engine runs
TOLD_LIMIT_S = 5.0  # for it to write down an end that we see
TOLD_PAUSE_S = 0.005
POLL_PAUSE_S = 0.2  # where the system does not tell of an end


class EngineProcess:
    """An engine that runs. Made by `launch` or `adopt`; whoever made it calls `end`, or `let_go`."""

    def __init__(self, found: Found, *, is_adopted: bool) -> None:
        """Raises OSError: the folder of its life cannot be written."""
        self.pid = found.started.engine[0]
        self.grace_s = found.life.grace_s  # from SIGTERM to SIGKILL; may be cut short while it runs
        self.is_adopted = is_adopted
        self.folder = found.folder
        self.hold = Hold(found.folder)
        self._life = found.life
        self._started = found.started
        self._exit = asyncio.create_task(self._watch(), name=f"exit of {self.pid}")

    async def wait(self) -> Exit:
        """Until the engine has ended, then how."""
        return await asyncio.shield(self._exit)

    def log_tail(self, lines: int = TAIL_LINES) -> tuple[str, ...]:
        """The last lines that this engine wrote."""
        return tail(Path(self._life.log), lines, start=self._life.log_start)

    def cpu_s(self) -> float | None:
        """The processor time that it and its descendants have used; None once it is gone."""
        try:
            process = psutil.Process(self.pid)
            family = [process, *process.children(recursive=True)]
            return sum(times.user + times.system for times in (member.cpu_times() for member in family))
        except psutil.Error:
            return None

    @property
    def is_running(self) -> bool:
        """Whether the engine's own process is there; its keeper tells of its end a moment later."""
        return lives.is_running(self._started.engine) and is_alive(self.pid)

    def kill(self) -> None:
        """End it without grace."""
        self.grace_s = 0
        lives.signal_to(self._started.keeper, END_NOW)

    def let_go(self) -> None:
        """Leave it to its keeper, and to the next gateway."""
        self._exit.cancel()
        self.hold.release()

    async def end(self) -> None:
        """End it and all that it started, whatever happens to the caller meanwhile."""
        ending = asyncio.ensure_future(self._end())
        is_impatient = False
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                is_impatient = True
                self.kill()
        if is_impatient:
            raise asyncio.CancelledError

    async def _end(self) -> None:
        """Have the keeper ask it to end, then end it; then look whether anything is left."""
        keeper = self._started.keeper
        lives.disown(self.folder)
        lives.signal_to(keeper, signal.SIGTERM)
        began = time.monotonic()
        while lives.is_running(keeper) and time.monotonic() - began < self.grace_s:
            await asyncio.sleep(END_PAUSE_S)
        lives.signal_to(keeper, END_NOW)
        killed = time.monotonic()
        while lives.is_running(keeper) and time.monotonic() - killed < KILLED_LIMIT_S:
            await asyncio.sleep(END_PAUSE_S)
        lives.signal_to(keeper, signal.SIGKILL)  # it was stopped, or the system holds its engine for long
        await asyncio.to_thread(_kill_marked, self.folder)
        await asyncio.wait((self._exit,), timeout=KILLED_LIMIT_S)
        self._exit.cancel()
        self.hold.release()
        _reap(keeper[0])
        await asyncio.to_thread(lives.remove, self.folder)

    async def _watch(self) -> Exit:
        keeper = self._started.keeper
        waits = [asyncio.ensure_future(_until_gone(process)) for process in (self._started.engine, keeper)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            deadline = time.monotonic() + TOLD_LIMIT_S
            while (ended := lives.ended_of(self.folder)) is None and time.monotonic() < deadline:
                if not lives.is_running(keeper):
                    ended = lives.ended_of(self.folder)  # it may have written it just before
                    break
                await asyncio.sleep(TOLD_PAUSE_S)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        return Exit(code=ended.code, signal=ended.signal) if ended else Exit()


async def _until_gone(process: tuple[int, str]) -> None:
    """Until a process that need not be our child has ended."""
    try:
        handle = os.pidfd_open(process[0])
    except AttributeError:
        handle = None
    except OSError as exc:
        if exc.errno == errno.ESRCH:
            return
        handle = None
    if handle is None:
        while lives.is_running(process):
            await asyncio.sleep(POLL_PAUSE_S)
        return
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(handle, gone.set)
    try:
        if lives.is_running(process):  # asked after the handle is there: it may be that of another process
            await gone.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


# --- blocks


@contextlib.asynccontextmanager
async def kept(process: EngineProcess, should_leave: Callable[[], bool]) -> AsyncIterator[EngineProcess]:
    """The engine for the length of the block, whose end is the engine's, unless that is left to the next gateway."""
    try:
        yield process
    finally:
        if should_leave():
            process.let_go()
        else:
            await process.end()


async def launch(
    run_folder: RunFolder, folder: Path, life: Life, env: Mapping[str, str], *, cwd: str | None = None
) -> EngineProcess:
    """Start an engine, with a keeper. A cancel meanwhile leaves nothing behind.

    Args:
        folder: that of the life.
        env: added to the gateway's own environment.
        cwd: the working folder, if that is not the folder of the life.
    Raises:
        CannotStart: with the reason.
        OSError: the folder of the life, or the log, cannot be written.
    """
    if cwd and not os.path.isdir(cwd):
        lives.remove(folder)
        raise CannotStart(f"{life.argv[0]} cannot be started: there is no working folder {cwd}", is_final=True)
    order = {
        "argv": life.argv,
        "env": child_environment(env) | {MARK_VARIABLE: str(folder)},
        "cwd": cwd or str(folder),
        "folder": str(folder),
        "lock": str(run_folder.lock),
        "log": life.log,
        "grace_s": life.grace_s,
        "orphan_timeout_s": run_folder.orphan_timeout_s,
    }
    starting = asyncio.ensure_future(asyncio.to_thread(_start_keeper, order, folder, life))
    try:
        started = await asyncio.shield(starting)
        return EngineProcess(Found(folder, life, started), is_adopted=False)
    except asyncio.CancelledError:  # it may come to life all the same
        with contextlib.suppress(CannotStart, OSError):
            process = EngineProcess(Found(folder, life, await starting), is_adopted=False)
            process.grace_s = 0
            await process.end()
        raise
    except (CannotStart, OSError):
        lives.remove(folder)
        raise


def _start_keeper(order: Mapping[str, Any], folder: Path, life: Life) -> Started:
    """A keeper with its engine, or else the reason why not. Blocks for as long as the engine's `exec` takes."""
    lives.begin(folder, life)
    ours, keepers = socket.socketpair()
    with ours, keepers:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", str(KEEPER)],
            child_environment({}),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, keepers.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, keepers.fileno(), 1),
                (os.POSIX_SPAWN_OPEN, 2, life.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600),
            ],
        )
        keepers.close()
        answer = _answer(ours, json.dumps(order).encode())
    if not answer:
        os.kill(pid, signal.SIGKILL)  # our child, and not reaped: it is still that process
        os.waitpid(pid, 0)
        said = " | ".join(tail(Path(life.log), 3, start=life.log_start))
        raise CannotStart(f"{life.argv[0]} cannot be started: its keeper does not run: {said}", is_final=False)
    if "errno" in answer:
        os.waitpid(pid, 0)
        number = answer["errno"]
        is_final = number in (errno.ENOENT, errno.EACCES, errno.ENOEXEC) and folder.exists()
        raise CannotStart(f"{life.argv[0]} cannot be started: {os.strerror(number)}", is_final=is_final)
    return msgspec.convert(answer, Started)


def _answer(keeper: socket.socket, order: bytes) -> dict[str, Any]:
    """Tell a keeper what to run, and hear what became of it; empty if it ended, or says nothing in time."""
    keeper.settimeout(ANSWER_LIMIT_S)
    said = b""
    try:
        keeper.sendall(order)
        keeper.shutdown(socket.SHUT_WR)
        while not said.endswith(b"\n"):
            if not (chunk := keeper.recv(4096)):
                return {}
            said += chunk
    except OSError:
        return {}
    answer: dict[str, Any] = json.loads(said)
    return answer


async def end_life(folder: Path, drain_s: float = 0.0) -> None:
    """End whatever is there of a life that nobody goes on with, and forget it. Never raises.

    Args:
        drain_s: how long another gateway may go on to answer by its engine.
    """
    found = lives.read(folder)
    if isinstance(found, Found):
        with contextlib.suppress(OSError):
            process = EngineProcess(found, is_adopted=True)
            deadline = time.monotonic() + drain_s
            try:
                while time.monotonic() < deadline and process.hold.is_shared() and process.is_running:
                    await asyncio.sleep(POLL_PAUSE_S)
            finally:
                await process.end()
            return
    await asyncio.to_thread(_kill_marked, folder)
    await asyncio.to_thread(lives.remove, folder)


def _kill_marked(folder: Path) -> None:
    """Kill who carries the mark of a life, until there is nobody."""
    deadline = time.monotonic() + KILLED_LIMIT_S
    while (pids := marked(str(folder))) and time.monotonic() < deadline:
        for pid in pids:
            signal_one(pid, signal.SIGKILL)
        time.sleep(END_PAUSE_S)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # another gateway started it
        os.waitpid(pid, os.WNOHANG)
