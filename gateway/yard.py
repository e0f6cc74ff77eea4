"""Who gets room, who waits, and who makes room. Pure: what is wished and what is there in, what to do out.

A *claim* is a replica that wants to start, a *holder* one that has a place. Room is memory, and how many models may be
loaded at once. What was promised counts until the process is gone, so that no two promises overlap.

The order of claims: who has waited too long, the longest first; then by priority, then who came first. A claim that
has to wait keeps what it is going to get: a later one may only start where that delays nobody before it. Room is made
by holders that are idle for a moment at least, so that all who ask for a model are answered before it goes; and of
those by the ones that have been idle longest for what it costs to load them again. Who answers is never ended: if
somebody has waited for `max_wait_s`, the busy are given no more requests, and answer what they have. Nobody goes for a
model for which nobody waits, unless it is to be loaded in any case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import msgspec

from engines.base import Needs, Placement
from gateway.placement import Device, NoRoom, place

SETTLE_S = 5.0  # memory that just came back is not everywhere told at once
SETTLE_PAUSE_S = 0.5
LEAST_LOAD_S = 0.5
KEEP = 0.25  # of the time that it takes to load: idle for so long, a model is not likely to be asked in the next moment

Key = tuple[str, int]  # of a replica: its uid and its number


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How many models at once, and how patient everybody is. `groups`: name -> (how many at once, and alone or not)."""

    max_loaded: int | None = None
    groups: Mapping[str, tuple[int, bool]] = {}
    min_residency_s: float = 0.0
    max_wait_s: float = 30.0


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that wants to start. `since` is when somebody began to wait for it, in monotonic seconds.

    `is_extra`: another copy of the model has a place, or waits for it before this one, for which nobody else has to go
    then. It rather goes to other devices than those that the other copies have, `apart_from`. `is_wished`: somebody
    waits for it, or it is to be loaded in any case; else it gets only what is left.
    """

    key: Key
    needs: Needs
    since: float
    cpu_fallback: bool = False
    is_wished: bool = True
    is_extra: bool = False
    apart_from: tuple[str, ...] = ()
    priority: int = 0
    group: str | None = None


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that has a place. `work` is how many requests it answers, or that wait for its model.

    `ready_since` is None until it can answer; `idle_since` is when it last ended a request; `waiting_since` is since
    when somebody waits for its model; all in monotonic seconds. `is_leaving`: it is being stopped, and its room comes
    back. `is_held`: the last plan held it back. `load_s` is what it takes to load it again; `busy_s` is how long it is
    expected to be loading or answering yet if it gets no more.
    """

    key: Key
    memory: Mapping[str, int] = {}
    ready_since: float | None = None
    idle_since: float = 0.0
    waiting_since: float | None = None
    work: int = 0
    is_leaving: bool = False
    is_held: bool = False
    is_pinned: bool = False
    load_s: float = LEAST_LOAD_S
    busy_s: float = 0.0
    priority: int = 0
    group: str | None = None

    def keep_score(self, now: float) -> float:
        """The higher, the rather it goes."""
        return (now - self.idle_since) / (max(self.load_s, LEAST_LOAD_S) * 2.0**self.priority)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do now.

    `evict`: holder -> the claim it makes room for. `hold`: holders that get no more requests until one that has waited
    too long has its place. `wait` and `refuse` say why; whether a refusal is for ever is beside its sentence.
    `look_again_s`: after so long time alone may change the answer.
    """

    start: dict[Key, Placement] = {}
    evict: dict[Key, Key] = {}
    hold: frozenset[Key] = frozenset()
    wait: dict[Key, str] = {}
    refuse: dict[Key, tuple[str, bool]] = {}
    look_again_s: float | None = None


def decide(
    claims: Iterable[Claim],
    holders: Sequence[Holder],
    devices: Sequence[Device],
    rules: Rules,
    now: float,
    silence: str | None = None,
) -> Plan:
    """What becomes of each claim.

    Args:
        silence: why nobody knows how the GPUs are; who may get one waits then.
    """
    yard = _Yard(holders, devices, rules, now, silence)
    for claim in sorted(claims, key=yard.turn):
        yard.settle(claim)
    return yard.plan()


class _Wishes(TypedDict):
    cpu_fallback: bool
    apart_from: Sequence[str]


class _Yard:
    """The books while claims are settled, one after the other."""

    def __init__(
        self,
        holders: Sequence[Holder],
        devices: Sequence[Device],
        rules: Rules,
        now: float,
        silence: str | None,
    ) -> None:
        self._devices = devices
        self._view = devices  # as they are, or as they may be in a moment
        self._silence = silence
        self._rules = rules
        self._now = now
        self._staying = {one.key: one for one in holders if not one.is_leaving}
        self._leaving = [one for one in holders if one.is_leaving]
        self._promised = Counter[str]()  # in this round: to those that start, and to those that wait for it
        self._coming: dict[str, str | None] = {}  # uid -> group, of these
        self._starting: dict[str, str | None] = {}  # and of those that start now
        self._is_closed = False  # somebody who has waited too long waits for all there is
        self._start: dict[Key, Placement] = {}
        self._evict: dict[Key, Key] = {}
        self._hold: set[Key] = set()
        self._wait: dict[Key, str] = {}
        self._refuse: dict[Key, tuple[str, bool]] = {}
        self._looks: list[float] = []

    def plan(self) -> Plan:
        """What has been written into the books."""
        return Plan(
            start=self._start,
            evict=self._evict,
            hold=frozenset(self._hold),
            wait=self._wait,
            refuse=self._refuse,
            look_again_s=max(0.01, min(self._looks)) if self._looks else None,
        )

    def is_late(self, claim: Claim) -> bool:
        """Whether it has waited for too long."""
        return self._now - claim.since >= self._rules.max_wait_s

    def turn(self, claim: Claim) -> tuple[bool, bool, int, float, Key]:
        """By what claims are ordered. No priority counts among the late: it could keep one of them waiting for ever."""
        is_late = self.is_late(claim)
        is_modest = claim.is_extra or not claim.is_wished
        return is_modest, not is_late, 0 if is_late else -claim.priority, claim.since, claim.key

    def settle(self, claim: Claim) -> None:
        """Start it, or say for what it waits, or why it never will."""
        if self._silence and not claim.needs.is_for_cpu:
            self._wait[claim.key] = self._silence
            return
        staying = list(self._staying.values())
        found = self._fit(claim, [*staying, *self._leaving])
        if isinstance(found, Placement) and not (self._is_closed and found.memory):
            self._start[claim.key] = found
            self._starting[claim.key[0]] = claim.group
            self._book(claim, found)
            return
        if claim.is_wished and (refusal := self._never(claim, self._devices)):
            self._refuse_or_settle(claim, refusal)
            return
        if isinstance(found, Placement):
            self._wait[claim.key] = "another model has waited for longer"
            return
        if claim.is_extra:
            self._wait[claim.key] = f"there is no room for another copy: {found}"
            return
        if not claim.is_wished:
            self._wait[claim.key] = f"nobody asks for it now, and there is no room: {found}"
            return
        if isinstance(soon := self._fit(claim, staying), Placement):
            self._wait[claim.key] = f"{_names(self._leaving)} is being unloaded"
            self._book(claim, soon)
            return
        self._make_room(claim, found)

    def _make_room(self, claim: Claim, why: str, *, is_now: bool = True) -> None:
        """Unload who is idle, or hold back who is busy; if not `is_now`, nobody is unloaded yet."""
        free = self._by_score(one for one in self._staying.values() if self._free_in_s(one, claim) == 0)
        found = self._victims(claim, free)
        if found is not None:
            victims, placement = found
            if is_now:
                self._evict |= {victim.key: claim.key for victim in victims}
            elif self.is_late(claim):
                self._hold |= {victim.key for victim in victims}
            for victim in victims:
                self._leaving.append(self._staying.pop(victim.key))
            self._wait[claim.key] = f"{_names(victims)} is unloaded to make room"
            self._book(claim, placement)
            return
        self._look_when_time_helps(claim)
        if self.is_late(claim):
            busy = [one for one in self._staying.values() if not one.is_pinned and one not in free]
            found = self._victims(claim, [*free, *self._by_end(busy, claim)])
            if found is not None:
                victims, placement = found
                turns = {victim.key: turn_s for victim in victims if (turn_s := self._turn_s(victim, claim)) != 0}
                if turns:
                    having = _names(victim for victim in victims if victim.key in turns)
                    self._wait[claim.key] = f"{having} has its turn, then makes room"
                    self._looks += filter(None, turns.values())
                else:
                    # The idle ones too: they would be busy again by the time that the last of the others is idle.
                    self._hold |= {victim.key for victim in victims}
                    ending = _names(victim for victim in victims if victim in busy)
                    self._wait[claim.key] = f"{ending} ends what it has begun, then makes room"
                for victim in victims:  # it stays until it is idle, but nobody else gets its room
                    self._leaving.append(self._staying.pop(victim.key))
                self._book(claim, placement)
                return
            self._is_closed = True
        self._wait[claim.key] = self._blockers(claim) or why

    # --- what fits

    def _fit(self, claim: Claim, holders: Sequence[Holder]) -> Placement | str:
        """Its place beside these holders, or why there is none.

        What is promised to those that wait may be the room of holders that are leaving, so it does not come on top of
        theirs: there has to be room beside what is held now, and beside what will be held then.
        """
        leaving = {one.key for one in self._leaving}
        staying = [one for one in holders if one.key not in leaving]
        for loaded in (_loaded(holders) | self._starting, _loaded(staying) | self._coming):
            if why := _over(claim, loaded, self._rules):
                return why
        now, then = self._held(), Counter[str](self._promised)
        for one in holders:
            now.update(one.memory)
        for one in staying:
            then.update(one.memory)
        placement = place(claim.needs, self._view, now | then, **self._wishes(claim))
        return placement.text if isinstance(placement, NoRoom) else placement

    def _held(self) -> Counter[str]:
        """What those hold that start now."""
        held = Counter[str]()
        for placement in self._start.values():
            held.update(placement.memory)
        return held

    def _wishes(self, claim: Claim) -> _Wishes:
        """Copies that start in the same round are as far apart as others."""
        beside = [one for key, one in self._start.items() if key[0] == claim.key[0]]
        starting = tuple(uuid for placement in beside for uuid in placement.gpu_uuids or ())
        return _Wishes(cpu_fallback=claim.cpu_fallback, apart_from=(*claim.apart_from, *starting))

    def _never(self, claim: Claim, devices: Sequence[Device]) -> tuple[str, bool] | None:
        """Why it cannot have room whoever of ours goes, and whether that is for ever."""
        pinned = [one for one in self._staying.values() if one.is_pinned]
        promised = Counter[str]()
        for one in pinned:
            promised.update(one.memory)
        if why := _over(claim, _loaded(pinned), self._rules):
            return f"{why}, and {_names(pinned)} is pinned", False
        if not isinstance(refusal := place(claim.needs, devices, promised, **self._wishes(claim)), NoRoom):
            return None
        empty = [msgspec.structs.replace(device, foreign_bytes=0) for device in devices]
        for_ever = isinstance(place(claim.needs, empty, {}, **self._wishes(claim)), NoRoom)
        by_pinned = f" {_names(pinned)} is pinned." if pinned and not for_ever else ""
        return refusal.text + by_pinned, for_ever

    def _refuse_or_settle(self, claim: Claim, refusal: tuple[str, bool]) -> None:
        """Memory that was given back a moment ago may yet be told as taken."""
        _, for_ever = refusal
        is_new = self._now - claim.since < SETTLE_S
        at_best = [device.at_best for device in self._devices]
        fits_at_best = self._never(claim, at_best) is None
        if for_ever or not (is_new or fits_at_best):
            self._refuse[claim.key] = refusal
            return
        if fits_at_best and not claim.is_extra:
            self._view = at_best
            self._keep_for(claim, refusal[0])
            self._view = self._devices
        self._wait[claim.key] = refusal[0]
        self._looks.append(SETTLE_PAUSE_S)

    def _keep_for(self, claim: Claim, why: str) -> None:
        """It gets what it can have without what others took a moment ago: else the smaller would always come first."""
        staying = list(self._staying.values())
        for holders in ([*staying, *self._leaving], staying):
            if isinstance(placement := self._fit(claim, holders), Placement):
                self._book(claim, placement)
                return
        self._make_room(claim, why, is_now=False)

    def _book(self, claim: Claim, placement: Placement) -> None:
        self._promised.update(placement.memory)
        self._coming[claim.key[0]] = claim.group

    # --- who goes

    def _free_in_s(self, holder: Holder, claim: Claim) -> float | None:
        """After how long it may go, if nobody asks for it meanwhile; None if time alone does not free it."""
        if holder.is_pinned or holder.work or holder.ready_since is None:
            return None
        keep_s = 0.0 if self.is_late(claim) else KEEP * holder.load_s
        free_at = max(holder.ready_since + self._rules.min_residency_s, holder.idle_since + keep_s)
        return max(0.0, free_at - self._now)

    def _turn_s(self, holder: Holder, claim: Claim) -> float | None:
        """For how long it is not to be held back yet: it was loaded a moment ago, or answers who has waited for longer.

        None while it loads.
        """
        if holder.ready_since is None:
            return None
        until = holder.ready_since + self._rules.min_residency_s
        if holder.waiting_since is not None and holder.waiting_since < claim.since:
            until = max(until, holder.ready_since + max(self._rules.max_wait_s, holder.load_s))
        return max(0.0, until - self._now)

    def _victims(self, claim: Claim, order: Sequence[Holder]) -> tuple[list[Holder], Placement] | None:
        """The fewest that have to go, the first before the next; None if all do not suffice."""
        victims: list[Holder] = []

        def without(gone: Sequence[Holder]) -> Placement | str:
            return self._fit(claim, [one for one in self._staying.values() if one not in gone])

        placement: Placement | str = ""
        for candidate in order:
            victims.append(candidate)
            if isinstance(placement := without(victims), Placement):
                break
        if not isinstance(placement, Placement):
            return None
        for candidate in victims[-2::-1]:  # some went in vain
            fewer = [one for one in victims if one is not candidate]
            if isinstance(better := without(fewer), Placement):
                victims, placement = fewer, better
        return victims, placement

    def _by_score(self, holders: Iterable[Holder]) -> list[Holder]:
        """Who is held stays so until it has gone: by the score alone, each answer would change who is to go."""
        return sorted(holders, key=lambda one: (not one.is_held, -one.keep_score(self._now)))

    def _by_end(self, holders: Iterable[Holder], claim: Claim) -> list[Holder]:
        """Who is expected to end what it has begun first; a load that others wait for is the last to be thrown away."""

        def turn(one: Holder) -> tuple[bool, bool, float, float]:
            is_awaited = one.ready_since is None and one.work > 0
            turn_s = self._turn_s(one, claim)
            ends_in_s = one.busy_s + self._rules.min_residency_s if turn_s is None else max(one.busy_s, turn_s)
            return is_awaited, not one.is_held, ends_in_s, -one.keep_score(self._now)

        return sorted(holders, key=turn)

    # --- what is told

    def _look_when_time_helps(self, claim: Claim) -> None:
        """Note when a holder may go, and when the claim has waited for long enough."""
        rests = [rest_s for one in self._staying.values() if (rest_s := self._free_in_s(one, claim))]
        if not self.is_late(claim):
            rests.append(claim.since + self._rules.max_wait_s - self._now)
        self._looks += rests

    def _blockers(self, claim: Claim) -> str:
        """Who is in the way, and with what."""
        parts = []
        for one in self._staying.values():
            if one.is_pinned:
                parts.append(f"{one.key[0]} is pinned")
            elif one.ready_since is None:
                parts.append(f"{one.key[0]} is loading")
            elif one.work:
                parts.append(f"{one.key[0]} is busy with {one.work} request{'s' * (one.work > 1)}")
            else:
                parts.append(f"{one.key[0]} was used or loaded a moment ago")
        return ", ".join(dict.fromkeys(parts))


def _over(claim: Claim, loaded: Mapping[str, str | None], rules: Rules) -> str | None:
    """Which rule about models at once it would break beside those that are loaded: uid -> group."""
    uid = claim.key[0]
    others = {name: group for name, group in loaded.items() if name != uid}
    if uid not in loaded and rules.max_loaded is not None and len(others) >= rules.max_loaded:
        return f"max_loaded {rules.max_loaded} is reached"
    if claim.group is not None and claim.group in rules.groups:
        limit, is_alone = rules.groups[claim.group]
        if uid not in loaded and sum(group == claim.group for group in others.values()) >= limit:
            return f"the group {claim.group} has its {limit} loaded"
        if is_alone and any(group != claim.group for group in others.values()):
            return f"the group {claim.group} is loaded alone"
    for name, group in others.items():
        if group != claim.group and rules.groups.get(group or "", (0, False))[1]:
            return f"{name} is loaded, and its group {group} is loaded alone"
    return None


def _loaded(holders: Iterable[Holder]) -> dict[str, str | None]:
    return {one.key[0]: one.group for one in holders}


def _names(holders: Iterable[Holder]) -> str:
    return ", ".join(dict.fromkeys(one.key[0] for one in holders)) or "another model"
