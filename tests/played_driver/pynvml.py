"""A driver that is played, for a whole gateway: with this folder on its path, it has the GPUs that it is told of.

The folder PLAYED_GPUS has `gpus`, how much each has by its uuid; `foreign`, what others hold of them, by the process
`foreigner`; `hangs_until`, a time of the monotonic clock; and in `processes` what each process of ours holds, in a file
named by its pid. All is JSON. Who has ended holds nothing.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(os.environ["PLAYED_GPUS"])


class NVMLError(Exception):
    """What a driver says when it will not."""


def nvmlInit() -> None:
    while time.monotonic() < _told("hangs_until"):
        time.sleep(0.02)


def nvmlShutdown() -> None:
    pass


def nvmlSystemGetCudaDriverVersion() -> int:
    return 12080


def nvmlDeviceGetCount() -> int:
    return len(_told("gpus"))


def nvmlDeviceGetHandleByIndex(index: int) -> str:
    return sorted(_told("gpus"))[index]


def nvmlDeviceGetMigMode(uuid: str) -> list[int]:
    raise NVMLError("Not Supported")


def nvmlDeviceGetUUID(uuid: str) -> str:
    return uuid


def nvmlDeviceGetName(uuid: str) -> str:
    return "Played"


def nvmlDeviceGetMemoryInfo(uuid: str) -> SimpleNamespace:
    total = _told("gpus")[uuid]
    used = sum(process.usedGpuMemory for process in nvmlDeviceGetComputeRunningProcesses(uuid))
    return SimpleNamespace(total=total, used=min(used, total))


def nvmlDeviceGetComputeRunningProcesses(uuid: str) -> list[SimpleNamespace]:
    files = (FOLDER / "processes").glob("*[0-9]")
    held = {int(path.name): json.loads(path.read_text()).get(uuid) for path in files}
    held[_told("foreigner")] = _told("foreign").get(uuid)
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in held.items() if size and _is_alive(pid)]


def nvmlDeviceGetGraphicsRunningProcesses(uuid: str) -> list[SimpleNamespace]:
    return []


def _is_alive(pid: int) -> bool:
    """The dead that nobody has reaped yet hold nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _told(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())
