"""Who gets room, who waits, and who makes room. Pure: what is wished and what is there in, what to do out.

A *claim* is a replica that wants to start, a *holder* one that has a place. Room is memory, and how many models may be
loaded at once. What was promised counts until the process is gone, so that no two promises overlap.

The order of claims: who has waited too long, the longest first; then by priority, then who came first. A claim that
has to wait keeps what it is going to get: a later one may only start where that delays nobody before it. Room is made
by holders that are idle for a moment at least, so that all who ask for a model are answered before it goes; and of
those by the ones that have been idle longest for what it costs to have them back. Who answers is never ended: if
somebody has waited for `max_wait_s`, the busy are given no more requests, and answer what they have. Nobody goes for a
model for which nobody waits, unless it is to be loaded in any case.

A claim that will do with less (a shorter context, fewer layers on GPUs, the CPU) gets the best that there is room for
once all have gone that are idle, and those go for it; before it has waited too long, it waits for those that were used
a moment ago, too. Nobody who is busy is waited for: rather it gets less.

A holder that can sleep keeps a little of its room and is back soon, so it sleeps rather than it ends, in the lightest
*bed* that suffices. One that sleeps claims the rest again, on the same devices, once it is asked for; and it is ended
where even what it has kept is needed.

An engine that falls asleep may see by its GPU's free memory whether it did, so nobody takes of that meanwhile: nobody
starts or wakes where another falls asleep, and nobody is put to sleep where another wakes. Both last seconds, and are
waited for. A load lasts minutes, so it is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypedDict

import msgspec

from engines.base import RAM, Needs, Placement
from gateway.placement import Device, NoRoom, count_ways, place, regain
from gateway.sentences import listed, said_of

SETTLE_S = 5.0  # memory that just came back is not everywhere told at once
SETTLE_PAUSE_S = 0.5
RISE_PAUSE_S = 0.5  # until who wakes may be awake
LEAST_LOAD_S = 0.5
KEEP = 0.25  # of the time that it takes to load: idle for so long, a model is not likely to be asked in the next moment

Key = tuple[str, int]  # of a replica: its uid and its number


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How many models at once, and how patient everybody is. `groups`: name -> (how many at once, and alone or not).

    `sleep_bytes` of the machine's memory may be taken for sleeping, by all together. Who sleeps is not loaded.
    """

    max_loaded: int | None = None
    groups: Mapping[str, tuple[int, bool]] = {}
    min_residency_s: float = 0.0
    max_wait_s: float = 30.0
    sleep_bytes: int = 0


