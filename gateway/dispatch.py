"""Carries out what the yard decides: gives places, unloads who makes room, holds the busy back, refuses.

It owns no model. A replica that wants to start waits here for its place; the deployments are read when they are asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from engines.base import RAM, Needs, Placement
from gateway import metrics
from gateway.amounts import bytes_or_share
from gateway.config import Settings
from gateway.deployment import Deployment
from gateway.placement import Device
from gateway.replica import RESTING, NoPlace, Replica, State
from gateway.yard import Claim, Holder, Key, Plan, Rules, decide

logger = logging.getLogger("hostler.dispatch")

FAULT_PAUSE_S = 1.0
LOOK_LEAST_S = 0.1  # from one look at the machine to the next if nothing of ours has come or gone
LOOK_MOST_S = 1.0  # while somebody waits: what others give back is seen after so long at the latest
USUAL_LOAD_S = 10.0  # of a model that was never loaded here


class _Waiting(msgspec.Struct, frozen=True, eq=False):
    """A replica that waits for its place; with `awake`, for the rest of that, as it sleeps."""

    replica: Replica
    deployment: Deployment
    needs: Needs
    since: float
    place: asyncio.Future[Placement]
    awake: Placement | None = None


class _Look(NamedTuple):
    """What was seen of the machine, when our replicas had these places."""

    devices: Sequence[Device]
    silence: str | None
    places: Mapping[Key, Placement]
    at: float

    def is_old(self, places: Mapping[Key, Placement]) -> bool:
        """Whether there may be more or less room by now."""
        is_same = places.keys() == self.places.keys() and all(places[key] is self.places[key] for key in places)
        return not is_same or time.monotonic() - self.at >= LOOK_LEAST_S


class Dispatcher:
    """Who is let into the yard. `run` drives it; replicas come by `place`."""

    def __init__(
        self,
        deployments: Callable[[], Iterable[Deployment]],
        settings: Callable[[], Settings],
        observe: Callable[[], Awaitable[Sequence[Device]]],
        tell: Callable[[str, str, str], None],
        *,
        silence: Callable[[], str | None] = lambda: None,
    ) -> None:
        """
        Args:
            observe: the devices as they are now, and what is held on them by others than our replicas.
            tell: is told what happens to a model: uid, kind, sentence.
            silence: why `observe`, when it last returned, did not know how the GPUs are.
        """
        self._deployments = deployments
        self._settings = settings
        self._observe = observe
        self._tell = tell
        self._silence = silence
        self._look: _Look | None = None  # the last one, if somebody waited then
        self._waiting: dict[Key, _Waiting] = {}
        self._poked = asyncio.Event()
        self.decisions = 0

    def poke(self) -> None:
        """Something has changed that may give somebody room."""
        if self._waiting:
            self._poked.set()

    def look(self) -> None:
        """A model may be put to sleep though nobody waits for room."""
        self._poked.set()

    async def place(
        self, deployment: Deployment, replica: Replica, needs: Needs, awake: Placement | None = None
    ) -> Placement:
        """Room for a replica, which has it from then on by its `placement`; waits for it.

        Args:
            awake: what one that sleeps had awake; it is told to wake as soon as it has that again.
        Raises:
            NoPlace: there is none, and waiting does not help.
        """
        place: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(replica, deployment, needs, time.monotonic(), place, awake)
        self._waiting[_key(replica)] = waiting
        self._look = None
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
        if not (self._waiting or any(one.is_drowsy for one in self._deployments())):
            self._look = None
            self._carry_out(Plan())
            return None
        is_new = self._look is None or self._look.is_old(self._places())
        if is_new:
            await self._look_again()
        plan = self._decide()
        if not is_new and (plan.start or plan.evict or plan.sleep or plan.rehearse or plan.refuse):
            # What was seen a moment ago will do to let somebody wait, not to give or take.
            is_new = True
            await self._look_again()
            plan = self._decide()
        # No await since then: what is decided on is what is there.
        self._carry_out(plan)
        if not self._waiting:
            return plan.look_again_s
        look_s = LOOK_MOST_S if is_new else LOOK_LEAST_S
        return look_s if plan.look_again_s is None else min(look_s, plan.look_again_s)

    async def _look_again(self) -> None:
        places = self._places()
        devices = await self._observe()
        self._look = _Look(devices, self._silence(), places, time.monotonic())

    def _decide(self) -> Plan:
        assert self._look is not None
        now = time.monotonic()
        self.decisions += 1
        rules = rules_of(self._settings(), self._look.devices)
        is_crowded = any(not one.is_loaded or one.is_resting for one in self._deployments())
        return decide(
            [self._claim(one) for one in self._waiting.values() if one.deployment.is_wished or one.deployment.is_kept],
            [_holder(*one, now, is_crowded=is_crowded) for one in self._placed()],
            self._look.devices,
            rules,
            now,
            self._look.silence,
        )

    def _carry_out(self, plan: Plan) -> None:
        holders = {_key(replica): (deployment, replica) for deployment, replica in self._placed()}
        for key, placement in plan.start.items():
            waiting = self._waiting.pop(key)
            if not waiting.place.done():
                if waiting.awake is None:
                    waiting.replica.placement = placement
                else:
                    waiting.replica.begin_waking(placement)
                waiting.place.set_result(placement)
        for key, refusal in plan.refuse.items():
            waiting = self._waiting.pop(key)
            if not waiting.place.done():
                waiting.place.set_exception(NoPlace(refusal.reason, refusal.remedies, for_ever=refusal.for_ever))
        for key, waiting in self._waiting.items():
            is_new = waiting.replica.waits_for is None
            waiting.replica.waits_for = plan.wait.get(key, "nobody asks for it now")
            if is_new:
                waiting.deployment.notify()  # it may be in vain
        for key, tier in plan.sleep.items():
            deployment, replica = holders[key]
            if replica.state is not State.READY or replica.in_flight:
                continue  # a request has come by what was just done for another
            why = f"to make room for {plan.evict[key][0]}" if key in plan.evict else "as nobody asks for it"
            self._tell(key[0], "INFO", f"{replica.name} falls asleep (tier {tier}) {why}")
            logger.info("%s falls asleep (tier %s) %s", replica, tier, why)
            deployment.put_to_sleep(replica, tier)
        for key, tier in plan.rehearse.items():
            _, replica = holders[key]
            if replica.state is not State.READY or replica.in_flight:
                continue
            logger.info("%s sleeps for a moment, so that its first sleep (tier %s) keeps nobody waiting", replica, tier)
            replica.fall_asleep(tier, is_rehearsal=True)
        for key, claimant in plan.evict.items():
            if key in plan.sleep:
                continue
            deployment, replica = holders[key]
            self._tell(key[0], "INFO", f"{replica.name} makes room for {claimant[0]}")
            logger.info("%s makes room for %s", replica, claimant[0])
            metrics.EVICTIONS.labels(key[0]).inc()
            deployment.make_room(replica)
        for deployment in self._deployments():
            deployment.hold(replica for replica in deployment.replicas if _key(replica) in plan.hold)

    def _places(self) -> dict[Key, Placement]:
        return {_key(replica): replica.placement for _, replica in self._placed() if replica.placement}

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
        awake = [one for one in deployment.staying if one is not waiting.replica and one.state not in RESTING]
        siblings = [one.placement for one in awake if one.placement]
        others = [one for (uid, _), one in self._waiting.items() if uid == launch.uid and one is not waiting]
        return Claim(
            key=key,
            needs=waiting.needs,
            since=waiting.since,
            cpu_fallback=launch.cpu_fallback,
            is_wished=deployment.is_wished,
            awake=waiting.awake,
            is_extra=bool(siblings) or any(_turn(one) < _turn(waiting) for one in others),
            apart_from=tuple(uuid for placement in siblings for uuid in placement.gpu_uuids or ()),
            priority=launch.priority,
            group=launch.group,
        )


def rules_of(settings: Settings, devices: Sequence[Device]) -> Rules:
    """As the settings say."""
    return Rules(
        max_loaded=settings.max_loaded,
        groups={name: (group.max_loaded, group.exclusive) for name, group in settings.groups.items()},
        min_residency_s=settings.min_residency_s,
        max_wait_s=settings.max_wait_s,
        sleep_bytes=sleep_bytes(settings, devices),
    )


def sleep_bytes(settings: Settings, devices: Sequence[Device]) -> int:
    """How much of the machine's memory may be taken for sleeping; nothing where the share is of nobody knows what."""
    total_bytes = next((device.total_bytes for device in devices if device.key == RAM), 0)
    return bytes_or_share(settings.sleep_memory, total_bytes)


