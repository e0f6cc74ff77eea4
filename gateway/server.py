"""Runs the door: binds the address, serves, and ends everything in order when told to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from engines.base import Endpoint
from gateway import metrics, passed_on
from gateway.addresses import is_any_address
from gateway.app import create_app
from gateway.config import NOWHERE, Settings, Source
from gateway.crowd import Crowd
from gateway.door.contract import breach
from gateway.errors import Busy, CannotRestart, SettingsError
from gateway.fleet import Fleet, open_fleet
from gateway.handover import HandoverFailed, Predecessor, Successor, adopt_heirs, stand_in
from gateway.home import only_one_in, sign
from gateway.limits import raise_open_files
from gateway.lives import lock_path
from gateway.process import is_alive
from gateway.stand_in import holder, pass_all_on, pass_on
from gateway.upstream import Upstream
from gateway.watch import Watch

if TYPE_CHECKING:
    from gateway.door.watched import Sweeper

logger = logging.getLogger("hostler.server")

BACKLOG = 2048
GC_THRESHOLD = 50_000  # objects between two collections; requests leave none behind that only it could free
KEEPALIVE_S = 75  # longer than most clients keep idle connections, so that it is they who close them
DRAIN_PAUSE_S = 0.05
PASS_PAUSE = 20  # between two looks at all connections, as many times what a look takes
SUCCESSOR_PAUSE_S = 1.0  # between two looks at whether it lives
CLOSE_LIMIT_S = 2  # for connections that linger once nothing is in flight

Greeting = Callable[[Fleet, str], Coroutine[Any, Any, None]]


class Server(uvicorn.Server):
    """uvicorn's server, with an end in three steps: close the door, drain, stop the fleet.

    Ctrl-C does not drain. A second signal ends the draining; after a handover the first one gives it the usual limit.
    """

    def __init__(self, config: uvicorn.Config, fleet: Fleet, listener: socket.socket, lock: int) -> None:
        super().__init__(config)
        self.successor: Successor | None = None  # it serves in our place
        self._fleet = fleet
        self._listener = listener
        self._lock = lock
        self._should_drain = True
        self._signalled_at: float | None = None
        self._look_at = 0.0
        self._pass_at = 0.0
        self._closed_at = 0.0  # the door, of the monotonic clock
        self._busy_at = 0.0  # when somebody was answered last
        self._taken_from: socket.socket
        self._taking: asyncio.Task[None] | None = None
        self._is_restarting = False
        self._ignores_hang_up = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    async def restart(self) -> int:
        """Have another gateway take over; its pid.

        Raises:
            Busy: it cannot be done now.
            CannotRestart: it does not come up; nothing has changed.
        """
        if self.should_exit or self._is_restarting:
            raise Busy("The gateway is being stopped or restarted already.")
        if busy := [uid for uid, reload in self._fleet.reloads.items() if not reload.is_over]:
            raise Busy(f"{', '.join(busy)} is being reloaded. Wait for its end, then restart.")
        self._is_restarting = True
        try:
            self.successor = await self._hand_over()
        except HandoverFailed as exc:
            raise CannotRestart(f"The gateway goes on as it was: the new one does not come up. {exc}") from exc
        finally:
            self._is_restarting = False
        logger.info("The gateway is process %d from now on; this one ends once it has answered.", self.successor.pid)
        self.should_exit = True
        return self.successor.pid

    async def _hand_over(self) -> Successor:
        """The gateway that serves in our place. Raises HandoverFailed; then everything is as before."""
        fleet, node = self._fleet, self._fleet.node
        successor = await Successor.start(self._listener.fileno(), self._lock, ignores_hang_up=self._ignores_hang_up)
        door: asyncio.Future[Upstream | None] = asyncio.get_running_loop().create_future()
        try:
            await successor.until_prepared()
            fleet.next_door = door  # new requests wait from now on
            await node.pause()
            await successor.go()
        except BaseException:
            try:
                await successor.give_up()
            finally:  # whatever becomes of that: requests wait for the answer
                node.go_on()
                fleet.next_door = None
                door.set_result(None)
            raise
        adopt_heirs()
        node.leaves_engines = node.has_successor = True
        door.set_result(Upstream(_endpoint_of(self._listener)))
        return successor

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self.successor:
            pass_on(str(lock_path(self._fleet.settings.home_path)), sig)
        if sig == signal.SIGINT or self._signalled_at is not None:
            self._should_drain = False
        self._signalled_at = time.monotonic()
        self.should_exit = True

    def protocol(self) -> asyncio.Protocol:
        """What serves one more connection."""
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The three steps; requests that outlast the drain get an error that says so.

        What another gateway answers has its limits there.
        """
        self._fleet.is_closing = True
        for server in self.servers:
            server.close()
        handing_over = asyncio.create_task(self._fleet.hand_over()) if self.successor else None
        await self.end_taking()
        self._closed_at = self._busy_at = time.monotonic()
        while self._should_drain and time.monotonic() < self._drained_by():
            if self.successor:
                self._pass_connections_on()
                self._end_with(self.successor)
            await asyncio.sleep(DRAIN_PAUSE_S)
        self._fleet.node.leaves_engines = self.successor is not None or keeps_engines(self._fleet.settings)
        await self._fleet.close()
        if handing_over:
            await handing_over
        await super().shutdown(sockets)
        if self._fleet.next_door and (door := await self._fleet.next_door):
            await door.close()

    def _drained_by(self) -> float:
        """Until when what there is now may go on."""
        settings = self._fleet.settings
        if self._fleet.relays:
            self._busy_at = time.monotonic()
            return math.inf
        if any(deployment.in_flight or deployment.waiting for deployment in self._fleet.deployments()):
            self._busy_at = time.monotonic()
            if self.successor is None:
                return self._closed_at + settings.drain_timeout_s
            signalled_at = math.inf if self._signalled_at is None else self._signalled_at
            return min(self._closed_at + settings.restart_drain_s, signalled_at + settings.drain_timeout_s)
        if self.successor and self.server_state.connections:  # half a request, or the end of an answer
            return self._busy_at + settings.drain_timeout_s
        return 0.0

    async def take(self, channel: int) -> None:
        """Go on with the connections that the gateway before us passes on, until it has no more, or we end."""
        with socket.socket(fileno=channel) as self._taken_from:
            self._taking = asyncio.create_task(passed_on.take(self._taken_from, self.protocol))
            await self._taking

    async def end_taking(self) -> None:
        """What comes too late is answered where it is; what has come is passed on again, or closed with the others."""
        if self._taking is None or self._taking.done():
            return
        with contextlib.suppress(OSError):  # nobody is there any more
            self._taken_from.shutdown(socket.SHUT_RD)
        await asyncio.wait([self._taking], timeout=CLOSE_LIMIT_S)

    def _pass_connections_on(self) -> None:
        """Who waits with the next request is served next door from now on.

        All connections are looked at for that, so the more there are the less often.
        """
        assert self.successor is not None
        if (began := time.monotonic()) < self._pass_at:
            return
        with contextlib.suppress(OSError):  # nobody takes them: who asks by them is answered from here
            passed_on.pass_on(self.server_state.connections, self.successor.channel)
        now = time.monotonic()
        self._pass_at = now + (now - began) * PASS_PAUSE

    def _end_with(self, successor: Successor) -> None:
        """Whoever started us is to learn, by our end, that nobody serves any more."""
        if (now := time.monotonic()) < self._look_at:
            return
        self._look_at = now + SUCCESSOR_PAUSE_S
        last = holder(str(lock_path(self._fleet.settings.home_path)))
        if last and not is_alive(last):
            logger.error("The gateway that took over, process %d, is gone, so this one ends, too.", last)
            self._should_drain = False


