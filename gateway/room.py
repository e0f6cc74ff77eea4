"""What room a launch has: GPUs or the machine's memory, who holds the rest of it, and what would make it fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec
import psutil

from engines.base import RAM, Launch, Needs, Placement
from gateway.amounts import megabytes
from gateway.placement import Device, NoRoom, how, needs_of, place, promised_by
from gateway.process import memory_bytes


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds memory; `model` if it is one of ours."""

    pid: int
    used_bytes: int | None
    name: str | None = None
    model: str | None = None


class GpuUse(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU as it is now; `is_wanted` if the launch would use it. `free_bytes` are those that it may have."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    is_wanted: bool
    holders: tuple[Holder, ...]


class Ram(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's memory, or what engines may have of it; `holders` are the engines that run here."""

    total_bytes: int
    free_bytes: int
    holders: tuple[Holder, ...]


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What came of placing each copy of a launch: its devices, what is free of them, and why not if it does not fit.

    `is_there` is False where it asks for GPUs that are not here; `fits` is None where nobody knows. `lesser` is the
    place of a copy that is to have a shorter context than the model's, or fewer layers on GPUs.
    """

    devices: tuple[Device, ...]
    free_bytes: int
    fits: bool | None
    is_there: bool = True
    refusal: NoRoom | None = None
    lesser: Placement | None = None

    @property
    def name(self) -> str:
        """What it is."""
        indexes = sorted(device.gpu.index for device in self.devices if device.gpu)
        return f"GPU {', '.join(map(str, indexes))}" if indexes else "the machine's memory"


def find_room(launch: Launch, needs: Needs, devices: Sequence[Device], given: Sequence[Placement]) -> Room:
    """The devices that the copies would get now, beside what was given to others. Pure.

    Args:
        needs: what the engine asks for each, with its memory.
    """
    by_key = {device.key: device for device in devices}
    before = promised_by(given)
    found: list[Placement] = []
    for index in range(launch.replica):
        asked = needs_of(launch, needs, index)
        taken = [*given, *found]
        placement = place(asked, devices, promised_by(taken), cpu_fallback=launch.cpu_fallback)
        if isinstance(placement, Placement):
            found.append(placement)
            continue
        anywhere = msgspec.structs.replace(asked, memory_bytes=0, gpu_share=None)
        wanted = tuple(device for device in devices if _may_be(device, asked, devices))
        return Room(
            devices=wanted,
            free_bytes=_free(wanted, before),
            fits=False,
            is_there=isinstance(place(anywhere, devices, {}), Placement),
            refusal=placement,
        )
    keys = dict.fromkeys(key for placement in found for key in placement.memory)
    got = tuple(by_key[key] for key in keys if key in by_key)
    got = got or tuple(device for device in devices if _may_be(device, needs, devices))  # it chooses among them
    is_known = bool(needs.memory_bytes or needs.gpu_share) and all(device.total_bytes for device in got)
    lesser = next((one for one in reversed(found) if how(one)), None)
    fits = True if is_known else None
    return Room(devices=got, free_bytes=_free(got, before), fits=fits, lesser=lesser)


def _may_be(device: Device, needs: Needs, devices: Sequence[Device]) -> bool:
    """Whether it is one of those that such needs may be met by."""
    if needs.is_for_cpu or not any(one.gpu for one in devices):
        return device.gpu is None
    return device.gpu is not None and (needs.gpu_idx is None or device.gpu.index in needs.gpu_idx)


def _free(devices: Sequence[Device], before: Mapping[str, int]) -> int:
    return sum(max(0, device.free(before)) for device in devices if device.total_bytes)


def observe_gpus(devices: Sequence[Device], owners: Mapping[int, str], room: Room | None) -> tuple[GpuUse, ...]:
    """The GPUs with their processes by name; `owners` are leaders of process groups and the copies that they are."""
    wanted = {device.key for device in room.devices} if room else set()
    return tuple(
        GpuUse(
            index=device.gpu.index,
            name=device.gpu.name,
            total_bytes=device.gpu.total_bytes,
            used_bytes=device.gpu.used_bytes,
            free_bytes=max(0, device.gpu.total_bytes - device.gpu.used_bytes),
            is_wanted=device.key in wanted,
            holders=tuple(_holder(one.pid, one.used_bytes, owners) for one in device.gpu.processes),
        )
        for device in devices
        if device.gpu
    )


def _holder(pid: int, used_bytes: int | None, owners: Mapping[int, str]) -> Holder:
    try:
        name = psutil.Process(pid).name()
        leader = os.getpgid(pid)
    except (psutil.Error, OSError):  # gone, or of another container
        return Holder(pid=pid, used_bytes=used_bytes)
    return Holder(pid=pid, used_bytes=used_bytes, name=name, model=owners.get(leader))


def observe_ram(devices: Sequence[Device], given: Sequence[Placement], owners: Mapping[int, str]) -> Ram:
    """The machine's memory now, and the engines in it."""
    device = next(device for device in devices if device.key == RAM)
    holders = [Holder(pid=pid, used_bytes=memory_bytes(pid), model=name) for pid, name in owners.items()]
    free = max(0, device.free(promised_by(given)))
    return Ram(total_bytes=device.total_bytes, free_bytes=free, holders=tuple(holders))


def verdict(problems: Sequence[str], room: Room, needs: Needs, replicas: int) -> str:
    """The sentence that says whether it can be launched and fits."""
    if problems:
        return f"It cannot be launched: {problems[0]}"
    if room.fits is None:
        return "It can be launched; whether its memory suffices is not known."
    each = " each" if replicas > 1 else ""
    copies = f"{replicas} copies take" if replicas > 1 else "It takes"
    differs, size = "", needs.memory_bytes
    if room.lesser:
        differs = f", {how(room.lesser)}"
        size = sum(room.lesser.memory.values())
    elif room.refusal:
        size = min(needs.shorter.values(), default=size)
    takes = f"about {megabytes(size)}" if size else f"{needs.gpu_share or 0:.0%} of a GPU"
    needed = f"{copies} {takes}{each}, and {room.name} has {megabytes(room.free_bytes)} free"
    if room.fits:
        return f"It fits{differs}. {needed}."
    if room.refusal and not room.refusal.for_ever:
        return f"It does not fit beside what is loaded now. {needed}."
    return f"It does not fit. {needed}."


def advice(room: Room, replicas: int) -> list[str]:
    """What would make it fit."""
    if room.refusal is None:
        return []
    return [*room.refusal.remedies, *([f"Fewer copies than {replicas}."] if replicas > 1 else [])]
