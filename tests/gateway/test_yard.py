"""Single decisions of the yard, and that nobody waits for ever where the others never stop asking."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from simulated import GB, Model, SimulatedReplica, World
from virtual_time import virtual_time

from engines.base import RAM, Needs, Placement
from gateway.config import Settings
from gateway.dispatch import LOOK_LEAST_S, LOOK_MOST_S
from gateway.errors import ModelFailed
from gateway.gpus import Gpu
from gateway.placement import Device
from gateway.replica import PLACE_RETRY_S, REHEARSE_AFTER_S
from gateway.yard import RISE_PAUSE_S, SETTLE_PAUSE_S, Bed, Claim, Holder, Plan, Rules, decide
from registry.memory import Cache

MACHINE = Device(key=RAM, total_bytes=10 * GB)


def claim(gigabytes: int, **fields: object) -> Claim:
    needs = Needs(n_gpu=0, memory_bytes=gigabytes * GB)
    return Claim(**({"key": ("new", 0), "needs": needs, "since": 0.0} | fields))  # type: ignore[arg-type]


def wait_beside(load: list[tuple[str, float]], models: list[Model], *, gigabytes: int, limit_s: float = 600) -> float:
    """How long a request for the model `late` waits, while clients ask for others without a pause."""
    with virtual_time() as loop:
        world = World(Settings(max_wait_s=5), {RAM: gigabytes * GB})

        async def client(uid: str, service_s: float) -> None:
            while True:
                await world.ask(uid, service_s)

        async def main() -> float:
            world.begin()
            for model in models:
                world.deploy(model)
            clients = [asyncio.create_task(client(*one)) for one in load]
            await asyncio.sleep(30)
            asked = loop.time()
            assert await world.ask("late", 1.0, leaves_after_s=limit_s) == "answered"
            waited_s = loop.time() - asked
            for one in clients:
                one.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            await world.end()
            world.raise_faults()
            return waited_s

        return loop.run_until_complete(main())


# At most: 5 s until it is late, 5 s for what the others have begun, 0.5 s to unload, 5 s to load, 1 s to answer.


SHRINKS = Needs(
    n_gpu=0, memory_bytes=8 * GB, cache=Cache(tokens=4096), shorter={2048: 5 * GB, 1024: 3 * GB}, can_shorten=True
)


@pytest.mark.parametrize(
    ("holders", "evicted", "tokens"),
    [
        ([], [], 4096),
        ([6], ["a"], 4096),
        ([6, 1, 1], ["a"], 4096),
        ([3, -3], ["a"], 2048),  # one of two is busy
        ([-2, -3], [], 2048),
        ([-3, -3], [], 1024),
        ([-3, 3], ["b"], 2048),
        ([-6, 1], [], 1024),  # whose end would not help stays
    ],
    ids=str,
)
def test_who_will_do_with_less_gets_less_only_where_the_end_of_the_idle_does_not_give_it_more(
    holders: list[int], evicted: list[str], tokens: int
) -> None:
    there = [
        Holder(key=(uid, 0), memory={RAM: abs(size) * GB}, ready_since=0.0, work=int(size < 0))
        for uid, size in zip("abc", holders, strict=False)
    ]
    new = claim(8, needs=SHRINKS, since=95.0)
    plan = decide([new], there, [MACHINE], Rules(), 100.0)
    assert [key[0] for key in plan.evict] == evicted
    left = [one for one in there if one.key not in plan.evict]
    leaving = [msgspec.structs.replace(one, is_leaving=True) for one in there if one.key in plan.evict]
    if leaving:
        waiting = decide([new], [*left, *leaving], [MACHINE], Rules(), 100.0)
        assert not waiting.start  # though a shorter one has room beside who goes
        assert not waiting.evict
    (placement,) = decide([new], left, [MACHINE], Rules(), 100.0).start.values()
    assert (placement.context_tokens or 4096) == tokens


def test_who_will_do_with_less_waits_for_who_was_used_a_moment_ago_but_not_for_long() -> None:
    used = Holder(key=("a", 0), memory={RAM: 3 * GB}, ready_since=0.0, idle_since=99.0, load_s=20.0)
    new = claim(8, needs=SHRINKS, since=99.0)
    plan = decide([new], [used], [MACHINE], Rules(), 100.0)
    assert (plan.start, plan.evict, plan.look_again_s) == ({}, {}, 4.0)
    assert decide([new], [used], [MACHINE], Rules(), 104.0).evict
    kept = Rules(min_residency_s=1000.0, max_wait_s=30.0)
    assert decide([new], [used], [MACHINE], kept, 128.9).start == {}
    (placement,) = decide([new], [used], [MACHINE], kept, 129.1).start.values()
    assert placement.context_tokens == 2048


def test_another_copy_gets_what_there_is_and_nobody_goes_for_it() -> None:
    idle = Holder(key=("a", 0), memory={RAM: 6 * GB}, ready_since=0.0)
    plan = decide([claim(8, needs=SHRINKS, is_extra=True)], [idle], [MACHINE], Rules(), 100.0)
    assert ([one.context_tokens for one in plan.start.values()], plan.evict) == ([1024], {})


def test_a_full_gpu_is_freed_of_the_idle_before_layers_or_all_go_to_the_cpu() -> None:
    gpu = Device(
        key="GPU-0", total_bytes=10 * GB, gpu=Gpu(index=0, uuid="GPU-0", name="made up", total_bytes=0, used_bytes=0)
    )
    splits = {2: (6 * GB, 2 * GB), 1: (4 * GB, 4 * GB)}
    needs = Needs(memory_bytes=8 * GB, can_split=True, may_split=True, splits=splits)
    idle = Holder(key=("a", 0), memory={"GPU-0": 6 * GB}, ready_since=0.0)
    busy = msgspec.structs.replace(idle, work=1)
    new = claim(8, needs=needs, cpu_fallback=True)
    assert [*decide([new], [idle], [MACHINE, gpu], Rules(), 100.0).evict] == [("a", 0)]
    (placement,) = decide([new], [busy], [MACHINE, gpu], Rules(), 100.0).start.values()
    assert placement.gpu_layers == 1


def test_one_that_needs_the_room_of_two_busy_models_gets_it() -> None:
    load = [("y", 3.0), ("y", 4.1), ("z", 3.7), ("z", 4.9)]
    models = [Model(uid="y"), Model(uid="z"), Model(uid="late", memory=2 * GB)]
    assert wait_beside(load, models, gigabytes=2) < 17


@pytest.mark.parametrize("count", [2, 4])
def test_who_ends_what_it_has_begun_is_not_let_off_for_another(count: int) -> None:
    load = [("y", 3.0 + 0.37 * number) for number in range(count)]
    load += [("z", 3.2 + 0.41 * number) for number in range(count)]
    models = [Model(uid="y"), Model(uid="z"), Model(uid="small", memory=0), Model(uid="late")]
    assert wait_beside([*load, ("small", 0.05)], models, gigabytes=2) < 17


def test_those_of_higher_priority_keep_nobody_waiting_for_ever() -> None:
    models = [Model(uid="y", fields={"priority": 1}), Model(uid="z", fields={"priority": 1}), Model(uid="late")]
    assert wait_beside([("y", 3.0), ("z", 3.7)], models, gigabytes=1) < 60


def test_who_is_late_is_served_by_age_the_others_by_priority() -> None:
    room = Device(key=RAM, total_bytes=GB)
    old, new = claim(1, key=("old", 0), since=1.0), claim(1, key=("new", 0), since=2.0, priority=3)
    assert list(decide([old, new], [], [room], Rules(max_wait_s=30), 10.0).start) == [("new", 0)]
    assert list(decide([old, new], [], [room], Rules(max_wait_s=5), 10.0).start) == [("old", 0)]


def test_room_that_somebody_waits_for_is_not_given_to_who_came_later() -> None:
    leaving = Holder(key=("leaving", 0), memory={RAM: 6 * GB}, is_leaving=True)
    first, later = claim(9, since=1.0), claim(2, key=("later", 0), since=2.0)
    plan = decide([first, later], [leaving], [MACHINE], Rules(), 3.0)
    assert (plan.start, plan.wait["new", 0]) == ({}, "leaving is being unloaded")
    beside = msgspec.structs.replace(later, needs=Needs(n_gpu=0, memory_bytes=GB))
    assert list(decide([first, beside], [leaving], [MACHINE], Rules(), 3.0).start) == [("later", 0)]


def test_beside_who_is_late_and_waits_for_all_there_is_nobody_starts() -> None:
    busy = Holder(key=("busy", 0), memory={RAM: 8 * GB}, ready_since=0.0, work=1)
    claims = [claim(9, key=("first", 0), since=1.0), claim(10, key=("second", 0), since=2.0)]
    small, none = claim(1, key=("small", 0), since=3.0), claim(0, key=("none", 0), since=3.0)
    assert list(decide([claims[0], small, none], [busy], [MACHINE], Rules(), 40.0).start) == [("none", 0), ("small", 0)]
    plan = decide([*claims, small, none], [busy], [MACHINE], Rules(), 40.0)
    assert list(plan.start) == [("none", 0)]
    assert plan.wait["small", 0] == "another model has waited for longer"


def test_who_is_late_and_waits_for_all_of_a_gpu_closes_no_other_device() -> None:
    gpus = [
        Gpu(index=index, uuid=f"GPU-{index}", name="made up", total_bytes=10 * GB, used_bytes=0) for index in (0, 1)
    ]
    devices = [MACHINE, *(Device(key=gpu.uuid, total_bytes=gpu.total_bytes, gpu=gpu) for gpu in gpus)]
    busy = Holder(key=("busy", 0), memory={"GPU-0": 8 * GB}, ready_since=0.0, work=1)

    def on_gpu(gpu: int, gigabytes: int) -> Needs:
        return Needs(gpu_idx=(gpu,), memory_bytes=gigabytes * GB)

    late = [claim(0, key=(uid, 0), since=1.0, needs=on_gpu(0, 9)) for uid in ("first", "second")]
    others = [
        claim(2, key=("on cpu", 0), since=39.0),
        claim(0, key=("on another", 0), since=39.0, needs=on_gpu(1, 2)),
        claim(0, key=("beside", 0), since=39.0, needs=on_gpu(0, 1)),
    ]
    plan = decide([*late, *others], [busy], devices, Rules(), 40.0)
    assert plan.hold == {("busy", 0)}
    assert plan.start.keys() == {("on cpu", 0), ("on another", 0)}
    assert plan.wait["beside", 0] == "another model has waited for longer"
    awake = Placement(memory={"GPU-0": 9 * GB})
    asleep = Holder(key=("second", 0), memory={"GPU-0": GB}, is_asleep=True, ready_since=0.0)
    sleeping = msgspec.structs.replace(late[1], awake=awake)
    plan = decide([late[0], sleeping, *others], [busy, asleep], devices, Rules(), 40.0)
    assert plan.start.keys() == {("on cpu", 0), ("on another", 0)}
    for rules in (Rules(max_loaded=5), Rules(groups={"few": (5, False)})):  # each of them counts
        assert not decide([*late, *others], [busy], devices, rules, 40.0).start


@pytest.mark.parametrize("wish", [{"may_split": True}, {"gpu_layers": 9}, {"n_gpu": 1, "gpu_idx": None}])
def test_the_late_close_the_machines_memory_where_they_may_come_to_need_it(wish: dict[str, Any]) -> None:
    gpu = Gpu(index=0, uuid="GPU-0", name="made up", total_bytes=10 * GB, used_bytes=0)
    devices = [MACHINE, Device(key="GPU-0", total_bytes=10 * GB, gpu=gpu)]
    on_card = Needs(gpu_idx=(0,), memory_bytes=9 * GB)
    busy = [Holder(key=(key, 0), memory={key: 8 * GB}, ready_since=0.0, work=1) for key in (RAM, "GPU-0")]
    late = [claim(0, key=("first", 0), since=1.0, needs=on_card), claim(9, key=("other", 0), since=1.0)]
    second = claim(0, key=("second", 0), since=2.0, needs=msgspec.structs.replace(on_card, **wish))
    small = claim(1, key=("small", 0), since=39.0)
    assert list(
        decide([*late, msgspec.structs.replace(second, needs=on_card), small], busy, devices, Rules(), 40.0).start
    )
    may_fall_back = msgspec.structs.replace(second, cpu_fallback="n_gpu" in wish)
    assert not decide([*late, may_fall_back, small], busy, devices, Rules(), 40.0).start


def test_where_there_is_no_gpu_the_late_close_the_machines_memory() -> None:
    busy = Holder(key=("busy", 0), memory={RAM: 8 * GB}, ready_since=0.0, work=1)
    late = [claim(0, key=(uid, 0), since=1.0, needs=Needs(memory_bytes=9 * GB)) for uid in ("first", "second")]
    assert not decide([*late, claim(1, since=39.0)], [busy], [MACHINE], Rules(), 40.0).start


def test_who_is_held_back_goes_though_another_has_come_to_be_idle_meanwhile() -> None:
    held = Holder(key=("held", 0), memory={RAM: 5 * GB}, ready_since=0.0, idle_since=99.0, load_s=60.0, is_held=True)
    other = Holder(key=("other", 0), memory={RAM: 5 * GB}, ready_since=0.0, idle_since=98.0)
    assert decide([claim(5)], [held, other], [MACHINE], Rules(), 100.0).evict == {("held", 0): ("new", 0)}
    free = msgspec.structs.replace(held, is_held=False)
    assert decide([claim(5)], [free, other], [MACHINE], Rules(), 100.0).evict == {("other", 0): ("new", 0)}


def test_a_second_copy_unloads_nobody_though_the_first_has_no_place_yet() -> None:
    with virtual_time() as loop:
        world = World(Settings(), {RAM: 2 * GB})

        async def main() -> dict[str, str]:
            world.begin()
            for model in (Model(uid="a"), Model(uid="b"), Model(uid="two", replica=2)):
                world.deploy(model)
            await world.ask("a", 1.0)
            await world.ask("b", 1.0)
            await asyncio.sleep(30)
            assert await world.ask("two", 1.0) == "answered"
            await asyncio.sleep(30)
            states = {uid: str(deployment.state) for uid, deployment in world.deployments.items()}
            await world.end()
            return states

        assert loop.run_until_complete(main()) == {"a": "stopped", "b": "ready", "two": "ready"}
        world.raise_faults()


def test_copies_that_start_at_once_get_gpus_of_their_own() -> None:
    gpus = [
        Gpu(index=index, uuid=f"GPU-{index}", name="made up", total_bytes=20 * GB, used_bytes=0) for index in (0, 1)
    ]
    devices = [Device(key=gpu.uuid, total_bytes=gpu.total_bytes, gpu=gpu) for gpu in gpus]
    needs = Needs(memory_bytes=GB)
    copies = [claim(1, key=("two", 0), needs=needs), claim(1, key=("two", 1), needs=needs, is_extra=True)]
    started = decide(copies, [], devices, Rules(), 1.0).start
    assert {placement.gpu_uuids for placement in started.values()} == {("GPU-0",), ("GPU-1",)}


def test_memory_that_others_have_only_just_taken_refuses_nobody_yet() -> None:
    passing = Device(key=RAM, total_bytes=10 * GB, foreign_bytes=6 * GB, passing_bytes=6 * GB)
    plan = decide([claim(6)], [], [passing], Rules(), 20.0)
    assert plan.look_again_s == SETTLE_PAUSE_S
    assert list(plan.wait) == [("new", 0)]
    settled = Device(key=RAM, total_bytes=10 * GB, foreign_bytes=6 * GB)
    assert list(decide([claim(6, since=18.0)], [], [settled], Rules(), 20.0).wait) == [("new", 0)]
    refusal = decide([claim(6)], [], [settled], Rules(), 20.0).refuse["new", 0]
    text, for_ever = refusal.text, refusal.for_ever
    assert "held by others" in text
    assert not for_ever


def test_a_pinned_model_refuses_nobody_once_it_is_being_stopped() -> None:
    pinned = {"key": ("p", 0), "memory": {RAM: 6 * GB}, "is_pinned": True, "ready_since": 0.0}
    stays = decide([claim(6)], [Holder(**pinned)], [MACHINE], Rules(), 20.0)  # type: ignore[arg-type]
    assert "p is pinned" in stays.refuse["new", 0].text
    assert stays.refuse["new", 0].remedies[-1] == "Unpin p."
    goes = decide([claim(6)], [Holder(**pinned, is_leaving=True)], [MACHINE], Rules(), 20.0)  # type: ignore[arg-type]
    assert goes.wait == {("new", 0): "p is being unloaded"}


def test_pinned_models_are_only_blamed_where_their_room_would_do() -> None:
    pinned = Holder(key=("p", 0), memory={RAM: 1 * GB}, is_pinned=True, ready_since=0.0)
    crowded = msgspec.structs.replace(MACHINE, foreign_bytes=5 * GB)
    for size, is_said in ((5, True), (8, False)):
        refusal = decide([claim(size)], [pinned], [crowded], Rules(), 20.0).refuse["new", 0]
        assert ("p is pinned" in refusal.text) is ("Unpin p." in refusal.text) is is_said


def test_who_makes_room_is_told_of_one_and_of_many() -> None:
    idle = [Holder(key=(uid, 0), memory={RAM: 4 * GB}, ready_since=0.0) for uid in ("a", "b")]
    for size, said in ((4, "a is unloaded to make room"), (8, "a and b are unloaded to make room")):
        assert decide([claim(size)], idle, [MACHINE], Rules(), 20.0).wait == {("new", 0): said}
    busy = [msgspec.structs.replace(one, work=2) for one in idle]
    one, many = "ends what it has begun, then makes room", "end what they have begun, then make room"
    for size, said in ((4, f"a {one}"), (8, f"a and b {many}")):
        assert decide([claim(size)], busy, [MACHINE], Rules(), 40.0).wait == {("new", 0): said}


def test_of_the_busy_those_go_that_end_first_and_a_load_that_others_wait_for_last() -> None:
    loading = Holder(key=("loading", 0), memory={RAM: 2 * GB}, work=1, busy_s=1.0)
    busy = [
        Holder(key=(f"busy{busy_s}", 0), memory={RAM: 2 * GB}, ready_since=0.0, idle_since=90.0, work=1, busy_s=busy_s)
        for busy_s in (30.0, 3.0, 60.0)
    ]
    room = Device(key=RAM, total_bytes=8 * GB)
    plan = decide([claim(2)], [loading, *busy], [room], Rules(), 100.0)
    assert plan.hold == {("busy3.0", 0)}
    assert plan.wait["new", 0].startswith("busy3.0 ends what it has begun")
    # Who is held stays so, though another has become the one that ends first.
    held = [loading, busy[0], msgspec.structs.replace(busy[1], busy_s=40.0, is_held=True), busy[2]]
    assert decide([claim(2)], held, [room], Rules(), 100.0).hold == {("busy3.0", 0)}
    # Where all have to go, the load is ended by nobody: it answers first.
    plan = decide([claim(8)], [loading, *busy], [room], Rules(), 100.0)
    assert (plan.hold, plan.evict) == (frozenset(), {})
    assert plan.wait["new", 0].startswith("loading has its turn")


def test_who_is_held_back_keeps_its_room_until_it_goes_and_nobody_who_is_pinned_is() -> None:
    busy = Holder(key=("busy", 0), memory={RAM: 6 * GB}, ready_since=0.0, work=1, busy_s=9.0)
    pinned = Holder(key=("pinned", 0), memory={RAM: 2 * GB}, ready_since=0.0, work=1, is_pinned=True)
    plan = decide([claim(4), claim(3, key=("later", 0), since=90.0)], [busy, pinned], [MACHINE], Rules(), 100.0)
    assert (plan.hold, plan.start) == ({("busy", 0)}, {})
    plan = decide([claim(4), claim(2, key=("later", 0), since=90.0)], [busy, pinned], [MACHINE], Rules(), 100.0)
    assert (plan.hold, list(plan.start)) == ({("busy", 0)}, [("later", 0)])


def test_a_copy_that_makes_room_leaves_the_others_answering() -> None:
    copies = [
        Holder(key=("copies", index), memory={RAM: 2 * GB}, ready_since=0.0, work=2, busy_s=5.0 + index)
        for index in range(3)
    ]
    plan = decide([claim(2)], copies, [Device(key=RAM, total_bytes=6 * GB)], Rules(), 100.0)
    assert plan.hold == {("copies", 0)}
    load = [("copies", 3.0 + 0.3 * number) for number in range(6)]
    assert wait_beside(load, [Model(uid="copies", replica=3), Model(uid="late")], gigabytes=3) < 17


def test_nobody_goes_for_a_model_that_nobody_waits_for_any_more() -> None:
    with virtual_time() as loop:
        world = World(Settings(), {RAM: 2 * GB})

        async def main() -> None:
            world.begin()
            world.deploy(Model(uid="idle"))
            asked = world.deploy(Model(uid="asked", memory=2 * GB))
            world.foreign[RAM] = GB
            assert await world.ask("idle", 1.0) == "answered"
            with pytest.raises(ModelFailed, match=r"The next request looks for room anew\.$"):
                await asked.acquire()
            world.foreign[RAM] = 0
            await asyncio.sleep(120)
            assert (world.evictions, world.starts) == (0, 1)
            before = loop.time()
            assert await world.ask("asked", 1.0) == "answered"
            assert loop.time() - before < 7.5  # the other's end, its own load, and the answer
            assert (world.evictions, world.starts) == (1, 2)
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


def test_a_model_that_is_to_be_loaded_finds_room_though_nobody_waits() -> None:
    with virtual_time() as loop:
        world = World(Settings(), {RAM: 2 * GB})

        async def main() -> None:
            world.begin()
            wished = world.deploy(Model(uid="wished", memory=2 * GB, fields={"preload": True}))
            world.foreign[RAM] = GB
            await asyncio.sleep(60)
            assert str(wished.state) == "failed"
            world.foreign[RAM] = 0
            await asyncio.sleep(PLACE_RETRY_S + 6)
            assert str(wished.state) == "ready"
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


def test_failures_are_remembered_though_nobody_waits_meanwhile() -> None:
    with virtual_time() as loop:
        world = World(Settings(restart_limit=5), {RAM: 2 * GB})

        async def main() -> None:
            world.begin()
            world.deploy(Model(uid="broken", load_s=1.0, fails=100))
            outcomes = []
            for _ in range(4):
                outcomes.append(await world.ask("broken", 1.0))
                await asyncio.sleep(60)
            assert (outcomes[0], outcomes[-1], world.starts) == ("ModelCoolingDown", "ModelFailed", 5)
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


def test_requests_that_end_cost_no_look_and_what_comes_back_is_seen_soon() -> None:
    with virtual_time() as loop:
        world = World(Settings(), {RAM: 2 * GB})

        async def main() -> None:
            world.begin()
            two = world.deploy(Model(uid="two", replica=2))
            world.foreign[RAM] = GB // 2
            assert await world.ask("two", 0.001) == "answered"
            for _ in range(2000):  # one after the other, so that each end is the last
                await world.ask("two", 0.001)
            assert str(two.replicas[1].state) == "waiting"
            looks, began = world.looks, loop.time()
            for _ in range(2000):
                await world.ask("two", 0.001)
            assert world.looks - looks <= (loop.time() - began) / LOOK_LEAST_S + 1
            looks = world.looks
            await asyncio.sleep(60)
            assert world.looks - looks <= 61 / LOOK_MOST_S
            world.foreign[RAM] = 0
            await asyncio.sleep(LOOK_MOST_S + 0.1)
            assert str(two.replicas[1].state) == "starting"
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


async def until_the_next_look(world: World) -> None:
    looks = world.looks
    while world.looks == looks:
        await asyncio.sleep(0.01)


def test_nobody_goes_for_who_has_room_by_now() -> None:
    with virtual_time() as loop:
        world = World(Settings(min_residency_s=0, max_wait_s=5), {RAM: 2 * GB})

        async def main() -> None:
            world.begin()
            old = world.deploy(Model(uid="old", fields={"preload": True}))
            world.deploy(Model(uid="new"))
            busy = await old.acquire()
            world.foreign[RAM] = GB
            waiting = world.ask("new", 1.0)
            await asyncio.sleep(10)
            await until_the_next_look(world)
            world.foreign[RAM] = 0
            old.release(busy, was_served=True)
            assert await waiting == "answered"
            assert world.evictions == 0
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


def test_room_that_others_have_taken_since_the_last_look_is_not_given() -> None:
    with virtual_time() as loop:
        world = World(Settings(max_loaded=1), {RAM: 2 * GB})

        async def main() -> None:
            world.begin()
            for uid in ("old", "new"):
                world.deploy(Model(uid=uid))
            busy = world.ask("old", 60.0)
            await asyncio.sleep(10)
            waiting = world.ask("new", 1.0)
            await until_the_next_look(world)
            world.foreign[RAM] = GB
            world.change(max_loaded=2)
            world.dispatcher.poke()
            await asyncio.sleep(10)
            world.foreign[RAM] = 0
            assert (await busy, await waiting) == ("answered", "answered")
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


def test_while_nobody_knows_how_the_gpus_are_only_models_for_the_cpu_are_placed() -> None:
    gpu = Gpu(index=0, uuid="GPU-0", name="made up", total_bytes=20 * GB, used_bytes=0)
    devices = [Device(key=gpu.uuid, total_bytes=gpu.total_bytes, gpu=gpu), MACHINE]
    claims = [claim(1), claim(1, key=("gpu", 0), needs=Needs(memory_bytes=GB))]
    plan = decide(claims, [], devices, Rules(), 0.0, "NVML does not answer")
    assert list(plan.start) == [("new", 0)]
    assert plan.wait == {("gpu", 0): "NVML does not answer"}
    assert len(decide(claims, [], devices, Rules(), 0.0).start) == 2


def test_who_was_loaded_a_moment_ago_answers_before_it_is_held_back() -> None:
    room = Device(key=RAM, total_bytes=4 * GB)
    rules = Rules(min_residency_s=20.0, max_wait_s=30.0)
    late = claim(4, since=50.0)
    idle = Holder(key=("idle", 0), memory={RAM: 2 * GB}, ready_since=0.0, work=1)

    def plan_beside(now: float, **fields: Any) -> Plan:
        return decide(
            [late], [idle, Holder(key=("new", 1), memory={RAM: 2 * GB}, work=1, **fields)], [room], rules, now
        )

    loading = plan_beside(100.0)
    assert (loading.hold, loading.wait["new", 0]) == (frozenset(), "new has its turn, then makes room")
    resident = plan_beside(100.0, ready_since=90.0)
    assert (resident.hold, resident.look_again_s) == (frozenset(), 10.0)
    assert plan_beside(111.0, ready_since=90.0).hold == {("idle", 0), ("new", 1)}
    # Those who have waited for longer than the late one are answered first, for as long as anybody may wait.
    assert plan_beside(111.0, ready_since=90.0, waiting_since=40.0).look_again_s == 9.0
    assert plan_beside(111.0, ready_since=90.0, waiting_since=60.0).hold
    assert plan_beside(121.0, ready_since=90.0, waiting_since=40.0).hold
    assert plan_beside(121.0, ready_since=90.0, waiting_since=40.0, load_s=60.0).look_again_s == 29.0


def test_a_queue_of_one_at_a_time_gets_more_than_one_answer_between_two_loads() -> None:
    models = [Model(uid="narrow", load_s=20.0, fields={"request_limits": 1, "queue_limit": 50}), Model(uid="late")]
    with virtual_time() as loop:
        world = World(Settings(max_wait_s=10, min_residency_s=20), {RAM: GB})

        async def main() -> None:
            world.begin()
            for model in models:
                world.deploy(model)
            world.crowd("narrow", 6, 4.0)
            world.crowd("late", 2, 4.0)
            await asyncio.sleep(2000)
            loads = world.starts
            assert world.answered["narrow"] >= 4 * loads / 2
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


# --- who can sleep

CARD = Gpu(index=0, uuid="GPU-0", name="made up", total_bytes=80 * GB, used_bytes=0)
CARDS = (Device(key="GPU-0", total_bytes=80 * GB, gpu=CARD), Device(key=RAM, total_bytes=100 * GB))
ROOMY = Rules(sleep_bytes=50 * GB)


def sleeper(name: str, gigabytes: int = 60, **fields: Any) -> Holder:
    """A model on the card that is idle and can sleep, with 2 GB of the card kept, in both of vLLM's tiers."""
    beds = (
        Bed(tier="ram", memory={"GPU-0": 2 * GB, RAM: 20 * GB}, host_bytes=20 * GB, wake_s=0.5),
        Bed(tier="disk", memory={"GPU-0": 2 * GB}, wake_s=3.0),
    )
    told = {"key": (name, 0), "memory": {"GPU-0": gigabytes * GB}, "ready_since": 0.0, "load_s": 60.0, "beds": beds}
    return Holder(**(told | fields))


