"""The mock engine and the client, in C: compiled at use, since both have to be far faster than what is between them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

BENCH = Path(__file__).resolve().parent
COMPILER = os.environ.get("CC", "cc")
START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
LOAD_LIMIT_S = 120.0
ADDRESS = r"http://127\.0\.0\.1:(\d+)"


class Failed(Exception):
    """The bench cannot go on; the sentence says why."""


@dataclass(frozen=True)
class Tools:
    """The two programs."""

    engine: Path
    load: Path


def build(folder: Path) -> Tools:
    """Compile both into a folder; a second or so."""
    if sys.platform != "linux":
        raise Failed("The mock engine and the client use epoll, which is Linux's.")
    if not shutil.which(COMPILER):
        raise Failed(f"There is no C compiler {COMPILER!r}: install one (Debian: gcc), or name it in CC.")
    for name in ("mock_engine", "load"):
        argv = [COMPILER, "-O2", "-o", str(folder / name), str(BENCH / f"{name}.c")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise Failed(f"{name}.c does not compile:\n{done.stderr}")
    return Tools(engine=folder / "mock_engine", load=folder / "load")


# Processes


@contextmanager
def child(
    argv: Sequence[str | Path], log: Path, env: dict[str, str] | None = None, core: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours on that core, ended with all that it started, whichever way we leave."""

    def settle() -> None:
        end_with_parent()
        pin_us(core)

    with log.open("wb") as file:
        process = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=settle, cwd=log.parent
        )
    try:
        yield process
    finally:
        started = descendants(process.pid)
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"bench: {argv[0]} did not end within {STOP_LIMIT_S:.0f} s of SIGTERM", file=sys.stderr)
            process.kill()
            process.wait()
        for left in [left for left in started if left.is_running()]:
            print(f"bench: process {left.pid} of {argv[0]} was left behind; ending it", file=sys.stderr)
            with suppress(psutil.NoSuchProcess):
                left.kill()


LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """Also when the bench is killed: the kernel then sends SIGTERM."""
    LIBC.prctl(1, signal.SIGTERM)


def pin_us(core: int | None) -> None:
    """This process, and what it starts, on one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def pin(pid: int, core: int | None) -> None:
    """All threads of another process: the affinity of a process is that of its first thread only."""
    if core is not None:
        for thread in psutil.Process(pid).threads():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, {core})


def descendants(pid: int) -> list[psutil.Process]:
    """All that a process has started, and they."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for_text(process: subprocess.Popen[bytes], log: Path, pattern: str) -> re.Match[str]:
    """The first match in a log."""
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        if found := re.search(pattern, log.read_text(errors="replace")):
            return found
        if process.poll() is not None:
            break
        time.sleep(0.01)
    raise Failed(f"{process.args[0]} did not say {pattern!r}; its last lines:\n{tail(log)}")  # type: ignore[index]


def tail(log: Path) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


# The two programs


@contextmanager
def mock_engine(tools: Tools, folder: Path, core: int | None = None) -> Iterator[tuple[int, str]]:
    """A running engine: its port and its socket."""
    socket, log = folder / "engine.sock", folder / "engine.log"
    with child([tools.engine, "--tcp", "0", "--unix", socket], log, core=core) as process:
        port = int(wait_for_text(process, log, ADDRESS)[1])
        wait_for_text(process, log, "unix:")
        yield port, str(socket)


def load(tools: Tools, arguments: Sequence[str], core: int | None = None) -> dict[str, Any]:
    """What the client counted. Raises Failed if a reply was not what it has to be."""

    def settle() -> None:
        end_with_parent()
        pin_us(core)

    try:
        done = subprocess.run(
            [tools.load, *arguments], capture_output=True, text=True, timeout=LOAD_LIMIT_S, preexec_fn=settle
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"the client did not end within {LOAD_LIMIT_S:.0f} s") from None
    if done.returncode:
        raise Failed(done.stderr.strip() or f"the client ended with {done.returncode}")
    counted: dict[str, Any] = json.loads(done.stdout)
    return counted


@contextmanager
def held(tools: Tools, arguments: Sequence[str], core: int | None = None) -> Iterator[None]:
    """Streams that are open meanwhile."""

    def settle() -> None:
        end_with_parent()
        pin_us(core)

    process = subprocess.Popen(
        [tools.load, "--mode", "hold", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=settle,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "held\n":
            raise Failed(process.stderr.read().strip())
        yield
        if process.poll() is not None:
            raise Failed(process.stderr.read().strip())
    finally:
        process.terminate()
        process.wait(STOP_LIMIT_S)
