"""The life of one copy of a model: its State, the coroutine that drives it, and why it failed.

waiting -> downloading -> starting -> ready -> stopping -> stopped
   ^                        |           |
   |                        v           v
   +------ backoff <------ exit before or after ready;   too many in a row -> failed (needs a person)

and where its engine can: ready -> falling asleep -> asleep -> waking -> ready
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from engines.base import Call, Command, Endpoint, Engine, Launch, Needs, Placement, Tier
from gateway import causes, metrics, tiers
from gateway.causes import Cause
from gateway.config import Settings
from gateway.downloads import DownloadFailed, Progress, fetch_all
from gateway.environments import CannotBuild, mark_used, prepare, recipe_of
from gateway.experience import Experience
from gateway.kept import EngineProcess
from gateway.limits import NO_NEW_THREAD, is_disk_full, oom_kills
from gateway.lives import Found, Safer, Slumber, Stage, fingerprint, mark_ready, note_slumber, was_ready
from gateway.nodes.local import LocalNode
from gateway.pace import Pace
from gateway.placement import fell_back, how
from gateway.probe import NotReady, ask_once, read_number, until_ready, until_silent
from gateway.process import CannotStart, Exit, NoProcess
from gateway.sizing import needs_now
from gateway.upstream import Upstream
from gateway.yard import Bed
from registry.schema import Source

logger = logging.getLogger("hostler.replica")

BACKOFF_FIRST_S = 0.5
BACKOFF_LIMIT_S = 60.0
STABLE_S = 60.0  # ready for so long, or one request served: earlier failures are forgotten
HURRY_GRACE_S = 1.0
TURNS = 10  # of the loop, in which everybody who waits for a thing that is done has learnt of it
PLACE_RETRY_S = 10.0  # others may have given back what they hold
SHARED_PAUSE_S = 0.2
EXIT_LIMIT_S = 1.0  # for a process to be seen to end that has just broken a connection
REHEARSE_AFTER_S = 20.0  # idle for so long, nobody is likely to ask in the next moment
TIER_FAILURES = 2  # until a tier is not used any more
TIER_REST_S, TIER_REST_LIMIT_S = 15.0, 600.0  # of one that the disk had no room for; each time twice as long
OWN_TIER = "disk"  # of an engine that sleeps by itself: it reads its weights again from their files
OWN_SLEEP_PAUSE_S = 0.5
OWN_SLEEP_PAUSE_LIMIT_S = 30.0  # for one that should sleep by now, and does not say so


class State(enum.StrEnum):
    """Where a replica is in its life."""

    WAITING = "waiting"
    DOWNLOADING = "downloading"
    STARTING = "starting"
    READY = "ready"
    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"
    STOPPING = "stopping"
    STOPPED = "stopped"
    BACKOFF = "backoff"
    FAILED = "failed"


COMING = frozenset({State.WAITING, State.DOWNLOADING, State.STARTING, State.WAKING, State.BACKOFF})
RESTING = frozenset({State.FALLING_ASLEEP, State.ASLEEP})


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a replica is not serving. `at` is in seconds since the epoch."""

    reason: str
    advice: str
    at: float
    cause: Cause = Cause.UNKNOWN
    exit_code: int | None = None
    signal: int | None = None
    log_tail: tuple[str, ...] = ()
    permanent: bool = False

    def __str__(self) -> str:
        tail = f" Its last words: {' | '.join(self.log_tail[-4:])}." if self.log_tail else ""
        return f"{self.reason}.{tail} {self.advice}"


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """A life that is about to be entered: what runs, where it listens, its block, and when it has to be ready."""

    command: Command
    endpoint: Endpoint
    process: AbstractAsyncContextManager[EngineProcess | NoProcess]
    limit_s: float
    slumber: Slumber = Slumber()  # as it was left by an earlier gateway


class ReplicaFailed(Exception):
    """A life ended otherwise than by our wish; `retry_s`: one that is final may be tried again after so long."""

    def __init__(self, failure: Failure, retry_s: float | None = None) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.retry_s = retry_s


class Replaced(Exception):
    """The engine is ended by our wish, to be started anew elsewhere."""


class NoPlace(Exception):
    """There is no room, whoever of ours goes; `for_ever` if the machine is too small. What would help are sentences."""

    def __init__(self, reason: str, remedies: Sequence[str], *, for_ever: bool) -> None:
        super().__init__(reason)
        self.remedies = remedies
        self.for_ever = for_ever