def on_card(gigabytes: int, **fields: Any) -> Claim:
    return claim(gigabytes, **({"since": 95.0, "needs": Needs(n_gpu=1, memory_bytes=gigabytes * GB)} | fields))


def asleep(name: str, **fields: Any) -> Holder:
    """As it is in tier ram."""
    told = {"memory": {"GPU-0": 2 * GB, RAM: 20 * GB}, "host_bytes": 20 * GB, "is_asleep": True, "beds": ()}
    return sleeper(name, **(told | fields))


@pytest.mark.parametrize(
    ("gigabytes", "rules", "tier"),
    [
        (70, ROOMY, "ram"),
        (70, Rules(sleep_bytes=10 * GB), "disk"),
        (70, Rules(), "disk"),
        (79, ROOMY, None),  # it wants what would be kept, too
    ],
    ids=str,
)
def test_who_makes_room_sleeps_as_lightly_as_suffices(gigabytes: int, rules: Rules, tier: str | None) -> None:
    plan = decide([on_card(gigabytes)], [sleeper("old")], CARDS, rules, 100.0)
    assert plan.evict == {("old", 0): ("new", 0)}
    assert plan.sleep == ({("old", 0): tier} if tier else {})


def test_the_machines_memory_has_to_be_there_too() -> None:
    full = (CARDS[0], Device(key=RAM, total_bytes=100 * GB, foreign_bytes=85 * GB))
    assert decide([on_card(70)], [sleeper("old")], full, ROOMY, 100.0).sleep == {("old", 0): "disk"}