class Bed(msgspec.Struct, frozen=True, kw_only=True):
    """How a holder could sleep: what it holds then, and how much of that it has taken of the machine's memory for it.

    `wake_s` is what it takes to have it back.
    """

    tier: str
    memory: Mapping[str, int] = {}
    host_bytes: int = 0
    wake_s: float = LEAST_LOAD_S


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that wants to start. `since` is when somebody began to wait for it, in monotonic seconds.

    `is_extra`: another copy of the model has a place, or waits for it before this one, for which nobody else has to go
    then. It rather goes to other devices than those that the other copies have, `apart_from`. `is_wished`: somebody
    waits for it, or it is to be loaded in any case; else it gets only what is left. `awake`: it sleeps, and has to have
    all of this to wake; `needs` are those of a start anew. `way`: of the ways in which those may be met, the one
    that is settled on.
    """

    key: Key
    needs: Needs
    since: float
    awake: Placement | None = None
    way: int | None = None
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

    `beds` are those in which it could sleep now, who wakes quickest first. `is_tired`: it is to sleep though nobody
    needs its room. `is_new_to_it`: the first bed takes long the first time, and it is well to try that now.
    `host_bytes` of its memory are of the machine's, taken for sleeping. `falls_to` is what it will hold once it has
    fallen asleep. `is_falling_asleep`, and `is_waking`: it does so now; one that sleeps for a moment only does both.
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
    beds: tuple[Bed, ...] = ()
    is_tired: bool = False
    is_new_to_it: bool = False
    is_asleep: bool = False
    host_bytes: int = 0
    falls_to: Mapping[str, int] | None = None
    is_falling_asleep: bool = False
    is_waking: bool = False

    def in_bed(self, memory: Mapping[str, int], host_bytes: int) -> Holder:
        """As it is once it sleeps there."""
        return msgspec.structs.replace(
            self,
            memory=memory,
            host_bytes=host_bytes,
            is_asleep=True,
            beds=(),
            falls_to=None,
            is_tired=False,
            is_falling_asleep=False,
        )

    def shares_gpu(self, memory: Mapping[str, int]) -> bool:
        """Whether who holds that is on a GPU of its own."""
        return any(key != RAM and key in memory for key in self.memory)


class Move(NamedTuple):
    """A way in which a holder makes room: it sleeps in a bed, or with None it ends. `cost_s`: to have it back."""

    holder: Holder
    bed: Bed | None
    cost_s: float

    def score(self, now: float) -> float:
        """The higher, the rather it is made."""
        return (now - self.holder.idle_since) / (max(self.cost_s, LEAST_LOAD_S) * 2.0**self.holder.priority)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do now.

    `evict`: holder -> the claim it makes room for. `sleep`: holder -> the tier to sleep in; who makes room and is not
    among these, ends. `rehearse`: holder -> the tier to sleep in for a moment, keeping all its room. `hold`: holders
    that get no more requests until one that has waited too long has its place. `wait` says why as part of a sentence,
    `refuse` why and what would help. `look_again_s`: after so long time alone may change the answer.
    """

    start: dict[Key, Placement] = {}
    evict: dict[Key, Key] = {}
    sleep: dict[Key, str] = {}
    rehearse: dict[Key, str] = {}
    hold: frozenset[Key] = frozenset()
    wait: dict[Key, str] = {}
    refuse: dict[Key, NoRoom] = {}
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
    yard.put_to_bed()
    return yard.plan()


