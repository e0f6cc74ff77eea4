"""What would run where: the launches of a settings file on the devices of a machine, real or made up. By the
rules of the yard, and pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from engines.base import Launch, Needs, Placement, Tier
from gateway.placement import Device, fell_back, how, needs_of, promised_by
from gateway.sentences import said_of
from gateway.sizing import Sizing
from gateway.tiers import bed
from gateway.yard import Claim, Holder, Key, Plan, Rules, decide, over

LATER_S = 1e9  # of a clock: whatever has begun, all is at rest
Status = Literal["placed", "in turn", "refused"]
TiersOf = Callable[[Launch, Placement, Needs], Sequence[Tier]]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of a model: where it would be, what it would get there, and what that is told from.

    `status` is `placed` beside all above it; `in turn` if it has room only once others are unloaded, or sleep;
    or `refused`. `sleeps_in`: the tiers in which it can sleep. `asleep_for_it`: who would sleep for it, and in which.
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
    sleeps_in: tuple[str, ...] = ()
    asleep_for_it: Mapping[str, str] = {}
    text: str = ""


def draw_up(
    wanted: Sequence[tuple[Launch, Sizing]],
    devices: Sequence[Device],
    rules: Rules | None = None,
    tiers_of: TiersOf = lambda launch, placement, needs: (),
) -> tuple[Row, ...]:
    """A row for each copy, in the order in which they would be started: preloaded ones first, by priority.

    What is preloaded is loaded at the same time. What comes on demand is taken to be asked for in that order too, and
    to stay, idle.

    Args:
        tiers_of: as engines tell, how a copy could sleep.
    """
    ordered = sorted(wanted, key=lambda one: (not one[0].preload, -one[0].priority))
    patient = msgspec.structs.replace(rules or Rules(), min_residency_s=0, max_wait_s=math.inf)
    placed: list[tuple[Launch, Holder]] = []
    rows = []
    for launch, sizing in ordered:
        for index in range(launch.replica):
            row, placement = _row(launch, sizing, index, placed, devices, patient)
            if placement is not None:
                holder = _holder(launch, sizing, index, placement, len(placed), tiers_of)
                placed.append((launch, holder))
                row = msgspec.structs.replace(row, sleeps_in=tuple(bed.tier for bed in holder.beds))
            rows.append(row)
    return tuple(rows)


def _holder(launch: Launch, sizing: Sizing, index: int, placement: Placement, number: int, tiers_of: TiersOf) -> Holder:
    """Ready and idle for long, the first the longest."""
    weight_bytes = sizing.needs.weight_bytes or (sizing.estimate.weights if sizing.estimate else 0)
    needs = msgspec.structs.replace(sizing.needs, weight_bytes=weight_bytes)
    return Holder(
        key=(launch.uid, index),
        memory=placement.memory,
        ready_since=number,
        idle_since=number,
        is_pinned=launch.pinned,
        priority=launch.priority,
        group=launch.group,
        beds=tuple(bed(placement, tier) for tier in tiers_of(launch, placement, needs)),
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
    if launch.preload and plan.evict:  # all of them are loading then: nobody makes room for who will do with less
        loading = [msgspec.structs.replace(one, ready_since=None) for one in holders]
        at_once = decide([claim], loading, devices, rules, LATER_S)
        plan = at_once if at_once.start else plan
    if (placement := plan.start.get(claim.key)) is not None:
        said = ["On the CPU, as cpu_fallback allows: the GPUs have no room."] if fell_back(needs, placement) else []
        if differs := how(placement):
            said.append(f"{differs[0].upper()}{differs[1:]}.")
        return told("placed", placement, " ".join(said)), placement
    if (refusal := plan.refuse.get(claim.key)) is not None:
        return told("refused", None, refusal.text), None
    # For another copy nobody has to go, but it starts once they have gone.
    gone = plan.evict or {one.key: claim.key for other, one in placed if not other.pinned and other is not launch}
    staying = [one for one in holders if one.key not in gone]
    staying += [
        one.in_bed(bed.memory, bed.host_bytes)
        for one in holders
        for bed in one.beds
        if plan.sleep.get(one.key) == bed.tier
    ]
    then = decide([claim], staying, devices, rules, LATER_S)
    if (placement := then.start.get(claim.key)) is None:
        refusal = then.refuse.get(claim.key)
        return told("refused", None, refusal.text if refusal else f"{then.wait[claim.key]}."), None
    if plan.evict:
        why = over(claim, {one.key[0]: one.group for one in holders}, rules) or "there is no room beside what is idle"
        row = told("in turn", placement, f"When it is asked for, {_goers(plan)}, as {why}.")
        return msgspec.structs.replace(row, asleep_for_it={_name(key): tier for key, tier in plan.sleep.items()}), None
    gone_then = said_of([uid for uid, _ in gone], "is unloaded", "are unloaded")
    return told("in turn", placement, f"It waits until {gone_then}: {plan.wait[claim.key]}."), None


def _name(key: Key) -> str:
    return f"{key[0]}/{key[1]}"


def _goers(plan: Plan) -> str:
    """Who makes room, and how."""
    ends = [uid for uid, _ in (key for key in plan.evict if key not in plan.sleep)]
    told = [said_of(ends, "is unloaded", "are unloaded")] if ends else []
    for tier in dict.fromkeys(plan.sleep.values()):
        uids = [key[0] for key, its in plan.sleep.items() if its == tier]
        told.append(said_of(uids, f"falls asleep (tier {tier})", f"fall asleep (tier {tier})"))
    return " and ".join(told)


def free_after(rows: Sequence[Row], devices: Sequence[Device]) -> dict[str, int]:
    """What each device has left, by its key, once all that are placed run."""
    given = promised_by(Placement(memory=row.memory) for row in rows if row.status == "placed")
    return {device.key: device.free(given) for device in devices}