def test_who_can_sleep_makes_room_before_who_has_to_be_loaded_again() -> None:
    loaded = sleeper("loaded", 30, beds=(), idle_since=1.0)
    drowsy = sleeper("drowsy", 30, idle_since=80.0)
    plan = decide([on_card(40)], [loaded, drowsy], CARDS, ROOMY, 100.0)
    assert (plan.evict, plan.sleep) == ({("drowsy", 0): ("new", 0)}, {("drowsy", 0): "ram"})


def test_nobody_goes_in_vain() -> None:
    small = Holder(key=("small", 0), memory={RAM: 2 * GB}, ready_since=0.0, idle_since=1.0)
    large = Holder(key=("large", 0), memory={RAM: 6 * GB}, ready_since=0.0, idle_since=50.0)
    room = Device(key=RAM, total_bytes=8 * GB)
    assert decide([claim(6)], [small, large], [room], Rules(), 100.0).evict == {("large", 0): ("new", 0)}
    assert decide([claim(2)], [small, large], [room], Rules(), 100.0).evict == {("small", 0): ("new", 0)}


def test_who_is_loaded_sooner_than_it_wakes_ends_and_nothing_less() -> None:
    quick = sleeper("quick", 40, load_s=1.0, beds=sleeper("a").beds[1:])
    other = sleeper("other", 40, beds=())
    plan = decide([on_card(79)], [quick, other], CARDS, ROOMY, 100.0)
    assert (plan.evict.keys(), plan.sleep) == ({("quick", 0), ("other", 0)}, {})


