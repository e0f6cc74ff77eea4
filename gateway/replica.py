"""The life of one copy of a model: its State, the coroutine that drives it, and why it failed.

waiting -> downloading -> starting -> ready -> stopping -> stopped
   ^                        |           |
   |                        v           v
   +------ backoff <------ exit before or after ready;   too many in a row -> failed (needs a person)
"""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from engines.base import Command, Engine, Launch, Placement
from gateway import metrics
from gateway.downloads import DownloadFailed, Progress, fetch
from gateway.environments import CannotBuild, Recipe, mark_used, prepare
from gateway.nodes.local import LocalNode
from gateway.placement import needs_of, place
from gateway.probe import NotReady, ask_once, until_ready, until_silent
from gateway.process import CannotStart, EngineProcess, Exit, NoProcess
from gateway.upstream import Upstream

logger = logging.getLogger("hostler.replica")

BACKOFF_FIRST_S = 0.5
BACKOFF_LIMIT_S = 60.0
STABLE_S = 60.0  # ready for so long, or one request served: earlier failures are forgotten
HURRY_GRACE_S = 1.0


class State(enum.StrEnum):
    """Where a replica is in its life."""

    WAITING = "waiting"
    DOWNLOADING = "downloading"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    BACKOFF = "backoff"
    FAILED = "failed"


