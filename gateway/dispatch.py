"""Carries out what the yard decides: gives places, unloads who makes room, holds the busy back, refuses.

It owns no model. A replica that wants to start waits here for its place; the deployments are read when they are asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec

from engines.base import Needs, Placement
from gateway import metrics
from gateway.config import Settings
from gateway.deployment import Deployment
from gateway.placement import Device
from gateway.replica import NoPlace, Replica, State
from gateway.yard import Claim, Holder, Key, Plan, Rules, decide

logger = logging.getLogger("hostler.dispatch")

FAULT_PAUSE_S = 1.0
USUAL_LOAD_S = 10.0  # of a model that was never loaded here


class _Waiting(msgspec.Struct, frozen=True, eq=False):
    """A replica that waits for its place."""

    replica: Replica
    deployment: Deployment
    needs: Needs
    since: float
    place: asyncio.Future[Placement]


class Dispatcher:
    """Who is let into the yard. `run` drives it; replicas come by `place`."""

    def __init__(
        self,
        deployments: Callable[[], Iterable[Deployment]],
        settings: Callable[[], Settings],
        observe: Callable[[], Awaitable[Sequence[Device]]],
        tell: Callable[[str, str, str], None],
    ) -> None:
        """
        Args:
            observe: the devices as they are now, and what is held on them by others than our replicas.
            tell: is told what happens to a model: uid, kind, sentence.
        """
        self._deployments = deployments
        self._settings = settings
        self._observe = observe
        self._tell = tell
        self._waiting: dict[Key, _Waiting] = {}
        self._poked = asyncio.Event()
        self.decisions = 0

    def poke(self) -> None:
        """Something has changed that may give somebody room."""
        if self._waiting:
            self._poked.set()

    async def place(self, deployment: Deployment, replica: Replica, needs: Needs) -> Placement:
        """Room for a replica, which has it from then on by its `placement`; waits for it.

        Raises:
            NoPlace: there is none, and waiting does not help.
        """
        place: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(replica, deployment, needs, time.monotonic(), place)
        self._waiting[_key(replica)] = waiting
        self._poked.set()
        try:
            return await place
        finally:
            replica.waits_for = None
            if self._waiting.get(_key(replica)) is waiting:
                del self._waiting[_key(replica)]
            self._poked.set()  # what was kept for it is free again, or gone

    async def run(self) -> None:
        """Decide whenever something has changed, until cancelled."""
        look_again_s: float | None = None
        while True:
            try:
                async with asyncio.timeout(look_again_s):
                    await self._poked.wait()
            except TimeoutError:
                pass
            self._poked.clear()
            try:
                look_again_s = await self._round()
            except Exception:
                logger.exception("Nobody gets room for now: a fault of the gateway.")
                look_again_s = FAULT_PAUSE_S

    async def _round(self) -> float | None:
        """One decision, carried out; after how long the next may differ."""
        devices = await self._observe() if self._waiting else ()
        # No await from here on: what is decided on is what is there.
        now = time.monotonic()
        self.decisions += 1
        rules = rules_of(self._settings())
        holders = {_key(replica): (deployment, replica) for deployment, replica in self._placed()}
        plan = decide(
            [self._claim(waiting) for waiting in self._waiting.values()],
            [_holder(*holder, now) for holder in holders.values()],
            devices,
            rules,
            now,
        )
        self._carry_out(plan, holders)
        return plan.look_again_s

    def _carry_out(self, plan: Plan, holders: dict[Key, tuple[Deployment, Replica]]) -> None:
        for key, placement in plan.start.items():
            waiting = self._waiting.pop(key)
            if not waiting.place.done():
                waiting.replica.placement = placement
                waiting.place.set_result(placement)
        for key, (sentence, for_ever) in plan.refuse.items():
            waiting = self._waiting.pop(key)
            if not waiting.place.done():
                waiting.place.set_exception(NoPlace(sentence, for_ever=for_ever))
        for key, sentence in plan.wait.items():
            self._waiting[key].replica.waits_for = sentence
        for key, claimant in plan.evict.items():
            deployment, replica = holders[key]
            self._tell(key[0], "INFO", f"{replica.name} makes room for {claimant[0]}")
            logger.info("%s makes room for %s", replica, claimant[0])
            metrics.EVICTIONS.labels(key[0]).inc()
            deployment.make_room(replica)
        for deployment in self._deployments():
            deployment.is_held = deployment.launch.uid in plan.hold

    def _placed(self) -> Iterable[tuple[Deployment, Replica]]:
        return (
            (deployment, replica)
            for deployment in self._deployments()
            for replica in deployment.replicas
            if replica.placement is not None
        )

    def _claim(self, waiting: _Waiting) -> Claim:
        deployment, launch = waiting.deployment, waiting.deployment.launch
        key = _key(waiting.replica)
        siblings = [one.placement for one in deployment.staying if one is not waiting.replica and one.placement]
        return Claim(
            key=key,
            needs=waiting.needs,
            since=waiting.since,
            cpu_fallback=launch.cpu_fallback,
            is_extra=bool(siblings) or any(uid == launch.uid and index < key[1] for uid, index in self._waiting),
            apart_from=tuple(uuid for placement in siblings for uuid in placement.gpu_uuids or ()),
            priority=launch.priority,
            group=launch.group,
        )


def rules_of(settings: Settings) -> Rules:
    """As the settings say."""
    return Rules(
        max_loaded=settings.max_loaded,
        groups={name: (group.max_loaded, group.exclusive) for name, group in settings.groups.items()},
        min_residency_s=settings.min_residency_s,
        max_wait_s=settings.max_wait_s,
    )


def _holder(deployment: Deployment, replica: Replica, now: float) -> Holder:
    launch = deployment.launch
    return Holder(
        key=_key(replica),
        memory=replica.placement.memory if replica.placement else {},
        ready_since=replica.ready_since if replica.state is State.READY else None,
        idle_since=replica.last_used,
        work=replica.in_flight + (0 if deployment.is_held else deployment.waiting),
        is_leaving=deployment.is_leaving(replica),
        is_held=deployment.is_held,
        is_pinned=launch.pinned,
        load_s=replica.load_s or USUAL_LOAD_S,
        priority=launch.priority,
        group=launch.group,
    )


def _key(replica: Replica) -> Key:
    return replica.launch.uid, replica.index