def test_who_sleeps_is_ended_only_where_what_it_keeps_is_wanted() -> None:
    holders = [asleep("dreaming"), sleeper("old")]
    plan = decide([on_card(70)], holders, CARDS, ROOMY, 100.0)
    assert (plan.evict, plan.sleep) == ({("old", 0): ("new", 0)}, {("old", 0): "ram"})
    plan = decide([on_card(78)], holders, CARDS, ROOMY, 100.0)
    assert plan.evict == {("old", 0): ("new", 0), ("dreaming", 0): ("new", 0)}
    assert plan.sleep == {("old", 0): "ram"}


def test_a_model_sleeps_at_once_though_it_would_not_be_unloaded_yet() -> None:
    lately = sleeper("lately", idle_since=99.0)  # of 60 s that a load takes, a quarter has to pass
    rules = Rules(sleep_bytes=50 * GB, min_residency_s=3.0)
    assert decide([on_card(70)], [lately], CARDS, rules, 100.0).sleep == {("lately", 0): "ram"}
    plan = decide([on_card(79)], [lately], CARDS, rules, 100.0)
    assert (plan.evict, plan.look_again_s) == ({}, 14.0)


def test_nobody_is_put_to_sleep_who_is_pinned_or_answers() -> None:
    for fields in ({"is_pinned": True}, {"work": 1}, {"ready_since": None}):
        plan = decide([on_card(70)], [sleeper("old", **fields)], CARDS, ROOMY, 100.0)
        assert (plan.evict, plan.sleep) == ({}, {})


