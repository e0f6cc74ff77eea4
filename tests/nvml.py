"""A driver that is played: what it answers is data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """What a driver says when it will not."""


class Driver:
    """A driver with the functions of pynvml that are asked for: handles are dicts that hold the answers."""

    NVMLError = NVMLError

    def __init__(self, *gpus: dict[str, Any]) -> None:
        self.gpus = gpus
        self.is_open = False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        assert self.is_open
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.gpus[index]

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> list[int]:
        if "slices" not in handle:
            raise NVMLError("Not Supported")
        return [int(handle["slices"] is not None), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], number: int) -> Any:
        if number not in handle["slices"]:
            raise NVMLError("Not Found")
        return handle["slices"][number]

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> str:
        return str(handle["uuid"])

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> bytes:
        return b"Test"

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> Any:
        if "total" not in handle:
            raise NVMLError("Not Supported")
        return SimpleNamespace(total=handle["total"], used=handle.get("used", 0))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: dict[str, Any]) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.get("processes", {}).items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: dict[str, Any]) -> list[Any]:
        raise NVMLError("Not Supported")