class Replica:
    """One supervised copy. `run` drives it and is the only writer of its state."""

    def __init__(
        self,
        launch: Launch,
        index: int,
        engine: Engine,
        node: LocalNode,
        *,
        log: Path,
        settings: Callable[[], Settings],
        changed: Callable[[], None],
        place: Callable[[Replica, Needs, Placement | None], Awaitable[Placement]],
        has_gpus: Callable[[], Awaitable[bool]],
        experience: Experience,
        tell: Callable[[str, str], None],
        moved: Callable[[State, State], None] = lambda before, after: None,
    ) -> None:
        """`settings` gives those in effect; they may be others each time."""
        self.launch = launch
        self.tried: Launch = launch  # what is run: the wish, or what needs less memory
        self.degraded: str | None = None  # how that differs from the wish
        self.index = index
        self.log = log
        self.state = State.STOPPED
        self.state_since = time.monotonic()
        self.in_flight = 0
        self.served = 0  # requests answered in this life
        self.starts = 0
        self.ready_since: float | None = None  # in this life
        self.waits_for: str | None = None  # what has to happen before it gets room
        self.failures_in_row = 0
        self.retry_at = 0.0  # of time.monotonic: the end of its back-off
        self.last_used = time.monotonic()
        self.failure: Failure | None = None
        self.progress: Progress | None = None
        self.process: EngineProcess | NoProcess | None = None
        self.address: str | None = None
        self.upstream: Upstream | None = None
        self.context_tokens: int | None = None  # that a request may have, as its engine tells
        self.placement: Placement | None = None  # what it holds; given by the dispatcher, given back here
        self.left_behind: Found | None = None  # its engine, which an earlier gateway has started
        self.pace = Pace()
        self.load_s = experience.load_s(launch)  # of the last start that came to be ready, as far as that is known
        self.retry_s = engine.retry_s  # after how long it is tried again once it has failed
        self.engine = engine
        self._node = node
        self._settings = settings
        self._silence: Failure | None = None  # of this life
        self._changed = changed
        self._ask_for_place = place
        self._has_gpus = has_gpus
        self._experience = experience
        self._tell = tell
        self._moved = moved
        self._retry = asyncio.Event()
        self._longest_tokens: int | None = None  # of a context that may be shorter
        self._was_ever_ready = False
        self._is_safer_tried = False
        self.tiers: tuple[Tier, ...] = ()  # how the engine of this life can sleep
        self.tier: Tier | None = None  # in which it sleeps, falls asleep, or wakes
        self.is_asleep = False  # or ends after that, without having been woken
        self.host_bytes = 0  # of the machine's memory, taken by this life for sleeping
        self._host_bytes_before = 0  # this time
        self._awake: Placement | None = None  # what it had before it ever slept
        self._is_wanted = False  # awake
        self._is_rehearsal = False
        self._turn = asyncio.Event()  # what it is to do has changed
        self._dozes_after: float | None = None  # when it was last used before its engine fell asleep by itself
        self.dozes_since = 0.0
        self._proof: str | None = None  # what this life answered before it slept
        self._tier_failures: Counter[str] = Counter()
        self._tier_rests: dict[str, tuple[float, float]] = {}  # until when, of the monotonic clock, and for how long
        self._needs_of_start: Needs | None = None
        self._own: Upstream | None = None  # also while nobody else may use it
        self._own_address: str | None = None
        self._oom_kills: int | None = None  # as this life began
        self._said: tuple[str, ...] = ()  # by the engine whose end was the last

    @property
    def busy_s(self) -> float:
        """How long it is expected to load yet, or to answer what it has begun."""
        now = time.monotonic()
        if self.state in (State.READY, State.ASLEEP):
            return self.pace.rest_s(self.in_flight, now)
        takes_s = self.wake_s(self.tier.name) if self.tier else self.load_s
        return max(0.0, (takes_s or 0.0) - (now - self.state_since))

    @property
    def rest_s(self) -> float:
        """What is left of its back-off."""
        return max(0.0, self.retry_at - time.monotonic())

    @property
    def name(self) -> str:
        """The name of the copy, as Xinference's clients know it."""
        return f"{self.launch.uid}-rep{self.index}"

    def take_over(self, found: Found) -> None:
        """Begin its next life with an engine that an earlier gateway has left running; what that holds, it holds."""
        self.left_behind, slumber = found, found.slumber
        tier = found.life.tier(slumber.tier)
        self.host_bytes = max(slumber.host_bytes, tier.host_bytes if tier and slumber.stage is Stage.UNSURE else 0)
        if tier and found.is_asleep:
            self.placement = tiers.asleep(found.life.placement, tier, self.host_bytes)
        else:
            self.placement = tiers.awake_again(found.life.placement, self.host_bytes)

    async def run(self) -> None:
        """Start, wait until ready, serve until it exits, back off, start again, until cancelled.

        Nothing but cancellation leaves it.
        """
        if not self.failures_in_row:
            self.begin_anew()
        try:
            while True:
                self._retry.clear()
                self.retry_s = self.engine.retry_s
                self._enter(State.WAITING)
                try:
                    await self._live()
                except Replaced:
                    continue
                except ReplicaFailed as exc:
                    self.retry_s = exc.retry_s or self.retry_s
                    self._record(exc.failure)
                except CannotStart as exc:
                    self._record(_of_start(exc))
                except OSError as exc:
                    cause = causes.of_errno(exc.errno)
                    self._record(_failure(f"the system refused: {exc}", causes.ADVICE[cause], cause))
                except Exception as exc:
                    self._record(_of_fault(self, exc))
                if self.state is State.FAILED:
                    await self._end_left_behind()
                    await self._until_retry(self.retry_s)
                else:
                    await self._until_retry(self.retry_at - time.monotonic())
        except asyncio.CancelledError:
            await self._end_left_behind()
            if self.ready_since is not None:
                self.begin_anew()
            self._enter(State.STOPPED)
            raise

    def begin_anew(self) -> None:
        """What failed before counts no more, and the whole wish is tried."""
        self.failures_in_row = 0
        self.tried, self.degraded, self._is_safer_tried = self.launch, None, False

    async def _until_retry(self, limit_s: float | None) -> None:
        """Until the limit, if there is one, or until somebody gives it another chance."""
        try:
            async with asyncio.timeout(limit_s):
                await self._retry.wait()
        except TimeoutError:
            return

    async def _live(self) -> None:
        """One life, from files to exit. Always ends with ReplicaFailed or cancelled."""
        self.served, self.ready_since, self._silence = 0, None, None
        paths = await self._fetch()
        python = await self._prepare()
        try:
            await self._run(paths, python)
        finally:
            self.process = self.placement = self.tier = self._awake = self._needs_of_start = None
            self.tiers, self.host_bytes, self.is_asleep, self.context_tokens = (), 0, False, None
            self._proof = None
            self._changed()

    async def _run(self, paths: Sequence[Path], python: str | None) -> None:
        """Take over an engine, or start one where there is room, until it ends."""
        begun = await self._adopt(paths, python) or await self._begin(paths, python)
        upstream = Upstream(begun.endpoint)
        try:
            async with begun.process as process:
                self.process = process
                self._own, self._own_address = upstream, begun.endpoint.address
                try:
                    await self._serve(process, upstream, begun, paths)
                finally:
                    if self.state is not State.BACKOFF:
                        self._leave(State.STOPPING)
                    await upstream.close()  # before SIGTERM, so that the engine has nothing left to finish
        finally:
            await upstream.close()

    async def _serve(
        self, process: EngineProcess | NoProcess, upstream: Upstream, begun: Begun, paths: Sequence[Path]
    ) -> None:
        """Be ready, or asleep, from its first answer to its end."""
        path = await self._until_ready(process, upstream, begun)
        is_asleep = await self._is_left_asleep(upstream, begun.slumber)
        on_gpu = bool(self.placement and self.placement.gpu_uuids)
        self._tell_ready(process, on_gpu=on_gpu, is_asleep=is_asleep)
        if is_asleep:
            self.ready_since = self.last_used = time.monotonic()
            self._enter(State.ASLEEP)
        else:
            self._be_ready()
        watches = (
            asyncio.create_task(self._end_if_silent(process, upstream, path, begun.command)),
            asyncio.create_task(self._count_others(process)),
            asyncio.create_task(self._read_context(upstream)),
            asyncio.create_task(self._watch_own_sleep(upstream)),
        )
        exited = asyncio.ensure_future(process.wait())
        try:
            with self._experience.watch(self.tried, process.pid, on_gpu=on_gpu):
                await self._until_exit(exited, paths)
            # No await between the exit and the state: nobody is sent to a dead engine.
            self.failure = self._silence or self._exit_failure(exited.result(), process, f"while it was {self._was()}")
            self._leave(State.BACKOFF)
            raise ReplicaFailed(self.failure)
        finally:
            for task in (*watches, exited):
                task.cancel()
            await asyncio.gather(*watches, exited, return_exceptions=True)

    def _was(self) -> str:
        return "ready" if self.state in (State.READY, State.BACKOFF) else str(self.state)

    def _be_ready(self) -> None:
        self.upstream, self.address = self._own, self._own_address
        self._enter(State.READY)

    async def _begin(self, paths: Sequence[Path], python: str | None) -> Begun:
        """What is to be started, and where."""
        needs = self._needs_of_start = await self._needs(paths)
        await self._place(needs)
        placement = self.placement
        assert placement is not None
        self._enter(State.STARTING)
        self.starts += 1
        folder, endpoint = self._node.new_endpoint(unix_socket=self.engine.listens_on_socket(self.tried))
        self._oom_kills = oom_kills()

        def command_of(launch: Launch) -> Command:
            return self.engine.command(_with_paths(launch, paths[1:]), paths[0], placement, endpoint, python)

        command, safer = command_of(self.tried), None
        if self.degraded:
            wish = self._fingerprint(command_of(self.launch))
            safer = Safer(wish=wish, options=self.tried.options, degraded=self.degraded)
        if command.argv:
            mark_used(command.argv[0], self._settings().environments_path)
        self._awake = placement
        self.tiers = self.engine.tiers(self.tried, placement, needs)
        process = self._node.run(
            command,
            self.log,
            folder=folder,
            endpoint=endpoint,
            uid=self.launch.uid,
            index=self.index,
            placement=placement,
            engine=self.engine.name,
            asked=self._asked_of_place(),
            safer=safer,
            tiers=self.tiers,
        )
        return Begun(
            command=command,
            endpoint=command.endpoint or endpoint,
            process=process,
            limit_s=self.launch.start_timeout_s,
        )

    async def _adopt(self, paths: Sequence[Path], python: str | None) -> Begun | None:
        """What an earlier gateway has left running, if it is just what would be started now; what is not, is ended."""
        found, self.left_behind = self.left_behind, None
        if found is None:
            return None
        life, is_same, why = found.life, False, "what it runs has changed"

        def command_of(launch: Launch) -> Command:
            return self.engine.command(_with_paths(launch, paths[1:]), paths[0], life.placement, life.endpoint, python)

        try:
            command = command_of(self.launch)
            is_same = self._fingerprint(command) == life.fingerprint
            if not is_same and life.safer and self._fingerprint(command) == life.safer.wish:
                safer = msgspec.structs.replace(self.launch, options=life.safer.options)
                command = command_of(safer)
                if is_same := self._fingerprint(command) == life.fingerprint:
                    self.tried, self.degraded, self._is_safer_tried = safer, life.safer.degraded, True
            if is_same and found.slumber.stage is Stage.UNSURE:
                is_same, why = False, "it was about to fall asleep or to wake, and how far it came is not known"
        finally:
            if not is_same:
                self._tell("INFO", f"{self.name}: {why}, so its engine is started anew")
                await self._node.end([found.folder], self._settings().drain_timeout_s)
        if not is_same:
            self.placement, self.host_bytes = None, 0
            return None
        self._enter(State.STARTING)
        self.starts += 1
        self._awake, self.tiers = life.placement, life.tiers
        return Begun(
            command=command,
            endpoint=life.endpoint,
            process=self._node.adopt(found),
            limit_s=self._settings().probe_interval_s * self._settings().probe_failures
            if was_ready(found.folder)
            else max(1.0, life.started_at + self.launch.start_timeout_s - time.time()),
            slumber=found.slumber,
        )

    def _fingerprint(self, command: Command) -> str:
        return fingerprint(command, self.engine.name, self._asked_of_place())

    def _asked_of_place(self) -> tuple[object, ...]:
        launch = self.launch
        return launch.gpus_of(self.index), launch.n_gpu, launch.memory_bytes

    def _tell_ready(self, process: EngineProcess | NoProcess, *, on_gpu: bool, is_asleep: bool) -> None:
        if isinstance(process, EngineProcess):
            mark_ready(process.folder)
            if process.is_adopted:
                metrics.ADOPTIONS.labels(self.launch.uid).inc()
                state = "asleep" if is_asleep else "ready"
                text = f"{self.name} is {state}: its engine, process {process.pid}, ran on meanwhile"
                self._tell("INFO", f"{text}, with {self.degraded}" if self.degraded else text)
                return
        self.load_s = load_s = time.monotonic() - self.state_since
        metrics.LOAD_SECONDS.labels(self.launch.uid).observe(load_s)
        self._experience.note_load(self.tried, load_s, on_gpu=on_gpu)
        self._tell("INFO", f"{self.name} is ready")
        if why := self.engine.why_sleepless(self.tried):
            self._tell("INFO", f"{self.name} never sleeps: {why}")

    async def _read_context(self, upstream: Upstream) -> None:
        """Learn how long requests may be, and tell it where the wish left that to what there is room for."""
        if (where := self.engine.context_from) is None:
            return
        self.context_tokens = await read_number(upstream, *where)
        wished = self._longest_tokens
        if self.context_tokens is not None and wished is not None and self.context_tokens < wished:
            text = f"{self.name} takes requests of up to {self.context_tokens:,} tokens. For the model's {wished:,}"
            self._tell("WARNING", f"{text} there is no memory; context_length of the launch would insist on a length")

    # --- how it sleeps and wakes

    @property
    def dozes(self) -> bool:
        """Whether its engine sleeps by itself. It is ready all the same: whoever asks it wakes it."""
        return self.state is State.READY and not self.in_flight and self._dozes_after == self.last_used

    @property
    def shown_state(self) -> State:
        """As people read it."""
        return State.ASLEEP if self.dozes else self.state

    @property
    def shown_tier(self) -> str | None:
        """In which it sleeps, falls asleep, or wakes."""
        return OWN_TIER if self.dozes else self.tier.name if self.tier else None

    async def _watch_own_sleep(self, upstream: Upstream) -> None:
        """See when its engine falls asleep by itself, by asking it while it is idle for long enough, and at first."""
        if (own := self.engine.own_sleep(self.tried)) is None:
            return
        after_s, call = own
        pause_s, asked = OWN_SLEEP_PAUSE_S, 0.0
        while True:
            used, idle_s = self.last_used, time.monotonic() - self.last_used
            if self.in_flight or (asked and not self.dozes and idle_s < after_s):
                pause_s = OWN_SLEEP_PAUSE_S
            elif not self.dozes and time.monotonic() - asked >= pause_s:
                is_asleep = await tiers.sleeps(upstream, call)
                asked, pause_s = time.monotonic(), min(2 * pause_s, OWN_SLEEP_PAUSE_LIMIT_S)
                if is_asleep and self.last_used == used:
                    self._dozes_after, self.dozes_since = used, asked
                    self._tell("INFO", f"{self.name} sleeps by itself (tier {OWN_TIER}), as nobody asks for it")
                    self._changed()
            await asyncio.sleep(OWN_SLEEP_PAUSE_S)

    @property
    def falls_to(self) -> Mapping[str, int] | None:
        """What it will hold once it has fallen asleep, if it does."""
        if self.state is not State.FALLING_ASLEEP or self._is_rehearsal or not (self.tier and self._awake):
            return None
        return tiers.asleep(self._awake, self.tier, self.host_bytes).memory

    @property
    def is_waking(self) -> bool:
        """Whether it wakes, or will right after it has fallen asleep."""
        return self.state is State.WAKING or (self.state is State.FALLING_ASLEEP and self._is_rehearsal)

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be awake."""
        return self._is_wanted

    @is_wanted.setter
    def is_wanted(self, is_wanted: bool) -> None:
        if is_wanted != self._is_wanted:
            self._is_wanted = is_wanted
            self._turn.set()

    def beds(self) -> tuple[Bed, ...]:
        """Those that it can sleep in, in the order of its tiers: who wakes quickest first."""
        if (awake := self._awake) is None:
            return ()
        return tuple(tiers.bed(awake, one, self.host_bytes, self.wake_s(one.name)) for one in self._usable_tiers())

    def _usable_tiers(self) -> list[Tier]:
        return [tier for tier in self.tiers if self._is_usable(tier)]

    def _is_usable(self, tier: Tier) -> bool:
        rests_until, _ = self._tier_rests.get(tier.name, (0.0, 0.0))
        if self._tier_failures[tier.name] >= TIER_FAILURES or time.monotonic() < rests_until:
            return False
        return tier.proof is None or not self._experience.is_unfit(self.tried, tier.name)

    def wake_s(self, tier: str) -> float | None:
        """How long it takes to wake, as far as earlier times tell."""
        return self._experience.wake_s(self.tried, tier)

    def should_rehearse(self, now: float) -> bool:
        """Whether its first sleep would keep somebody waiting that could be had before, as nobody asks for it now."""
        rest_s = self.rehearse_in_s(now)
        return rest_s is not None and rest_s <= 0

    def rehearse_in_s(self, now: float) -> float | None:
        """How long it has to be idle yet, at least, until that is well; None if nothing is to be had by it."""
        if self.launch.pinned and self.launch.sleep_after_s is None:
            return None  # it makes no room
        usable = self._usable_tiers()
        has_to = bool(usable) and usable[0].is_first_slow and not self.host_bytes
        if self.state is not State.READY or not has_to:
            return None
        if self.in_flight:
            return REHEARSE_AFTER_S
        return self.last_used + REHEARSE_AFTER_S - now

    def fall_asleep(self, tier: str, *, is_rehearsal: bool = False) -> None:
        """Answer nobody from now on, and do it; only for one that is ready and answers nobody.

        Args:
            is_rehearsal: it wakes right after that, and keeps all its room.
        """
        assert self.state is State.READY
        assert self._awake is not None
        self.tier = next(one for one in self.tiers if one.name == tier)
        self._is_rehearsal = is_rehearsal
        self._host_bytes_before = self.host_bytes
        self.host_bytes = max(self.host_bytes, self.tier.host_bytes)
        self.placement = tiers.awake_again(self._awake, self.host_bytes)
        self._leave(State.FALLING_ASLEEP)
        self._turn.set()

    def begin_waking(self, placement: Placement) -> None:
        """It has all its room again."""
        self.placement = placement
        self.is_asleep = False
        self._enter(State.WAKING)
        self._turn.set()

    async def _until_exit(self, exited: asyncio.Future[Exit], paths: Sequence[Path]) -> None:
        """Do what it is told, until its process has ended."""
        while not exited.done():
            self._turn.clear()
            match self.state:
                case State.FALLING_ASLEEP:
                    await _unless(exited, self._fall_asleep(exited))
                case State.WAKING:
                    await _unless(exited, self._wake(exited))
                case State.ASLEEP if self._is_wanted:
                    await _unless(exited, self._ask_to_wake(paths))
                case _:
                    await _unless(exited, self._turn.wait())

    async def _fall_asleep(self, exited: asyncio.Future[Exit]) -> None:
        tier, awake, began = self.tier, self._awake, time.monotonic()
        assert tier is not None
        assert awake is not None
        last_used, ready_since = self.last_used, self.ready_since
        try:
            await self._change(tier.sleep, Stage.ASLEEP, ends_asleep=True)
        except OSError as exc:  # nothing was asked of it yet
            _, rest_s = self._tier_rests.get(tier.name, (0.0, TIER_REST_S / 2))
            rest_s = min(2 * rest_s, TIER_REST_LIMIT_S)
            self._tier_rests[tier.name] = time.monotonic() + rest_s, rest_s
            again = f"Tier {tier.name} is tried again in {rest_s:g} s at the earliest"
            self._tell("WARNING", f"{self.name} stays awake: what becomes of it cannot be written: {exc}. {again}")
            self.host_bytes, self.tier = self._host_bytes_before, None
            self.placement = tiers.awake_again(awake, self.host_bytes)
            self._be_ready()
            return
        except tiers.NotDone as exc:
            await self._give_up(exited, tier, f"it did not fall asleep: {exc}")
        if self._silence is not None:  # it is being killed
            return
        took_s = time.monotonic() - began
        self._tier_rests.pop(tier.name, None)
        if self._is_rehearsal:
            await self._wake(exited)
            self.last_used, self.ready_since = last_used, ready_since
            return
        metrics.SLEEPS.labels(self.launch.uid, tier.name).inc()
        self.placement = tiers.asleep(awake, tier, self.host_bytes)
        self._tell("INFO", f"{self.name} sleeps (tier {tier.name}), after {took_s:.1f} s")
        self._enter(State.ASLEEP)

    async def _wake(self, exited: asyncio.Future[Exit]) -> None:
        tier, began = self.tier, time.monotonic()
        assert tier is not None
        try:
            await self._change(tier.wake, Stage.AWAKE, ends_asleep=False)
            await self._warm_up(tier)
        except tiers.NotDone as exc:
            await self._give_up(exited, tier, f"it did not wake: {exc}")
        if self._silence is not None:
            return
        took_s = time.monotonic() - began
        if not self._is_rehearsal:
            metrics.WAKES.labels(self.launch.uid, tier.name).inc()
            metrics.WAKE_SECONDS.labels(self.launch.uid, tier.name).observe(took_s)
            self._tell("INFO", f"{self.name} is awake again, after {took_s:.1f} s")
        self._experience.note_wake(self.tried, tier.name, took_s)
        self._tier_failures.pop(tier.name, None)
        self.tier = None
        self._be_ready()

    async def _ask_to_wake(self, paths: Sequence[Path]) -> None:
        """Until it has room to wake, or nobody wants it awake any more."""
        needs = self._needs_of_start or await self._needs(paths)
        asking = asyncio.ensure_future(self._ask_for_place(self, needs, self._awake_again()))
        try:
            while not asking.done() and self._is_wanted and self.state is State.ASLEEP:
                await _unless(asking, self._turn.wait())
                self._turn.clear()
            if asking.done() and self._is_wanted:
                asking.result()
        except NoPlace as exc:
            self._tell("INFO", f"{self.name} is started anew: {exc}")
            self._leave(State.STOPPING)
            raise Replaced from exc
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def _awake_again(self) -> Placement:
        assert self._awake is not None
        return tiers.awake_again(self._awake, self.host_bytes)

    async def _change(self, calls: Sequence[Call], stage: Stage, *, ends_asleep: bool) -> None:
        """Have it sleep or wake; what is on disk of it is true at all times.

        Raises:
            NotDone
            OSError: that it is about to sleep cannot be written; nothing was asked then.
        """
        assert self._own is not None
        async with self._node.change():
            try:
                await self._note_slumber(Stage.UNSURE)
            except OSError:
                if ends_asleep:
                    raise
                # Else, whoever takes it over finds it asleep as told, or sees that it is not.
            if ends_asleep:
                await self._give_proof()
            await tiers.carry_out(self._own, calls, self.engine.is_asleep, ends_asleep=ends_asleep)
            if not ends_asleep:
                await self._check_proof()
            with contextlib.suppress(OSError):  # it stays unsure: the next gateway starts it anew
                await self._note_slumber(stage)

    async def _give_proof(self) -> None:
        assert self._own is not None
        assert self.tier is not None
        if self.tier.proof is not None and self._proof is None:
            self._proof = await tiers.proof_of(self._own, self.tier.proof)

    async def _check_proof(self) -> None:
        """Raises NotDone if it does not answer as before it slept."""
        assert self._own is not None
        assert self.tier is not None
        if self.tier.proof is None or self._proof is None:
            return
        if (now := await tiers.proof_of(self._own, self.tier.proof)) != self._proof:
            self._experience.note_unfit(self.tried, self.tier.name)
            raise tiers.NotDone(f"asked the same as before it slept, it answers {now!r} and not {self._proof!r}")

    async def _warm_up(self, tier: Tier) -> None:
        assert self._own is not None
        await tiers.warm_up(self._own, tier.warm_up)

    async def _note_slumber(self, stage: Stage) -> None:
        if isinstance(self.process, EngineProcess) and self.tier is not None:
            slumber = Slumber(stage=stage, tier=self.tier.name, host_bytes=self.host_bytes, proof=self._proof)
            await asyncio.to_thread(note_slumber, self.process.folder, slumber)

    async def _give_up(self, exited: asyncio.Future[Exit], tier: Tier, why: str) -> NoReturn:
        """End an engine that does not sleep or wake as it should, unless it has ended by itself."""
        await asyncio.wait((exited,), timeout=None if self._silence else EXIT_LIMIT_S)
        if exited.done():
            raise asyncio.CancelledError
        disturbed = self.engine.disturbed_sleep
        if disturbed is not None and disturbed in why:
            rest = " Something else took memory of its GPU meanwhile, so it may sleep again."
        else:
            self._tier_failures[tier.name] += 1
            is_last = not self._is_usable(tier)
            rest = f" It does not sleep in tier {tier.name} any more." if is_last else ""
        tail = self.process.log_tail() if self.process else ()
        advice = f"Its engine is ended, and started anew when it is asked for.{rest}"
        raise ReplicaFailed(_failure(f"{why} (tier {tier.name})", advice, Cause.SLEEP, tail=tail))

    async def _is_left_asleep(self, upstream: Upstream, slumber: Slumber) -> bool:
        """Whether an engine that was taken over sleeps.

        Raises:
            ReplicaFailed: it is not as it was left.
        """
        if self.engine.is_asleep is None or not self.tiers:
            return False
        was_asleep = slumber.stage is Stage.ASLEEP
        if not slumber.tier:
            return False
        self._proof = slumber.proof
        says = await tiers.sleeps(upstream, self.engine.is_asleep)
        # Busy as it may be for the gateway before us, one that was left awake need not say so in time.
        if says is not was_asleep and (was_asleep or says is not None):
            raise ReplicaFailed(
                _failure(
                    f"it was left {slumber.stage}, and tells is_sleeping: {says}",
                    "It is started anew.",
                    Cause.SLEEP,
                )
            )
        self.tier = next(one for one in self.tiers if one.name == slumber.tier) if was_asleep else None
        return was_asleep

    async def _count_others(self, process: EngineProcess | NoProcess) -> None:
        """While the gateway before us still answers by the same engine, that counts as one request in flight."""
        if not isinstance(process, EngineProcess) or not process.hold.is_shared():
            return
        self.in_flight += 1
        try:
            while process.hold.is_shared() and not self._node.has_successor:  # then it counts them
                await asyncio.sleep(SHARED_PAUSE_S)
        finally:
            self.in_flight -= 1
            self.last_used = time.monotonic()
            self._changed()

    async def _end_left_behind(self) -> None:
        """The engine that was to be taken over, if that never came about: nobody else would ever end it."""
        if self.left_behind is not None and not self._node.leaves_engines:
            await self._node.end([self.left_behind.folder])
            self.left_behind = self.placement = None
            self._changed()

    async def _needs(self, paths: Sequence[Path]) -> Needs:
        """What it asks of the machine."""
        has_gpus = await self._has_gpus()
        needs = await needs_now(self.tried, self.engine, self.index, paths, self._experience, has_gpus=has_gpus)
        self._longest_tokens = needs.cache.tokens if needs.can_shorten and needs.cache else None
        return needs

    async def _place(self, needs: Needs) -> None:
        """Wait for room; `placement` is what it then has, until this life ends."""
        self._enter(State.WAITING)
        try:
            await self._ask_for_place(self, needs, None)
        except NoPlace as exc:
            advice = " ".join(exc.remedies) or "Ask for less, or give it more."
            failure = _failure(f"it cannot be placed: {exc}", advice, Cause.PLACE, final=True)
            raise ReplicaFailed(failure, None if exc.for_ever else PLACE_RETRY_S) from exc
        if self.placement and fell_back(needs, self.placement):
            self._tell("WARNING", f"{self.name} runs on the CPU, as cpu_fallback allows: the GPUs have no room")
        elif self.placement and self.placement.gpu_layers:
            self._tell("WARNING", f"{self.name} runs {how(self.placement)}")

    async def _fetch(self) -> list[Path]:
        """Where the model's files are, and then those of what it is loaded with besides."""

        def report(progress: Progress) -> None:
            if self.state is not State.DOWNLOADING:
                self._enter(State.DOWNLOADING)
            self.progress = progress

        try:
            return await fetch_all(
                self.launch.artifact.sources,
                self._settings().cache_path,
                folder=self._node.folder,
                stall_s=self._settings().download_stall_s,
                report=report,
            )
        except DownloadFailed as exc:
            advice = "Correct the model's source." if exc.permanent else "It is tried again."
            reason = f"its files cannot be had: {str(exc).rstrip('.')}"
            if causes.is_of_full_disk(reason):
                failure = _failure(reason, causes.ADVICE[Cause.DISK_FULL], Cause.DISK_FULL)
            else:
                failure = _failure(reason, advice, Cause.DOWNLOAD, final=exc.permanent)
            raise ReplicaFailed(failure) from exc
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
                environment,
                self._settings().environments_path,
                recipe=recipe_of(self._settings()),
                run_folder=self._node.folder,
                report=report,
            )
        except CannotBuild as exc:
            advice = "Correct the model's packages." if exc.permanent else "It is tried again."
            raise ReplicaFailed(_failure(str(exc), advice, Cause.ENVIRONMENT, final=exc.permanent)) from exc
        finally:
            self.progress = None

    async def _until_ready(self, process: EngineProcess | NoProcess, upstream: Upstream, begun: Begun) -> str:
        """A race of three: the probe answers, the process exits, the start's time ends. The path that answered."""
        limit_s, command = begun.limit_s, begun.command
        exited = asyncio.ensure_future(process.wait())
        if command.endpoint:
            probing = asyncio.ensure_future(ask_once(upstream, command.ready_path))
        else:
            probing = asyncio.ensure_future(until_ready(upstream, (command.ready_path, *command.other_ready_paths)))
        try:
            await asyncio.wait((exited, probing), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                self._leave(State.BACKOFF)
                raise ReplicaFailed(self._exit_failure(exited.result(), process, "before it was ready"))
            if probing.done():
                return probing.result()
            raise ReplicaFailed(
                _failure(
                    f"it was not ready {limit_s:g} s after its start",
                    "If the model needs longer to load, raise start_timeout_s.",
                    Cause.SLOW_START,
                    tail=process.log_tail(),
                )
            )
        except NotReady as exc:
            advice = "Check that it is up, and the launch's base_url, api_key and ready_path."
            raise ReplicaFailed(_failure(f"it is not served there: {exc}", advice, Cause.REMOTE)) from exc
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
            interval_s=command.probe_interval_s or self._settings().probe_interval_s,
            failures=self._settings().probe_failures,
            cpu_s=process.cpu_s,
        )
        advice = "It is tried again." if command.endpoint else "It hung, so it was killed; `hostler logs` shows more."
        cause = Cause.REMOTE if command.endpoint else Cause.SILENCE
        self.failure = self._silence = _failure(said, advice, cause, tail=process.log_tail())
        self._leave(State.BACKOFF)
        process.kill()
        await upstream.close()

    def retry(self) -> None:
        """Give it another chance if it has failed, and do not wait for the end of a back-off."""
        if self.state in (State.FAILED, State.BACKOFF, State.STOPPED):
            self.begin_anew()
            self.retry_at = 0.0
            self._retry.set()
        if self.state is State.FAILED:
            self._enter(State.WAITING)

    def hurry(self) -> None:
        """When it is stopped, it is not to take its time."""
        if self.process is not None:
            self.process.grace_s = min(self.process.grace_s, HURRY_GRACE_S)

    async def confirm(self, limit_s: float = 1.0) -> None:
        """Wait shortly to learn whether the process is gone, after a connection to it broke."""
        process = self.process
        if process is None or process.pid is None or self.state is not State.READY:
            return
        for _ in range(2):
            try:
                async with asyncio.timeout(limit_s):
                    await process.wait()
                    break
            except TimeoutError:
                if process.is_running:
                    return
        for _ in range(TURNS):  # let `run`, which waits for the same exit, go first
            if self.state is not State.READY:
                return
            await asyncio.sleep(0)

    def _record(self, failure: Failure) -> None:
        """A life has failed: remember why, and whether to try again."""
        ready_since = self.ready_since
        was_fine = ready_since is not None and (self.served > 0 or time.monotonic() - ready_since > STABLE_S)
        if failure.cause is not Cause.PLACE:  # there is nothing wrong with it
            self.failures_in_row = 1 if was_fine else self.failures_in_row + 1
        self.failure = failure
        metrics.ENGINE_RESTARTS.labels(self.launch.uid, failure.cause).inc()
        is_safer = self._try_safer(failure)
        is_over = self.failures_in_row >= self._settings().restart_limit and failure.cause not in causes.OF_MACHINE
        is_final = failure.permanent or (is_over and not is_safer)
        logger.log(logging.ERROR if is_final else logging.WARNING, "%s: %s", self, failure)
        self.retry_at = 0.0 if is_final else time.monotonic() + self._backoff_s()
        self._enter(State.FAILED if is_final else State.BACKOFF)
        self._tell("ERROR" if is_final else "WARNING", f"{self.name}: {failure}")
        if is_safer:
            text = f"{self.name} is started with {self.degraded}. A new start tries the whole wish again."
            logger.warning("%s", text)
            self._tell("WARNING", text)

    def _try_safer(self, failure: Failure) -> bool:
        """After a life that had too little memory to serve anybody, once: options that need less."""
        is_of_engine = failure.exit_code is not None or failure.signal is not None
        if self._is_safer_tried or self.served or not is_of_engine or failure.cause not in causes.OF_MEMORY:
            return False
        self._is_safer_tried = True
        safer = self.engine.safer(self.launch, self._said)
        if safer is None:
            return False
        self.tried = safer[0]
        self.degraded = f"{safer[1]}, as the memory did not suffice"
        return True

    def _exit_failure(self, ended: Exit, process: EngineProcess | NoProcess, when: str) -> Failure:
        self._said = process.log_tail(causes.LINES_READ)
        kills = oom_kills()
        finding = causes.find(
            self.engine,
            self._said,
            signal_number=ended.signal,
            was_ready=self.ready_since is not None,
            was_out_of_memory=None if kills is None or self._oom_kills is None else kills > self._oom_kills,
            is_disk_full=is_disk_full(self.log.parent),
        )
        reason = f"the engine ended with {ended} {when}"
        return Failure(
            reason=": ".join(filter(None, (reason, finding.text))),
            advice=finding.advice,
            at=time.time(),
            cause=finding.cause,
            exit_code=ended.code,
            signal=ended.signal,
            log_tail=process.log_tail(),
            permanent=finding.is_lasting and not self._was_ever_ready,
        )

    def _backoff_s(self) -> float:
        full: float = min(BACKOFF_LIMIT_S, BACKOFF_FIRST_S * 2 ** min(self.failures_in_row - 1, 10))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 (spreads restarts, guards nothing)

    def _enter(self, state: State) -> None:
        logger.debug("%s: %s -> %s", self, self.state, state)
        before, self.state = self.state, state
        self.state_since = time.monotonic()
        self.is_asleep |= state is State.ASLEEP
        if before is not state:
            self._moved(before, state)
        if state is State.READY:
            self.last_used = self.ready_since = self.state_since
            self._was_ever_ready = True
        self._changed()

    def _leave(self, state: State) -> None:
        """Stop being somewhere to send requests to."""
        self.upstream = self.address = None
        self._enter(state)

    def __str__(self) -> str:
        return f"{self.launch.uid}/{self.index}"


