"""Which devices a replica gets and how much of them, and the sentence if it gets none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from grammar import assert_clause, assert_sentences
from hypothesis import given
from hypothesis import strategies as st
from llms import a_launch

from engines.base import RAM, Needs, Placement
from gateway.gpus import Gpu, list_gpus
from gateway.placement import Device, NoRoom, needs_of, place, regain
from registry.memory import Attention, Cache, kv_cache_bytes

GB = 10**9


def a_device(index: int, free_gb: int = 10, total_gb: int = 16, **more: Any) -> Device:
    gpu = Gpu(index=index, uuid=f"GPU-{index}", name="Test", total_bytes=total_gb * GB, used_bytes=0)
    return Device(key=gpu.uuid, total_bytes=gpu.total_bytes, foreign_bytes=(total_gb - free_gb) * GB, gpu=gpu, **more)


def a_slice(index: int, of: int, total_gb: int) -> Device:
    device = a_device(index, total_gb, total_gb)
    assert device.gpu
    uuid = f"MIG-{index}"
    return msgspec.structs.replace(device, key=uuid, gpu=msgspec.structs.replace(device.gpu, uuid=uuid, slice_of=of))


def the_ram(free_gb: int, **more: Any) -> Device:
    return Device(key=RAM, total_bytes=free_gb * GB, **more)


def gpus_of(needs: Needs, devices: Sequence[Device], promised: dict[str, int] | None = None, **more: Any) -> Any:
    """The uuids, or the text of the refusal."""
    found = place(needs, devices, promised or {}, **more)
    return found.gpu_uuids if isinstance(found, Placement) else found.text


# --- a context that may be shorter

A_GB_EACH_THOUSAND = (Attention(layers=1, key=250_000, value=250_000),)  # of tokens, two bytes a number


def a_long_one(**fields: Any) -> Needs:
    """Two gigabytes, and one for each thousand tokens, of which there may be fewer."""
    cache = Cache(tokens=100_000)
    shorter = {tokens: 2 * GB + tokens // 1000 * GB for tokens in (64_000, 32_000, 16_000)}
    needs = {"memory_bytes": 102 * GB, "cache": cache, "attention": A_GB_EACH_THOUSAND, "can_shorten": True}
    return Needs(**needs | {"shorter": shorter, "can_spread": True} | fields)


@pytest.mark.parametrize(
    ("free", "fields", "got"),
    [
        ([120], {}, ([0], None, 102)),
        ([80], {}, ([0], 64_000, 66)),
        ([20], {}, ([0], 16_000, 18)),
        ([40, 80, 40], {}, ([1], 64_000, 66)),  # rather shorter than spread
        ([17, 17], {}, ([0, 1], 32_000, 17)),
        ([80, 80], {"n_gpu": 2}, ([0, 1], None, 51)),
        ([80, 40], {"n_gpu": 2}, ([0, 1], 64_000, 33)),
        ([20, 80], {"gpu_idx": (0,)}, ([0], 16_000, 18)),
    ],
)
def test_a_context_that_may_be_shorter_is_the_longest_that_has_room(
    free: list[int], fields: dict[str, Any], got: tuple[list[int], int | None, int]
) -> None:
    devices = [a_device(index, free_gb, 140) for index, free_gb in enumerate(free)]
    found = place(a_long_one(**fields), devices, {})
    assert isinstance(found, Placement)
    indexes, tokens, each_gb = got
    assert {*(found.gpu_uuids or ())} == {f"GPU-{index}" for index in indexes}
    assert found.context_tokens == tokens
    assert set(found.memory.values()) == {each_gb * GB}
    assert found.cache_bytes == (tokens or 100_000) * 1_000_000


def test_a_shorter_context_goes_before_the_cpu_and_a_refusal_is_about_the_shortest() -> None:
    devices = [a_device(0, 20, 140), the_ram(500)]
    found = place(a_long_one(), devices, {}, cpu_fallback=True)
    assert isinstance(found, Placement)
    assert found.context_tokens == 16_000
    full = {"GPU-0": 10 * GB}
    found = place(a_long_one(), devices, full, cpu_fallback=True)
    assert isinstance(found, Placement)
    assert (found.gpu_uuids, found.context_tokens) == ((), None)
    refusal = place(a_long_one(lighter={"1B": 5 * GB}), devices, full)
    assert isinstance(refusal, NoRoom)
    assert refusal.text.startswith("with a context of only 16,000 tokens it needs about 18,000 MB")
    assert "Take another spec of the family: 1B." in refusal.text
    assert not refusal.for_ever


# --- layers on GPUs and on the CPU


def of_layers(**fields: Any) -> Needs:
    """Ten layers of a gigabyte each, and one more gigabyte wherever any of them are."""
    splits = {layers: ((layers + 1) * GB, (11 - layers) * GB) for layers in range(9, 0, -1)}
    return Needs(**{"memory_bytes": 11 * GB, "can_split": True, "splits": splits} | fields)


@pytest.mark.parametrize(
    ("free", "fields", "fallback", "got"),
    [
        (12, {"may_split": True}, False, (None, {"GPU-0": 11})),
        (8, {"may_split": True}, False, (7, {"GPU-0": 8, RAM: 4})),
        (8, {"may_split": True}, True, (7, {"GPU-0": 8, RAM: 4})),  # rather some layers than none
        (1, {"may_split": True}, True, (None, {RAM: 11})),
        (12, {"gpu_layers": 3}, False, (3, {"GPU-0": 4, RAM: 8})),
        (12, {"gpu_layers": 99}, False, (None, {"GPU-0": 11})),
        (3, {"gpu_layers": 3}, True, (None, {RAM: 11})),
        (8, {"may_split": True, "gpu_idx": (0,)}, False, (7, {"GPU-0": 8, RAM: 4})),
    ],
)
def test_layers_are_on_gpus_as_many_as_fit_or_as_are_asked_for(
    free: int, fields: dict[str, Any], fallback: bool, got: tuple[int | None, dict[str, int]]
) -> None:
    found = place(of_layers(**fields), [a_device(0, free), the_ram(12)], {}, cpu_fallback=fallback)
    assert isinstance(found, Placement)
    assert (found.gpu_layers, found.memory) == (got[0], {key: size * GB for key, size in got[1].items()})


def test_a_launch_that_allows_no_split_is_told_how_many_layers_would_fit() -> None:
    refusal = place(of_layers(), [a_device(0, 8), the_ram(12)], {})
    assert isinstance(refusal, NoRoom)
    said = "Say n_gpu_layers 7: 7 of its 10 layers have room on GPUs, the others in the machine's memory."
    assert said in refusal.remedies
    assert said in refusal.text
    assert "n_gpu_layers 7" in place(of_layers(gpu_layers=8), [a_device(0, 8), the_ram(12)], {}).text  # type: ignore[union-attr]
    none = place(of_layers(), [a_device(0, 1), the_ram(12)], {})
    assert isinstance(none, NoRoom)
    assert "n_gpu_layers" not in none.text


def test_layers_on_the_cpu_need_the_machines_memory() -> None:
    refusal = place(of_layers(may_split=True), [a_device(0, 8), the_ram(3)], {})
    assert isinstance(refusal, NoRoom)


FOUR = [a_device(0, free_gb=2), a_device(1, free_gb=8), a_device(2, free_gb=16), a_device(3, free_gb=4)]


@pytest.mark.parametrize(
    ("needs", "gpu_uuids"),
    [
        (Needs(n_gpu=0), ()),
        (Needs(gpu_idx=()), ()),
        (Needs(gpu_idx=(0,)), ("GPU-0",)),
        (Needs(gpu_idx=(3, 1)), ("GPU-3", "GPU-1")),
        (Needs(gpu_idx=(0,), n_gpu=1), ("GPU-0",)),
        # nobody knows what it takes: the emptiest
        (Needs(), ("GPU-2",)),
        (Needs(n_gpu=2), ("GPU-2", "GPU-1")),
        (Needs(n_gpu=4), ("GPU-2", "GPU-1", "GPU-3", "GPU-0")),
        # the fullest that has room
        (Needs(memory_bytes=1 * GB), ("GPU-0",)),
        (Needs(memory_bytes=5 * GB), ("GPU-1",)),
        (Needs(memory_bytes=9 * GB), ("GPU-2",)),
        (Needs(memory_bytes=6 * GB, n_gpu=2), ("GPU-3", "GPU-1")),
        # as few as have room
        (Needs(memory_bytes=15 * GB, can_spread=True), ("GPU-2",)),
        (Needs(memory_bytes=17 * GB, can_spread=True), None),
        (Needs(memory_bytes=8 * GB, gpu_idx=(3, 1)), ("GPU-3", "GPU-1")),
        (Needs(gpu_share=0.5), ("GPU-1",)),
        (Needs(gpu_share=0.9), ("GPU-2",)),
    ],
)
def test_a_replica_gets(needs: Needs, gpu_uuids: tuple[str, ...] | None) -> None:
    found = place(needs, FOUR, {})
    assert (found.gpu_uuids if isinstance(found, Placement) else None) == gpu_uuids


def test_it_is_split_evenly_over_as_few_as_will_do() -> None:
    devices = [a_device(index, free_gb=10) for index in range(5)]
    needs = Needs(memory_bytes=29 * GB, can_spread=True)
    found = place(needs, devices, {})
    assert isinstance(found, Placement)
    assert found.memory == {f"GPU-{index}": -(-29 * GB // 3) for index in range(3)}
    assert found.gpu_totals == {f"GPU-{index}": 16 * GB for index in range(3)}
    by_twos = msgspec.structs.replace(needs, gpu_counts=(2, 4, 8))
    assert len(gpus_of(by_twos, devices)) == 4


def test_several_models_share_a_gpu_until_it_is_full() -> None:
    devices, promised = [a_device(0, 16), a_device(1, 16)], {}
    got = []
    for _ in range(5):
        found = place(Needs(memory_bytes=7 * GB), devices, promised)
        got.append(found.gpu_uuids if isinstance(found, Placement) else None)
        if isinstance(found, Placement):
            promised = {key: promised.get(key, 0) + found.memory.get(key, 0) for key in ("GPU-0", "GPU-1")}
    assert got == [("GPU-0",), ("GPU-0",), ("GPU-1",), ("GPU-1",), None]


def test_copies_of_a_model_are_kept_apart_while_there_is_room() -> None:
    devices = [a_device(0, 16), a_device(1, 10)]
    assert gpus_of(Needs(memory_bytes=3 * GB), devices, apart_from={"GPU-1"}) == ("GPU-0",)
    assert gpus_of(Needs(memory_bytes=3 * GB), devices, {"GPU-0": 14 * GB}, apart_from={"GPU-1"}) == ("GPU-1",)


def test_headroom_and_what_others_hold_is_not_given() -> None:
    device = a_device(0, free_gb=10, total_gb=16, headroom_bytes=2 * GB)
    assert gpus_of(Needs(memory_bytes=8 * GB), [device]) == ("GPU-0",)
    said = gpus_of(Needs(memory_bytes=8 * GB + 1), [device])
    assert "6,000 MB are held by others and 2,000 MB are kept free" in said


@pytest.mark.parametrize(
    ("needs", "why"),
    [
        (Needs(n_gpu=5), "it asks for 5 GPUs, and this machine has 4 (0, 1, 2 and 3)."),
        (Needs(gpu_idx=(1, 4, 7)), "it asks for GPUs 4 and 7, and this machine has 4 (0, 1, 2 and 3)."),
        (Needs(gpu_idx=(-1,)), "it asks for GPU -1, and this machine has 4 (0, 1, 2 and 3)."),
    ],
)
def test_what_is_not_there_is_told_with_what_is(needs: Needs, why: str) -> None:
    for cpu_fallback in (False, True) if needs.gpu_idx else (False,):
        found = place(needs, FOUR, {}, cpu_fallback=cpu_fallback)
        assert isinstance(found, NoRoom)
        assert found.text == f"{why} Change gpu_idx or n_gpu."
        assert found.for_ever


@pytest.mark.parametrize(
    ("needs", "result"),
    [
        (Needs(), None),
        (Needs(n_gpu=0), ()),
        (Needs(n_gpu=1), "it asks for 1 GPU, and this machine has none. Change gpu_idx or n_gpu."),
        (Needs(gpu_idx=(0,)), "it asks for GPU 0, and this machine has none. Change gpu_idx or n_gpu."),
    ],
)
def test_without_gpus(needs: Needs, result: Any) -> None:
    assert gpus_of(needs, []) == result


def test_on_the_cpu_it_is_the_machines_memory_that_counts() -> None:
    needs = Needs(memory_bytes=5 * GB)
    assert place(needs, [the_ram(8)], {RAM: 3 * GB}) == Placement(gpu_uuids=None, memory={RAM: 5 * GB})
    found = place(needs, [the_ram(8, headroom_bytes=GB, holders=("big-rep0",), own=("big-rep0",))], {RAM: 3 * GB})
    assert isinstance(found, NoRoom)
    assert not found.for_ever
    assert found.text == (
        "it needs about 5,000 MB, but the machine's memory has 4,000 MB of 8,000 MB free: 3,000 MB are given to models "
        "(big-rep0) and 1,000 MB are kept free. End big-rep0. Lower ram_headroom. Set `memory` of the launch, if it "
        "takes less than is estimated."
    )


def test_gpus_without_room_are_no_reason_for_the_cpu_unless_that_is_allowed() -> None:
    devices, needs = [a_device(0, 4), the_ram(64)], Needs(memory_bytes=8 * GB)
    assert isinstance(place(needs, devices, {}), NoRoom)
    allowed = place(needs, devices, {}, cpu_fallback=True)
    assert allowed == Placement(gpu_uuids=(), memory={RAM: 8 * GB})
    neither = place(needs, [a_device(0, 4), the_ram(6)], {}, cpu_fallback=True)
    assert isinstance(neither, NoRoom)
    assert "GPU 0 has 4,000 MB" in neither.text
    assert "the machine's memory has 6,000 MB" in neither.text


def test_a_refusal_says_what_would_make_it_fit() -> None:
    attention, cache = (Attention(layers=10, key=1000, value=1000),), Cache(tokens=100_000)
    kv_bytes = kv_cache_bytes(attention, cache)
    needs = Needs(
        memory_bytes=9 * GB + kv_bytes,
        cache=cache,
        attention=attention,
        lighter={"7B q8_0": 12 * GB, "7B q4_0": 8 * GB},
    )
    found = place(needs, [a_device(0, 10, holders=("train (pid 7)",)), a_device(1, 8)], {})
    assert isinstance(found, NoRoom)
    assert found.remedies == (
        "Lower context_length: up to 25,000 tokens of each request fit.",
        "Take another spec of the family: 7B q4_0.",
        "Say n_gpu 2: the emptiest 2 GPUs have room for one copy.",
        "End train (pid 7).",
        "Set `memory` of the launch, if it takes less than is estimated.",
    )


def test_an_engine_that_chooses_sees_all_gpus_unless_the_launch_says_more() -> None:
    needs = Needs(chooses=True)
    assert place(needs, FOUR, {}) == Placement()
    assert gpus_of(msgspec.structs.replace(needs, n_gpu=1), FOUR) == ("GPU-2",)
    assert gpus_of(msgspec.structs.replace(needs, memory_bytes=5 * GB), FOUR) == ("GPU-1",)


@pytest.mark.parametrize(
    ("named", "gpu_idx"),
    [("1,3", (1, 3)), ("2", (2,)), ("", ()), ("GPU-1", None), ("1,", None), (None, None)],
)
def test_a_launchs_own_variable_names_its_gpus(named: str | None, gpu_idx: tuple[int, ...] | None) -> None:
    launch = a_launch(envs={} if named is None else {"CUDA_VISIBLE_DEVICES": named})
    assert needs_of(launch, Needs(), 0).gpu_idx == gpu_idx
    launch = a_launch(envs={"CUDA_VISIBLE_DEVICES": "0"}, n_gpu=2)
    assert needs_of(launch, Needs(n_gpu=2), 0).gpu_idx is None


def test_a_share_that_is_too_small_for_the_model_is_told() -> None:
    said = gpus_of(Needs(memory_bytes=9 * GB, gpu_share=0.5), FOUR)
    assert said.startswith("it needs about 9,000 MB on a GPU, and may take 50% of a GPU: GPU 0 has ")
    assert gpus_of(Needs(memory_bytes=9 * GB, gpu_share=0.5, can_spread=True), FOUR) == ("GPU-1", "GPU-2")


def test_a_shorter_context_is_no_advice_where_the_cache_would_stay_as_large() -> None:
    attention, cache = (Attention(layers=10, key=1000, value=1000),), Cache(tokens=50_000, sequences=2)
    needs = Needs(memory_bytes=9 * GB, cache=cache, attention=attention)
    for tokens, is_said in ((0, True), (100_000, False)):
        found = place(msgspec.structs.replace(needs, cache_tokens=tokens), [a_device(0, 8)], {})
        assert isinstance(found, NoRoom)
        assert ("Lower context_length" in found.text) is is_said


def test_bytes_that_came_lately_are_not_for_ever() -> None:
    device = a_device(0, free_gb=4, passing_bytes=12 * GB)
    found = place(Needs(memory_bytes=8 * GB), [device], {})
    assert isinstance(found, NoRoom)
    assert not found.for_ever


def test_a_gpu_is_found_by_its_index_wherever_it_is_in_the_list() -> None:
    assert gpus_of(Needs(gpu_idx=(5,)), [a_device(7), a_device(5)]) == ("GPU-5",)


def test_slices_hold_models_of_their_own_and_are_not_joined() -> None:
    devices = [a_device(1, 40, 40), a_slice(2, 0, 10), a_slice(3, 0, 20)]
    assert gpus_of(Needs(memory_bytes=8 * GB), devices) == ("MIG-2",)
    assert gpus_of(Needs(memory_bytes=18 * GB), devices) == ("MIG-3",)
    assert gpus_of(Needs(gpu_idx=(3,), memory_bytes=1), devices) == ("MIG-3",)
    assert "GPU 0 is cut into slices" in gpus_of(Needs(gpu_idx=(0,)), devices)
    assert (
        "it asks for 2 GPUs, and this machine has 1 (1) and 2 slices of GPUs (2 and 3), which cannot be joined."
        in gpus_of(Needs(n_gpu=2), devices)
    )
    assert "about 60,000 MB, but GPU 1 has" in gpus_of(Needs(memory_bytes=60 * GB, can_spread=True), devices)


def test_a_gpu_that_does_not_tell_its_memory_takes_what_comes() -> None:
    silent = a_device(0, 0, 0)
    assert gpus_of(Needs(memory_bytes=500 * GB), [silent]) == ("GPU-0",)
    assert gpus_of(Needs(memory_bytes=5 * GB), [silent, a_device(1, 10)]) == ("GPU-1",)


def test_the_gpus_of_this_machine_can_be_placed_on() -> None:
    gpus = list_gpus()  # none where there is no driver
    devices = [Device(key=gpu.uuid, total_bytes=gpu.total_bytes, gpu=gpu) for gpu in gpus]
    placement = place(Needs(n_gpu=len(gpus)), devices, {})
    assert isinstance(placement, Placement)
    assert sorted(placement.gpu_uuids or ()) == sorted(gpu.uuid for gpu in gpus)


# --- whatever is asked of whatever machine

amounts = st.integers(0, 40)


@st.composite
def machines(draw: st.DrawFn) -> list[Device]:
    devices = []
    for index in range(draw(st.integers(0, 5))):
        total = draw(amounts)
        of = draw(st.sampled_from([None, None, 0]))
        gpu = Gpu(index=index + 3, uuid=f"U{index}", name="a", total_bytes=total, used_bytes=0, slice_of=of)
        foreign = draw(st.integers(0, total))
        devices.append(
            Device(
                key=gpu.uuid,
                total_bytes=total,
                foreign_bytes=foreign,
                passing_bytes=draw(st.integers(0, foreign)),
                headroom_bytes=draw(st.integers(0, 5)),
                gpu=gpu,
            )
        )
    ram = Device(key=RAM, total_bytes=draw(amounts), foreign_bytes=draw(st.integers(0, 5)), headroom_bytes=1)
    return [*devices, *draw(st.sampled_from([[ram], []]))]


wishes = st.builds(
    Needs,
    gpu_idx=st.none() | st.none() | st.lists(st.integers(3, 9), max_size=3, unique=True).map(tuple),
    n_gpu=st.none() | st.integers(0, 4),
    memory_bytes=amounts,
    gpu_share=st.none() | st.none() | st.floats(0.01, 1),
    can_spread=st.booleans(),
    gpu_counts=st.sampled_from([(), (2, 4)]),
)


@given(machines(), wishes, st.dictionaries(st.sampled_from(["U0", "U1", "U2", RAM]), amounts), st.booleans())
def test_no_device_gives_more_than_it_has_and_wishes_are_kept(
    devices: list[Device], needs: Needs, promised: dict[str, int], cpu_fallback: bool
) -> None:
    found = place(needs, devices, promised, cpu_fallback=cpu_fallback)
    lasting = [msgspec.structs.replace(d, foreign_bytes=d.foreign_bytes - d.passing_bytes) for d in devices]
    at_best = place(needs, lasting, {}, cpu_fallback=cpu_fallback)
    if isinstance(found, NoRoom):
        assert found.for_ever == isinstance(at_best, NoRoom)
        assert found.text
        return
    assert isinstance(at_best, Placement)  # what fits beside others fits alone
    by_key = {device.key: device for device in devices}
    for key, share in found.memory.items():
        device = by_key.get(key)
        if device and device.total_bytes and share:
            taken = promised.get(key, 0) + share
            assert taken <= device.total_bytes - device.headroom_bytes - device.foreign_bytes
    if found.gpu_uuids:
        got = [by_key[uuid].gpu for uuid in found.gpu_uuids]
        assert set(found.memory) == set(found.gpu_uuids)
        assert needs.gpu_share or sum(found.memory.values()) >= needs.memory_bytes
        assert len(set(found.gpu_uuids)) == len(got)
        if needs.gpu_idx is not None:
            assert tuple(gpu.index for gpu in got if gpu) == needs.gpu_idx
        elif needs.n_gpu is not None:
            assert len(got) == needs.n_gpu
        else:
            assert len(got) == 1 or (needs.can_spread and len(got) in (needs.gpu_counts or range(2, 9)))
        if needs.gpu_idx is None and len(got) > 1:
            assert not any(gpu and gpu.slice_of is not None for gpu in got)
    else:
        has_gpus = any(device.gpu for device in devices)
        asked_for = needs.n_gpu == 0 or needs.gpu_idx == () or not has_gpus
        assert asked_for or (cpu_fallback and needs.gpu_idx is None)


# --- sentences

OURS = ("big-rep0 (3,000 MB)", "old-rep1 (1,000 MB)")
FOREIGN, UNKNOWN = "process 7, train.py (9,000 MB)", "process 9, of another container or user (1,000 MB)"
MACHINES = {
    "no GPU": [the_ram(8)],
    "no GPU, and little memory": [the_ram(8, headroom_bytes=GB, holders=OURS[:1], own=OURS)],
    "a limit of ours": [the_ram(8, limit="ram_limit")],
    "a limit of others": [the_ram(8, limit="the limit of our control group")],
    "an empty GPU": [a_device(0, 16), the_ram(64)],
    "a foreign process": [a_device(0, 4, holders=(FOREIGN,)), the_ram(6)],
    "headroom": [a_device(0, 10, headroom_bytes=4 * GB, holders=(*OURS, FOREIGN), own=OURS), the_ram(6)],
    "two GPUs": [a_device(0, 4, holders=(FOREIGN,)), a_device(1, 8, holders=(UNKNOWN,)), the_ram(6)],
    "one that does not tell": [a_device(0, 0, 0), a_device(1, 8), the_ram(6)],
    "slices": [a_device(1, 40, 40), a_slice(2, 0, 10), a_slice(3, 0, 20), the_ram(6)],
    "a slice": [a_slice(2, 0, 10), the_ram(6)],
}
WISHES: list[dict[str, Any]] = [
    *({"n_gpu": count} for count in (None, 0, 1, 2, 5)),
    *({"gpu_idx": indexes} for indexes in ((), (0,), (0, 1), (4,), (4, 7))),
]


def all_needs() -> list[Needs]:
    cache, attention = Cache(tokens=100_000), (Attention(layers=10, key=1000, value=1000),)
    lighter = {"7B q8_0": 12 * GB, "7B q4_0": 3 * GB, "7B q3": 2 * GB}
    long = Needs(memory_bytes=13 * GB, cache=cache, attention=attention, lighter=lighter)
    plain = [
        Needs(memory_bytes=size * GB, gpu_share=share, can_spread=can_spread)
        for size in (0, 12, 200)
        for share in (None, 0.5, 0.9)
        for can_spread in (False, True)
    ]
    return [*plain, long, of_layers(), of_layers(may_split=True), of_layers(gpu_layers=3), a_long_one()]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_a_refusal_is_made_of_whole_sentences(machine: str, wish: dict[str, Any]) -> None:
    for needs in (msgspec.structs.replace(one, **wish) for one in all_needs()):
        for cpu_fallback in (False, True):
            for promised in ({}, {"GPU-0": 3 * GB, RAM: 3 * GB}):
                found = place(needs, MACHINES[machine], promised, cpu_fallback=cpu_fallback)
                if isinstance(found, NoRoom):
                    assert_clause(found.reason)
                    assert_sentences(found.text)
                    for remedy in found.remedies:
                        assert_sentences(remedy)


@pytest.mark.parametrize("machine", MACHINES)
def test_what_keeps_one_asleep_is_told_in_whole_sentences(machine: str) -> None:
    for memory in ({"GPU-0": 60 * GB}, {"GPU-0": 60 * GB, "GPU-9": GB}, {"GPU-0": 60 * GB, RAM: 90 * GB}):
        found = regain(Placement(gpu_uuids=("GPU-0",), memory=memory), MACHINES[machine], {"GPU-0": GB})
        if isinstance(found, NoRoom):
            assert found.reason.startswith("to wake, it needs ")
            assert_sentences(found.text)


def test_only_what_would_make_it_fit_is_advised() -> None:
    full = [a_device(0, 4, holders=(FOREIGN,))]
    assert f"End {FOREIGN}." in gpus_of(Needs(memory_bytes=12 * GB), full)
    assert "End " not in gpus_of(Needs(memory_bytes=20 * GB), full)
    assert "n_gpu_layers" not in gpus_of(of_layers(), [the_ram(4)])
    assert "Let it take more" in gpus_of(Needs(memory_bytes=9 * GB, gpu_share=0.5), full)
    assert "Let it take" not in gpus_of(Needs(memory_bytes=20 * GB, gpu_share=0.5), full)
    assert "Let it take less" in gpus_of(Needs(memory_bytes=3 * GB, gpu_share=0.5), full)


def test_models_of_ours_are_named_where_their_room_counts_and_never_among_the_others() -> None:
    device = a_device(0, 10, holders=(OURS[0], FOREIGN), own=OURS)
    said = gpus_of(Needs(memory_bytes=12 * GB), [device], {"GPU-0": 3 * GB})
    assert f"3,000 MB are given to models ({OURS[0]}) and 6,000 MB are held by others ({FOREIGN})." in said
    assert f"End {OURS[0]} or {FOREIGN}." in said
    said = gpus_of(Needs(memory_bytes=12 * GB), [device])
    assert OURS[0] not in said
    assert f"End {FOREIGN}." in said


def test_the_machines_memory_has_no_share() -> None:
    said = gpus_of(Needs(memory_bytes=9 * GB, gpu_share=0.5), [the_ram(4)])
    assert said.startswith("it needs about 9,000 MB, but the machine's memory has 4,000 MB of 4,000 MB free.")
