"""A fleet without processes: real Deployments, Dispatcher and Replicas, whose engines only take time and memory.

It watches what must hold at all times, and raises where it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import msgspec
from grammar import assert_clause, assert_sentences
from judged import judge

from engines.base import RAM, Call, Engine, Launch, Needs, Placement, Tier
from gateway import dispatch
from gateway.amounts import bytes_or_share
from gateway.causes import Cause
from gateway.config import Settings
from gateway.deployment import Deployment
from gateway.devices import SILENT_GPUS, Held, Limits, Observer, Seen
from gateway.dispatch import Dispatcher
from gateway.errors import HostlerError
from gateway.experience import Experience
from gateway.footprint import Footprint
from gateway.gpus import Gpu, GpuProcess
from gateway.lives import Stage
from gateway.placement import Device
from gateway.replica import RESTING, Replica, ReplicaFailed, State, _failure
from gateway.tiers import NotDone, asleep
from gateway.yard import Claim, Holder, Plan, Rules, decide
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source

GB = 10**9
REFUSED_PAUSE_S = 1.0
OTHERS = 1  # the process of others, on each GPU


class Model(msgspec.Struct, kw_only=True):
    """What a simulated model takes."""

    uid: str
    memory: int = GB
    shrinks: bool = False  # it will do with half of that
    load_s: float = 5.0
    stop_s: float = 0.5
    replica: int = 1
    fails: int = 0  # so many of its next starts fail
    tiers: tuple[str, ...] = ()  # in which it can sleep
    residual: int = 0  # what it keeps of each device asleep
    sleep_s: float = 0.5
    wake_s: float = 0.5
    sleeps_fail: int = 0  # so many of its next sleeps and wakes fail
    fields: dict[str, Any] = {}


class SimulatedEngine(Engine, frozen=True, kw_only=True):
    """Takes what the launch says."""

    name = "simulated"
    model_types = ("LLM",)
    is_asleep = Call(method="GET", path="/is_sleeping", limit_s=1)

    def needs(self, launch: Launch) -> Needs:
        """The launch's own word."""
        size = launch.memory_bytes or 0
        shorter = {1024: size // 2} if launch.options.get("shrinks") else {}
        return Needs(n_gpu=launch.n_gpu, gpu_idx=launch.gpu_idx, memory_bytes=size, shorter=shorter)

    def tiers(self, launch: Launch, placement: Placement, needs: Needs) -> tuple[Tier, ...]:
        """Those of the launch's options."""
        return tuple(
            Tier(
                name=name,
                sleep=(),
                wake=(),
                residual_bytes=launch.options["residual"],
                host_bytes=needs.memory_bytes if name == "ram" else 0,
                is_first_slow=name == "ram",
            )
            for name in launch.options["tiers"]
        )


class SimulatedReplica(Replica):
    """A real replica, but for its files and its process."""

    world: World | None = None
    model: Model
    pid = 0  # of this life
    used: Mapping[str, int] = {}  # by its process
    crash: asyncio.Event
    lives = 0
    is_alive = False
    began = 0.0
    broken: asyncio.Event  # what this life answers is not answered to the end
    has_weights = False  # else what it answers is garbage

    @property  # type: ignore[override]
    def placement(self) -> Placement | None:
        """Its place; the world sees each that is given."""
        return self._placement

    @placement.setter
    def placement(self, placement: Placement | None) -> None:
        before = self._placement.memory if self.world is not None and self._placement else {}
        self._placement = placement
        if placement is not None and self.world is not None:
            self.world.granted(self, placement, before)

    async def _fetch(self) -> list[Path]:
        return [Path("/")]

    async def _prepare(self) -> str | None:
        return None

    async def _run(self, paths: Sequence[Path], python: str | None) -> None:
        needs = self._needs_of_start = self.engine.needs(self.launch)
        await self._place(needs)
        assert self.world
        assert self.placement
        self._enter(State.STARTING)
        self.starts += 1
        self._awake, self.tiers = self.placement, self.engine.tiers(self.launch, self.placement, needs)
        self.crash, self.broken = asyncio.Event(), asyncio.Event()
        self.world.begins(self)
        try:
            await self._or_crash(self.model.load_s / 2)
            self.used = self.placement.memory
            await self._or_crash(self.model.load_s / 2)
            if self.model.fails:
                self.model.fails -= 1
                raise ReplicaFailed(_failure("it does not load", "Try again.", Cause.UNKNOWN))
            self.load_s = self.model.load_s
            self.has_weights = True
            self._enter(State.READY)
            crashed: asyncio.Future[Any] = asyncio.ensure_future(self.crash.wait())
            try:
                await self._until_exit(crashed, paths)
            finally:
                crashed.cancel()
            self._crashed()
        finally:
            self.has_weights = False
            if self.state is not State.BACKOFF:
                self._leave(State.STOPPING)
            ending = asyncio.ensure_future(self._end())
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:  # as the end of a process, it goes on to its end
                await ending
                raise

    async def _change(self, calls: Sequence[Call], stage: Stage, *, ends_asleep: bool) -> None:
        """Falling asleep it takes the machine's memory first, and gives back the rest in the end."""
        assert self.world
        assert self.placement
        assert self.tier
        assert self._awake
        self.used, self.has_weights = self.placement.memory, False
        await asyncio.sleep(self.model.sleep_s if ends_asleep else self.model.wake_s)
        if self.model.sleeps_fail:
            self.model.sleeps_fail -= 1
            raise NotDone("it does not")
        if ends_asleep:
            before, self.used = self.used, asleep(self._awake, self.tier, self.host_bytes).memory
            self.world.gives_back({key: size - self.used.get(key, 0) for key, size in before.items()})
        else:
            self.has_weights = True

    async def _warm_up(self, tier: Tier) -> None:
        await asyncio.sleep(0.01)

    def begin_waking(self, placement: Placement) -> None:
        """As it is told; the world sees that it disturbs nobody."""
        super().begin_waking(placement)
        assert self.world
        self.world.rises(self)

    def fall_asleep(self, tier: str, *, is_rehearsal: bool = False) -> None:
        """As it is told; the world sees that nobody is answered."""
        super().fall_asleep(tier, is_rehearsal=is_rehearsal)
        assert self.world
        self.world.falls_asleep(self)

    async def _or_crash(self, limit_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self.crash.wait()
            self._crashed()

    def _crashed(self) -> NoReturn:
        self.broken.set()
        self._leave(State.BACKOFF)
        raise ReplicaFailed(_failure("it crashed", "Try again.", Cause.UNKNOWN))

    async def _end(self) -> None:
        assert self.world
        self.world.stops(self)
        await asyncio.sleep(self.model.stop_s)
        self.is_alive = False
        self.world.ended(self)


class WatchedDispatcher(Dispatcher):
    """One whose decisions are judged, and whose faults are not forgiven."""

    world: World

    async def _round(self) -> float | None:
        try:
            return await super()._round()
        except Exception as fault:
            self.world.faults.append(fault)
            raise

    def _decide(self) -> Plan:
        with mock.patch.object(dispatch, "decide", self._judged):
            return super()._decide()

    def _judged(
        self,
        claims: Sequence[Claim],
        holders: Sequence[Holder],
        devices: Sequence[Device],
        rules: Rules,
        now: float,
        silence: str | None,
    ) -> Plan:
        plan = decide(claims, holders, devices, rules, now, silence)
        if not silence:
            for fault in judge(plan, claims, holders, devices, rules, now):
                self.world.must(False, fault)
        return plan


class World:
    """The machine, the fleet, its clients, and what must hold."""

    def __init__(
        self, settings: Settings, totals: dict[str, int], *, lag_s: float = 0.0, bound_s: float = math.inf
    ) -> None:
        """
        Args:
            totals: bytes by device; all but RAM are GPUs.
            lag_s: for how long memory that was given back is told as taken.
            bound_s: how long one may wait for an answer to begin; where the model limits how many it answers at once,
                how long all may wait until it begins the next.
        """
        self.settings = settings
        self.totals = totals
        self.lag_s = lag_s
        self.bound_s = bound_s
        self.foreign = Counter[str]()
        self.is_silent = False  # the GPUs' driver hangs
        self.waiting: dict[object, tuple[str, float]] = {}  # who waits for which model, and since when
        self.longest_s = 0.0
        self._moved_on: dict[str, float] = {}  # when the last of a model's queue was served or refused
        self._lagging: list[tuple[float, Mapping[str, int]]] = []
        self._kept: set[str] = set()  # models that have been ready since they were last unloaded
        self._crowds: dict[str, list[asyncio.Task[None]]] = {}
        self._flapping: dict[str, asyncio.Task[None]] = {}
        self._pids = itertools.count(100)
        self._observer = Observer(lambda leaders: Seen())
        self.deployments: dict[str, Deployment] = {}
        self.models: dict[str, Model] = {}
        self.clients: set[asyncio.Task[str]] = set()
        self.outcomes = Counter[str]()
        self.answered = Counter[str]()  # by model
        self.faults: list[BaseException] = []
        self.waits_s: list[float] = []
        self._spans: list[tuple[str, float, float]] = []
        self.starts = 0
        self.evictions = 0
        self.sleeps = 0
        self.looks = 0
        self.looked_at = 0.0
        self.steps = 0
        self.dispatcher = WatchedDispatcher(
            self._all, lambda: self.settings, self._observe, self._tell, silence=lambda: self._observer.silence
        )
        self.dispatcher.world = self
        self._running: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Within the loop."""
        self.loop = asyncio.get_running_loop()
        self._running.append(asyncio.create_task(self.dispatcher.run(), name="dispatcher"))

    async def end(self) -> None:
        """Stop all; within the loop."""
        for flapping in self._flapping.values():
            flapping.cancel()
        await asyncio.gather(*(one.close(force=True) for one in self.deployments.values()))
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    # --- the fleet

    def deploy(self, model: Model) -> Deployment:
        """Launch one."""
        spec = ModelSpec(model_format="ggufv2", model_hub="local", model_id="/m")
        artifact = Artifact(
            family=LLMFamily(model_name=model.uid, model_specs=(spec,)),
            spec=spec,
            source=Source(model_hub="local", model_id="/m"),
        )
        launch = Launch(
            uid=model.uid,
            artifact=artifact,
            engine="simulated",
            replica=model.replica,
            memory_bytes=model.memory,
            options={"tiers": model.tiers, "residual": model.residual, "shrinks": model.shrinks},
            **model.fields,
        )
        deployment = Deployment(
            launch,
            SimulatedEngine(),
            settings=lambda: self.settings,
            changed=self.dispatcher.poke,
            tired=self.dispatcher.look,
        )
        self.models[model.uid] = model
        deployment.replicas = [self.replica(deployment, index) for index in range(model.replica)]
        self.deployments[model.uid] = deployment
        self._running.append(asyncio.create_task(deployment.run(), name=model.uid))
        return deployment

    def replica(self, deployment: Deployment, index: int) -> SimulatedReplica:
        """One more."""
        replica = SimulatedReplica(
            deployment.launch,
            index,
            deployment.engine,
            None,  # type: ignore[arg-type]  # it runs nothing
            log=Path("/"),
            settings=lambda: self.settings,
            changed=deployment.notify,
            has_gpus=self._has_gpus,
            experience=Experience(),
            place=partial(self.dispatcher.place, deployment),
            tell=lambda kind, text: None,
            moved=lambda before, after: self._moved(deployment, after),
        )
        replica.world, replica.model = self, self.models[deployment.launch.uid]
        return replica

    def _all(self) -> list[Deployment]:
        return list(self.deployments.values())

    async def _observe(self) -> Sequence[Device]:
        self.looks += 1
        held = [Held(name=str(one), pid=one.pid or None, memory=one.placement.memory) for one in self._placed()]
        await asyncio.sleep(0.001)
        self.looked_at = time.monotonic()
        return self._observer.devices_of(self._seen(), held, Limits())

    def _seen(self) -> Seen:
        """What the machine tells of itself now."""
        now = self.loop.time()
        self._lagging = [one for one in self._lagging if one[0] > now]
        for replica in self._replicas():
            if replica.waits_for is not None:
                assert_clause(replica.waits_for)
            if replica.failure:
                assert_sentences(str(replica.failure))
        alive = [replica for replica in self._replicas() if replica.is_alive]
        used = Counter(self.foreign)
        for memory in (*(memory for _, memory in self._lagging), *(replica.used for replica in alive)):
            used.update(memory)
        gpus = [
            Gpu(
                index=index,
                uuid=key,
                name="made up",
                total_bytes=self.totals[key],
                used_bytes=min(used[key], self.totals[key]),
                processes=(
                    *(GpuProcess(pid=one.pid, used_bytes=one.used[key]) for one in alive if key in one.used),
                    *([GpuProcess(pid=OTHERS, used_bytes=self.foreign[key])] if self.foreign[key] else []),
                ),
            )
            for index, key in enumerate(key for key in self.totals if key != RAM)
        ]
        pids = {replica.pid: replica.pid for replica in alive}
        return Seen(
            gpus=tuple(gpus),
            ram_total_bytes=self.totals[RAM],
            ram_used_bytes=used[RAM],
            families=pids,
            footprints={one.pid: Footprint(own_bytes=one.used.get(RAM, 0)) for one in alive},
            names=dict.fromkeys((OTHERS, *pids), "python"),
            silence=SILENT_GPUS if self.is_silent else None,
        )

    def _replicas(self) -> list[SimulatedReplica]:
        return [one for deployment in self._all() for one in deployment.replicas if isinstance(one, SimulatedReplica)]

    def _placed(self) -> list[SimulatedReplica]:
        return [replica for replica in self._replicas() if replica.placement is not None]

    async def _has_gpus(self) -> bool:
        return len(self.totals) > 1

    def change(self, **settings: Any) -> None:
        """Other settings from now on."""
        self.settings = msgspec.structs.replace(self.settings, **settings)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Done when it is done."""
        self._running.append(self.loop.create_task(work))

    def raise_faults(self) -> None:
        """What did not hold, or what a task of the fleet died of."""
        for fault in self.faults:
            raise fault
        for task in self._running:
            if task.done() and not task.cancelled() and (fault := task.exception()):
                raise fault

    def _tell(self, uid: str, kind: str, text: str) -> None:
        if " makes room for " in text:
            self.evictions += 1
            self._evicts(uid, text.split()[-1])
        if " falls asleep " in text:
            self.sleeps += 1
        if " to make room for " in text:
            self._evicts(uid, text.split()[-1])

    def _moved(self, deployment: Deployment, after: State) -> None:
        uid = deployment.launch.uid
        if after is State.READY:
            self._kept.add(uid)
        elif all(replica.state is State.STOPPED for replica in deployment.replicas):
            self._kept.discard(uid)

    # --- clients

    def ask(self, uid: str, service_s: float, *, leaves_after_s: float | None = None) -> asyncio.Task[str]:
        """A request; what became of it is counted."""
        client = asyncio.create_task(self._request(uid, service_s, leaves_after_s))
        self.clients.add(client)
        client.add_done_callback(self._count)
        return client

    async def _request(self, uid: str, service_s: float, leaves_after_s: float | None) -> str:
        deployment = self.deployments[uid]
        try:
            async with asyncio.timeout(leaves_after_s):
                return await self._exchange(deployment, service_s)
        except TimeoutError:
            return "left"
        except HostlerError as exc:
            return type(exc).__name__

    async def _exchange(self, deployment: Deployment, service_s: float) -> str:
        asked = time.monotonic()
        with self._waits(deployment):
            replica = await deployment.acquire()
        assert isinstance(replica, SimulatedReplica)
        self.waits_s.append(time.monotonic() - asked)
        life, was_served = replica.lives, False
        try:
            self.must(replica.state is State.READY, f"{replica} was handed over while {replica.state}")
            self.must(replica.has_weights, f"{replica} would answer garbage")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(service_s):
                    await replica.broken.wait()
                return "broken off"
            self.must(
                replica.lives == life and replica.state is State.READY, f"{replica} was stopped while it answered"
            )
            was_served = True
            self.answered[deployment.launch.uid] += 1
            return "answered"
        finally:
            deployment.release(replica, was_served=was_served)

    async def watch(self, uid: str, leaves_after_s: float) -> None:
        """Somebody waits until the model is ready."""
        with contextlib.suppress(TimeoutError, HostlerError), self._waits(self.deployments[uid]):
            async with asyncio.timeout(leaves_after_s):
                await self.deployments[uid].until_ready()

    @contextlib.contextmanager
    def _waits(self, deployment: Deployment) -> Iterator[None]:
        me, since = object(), time.monotonic()
        self.waiting[me] = deployment.launch.uid, since
        try:
            try:
                yield
            finally:
                del self.waiting[me]
                waits_s = time.monotonic() - self._waits_since(deployment.launch.uid, since)
                self.longest_s = max(self.longest_s, waits_s)
        except asyncio.CancelledError:  # it went by itself
            raise
        except HostlerError:
            self._moved_on[deployment.launch.uid] = time.monotonic()
            raise
        self._moved_on[deployment.launch.uid] = time.monotonic()

    def _waits_since(self, uid: str, since: float) -> float:
        if self.deployments[uid].launch.request_limits is None:
            return since
        return max(since, self._moved_on.get(uid, 0.0))

    def crowd(self, uid: str, count: int, service_s: float) -> None:
        """So many clients that ask for a model again and again."""
        clients = [self.loop.create_task(self._ask_on(uid, service_s)) for _ in range(count)]
        self._crowds.setdefault(uid, []).extend(clients)

    async def _ask_on(self, uid: str, service_s: float) -> None:
        while True:
            if await self.ask(uid, service_s) not in ("answered", "broken off"):
                await asyncio.sleep(REFUSED_PAUSE_S)

    def disperse(self, uid: str) -> None:
        """The crowd goes, each as its request is answered or not."""
        for client in self._crowds.pop(uid, ()):
            client.cancel()

    def crowd_size(self, uid: str) -> int:
        """How many of the crowd ask for the model."""
        return len(self._crowds.get(uid, ()))

    # --- the machine

    def come_and_go(self, key: str, size: int, has_s: float, has_not_s: float) -> None:
        """Others hold so much of a device every now and then, and nothing in between."""
        if (before := self._flapping.pop(key, None)) is not None:
            before.cancel()

        async def flap() -> None:
            while True:
                self.foreign[key] = size
                await asyncio.sleep(has_s)
                self.foreign[key] = 0
                await asyncio.sleep(has_not_s)

        self._flapping[key] = self.loop.create_task(flap())

    async def hang(self, duration_s: float) -> None:
        """The driver of the GPUs does not answer for so long."""
        self.is_silent = True
        await asyncio.sleep(duration_s)
        self.is_silent = False

    def _count(self, client: asyncio.Task[str]) -> None:
        self.clients.discard(client)
        if client.cancelled():
            return
        if fault := client.exception():
            self.faults.append(fault)
        else:
            self.outcomes[client.result()] += 1

    # --- what must hold

    def must(self, holds: bool, otherwise: str) -> None:
        """Remember what does not hold: who is told of it here might swallow it."""
        if not holds:
            self.faults.append(AssertionError(otherwise))

    def granted(self, replica: SimulatedReplica, placement: Placement, before: Mapping[str, int]) -> None:
        """A replica gets a place, where it had another, or none, before."""
        deployment = self.deployments[replica.launch.uid]
        uid = deployment.launch.uid
        has_copies = any(one.placement for one in deployment.staying if one is not replica)
        is_wished = self._is_wished(deployment) or uid in self._kept or has_copies
        self.must(is_wished and not deployment.is_leaving(replica), f"{replica} is started for nobody")
        is_more = any(size > before.get(key, 0) for key, size in placement.memory.items())
        self.must(not is_more or self.looked_at == time.monotonic(), f"{replica} gets room as it was a moment ago")
        for key, size in placement.memory.items():
            others = sum(
                one.placement.memory.get(key, 0) for one in self._placed() if one.placement and one is not replica
            )
            self.must(
                size <= before.get(key, 0) or size + others + self.foreign[key] <= self.totals[key],
                f"{replica} gets {size} of {key}, of which {others} and {self.foreign[key]} are taken",
            )

    def _is_wished(self, deployment: Deployment) -> bool:
        is_awaited = any(uid == deployment.launch.uid for uid, _ in self.waiting.values())
        return is_awaited or deployment._start_wanted

    def _evicts(self, uid: str, claimant: str) -> None:
        victim, deployment = self.deployments[uid], self.deployments[claimant]
        self.must(self._is_wished(deployment), f"{uid} goes for {claimant}, which nobody waits for")
        placed = [one for one in deployment.staying if one.placement is not None and not deployment.is_leaving(one)]
        copies = [one for one in placed if one.state not in RESTING]
        self.must(not copies, f"{uid} goes for another copy of {claimant}")
        self.must(not victim.launch.pinned, f"{uid} is pinned and goes")
        self.must(self.looked_at == time.monotonic(), f"{uid} goes for {claimant} by what was seen a moment ago")

    def falls_asleep(self, replica: SimulatedReplica) -> None:
        """A replica is put to sleep."""
        deployment = self.deployments[replica.launch.uid]
        self.must(not replica.in_flight, f"{replica} is put to sleep while it answers {replica.in_flight}")
        is_free = deployment.holds(replica) or not deployment.waiting
        self.must(is_free, f"{replica} is put to sleep while {deployment.waiting} wait for it")
        self.must(
            replica.tier is not None and replica.tier.name in self.models[replica.launch.uid].tiers, "no such tier"
        )
        for one in self._beside(replica):
            is_still = not one.is_waking and not (replica.is_waking and one.state is State.FALLING_ASLEEP)
            self.must(is_still, f"{replica} is put to sleep while {one} on its GPU is {one.state}")
        taken = sum(max(one.host_bytes, one.tier.host_bytes if one.tier else 0) for one in self._placed())
        limit = bytes_or_share(self.settings.sleep_memory, self.totals[RAM])
        takes_more = replica.tier is not None and replica.tier.host_bytes > replica.host_bytes
        self.must(not takes_more or taken <= limit, f"{taken} are taken for sleeping, and {limit} may be")
        self.check()

    def rises(self, replica: SimulatedReplica) -> None:
        """A replica wakes or starts: whoever falls asleep on its GPUs would find less free than before."""
        for one in self._beside(replica):
            self.must(one.state is not State.FALLING_ASLEEP, f"{replica} rises while {one} falls asleep on its GPU")

    def _beside(self, replica: SimulatedReplica) -> list[SimulatedReplica]:
        """The others on its GPUs."""
        gpus = set(replica.placement.gpu_uuids or ()) if replica.placement else set()
        placed = ((one, one.placement) for one in self._placed() if one is not replica)
        return [one for one, placement in placed if placement and gpus.intersection(placement.gpu_uuids or ())]

    def gives_back(self, memory: Mapping[str, int]) -> None:
        """A process that goes on has so much less."""
        self._lagging.append((time.monotonic() + self.lag_s, {key: size for key, size in memory.items() if size > 0}))

    def begins(self, replica: SimulatedReplica) -> None:
        """A process begins."""
        deployment = self.deployments[replica.launch.uid]
        self.must(not replica.is_alive, f"{replica} is started twice")
        self.rises(replica)
        self.must(deployment.is_loaded and not deployment.is_leaving(replica), f"{replica} is started to be stopped")
        replica.is_alive = True
        replica.pid = next(self._pids)
        replica.began = time.monotonic()
        replica.lives += 1
        self.starts += 1
        self.check()

    def stops(self, replica: SimulatedReplica) -> None:
        """A process is told to end."""
        deployment = self.deployments[replica.launch.uid]
        if replica.crash.is_set() or deployment._is_forced:
            replica.broken.set()
        else:
            self.must(not replica.in_flight, f"{replica} is stopped while it answers {replica.in_flight}")

    def ended(self, replica: SimulatedReplica) -> None:
        """A process is gone."""
        self._lagging.append((time.monotonic() + self.lag_s, replica.used))
        replica.pid, replica.used = 0, {}
        self._spans.append((replica.launch.uid, replica.began, time.monotonic()))

    def spans(self) -> list[tuple[str, float, float]]:
        """Which models were loaded from when until when; those that still are until now."""
        alive = [(one.launch.uid, one.began, time.monotonic()) for one in self._replicas() if one.is_alive]
        return self._spans + alive

    def check(self) -> None:
        """What holds at all times."""
        self.steps += 1
        for uid, since in self.waiting.values():
            waits_s = time.monotonic() - self._waits_since(uid, since)
            self.must(waits_s <= self.bound_s, f"somebody has waited for {uid} for {waits_s:.0f} s")
        alive = [replica for replica in self._replicas() if replica.is_alive]
        used = Counter[str]()
        for replica in alive:
            self.must(replica.placement is not None, f"{replica} runs without a place")
            used.update(replica.placement.memory if replica.placement else {})
        for key, held in used.items():
            self.must(held <= self.totals[key], f"{key} has {self.totals[key]}, and {held} were promised")
        loaded = {replica.launch.uid for replica in alive if not replica.is_asleep}
        if self.settings.max_loaded is not None:
            self.must(len(loaded) <= self.settings.max_loaded, f"{len(loaded)} models are loaded")
        for name, group in self.settings.groups.items():
            members = {uid for uid in loaded if self.deployments[uid].launch.group == name}
            self.must(len(members) <= group.max_loaded, f"{members} of group {name} are loaded")
            self.must(not (group.exclusive and members and loaded - members), f"{loaded} beside the group {name}")