def test_who_sleeps_is_not_loaded() -> None:
    rules = Rules(max_loaded=1, sleep_bytes=50 * GB)
    assert ("new", 0) in decide([on_card(10)], [asleep("dreaming")], CARDS, rules, 100.0).start
    assert decide([on_card(10)], [sleeper("old", 10)], CARDS, rules, 100.0).sleep == {("old", 0): "ram"}


AWAKE = Placement(gpu_uuids=("GPU-0",), memory={"GPU-0": 60 * GB, RAM: 20 * GB})


def test_who_is_asked_for_wakes_where_it_sleeps_and_the_other_falls_asleep() -> None:
    waking = claim(0, key=("old", 0), since=95.0, awake=AWAKE)
    dreaming = asleep("old", work=1)
    alone = decide([waking], [dreaming], CARDS, ROOMY, 100.0)
    assert alone.start == {("old", 0): AWAKE}
    other = sleeper("other", 50)
    plan = decide([waking], [dreaming, other], CARDS, ROOMY, 100.0)
    assert (plan.start, plan.sleep, plan.evict) == ({}, {("other", 0): "ram"}, {("other", 0): ("old", 0)})
    falling = sleeper("other", 50, ready_since=None, beds=(), falls_to={"GPU-0": 2 * GB, RAM: 20 * GB})
    plan = decide([waking], [dreaming, falling], CARDS, ROOMY, 100.0)
    assert plan.wait == {("old", 0): "other falls asleep"}
    there = decide([waking], [dreaming, asleep("other")], CARDS, ROOMY, 100.0)
    assert there.start == {("old", 0): AWAKE}


def test_the_room_of_who_is_to_wake_is_not_given_to_another() -> None:
    waking = claim(0, key=("old", 0), since=94.0, awake=AWAKE)
    plan = decide([waking, on_card(30)], [asleep("old", work=1)], CARDS, ROOMY, 100.0)
    assert list(plan.start) == [("old", 0)]
    assert ("new", 0) in plan.wait


def test_what_one_that_wakes_has_kept_counts_once() -> None:
    waking = claim(0, key=("old", 0), since=94.0, awake=AWAKE)
    started = decide([waking, on_card(20)], [asleep("old", work=1)], CARDS, ROOMY, 100.0).start
    assert started.keys() == {("old", 0), ("new", 0)}
    leaving = Holder(key=("leaving", 0), memory={"GPU-0": 70 * GB}, is_leaving=True)
    for gigabytes, keys in ((8, [("new", 0)]), (9, [])):
        plan = decide([waking, on_card(gigabytes)], [asleep("old", work=1), leaving], CARDS, ROOMY, 100.0)
        assert (list(plan.start), plan.wait["old", 0]) == (keys, "leaving is being unloaded")


