"""What would run where: the launches of a settings file on the devices of a machine, real or made up. By the
rules of the yard, and pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from engines.base import Launch, Placement
from gateway.placement import Device, fell_back, how, needs_of, promised_by
from gateway.sizing import Sizing
from gateway.yard import Claim, Holder, Rules, decide, over

LATER_S = 1e9  # of a clock: whatever has begun, all is at rest
Status = Literal["placed", "in turn", "refused"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of a model: where it would be, what it would get there, and what that is told from.

    `status` is `placed` beside all above it; `in turn` if it has room only once others are unloaded; or `refused`.
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


def draw_up(
    wanted: Sequence[tuple[Launch, Sizing]], devices: Sequence[Device], rules: Rules | None = None
) -> tuple[Row, ...]:
    """A row for each copy, in the order in which they would be started: preloaded ones first, by priority.

    What comes on demand is taken to be asked for in that order too, and to stay, idle.
    """
    ordered = sorted(wanted, key=lambda one: (not one[0].preload, -one[0].priority))
    patient = msgspec.structs.replace(rules or Rules(), min_residency_s=0, max_wait_s=math.inf)
    placed: list[tuple[Launch, Holder]] = []
    rows = []
    for launch, sizing in ordered:
        for index in range(launch.replica):
            row, placement = _row(launch, sizing, index, placed, devices, patient)
            if placement is not None:
                placed.append((launch, _holder(launch, index, placement, len(placed))))
            rows.append(row)
    return tuple(rows)


def _holder(launch: Launch, index: int, placement: Placement, number: int) -> Holder:
    """Ready and idle for long, the first the longest."""
    return Holder(
        key=(launch.uid, index),
        memory=placement.memory,
        ready_since=number,
        idle_since=number,
        is_pinned=launch.pinned,
        priority=launch.priority,
        group=launch.group,
    )


def _row(
    launch: Launch,
    sizing: Sizing,
    index: int,
    placed: Sequence[tuple[Launch, Holder]],
    devices: Sequence[Device],
    rules: Rules,
) -> tuple[Row, Placement | None]:
    needs = needs_of(launch, sizing.needs, index)
    gpus = {device.key for device in devices if device.gpu}
    claim = Claim(
        key=(launch.uid, index),
        needs=needs,
        since=0.0,
        cpu_fallback=launch.cpu_fallback,
        is_extra=index > 0,
        apart_from=tuple(key for other, one in placed if other is launch for key in one.memory if key in gpus),
        priority=launch.priority,
        group=launch.group,
    )
    names = {device.key: device.name for device in devices}

    def told(status: Status, placement: Placement | None, text: str = "") -> Row:
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

    holders = [one for _, one in placed]
    plan = decide([claim], holders, devices, rules, LATER_S)
    if (placement := plan.start.get(claim.key)) is not None:
        said = ["On the CPU, as cpu_fallback allows: the GPUs have no room."] if fell_back(needs, placement) else []
        if differs := how(placement):
            said.append(f"{differs[0].upper()}{differs[1:]}.")
        return told("placed", placement, " ".join(said)), placement
    if (refusal := plan.refuse.get(claim.key)) is not None:
        return told("refused", None, refusal[0]), None
    # For another copy nobody has to go, but it starts once they have gone.
    gone = plan.evict or {one.key: claim.key for other, one in placed if not other.pinned and other is not launch}
    staying = [one for one in holders if one.key not in gone]
    then = decide([claim], staying, devices, rules, LATER_S)
    if (placement := then.start.get(claim.key)) is None:
        return told("refused", None, (then.refuse.get(claim.key) or (then.wait[claim.key],))[0]), None
    rivals = ", ".join(dict.fromkeys(uid for uid, _ in gone))
    if plan.evict:
        why = over(claim, {one.key[0]: one.group for one in holders}, rules) or "there is no room beside what is idle"
        return told(
            "in turn",
            placement,
            f"When it is asked for, {rivals} {'are' if ', ' in rivals else 'is'} unloaded, as {why}.",
        ), None
    return told("in turn", placement, f"Waits until others are unloaded ({rivals}): {plan.wait[claim.key]}"), None


def free_after(rows: Sequence[Row], devices: Sequence[Device]) -> dict[str, int]:
    """What each device has left, by its key, once all that are placed run."""
    given = promised_by(Placement(memory=row.memory) for row in rows if row.status == "placed")
    return {device.key: device.free(given) for device in devices}
