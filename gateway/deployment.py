"""One uid at work: keeps its replicas, picks one for a request, starts on demand, unloads when idle."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from engines.base import Engine, Launch
from gateway.causes import Cause
from gateway.config import Settings
from gateway.errors import HandedOver, ModelCoolingDown, ModelFailed, ModelStopped, ShuttingDown, TooManyRequests
from gateway.replica import COMING, Replica, State

logger = logging.getLogger("hostler.deployment")

COOLDOWN_S = 2.0  # who would have to wait longer for another try of a model that has failed is told so at once


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
    ) -> None:
        """
        Args:
            settings: gives those in effect.
            should_start: whether it is loaded at once; else the launch says so.
            changed: called whenever something about it is no longer what it was.
        """
        self.launch = launch
        self.engine = engine
        self.replicas: Sequence[Replica] = ()
        self._leaving: dict[Replica, float | None] = {}  # those that are to end, and how long their requests may go on
        self._giving_way: set[Replica] = set()  # those that end to make room, and may start again later
        self.is_held = False  # no request is begun, so that it can make room for a model that has waited too long
        self.waiting = 0  # requests that wait for a replica
        self._tell_change = changed
        self._settings = settings
        self._start_wanted = launch.preload if should_start is None else should_start
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

    def pick(self, avoid: Replica | None = None) -> Replica | None:
        """The ready replica with the least in flight, and `avoid` only if there is no other; or None.

        Raises:
            TooManyRequests: all that are ready are as busy as the launch allows.
        """
        if self.is_held:
            return None
        ready = self.ready()
        limit = self.launch.request_limits
        if ready and limit is not None and all(replica.in_flight >= limit for replica in ready):
            raise TooManyRequests(
                f"Rate limit reached for the model. Request limit {limit} for the model: {ready[0].name}. "
                "Try again, or launch it with more replicas or a higher request_limits."
            )
        return min(ready, key=lambda replica: (replica is avoid, replica.in_flight), default=None)

    async def acquire(self, avoid: Replica | None = None) -> Replica:
        """A ready replica, counted as in use until `release`; waits, and starts the model, if there is none.

        Raises:
            TooManyRequests: the replicas are ready, and as busy as the launch allows.
            ModelFailed: no replica starts.
            ModelCoolingDown: none is there, and none is about to be tried.
            ModelStopped: somebody stopped it meanwhile. Who comes after that waits for the next start.
            ShuttingDown: the deployment is ending.
        """

        def look() -> Replica | None:
            replica = self.pick(avoid)
            if replica is None and not self._stopping:
                self.check_cooldown()
            return replica

        return self.take(await self._once_there_is(look))

    async def until_ready(self) -> None:
        """Start the model, and wait until a replica is ready; takes no place of a request.

        Raises:
            As `acquire`, but TooManyRequests and ModelCoolingDown: who launches waits for the last try.
        """
        await self._once_there_is(lambda: next(iter(self.ready()), None))

    async def _once_there_is(self, look: Callable[[], Replica | None]) -> Replica:
        """What `look` finds, once it finds something; counted as waiting until then, so that the model starts."""
        stops = self.stops
        self.waiting += 1
        if self.waiting == 1:
            self.notify()
        try:
            while (replica := look()) is None:
                self.check_still_wanted(stops)
                if self.has_failed and not self._stopping:
                    raise ModelFailed(self.failure_text())
                await self.changed()
        finally:
            self.waiting -= 1
            if not self.waiting:
                self.notify()
        return replica

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
        replica.in_flight += 1
        return replica

    def release(self, replica: Replica, *, was_served: bool) -> None:
        """The request on the replica has ended."""
        replica.in_flight -= 1
        replica.served += was_served
        replica.last_used = time.monotonic()
        if not replica.in_flight:
            self.notify()  # an idle clock or a drain may wait for it

    def check_still_wanted(self, stops: int) -> None:
        """Raises ModelStopped or ShuttingDown if it was stopped since there were so many `stops`, or handed over."""
        if self.is_handed_over:
            raise HandedOver(f"The gateway is restarting. Try again: {self.launch.uid} goes on.")
        if self.is_closed:
            raise ShuttingDown(f"{self.launch.uid} is being stopped for good.")
        if self.stops != stops:
            raise ModelStopped(f"{self.launch.uid} was stopped before the request was answered.")

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
        order = (State.READY, State.STARTING, State.DOWNLOADING, State.WAITING, State.BACKOFF, State.STOPPING)
        return next((state for state in (*order, State.FAILED) if state in states), State.STOPPED)

    @property
    def is_loaded(self) -> bool:
        """Whether any part of it runs, or is about to."""
        return self._is_running

    @property
    def is_settled(self) -> bool:
        """Whether it serves, or nobody has asked for it to be loaded."""
        return not self._start_wanted or self.state is State.READY

    @property
    def has_failed(self) -> bool:
        """Whether every replica has given up; a stop and a start give it another chance."""
        staying = self.staying
        return bool(staying) and all(replica.state is State.FAILED for replica in staying)

    def check_cooldown(self) -> None:
        """Raises ModelCoolingDown if all that is to come is the end of a back-off that is not near."""
        staying = self.staying
        resting = [replica.rest_s for replica in staying if replica.state is State.BACKOFF]
        if not resting or any(replica.state not in (State.BACKOFF, State.FAILED) for replica in staying):
            return
        if (rest_s := min(resting)) > COOLDOWN_S:
            raise ModelCoolingDown(
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

    def progress_text(self) -> str:
        """What a waiting client is told: the stage, how long it lasts, and the last failure if there is one."""
        if self.state in COMING:
            replica = next(replica for replica in self.replicas if replica.state is self.state)
            stage = str(replica.progress or replica.state)
            if replica.waits_for:
                stage = f"waiting for room ({replica.waits_for})"
            again = f", after: {replica.failure.reason}" if replica.failure and replica.failures_in_row else ""
            return f"{self.launch.uid} is loading: {stage}, {time.monotonic() - replica.state_since:.0f} s{again}"
        return f"{self.launch.uid} is {self.state}"

    def reason_text(self) -> str:
        """Why it does not serve."""
        failure = next((replica.failure for replica in self.staying if replica.failure), None)
        return f"The model {self.launch.uid!r} does not start: {failure}"

    def failure_text(self) -> str:
        """Why it does not serve, and what to do."""
        if (retry_s := min((one.retry_s for one in self.staying if one.retry_s), default=None)) is not None:
            return f"{self.reason_text()} It is tried again every {retry_s:g} s."
        remedy = f"after mending it, say `hostler start {self.launch.uid}`."
        return f"{self.reason_text()} It is not tried again by itself; {remedy}"

    # --- what changes it

    def start(self) -> None:
        """Load now, and give replicas that have failed another chance."""
        self._start_wanted = True
        for replica in self.replicas:
            replica.retry()
        self.notify()

    def stop(self, *, force: bool = False) -> None:
        """Unload once the requests in flight have ended, or at once; the next request loads again."""
        self.stops += 1
        self._unload(force=force)

    def hold(self, is_held: bool) -> None:
        """Begin no request, or begin them again."""
        if self.is_held is not is_held:
            self.is_held = is_held
            self.notify()

    def make_room(self, replica: Replica) -> None:
        """End one that answers nobody: it alone if others remain, else the model is unloaded."""
        others = [one for one in self.staying if one.placement is not None and not self.is_leaving(one)]
        if others == [replica]:
            self._unload(force=False)
        else:
            self._giving_way.add(replica)
            self.notify()

    def _unload(self, *, force: bool) -> None:
        self._start_wanted = False
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
                self._is_running = self._stopping = self._is_forced = False
                self._forget_leaving(self._leaving.copy())

    async def _keep_alive(self, lives: dict[Replica, asyncio.Task[None]]) -> None:
        """A life for each replica, also for those that come later, until the model is to stop."""
        while not self._stopping:
            for replica in self.replicas:
                if replica not in lives:
                    lives[replica] = asyncio.create_task(self._live(replica), name=str(replica))
            for replica in [gone for gone in lives if gone not in self.replicas]:
                await lives.pop(replica)
            if self._waits_in_vain:
                logger.info("%s has no room yet, and nobody waits for it any more", self.launch.uid)
                self._unload(force=False)
                return
            if (rest_s := self._idle_rest_s()) is not None and rest_s <= 0:
                logger.info("%s was idle for %g s and is unloaded", self.launch.uid, self.launch.idle_timeout_s)
                self._unload(force=False)
                return
            await self.changed(limit_s=rest_s)

    @property
    def _waits_in_vain(self) -> bool:
        """Whether all that it does is to wait for room, and for nobody."""
        return (
            not (self._start_wanted or self.waiting)
            and bool(self.replicas)
            and all(replica.waits_for for replica in self.replicas)
        )

    async def _live(self, replica: Replica) -> None:
        """Run one replica until it, or the whole model, is to end and its requests in flight have ended.

        If it has only to make room, it then begins again.
        """
        try:
            while not (self._stopping or replica in self._leaving):
                await self._live_once(replica)
                self._giving_way.discard(replica)
        finally:
            self._giving_way.discard(replica)
            self._forget_leaving([replica])

    async def _live_once(self, replica: Replica) -> None:
        running = asyncio.create_task(replica.run(), name=str(replica))
        try:
            while not self.is_leaving(replica):
                await self.changed()
            await self._drain(replica)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _idle_rest_s(self) -> float | None:
        """How long until it has been idle for too long; None if it is not idle, or may be for ever."""
        idle_timeout_s = self.launch.idle_timeout_s
        if idle_timeout_s is None or self.in_flight or self.waiting or self.state is not State.READY:
            return None
        return max(replica.last_used for replica in self.replicas) + idle_timeout_s - time.monotonic()

    async def _drain(self, replica: Replica) -> None:
        """Let the replica's requests in flight end, for as long as the settings allow and its engine lives."""
        limit_s = self._leaving.get(replica)
        deadline = time.monotonic() + (self._settings().drain_timeout_s if limit_s is None else limit_s)
        while replica.in_flight and replica.state is State.READY and not self._is_forced:
            if (rest_s := deadline - time.monotonic()) <= 0:
                return
            await self.changed(limit_s=rest_s)

    # --- how waiters learn of it

    def notify(self) -> None:
        """Wake everybody who waits for a change; each looks again for itself."""
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