def test_whose_room_was_taken_while_it_asked_to_wake_is_not_woken() -> None:
    waking = claim(0, key=("old", 0), since=95.0, awake=AWAKE)
    plan = decide([waking], [asleep("old", work=1, is_leaving=True)], CARDS, ROOMY, 100.0)
    assert plan.wait == {("old", 0): "it makes room for another model, and is loaded anew"}


def test_who_sleeps_has_no_residency_left() -> None:
    rules = Rules(min_residency_s=20.0, max_wait_s=30.0, sleep_bytes=50 * GB)
    lately = asleep("lately", ready_since=95.0, idle_since=99.0)
    assert decide([on_card(79)], [lately], CARDS, rules, 100.0).evict == {("lately", 0): ("new", 0)}
    asked = msgspec.structs.replace(lately, work=1)
    assert decide([on_card(79)], [asked], CARDS, rules, 100.0).hold == frozenset()
    assert decide([on_card(79, since=60.0)], [asked], CARDS, rules, 100.0).hold == {("lately", 0)}


def test_a_bed_does_not_count_beside_another_of_the_same_sleeper() -> None:
    beds = (
        Bed(tier="half", memory={"GPU-0": 40 * GB, RAM: 20 * GB}, host_bytes=20 * GB, wake_s=0.5),
        Bed(tier="whole", memory={"GPU-0": 2 * GB, RAM: 25 * GB}, host_bytes=25 * GB, wake_s=1.0),
    )
    plan = decide([on_card(70)], [sleeper("old", beds=beds)], CARDS, Rules(sleep_bytes=25 * GB), 100.0)
    assert plan.sleep == {("old", 0): "whole"}


def test_whose_place_is_taken_for_good_is_started_anew_elsewhere() -> None:
    waking = claim(0, key=("old", 0), since=95.0, awake=AWAKE, needs=Needs(n_gpu=1, memory_bytes=60 * GB))
    second = Gpu(index=1, uuid="GPU-1", name="made up", total_bytes=80 * GB, used_bytes=0)
    cards = (*CARDS, Device(key="GPU-1", total_bytes=80 * GB, gpu=second))
    busy = sleeper("busy", 70, work=1)
    assert decide([waking], [asleep("old", work=1), busy], CARDS, ROOMY, 100.0).refuse == {}
    plan = decide([waking], [asleep("old", work=1), busy], cards, ROOMY, 100.0)
    assert "there is room elsewhere" in plan.refuse["old", 0].text
    leaving = Holder(key=("leaving", 0), memory={"GPU-1": 30 * GB}, is_leaving=True)
    assert decide([waking], [asleep("old", work=1), busy, leaving], cards, ROOMY, 100.0).refuse == {}
    # Who took its place a moment ago may be gone as soon.
    passing = (msgspec.structs.replace(CARDS[0], foreign_bytes=40 * GB, passing_bytes=40 * GB), *cards[1:])
    plan = decide([waking], [asleep("old", work=1), busy], passing, ROOMY, 100.0)
    assert (plan.refuse, list(plan.wait)) == ({}, [("old", 0)])


def test_the_tired_sleep_all_copies_or_none() -> None:
    one, two = sleeper("a", 30, is_tired=True), sleeper("a", 30, is_tired=True, key=("a", 1))
    assert decide([], [one, two], CARDS, ROOMY, 100.0).sleep == {("a", 0): "ram", ("a", 1): "ram"}
    assert decide([], [one, two], CARDS, Rules(sleep_bytes=30 * GB), 100.0).sleep == {("a", 0): "ram", ("a", 1): "disk"}
    busy = sleeper("a", 30, is_tired=True, key=("a", 1), work=1)
    assert decide([], [one, busy], CARDS, ROOMY, 100.0).sleep == {}
    loading = sleeper("a", 30, is_tired=True, key=("a", 1), ready_since=None, beds=())
    assert decide([], [one, loading], CARDS, ROOMY, 100.0).sleep == {}
    sleeping = asleep("a", is_tired=True, key=("a", 1))
    assert decide([], [one, sleeping], CARDS, ROOMY, 100.0).sleep == {("a", 0): "ram"}


def test_the_tired_have_beds_only_as_far_as_there_are_any() -> None:
    in_ram = sleeper("a").beds[:1]
    one, two = sleeper("a", 30, is_tired=True, beds=in_ram), sleeper("a", 30, is_tired=True, key=("a", 1), beds=in_ram)
    assert decide([], [one, two], CARDS, Rules(sleep_bytes=30 * GB), 100.0).sleep == {}
    other = sleeper("b", 30, is_tired=True, beds=in_ram)
    assert decide([], [one, other], CARDS, ROOMY, 100.0).sleep == {("a", 0): "ram", ("b", 0): "ram"}
    assert decide([], [one, other], CARDS, Rules(sleep_bytes=30 * GB), 100.0).sleep == {("a", 0): "ram"}
    full = (CARDS[0], Device(key=RAM, total_bytes=30 * GB))
    assert decide([], [one, other], full, ROOMY, 100.0).sleep == {("a", 0): "ram"}
    # What one has taken before, it has; and it counts as taken once.
    again = sleeper("b", 30, is_tired=True, beds=in_ram, host_bytes=20 * GB, memory={"GPU-0": 30 * GB, RAM: 20 * GB})
    assert decide([], [again], CARDS, Rules(sleep_bytes=20 * GB), 100.0).sleep == {("b", 0): "ram"}
    assert decide([], [again, one], CARDS, Rules(sleep_bytes=40 * GB), 100.0).sleep.keys() == {("a", 0), ("b", 0)}
    assert decide([], [again, one], CARDS, Rules(sleep_bytes=39 * GB), 100.0).sleep.keys() == {("b", 0)}


def test_a_first_sleep_is_tried_where_it_keeps_nobody_waiting() -> None:
    new = sleeper("a", is_new_to_it=True)
    assert decide([], [new], CARDS, ROOMY, 100.0).rehearse == {("a", 0): "ram"}
    assert decide([], [new], CARDS, Rules(), 100.0).rehearse == {}
    assert len(decide([], [new, sleeper("b", 20, is_new_to_it=True)], CARDS, ROOMY, 100.0).rehearse) == 1
    assert decide([], [msgspec.structs.replace(new, work=1)], CARDS, ROOMY, 100.0).rehearse == {}
    assert decide([on_card(79)], [new], CARDS, ROOMY, 5.0).rehearse == {}  # somebody waits


def test_the_first_sleep_of_a_model_is_before_somebody_wants_its_room() -> None:
    with virtual_time() as loop:
        world = World(Settings(sleep_memory="50%", min_residency_s=0), {RAM: 20 * GB, "GPU-0": 10 * GB})
        slow = Model(uid="a", memory=6 * GB, tiers=("ram",), residual=GB, sleep_s=8.0, load_s=40.0)

        async def main() -> None:
            world.begin()
            a = world.deploy(slow)
            assert await world.ask("a", 1.0) == "answered"
            await asyncio.sleep(REHEARSE_AFTER_S + 5)
            assert (str(a.state), a.replicas[0].host_bytes) == ("ready", 0)  # there is nobody else
            world.deploy(Model(uid="b", memory=6 * GB))
            await asyncio.sleep(40)
            assert a.replicas[0].host_bytes == 6 * GB
            assert str(a.state) == "ready"
            assert await world.ask("b", 1.0) == "answered"
            assert str(a.state) == "asleep"
            assert await world.ask("a", 1.0) == "answered"
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