async def _unless(first: asyncio.Future[Any], work: Coroutine[Any, Any, Any]) -> None:
    """Do the work, unless the other is done first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((first, task), return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _failure(reason: str, advice: str, cause: Cause, *, tail: tuple[str, ...] = (), final: bool = False) -> Failure:
    return Failure(reason=reason, advice=advice, at=time.time(), cause=cause, log_tail=tail, permanent=final)


def _with_paths(launch: Launch, paths: Sequence[Path]) -> Launch:
    """The launch with its additions at these paths."""
    if not paths:
        return launch
    additions = tuple(
        msgspec.structs.replace(addition, source=Source(model_hub="local", model_id=str(path)))
        for addition, path in zip(launch.artifact.additions, paths, strict=True)
    )
    return msgspec.structs.replace(launch, artifact=msgspec.structs.replace(launch.artifact, additions=additions))


def _of_start(exc: CannotStart) -> Failure:
    """A program that the system did not start."""
    if exc.is_final:
        return _failure(str(exc), "Check the engine's settings.", Cause.LIBRARY, final=True)
    cause = causes.of_errno(getattr(exc.__cause__, "errno", None))
    return _failure(str(exc), causes.ADVICE[cause], cause)


def _of_fault(replica: Replica, exc: Exception) -> Failure:
    """What should not happen, but where the system gives us no thread."""
    if isinstance(exc, RuntimeError) and NO_NEW_THREAD in str(exc):
        return _failure("the system lets the gateway start no new thread", causes.ADVICE[Cause.LIMITS], Cause.LIMITS)
    logger.exception("%s: a failure that is not the engine's", replica)
    advice = "This is a fault of the gateway: its own log has the details."
    return _failure(f"the gateway failed: {exc!r}", advice, Cause.GATEWAY)
