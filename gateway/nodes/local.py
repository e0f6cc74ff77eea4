"""This machine: its folders, its GPUs, and how a program is started on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from engines.base import Command, Endpoint, Placement, Tier
from gateway import gpus, lives
from gateway.gpus import Gpu
from gateway.kept import EngineProcess, end_life, kept, launch
from gateway.lives import Found, Life, RunFolder, Safer
from gateway.process import CannotStart, NoProcess, watchdog
from gateway.question import NoAnswer, Question

logger = logging.getLogger("hostler.nodes.local")

START_PAUSE_S = 0.01
PAUSE_LIMIT_S = 40.0  # more than a start may take


class LocalNode:
    """A place for processes, for as long as `open_node` is open.

    `folder` is for what ends with us; engines have folders of their own in the run folder.
    """

    def __init__(self, folder: Path, run_folder: RunFolder) -> None:
        self.folder = folder
        self.run_folder = run_folder
        self.list_gpus = Question(gpus.list_gpus, limit_s=gpus.LIMIT_S)  # as they are now; raises NoAnswer
        self.leaves_engines = False  # to the next gateway, as we end
        self.has_successor = False  # another gateway has taken over
        self._is_open = asyncio.Event()  # else no engine is started: another gateway is taking over
        self._is_open.set()
        self._busy = 0

    def known_gpus(self) -> list[Gpu]:
        """The GPUs as they are now, or were when they could be seen last. Takes a moment: not for the event loop."""
        try:
            return self.list_gpus()
        except NoAnswer as exc:
            return exc.last or []

    def new_endpoint(self, *, unix_socket: bool) -> tuple[Path, Endpoint]:
        """The folder of one more life, not made yet, and an address in it that has a key of its own.

        A port can be taken by somebody else before the engine binds it; the engine then exits, and the
        replica's next start gets another one. A socket in our folder cannot.
        """
        key = secrets.token_urlsafe(24)
        folder = self.run_folder.new()
        if unix_socket:
            return folder, Endpoint(socket=str(folder / lives.SOCKET), api_key=key)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return folder, Endpoint(port=probe.getsockname()[1], api_key=key)

    @contextlib.asynccontextmanager
    async def run(
        self,
        command: Command,
        log: Path,
        *,
        folder: Path,
        endpoint: Endpoint,
        uid: str,
        index: int,
        placement: Placement,
        engine: str,
        asked: Sequence[object] = (),
        safer: Safer | None = None,
        tiers: Sequence[Tier] = (),
    ) -> AsyncIterator[EngineProcess | NoProcess]:
        """The command as an engine with a keeper, for the length of a block.

        Args:
            asked: as of `fingerprint`.
            safer: if it is not the whole wish.
            tiers: how it can sleep.
        Raises:
            CannotStart: with the reason.
            OSError: the folder of the life, or the log, cannot be written.
        """
        if command.endpoint:
            yield NoProcess()
            return
        await self._is_open.wait()
        folder.mkdir(mode=0o700)
        try:
            for name, text in command.files.items():
                (folder / name).write_text(text)
            life = Life(
                uid=uid,
                index=index,
                endpoint=endpoint,
                placement=placement,
                fingerprint=lives.fingerprint(command, engine, asked),
                argv=command.argv,
                grace_s=command.grace_s,
                log=str(log),
                log_start=_head(log, command),
                started_at=time.time(),
                safer=safer,
                tiers=tuple(tiers),
            )
        except OSError:
            lives.remove(folder)
            raise
        with self._changing():
            process = await launch(self.run_folder, folder, life, command.env, cwd=command.folder)
        async with kept(process, lambda: self.leaves_engines):
            yield process

    @contextlib.asynccontextmanager
    async def adopt(self, found: Found) -> AsyncIterator[EngineProcess]:
        """An engine that another gateway started, as if it were ours from now on.

        Raises:
            CannotStart: its folder cannot be written.
        """
        try:
            process = EngineProcess(found, is_adopted=True)
        except OSError as exc:
            raise CannotStart(f"{found.folder} cannot be written: {exc.strerror}", is_final=False) from exc
        async with kept(process, lambda: self.leaves_engines):
            yield process

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    @contextlib.asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """For the length of the block, what is on disk of an engine may differ from what it does: no pause begins."""
        await self._is_open.wait()
        with self._changing():
            yield

    async def pause(self) -> None:
        """Start no engine, and let none sleep or wake, from now on; returns once all that has begun is done.

        What sleeps or wakes for longer than that is known as such by what is on disk of it.
        """
        self._is_open.clear()
        deadline = time.monotonic() + PAUSE_LIMIT_S
        while self._busy:
            if time.monotonic() >= deadline:
                logger.warning(
                    "%d engines that start, fall asleep or wake were not done with that within %g s. The next gateway "
                    "takes over all the same: it ends those of which it does not know how far they came, and starts "
                    "them anew.",
                    *(self._busy, PAUSE_LIMIT_S),
                )
                return
            await asyncio.sleep(START_PAUSE_S)

    def go_on(self) -> None:
        """As before the pause."""
        self._is_open.set()

    def survey(self) -> tuple[list[Found], dict[Path, str]]:
        """The engines that earlier gateways left running, and the other folders, each with why it is of no use."""
        looked = {folder: lives.read(folder) for folder in self.run_folder.folders()}
        running = [found for found in looked.values() if isinstance(found, Found)]
        return running, {folder: why for folder, why in looked.items() if isinstance(why, str)}

    async def end(self, folders: list[Path], drain_s: float = 0.0) -> None:
        """End what is there of these lives, once no other gateway answers by it or so much time has passed.

        Never raises.
        """
        await asyncio.gather(*(end_life(folder, drain_s) for folder in folders))


def _head(log: Path, command: Command) -> int:
    """Begin the log of a life by what is run; where the engine's own words will begin."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command.argv)}\n".encode())
        file.flush()
        return file.tell()


@contextlib.asynccontextmanager
async def open_scratch() -> AsyncIterator[Path]:
    """A folder for children that end with us, with a watchdog that ends them should we be killed."""
    folder = Path(tempfile.mkdtemp(prefix="hostler-")).resolve()  # mode 0700
    try:
        async with watchdog(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def open_node(home: Path, *, orphan_timeout_s: float) -> AsyncIterator[LocalNode]:
    """This machine. No engine is left behind, but by a gateway that says so.

    Raises:
        ForeignFolder: the run folder is not ours alone.
        OSError: it cannot be written.
    """
    run_folder = RunFolder(home, orphan_timeout_s=orphan_timeout_s)
    async with open_scratch() as folder:
        node = LocalNode(folder, run_folder)
        try:
            yield node
        finally:
            if not node.leaves_engines:
                await node.end(run_folder.folders())
