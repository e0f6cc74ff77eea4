"""One uid at work: keeps its replicas, picks one for a request, starts on demand, unloads when idle."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from engines.base import Engine, Launch
from gateway import metrics, outlook
from gateway.causes import Cause
from gateway.config import Settings
from gateway.errors import (
    BadRequest,
    Busy,
    HandedOver,
    HostlerError,
    ModelCoolingDown,
    ModelFailed,
    ModelStopped,
    ShuttingDown,
    TooManyRequests,
)
from gateway.queue import Key, Queue, Ticket
from gateway.replica import PLACE_RETRY_S, RESTING, Replica, State

logger = logging.getLogger("hostler.deployment")

COOLDOWN_S = 2.0  # who would have to wait longer for another try of a model that has failed is told so at once
SLEEP_DECISION_S = 5.0
SLEEP_RETRY_S = 30.0  # who is to sleep and finds no bed looks again
RETRY_QUEUE_S = 5.0  # who finds the queue full, if nothing better is known
BEST_FIRST = (
    *(State.READY, State.WAKING, State.STARTING, State.FALLING_ASLEEP, State.ASLEEP, State.DOWNLOADING, State.WAITING),
    *(State.BACKOFF, State.STOPPING, State.FAILED),
)
BITS_64 = 2**64 - 1
_in_flight = attrgetter("in_flight")


def _draw(key: int, index: int) -> int:
    """How much a key is drawn to the replica of that number: splitmix64, which spreads keys that are alike."""
    mixed = (key + index * 0x9E3779B97F4A7C15) & BITS_64
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & BITS_64
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & BITS_64
    return mixed ^ mixed >> 31


def _lacks_room(replica: Replica) -> bool:
    """Whether it was refused for room that there may be later."""
    is_refused = replica.state is State.FAILED and replica.failure is not None and replica.failure.cause is Cause.PLACE
    return is_refused and replica.retry_s is not None


class Deployment:
    """A Launch and its Replicas. `run` drives it; requests come through `acquire` and `release`."""

    def __init__(
        self,
        launch: Launch,
        engine: Engine,
        *,
        settings: Callable[[], Settings],
        should_start: bool | None = None,
        changed: Callable[[], None] = lambda: None,
        tired: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            settings: gives those in effect.
            should_start: whether it is loaded at once; else the launch says so.
            changed: called whenever something about it is no longer what it was.
            tired: called when it may be well to put it to sleep.
        """
        self.launch = launch
        self.engine = engine
        self.replicas: Sequence[Replica] = ()
        self._leaving: dict[Replica, float | None] = {}  # those that are to end, and how long their requests may go on
        self._giving_way: set[Replica] = set()  # those that end to make room, and may start again later
        self._held: frozenset[Replica] = frozenset()  # those that are to make room for who has waited too long
        self._queue: Queue[Replica] = Queue()
        self._watchers: dict[object, float] = {}  # who waits until it is ready, and since when
        self._tell_change = changed
        self._tell_tired = tired
        self._is_resting = False  # from when the last copy falls asleep that was awake, until one is ready again
        self._is_told_to_sleep = False
        self._settings = settings
        self._start_wanted = launch.preload if should_start is None else should_start
        self._is_kept = False  # it came to be ready, and nobody has unloaded it since
        self._is_running = False  # from the decision to start until all replicas have stopped
        self._stopping = False  # from the decision to stop until then
        self._is_forced = False
        self.is_closed = False
        self.is_handed_over = False  # another gateway goes on with its engines
        self.stops = 0  # how often somebody has stopped it
        self._change = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.launched_at = time.time()
        self.is_cancelled = False  # somebody cancelled its launch
        self._defaults: Mapping[str, Any] = {}
        self._defaults_of: Launch | None = None

    # --- what requests do

    def acquire_now(self, avoid: Replica | None = None, key: Key | None = None) -> Replica | None:
        """A ready replica, counted as in use until `release`; None if the request has to wait for its turn."""
        replica = self.at_hand(avoid, key)
        return None if replica is None else self.take(replica)

    def at_hand(self, avoid: Replica | None = None, key: Key | None = None) -> Replica | None:
        """Which replica `acquire_now` would give."""
        return None if self._queue else self.pick(avoid, key)

    async def acquire(self, avoid: Replica | None = None, key: Key | None = None) -> Replica:
        """As `acquire_now`, but waits, and starts the model, if there is none.

        Raises:
            As `enter`, and while it waits: ModelFailed, ModelCoolingDown, ShuttingDown, and
            ModelStopped: somebody stopped it meanwhile. Who comes after that waits for the next start.
        """
        if (replica := self.acquire_now(avoid, key)) is not None:
            return replica
        ticket = self.enter(avoid, key)
        try:
            replica = await ticket.wait()
            assert replica is not None
            return replica
        finally:
            self.leave(ticket)

    def enter(self, avoid: Replica | None = None, key: Key | None = None, *, is_again: bool = False) -> Ticket[Replica]:
        """A place in the queue, which starts the model; whoever has it must `leave` in the end.

        Args:
            avoid: the replica that it is not to get if there is another.
            key: of what belongs together, so that it gets the same replica.
            is_again: it was served and lost its replica; it goes before the others, and no limit refuses it.
        Raises:
            TooManyRequests: as many wait as may, or none may wait for replicas that are as busy as the launch allows.
            ModelFailed: no replica starts.
            ModelCoolingDown: none is there, and none is about to be tried.
            ShuttingDown: the deployment is ending.
        """
        self._look_for_room_anew()
        if (why := self._refusal() or self._cooldown()) is not None:
            raise why
        if not is_again:
            self._check_limits()
        ticket = self._queue.join(avoid, key, is_first=is_again)
        if self.waiting == 1:
            self.notify()
        else:
            self._serve()
        return ticket

    def leave(self, ticket: Ticket[Replica]) -> None:
        """The request waits no longer; a replica that it was handed and has not taken goes to the next."""
        if (replica := self._queue.leave(ticket)) is not None:
            self.release(replica, was_served=False)
        elif not self.waiting:
            self.notify()

    def number_of(self, ticket: Ticket[Replica]) -> int:
        """Its number in the queue, from 1."""
        return self._queue.number_of(ticket)

    async def until_ready(self) -> None:
        """Start the model, and wait until a replica is ready; takes no place of a request.

        Raises:
            As `acquire`, but TooManyRequests and ModelCoolingDown: who launches waits for the last try.
        """
        stops = self.stops
        self._look_for_room_anew()
        watcher = object()
        self._watchers[watcher] = time.monotonic()
        if self.waiting == 1:
            self.notify()
        try:
            while not self.ready():
                self.check_still_wanted(stops)
                if (why := self._refusal()) is not None:
                    raise why
                await self.changed()
        finally:
            del self._watchers[watcher]
            if not self.waiting:
                self.notify()

    @property
    def waiting(self) -> int:
        """How many wait for a replica."""
        return len(self._queue) + len(self._watchers)

    @property
    def waiting_since(self) -> float | None:
        """Since when the oldest of them has waited, of the monotonic clock; None if nobody waits."""
        return min((*self._watchers.values(), *filter(None, (self._queue.since,))), default=None)

    @property
    def is_held(self) -> bool:
        """Whether no new request gets a replica, as all have to make room once those in flight have ended."""
        return bool(self._held) and self._held.issuperset(self.ready())

    def holds(self, replica: Replica) -> bool:
        """Whether the replica gets no new request, as it has to make room."""
        return replica in self._held

    def hold(self, replicas: Iterable[Replica]) -> None:
        """Give these no new requests, and all others again."""
        held = frozenset(replicas)
        if held != self._held:
            self._held = held
            self.notify()

    @property
    def is_wished(self) -> bool:
        """Whether somebody waits for it, or wants it to be loaded in any case."""
        return self._start_wanted or self.waiting > 0

    @property
    def is_kept(self) -> bool:
        """Whether it is to be as it was, without anybody who waits: all copies of it, and again if they crash."""
        return self._is_kept or any(one.placement is not None and not self.is_leaving(one) for one in self.staying)

    def pick(self, avoid: Replica | None = None, key: Key | None = None) -> Replica | None:
        """Of the ready replicas that may have more the one with the least in flight; `avoid` only if there is no other.

        With a key, it is the one that the key is drawn to most, among those that are not much busier than that: each
        key ranks all replicas, so that one that comes or goes moves only its share of the keys.
        """
        if self._stopping:
            return None
        limit = self.launch.request_limits
        if len(self.replicas) == 1:
            alone = self.replicas[0]
            is_free = alone.state is State.READY and (limit is None or alone.in_flight < limit)
            return alone if is_free and not (self._leaving or self._giving_way or self._held) else None
        free = [
            replica
            for replica in self.replicas
            if replica.state is State.READY
            and (limit is None or replica.in_flight < limit)
            and not (self._leaving and replica in self._leaving)
            and not (self._giving_way and replica in self._giving_way)
            and not (self._held and replica in self._held)
        ]
        if len(free) < 2:
            return free[0] if free else None
        free = [replica for replica in free if replica is not avoid]
        least = min(free, key=_in_flight)
        if key is None:
            return least
        most = least.in_flight + key.busier_by
        near = [replica for replica in free if replica.in_flight <= most]
        return max(near, key=lambda replica: _draw(key.number, replica.index))

    def _give(self, ticket: Ticket[Replica]) -> Replica | None:
        replica = self.pick(ticket.avoid, ticket.key)
        return None if replica is None else self.take(replica)

    def _serve(self) -> None:
        """Hand over what there is to those who wait, or tell them that it will not come."""
        if self._queue:
            if (why := self._refusal() or self._cooldown()) is None:
                self._queue.serve(self._give)
            else:
                self._queue.end(why)

    def _refusal(self) -> HostlerError | None:
        """Why nobody is to wait for it; None if they may."""
        if self.is_handed_over or self.is_closed:
            return self._stop_told()
        if self.has_failed and not self._stopping:
            retry_after_s = math.ceil(PLACE_RETRY_S) if any(map(_lacks_room, self.staying)) else None
            return ModelFailed(self.failure_text(), retry_after_s=retry_after_s)
        return None

    def _look_for_room_anew(self) -> None:
        """Somebody asks: if all that it lacked was room, there may be some by now."""
        if self.has_failed:
            for replica in filter(_lacks_room, self.staying):
                replica.retry()

    def _stop_told(self) -> HostlerError:
        """What those are told who wait, or are answered, when somebody stops it."""
        if self.is_handed_over:
            return HandedOver(f"The gateway is restarting. Try again: {self.launch.uid} goes on.")
        if self.is_closed:
            return ShuttingDown(f"{self.launch.uid} is being stopped for good.")
        return ModelStopped(f"{self.launch.uid} was stopped before the request was answered.")

    def _check_limits(self) -> None:
        """Raises TooManyRequests if one more may not wait."""
        busy, limit = self.launch.request_limits, self.launch.queue_limit
        ready = self.ready()
        is_busy = limit is None and busy is not None and ready and not self._held and self.pick() is None
        if is_busy or busy == 0:
            metrics.REFUSED.labels(self.launch.uid, "busy").inc()
            raise TooManyRequests(
                f"Rate limit reached for the model. Request limit {busy} for the model: "
                f"{ready[0].name if ready else self.launch.uid}. "
                "Try again, or launch it with more replicas, a higher request_limits, or a queue_limit to wait in."
            )
        if len(self._queue) >= self.queue_limit:
            if not self.queue_limit and (self._is_resting or not self._start_wanted):
                self.start()  # nobody may wait for it, but somebody wants it
            metrics.REFUSED.labels(self.launch.uid, "queue_full").inc()
            raise TooManyRequests(
                f"{len(self._queue)} requests wait for the model already, as many as may (queue_limit). "
                f"{self.progress_text()}. Try again later, or raise queue_limit.",
                retry_after_s=outlook.retry_after_s(self, RETRY_QUEUE_S),
            )

    def ready(self) -> list[Replica]:
        """Those that new requests may go to."""
        if self._stopping:
            return []
        return [one for one in self.staying if one.state is State.READY and one not in self._giving_way]

    def is_leaving(self, replica: Replica) -> bool:
        """Whether its place will be free."""
        return self._stopping or replica in self._leaving or replica in self._giving_way

    def take(self, replica: Replica) -> Replica:
        """Count the replica as in use until `release`."""
        replica.pace.count(replica.in_flight, time.monotonic())
        replica.in_flight += 1
        return replica

    def release(self, replica: Replica, *, was_served: bool) -> None:
        """The request on the replica has ended."""
        replica.last_used = now = time.monotonic()
        replica.pace.count(replica.in_flight, now)
        replica.pace.end()
        replica.in_flight -= 1
        replica.served += was_served
        if self._queue:
            self._serve()
            if not self._queue:
                self.notify()
        if not replica.in_flight:
            if self._is_running and self.is_leaving(replica):
                self.notify()  # its drain waits for it
            else:
                self._tell_change()  # others may want its room; the idle clock looks by itself

    def check_still_wanted(self, stops: int) -> None:
        """Raises ModelStopped or ShuttingDown if it was stopped since there were so many `stops`, or handed over."""
        if self.is_handed_over or self.is_closed or self.stops != stops:
            raise self._stop_told()

    # --- what it says of itself

    @property
    def staying(self) -> list[Replica]:
        """Its replicas, without those that are being removed."""
        return [replica for replica in self.replicas if replica not in self._leaving]

    @property
    def in_flight(self) -> int:
        """Requests that its replicas are answering."""
        return sum(replica.in_flight for replica in self.replicas)

    @property
    def state(self) -> State:
        """The state of its best replica."""
        if self._stopping:
            return State.STOPPING
        states = {replica.state for replica in self.staying or self.replicas}
        return next((state for state in BEST_FIRST if state in states), State.STOPPED)

    @property
    def shown_state(self) -> State:
        """As people read it: it sleeps where the engines of all copies that are ready do so by themselves."""
        ready = [replica for replica in self.staying if replica.state is State.READY]
        sleeps = self.state is State.READY and bool(ready) and all(replica.dozes for replica in ready)
        return State.ASLEEP if sleeps else self.state

    @property
    def is_loaded(self) -> bool:
        """Whether any part of it runs, or is about to."""
        return self._is_running

    @property
    def is_resting(self) -> bool:
        """Whether it sleeps, and nobody asks for it."""
        return self._is_resting and not self.waiting

    @property
    def is_tired(self) -> bool:
        """Whether it is to sleep, though nobody needs its room."""
        if self._is_told_to_sleep:
            return not (self.in_flight or self.waiting)
        return (rest_s := self._idle_rest_s(self.launch.sleep_after_s, State.READY)) is not None and rest_s <= 0

    @property
    def is_drowsy(self) -> bool:
        """Whether it is tired, or a copy of it had better try to sleep now than when that keeps somebody waiting."""
        now = time.monotonic()
        return self.is_tired or any(replica.should_rehearse(now) for replica in self.replicas)

    @property
    def is_settled(self) -> bool:
        """Whether it serves, or nobody has asked for it to be loaded, or it sleeps."""
        return not self._start_wanted or self.state is State.READY or self.is_resting

    @property
    def has_failed(self) -> bool:
        """Whether every replica has given up; a stop and a start give it another chance."""
        staying = self.staying
        return bool(staying) and all(replica.state is State.FAILED for replica in staying)

    def _cooldown(self) -> ModelCoolingDown | None:
        """What requests are told at once if all that is to come is the end of a back-off that is not near."""
        if self._stopping:
            return None
        staying = self.staying
        resting = [replica.rest_s for replica in staying if replica.state is State.BACKOFF]
        if not resting or any(replica.state not in (State.BACKOFF, State.FAILED) for replica in staying):
            return None
        if (rest_s := min(resting)) <= COOLDOWN_S:
            return None
        return ModelCoolingDown(
            f"{self.reason_text()} It is tried again in {math.ceil(rest_s)} s; `hostler start {self.launch.uid}` "
            "tries it now.",
            retry_after_s=math.ceil(rest_s),
        )

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What requests get that do not say it themselves; read once a launch, as every request asks."""
        if self._defaults_of is not self.launch:
            self._defaults_of, self._defaults = self.launch, self.engine.defaults(self.launch)
        return self._defaults

    @property
    def served_name(self) -> str:
        """By what name the engine knows the model."""
        return self.engine.served_name(self.launch)

    @property
    def failure_cause(self) -> Cause | None:
        """Why it does not serve now, where it has failed."""
        failed = [replica.failure for replica in self.staying if replica.state in (State.BACKOFF, State.FAILED)]
        return next((failure.cause for failure in failed if failure), None) if not self.ready() else None

    @property
    def queue_limit(self) -> int:
        """How many requests may wait for it."""
        return self._settings().queue_limit if self.launch.queue_limit is None else self.launch.queue_limit

    def load_s(self) -> float | None:
        """How long its engine takes from its start until it is ready, as far as earlier starts tell."""
        return max((replica.load_s for replica in self.replicas if replica.load_s is not None), default=None)

    def progress_text(self, number: int | None = None) -> str:
        """What a waiting client is told; `number` is its own in the queue."""
        return outlook.text(self, number)

    def reason_text(self) -> str:
        """Why it does not serve."""
        failure = next((replica.failure for replica in self.staying if replica.failure), None)
        return f"The model {self.launch.uid!r} does not start: {failure}"

    def failure_text(self) -> str:
        """Why it does not serve, and what to do."""
        if any(map(_lacks_room, self.staying)):
            return f"{self.reason_text()} The next request looks for room anew."
        if (retry_s := min((one.retry_s for one in self.staying if one.retry_s), default=None)) is not None:
            return f"{self.reason_text()} It is tried again every {retry_s:g} s."
        remedy = f"after mending it, say `hostler start {self.launch.uid}`."
        return f"{self.reason_text()} It is not tried again by itself; {remedy}"

    # --- what changes it

    def start(self) -> None:
        """Load now, and give replicas that have failed another chance."""
        self._start_wanted = True
        self._is_resting = self._is_told_to_sleep = False
        for replica in self.replicas:
            replica.retry()
        self.notify()

    def stop(self, *, force: bool = False) -> None:
        """Unload once the requests in flight have ended, or at once; the next request loads again."""
        self.stops += 1
        self._queue.end(self._stop_told())
        self._unload(force=force)
        for replica in self.replicas:
            replica.begin_anew()

    def make_room(self, replica: Replica) -> None:
        """End one that answers nobody: it alone if others remain, else the model is unloaded."""
        others = [one for one in self._placed() if one is not replica]
        if not others:
            self._unload(force=False)
            return
        self._giving_way.add(replica)
        self._is_resting |= all(one.state in RESTING for one in others)
        self.notify()

    def put_to_sleep(self, replica: Replica, tier: str) -> None:
        """One that answers nobody; if it was the last that was awake, the model sleeps until somebody asks for it."""
        replica.fall_asleep(tier)
        if all(one.state in RESTING for one in self._placed()):
            self._is_resting, self._is_told_to_sleep = True, False
        self.notify()

    def rest(self) -> None:
        """It was left asleep, and nobody has asked for it since."""
        self._is_resting = True

    async def sleep(self) -> None:
        """Put it to sleep now, if it answers nobody.

        Raises:
            Busy: it does.
            BadRequest: it cannot sleep, or has no bed; the text says why.
            ModelFailed: it was to, and did not.
        """
        uid = self.launch.uid
        self._check_idle()
        asked_at = time.time()
        if self._is_resting:
            return await self._until_asleep(asked_at)
        if self.state is not State.READY:
            raise BadRequest(f"{uid} is {self.state}: only a model that is ready can be put to sleep.")
        if not all(replica.beds() for replica in self.ready()):
            raise BadRequest(f"{uid} cannot sleep: {self.why_sleepless()} `hostler stop {uid}` unloads it.")
        self._is_told_to_sleep = True
        try:
            self._tell_tired()
            async with asyncio.timeout(SLEEP_DECISION_S):
                while not self._is_resting and self.is_tired:
                    await self.changed()
        except TimeoutError:
            pass
        finally:
            self._is_told_to_sleep = False
        if not self._is_resting:
            self._check_idle()  # somebody may have come meanwhile
            raise BadRequest(
                f"{uid} has no bed: what is free of the machine's memory, or of `sleep_memory`, does not suffice, or "
                f"another model wakes on its GPU. Try again later, or `hostler stop {uid}` unloads it."
            )
        return await self._until_asleep(asked_at)

    def _check_idle(self) -> None:
        """Raises Busy."""
        if self.in_flight or self.waiting:
            uid, count = self.launch.uid, self.in_flight
            raise Busy(f"{uid} answers {count} requests, and {self.waiting} wait for it. Try again later.")

    async def _until_asleep(self, asked_at: float) -> None:
        """Each step has its limit. Raises ModelFailed."""
        while self._is_resting and self.state in (State.FALLING_ASLEEP, State.STOPPING):
            await self.changed()
        if self.state in (*RESTING, State.WAKING) or self.in_flight or self.waiting:
            return
        uid = self.launch.uid
        failures = (one.failure for one in self.replicas if one.failure and one.failure.at >= asked_at)
        raise ModelFailed(f"{uid} did not fall asleep: {next(failures, f'`hostler events {uid}` tells why.')}")

    def why_sleepless(self) -> str:
        """Why it is never put to sleep; a sentence."""
        if own := self.engine.own_sleep(self.launch):
            return f"it does so by itself, after {own[0]:g} s without a request."
        if said := self.engine.why_sleepless(self.launch):
            return f"{said}."
        if self.engine.is_asleep is None:
            return f"{self.engine.name} has no way to."
        if any(replica.tiers and not replica.beds() for replica in self.replicas):
            return "it has failed to, as `hostler events` tells."
        return "its options, its device or the engine's settings have it without."

    def _placed(self) -> list[Replica]:
        return [one for one in self.staying if one.placement is not None and not self.is_leaving(one)]

    def _unload(self, *, force: bool) -> None:
        self._start_wanted = self._is_kept = False
        if self._is_running:
            self._stopping = True
            self._is_forced |= force
        if force:
            for replica in self.replicas:
                replica.hurry()
        self.notify()

    async def stopped(self) -> None:
        """Until nothing of it runs."""
        while self._stopping:
            await self.changed()

    def add(self, replica: Replica) -> None:
        """One more; it starts now if the model is loaded."""
        self.replicas = sorted((*self.replicas, replica), key=lambda one: one.index)
        self.notify()

    async def remove(self, replica: Replica, drain_timeout_s: float | None = None) -> None:
        """End one and forget it, after its requests in flight; new ones go to the others from now on.

        Args:
            drain_timeout_s: how long those in flight may go on, if not as long as the settings say.
        """
        if replica in self.replicas:
            self._leaving[replica] = drain_timeout_s
        if not self._is_running:
            self._forget_leaving([replica])
        self.notify()
        while replica in self.replicas:
            await self.changed()

    def _forget_leaving(self, ended: Iterable[Replica]) -> None:
        gone = self._leaving.keys() & set(ended)
        for replica in gone:
            del self._leaving[replica]
        self.replicas = [replica for replica in self.replicas if replica not in gone]
        self.notify()

    async def close(self, *, force: bool) -> None:
        """Stop for good: whoever waits is told so."""
        self.is_closed = True
        self.stop(force=force)
        await self.stopped()

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Be driven by a task of the group, until `end`."""
        self._task = tasks.create_task(self.run(), name=self.launch.uid)

    def end(self) -> None:
        """Be driven no longer; for after `close`."""
        if self._task:
            self._task.cancel()

    async def run(self) -> None:
        """Start when somebody wants it, stop when nobody does, until cancelled."""
        while True:
            while self.is_closed or not (self._start_wanted or self.waiting):
                await self.changed()
            self._is_running, self.is_cancelled = True, False
            lives: dict[Replica, asyncio.Task[None]] = {}
            try:
                await self._keep_alive(lives)
                if lives:
                    await asyncio.wait(lives.values())
            finally:
                self._stopping = self._is_forced = True
                self.notify()  # lives are told, not cancelled: a second cancel would leave an engine behind
                await asyncio.gather(*lives.values(), return_exceptions=True)
                self._is_running = self._stopping = self._is_forced = self._is_resting = False
                self._forget_leaving(self._leaving.copy())

    async def _keep_alive(self, lives: dict[Replica, asyncio.Task[None]]) -> None:
        """A life for each replica, also for those that come later, until the model is to stop."""
        while not self._stopping:
            for replica in self.replicas:
                if replica not in lives:
                    lives[replica] = asyncio.create_task(self._live(replica), name=str(replica))
            for replica in [gone for gone in lives if gone not in self.replicas]:
                await lives.pop(replica)
            self._is_kept |= bool(self.ready())
            if self._waits_in_vain:
                logger.info("%s has no room, and nobody waits for it any more", self.launch.uid)
                self._unload(force=False)
                return
            rest_s = self._idle_rest_s(self.launch.idle_timeout_s, State.READY, State.ASLEEP)
            if rest_s is not None and rest_s <= 0:
                logger.info("%s was idle for %g s and is unloaded", self.launch.uid, self.launch.idle_timeout_s)
                self._unload(force=False)
                return
            if self._is_resting and not any(replica.placement for replica in self.replicas) and not self.waiting:
                self._unload(force=False)  # the engines that slept have ended
                return
            await self.changed(limit_s=min(filter(None, (rest_s, self._drowsy_in_s())), default=None))

    @property
    def _is_renewed(self) -> bool:
        """Whether all that slept has ended because other options are wished for now."""
        return not any(replica.placement or replica.starts for replica in self.replicas)

    def _drowsy_in_s(self) -> float | None:
        """How long until it may be well to put it to sleep; who decides that is told when it is."""
        now = time.monotonic()
        rests = [self._idle_rest_s(self.launch.sleep_after_s, State.READY)]
        rests += [replica.rehearse_in_s(now) for replica in self.replicas]
        if (rest_s := min((rest_s for rest_s in rests if rest_s is not None), default=None)) is None:
            return None
        if rest_s <= 0:
            self._tell_tired()
            return SLEEP_RETRY_S
        return rest_s

    @property
    def _waits_in_vain(self) -> bool:
        """Whether all that it does is to wait for room, or for another try to get some, and for nobody."""
        return (
            not self.is_wished
            and bool(self.replicas)
            and not any(replica.state in RESTING for replica in self.replicas)
            and all(replica.waits_for or _lacks_room(replica) for replica in self.replicas)
        )

    async def _live(self, replica: Replica) -> None:
        """Run one replica until it, or the whole model, is to end and its requests in flight have ended.

        If it has only to make room, it then begins again.
        """
        try:
            while not (self._stopping or replica in self._leaving):
                if self._has_no_use_for(replica):
                    await self.changed()
                    continue
                await self._live_once(replica)
                self._giving_way.discard(replica)
        finally:
            self._giving_way.discard(replica)
            self._forget_leaving([replica])

    async def _live_once(self, replica: Replica) -> None:
        replica.is_wanted = not self.is_resting
        running = asyncio.create_task(replica.run(), name=str(replica))
        try:
            while not (self.is_leaving(replica) or self._has_no_use_for(replica)):
                await self.changed()
                replica.is_wanted = not self.is_resting
            await self._drain(replica)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _has_no_use_for(self, replica: Replica) -> bool:
        """Whether it has nothing, and the model sleeps."""
        return self.is_resting and replica.placement is None

    def _idle_rest_s(self, limit_s: float | None, *states: State) -> float | None:
        """How long until it may have been idle for so long in such a state; None if it is in none, or waited for."""
        if limit_s is None or self.waiting or self.state not in states:
            return None
        if self.in_flight:
            return limit_s
        return max(replica.last_used for replica in self.replicas) + limit_s - time.monotonic()

    async def _drain(self, replica: Replica) -> None:
        """Let the replica's requests in flight end, for as long as the settings allow and its engine lives."""
        limit_s = self._leaving.get(replica)
        if limit_s is None:
            settings = self._settings()
            limit_s = settings.restart_drain_s if self.is_handed_over else settings.drain_timeout_s
        deadline = time.monotonic() + limit_s
        while replica.in_flight and replica.state is State.READY and not self._is_forced:
            if (rest_s := deadline - time.monotonic()) <= 0:
                return
            await self.changed(limit_s=rest_s)

    # --- how waiters learn of it

    def notify(self) -> None:
        """Something has changed: requests get what there is for them, and all others look again for themselves."""
        if self._is_resting and any(replica.state is State.READY for replica in self.replicas):
            self._is_resting = False
        elif self._is_resting and self._is_renewed and self.launch.preload:
            self._is_resting, self._start_wanted = False, True
        self._serve()
        self._change.set()
        self._change = asyncio.Event()
        self._tell_change()

    async def changed(self, limit_s: float | None = None) -> None:
        """Until the next change, or the limit."""
        change = self._change
        try:
            async with asyncio.timeout(limit_s):
                await change.wait()
        except TimeoutError:
            return