def test_who_makes_no_room_does_not_try_to_sleep_and_takes_no_memory_for_it() -> None:
    with virtual_time() as loop:
        world = World(Settings(sleep_memory="50%", min_residency_s=0), {RAM: 20 * GB, "GPU-0": 10 * GB})

        async def main() -> None:
            world.begin()
            a = world.deploy(Model(uid="a", memory=6 * GB, tiers=("ram",), residual=GB, fields={"pinned": True}))
            world.deploy(Model(uid="b", memory=6 * GB))
            assert await world.ask("a", 1.0) == "answered"
            await asyncio.sleep(REHEARSE_AFTER_S + 60)
            assert (str(a.state), a.replicas[0].host_bytes) == ("ready", 0)
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


def test_a_client_that_leaves_lets_the_model_sleep_on() -> None:
    with virtual_time() as loop:
        world = World(Settings(min_residency_s=0), {RAM: 20 * GB, "GPU-0": 10 * GB})

        async def main() -> None:
            world.begin()
            a = world.deploy(Model(uid="a", memory=8 * GB, tiers=("disk",), residual=GB))
            world.deploy(Model(uid="b", memory=8 * GB))
            assert await world.ask("a", 1.0) == "answered"
            assert await world.ask("b", 100.0, leaves_after_s=20) == "left"
            assert str(a.state) == "asleep"
            world.ask("b", 100.0)
            assert await world.ask("a", 1.0, leaves_after_s=5) == "left"
            await asyncio.sleep(200)
            assert str(a.state) == "asleep"
            assert await world.ask("a", 1.0) == "answered"
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


# --- who falls asleep sees the GPU's free memory: nobody takes of that meanwhile

FALLEN = {"GPU-0": 2 * GB, RAM: 20 * GB}
SECOND = Gpu(index=1, uuid="GPU-1", name="made up", total_bytes=80 * GB, used_bytes=0)
TWO_CARDS = (*CARDS, Device(key="GPU-1", total_bytes=80 * GB, gpu=SECOND))


def falling(name: str, gigabytes: int = 20, **fields: Any) -> Holder:
    held = {"GPU-0": gigabytes * GB, RAM: 20 * GB}
    told = {"memory": held, "ready_since": None, "beds": (), "falls_to": FALLEN, "is_falling_asleep": True}
    return sleeper(name, gigabytes, **(told | fields))


def waking(name: str, gigabytes: int = 20, **fields: Any) -> Holder:
    return sleeper(name, gigabytes, **({"ready_since": None, "beds": (), "is_waking": True} | fields))


def trying(name: str, gigabytes: int = 20) -> Holder:
    """It sleeps for a moment, and wakes right after that."""
    return falling(name, gigabytes, falls_to=None, is_waking=True)


def awake_on(device: str) -> Placement:
    return Placement(gpu_uuids=(device,), memory={device: 20 * GB, RAM: 20 * GB})


@pytest.mark.parametrize("other", [falling("other"), trying("other")], ids=["falls asleep", "tries to"])
def test_nobody_starts_or_wakes_where_another_falls_asleep(other: Holder) -> None:
    plan = decide([on_card(10)], [other], CARDS, ROOMY, 100.0)
    assert (plan.start, plan.wait) == ({}, {("new", 0): "other falls asleep"})
    wakes = claim(0, key=("old", 0), since=95.0, awake=awake_on("GPU-0"))
    plan = decide([wakes], [asleep("old", work=1), other], CARDS, ROOMY, 100.0)
    assert (plan.start, plan.evict, plan.wait) == ({}, {}, {("old", 0): "other falls asleep"})


def test_who_waits_until_another_sleeps_keeps_its_room() -> None:
    free = 80 - 20 - 50
    claims = [on_card(50), on_card(free + 1, key=("later", 0), since=96.0)]
    plan = decide(claims, [falling("other")], CARDS, ROOMY, 100.0)
    assert (plan.start, plan.evict) == ({}, {})
    assert plan.wait["new", 0] == "other falls asleep"
    beside = claim(30, key=("cpu", 0), since=96.0)
    assert list(decide([claims[0], beside], [falling("other")], CARDS, ROOMY, 100.0).start) == [("cpu", 0)]
    on_both = on_card(50, needs=Needs(n_gpu=2, memory_bytes=50 * GB))
    on_second = on_card(60, key=("later", 0), since=96.0, needs=Needs(n_gpu=1, gpu_idx=(1,), memory_bytes=60 * GB))
    assert list(decide([on_second], [falling("other")], TWO_CARDS, ROOMY, 100.0).start) == [("later", 0)]
    assert decide([on_both, on_second], [falling("other")], TWO_CARDS, ROOMY, 100.0).start == {}


def test_who_chooses_its_gpu_by_itself_may_come_to_any() -> None:
    chooses = claim(0, needs=Needs(chooses=True), since=90.0)
    plan = decide([chooses], [falling("other")], TWO_CARDS, ROOMY, 100.0)
    assert (plan.start, plan.wait) == ({}, {("new", 0): "other falls asleep"})
    plan = decide([chooses, on_card(40, key=("later", 0))], [sleeper("idle", 60)], CARDS, ROOMY, 100.0)
    assert (list(plan.start), plan.sleep) == ([("new", 0)], {})
    on_cpu = claim(0, key=("cpu", 0), needs=Needs(chooses=True, n_gpu=0), since=90.0)
    assert list(decide([on_cpu], [falling("other")], TWO_CARDS, ROOMY, 100.0).start) == [("cpu", 0)]
    assert decide([chooses], [], TWO_CARDS, ROOMY, 100.0).start == {("new", 0): Placement()}


def test_on_another_gpu_they_start_and_wake_as_ever() -> None:
    elsewhere = on_card(10, needs=Needs(n_gpu=1, gpu_idx=(1,), memory_bytes=10 * GB))
    wakes = claim(0, key=("old", 0), since=95.0, awake=awake_on("GPU-1"))
    old = asleep("old", work=1, memory={"GPU-1": 2 * GB, RAM: 20 * GB})
    plan = decide([elsewhere, wakes], [falling("other"), old], TWO_CARDS, ROOMY, 100.0)
    assert plan.start.keys() == {("new", 0), ("old", 0)}


@pytest.mark.parametrize("other", [waking("other"), trying("other")], ids=["wakes", "tries to sleep"])
def test_nobody_is_put_to_sleep_or_ended_instead_where_another_wakes(other: Holder) -> None:
    idle = sleeper("idle", 50)
    plan = decide([on_card(40)], [idle, other], CARDS, ROOMY, 100.0)
    assert (plan.start, plan.evict, plan.sleep) == ({}, {}, {})
    assert plan.wait == {("new", 0): "other takes its room first, then idle falls asleep to make room"}
    awake = msgspec.structs.replace(other, is_waking=False, is_falling_asleep=False, ready_since=99.9, work=1)
    assert decide([on_card(40)], [idle, awake], CARDS, ROOMY, 100.0).sleep == {("idle", 0): "ram"}


def test_for_who_loads_for_minutes_nobody_waits() -> None:
    loading = sleeper("loading", 20, ready_since=None, beds=())
    assert decide([on_card(40)], [sleeper("idle", 50), loading], CARDS, ROOMY, 100.0).sleep == {("idle", 0): "ram"}


