"""The GPUs as NVML sees them now. The only file that imports pynvml; no driver gives an empty list."""

from __future__ import annotations

import msgspec


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One device as observed. Memory in bytes; `used_by` maps a pid to the bytes that it holds."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    used_by: dict[int, int] = {}


def list_gpus() -> list[Gpu]:
    """All GPUs, asked now; empty where there is no driver or no device."""
    import pynvml  # only when asked

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_observe(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _observe(index: int) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return Gpu(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=memory.total,
        used_bytes=memory.used,
        used_by={process.pid: process.usedGpuMemory or 0 for process in processes},
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