COMING = frozenset({State.WAITING, State.DOWNLOADING, State.STARTING, State.BACKOFF})


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a replica is not serving. `at` is in seconds since the epoch."""

    reason: str
    advice: str
    at: float
    exit_code: int | None = None
    signal: int | None = None
    log_tail: tuple[str, ...] = ()
    permanent: bool = False

    def __str__(self) -> str:
        tail = f" Its last words: {' | '.join(self.log_tail[-4:])}." if self.log_tail else ""
        return f"{self.reason}.{tail} {self.advice}"


class ReplicaFailed(Exception):
    """A life ended otherwise than by our wish."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class Replica:
    """One supervised copy. `run` drives it and is the only writer of its state."""

    def __init__(
        self,
        launch: Launch,
        index: int,
        engine: Engine,
        node: LocalNode,
        *,
        cache: Path,
        log: Path,
        restart_limit: int,
        download_stall_s: float,
        probe_interval_s: float,
        probe_failures: int,
        environments: Path,
        recipe: Recipe,
        changed: Callable[[], None],
        placements: Callable[[], list[Placement]],
        tell: Callable[[str, str], None],
        moved: Callable[[State, State], None] = lambda before, after: None,
    ) -> None:
        self.launch = launch
        self.index = index
        self.log = log
        self.state = State.STOPPED
        self.state_since = time.monotonic()
        self.in_flight = 0
        self.served = 0  # requests answered in this life
        self.starts = 0
        self.ready_since: float | None = None  # in this life
        self.load_s = 0.0  # of the last start that came to be ready
        self.waits_for: str | None = None  # what has to happen before it gets room
        self.failures_in_row = 0
        self.last_used = time.monotonic()
        self.failure: Failure | None = None
        self.progress: Progress | None = None
        self.process: EngineProcess | NoProcess | None = None
        self.address: str | None = None
        self.upstream: Upstream | None = None
        self.placement: Placement | None = None  # what it holds
        self._engine = engine
        self._node = node
        self._cache = cache
        self._restart_limit = restart_limit
        self._download_stall_s = download_stall_s
        self._probe_interval_s = probe_interval_s
        self._probe_failures = probe_failures
        self._silence: Failure | None = None  # of this life
        self._environments = environments
        self._recipe = recipe
        self._changed = changed
        self._placements = placements
        self._tell = tell
        self._moved = moved
        self._retry = asyncio.Event()

    @property
    def name(self) -> str:
        """The name of the copy, as Xinference's clients know it."""
        return f"{self.launch.uid}-rep{self.index}"

    async def run(self) -> None:
        """Start, wait until ready, serve until it exits, back off, start again, until cancelled.

        Nothing but cancellation leaves it.
        """
        self.failures_in_row = 0
        try:
            while True:
                self._retry.clear()
                self._enter(State.WAITING)
                try:
                    await self._live()
                except ReplicaFailed as exc:
                    self._record(exc.failure)
                except CannotStart as exc:
                    self._record(_failure(str(exc), "Check the engine's settings.", final=exc.is_final))
                except OSError as exc:
                    self._record(_failure(f"the system refused: {exc}", "Check the disk and the system's limits."))
                except Exception as exc:
                    logger.exception("%s: a failure that is not the engine's", self)
                    advice = "This is a fault of the gateway: its own log has the details."
                    self._record(Failure(reason=f"the gateway failed: {exc!r}", advice=advice, at=time.time()))
                if self.state is State.FAILED:
                    await self._until_retry()
                else:
                    await asyncio.sleep(self._backoff_s())
        except asyncio.CancelledError:
            self._enter(State.STOPPED)
            raise

    async def _until_retry(self) -> None:
        """Until somebody gives it another chance, or what is served elsewhere may be back."""
        try:
            async with asyncio.timeout(self._engine.retry_s):
                await self._retry.wait()
        except TimeoutError:
            return

    async def _live(self) -> None:
        """One life, from files to exit. Always ends with ReplicaFailed or cancelled."""
        self.served, self.ready_since, self._silence = 0, None, None
        model_path = await self._fetch()
        python = await self._prepare()
        placement = await self._place()
        self._enter(State.STARTING)
        self.starts += 1
        endpoint = self._node.new_endpoint(unix_socket=self._engine.listens_on_socket(self.launch))
        command = self._engine.command(self.launch, model_path, placement, endpoint, python)
        endpoint = command.endpoint or endpoint
        if command.argv:
            mark_used(command.argv[0], self._environments)
        upstream = Upstream(endpoint)
        try:
            async with self._node.run(command, self.log) as process:
                self.process = process
                try:
                    path = await self._until_ready(process, upstream, command)
                    self.upstream, self.address = upstream, endpoint.address
                    self.load_s = time.monotonic() - self.state_since
                    metrics.LOAD_SECONDS.labels(self.launch.uid).observe(self.load_s)
                    self._enter(State.READY)
                    self._tell("INFO", f"{self.name} is ready")
                    watch = asyncio.create_task(self._end_if_silent(process, upstream, path, command))
                    try:
                        ended = await process.wait()
                        # No await between the exit and the state: nobody is sent to a dead engine.
                        self.failure = self._silence or _exit_failure(ended, process, "while it was ready")
                        self._leave(State.BACKOFF)
                        raise ReplicaFailed(self.failure)
                    finally:
                        watch.cancel()
                        await asyncio.gather(watch, return_exceptions=True)
                finally:
                    if self.state is not State.BACKOFF:
                        self._leave(State.STOPPING)
                    await upstream.close()  # before SIGTERM, so that the engine has nothing left to finish
        finally:
            self.process = self.placement = None
            await upstream.close()

    async def _place(self) -> Placement:
        """The GPUs for this life; no await between looking at what is taken and taking."""
        needs = needs_of(self.launch, self._engine.needs(self.launch), self.index)
        gpus = await asyncio.to_thread(self._node.list_gpus) if needs.gpu_idx or needs.n_gpu else []
        placement = place(needs, gpus, self._placements())
        if isinstance(placement, str):
            raise ReplicaFailed(_failure(f"it cannot be placed: {placement}", "Change gpu_idx or n_gpu.", final=True))
        self.placement = placement
        return placement

    async def _fetch(self) -> Path:
        def report(progress: Progress) -> None:
            if self.state is not State.DOWNLOADING:
                self._enter(State.DOWNLOADING)
            self.progress = progress

        try:
            return await fetch(
                self.launch.artifact.source,
                self._cache,
                folder=self._node.folder,
                stall_s=self._download_stall_s,
                report=report,
            )
        except DownloadFailed as exc:
            advice = "Correct the model's source." if exc.permanent else "It is tried again."
            raise ReplicaFailed(
                _failure(f"its files cannot be had: {str(exc).rstrip('.')}", advice, final=exc.permanent)
            ) from exc
        finally:
            self.progress = None

    async def _prepare(self) -> str | None:
        """The Python of the model's own environment, built if need be; None if it wants none."""
        if (environment := self.launch.environment) is None:
            return None

        def report(stage: str) -> None:
            if self.state is not State.DOWNLOADING:
                self._enter(State.DOWNLOADING)
            self.progress = Progress(stage=stage)

        try:
            return await prepare(
                environment, self._environments, recipe=self._recipe, run_folder=self._node.folder, report=report
            )
        except CannotBuild as exc:
            advice = "Correct the model's packages." if exc.permanent else "It is tried again."
            raise ReplicaFailed(_failure(str(exc), advice, final=exc.permanent)) from exc
        finally:
            self.progress = None

    async def _until_ready(self, process: EngineProcess | NoProcess, upstream: Upstream, command: Command) -> str:
        """A race of three: the probe answers, the process exits, the start's time ends. The path that answered."""
        limit_s = self.launch.start_timeout_s
        exited = asyncio.ensure_future(process.wait())
        if command.endpoint:
            probing = asyncio.ensure_future(ask_once(upstream, command.ready_path))
        else:
            probing = asyncio.ensure_future(until_ready(upstream, (command.ready_path, *command.other_ready_paths)))
        try:
            await asyncio.wait((exited, probing), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                self._leave(State.BACKOFF)
                raise ReplicaFailed(_exit_failure(exited.result(), process, "before it was ready"))
            if probing.done():
                return probing.result()
            raise ReplicaFailed(
                _failure(
                    f"it was not ready {limit_s:g} s after its start",
                    "If the model needs longer to load, raise start_timeout_s.",
                    tail=process.log_tail(),
                )
            )
        except NotReady as exc:
            advice = "Check that it is up, and the launch's base_url, api_key and ready_path."
            raise ReplicaFailed(_failure(f"it is not served there: {exc}", advice)) from exc
        finally:
            for task in (exited, probing):
                task.cancel()
            await asyncio.gather(exited, probing, return_exceptions=True)

    async def _end_if_silent(
        self, process: EngineProcess | NoProcess, upstream: Upstream, path: str, command: Command
    ) -> None:
        """Once it no longer answers, end the process; whoever waits for its exit finds out why."""
        said = await until_silent(
            upstream,
            path,
            interval_s=command.probe_interval_s or self._probe_interval_s,
            failures=self._probe_failures,
            cpu_s=process.cpu_s,
        )
        advice = "It is tried again." if command.endpoint else "It hung, so it was killed; `hostler logs` shows more."
        self.failure = self._silence = _failure(said, advice, tail=process.log_tail())
        self._leave(State.BACKOFF)
        process.kill()
        await upstream.close()

    def retry(self) -> None:
        """Give it another chance if it has failed."""
        if self.state is State.FAILED:
            self.failures_in_row = 0
            self._enter(State.WAITING)
            self._retry.set()

    def hurry(self) -> None:
        """When it is stopped, it is not to take its time."""
        if self.process is not None:
            self.process.grace_s = min(self.process.grace_s, HURRY_GRACE_S)

    async def confirm(self, limit_s: float = 1.0) -> None:
        """Wait shortly to learn whether the process is gone, after a connection to it broke."""
        process = self.process
        if process is None or process.pid is None or self.state is not State.READY:
            return
        try:
            async with asyncio.timeout(limit_s):
                await process.wait()
        except TimeoutError:
            return
        await asyncio.sleep(0)  # let `run`, which waits for the same exit, go first

    def _record(self, failure: Failure) -> None:
        """A life has failed: remember why, and whether to try again."""
        ready_since = self.ready_since
        was_fine = ready_since is not None and (self.served > 0 or time.monotonic() - ready_since > STABLE_S)
        self.failures_in_row = 1 if was_fine else self.failures_in_row + 1
        self.failure = failure
        metrics.ENGINE_RESTARTS.labels(self.launch.uid).inc()
        is_final = failure.permanent or self.failures_in_row >= self._restart_limit
        logger.log(logging.ERROR if is_final else logging.WARNING, "%s: %s", self, failure)
        self._enter(State.FAILED if is_final else State.BACKOFF)
        self._tell("ERROR" if is_final else "WARNING", f"{self.name}: {failure}")

    def _backoff_s(self) -> float:
        full: float = min(BACKOFF_LIMIT_S, BACKOFF_FIRST_S * 2 ** min(self.failures_in_row - 1, 10))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 (spreads restarts, guards nothing)

    def _enter(self, state: State) -> None:
        logger.debug("%s: %s -> %s", self, self.state, state)
        before, self.state = self.state, state
        self.state_since = time.monotonic()
        if before is not state:
            self._moved(before, state)
        if state is State.READY:
            self.last_used = self.ready_since = self.state_since
        self._changed()

    def _leave(self, state: State) -> None:
        """Stop being somewhere to send requests to."""
        self.upstream = self.address = None
        self._enter(state)

    def __str__(self) -> str:
        return f"{self.launch.uid}/{self.index}"


def _failure(reason: str, advice: str, *, tail: tuple[str, ...] = (), final: bool = False) -> Failure:
    return Failure(reason=reason, advice=advice, at=time.time(), log_tail=tail, permanent=final)


def _exit_failure(ended: Exit, process: EngineProcess | NoProcess, when: str) -> Failure:
    advice = "`hostler logs` shows more."
    if ended.signal == signal.SIGKILL:
        advice = "If nobody killed it, the system ran out of memory: a smaller context or model needs less."
    return Failure(
        reason=f"the engine ended with {ended} {when}",
        advice=advice,
        at=time.time(),
        exit_code=ended.code,
        signal=ended.signal,
        log_tail=process.log_tail(),
    )