def _turn(waiting: _Waiting) -> tuple[bool, int]:
    """Of the copies of a model, those that only have to wake go first."""
    return waiting.awake is None, waiting.replica.index


def _holder(deployment: Deployment, replica: Replica, now: float, *, is_crowded: bool) -> Holder:
    """
    Args:
        is_crowded: whether there is a model that is not loaded, and may want the room.
    """
    launch = deployment.launch
    return Holder(
        key=_key(replica),
        memory=replica.placement.memory if replica.placement else {},
        ready_since=replica.ready_since if replica.state in (State.READY, State.ASLEEP) else None,
        idle_since=replica.last_used,
        waiting_since=deployment.waiting_since,
        work=replica.in_flight + (0 if deployment.holds(replica) else deployment.waiting),
        is_leaving=deployment.is_leaving(replica),
        is_held=deployment.holds(replica),
        is_pinned=launch.pinned,
        load_s=replica.load_s or USUAL_LOAD_S,
        busy_s=replica.busy_s,
        priority=launch.priority,
        group=launch.group,
        beds=replica.beds() if replica.state is State.READY else (),
        is_tired=deployment.is_tired,
        is_new_to_it=is_crowded and replica.should_rehearse(now),
        is_asleep=replica.is_asleep,
        host_bytes=replica.host_bytes,
        falls_to=replica.falls_to,
        is_falling_asleep=replica.state is State.FALLING_ASLEEP,
        is_waking=replica.is_waking,
    )


def _key(replica: Replica) -> Key:
    return replica.launch.uid, replica.index
