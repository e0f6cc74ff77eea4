"""The GPUs as NVML sees them now. The only file that imports pynvml; no driver gives an empty list."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import msgspec

from gateway.question import NoAnswer, Question

logger = logging.getLogger("hostler.gpus")

LIMIT_S = 5.0  # a driver answers within milliseconds


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds memory of a device; `used_bytes` is None where the device does not tell."""

    pid: int
    used_bytes: int | None


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One device as observed. Memory in bytes, 0 where the device does not tell; `processes` if they were asked for.

    `slice_of` is the index of the GPU that it is a slice of, if it is one. Pids are those of the machine: within a
    container they may be unknown.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    processes: tuple[GpuProcess, ...] = ()
    slice_of: int | None = None


def list_gpus(
    *, with_processes: bool = False, nvml: Any = None, environment: Mapping[str, str] = os.environ
) -> list[Gpu]:
    """All GPUs that the environment lets us see, asked now; empty where there is no driver or no device.

    A GPU that is cut into slices is not among them, its slices are: their indexes come after those of all GPUs. May
    take some milliseconds.

    Args:
        nvml: what to ask, with the functions of pynvml.
        environment: CUDA_VISIBLE_DEVICES in it names those that may be used.
    """
    if nvml is None:
        if not _has_driver():
            return []
        nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        gpus = _observe_all(nvml, with_processes)
    except nvml.NVMLError as exc:
        logger.warning("NVML does not list the GPUs: %s", exc)
        return []
    finally:
        nvml.nvmlShutdown()
    return _visible(gpus, environment.get("CUDA_VISIBLE_DEVICES"))


def _has_driver() -> bool:
    """Whether there is the library that pynvml would load: it takes 2 MiB itself, so it waits for that."""
    if sys.platform != "linux":  # pynvml knows where it is there
        return True
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def cuda_version() -> str | None:
    """The newest CUDA that the driver knows, such as "12.8"; None without a driver, and while that hangs."""
    try:
        return _cuda_version()
    except NoAnswer:
        logger.error("NVML does not answer, so nobody knows which CUDA the driver has.")
        return None


@cache
def _ask_cuda_version() -> str | None:
    if not _has_driver():
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        version = pynvml.nvmlSystemGetCudaDriverVersion()
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return f"{version // 1000}.{version % 1000 // 10}"


_cuda_version = Question(_ask_cuda_version, limit_s=LIMIT_S)


def _observe_all(nvml: Any, with_processes: bool) -> list[Gpu]:
    count = nvml.nvmlDeviceGetCount()
    gpus: list[Gpu] = []
    slices: list[Gpu] = []
    for index in range(count):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if (parts := _slices(nvml, handle)) is None:
            gpus.append(_observe(nvml, handle, index, with_processes))
            continue
        for part in parts:
            seen = _observe(nvml, part, count + len(slices), with_processes)
            slices.append(msgspec.structs.replace(seen, slice_of=index))
    return gpus + slices


def _slices(nvml: Any, handle: Any) -> list[Any] | None:
    """The handles of a GPU's slices; None if it is whole."""
    try:
        if not nvml.nvmlDeviceGetMigMode(handle)[0]:
            return None
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except nvml.NVMLError:  # most GPUs cannot be cut
        return None
    found = []
    for number in range(count):
        with contextlib.suppress(nvml.NVMLError):  # a place where no slice is
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
    return found


def _observe(nvml: Any, handle: Any, index: int, with_processes: bool) -> Gpu:
    def ask(question: Callable[[Any], Any]) -> Any:
        try:
            return question(handle)
        except nvml.NVMLError:  # unified memory, slices and containers do not tell everything
            return None

    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    return Gpu(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(ask(nvml.nvmlDeviceGetName) or "unnamed"),
        total_bytes=memory.total if memory else 0,
        used_bytes=memory.used if memory else 0,
        processes=_processes(nvml, ask) if with_processes else (),
    )


def _processes(nvml: Any, ask: Callable[[Callable[[Any], Any]], Any]) -> tuple[GpuProcess, ...]:
    questions = (nvml.nvmlDeviceGetGraphicsRunningProcesses, nvml.nvmlDeviceGetComputeRunningProcesses)
    found = {process.pid: process.usedGpuMemory for question in questions for process in ask(question) or ()}
    return tuple(GpuProcess(pid=pid, used_bytes=used_bytes) for pid, used_bytes in sorted(found.items()))


def _visible(gpus: list[Gpu], named: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, as CUDA reads it: by number or the uuid's beginning, up to a wrong one."""
    if named is None:
        return gpus
    found: list[Gpu] = []
    for word in (part.strip() for part in named.split(",")):
        matching = [gpu for gpu in gpus if (word == str(gpu.index) if word.isdigit() else gpu.uuid.startswith(word))]
        if not word or len(matching) != 1:
            break
        found += matching
    return sorted(found, key=lambda gpu: gpu.index)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
