"""This machine: its run folder, its GPUs, and how a program is started on it."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

from engines.base import Command, Endpoint
from gateway import gpus
from gateway.gpus import Gpu
from gateway.process import EngineProcess, NoProcess, engine_process, watchdog

SOCKET_PATH_LIMIT = 100  # bytes; the system's own limit is 104 to 108


class LocalNode:
    """A place for processes, for as long as `open_node` is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list_gpus(self, *, with_processes: bool = False) -> list[Gpu]:
        """The GPUs as they are now."""
        return gpus.list_gpus(with_processes=with_processes)

    def new_endpoint(self, *, unix_socket: bool) -> Endpoint:
        """An address that nothing listens on yet, with a key of its own.

        A port can be taken by somebody else before the engine binds it; the engine then exits, and the
        replica's next start gets another one. A socket in our folder cannot.
        """
        key = secrets.token_urlsafe(24)
        if unix_socket:
            return Endpoint(socket=str(self.folder / f"{secrets.token_hex(4)}.sock"), api_key=key)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return Endpoint(port=probe.getsockname()[1], api_key=key)

    def run(self, command: Command, log: Path) -> AbstractAsyncContextManager[EngineProcess | NoProcess]:
        """The command as a process group, for the length of a block."""
        for name, text in command.files.items():
            (self.folder / name).write_text(text)
        if command.endpoint:
            return nullcontext(NoProcess())
        return engine_process(
            command.argv, command.env, log, folder=self.folder, cwd=command.folder, grace_s=command.grace_s
        )


@contextlib.asynccontextmanager
async def open_node() -> AsyncIterator[LocalNode]:
    """This machine, with a watchdog that ends what we started should we be killed."""
    folder = Path(tempfile.mkdtemp(prefix="hostler-")).resolve()  # mode 0700
    if len(str(folder)) > SOCKET_PATH_LIMIT - 16:
        shutil.rmtree(folder)
        folder = Path(tempfile.mkdtemp(prefix="hostler-", dir="/tmp")).resolve()
    try:
        async with watchdog(folder):
            yield LocalNode(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
