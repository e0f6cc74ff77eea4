"""The GPUs, as a driver tells them: whole ones, slices, those that tell little, and those that may be used."""

from __future__ import annotations

from typing import Any

import pytest
from nvml import Driver, NVMLError

from gateway.gpus import Gpu, GpuProcess, list_gpus

GB = 10**9


def a_card(number: int, **more: Any) -> dict[str, Any]:
    return {"uuid": f"GPU-{number}", "total": 80 * GB, **more}


def test_a_driver_tells_of_gpus_and_who_holds_them() -> None:
    driver = Driver(a_card(0, used=9 * GB, processes={7: 8 * GB, 8: None}), {"uuid": "GPU-1"})
    assert list_gpus(with_processes=True, nvml=driver, environment={}) == [
        Gpu(
            index=0,
            uuid="GPU-0",
            name="Test",
            total_bytes=80 * GB,
            used_bytes=9 * GB,
            processes=(GpuProcess(pid=7, used_bytes=8 * GB), GpuProcess(pid=8, used_bytes=None)),
        ),
        Gpu(index=1, uuid="GPU-1", name="Test", total_bytes=0, used_bytes=0),  # it tells nothing
    ]
    assert not driver.is_open


def test_slices_stand_for_the_gpu_that_is_cut_into_them() -> None:
    slices = {0: {"uuid": "MIG-a", "total": 10 * GB}, 3: {"uuid": "MIG-b", "total": 20 * GB, "processes": {9: GB}}}
    driver = Driver(a_card(0, slices=None), a_card(1, slices=slices), a_card(2))
    seen = list_gpus(with_processes=True, nvml=driver, environment={})
    assert [(gpu.index, gpu.uuid, gpu.slice_of, gpu.total_bytes) for gpu in seen] == [
        (0, "GPU-0", None, 80 * GB),
        (2, "GPU-2", None, 80 * GB),
        (3, "MIG-a", 1, 10 * GB),
        (4, "MIG-b", 1, 20 * GB),
    ]
    assert seen[-1].processes == (GpuProcess(pid=9, used_bytes=GB),)


@pytest.mark.parametrize(
    ("named", "indexes"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [0, 2]),
        ("GPU-1", [1]),
        ("1,9,0", [1]),  # CUDA stops at what is not there
        ("NoDevFiles", []),
    ],
)
def test_only_gpus_that_the_environment_names_are_there(named: str | None, indexes: list[int]) -> None:
    environment = {} if named is None else {"CUDA_VISIBLE_DEVICES": named}
    seen = list_gpus(nvml=Driver(*map(a_card, range(3))), environment=environment)
    assert [gpu.index for gpu in seen] == indexes


def test_a_driver_that_fails_counts_as_none() -> None:
    class Broken(Driver):
        def nvmlDeviceGetCount(self) -> int:
            raise NVMLError("Driver/library version mismatch")

    assert list_gpus(nvml=Broken(), environment={}) == []
