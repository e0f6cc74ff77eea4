"""The GPUs as NVML sees them now. The only file that imports pynvml; no driver gives an empty list."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec

logger = logging.getLogger("hostler.gpus")


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


def list_gpus(*, with_processes: bool = False) -> list[Gpu]:
    """All GPUs, asked now; empty where there is no driver or no device. May take some milliseconds."""
    import pynvml  # only when asked

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_observe(index, with_processes) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as exc:
        logger.warning("NVML does not list the GPUs: %s", exc)
        return []
    finally:
        pynvml.nvmlShutdown()


@cache
def cuda_version() -> str | None:
    """The newest CUDA that the driver knows, such as "12.8"; None without a driver."""
    import pynvml  # only when asked

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


def _observe(index: int, with_processes: bool) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: Callable[[Any], Any]) -> Any:
        try:
            return question(handle)
        except pynvml.NVMLError:  # unified memory, slices and containers do not tell everything
            return None

    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    return Gpu(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(ask(pynvml.nvmlDeviceGetName) or "unnamed"),
        total_bytes=memory.total if memory else 0,
        used_bytes=memory.used if memory else 0,
        processes=_processes(ask) if with_processes else (),
    )


def _processes(ask: Callable[[Callable[[Any], Any]], Any]) -> tuple[GpuProcess, ...]:
    import pynvml

    questions = (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses)
    found = {process.pid: process.usedGpuMemory for question in questions for process in ask(question) or ()}
    return tuple(GpuProcess(pid=pid, used_bytes=used_bytes) for pid, used_bytes in sorted(found.items()))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
