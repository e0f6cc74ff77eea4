"""The yard, driven at random for virtual hours: whatever comes, what must hold holds, and nobody waits for ever.

More of it: HOSTLER_YARD_EXAMPLES and HOSTLER_YARD_STEPS, of each example.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, invariant
from schedules import initialize, read, rule
from simulated import GB, Model, World
from virtual_time import virtual_time

from engines.base import RAM
from gateway.config import Group, Settings
from gateway.errors import HostlerError
from gateway.replica import State

UIDS = ("a", "b", "c", "d", "e")
BOUND_S = 500.0  # virtual seconds, in which everybody's answer has begun, or is refused, though others never stop
LONGEST_QUEUE_S = 40 * BOUND_S  # of a model that answers one at a time
EXAMPLES = int(os.environ.get("HOSTLER_YARD_EXAMPLES", "60"))
STEPS = int(os.environ.get("HOSTLER_YARD_STEPS", "50"))

RUNNING = (State.STARTING, State.READY, State.FALLING_ASLEEP, State.ASLEEP, State.WAKING)
uids = st.sampled_from(UIDS)
devices = st.sampled_from([RAM, "GPU-0", "GPU-1"])
models = st.builds(
    lambda memory, shrinks, load_s, stop_s, replica, fails, tiers, residual, sleep_s, wake_s, sleeps_fail, **fields: {
        "memory": memory * GB,
        "shrinks": shrinks,
        "load_s": load_s,
        "stop_s": stop_s,
        "replica": replica,
        "fails": fails,
        "tiers": tiers,
        "residual": residual * GB // 4,
        "sleep_s": sleep_s,
        "wake_s": wake_s,
        "sleeps_fail": sleeps_fail,
        "fields": fields,
    },
    memory=st.integers(0, 6),
    shrinks=st.sampled_from([False, False, True]),
    load_s=st.floats(0.1, 30),
    stop_s=st.floats(0, 3),
    replica=st.sampled_from([1, 1, 1, 2, 3]),
    pinned=st.sampled_from([False, False, False, False, True]),
    priority=st.integers(-2, 2),
    group=st.sampled_from([None, None, "few", "alone"]),
    idle_timeout_s=st.sampled_from([None, None, 5.0, 60.0]),
    fails=st.sampled_from([0, 0, 0, 1, 2]),
    tiers=st.sampled_from([(), (), ("ram", "disk"), ("ram", "disk"), ("ram",), ("disk",)]),
    residual=st.integers(0, 6),
    sleep_s=st.floats(0, 8),
    wake_s=st.floats(0, 5),
    sleeps_fail=st.sampled_from([0, 0, 0, 0, 1, 2]),
    sleep_after_s=st.sampled_from([None, None, 5.0, 30.0]),
    preload=st.sampled_from([False, False, False, True]),
    n_gpu=st.sampled_from([None, None, None, 0, 1, 2]),
    cpu_fallback=st.sampled_from([False, False, True]),
    request_limits=st.sampled_from([None, None, 1, 3]),
    queue_limit=st.sampled_from([None, 5, 50]),
)


class Yard(RuleBasedStateMachine):
    """Five models, and a machine for a few of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.loop = self.stack.enter_context(virtual_time())
        self.world: World

    def passes(self, duration_s: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(duration_s))

    @initialize(
        totals=st.tuples(st.integers(6, 12), st.sampled_from([0, 0, 4, 8]), st.sampled_from([0, 4, 8])),
        lag_s=st.sampled_from([0.0, 0.0, 1.5, 4.0]),
        max_loaded=st.sampled_from([None, None, 1, 2, 3]),
        min_residency_s=st.sampled_from([0.0, 3.0, 20.0]),
        max_wait_s=st.sampled_from([1.0, 10.0, 60.0]),
        sleep_memory=st.sampled_from(["0", "25%", "100%"]),
        wishes=st.tuples(*[models] * len(UIDS)),
    )
    def begin(
        self,
        totals: tuple[int, int, int],
        lag_s: float,
        max_loaded: int | None,
        min_residency_s: float,
        max_wait_s: float,
        sleep_memory: str,
        wishes: Any,
    ) -> None:
        settings = Settings(
            drain_timeout_s=60,
            restart_limit=3,
            max_loaded=max_loaded,
            min_residency_s=min_residency_s,
            max_wait_s=max_wait_s,
            sleep_memory=sleep_memory,
            groups={"few": Group(max_loaded=1), "alone": Group(max_loaded=2, exclusive=True)},
        )
        sizes = zip((RAM, "GPU-0", "GPU-1"), totals, strict=True)
        self.world = World(settings, {key: size * GB for key, size in sizes if size}, lag_s=lag_s, bound_s=BOUND_S)

        async def begin() -> None:
            self.world.begin()
            for uid, wish in zip(UIDS, wishes, strict=True):
                self.world.deploy(Model(uid=uid, **wish))

        self.loop.run_until_complete(begin())

    @rule(uid=uids, service_s=st.floats(0.01, 20), count=st.integers(1, 8), pause_s=st.floats(0, 5))
    def requests(self, uid: str, service_s: float, count: int, pause_s: float) -> None:
        async def ask() -> None:
            for _ in range(count):
                self.world.ask(uid, service_s)

        self.loop.run_until_complete(ask())
        self.passes(pause_s)

    @rule(uid=uids, service_s=st.floats(0.1, 20), leaves_after_s=st.floats(0, 10))
    def a_client_that_leaves(self, uid: str, service_s: float, leaves_after_s: float) -> None:
        async def ask() -> None:
            self.world.ask(uid, service_s, leaves_after_s=leaves_after_s)

        self.loop.run_until_complete(ask())

    @rule(uid=uids, count=st.integers(1, 3), service_s=st.floats(0.5, 15))
    def a_crowd_comes_that_asks_on_and_on(self, uid: str, count: int, service_s: float) -> None:
        if self.world.crowd_size(uid) < 6:
            self.world.crowd(uid, count, service_s)

    @rule(uid=uids)
    def the_crowd_goes(self, uid: str) -> None:
        self.loop.call_soon(self.world.disperse, uid)
        self.passes(0)

    @rule(uid=uids, leaves_after_s=st.floats(0, 100))
    def somebody_waits_until_it_is_ready(self, uid: str, leaves_after_s: float) -> None:
        self.world.background(self.world.watch(uid, leaves_after_s))

    @rule(duration_s=st.sampled_from([0.0, 0.001, 0.1, 1.0, 7.0, 40.0, 300.0]))
    def time_passes(self, duration_s: float) -> None:
        self.passes(duration_s)

    @rule(uid=uids, at=st.integers(0, 2), later_s=st.floats(0, 2))
    def an_engine_crashes(self, uid: str, at: int, later_s: float) -> None:
        self.passes(later_s)
        deployment = self.world.deployments[uid]
        replicas: list[Any] = list(deployment.replicas)
        if replicas and (replica := replicas[at % len(replicas)]).state in RUNNING:
            replica.crash.set()

    @rule(uid=uids, count=st.integers(1, 3))
    def starts_will_fail(self, uid: str, count: int) -> None:
        self.world.models[uid].fails = count

    @rule(uid=uids, count=st.integers(1, 3))
    def sleeps_and_wakes_will_fail(self, uid: str, count: int) -> None:
        self.world.models[uid].sleeps_fail = count

    @rule(uid=uids)
    def somebody_puts_it_to_sleep(self, uid: str) -> None:
        async def sleep() -> None:
            with contextlib.suppress(HostlerError):
                await self.world.deployments[uid].sleep()

        self.world.background(sleep())

    @rule(uid=uids)
    def somebody_starts_it(self, uid: str) -> None:
        self.loop.call_soon(self.world.deployments[uid].start)
        self.passes(0)

    @rule(uid=uids, force=st.booleans())
    def somebody_stops_it(self, uid: str, force: bool) -> None:
        self.loop.call_soon(lambda: self.world.deployments[uid].stop(force=force))
        self.passes(0)

    @rule(uid=uids)
    def a_replica_more(self, uid: str) -> None:
        deployment = self.world.deployments[uid]
        taken = {replica.index for replica in deployment.replicas}
        if len(taken) < 4:
            index = next(index for index in range(5) if index not in taken)
            self.loop.call_soon(lambda: deployment.add(self.world.replica(deployment, index)))
            self.passes(0)

    @rule(uid=uids)
    def a_replica_less(self, uid: str) -> None:
        deployment = self.world.deployments[uid]
        if len(deployment.staying) > 1:
            self.world.background(deployment.remove(deployment.staying[-1]))
            self.passes(0)

    @rule(key=devices, gigabytes=st.integers(0, 8))
    def others_take_memory(self, key: str, gigabytes: int) -> None:
        self.world.foreign[key] = gigabytes * GB

    @rule(key=devices, gigabytes=st.integers(1, 8), has_s=st.floats(0.5, 60), has_not_s=st.floats(2, 60))
    def others_come_and_go(self, key: str, gigabytes: int, has_s: float, has_not_s: float) -> None:
        self.world.come_and_go(key, gigabytes * GB, has_s, has_not_s)

    @rule(duration_s=st.floats(0, 60))
    def the_gpus_driver_hangs(self, duration_s: float) -> None:
        if not self.world.is_silent:
            self.world.background(self.world.hang(duration_s))

    @rule(max_wait_s=st.sampled_from([1.0, 30.0]), min_residency_s=st.sampled_from([0.0, 10.0]))
    def the_settings_change(self, max_wait_s: float, min_residency_s: float) -> None:
        self.world.change(max_wait_s=max_wait_s, min_residency_s=min_residency_s)

    @invariant()
    def it_holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            self.world.raise_faults()

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                for _ in range(int(BOUND_S / 50)):  # the crowds ask on, and so everybody's answer has to come
                    self.passes(50)
                    self.it_holds()
                for uid in UIDS:
                    self.world.disperse(uid)
                waited_s = 0.0
                while self.world.clients and waited_s < LONGEST_QUEUE_S:
                    self.passes(10)
                    self.it_holds()
                    waited_s += 10
                waiting = {uid: (one.waiting, str(one.state)) for uid, one in self.world.deployments.items()}
                assert not self.world.clients, f"{len(self.world.clients)} wait for ever: {waiting}"
                self.world.raise_faults()
                self.loop.run_until_complete(self.world.end())
        finally:
            self.stack.close()


TestYard = Yard.TestCase
TestYard.settings = hypothesis_settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None)


# Those that are replayed with processes, and in `virtual` those that an earlier yard did not survive.
KEPT = sorted((Path(__file__).parent / "schedules").rglob("*.jsonl"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_a_schedule_that_was_kept_holds(file: Path) -> None:
    yard = Yard()
    try:
        for step in read(file):
            getattr(yard, step.rule)(**step.arguments)
            yard.it_holds()
    finally:
        yard.teardown()
    assert yard.world.outcomes["answered"]
    assert yard.world.starts