class _Wishes(TypedDict):
    cpu_fallback: bool
    apart_from: Sequence[str]
    way: int | None


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
        self._waking: list[Holder] = []  # what they have kept that are promised all of it again
        self._falling = [one for one in holders if one.is_falling_asleep]  # also those that are to, in this round
        self._rising = [one for one in holders if one.is_waking]  # and those that start now
        self._host_bytes = sum(one.host_bytes for one in holders)
        for one in [one for one in self._staying.values() if one.falls_to is not None]:
            self._shrink(one, one.in_bed(one.falls_to or {}, one.host_bytes))
        self._promised = Counter[str]()  # in this round: to those that start, and to those that wait for it
        self._coming: dict[str, str | None] = {}  # uid -> group, of these
        self._starting: dict[str, str | None] = {}  # and of those that start now
        self._closed: frozenset[str] = frozenset()  # devices of which who has waited too long waits for all there is
        self._start: dict[Key, Placement] = {}
        self._evict: dict[Key, Key] = {}
        self._sleep: dict[Key, str] = {}
        self._rehearse: dict[Key, str] = {}
        self._hold: set[Key] = set()
        self._wait: dict[Key, str] = {}
        self._refuse: dict[Key, NoRoom] = {}
        self._looks: list[float] = []

    def plan(self) -> Plan:
        """What has been written into the books."""
        return Plan(
            start=self._start,
            evict=self._evict,
            sleep=self._sleep,
            rehearse=self._rehearse,
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
        return _is_modest(claim), not is_late, 0 if is_late else -claim.priority, claim.since, claim.key

    def settle(self, claim: Claim) -> None:
        """Start it, or say for what it waits, or why it never will."""
        if self._silence and not claim.needs.is_for_cpu:
            self._wait[claim.key] = self._silence
            return
        if claim.awake is not None and claim.key not in self._staying:
            self._wait[claim.key] = "it makes room for another model, and is loaded anew"
            return
        claim = self._in_its_best_way(claim)
        staying = [one for one in self._staying.values() if one.key != claim.key]
        found = self._fit(claim, staying, (*self._leaving, *self._waking))
        if isinstance(found, Placement) and not any(found.memory.get(key) for key in self._closed):
            reach = self._reach(claim, found)
            if falling := [one for one in self._falling if one.shares_gpu(reach)]:
                self._wait[claim.key] = _of(falling, "falls asleep", "fall asleep")
                self._book(claim, found)
                return
            self._start[claim.key] = found
            self._rising.append(Holder(key=claim.key, memory=reach))
            self._starting[claim.key[0]] = claim.group
            self._staying.pop(claim.key, None)
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
            self._wait[claim.key] = f"nobody asks for it now, and there is no room for it: {found}"
            return
        if isinstance(soon := self._fit(claim, staying), Placement):
            self._wait[claim.key] = self._goers() or "another model wakes"
            self._book(claim, soon)
            return
        self._make_room(claim, found)

    def _in_its_best_way(self, claim: Claim) -> Claim:
        """The claim for the best that it can have once the idle have gone; as it is if that gives it nothing."""
        count = 1 if _is_modest(claim) or claim.awake else count_ways(claim.needs, cpu_fallback=claim.cpu_fallback)
        if count == 1:
            return claim
        others = (one for one in self._staying.values() if one.key != claim.key)
        rests_s = {one.key: self._free_in_s(Move(one, None, one.load_s), claim) for one in others}
        idle = {key: None for key, rest_s in rests_s.items() if rest_s == 0 or (rest_s and not self.is_late(claim))}
        staying = self._without(claim, idle)
        ways = (msgspec.structs.replace(claim, way=way) for way in range(count))
        return next((one for one in ways if isinstance(self._fit(one, staying), Placement)), claim)

    def put_to_bed(self) -> None:
        """The tired, all copies of a model or none; and where nobody waits, who is to try what takes long."""
        tired: dict[str, list[Holder]] = {}
        for one in self._staying.values():
            if one.is_tired and not one.work and not one.is_asleep:
                tired.setdefault(one.key[0], []).append(one)
        for uid, copies in tired.items():
            awake = [one for one in self._staying.values() if one.key[0] == uid and not one.is_asleep]
            beds = self._beds_for(copies) if len(awake) == len(copies) else {}
            if len(beds) < len(copies):
                continue
            if self._risers(copies):
                self._looks.append(RISE_PAUSE_S)
                continue
            self._falling += copies
            for one in copies:
                self._sleep[one.key] = beds[one.key].tier
                self._shrink(one, one.in_bed(beds[one.key].memory, beds[one.key].host_bytes))
        if self._wait:
            return
        loading = [one for one in self._staying.values() if one.ready_since is None]
        for one in self._staying.values():
            if any(other.shares_gpu(one.memory) for other in (*loading, *self._rising, *self._falling)):
                continue
            if one.is_new_to_it and one.beds and not one.work and self._is_free(one.beds[0], one, {}):
                self._rehearse[one.key] = one.beds[0].tier
                return  # one at a time

    def _beds_for(self, holders: Sequence[Holder]) -> dict[Key, Bed]:
        """The quickest for each, as far as there are any."""
        found: dict[Key, Bed] = {}
        for one in holders:
            for bed in one.beds:
                if self._is_free(bed, one, found):
                    found[one.key] = bed
                    break
        return found

    def _risers(self, sleepers: Iterable[Holder]) -> list[Holder]:
        """Who wakes or starts on a GPU where these are to fall asleep."""
        return [one for one in self._rising if any(one.shares_gpu(sleeper.memory) for sleeper in sleepers)]

    def _make_room(self, claim: Claim, why: str, *, is_now: bool = True) -> None:
        """Let go who is idle, or hold back who is busy; if not `is_now`, nobody goes yet."""
        free = self._by_score(self._moves(claim))
        found = self._victims(claim, free)
        if found is not None:
            beds, placement = found
            victims = [self._staying[key] for key in beds]
            ends = [victim for victim in victims if beds[victim.key] is None]
            sleeps = [victim for victim in victims if beds[victim.key] is not None]
            told = f"{_goings(ends, sleeps, 'unloaded')} to make room"
            if is_now:
                self._falling += sleeps
                if risers := self._risers(sleeps):  # a deeper move would do at once, and cost more than it spares
                    is_now = False
                    told = f"{_of(risers, 'takes its', 'take their')} room first, then {told}"
            if not is_now and self.is_late(claim):
                self._hold |= beds.keys()
            for victim in victims:
                if is_now:
                    self._evict[victim.key] = claim.key
                if (bed := beds[victim.key]) is None:
                    self._leaving.append(self._staying.pop(victim.key))
                else:
                    if is_now:
                        self._sleep[victim.key] = bed.tier
                    self._shrink(victim, victim.in_bed(bed.memory, bed.host_bytes))
            self._wait[claim.key] = told
            self._book(claim, placement)
            return
        if is_now and claim.awake is not None and isinstance(self._fit_anew(claim), Placement):
            self._refuse[claim.key] = NoRoom(reason="others are busy where it sleeps, and there is room elsewhere")
            return
        self._look_when_time_helps(claim)
        if self.is_late(claim):
            idle = {move.holder.key for move in free}
            others = [one for one in self._staying.values() if not one.is_pinned and one.key != claim.key]
            busy = [Move(one, None, one.load_s) for one in others if one.key not in idle]
            found = self._victims(claim, [*free, *self._by_end(busy, claim)])
            if found is not None:
                beds, placement = found
                victims = [self._staying.pop(key) for key in beds]
                turns = {victim.key: turn_s for victim in victims if (turn_s := self._turn_s(victim, claim)) != 0}
                if turns:
                    having = [victim for victim in victims if victim.key in turns]
                    self._wait[claim.key] = (
                        _of(having, "has its turn, then makes", "have their turn, then make") + " room"
                    )
                    self._looks += filter(None, turns.values())
                else:
                    # The idle ones too: they would be busy again by the time that the last of the others is idle.
                    self._hold |= {victim.key for victim in victims}
                    ending = [victim for victim in victims if victim.key not in idle]
                    one, many = "ends what it has begun, then makes room", "end what they have begun, then make room"
                    self._wait[claim.key] = _of(ending, one, many)
                self._leaving += victims  # they stay until they are idle, but nobody else gets their room
                self._book(claim, placement)
                return
            self._closed |= self._coveted(claim)
        self._wait[claim.key] = self._blockers(claim) or why

    def _reach(self, claim: Claim, found: Placement) -> Mapping[str, int]:
        """What it will hold, and all GPUs for an engine that is left to choose among them."""
        if found.gpu_uuids is not None or claim.awake is not None or claim.needs.is_for_cpu:
            return found.memory
        return {device.key: 0 for device in self._devices if device.gpu} | dict(found.memory)

    def _coveted(self, claim: Claim) -> frozenset[str]:
        """The devices that may become its own, or whose models count among those of which there are too many."""
        needs = claim.needs
        if claim.awake is not None:
            keys = frozenset(claim.awake.memory)
        elif needs.is_for_cpu:
            keys = frozenset({RAM})
        else:
            may_split = needs.may_split or needs.gpu_layers is not None
            keys = frozenset(
                device.key
                for device in self._devices
                if (may_split or claim.cpu_fallback if device.gpu is None else _is_named(device, needs))
            )
        is_counted = self._rules.max_loaded is not None or bool(self._rules.groups)
        return frozenset(device.key for device in self._devices) if is_counted or not keys else keys

    # --- what fits

    def _fit(self, claim: Claim, staying: Sequence[Holder], leaving: Sequence[Holder] = ()) -> Placement | str:
        """Its place beside these holders, or why there is none.

        What is promised to those that wait may be the room of holders that are leaving, so it does not come on top of
        theirs: there has to be room beside what is held now, and beside what will be held then. In between some come
        before others leave; so who is modest has to fit beside all of it at once.
        """
        now, then = _loaded((*staying, *leaving)) | self._starting, _loaded(staying) | self._coming
        moments = [now, then]
        if _is_modest(claim):
            uid = claim.key[0]
            stays = uid in now and uid in then  # else it counts as one more, before another copy comes or after it went
            moments.append({name: group for name, group in (now | then).items() if name != uid or stays})
        for loaded in moments:
            if why := over(claim, loaded, self._rules):
                return why
        taken = self._taken(staying, leaving)
        if _is_modest(claim):
            taken |= self._taken_by_all(staying)
        if claim.awake is not None:
            placement = regain(claim.awake, self._view, taken)
        else:
            placement = place(claim.needs, self._view, taken, **self._wishes(claim))
        return placement.reason if isinstance(placement, NoRoom) else placement

    def _fit_anew(self, claim: Claim) -> Placement | str:
        """The place of one that sleeps if it were started anew now, beside what it has kept."""
        staying = list(self._staying.values())
        return self._fit(msgspec.structs.replace(claim, awake=None), staying, (*self._leaving, *self._waking))

    def _taken(self, staying: Iterable[Holder], leaving: Iterable[Holder]) -> Counter[str]:
        now, then = self._held(), Counter[str](self._promised)
        for one in staying:
            now.update(one.memory)
            then.update(one.memory)
        for one in leaving:
            now.update(one.memory)
        return now | then

    def _taken_by_all(self, staying: Iterable[Holder]) -> Counter[str]:
        """As if those that are promised room had it while all others stay."""
        taken = Counter[str](self._promised)
        for one in (*staying, *self._leaving):
            taken.update(one.memory)
        return taken

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
        return _Wishes(cpu_fallback=claim.cpu_fallback, apart_from=(*claim.apart_from, *starting), way=claim.way)

    def _never(self, claim: Claim, devices: Sequence[Device]) -> NoRoom | None:
        """Why it cannot have room whoever of ours goes, and whether that is for ever."""
        pinned = [one for one in self._staying.values() if one.is_pinned and one.key != claim.key]
        promised = Counter[str]()
        for one in pinned:
            promised.update(one.memory)
        if why := over(claim, _loaded(pinned), self._rules):
            return _beside_pinned(NoRoom(reason=why), pinned)
        if claim.awake is not None:
            found = regain(claim.awake, devices, promised)
            return found if isinstance(found, NoRoom) else None
        if not isinstance(refusal := place(claim.needs, devices, promised, **self._wishes(claim)), NoRoom):
            return None
        empty = [msgspec.structs.replace(device, foreign_bytes=0) for device in devices]
        for_ever = isinstance(place(claim.needs, empty, {}, **self._wishes(claim)), NoRoom)
        refusal = msgspec.structs.replace(refusal, for_ever=for_ever)
        without_pinned = place(claim.needs, devices, {}, **self._wishes(claim))
        return _beside_pinned(refusal, pinned) if isinstance(without_pinned, Placement) else refusal

    def _refuse_or_settle(self, claim: Claim, refusal: NoRoom) -> None:
        """Memory that was given back a moment ago may yet be told as taken."""
        is_new = self._now - claim.since < SETTLE_S
        at_best = [device.at_best for device in self._devices]
        fits_at_best = self._never(claim, at_best) is None
        if refusal.for_ever or not (is_new or fits_at_best):
            self._refuse[claim.key] = refusal
            return
        if fits_at_best and not claim.is_extra:
            self._view = at_best
            self._keep_for(claim, refusal.reason)
            self._view = self._devices
        self._wait[claim.key] = refusal.reason
        self._looks.append(SETTLE_PAUSE_S)

    def _keep_for(self, claim: Claim, why: str) -> None:
        """It gets what it can have without what others took a moment ago: else the smaller would always come first."""
        staying = [one for one in self._staying.values() if one.key != claim.key]
        if isinstance(placement := self._fit(claim, staying), Placement):
            self._book(claim, placement)
        else:
            self._make_room(claim, why, is_now=False)

    def _book(self, claim: Claim, placement: Placement) -> None:
        self._promised.update(placement.memory)
        self._coming[claim.key[0]] = claim.group
        if (asleep := self._staying.pop(claim.key, None)) is not None:
            self._waking.append(asleep)

    def _shrink(self, holder: Holder, asleep: Holder) -> None:
        """It falls asleep: until then it holds what it held."""
        rest = {key: size - asleep.memory.get(key, 0) for key, size in holder.memory.items()}
        rest = {key: size for key, size in rest.items() if size > 0}
        self._staying[holder.key] = asleep
        self._leaving.append(msgspec.structs.replace(holder, memory=rest, host_bytes=0, is_leaving=True))
        self._host_bytes += asleep.host_bytes - holder.host_bytes

    # --- who goes

    def _moves(self, claim: Claim) -> list[Move]:
        """What holders may do for the claim now that are idle."""
        others = [one for one in self._staying.values() if one.key != claim.key]
        return [move for one in others for move in _moves_of(one) if self._free_in_s(move, claim) == 0]

    def _free_in_s(self, move: Move, claim: Claim) -> float | None:
        """After how long it may be made, if nobody asks for it meanwhile; None if time alone does not help."""
        holder = move.holder
        if holder.is_pinned or holder.work or holder.ready_since is None:
            return None
        if holder.is_asleep:
            return 0.0
        keep_s = 0.0 if self.is_late(claim) else KEEP * move.cost_s
        free_at = max(holder.ready_since + self._rules.min_residency_s, holder.idle_since + keep_s)
        return max(0.0, free_at - self._now)

    def _turn_s(self, holder: Holder, claim: Claim) -> float | None:
        """For how long it is not to be held back yet: it was loaded a moment ago, or answers who has waited for longer.

        None while it loads.
        """
        if holder.ready_since is None:
            return None
        if holder.is_asleep:
            return 0.0
        until = holder.ready_since + self._rules.min_residency_s
        if holder.waiting_since is not None and holder.waiting_since < claim.since:
            until = max(until, holder.ready_since + max(self._rules.max_wait_s, holder.load_s))
        return max(0.0, until - self._now)

    def _victims(self, claim: Claim, order: Sequence[Move]) -> tuple[dict[Key, Bed | None], Placement] | None:
        """The fewest that have to make room, the first before the next, and each as lightly as suffices; None if all
        do not suffice.
        """
        made: dict[Key, Bed | None] = {}
        placement: Placement | str = ""
        for move in order:
            key = move.holder.key
            if not _is_deeper(move, made) or (move.bed and not self._is_free(move.bed, move.holder, made)):
                continue
            made[key] = move.bed
            if isinstance(placement := self._fit(claim, self._without(claim, made)), Placement):
                break
        if not isinstance(placement, Placement):
            return None
        for key in reversed(list(made)):  # some went in vain
            fewer = {one: bed for one, bed in made.items() if one != key}
            if isinstance(better := self._fit(claim, self._without(claim, fewer)), Placement):
                made, placement = fewer, better
        for key, bed in made.items():  # or farther than need be
            for lighter in self._staying[key].beds:
                if lighter == bed:
                    break
                other = made | {key: lighter}
                if not self._is_free(lighter, self._staying[key], made):
                    continue
                if isinstance(better := self._fit(claim, self._without(claim, other)), Placement):
                    made, placement = other, better
                    break
        return made, placement

    def _without(self, claim: Claim, made: Mapping[Key, Bed | None]) -> list[Holder]:
        """Who stays once these moves are made, but for the claim's own."""
        staying = []
        for key, one in self._staying.items():
            if key == claim.key:
                continue
            if key not in made:
                staying.append(one)
            elif (bed := made[key]) is not None:
                staying.append(one.in_bed(bed.memory, bed.host_bytes))
        return staying

    def _is_free(self, bed: Bed, holder: Holder, made: Mapping[Key, Bed | None]) -> bool:
        """Whether the machine's memory has what it takes for it to sleep there, beside the beds that others take."""
        if (more := bed.host_bytes - holder.host_bytes) <= 0:
            return True
        others = ((self._staying[key], other) for key, other in made.items() if other and key != holder.key)
        more += sum(max(0, other.host_bytes - one.host_bytes) for one, other in others)
        if self._host_bytes + more > self._rules.sleep_bytes:
            return False
        taken = self._taken(self._staying.values(), (*self._leaving, *self._waking))
        return all(device.free(taken) >= more for device in self._view if device.key == RAM)

    def _by_score(self, moves: Iterable[Move]) -> list[Move]:
        """Who is held stays so until it has gone: by the score alone, each answer would change who is to go."""
        return sorted(moves, key=lambda move: (not move.holder.is_held, -move.score(self._now)))

    def _by_end(self, moves: Iterable[Move], claim: Claim) -> list[Move]:
        """Who is expected to end what it has begun first; a load that others wait for is the last to be thrown away."""

        def turn(move: Move) -> tuple[bool, bool, float, float]:
            one = move.holder
            is_awaited = one.ready_since is None and one.work > 0
            turn_s = self._turn_s(one, claim)
            ends_in_s = one.busy_s + self._rules.min_residency_s if turn_s is None else max(one.busy_s, turn_s)
            return is_awaited, not one.is_held, ends_in_s, -move.score(self._now)

        return sorted(moves, key=turn)

    # --- what is told

    def _look_when_time_helps(self, claim: Claim) -> None:
        """Note when a holder may go, and when the claim has waited for long enough."""
        moves = (move for one in self._staying.values() if one.key != claim.key for move in _moves_of(one))
        rests = [rest_s for move in moves if (rest_s := self._free_in_s(move, claim))]
        if not self.is_late(claim):
            rests.append(claim.since + self._rules.max_wait_s - self._now)
        self._looks += rests

    def _goers(self) -> str:
        """Who makes room already, and how."""
        ends = [one for one in self._leaving if one.key not in self._staying]
        sleeps = [one for one in self._leaving if one.key in self._staying]
        return _goings(ends, sleeps, "being unloaded")

    def _blockers(self, claim: Claim) -> str:
        """Who is in the way, and with what."""
        parts = []
        for one in self._staying.values():
            if one.key == claim.key:
                continue
            if one.is_pinned:
                parts.append(f"{one.key[0]} is pinned")
            elif one.ready_since is None:
                parts.append(f"{one.key[0]} is loading")
            elif one.is_asleep:
                parts.append(f"{one.key[0]} sleeps, and {'is asked for' if one.work else 'keeps a little of its room'}")
            elif one.work:
                parts.append(f"{one.key[0]} is busy with {one.work} request{'s' * (one.work > 1)}")
            else:
                parts.append(f"{one.key[0]} was used or loaded a moment ago")
        return ", ".join(dict.fromkeys(parts))


def _is_modest(claim: Claim) -> bool:
    """Whether nobody makes room for it, and it takes only what is left."""
    return claim.is_extra or not claim.is_wished


def _is_named(gpu: Device, needs: Needs) -> bool:
    """Whether it is one of those that may meet the needs."""
    return needs.gpu_idx is None or (gpu.gpu is not None and gpu.gpu.index in needs.gpu_idx)


def over(claim: Claim, loaded: Mapping[str, str | None], rules: Rules) -> str | None:
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
    return {one.key[0]: one.group for one in holders if not one.is_asleep}


def _moves_of(holder: Holder) -> list[Move]:
    """All that it could do to make room."""
    return [*(Move(holder, bed, bed.wake_s) for bed in holder.beds), Move(holder, None, holder.load_s)]


def _is_deeper(move: Move, made: Mapping[Key, Bed | None]) -> bool:
    """Whether it leaves more room than what its holder does already."""
    if move.holder.key not in made:
        return True
    bed = made[move.holder.key]
    return bed is not None and (move.bed is None or sum(move.bed.memory.values()) < sum(bed.memory.values()))


def _of(holders: Iterable[Holder], one: str, many: str) -> str:
    """What is said of these models, or of another one where it is not known which."""
    return said_of([holder.key[0] for holder in holders] or ["another model"], one, many)


def _goings(ends: Sequence[Holder], sleeps: Sequence[Holder], how: str) -> str:
    """Who makes room, and how."""
    told = (_of(ends, f"is {how}", f"are {how}") if ends else "", _of(sleeps, "falls asleep", "fall asleep"))
    return " and ".join(filter(None, told if sleeps else told[:1]))


def _beside_pinned(refusal: NoRoom, pinned: Sequence[Holder]) -> NoRoom:
    """With who is in the way and may not go."""
    return msgspec.structs.replace(
        refusal,
        reason=f"{refusal.reason}, and {_of(pinned, 'is pinned', 'are pinned')}",
        remedies=(*refusal.remedies, f"Unpin {listed(one.key[0] for one in pinned)}."),
    )