def test_the_late_get_what_wakes_is_done_with_before_the_next_wakes() -> None:
    late = on_card(40, since=0.0)
    wakes = claim(0, key=("old", 0), since=95.0, awake=Placement(gpu_uuids=("GPU-0",), memory={"GPU-0": 5 * GB}))
    old = asleep("old", work=1, memory={"GPU-0": 2 * GB}, host_bytes=0)
    plan = decide([late, wakes], [sleeper("idle", 50), waking("other"), old], CARDS, ROOMY, 100.0)
    assert (plan.start, plan.evict, plan.hold) == ({}, {}, {("idle", 0)})
    assert plan.wait["old", 0] == "idle falls asleep"


def test_nobody_is_put_to_sleep_where_another_starts_in_the_same_moment_nor_the_other_way_round() -> None:
    small = on_card(5, key=("small", 0), since=90.0)
    holders = [sleeper("idle", 60)]
    plan = decide([small, on_card(40)], holders, CARDS, ROOMY, 100.0)
    assert (list(plan.start), plan.sleep) == ([("small", 0)], {})
    plan = decide([msgspec.structs.replace(small, since=96.0), on_card(40)], holders, CARDS, ROOMY, 100.0)
    assert (list(plan.start), plan.sleep) == ([], {("idle", 0): "ram"})
    assert plan.wait["small", 0] == "idle falls asleep"


def test_the_tired_sleep_once_another_is_awake_and_that_is_looked_for() -> None:
    tired = [sleeper("a", 20, is_tired=True), sleeper("a", 20, is_tired=True, key=("a", 1))]
    plan = decide([], [*tired, waking("other")], CARDS, ROOMY, 100.0)
    assert (plan.sleep, plan.look_again_s) == ({}, RISE_PAUSE_S)
    assert decide([], [*tired, falling("other")], CARDS, ROOMY, 100.0).sleep.keys() == {("a", 0), ("a", 1)}


def test_a_first_sleep_is_tried_where_nobody_takes_of_the_gpu() -> None:
    new = sleeper("a", 20, is_new_to_it=True)
    loading = sleeper("b", 20, ready_since=None, beds=())
    for other in (waking("b"), trying("b"), falling("b"), loading):
        assert decide([], [new, other], CARDS, ROOMY, 100.0).rehearse == {}
    plan = decide([on_card(5)], [new], CARDS, ROOMY, 100.0)
    assert (list(plan.start), plan.rehearse) == ([("new", 0)], {})
    tired = sleeper("b", 20, is_tired=True)
    plan = decide([], [new, tired], CARDS, ROOMY, 100.0)
    assert (plan.sleep, plan.rehearse) == ({("b", 0): "ram"}, {})
    assert decide([], [new, sleeper("b", 20)], CARDS, ROOMY, 100.0).rehearse == {("a", 0): "ram"}


def test_models_that_share_a_card_swap_in_pairs_without_disturbing_each_other() -> None:
    sizes = {"big-a": 6, "big-b": 6, "small-a": 3, "small-b": 3}
    with virtual_time() as loop:
        world = World(Settings(sleep_memory="100%", min_residency_s=0), {RAM: 90 * GB, "GPU-0": 11 * GB})

        async def swap(size: str, service_s: float) -> None:
            for _ in range(60):
                for name in "ab":
                    assert await world.ask(f"{size}-{name}", service_s) == "answered"

        async def main() -> None:
            world.begin()
            for uid, size in sizes.items():
                world.deploy(Model(uid=uid, memory=size * GB, tiers=("ram",), residual=GB, sleep_s=1.5, wake_s=0.7))
            await asyncio.gather(swap("big", 0.2), swap("small", 0.1))
            assert world.sleeps > 150
            assert world.starts == len(sizes)
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


def test_who_is_told_to_sleep_does_so_once_another_is_awake() -> None:
    with virtual_time() as loop:
        world = World(Settings(sleep_memory="100%", min_residency_s=0), {RAM: 90 * GB, "GPU-0": 10 * GB})

        async def main() -> None:
            world.begin()
            a, b = (
                world.deploy(Model(uid=uid, memory=3 * GB, tiers=("disk",), residual=GB, wake_s=3.0)) for uid in "ab"
            )
            for uid in "ab":
                assert await world.ask(uid, 0.1) == "answered"
            await a.sleep()
            asking = world.ask("a", 0.1)
            await asyncio.sleep(1)
            assert str(a.state) == "waking"
            await b.sleep()
            assert (str(a.state), str(b.state)) == ("ready", "asleep")
            assert await asking == "answered"
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()


def test_who_waits_for_memory_that_is_just_coming_back_keeps_it_from_the_smaller() -> None:
    passing = Device(key=RAM, total_bytes=10 * GB, foreign_bytes=6 * GB, passing_bytes=6 * GB)
    busy = Holder(key=("busy", 0), memory={RAM: 2 * GB}, ready_since=0.0, work=1)
    small = claim(2, key=("small", 0), since=35.0)
    late = claim(9, since=0.0)
    plan = decide([late, small], [busy], [passing], Rules(max_wait_s=30), 40.0)
    assert (plan.start, plan.evict) == ({}, {})
    assert plan.hold == {("busy", 0)}
    idle = msgspec.structs.replace(busy, work=0)
    plan = decide([late, small], [idle], [passing], Rules(max_wait_s=30), 40.0)
    assert (plan.start, plan.evict, plan.hold) == ({}, {}, {("busy", 0)})
    early = msgspec.structs.replace(late, since=20.0)
    plan = decide([early, small], [idle], [passing], Rules(max_wait_s=30), 40.0)
    assert (plan.start, plan.evict, plan.hold) == ({}, {}, frozenset())
    another_copy = msgspec.structs.replace(late, is_extra=True)
    assert decide([another_copy], [busy], [passing], Rules(max_wait_s=30), 40.0).hold == frozenset()
    both = [claim(5, since=0.0), claim(5, key=("small", 0), since=35.0)]
    assert decide(both, [], [passing], Rules(max_wait_s=30), 40.0).start == {}  # it is not back yet
    # Nobody goes before the memory is back.
    back = Device(key=RAM, total_bytes=10 * GB)
    assert decide([late, small], [idle], [back], Rules(max_wait_s=30), 40.0).evict == {("busy", 0): ("new", 0)}


def test_a_model_that_crashed_while_nobody_waited_is_back_if_there_is_room_and_unloads_nobody() -> None:
    with virtual_time() as loop:
        world = World(Settings(min_residency_s=0), {RAM: GB})

        async def main() -> None:
            world.begin()
            kept = world.deploy(Model(uid="kept", load_s=1.0))
            world.deploy(Model(uid="other", load_s=0.01))
            [replica] = kept.replicas
            assert isinstance(replica, SimulatedReplica)
            assert await world.ask("kept", 1.0) == "answered"
            replica.crash.set()
            await asyncio.sleep(30)
            assert (str(kept.state), world.starts) == ("ready", 2)
            replica.crash.set()
            await asyncio.sleep(0.01)
            assert await world.ask("other", 0.01) == "answered"  # it has taken the room, and could go already
            await asyncio.sleep(120)
            assert (str(kept.state), world.evictions, world.starts) == ("stopped", 0, 3)
            assert await world.ask("kept", 1.0) == "answered"
            await world.end()

        loop.run_until_complete(main())
        world.raise_faults()
