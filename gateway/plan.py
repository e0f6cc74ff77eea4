"""What would run where: the launches of a settings file on the devices of a machine, real or made up. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from engines.base import Launch, Placement
from gateway.placement import Device, NoRoom, fell_back, needs_of, place, promised_by
from gateway.sizing import Sizing

Status = Literal["placed", "in turn", "refused"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of a model: where it would be, what it would get there, and what that is told from.

    `status` is `placed` with all above it; `in turn` if it has room only while others are unloaded; or `refused`.
    """

    model: str
    replica: int
    engine: str
    preload: bool
    priority: int
    status: Status
    memory_bytes: int
    basis: str
    devices: tuple[str, ...] = ()
    memory: Mapping[str, int] = {}
    text: str = ""


def draw_up(wanted: Sequence[tuple[Launch, Sizing]], devices: Sequence[Device]) -> tuple[Row, ...]:
    """A row for each copy, in the order in which they would be started: preloaded ones first, by priority.

    What comes on demand is taken to be asked for in that order too, and to stay.
    """
    ordered = sorted(wanted, key=lambda one: (not one[0].preload, -one[0].priority))
    placed: list[tuple[Launch, Placement]] = []
    rows = []
    for launch, sizing in ordered:
        for index in range(launch.replica):
            row, placement = _row(launch, sizing, index, placed, devices)
            if placement is not None:
                placed.append((launch, placement))
            rows.append(row)
    return tuple(rows)


def _row(
    launch: Launch,
    sizing: Sizing,
    index: int,
    placed: Sequence[tuple[Launch, Placement]],
    devices: Sequence[Device],
) -> tuple[Row, Placement | None]:
    needs = needs_of(launch, sizing.needs, index)
    siblings = {key for other, placement in placed if other is launch for key in placement.memory}

    def find(beside: Sequence[tuple[Launch, Placement]]) -> Placement | NoRoom:
        given = promised_by(placement for _, placement in beside)
        return place(needs, devices, given, cpu_fallback=launch.cpu_fallback, apart_from=siblings)

    def told(status: Status, placement: Placement | None, text: str = "") -> Row:
        names = {device.key: device.name for device in devices}
        memory = placement.memory if placement else {}
        return Row(
            model=launch.uid,
            replica=index,
            engine=launch.engine,
            preload=launch.preload,
            priority=launch.priority,
            status=status,
            memory_bytes=sum(memory.values()) if placement else needs.memory_bytes,
            basis=sizing.basis,
            devices=tuple(names.get(key, key) for key in memory),
            memory=memory,
            text=text,
        )

    found = find(placed)
    if isinstance(found, Placement):
        text = "On the CPU, as cpu_fallback allows: the GPUs have no room." if fell_back(needs, found) else ""
        return told("placed", found, text), found
    staying = [(other, placement) for other, placement in placed if other.pinned or other is launch]
    later = find(staying)
    if isinstance(later, NoRoom):
        return told("refused", None, later.text), None
    others = [other.uid for other, placement in placed if later.memory.keys() & placement.memory and not other.pinned]
    rivals = ", ".join(dict.fromkeys(uid for uid in others if uid != launch.uid))
    return told("in turn", later, f"Has room while models there are unloaded: {rivals}."), None


def free_after(rows: Sequence[Row], devices: Sequence[Device]) -> dict[str, int]:
    """What each device has left, by its key, once all that are placed run."""
    given = promised_by(Placement(memory=row.memory) for row in rows if row.status == "placed")
    return {device.key: device.free(given) for device in devices}
