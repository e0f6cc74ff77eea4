"""The GPUs as the driver tells of them, and a stranger that holds memory of one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import psutil

from gateway.gpus import Gpu, list_gpus

LOOK_S = 0.02
HOLDER_LIMIT_S = 30.0
# Needs no CUDA library but the driver's own. Ends when its stdin does.
HOLDER = """
import ctypes, sys
cuda, device, context, at = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
for call, *words in (
    (cuda.cuInit, 0),
    (cuda.cuDeviceGet, ctypes.byref(device), 0),
    (cuda.cuDevicePrimaryCtxRetain, ctypes.byref(context), device),
):
    if code := call(*words):
        sys.exit(f"CUDA error {code}")
if code := cuda.cuCtxSetCurrent(context) or cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(int(sys.argv[1]))):
    sys.exit(f"CUDA error {code}")
print("holds it", flush=True)
sys.stdin.read()
"""


def gpus() -> list[Gpu]:
    """All of them, with who holds what."""
    return [gpu for gpu in list_gpus(with_processes=True, environment={}) if gpu.slice_of is None]


def used_bytes(index: int = 0) -> int:
    """Of one GPU, by all."""
    return next(gpu.used_bytes for gpu in gpus() if gpu.index == index)


def held_by(pids: Collection[int]) -> int:
    """Bytes of all GPUs that these processes hold."""
    return sum(one.used_bytes or 0 for gpu in gpus() for one in gpu.processes if one.pid in pids)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        leader = psutil.Process(pid)
        return [pid, *(child.pid for child in leader.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.asynccontextmanager
async def stranger(size: int, index: int = 0) -> AsyncIterator[int]:
    """For the length of the block a process that is none of the gateway's holds so many bytes of a GPU; its pid."""
    uuid = next(gpu.uuid for gpu in gpus() if gpu.index == index)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, str(size)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": uuid},
    )
    try:
        assert process.stdout
        line = await asyncio.wait_for(process.stdout.readline(), HOLDER_LIMIT_S)
        if line.strip() != b"holds it":
            raise RuntimeError(f"the stranger could not take {size} bytes of GPU {index}")
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def until(condition: Callable[[], Any], limit_s: float) -> float | None:
    """Seconds until it is true, or None if it is not within the limit."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit_s:
            return None
        await asyncio.sleep(LOOK_S)
    return time.monotonic() - began
