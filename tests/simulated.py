"""A fleet without processes: real Deployments, Dispatcher and Replicas, whose engines only take time and memory.

It watches what must hold at all times, and raises where it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from engines.base import Engine, Launch, Needs
from gateway.causes import Cause
from gateway.config import Settings
from gateway.deployment import Deployment
from gateway.dispatch import Dispatcher
from gateway.errors import HostlerError
from gateway.experience import Experience
from gateway.placement import Device
from gateway.replica import Replica, ReplicaFailed, State, _failure
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source

GB = 10**9


class Model(msgspec.Struct, kw_only=True):
    """What a simulated model takes."""

    uid: str
    memory: int = GB
    load_s: float = 5.0
    stop_s: float = 0.5
    replica: int = 1
    fails: int = 0  # so many of its next starts fail
    fields: dict[str, Any] = {}


class SimulatedEngine(Engine, frozen=True, kw_only=True):
    """Takes what the launch says."""

    name = "simulated"
    model_types = ("LLM",)

    def needs(self, launch: Launch) -> Needs:
        """The launch's own word."""
        return Needs(n_gpu=launch.n_gpu, gpu_idx=launch.gpu_idx, memory_bytes=launch.memory_bytes or 0)


class SimulatedReplica(Replica):
    """A real replica, but for its files and its process."""

    world: World
    model: Model
    crash: asyncio.Event
    lives = 0
    is_alive = False
    began = 0.0
    broken: asyncio.Event  # what this life answers is not answered to the end

    async def _fetch(self) -> list[Path]:
        return [Path("/")]

    async def _prepare(self) -> str | None:
        return None

    async def _run(self, paths: Sequence[Path], python: str | None) -> None:
        await self._place(self.engine.needs(self.launch))
        self._enter(State.STARTING)
        self.starts += 1
        self.crash, self.broken = asyncio.Event(), asyncio.Event()
        self.world.begins(self)
        try:
            await self._or_crash(self.model.load_s)
            if self.model.fails:
                self.model.fails -= 1
                raise ReplicaFailed(_failure("it does not load", "Try again.", Cause.UNKNOWN))
            self.load_s = self.model.load_s
            self._enter(State.READY)
            await self._or_crash(None)
        finally:
            if self.state is not State.BACKOFF:
                self._leave(State.STOPPING)
            ending = asyncio.ensure_future(self._end())
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:  # as the end of a process, it goes on to its end
                await ending
                raise

    async def _or_crash(self, limit_s: float | None) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self.crash.wait()
        except TimeoutError:
            return
        self.broken.set()
        self._leave(State.BACKOFF)
        raise ReplicaFailed(_failure("it crashed", "Try again.", Cause.UNKNOWN))

    async def _end(self) -> None:
        self.world.stops(self)
        await asyncio.sleep(self.model.stop_s)
        self.is_alive = False
        self.world.ended(self)


class World:
    """The machine, the fleet, its clients, and what must hold."""

    def __init__(self, settings: Settings, totals: dict[str, int]) -> None:
        self.settings = settings
        self.totals = totals
        self.foreign = Counter[str]()
        self.deployments: dict[str, Deployment] = {}
        self.models: dict[str, Model] = {}
        self.clients: set[asyncio.Task[str]] = set()
        self.outcomes = Counter[str]()
        self.faults: list[BaseException] = []
        self.waits_s: list[float] = []
        self._spans: list[tuple[str, float, float]] = []
        self.starts = 0
        self.evictions = 0
        self.looks = 0
        self.steps = 0
        self.dispatcher = Dispatcher(self._all, lambda: self.settings, self._observe, self._tell)
        self._running: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Within the loop."""
        self.loop = asyncio.get_running_loop()
        self._running.append(asyncio.create_task(self.dispatcher.run(), name="dispatcher"))

    async def end(self) -> None:
        """Stop all; within the loop."""
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
            **model.fields,
        )
        deployment = Deployment(launch, SimulatedEngine(), settings=lambda: self.settings, changed=self.dispatcher.poke)
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
        )
        replica.world, replica.model = self, self.models[deployment.launch.uid]
        return replica

    def _all(self) -> list[Deployment]:
        return list(self.deployments.values())

    async def _observe(self) -> Sequence[Device]:
        self.looks += 1
        await asyncio.sleep(0.001)
        return tuple(
            Device(key=key, total_bytes=total, foreign_bytes=self.foreign[key]) for key, total in self.totals.items()
        )

    async def _has_gpus(self) -> bool:
        return any(device.gpu for device in await self._observe())

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
        if "makes room" in text:
            self.evictions += 1

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
        replica = await deployment.acquire()
        assert isinstance(replica, SimulatedReplica)
        self.waits_s.append(time.monotonic() - asked)
        life, was_served = replica.lives, False
        try:
            self.must(replica.state is State.READY, f"{replica} was handed over while {replica.state}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(service_s):
                    await replica.broken.wait()
                return "broken off"
            self.must(
                replica.lives == life and replica.state is State.READY, f"{replica} was stopped while it answered"
            )
            was_served = True
            return "answered"
        finally:
            deployment.release(replica, was_served=was_served)

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

    def begins(self, replica: SimulatedReplica) -> None:
        """A process begins."""
        deployment = self.deployments[replica.launch.uid]
        self.must(not replica.is_alive, f"{replica} is started twice")
        self.must(deployment.is_loaded and not deployment.is_leaving(replica), f"{replica} is started for nobody")
        replica.is_alive = True
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
        self._spans.append((replica.launch.uid, replica.began, time.monotonic()))

    def spans(self) -> list[tuple[str, float, float]]:
        """Which models were loaded from when until when; those that still are until now."""
        alive = [
            (replica.launch.uid, replica.began, time.monotonic())
            for deployment in self.deployments.values()
            for replica in deployment.replicas
            if isinstance(replica, SimulatedReplica) and replica.is_alive
        ]
        return self._spans + alive

    def check(self) -> None:
        """What holds at all times."""
        self.steps += 1
        alive = [
            replica
            for deployment in self.deployments.values()
            for replica in deployment.replicas
            if isinstance(replica, SimulatedReplica) and replica.is_alive
        ]
        used = Counter[str]()
        for replica in alive:
            self.must(replica.placement is not None, f"{replica} runs without a place")
            used.update(replica.placement.memory if replica.placement else {})
        for key, held in used.items():
            self.must(held <= self.totals[key], f"{key} has {self.totals[key]}, and {held} were promised")
        loaded = {replica.launch.uid for replica in alive}
        if self.settings.max_loaded is not None:
            self.must(len(loaded) <= self.settings.max_loaded, f"{len(loaded)} models are loaded")
        for name, group in self.settings.groups.items():
            members = {uid for uid in loaded if self.deployments[uid].launch.group == name}
            self.must(len(members) <= group.max_loaded, f"{members} of group {name} are loaded")
            self.must(not (group.exclusive and members and loaded - members), f"{loaded} beside the group {name}")
