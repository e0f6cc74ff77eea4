"""`hostler restart`: another gateway takes the place of this one, and the door is open all the time.

The old one starts the new one as it was started itself, and lends it the listening socket and the lock of the data
folder. Over a pair of sockets they agree on the moment, one line each:

    new: prepared   its settings are right, and what they declare can be served; nothing has changed yet
    old: go         no engine is being started, no request comes in
    new: serving    the engines are found again, and the door is open
    new: failed ... why not; the old one goes on

A new one that ends without a word has failed, too. Once it serves, `connections` go the same way. Knows nothing of
models.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from gateway.keeper import PR_SET_CHILD_SUBREAPER, prctl

VARIABLE = "HOSTLER_HANDOVER"
PREPARED, GO, SERVING, FAILED = "prepared", "go", "serving", "failed"
PREPARE_LIMIT_S = 120.0
SERVE_LIMIT_S = 60.0
END_LIMIT_S = 10.0
STAND_IN = Path(__file__).with_name("stand_in.py")


class HandoverFailed(Exception):
    """The new gateway does not come up; the text says why."""


class Predecessor(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway before us, as we see it: its pid, and the descriptors that it lends us."""

    pid: int
    listener: int
    lock: int
    channel: int

    async def prepared(self) -> None:
        """Say that we are, and wait until we may go.

        Raises:
            HandoverFailed: it has changed its mind, or is gone.
        """
        self._tell(PREPARED)
        said = await asyncio.to_thread(os.read, self.channel, len(GO) + 1)
        if said != f"{GO}\n".encode():
            raise HandoverFailed("The gateway before this one did not hand over.")

    def serving(self) -> None:
        """Say that we are."""
        self._tell(SERVING)

    def failed(self, why: str) -> None:
        """Say why we end."""
        self._tell(f"{FAILED} {' '.join(why.split())}")

    def _tell(self, line: str) -> None:
        try:
            os.write(self.channel, f"{line}\n".encode())
        except OSError as exc:
            raise HandoverFailed("The gateway before this one is gone.") from exc


def predecessor() -> Predecessor | None:
    """The gateway that hands over to us, if one does; asked once, and nobody that we start inherits from it."""
    if not (said := os.environ.pop(VARIABLE, "")):
        return None
    pid, ignores_hang_up, *descriptors = map(int, said.split(","))
    if ignores_hang_up:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    listener, lock, channel = descriptors
    return Predecessor(pid=pid, listener=listener, lock=lock, channel=channel)


class Successor:
    """The gateway after us, as we see it. Made by `start`; either it serves in the end, or `give_up` ends it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.pid = process.pid
        self.channel = channel  # for what follows once it serves
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, listener: int, lock: int, *, ignores_hang_up: bool) -> Successor:
        """Start it as we were started, with the settings that are there now.

        Args:
            ignores_hang_up: SIGHUP was ignored as we were started, as under nohup; our handler of it hides that.
        Raises:
            HandoverFailed: it cannot be started.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            lent = (listener, lock, theirs.fileno())
            try:
                process = subprocess.Popen(  # noqa: ASYNC220 (it returns at once)
                    [sys.executable, *sys.orig_argv[1:]],
                    pass_fds=lent,
                    env=os.environ | {VARIABLE: ",".join(map(str, (os.getpid(), int(ignores_hang_up), *lent)))},
                )
            except OSError as exc:
                ours.close()
                raise HandoverFailed(f"The new gateway cannot be started: {exc.strerror}.") from exc
        channel = ours.dup()
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, channel, reader, writer)

    async def until_prepared(self) -> None:
        """Raises HandoverFailed."""
        await self._hear(PREPARED, PREPARE_LIMIT_S)

    async def go(self) -> None:
        """Tell it to take over, and wait until it serves. Raises HandoverFailed."""
        self._writer.write(f"{GO}\n".encode())
        await self._hear(SERVING, SERVE_LIMIT_S)
        self._writer.close()

    async def give_up(self) -> None:
        """It is not to take over."""
        self._writer.close()
        self.channel.close()
        try:
            await asyncio.to_thread(self._process.wait, END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        except asyncio.CancelledError:
            self._process.kill()
            raise

    async def _hear(self, wanted: str, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                said = (await self._reader.readline()).decode(errors="replace").strip()
        except TimeoutError as exc:
            raise HandoverFailed(f"The new gateway was not {wanted} within {limit_s:g} s.") from exc
        if said == wanted:
            return
        if said.startswith(FAILED):
            raise HandoverFailed(said.removeprefix(FAILED).strip())
        raise HandoverFailed("The new gateway ended before it was ready. What it wrote to its own log says why.")


def adopt_heirs() -> None:
    """From now on who comes from us is given to us when its parent ends (Linux alone), also after `stand_in`."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def stand_in(lock: Path, before: Predecessor | None) -> None:
    """End as a gateway; whoever started us must not see it, so we become a small program that stands in for us.

    Not if we have succeeded to a gateway ourselves: it stands in for all that come after it, as `adopt_heirs` has it.
    """
    if before is not None and sys.platform == "linux":
        return
    signal.pthread_sigmask(
        signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    )  # until it can pass them on
    argv = [sys.executable, "-I", "-S", str(STAND_IN), str(lock)]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execve(sys.executable, argv, _environment(os.environ))  # noqa: S606 (no shell is what we want)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith("HOSTLER_")}
