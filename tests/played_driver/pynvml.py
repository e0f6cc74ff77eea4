"""A driver that is played, for a whole gateway: with this folder on its path, it has one GPU.

The folder PLAYED_GPU says how much the GPU has (`total`), what others hold (`foreign`, by the process `foreigner`), and
in `processes` what each process of ours holds, in a file named by its pid; who has ended holds nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

FOLDER = Path(os.environ["PLAYED_GPU"])


class NVMLError(Exception):
    """What a driver says when it will not."""


def nvmlInit() -> None:
    pass


def nvmlShutdown() -> None:
    pass


def nvmlSystemGetCudaDriverVersion() -> int:
    return 12080


def nvmlDeviceGetCount() -> int:
    return 1


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetMigMode(handle: int) -> list[int]:
    raise NVMLError("Not Supported")


def nvmlDeviceGetUUID(handle: int) -> str:
    return "GPU-played"


def nvmlDeviceGetName(handle: int) -> str:
    return "Played"


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:
    used = sum(process.usedGpuMemory for process in nvmlDeviceGetComputeRunningProcesses(handle))
    return SimpleNamespace(total=_number("total"), used=min(used, _number("total")))


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[SimpleNamespace]:
    held = {int(path.name): int(path.read_text()) for path in (FOLDER / "processes").glob("[0-9]*[0-9]")}
    if foreign := _number("foreign"):
        held[_number("foreigner")] = foreign
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in sorted(held.items()) if is_alive(pid)]


def nvmlDeviceGetGraphicsRunningProcesses(handle: int) -> list[SimpleNamespace]:
    return []


def is_alive(pid: int) -> bool:
    """The dead that nobody has reaped yet hold nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _number(name: str) -> int:
    return int((FOLDER / name).read_text())
