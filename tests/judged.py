"""What must hold of each single decision of the yard, whatever the state: the promises that its file makes.

A judge looks at one plan from outside: it goes on as if all that the plan says had been done, and asks again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from gateway.placement import Device
from gateway.yard import Claim, Holder, Plan, Rules, decide


def judge(
    plan: Plan, claims: Sequence[Claim], holders: Sequence[Holder], devices: Sequence[Device], rules: Rules, now: float
) -> Iterator[str]:
    """What does not hold of the plan."""
    by_key = {one.key: one for one in holders}
    for key in plan.evict:
        one = by_key[key]
        if one.is_pinned or one.work or one.ready_since is None or one.is_leaving:
            yield f"{key} goes, and is pinned, or is not idle"
    for key in plan.hold:
        if by_key[key].is_pinned or by_key[key].is_leaving:
            yield f"{key} is held back, and is pinned, or goes already"
    for key, tier in (plan.sleep | plan.rehearse).items():
        one = by_key[key]
        if one.is_asleep or one.is_leaving or tier not in {bed.tier for bed in one.beds}:
            yield f"{key} is to sleep, and has no such bed"
        if key not in plan.evict and (one.work or one.ready_since is None):
            yield f"{key} is to sleep, and is not idle"
    yield from _sleeps_within(plan, holders, rules)
    yield from _disturbed(plan, holders)
    ordered = sorted(claims, key=lambda claim: _turn(claim, rules, now))
    if (first := next((one for one in ordered if one.key not in plan.start | plan.refuse), None)) is None:
        return
    if not first.is_wished or first.is_extra:
        return
    before = ordered[: ordered.index(first)]
    settled = [*_after(plan, holders, first, before), *_started(plan, before)]
    later = [*_started(plan, ordered[ordered.index(first) :])]
    if _starts(first, settled, devices, rules, now) and not _starts(first, [*settled, *later], devices, rules, now):
        yield f"{first.key} waits for room, and {[one.key for one in later]} take it"
    if ordered[0] is first and plan.evict:
        yield from _is_least(plan, holders, first, devices, rules, now)


def _turn(claim: Claim, rules: Rules, now: float) -> tuple[object, ...]:
    is_late = now - claim.since >= rules.max_wait_s
    is_modest = claim.is_extra or not claim.is_wished
    return is_modest, not is_late, 0 if is_late else -claim.priority, claim.since, claim.key


def _starts(claim: Claim, holders: Sequence[Holder], devices: Sequence[Device], rules: Rules, now: float) -> bool:
    return claim.key in decide([claim], holders, devices, rules, now).start


def _after(plan: Plan, holders: Sequence[Holder], claim: Claim, before: Sequence[Claim]) -> Iterator[Holder]:
    """Who is there once all that go for this claim, or those before it, have gone, or sleep."""
    its = {claim.key, *(one.key for one in before)}
    started = {key for key in plan.start if key in its}
    for one in holders:
        if one.key in started or one.is_leaving:
            continue
        if one.falls_to is not None:
            yield one.in_bed(one.falls_to, one.host_bytes)
        elif one.key in plan.hold or plan.evict.get(one.key) in its:
            yield from _moved(one, plan.sleep.get(one.key))
        else:
            yield one


def _moved(holder: Holder, tier: str | None) -> Iterator[Holder]:
    for bed in holder.beds:
        if bed.tier == tier:
            yield holder.in_bed(bed.memory, bed.host_bytes)


def _started(plan: Plan, claims: Iterable[Claim]) -> Iterator[Holder]:
    for one in claims:
        if one.key in plan.start:
            yield Holder(key=one.key, memory=plan.start[one.key].memory, work=1, group=one.group)


def _sleeps_within(plan: Plan, holders: Sequence[Holder], rules: Rules) -> Iterator[str]:
    total = sum(one.host_bytes for one in holders)
    more = 0
    for one in holders:
        tier = plan.sleep.get(one.key) or plan.rehearse.get(one.key)
        more += sum(max(0, bed.host_bytes - one.host_bytes) for bed in one.beds if bed.tier == tier)
    if more and total + more > rules.sleep_bytes:
        yield f"{total + more} bytes are taken for sleeping"


def _disturbed(plan: Plan, holders: Sequence[Holder]) -> Iterator[str]:
    """Whoever falls asleep sees its GPU's free memory: nobody takes of that until it sleeps."""
    put = plan.sleep | plan.rehearse
    falling = [one for one in holders if one.is_falling_asleep or one.key in put]
    rising = [(one.key, one.memory) for one in holders if one.is_waking or one.key in plan.rehearse]
    for one in falling:
        started = [(key, placement.memory) for key, placement in plan.start.items()]
        for key, memory in (*started, *(rising if one.key in put else ())):
            if key != one.key and one.shares_gpu(memory):
                yield f"{key} takes of a GPU where {one.key} falls asleep"


def _is_least(
    plan: Plan, holders: Sequence[Holder], claim: Claim, devices: Sequence[Device], rules: Rules, now: float
) -> Iterator[str]:
    """Whoever goes for it has to, and as far; who is held back may be so for another."""
    plan = msgspec.structs.replace(plan, hold=frozenset())
    for key in (key for key, claimant in plan.evict.items() if claimant == claim.key):
        one = next(one for one in holders if one.key == key)
        others = [other for other in _after(plan, holders, claim, ()) if other.key != key]
        if _starts(claim, [*others, one], devices, rules, now):
            yield f"{key} goes for {claim.key} in vain"
        lighter = [bed for bed in one.beds if bed.host_bytes <= one.host_bytes or not bed.host_bytes]
        for bed in () if key in plan.sleep else lighter:
            if _starts(claim, [*others, one.in_bed(bed.memory, bed.host_bytes)], devices, rules, now):
                yield f"{key} ends for {claim.key}, and could sleep"