def keeps_engines(settings: Settings) -> bool:
    """Whether engines go on when the gateway is stopped; where a terminal started it, they do not, unless told to."""
    if settings.on_exit is None:
        return not any(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
    return settings.on_exit == "keep"


def run(
    settings: Settings,
    greeting: Greeting | None = None,
    before: Predecessor | None = None,
    source: Source = NOWHERE,
) -> None:
    """Serve until a signal ends it, or another gateway has taken over.

    Args:
        greeting: called with the fleet and the address once the door is open.
        before: the gateway that hands over to this one, if one does.
        source: where the settings came from; SIGHUP has them read again.
    Raises:
        HandoverFailed: it does not.
        SettingsError: the address is taken, the data folder is in use, or a declared model cannot be served.
    """
    open_files = raise_open_files()
    lock_lent, listener_lent = (before.lock, before.listener) if before else (None, None)
    with only_one_in(settings.home_path, lock_lent) as lock, _listening_socket(settings, listener_lent) as listener:
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
            successor = runner.run(_serve(settings, config, listener, lock, greeting, before, source, open_files))
    if successor:
        stand_in(lock_path(settings.home_path), before)


async def _serve(
    settings: Settings,
    config: uvicorn.Config,
    listener: socket.socket,
    lock: int,
    greeting: Greeting | None,
    before: Predecessor | None,
    source: Source,
    open_files: int,
) -> Successor | None:
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    async with open_fleet(settings, before, source) as fleet:
        server = Server(config, fleet, listener, lock)
        crowd = Crowd(create_app(fleet), server.server_state.connections, open_files)
        config.app = crowd
        door = _open_door(config, fleet, crowd)
        fleet.restart = server.restart
        with metrics.watching(fleet.deployments):
            path = str(lock_path(settings.home_path))
            watch = Watch(
                fleet,
                end=partial(server.handle_exit, signal.SIGTERM, None),
                pass_on=partial(pass_on, path, signal.SIGHUP),
            )
            watcher = asyncio.create_task(watch.run())  # first: who reads the greeting may send SIGHUP
            sweeper = asyncio.create_task(door.sweep(server.server_state.connections)) if door else None
            greeter = asyncio.create_task(_greet(server, greeting, fleet, address, lock, before))
            try:
                await server.serve(sockets=[listener])
            finally:
                if server.successor:  # until we stand in for it, a signal must not be the end of us
                    pass_all_on(path)
                tasks = [task for task in (greeter, watcher, sweeper) if task]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return server.successor


def _open_door(config: uvicorn.Config, fleet: Fleet, crowd: Crowd) -> Sweeper | None:
    """Let easy requests take the short way, where uvicorn is as we know it."""
    if (why := breach()) is not None:
        logger.warning(
            "All requests take the plain way, which costs more, notices some clients that leave too late, and waits "
            "for those that send nothing more: %s. Install Hostler's own requirements.",
            why,
        )
        return None
    if fleet.settings.door == "plain":
        from gateway.door.watched import Sweeper, WatchedProtocol

        config.http = WatchedProtocol
        return Sweeper(fleet)
    from gateway.door.protocol import Door, protocol_of

    door = Door(fleet, crowd)
    config.http = protocol_of(door)  # type: ignore[assignment]
    return door


async def _greet(
    server: Server, greeting: Greeting | None, fleet: Fleet, address: str, lock: int, before: Predecessor | None
) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    gc.collect()
    gc.freeze()  # what is there now stays: no collection need look at it
    gc.set_threshold(GC_THRESHOLD)
    if before:
        sign(lock)
        fleet.node.leaves_engines = False
        with contextlib.suppress(HandoverFailed):  # it is gone, and we are there
            before.serving()
    logger.info("Listening on %s", address)
    if before:
        await server.take(before.channel)
    if greeting is not None:
        try:
            await greeting(fleet, address)
        except Exception:
            logger.exception("The greeting failed; the gateway goes on.")


def _endpoint_of(listener: socket.socket) -> Endpoint:
    """Where this machine reaches what listens there."""
    host, port = listener.getsockname()[:2]
    if is_any_address(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return Endpoint(host=f"[{host}]" if ":" in host else host, port=port)


def _tell_other_address(settings: Settings, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    try:
        wished = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        wished = []
    if not any(address[0] == host and settings.port in (0, port) for *_, address in wished):
        logger.warning(
            "It listens on %s:%d as before, and not on %s:%d: a restart keeps the door. Stop and start it for that.",
            host,
            port,
            settings.host,
            settings.port,
        )


@contextlib.contextmanager
def _listening_socket(settings: Settings, lent: int | None) -> Iterator[socket.socket]:
    """Bound before anything is started, so that a taken port costs nothing; or that of the gateway before us."""
    if lent is not None:
        with socket.socket(fileno=lent) as listener:
            _tell_other_address(settings, listener)
            yield listener
        return
    try:
        host = settings.host.encode() if settings.host.isascii() else settings.host  # else for Python's IDNA tables
        found = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as exc:
        is_taken = exc.errno == errno.EADDRINUSE
        why = "another program has it. Choose another with --port" if is_taken else exc.strerror
        raise SettingsError(f"Cannot listen on {settings.host}:{settings.port}: {why}.") from exc
    with listener:
        yield listener
