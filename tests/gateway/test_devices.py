"""What each device has, what others than our engines hold of it, and machines that are made up."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from nvml import Driver

from engines.base import RAM
from gateway import devices
from gateway.config import Settings
from gateway.devices import (
    SILENT_GPUS,
    SILENT_PROCESSES,
    Held,
    Limits,
    Observer,
    Seen,
    SimulatedMachine,
    devices_of,
    limits_of,
    look_here,
    machine_of,
)
from gateway.footprint import Footprint, families, footprint
from gateway.gpus import Gpu, GpuProcess, list_gpus
from gateway.placement import Device
from gateway.question import Question

GB = 10**9
OURS, CHILD, OTHER = 100, 101, 200


def a_gpu(used_gb: float, **processes: float | None) -> Gpu:
    """Processes are given as pN=gigabytes."""
    listed = (
        GpuProcess(pid=int(name[1:]), used_bytes=None if size is None else round(size * GB))
        for name, size in processes.items()
    )
    return Gpu(
        index=0, uuid="U0", name="a", total_bytes=80 * GB, used_bytes=round(used_gb * GB), processes=tuple(listed)
    )


def seen(gpu: Gpu, **more: Any) -> Seen:
    names = dict.fromkeys((OURS, CHILD, OTHER), "python")
    return Seen(gpus=(gpu,), families={OURS: OURS, CHILD: OURS}, names=names, ram_total_bytes=64 * GB, **more)


def of_gpu(look: Seen, *held: Held, **limits: int) -> Device:
    return devices_of(look, held, Limits(**limits))[0]


MINE = Held(name="mine-rep0", pid=OURS, memory={"U0": 20 * GB})


@pytest.mark.parametrize(
    ("gpu", "held", "foreign_gb"),
    [
        (a_gpu(0.6), (), 0.6),  # the driver's own
        (a_gpu(30, p200=29), (), 30),
        (a_gpu(50, p200=29, p101=19), (MINE,), 31),
        (a_gpu(2, p101=1), (MINE,), 1),  # it is still loading
        (a_gpu(26, p100=1, p101=24), (MINE,), 6),  # it takes more than it was promised
        (a_gpu(25, p101=None), (MINE,), 5),  # the device does not tell
        (a_gpu(25, p7=24), (MINE,), 5),  # pids of another world
        (a_gpu(25), (MINE,), 5),  # processes are hidden
        (a_gpu(10), (MINE,), 0),
    ],
)
def test_foreign_is_what_our_engines_do_not_hold(gpu: Gpu, held: tuple[Held, ...], foreign_gb: float) -> None:
    assert of_gpu(seen(gpu), *held).foreign_bytes == round(foreign_gb * GB)


def test_who_holds_a_gpu_is_told_by_name() -> None:
    small = Held(name="small-rep0", pid=None, memory={"U0": GB})
    device = of_gpu(seen(a_gpu(50, p200=29, p101=19, p9=1)), MINE, small, gpu_headroom=GB)
    assert device.holders == (
        "process 200, python (29,000 MB)",
        "mine-rep0 (20,000 MB)",
        "small-rep0 (1,000 MB)",
        "process 9, of another container or user (1,000 MB)",
    )
    assert device.headroom_bytes == GB


def test_mapped_files_of_an_engine_count_as_its_own_once() -> None:
    held = Held(name="mine-rep0", pid=OURS, memory={RAM: 8 * GB})
    mapped = Footprint(own_bytes=2 * GB, file_bytes=6 * GB)  # what maps a file does not use it up
    ram = devices_of(seen(a_gpu(0), ram_used_bytes=5 * GB, footprints={OURS: mapped}), (held,), Limits())[-1]
    assert (ram.key, ram.foreign_bytes) == (RAM, 3 * GB)
    assert ram.free({RAM: 8 * GB}) == (64 - 3 - 8) * GB


@pytest.mark.parametrize(
    ("limits", "total_gb", "free_gb"),
    [
        (Limits(), 64, 54),
        (Limits(ram_headroom=4 * GB), 64, 50),
        (Limits(ram_headroom=4 * GB, ram_limit=30 * GB), 30, 30),
        (Limits(ram_headroom=4 * GB, ram_limit=60 * GB), 64, 50),  # others hold so much that the limit is no more
    ],
)
def test_engines_get_what_a_site_allows(limits: Limits, total_gb: int, free_gb: int) -> None:
    ram = devices_of(seen(a_gpu(0), ram_used_bytes=10 * GB), (), limits)[-1]
    assert (ram.total_bytes, ram.free({})) == (total_gb * GB, free_gb * GB)


async def test_bytes_that_appear_are_passing_until_they_have_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    used = 1.0

    def look(leaders: Collection[int]) -> Seen:
        return seen(a_gpu(used))

    now = 100.0
    monkeypatch.setattr(devices.time, "monotonic", lambda: now)
    observer = Observer(look)

    async def passing() -> int:
        return (await observer.observe((), Limits()))[0].passing_bytes // GB

    assert await passing() == 0
    used, now = 21.0, 160.0
    assert await passing() == 20
    now = 164.0
    assert await passing() == 20
    now = 166.0
    assert await passing() == 0
    used = 1.0
    assert await passing() == 0


async def test_engines_that_take_more_than_they_were_promised_leave_less_of_the_limit() -> None:
    held = Held(name="mine-rep0", pid=OURS, memory={RAM: 8 * GB})
    look = seen(a_gpu(0), ram_used_bytes=20 * GB, footprints={OURS: Footprint(own_bytes=11 * GB)})
    ram = devices_of(look, (held,), Limits(ram_limit=30 * GB))[-1]
    assert ram.free({RAM: 8 * GB}) == (30 - 11) * GB


# --- this machine


async def test_a_driver_that_knows_our_engines_child_and_a_stranger() -> None:
    """The whole way from what a driver tells of real processes."""
    child = "import subprocess,sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    process = subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        [worker] = (pid for pid in families({process.pid}) if pid != process.pid)
        holding = {worker: 12 * GB, os.getpid(): 5 * GB}
        driver = Driver({"uuid": "U0", "total": 80 * GB, "used": 18 * GB, "processes": holding})
        observer = Observer(partial(look_here, partial(list_gpus, nvml=driver, environment={})))
        gpu, _ = await observer.observe([Held(name="mine-rep0", pid=process.pid, memory={"U0": 20 * GB})], Limits())
    finally:
        process.communicate("\n", timeout=10)
    assert gpu.foreign_bytes == 6 * GB
    assert gpu.free({"U0": 20 * GB}) == 54 * GB
    assert [holder.partition(",")[0] for holder in gpu.holders] == ["mine-rep0 (20", f"process {os.getpid()}"]


HOLDER = """
import ctypes, sys
cuda, device, context, at = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
assert cuda.cuInit(0) == 0
assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
assert cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(int(sys.argv[1]))) == 0
print("up", flush=True)
input()
"""


@pytest.mark.skipif(not list_gpus(), reason="there is no NVIDIA GPU here")
async def test_a_real_gpu_tells_our_bytes_from_a_strangers() -> None:
    gpu = next(gpu for gpu in list_gpus() if gpu.slice_of is None)
    observer = Observer(partial(look_here, list_gpus))
    before, *_ = await observer.observe((), Limits())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu.uuid},
        )
        for size in (2 * GB, 3 * GB)
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "up\n"
        held = Held(name="mine-rep0", pid=processes[0].pid, memory={gpu.uuid: 4 * GB})
        after, *_ = await observer.observe([held], Limits())
    finally:
        for process in processes:
            process.communicate("\n", timeout=10)
    assert after.key == gpu.uuid
    assert 3 * GB <= after.foreign_bytes - before.foreign_bytes < 4.5 * GB  # its context comes on top
    assert any(holder.startswith(f"process {processes[1].pid}, python") for holder in after.holders)


def test_an_engines_memory_is_that_of_all_its_processes(tmp_path: Path) -> None:
    """A leader and its child, which holds 60 MB of its own and maps a file of 40 MB."""
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(40_000_000))
    child = (
        "import mmap,sys; held = bytearray(60_000_000); f = open(sys.argv[1], 'rb'); "
        "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); sum(m[::4096]); print('up', flush=True); input()"
    )
    leader = f"import subprocess,sys; subprocess.run([sys.executable, '-c', {child!r}, {str(file)!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", leader], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        found = families({process.pid, os.getpid()})
        members = [pid for pid, leader in found.items() if leader == process.pid]
        assert len(members) == 2
        took = footprint(members)
        assert 60_000_000 < took.own_bytes < 120_000_000
        assert 40_000_000 < took.file_bytes < 80_000_000
        assert took.peak_bytes >= took.total_bytes
    finally:
        process.communicate("\n", timeout=10)
    assert footprint(members) == Footprint()


async def test_this_machine_is_seen() -> None:
    devices = await Observer(partial(look_here, lambda **_: [])).observe([Held(name="me", pid=os.getpid())], Limits())
    [ram] = devices
    assert ram.key == RAM
    assert 0 < ram.foreign_bytes < ram.total_bytes


def test_a_limit_of_the_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = mmap.PAGESIZE
    own = tmp_path / "own"
    own.write_text("12:cpu:/x\n0::/b/a\n")
    group = tmp_path / "cg" / "b" / "a"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text(f"{page * 1000}\n")
    for folder in (group, group.parent):
        (folder / "memory.current").write_text(f"{page * 600}\n")
        (folder / "memory.stat").write_text(
            f"anon 5\ninactive_file {page * 100}\nactive_file {page * 50}\nslab_reclaimable {page}\n"
        )
    groups = devices._control_groups(tmp_path / "cg", own)
    assert [folder for folder, _ in groups] == [group, group.parent]
    monkeypatch.setattr(devices, "_control_groups", lambda: groups)
    assert devices._ram() == (page * 1000, page * 449, "the limit of our control group")


def test_the_control_group_that_has_least_left_counts_and_the_machine_where_it_has_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("memory.max", "memory.current", "")
    for name, most, now in (("own", 4 * GB, GB), ("above", 8 * GB, 7 * GB)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.max").write_text(str(most))
        (tmp_path / name / "memory.current").write_text(str(now))
    monkeypatch.setattr(devices, "_control_groups", lambda: [(tmp_path / name, names) for name in ("own", "above")])
    machine = SimpleNamespace(total=64 * GB, available=32 * GB)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: machine)
    assert devices._ram() == (8 * GB, 7 * GB, "the limit of our control group")
    machine.available = GB // 2
    assert devices._ram() == (64 * GB, 64 * GB - GB // 2, "")


@pytest.mark.parametrize(("total", "kept"), [(2 * GB, GB // 5), (64 * GB, 2**30)])
def test_a_small_machine_keeps_a_tenth_free_unless_it_is_said(total: int, kept: int) -> None:
    seen = Seen(ram_total_bytes=total)
    assert devices_of(seen, (), limits_of(Settings()))[-1].headroom_bytes == kept
    assert devices_of(seen, (), limits_of(Settings(ram_headroom="1GiB")))[-1].headroom_bytes == 2**30


# --- made-up machines


def test_a_made_up_machine_is_seen_like_a_real_one() -> None:
    machine = msgspec.convert(
        {
            "gpus": [
                {"total": "80GB", "processes": [{"name": "train.py", "used": "30GB"}]},
                {"total": "40GB", "slices": ["10GB", "20GB"]},
                {"total": "80GB", "count": 2},
            ],
            "ram": "512GB",
            "ram_used": "12GB",
        },
        SimulatedMachine,
    )
    found = asyncio.run(Observer(machine.look).observe([Held(name="a", memory={"GPU-2": GB})], Limits(gpu_headroom=GB)))
    assert [(device.name, device.free({"GPU-2": GB}) // GB) for device in found] == [
        ("GPU 0", 49),
        ("GPU 2", 78),
        ("GPU 3", 79),
        ("GPU 4", 9),
        ("GPU 5", 19),
        ("the machine's memory", 500),
    ]
    assert found[0].holders == ("process 1, train.py (30,000 MB)",)
    assert found[1].holders == ("a (1,000 MB)",)


def test_a_machine_is_told_in_a_word() -> None:
    totals = [gpu.total_bytes for gpu in machine_of("2x24GiB, 80GB").look(()).gpus]
    assert totals == [24 * 2**30, 24 * 2**30, 80 * GB]
    with pytest.raises(ValueError, match="is no size"):
        machine_of("8xlarge")


class HangingDriver(Driver):
    """It hangs for as long as it is told to."""

    def __init__(self, *gpus: dict[str, Any]) -> None:
        super().__init__(*gpus)
        self.answers = threading.Event()
        self.answers.set()
        self.asked = 0

    def nvmlDeviceGetCount(self) -> int:
        self.asked += 1
        self.answers.wait(60)
        return super().nvmlDeviceGetCount()


async def test_a_driver_that_hangs_holds_up_one_thread_and_nothing_else() -> None:
    driver = HangingDriver({"uuid": "U0", "total": 80 * GB, "used": 5 * GB})
    asking = Question(partial(list_gpus, nvml=driver, environment={}), limit_s=0.3)
    said: list[tuple[str, str]] = []
    observer = Observer(partial(look_here, asking), tell=lambda kind, text: said.append((kind, text)))
    gpu, ram = await observer.observe((), Limits())
    assert (gpu.free({}), observer.silence, said) == (75 * GB, None, [])
    driver.answers.clear()
    threads, began = threading.active_count(), time.monotonic()
    try:
        for _ in range(20):
            gpu, ram = await observer.observe((), Limits())
            assert observer.silence == SILENT_GPUS
            assert await observer.has_gpus((), Limits())
        assert time.monotonic() - began < 3  # only the first waits
        assert gpu.free({}) == 75 * GB  # as it was seen last
        assert 0 < ram.foreign_bytes < ram.total_bytes
        assert threading.active_count() <= threads + 2
        assert driver.asked == 2
    finally:
        driver.answers.set()
    async with asyncio.timeout(10):
        while observer.silence:
            await observer.observe((), Limits())
    assert [kind for kind, _ in said] == ["ERROR", "INFO"]


async def test_gpus_that_were_never_seen_are_there_if_their_driver_hangs() -> None:
    driver = HangingDriver({"uuid": "U0", "total": 80 * GB})
    driver.answers.clear()
    observer = Observer(partial(look_here, Question(partial(list_gpus, nvml=driver), limit_s=0.1)))
    try:
        assert await observer.has_gpus((), Limits())
    finally:
        driver.answers.set()


async def test_a_look_at_the_processes_that_hangs_leaves_the_machines_memory() -> None:
    goes_on = threading.Event()

    def look(leaders: Collection[int]) -> Seen:
        goes_on.wait(60)
        return seen(a_gpu(0))

    observer = Observer(look, limit_s=0.2)
    try:
        [ram] = await observer.observe((), Limits())
        assert observer.silence == SILENT_PROCESSES
        assert 0 < ram.free({}) < ram.total_bytes
    finally:
        goes_on.set()
    async with asyncio.timeout(10):
        while observer.silence:
            devices = await observer.observe((), Limits())
    assert len(devices) == 2


def test_a_question_raises_what_it_raises_and_can_be_asked_again() -> None:
    def ask(what: str) -> str:
        if what == "bad":
            raise TimeoutError("its own")
        return what

    question = Question(ask, limit_s=5)
    with pytest.raises(TimeoutError, match="its own"):
        question("bad")
    assert question("good") == "good"
