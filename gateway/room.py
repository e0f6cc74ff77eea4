"""What room a launch has: GPUs or the machine's memory, who holds the rest of it, and what would make it fit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import psutil

from engines.base import Placement
from gateway.amounts import megabytes
from gateway.gpus import Gpu
from gateway.process import memory_bytes
from gateway.sizing import Sizing
from registry.memory import most_tokens


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds memory; `model` if it is one of ours."""

    pid: int
    used_bytes: int | None
    name: str | None = None
    model: str | None = None


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU as it is now; `is_wanted` if the launch would use it."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    is_wanted: bool
    holders: tuple[Holder, ...]


class Ram(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's memory; `holders` are the engines that run here."""

    total_bytes: int
    free_bytes: int
    holders: tuple[Holder, ...]


class Room:
    """What a launch may use: its GPUs, or the machine's memory."""

    def __init__(self, gpus: Sequence[Gpu], placements: Sequence[Placement], ram: Ram) -> None:
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._groups = [placement.gpu_uuids or tuple(self._gpus) for placement in placements]
        self._ram = ram
        self.is_gpu = bool(self._gpus)
        self.uuids = {uuid for group in self._groups for uuid in group} if self.is_gpu else set()
        self.is_measured = all(self._gpus[uuid].total_bytes for uuid in self.uuids)

    @property
    def name(self) -> str:
        """What it is."""
        if not self.is_gpu:
            return "the machine's memory"
        indexes = sorted(self._gpus[uuid].index for uuid in self.uuids)
        return f"GPU {', '.join(map(str, indexes))}"

    @property
    def free_bytes(self) -> int:
        """Of all of it."""
        if not self.is_gpu:
            return self._ram.free_bytes
        return sum(free_of(self._gpus[uuid]) for uuid in self.uuids)

    def for_one(self, replicas: int) -> int:
        """What the copy with the least room has, if all take the same."""
        if not self.is_gpu:
            return self._ram.free_bytes // replicas
        users = Counter(uuid for group in self._groups for uuid in group)
        return min(
            min(free_of(self._gpus[uuid]) // users[uuid] for uuid in group) * len(group) for group in self._groups
        )

    def fits(self, total_bytes: int, replicas: int) -> bool | None:
        """Whether each copy has room; None if the devices do not tell."""
        return total_bytes <= self.for_one(replicas) if self.is_measured else None

    def gpus_enough(self, total_bytes: int) -> int | None:
        """How many GPUs would hold one copy, evenly; None if all would not."""
        free = sorted((free_of(gpu) for gpu in self._gpus.values()), reverse=True)
        return next((n for n in range(1, len(free) + 1) if free[n - 1] * n >= total_bytes), None)


def free_of(gpu: Gpu) -> int:
    """Bytes that nobody holds."""
    return max(0, gpu.total_bytes - gpu.used_bytes)


def observe_devices(gpus: Sequence[Gpu], owners: Mapping[int, str], wanted: set[str]) -> tuple[Device, ...]:
    """The GPUs with their processes by name; `owners` are leaders of process groups and the copies that they are."""
    return tuple(
        Device(
            index=gpu.index,
            name=gpu.name,
            total_bytes=gpu.total_bytes,
            used_bytes=gpu.used_bytes,
            free_bytes=free_of(gpu),
            is_wanted=gpu.uuid in wanted,
            holders=tuple(_holder(one.pid, one.used_bytes, owners) for one in gpu.processes),
        )
        for gpu in gpus
    )


def _holder(pid: int, used_bytes: int | None, owners: Mapping[int, str]) -> Holder:
    try:
        name = psutil.Process(pid).name()
        leader = os.getpgid(pid)
    except (psutil.Error, OSError):  # gone, or of another container
        return Holder(pid=pid, used_bytes=used_bytes)
    return Holder(pid=pid, used_bytes=used_bytes, name=name, model=owners.get(leader))


def observe_ram(owners: Mapping[int, str]) -> Ram:
    """The machine's memory now."""
    memory = psutil.virtual_memory()
    holders = [Holder(pid=pid, used_bytes=memory_bytes(pid), model=name) for pid, name in owners.items()]
    return Ram(total_bytes=memory.total, free_bytes=memory.available, holders=tuple(holders))


def verdict(problems: Sequence[str], fits: bool | None, sizing: Sizing | None, room: Room, replicas: int) -> str:
    """The sentence that says whether it can be launched and fits."""
    if problems:
        return f"It cannot be launched: {problems[0]}"
    if sizing is None or fits is None:
        return "It can be launched; whether its memory suffices is not known."
    each = " each" if replicas > 1 else ""
    copies = f"{replicas} copies take" if replicas > 1 else "It takes"
    takes = f"{copies} about {megabytes(sizing.estimate.total)}{each}"
    needed = f"{takes}, and {room.name} has {megabytes(room.free_bytes)} free"
    return f"It fits. {needed}." if fits else f"It does not fit. {needed}."


def advice(
    sizing: Sizing,
    room: Room,
    smaller: Sequence[str],
    devices: Sequence[Device],
    ram: Ram,
    replicas: int,
) -> list[str]:
    """What would make it fit; `smaller` names other specs that would."""
    parts = sizing.estimate
    rest = room.for_one(replicas) - (parts.total - parts.kv_cache)
    said = []
    tokens = most_tokens(sizing.attention, sizing.cache, rest) if rest > 0 and parts.kv_cache else 0
    if tokens:
        said.append(f"A smaller context: up to {tokens} tokens of each request (context_length) fit.")
    else:
        said.append("A smaller context alone does not help.")
    if smaller:
        said.append(f"Another spec of the family: {', '.join(smaller)}.")
    if replicas > 1:
        said.append(f"Fewer copies than {replicas}.")
    if room.is_gpu and (n_gpu := room.gpus_enough(parts.total)):
        said.append(f"n_gpu {n_gpu}: the emptiest {n_gpu} GPUs have room for one copy.")
    holders = [holder for device in devices if device.is_wanted for holder in device.holders]
    said += _who_could_go(holders if room.is_gpu else ram.holders)
    return said


def _who_could_go(holders: Sequence[Holder]) -> list[str]:
    largest = sorted(holders, key=lambda one: one.used_bytes or 0, reverse=True)[:3]
    return [f"The end of {holder_name(one)}, which holds {_amount(one.used_bytes)}." for one in largest]


def holder_name(holder: Holder) -> str:
    """A process as people know it."""
    return holder.model or f"process {holder.pid} ({holder.name or 'of another container or user'})"


def _amount(size_bytes: int | None) -> str:
    return "an unknown amount" if size_bytes is None else megabytes(size_bytes)
