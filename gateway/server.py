"""Runs the door: binds the address, serves, and ends everything in order when told to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from gateway import metrics
from gateway.app import create_app
from gateway.config import NOWHERE, Settings, Source
from gateway.errors import SettingsError
from gateway.fleet import Fleet, open_fleet
from gateway.watch import Watch

logger = logging.getLogger("hostler.server")

BACKLOG = 2048
KEEPALIVE_S = 75  # longer than most clients keep idle connections, so that it is they who close them
CLOSE_LIMIT_S = 2  # for connections that linger once nothing is in flight

Greeting = Callable[[Fleet, str], Coroutine[Any, Any, None]]


class Server(uvicorn.Server):
    """uvicorn's server, with an end in three steps: close the door, drain, stop the fleet.

    Ctrl-C does not drain. A second signal ends the draining.
    """

    def __init__(self, config: uvicorn.Config, fleet: Fleet) -> None:
        super().__init__(config)
        self._fleet = fleet
        self._should_drain = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self.should_exit or sig == signal.SIGINT:
            self._should_drain = False
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The three steps; requests that outlast the drain get an error that says so."""
        self._fleet.is_closing = True
        for server in self.servers:
            server.close()
        deadline = time.monotonic() + self._fleet.settings.drain_timeout_s
        while self._is_busy() and self._should_drain and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self._fleet.close()
        await super().shutdown(sockets)

    def _is_busy(self) -> bool:
        return any(deployment.in_flight or deployment.waiting for deployment in self._fleet.deployments())


def run(settings: Settings, greeting: Greeting | None = None, source: Source = NOWHERE) -> None:
    """Serve until a signal ends it.

    Args:
        greeting: called with the fleet and the address once the door is open.
        source: where the settings came from; SIGHUP has them read again.
    Raises:
        SettingsError: the address is taken, the data folder is in use, or a declared model cannot be served.
    """
    with _only_one_in(settings.home_path), _listening_socket(settings) as listener:
        config = uvicorn.Config(
            None,  # type: ignore[arg-type]  # the app comes with the fleet, which needs a running loop
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEPALIVE_S,
            ws="none",
            timeout_graceful_shutdown=CLOSE_LIMIT_S,
        )
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(settings, config, listener, greeting, source))


async def _serve(
    settings: Settings, config: uvicorn.Config, listener: socket.socket, greeting: Greeting | None, source: Source
) -> None:
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    async with open_fleet(settings, source) as fleet:
        config.app = create_app(fleet)
        server = Server(config, fleet)
        with metrics.watching(fleet.deployments):
            greeter = asyncio.create_task(_greet(server, greeting, fleet, address))
            watch = Watch(fleet, end=partial(server.handle_exit, signal.SIGTERM, None))
            watcher = asyncio.create_task(watch.run())
            try:
                await server.serve(sockets=[listener])
            finally:
                greeter.cancel()
                watcher.cancel()
                await asyncio.gather(greeter, watcher, return_exceptions=True)


async def _greet(server: Server, greeting: Greeting | None, fleet: Fleet, address: str) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    logger.info("Listening on %s", address)
    if greeting is not None:
        try:
            await greeting(fleet, address)
        except Exception:
            logger.exception("The greeting failed; the gateway goes on.")


@contextlib.contextmanager
def _listening_socket(settings: Settings) -> Iterator[socket.socket]:
    """Bound before anything is started, so that a taken port costs nothing."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as exc:
        is_taken = exc.errno == errno.EADDRINUSE
        why = "another program has it. Choose another with --port" if is_taken else exc.strerror
        raise SettingsError(f"Cannot listen on {settings.host}:{settings.port}: {why}.") from exc
    with listener:
        yield listener


@contextlib.contextmanager
def _only_one_in(home: Path) -> Iterator[None]:
    """The data folder has one writer."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (home / "gateway.lock").open("a+")
    except OSError as exc:
        raise SettingsError(f"The data folder {home} cannot be used: {exc.strerror}. Choose another `home`.") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.seek(0)
            raise SettingsError(
                f"Another gateway (pid {lock.read().strip() or 'unknown'}) uses the data folder {home}. Stop it, or "
                "give this one another `home`."
            ) from exc
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
