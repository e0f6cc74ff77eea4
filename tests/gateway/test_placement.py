"""Which GPUs a replica gets, and the sentence if it gets none."""

from __future__ import annotations

import pytest

from engines.base import Needs, Placement
from gateway.gpus import Gpu, list_gpus
from gateway.placement import place


def a_gpu(index: int, free_gb: int = 10, total_gb: int = 16) -> Gpu:
    return Gpu(
        index=index,
        uuid=f"GPU-{index}",
        name="Test",
        total_bytes=total_gb * 10**9,
        used_bytes=(total_gb - free_gb) * 10**9,
    )


FOUR = [a_gpu(0, free_gb=2), a_gpu(1, free_gb=8), a_gpu(2, free_gb=16), a_gpu(3, free_gb=4)]


@pytest.mark.parametrize(
    ("needs", "gpu_uuids"),
    [
        (Needs(), None),
        (Needs(n_gpu=0), ()),
        (Needs(n_gpu=1), ("GPU-2",)),
        (Needs(n_gpu=2), ("GPU-2", "GPU-1")),
        (Needs(n_gpu=4), ("GPU-2", "GPU-1", "GPU-3", "GPU-0")),
        (Needs(gpu_idx=()), ()),
        (Needs(gpu_idx=(0,)), ("GPU-0",)),
        (Needs(gpu_idx=(3, 1)), ("GPU-3", "GPU-1")),
        (Needs(gpu_idx=(0,), n_gpu=1), ("GPU-0",)),
    ],
)
def test_a_replica_gets(needs: Needs, gpu_uuids: tuple[str, ...] | None) -> None:
    assert place(needs, FOUR) == Placement(gpu_uuids=gpu_uuids)


def test_the_freest_gpu_has_the_most_bytes_free_and_not_the_least_used() -> None:
    nearly_empty_small = a_gpu(0, free_gb=7, total_gb=8)
    half_empty_large = a_gpu(1, free_gb=40, total_gb=80)
    assert place(Needs(n_gpu=1), [nearly_empty_small, half_empty_large]) == Placement(gpu_uuids=("GPU-1",))


@pytest.mark.parametrize(
    ("needs", "why"),
    [
        (Needs(n_gpu=5), "it asks for 5 GPUs, and this machine has 4 (0, 1, 2, 3)"),
        (Needs(gpu_idx=(1, 4, 7)), "it asks for GPU 4, 7, and this machine has 4 (0, 1, 2, 3)"),
        (Needs(gpu_idx=(-1,)), "it asks for GPU -1, and this machine has 4 (0, 1, 2, 3)"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(needs: Needs, why: str) -> None:
    assert place(needs, FOUR) == why


@pytest.mark.parametrize(
    ("needs", "result"),
    [
        (Needs(), Placement(gpu_uuids=None)),
        (Needs(n_gpu=0), Placement(gpu_uuids=())),
        (Needs(n_gpu=1), "it asks for 1 GPUs, and this machine has none"),
        (Needs(gpu_idx=(0,)), "it asks for GPU 0, and this machine has none"),
    ],
)
def test_without_gpus(needs: Needs, result: Placement | str) -> None:
    assert place(needs, []) == result


def test_a_gpu_is_found_by_its_index_wherever_it_is_in_the_list() -> None:
    assert place(Needs(gpu_idx=(5,)), [a_gpu(7), a_gpu(5)]) == Placement(gpu_uuids=("GPU-5",))


def test_the_gpus_of_this_machine_can_be_placed_on() -> None:
    gpus = list_gpus()  # none where there is no driver
    placement = place(Needs(n_gpu=len(gpus)), gpus)
    assert isinstance(placement, Placement)
    assert sorted(placement.gpu_uuids or ()) == sorted(gpu.uuid for gpu in gpus)
