"""Which devices a replica gets and how much of each, or the sentence why it gets none. Pure.

A device is a GPU, a slice of one, or the machine's memory. What a replica may have of it is what is neither kept free
(head-room), held by others (foreign), nor promised to replicas of ours.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from engines.base import RAM, Launch, Needs, Placement
from gateway.amounts import megabytes
from gateway.gpus import Gpu
from gateway.sentences import listed, said_of
from registry.memory import kv_cache_bytes, most_tokens

ENDLESS = 2**60
NUMBERS = re.compile(r"(\d+(,\d+)*)?")
SHOWN = 3  # specs and holders in a sentence


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU by its uuid, or the machine's memory as RAM, as it is now.

    `total_bytes` is 0 where it does not tell: everything fits there. `foreign_bytes` is held by what is not ours; of
    these `passing_bytes` came so lately that they may be gone as soon, such as those of an engine that just ended.
    `holders` are names for sentences, and `own` those of them that are ours; `limit` is the setting that the total
    comes from, if it is not all there is.
    """

    key: str
    total_bytes: int = 0
    foreign_bytes: int = 0
    passing_bytes: int = 0
    headroom_bytes: int = 0
    gpu: Gpu | None = None
    holders: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    limit: str = ""

    @property
    def name(self) -> str:
        """What people call it."""
        return f"GPU {self.gpu.index}" if self.gpu else "the machine's memory"

    @property
    def at_best(self) -> Device:
        """As it may be in a moment: without what others hold only since a moment ago."""
        return msgspec.structs.replace(self, foreign_bytes=max(0, self.foreign_bytes - self.passing_bytes))

    def free(self, promised: Mapping[str, int]) -> int:
        """Bytes that may be promised; ENDLESS where the device does not tell. Below 0 if too much was."""
        if not self.total_bytes:
            return ENDLESS
        return self.total_bytes - self.headroom_bytes - self.foreign_bytes - promised.get(self.key, 0)


class NoRoom(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no placement: the `reason`, with what is needed, what is free and who holds the rest, as part of a
    sentence; and the `remedies` that would make it fit, each a sentence.

    `for_ever` says that it would not fit even if everything of ours went.
    """

    reason: str
    remedies: tuple[str, ...] = ()
    for_ever: bool = False

    @property
    def text(self) -> str:
        """All of it, to be read after a colon."""
        return " ".join((f"{self.reason}.", *self.remedies))


def promised_by(placements: Iterable[Placement]) -> dict[str, int]:
    """Bytes by device that all of them have together."""
    total: Counter[str] = Counter()
    for placement in placements:
        total.update(placement.memory)
    return dict(total)


def cache_bytes_of(needs: Needs) -> int:
    """Bytes of the cache of keys and values, in whole ones of the engine's unit; 0 where nobody knows."""
    if needs.cache_bytes is not None:
        return needs.cache_bytes
    if needs.cache is None:
        return 0
    return -(-kv_cache_bytes(needs.attention, needs.cache) // needs.cache_unit_bytes) * needs.cache_unit_bytes


def needs_of(launch: Launch, needs: Needs, index: int) -> Needs:
    """What that replica asks for, of what the engine asks for each.

    A launch that sets CUDA_VISIBLE_DEVICES to numbers names its GPUs by that.
    """
    if launch.gpu_idx is not None:
        return msgspec.structs.replace(needs, gpu_idx=launch.gpus_of(index))
    named = launch.envs.get("CUDA_VISIBLE_DEVICES")
    if launch.n_gpu is None and named is not None and NUMBERS.fullmatch(named):
        return msgspec.structs.replace(needs, gpu_idx=tuple(int(number) for number in named.split(",") if number))
    return needs


def how(placement: Placement) -> str:
    """How it differs from the whole wish, as part of a sentence; empty if it does not."""
    if placement.context_tokens:
        return f"with a context of {placement.context_tokens:,} tokens, as the model's own has no room"
    if placement.gpu_layers:
        return f"with {placement.gpu_layers} of its layers on GPUs, and the others on the CPU"
    return ""


def fell_back(needs: Needs, placement: Placement) -> bool:
    """Whether it got the CPU because the GPUs have no room."""
    return placement.gpu_uuids == () and not needs.is_for_cpu


def place(
    needs: Needs,
    devices: Sequence[Device],
    promised: Mapping[str, int],
    *,
    cpu_fallback: bool = False,
    apart_from: Collection[str] = (),
    way: int | None = None,
) -> Placement | NoRoom:
    """The placement, or why there is none.

    GPUs that were named are given to the letter, a number of them too; the bytes are split evenly over them. Where the
    launch says nothing, one copy gets the fullest GPU that has room for it (the emptiest, where nobody knows what it
    takes), else the fewest that have, if it can be split. The machine's memory is for those that ask for it, and for
    all where there is no GPU.

    Where the context may be shorter, it is the longest that has room; rather a shorter one than more GPUs.

    Args:
        promised: bytes by device that our replicas hold or were promised.
        cpu_fallback: whether the machine's memory will do where the GPUs have no room.
        apart_from: devices to take last, such as those of the other copies.
        way: the only one of its ways that will do, from 0, the best; else the first that has room.
    """
    ways = _all_ways(needs, cpu_fallback=cpu_fallback)
    ways = ways if way is None else ways[way : way + 1]
    found = _try(ways, needs, devices, promised, apart_from)
    if isinstance(found, Placement):
        return found
    for_ever = isinstance(_try(ways, needs, [device.at_best for device in devices], {}, ()), NoRoom)
    return msgspec.structs.replace(found, for_ever=for_ever)


def count_ways(needs: Needs, *, cpu_fallback: bool = False) -> int:
    """In how many ways it may be placed, of which each is worth less than the one before."""
    return len(_all_ways(needs, cpu_fallback=cpu_fallback))


def regain(awake: Placement, devices: Sequence[Device], promised: Mapping[str, int]) -> Placement | NoRoom:
    """The whole of what an engine had that sleeps, on the same devices, or why there is no room for it.

    Args:
        promised: as of `place`, without what it has kept.
    """
    by_key = {device.key: device for device in devices}
    full = {key: size for key, size in awake.memory.items() if key not in by_key or size > by_key[key].free(promised)}
    if not full:
        return awake
    told = "; ".join(_told(by_key[key], promised) if key in by_key else f"{key} is gone" for key in full)
    wanted = listed(f"{megabytes(size)} of {by_key[key].name if key in by_key else key}" for key, size in full.items())
    there = [by_key[key] for key in full if key in by_key]
    would_fit = all(key in by_key and size <= _emptied(by_key[key]).free({}) for key, size in full.items())
    ends = _ends(there, promised) if would_fit else []
    return _refusal(f"to wake, it needs {wanted} again, but {told}", ends)


def _all_ways(needs: Needs, *, cpu_fallback: bool) -> list[tuple[_Way, bool]]:
    """The best first, and each with whether the CPU will do; those without it go first."""
    ways = _ways(needs)
    plain = [way for way in ways if way.gpu_layers is None] or [_Way(needs=_whole(needs))]
    return [(way, False) for way in ways] + ([(way, True) for way in plain] if cpu_fallback else [])


def _try(
    ways: Sequence[tuple[_Way, bool]],
    needs: Needs,
    devices: Sequence[Device],
    promised: Mapping[str, int],
    apart_from: Collection[str],
) -> Placement | NoRoom:
    """The first that has room; else why the last one has none."""
    refusal = NoRoom(reason="")
    for way, may_fall_back in ways:
        found = _try_way(way, devices, promised, may_fall_back, apart_from)
        if isinstance(found, Placement):
            return found
        refusal = found
    return refusal if needs.may_split else _with_layers(refusal, needs, devices, promised)


class _Way(msgspec.Struct, frozen=True, kw_only=True):
    """One of the ways in which needs may be met: with fewer tokens, or with fewer layers on GPUs."""

    needs: Needs
    context_tokens: int | None = None
    gpu_layers: int | None = None
    ram_bytes: int = 0


def _ways(needs: Needs) -> list[_Way]:
    """The best first."""
    whole = _whole(needs)
    if needs.gpu_layers is not None and needs.gpu_layers in needs.splits:
        return [_split_way(whole, needs.gpu_layers, *needs.splits[needs.gpu_layers])]
    if needs.may_split:
        return [_Way(needs=whole), *(_split_way(whole, layers, *sizes) for layers, sizes in needs.splits.items())]
    ways = [_Way(needs=whole)]
    for tokens, size in needs.shorter.items():
        cache = msgspec.structs.replace(needs.cache, tokens=tokens) if needs.cache else None
        less = msgspec.structs.replace(whole, memory_bytes=size, cache=cache)
        ways.append(_Way(needs=less, context_tokens=tokens))
    if needs.shorter and needs.can_spread and needs.n_gpu is None and needs.gpu_idx is None:
        on_one = (msgspec.structs.replace(way.needs, can_spread=False) for way in ways)
        return [*(msgspec.structs.replace(way, needs=one) for way, one in zip(ways, on_one, strict=True)), *ways]
    return ways


def _whole(needs: Needs) -> Needs:
    return msgspec.structs.replace(needs, shorter={}, splits={})


def _split_way(needs: Needs, layers: int, gpu_bytes: int, ram_bytes: int) -> _Way:
    on_gpus = msgspec.structs.replace(needs, memory_bytes=gpu_bytes, lighter={})
    return _Way(needs=on_gpus, gpu_layers=layers, ram_bytes=ram_bytes)


def _try_way(
    way: _Way,
    devices: Sequence[Device],
    promised: Mapping[str, int],
    cpu_fallback: bool,
    apart_from: Collection[str],
) -> Placement | NoRoom:
    found = _try_as_it_is(way.needs, devices, promised, cpu_fallback, apart_from)
    if isinstance(found, NoRoom):
        if way.context_tokens is None or found.for_ever:
            return found
        return _refusal(f"with a context of only {way.context_tokens:,} tokens {found.reason}", found.remedies)
    if found.gpu_uuids and way.gpu_layers is not None:
        asked = Needs(memory_bytes=way.ram_bytes)
        beside = _on_cpu(asked, devices, promised, ())
        if isinstance(beside, NoRoom):
            return _refusal(f"for the layers that are not on a GPU, {beside.reason}", beside.remedies)
        memory = {**found.memory, **beside.memory}
        return msgspec.structs.replace(found, memory=memory, gpu_layers=way.gpu_layers)
    return msgspec.structs.replace(found, context_tokens=way.context_tokens)


def _with_layers(refusal: NoRoom, needs: Needs, devices: Sequence[Device], promised: Mapping[str, int]) -> NoRoom:
    """The refusal with how many layers would have room on the GPUs, if any would."""
    for layers, sizes in needs.splits.items():
        way = _split_way(_whole(needs), layers, *sizes)
        found = _try_way(way, devices, promised, False, ())
        if isinstance(found, Placement) and found.gpu_layers:
            of = f"{layers} of its {len(needs.splits) + 1} layers have room on GPUs, the others in the machine's memory"
            return _refusal(refusal.reason, (f"Say n_gpu_layers {layers}: {of}.", *refusal.remedies))
    return refusal


def _try_as_it_is(
    needs: Needs,
    devices: Sequence[Device],
    promised: Mapping[str, int],
    cpu_fallback: bool,
    apart_from: Collection[str],
) -> Placement | NoRoom:
    gpus = {device.gpu.index: device for device in devices if device.gpu}
    if needs.is_for_cpu:
        return _on_cpu(needs, devices, promised, ())
    if needs.gpu_idx is None and needs.n_gpu is None and not gpus:
        return _on_cpu(needs, devices, promised, None)
    if needs.chooses and needs.gpu_idx is None and needs.n_gpu is None and not _is_known(needs):
        return Placement()
    found = _on_gpus(needs, gpus, promised, apart_from)
    if isinstance(found, NoRoom) and cpu_fallback and needs.gpu_idx is None:
        instead = _on_cpu(needs, devices, promised, ())
        if isinstance(instead, Placement):
            return instead
        return _refusal(f"{found.reason}; and on the CPU {instead.reason}", (*found.remedies, *instead.remedies))
    return found


def _on_gpus(
    needs: Needs, gpus: Mapping[int, Device], promised: Mapping[str, int], apart_from: Collection[str]
) -> Placement | NoRoom:
    if needs.gpu_idx is not None:
        wanted = tuple(dict.fromkeys(needs.gpu_idx))
        if missing := [index for index in wanted if index not in gpus]:
            return _not_there(f"it asks for {_gpus_named(missing)}", missing, gpus)
        named = [gpus[index] for index in wanted]
        if all(_has_room(device, needs, len(named), promised) for device in named):
            return _given(named, needs)
        return _no_room(needs, named, len(named), promised, gpus)
    counts = [needs.n_gpu] if needs.n_gpu is not None else [1]
    if needs.n_gpu is None and needs.can_spread:
        whole = sum(not _is_slice(device) for device in gpus.values())
        counts += [count for count in range(2, whole + 1) if count in (needs.gpu_counts or (count,))]
    for count in counts:
        usable = [device for device in gpus.values() if count == 1 or not _is_slice(device)]
        if needs.n_gpu is not None and count > len(usable):
            return _not_there(f"it asks for {count} {'GPU' if count == 1 else 'GPUs'}", (), gpus)
        roomy = [device for device in usable if _has_room(device, needs, count, promised)]
        if len(roomy) >= count:
            order = 1 if _is_known(needs) else -1
            roomy.sort(key=lambda device: (device.key in apart_from, order * device.free(promised)))
            return _given(roomy[:count], needs)
    return _no_room(needs, usable, count, promised, gpus)


def _on_cpu(
    needs: Needs, devices: Sequence[Device], promised: Mapping[str, int], gpu_uuids: tuple[str, ...] | None
) -> Placement | NoRoom:
    ram = next((device for device in devices if device.gpu is None), Device(key=RAM))
    if needs.memory_bytes and needs.memory_bytes > ram.free(promised):
        return _no_room(msgspec.structs.replace(needs, gpu_share=None), (ram,), 1, promised, {})
    return Placement(gpu_uuids=gpu_uuids, memory={RAM: needs.memory_bytes}, cache_bytes=cache_bytes_of(needs))


def _given(devices: Sequence[Device], needs: Needs) -> Placement:
    return Placement(
        gpu_uuids=tuple(device.key for device in devices),
        memory={device.key: _share(device, needs, len(devices)) for device in devices},
        gpu_totals={device.key: device.total_bytes for device in devices},
        cache_bytes=cache_bytes_of(needs),
    )


def _share(device: Device, needs: Needs, count: int) -> int:
    """Of one device, if so many are taken: as the engine takes it, or else as much as it needs."""
    if needs.gpu_share is not None:
        return math.ceil(device.total_bytes * needs.gpu_share)
    return _split(needs, count)


def _split(needs: Needs, count: int) -> int:
    """Bytes on each of so many devices."""
    whole = min(needs.overhead_bytes, needs.memory_bytes)
    return -(-(needs.memory_bytes - whole) // count) + whole


def _has_room(device: Device, needs: Needs, count: int, promised: Mapping[str, int]) -> bool:
    share = _share(device, needs, count)
    if needs.gpu_share is not None and device.total_bytes and _split(needs, count) > share:
        return False
    return not share or share <= device.free(promised)


def _is_known(needs: Needs) -> bool:
    return bool(needs.memory_bytes or needs.gpu_share)


def _is_slice(device: Device) -> bool:
    return device.gpu is not None and device.gpu.slice_of is not None


# --- sentences


def _not_there(asked: str, missing: Collection[int], gpus: Mapping[int, Device]) -> NoRoom:
    slices = [index for index, device in gpus.items() if _is_slice(device)]
    whole = [index for index in gpus if index not in slices]
    there = [f"{len(whole)} ({listed(whole)})"] if whole else []
    if slices:
        count = "1 slice" if len(slices) == 1 else f"{len(slices)} slices"
        there.append(f"{count} of GPUs ({listed(slices)}){'' if missing else ', which cannot be joined'}")
    cut = set(missing) & {device.gpu.slice_of for device in gpus.values() if device.gpu}
    is_cut = f"; {said_of((f'GPU {index}' for index in sorted(cut)), 'is', 'are')} cut into slices" if cut else ""
    said = f"{asked}, and this machine has {listed(there) or 'none'}{is_cut}"
    return _refusal(said, ("Change gpu_idx or n_gpu.",), for_ever=True)


def _no_room(
    needs: Needs, devices: Sequence[Device], count: int, promised: Mapping[str, int], gpus: Mapping[int, Device]
) -> NoRoom:
    """Of devices that are there and too full."""
    told = "; ".join(_told(device, promised) for device in devices)
    if needs.gpu_share is None:
        each = f", {megabytes(_share(devices[0], needs, count))} on each of {count} GPUs" if count > 1 else ""
        said = f"it needs about {megabytes(needs.memory_bytes)}{each}, but {told}"
    else:
        share = f"{needs.gpu_share:.0%} of {'a GPU' if count == 1 else f'each of {count} GPUs'}"
        said = f"it takes {share}, but {told}"
        if _share_is_too_small(needs, devices, count):
            each = megabytes(_split(needs, count))
            said = f"it needs about {each} on {'a GPU' if count == 1 else 'each GPU'}, and may take {share}: {told}"
    return _refusal(said, _remedies(needs, devices, count, promised, gpus))


def _share_is_too_small(needs: Needs, devices: Sequence[Device], count: int) -> bool:
    return any(device.total_bytes and _split(needs, count) > _share(device, needs, count) for device in devices)


def _told(device: Device, promised: Mapping[str, int]) -> str:
    if not device.total_bytes:
        return f"{device.name} does not tell its memory"
    taken = []
    own = ", ".join(name for name in device.holders if name in device.own)
    others = ", ".join(name for name in device.holders if name not in device.own)
    if given := promised.get(device.key):
        taken.append(f"{megabytes(given)} are given to models" + (f" ({own})" if own else ""))
    if device.foreign_bytes:
        taken.append(f"{megabytes(device.foreign_bytes)} are held by others" + (f" ({others})" if others else ""))
    if device.headroom_bytes:
        taken.append(f"{megabytes(device.headroom_bytes)} are kept free")
    total = f"{megabytes(device.total_bytes)}{f' ({device.limit})' if device.limit else ''}"
    rest = f": {listed(taken)}" if taken else ""
    return f"{device.name} has {megabytes(max(0, device.free(promised)))} of {total} free{rest}"


def _remedies(
    needs: Needs, devices: Sequence[Device], count: int, promised: Mapping[str, int], gpus: Mapping[int, Device]
) -> list[str]:
    free = sorted((device.free(promised) for device in devices), reverse=True)[:count]
    room_bytes = max(0, free[-1] * count) if free else 0
    said = []
    would_hold = [device.total_bytes - device.headroom_bytes >= _split(needs, count) for device in devices]
    if needs.gpu_share is not None and _share_is_too_small(needs, devices, count) and sum(would_hold) >= count:
        said.append("Let it take more of each GPU, by the engine's option for that.")
    elif needs.gpu_share is not None and needs.memory_bytes and free and free[-1] >= _split(needs, count):
        said.append("Let it take less of each GPU, by the engine's option for that.")
    if needs.cache and needs.attention and needs.cache_bytes is None and needs.gpu_share is None:
        rest = room_bytes - (needs.memory_bytes - cache_bytes_of(needs))
        tokens = most_tokens(needs.attention, needs.cache, rest) if rest > 0 else 0
        if tokens and tokens * needs.cache.sequences >= needs.cache_tokens:  # a shorter one would take as much
            said.append(f"Lower context_length: up to {tokens:,} tokens of each request fit.")
    smaller = [name for name, size in needs.lighter.items() if size <= room_bytes]
    if smaller:
        said.append(f"Take another spec of the family: {listed(smaller[:SHOWN], 'or')}.")
    if (n_gpu := _enough(needs, gpus, promised)) and needs.gpu_idx is None and n_gpu != needs.n_gpu:
        enough = "the emptiest GPU has" if n_gpu == 1 else f"the emptiest {n_gpu} GPUs have"
        said.append(f"Say n_gpu {n_gpu}: {enough} room for one copy.")
    if sum(_has_room(_emptied(device), needs, count, {}) for device in devices) >= count:
        said += _ends(devices, promised)
    unkept = [device.free(promised) + device.headroom_bytes >= _share(device, needs, count) for device in devices]
    if sum(unkept) >= count and any(device.headroom_bytes for device in devices):
        said.append(f"Lower {'gpu_headroom' if gpus else 'ram_headroom'}.")
    if any(device.limit == "ram_limit" for device in devices):
        said.append("Raise ram_limit, if the machine has more.")
    if needs.gpu_share is None:
        said.append("Set `memory` of the launch, if it takes less than is estimated.")
    return said


def _emptied(device: Device) -> Device:
    return msgspec.structs.replace(device, foreign_bytes=0)


def _ends(devices: Sequence[Device], promised: Mapping[str, int]) -> list[str]:
    """Who may be ended: of ours only those that count, as others are taken to have gone."""
    found = [name for one in devices for name in one.holders if promised.get(one.key) or name not in one.own]
    names = tuple(dict.fromkeys(found))
    return [f"End {' or '.join(names[:SHOWN])}."] if names else []


def _enough(needs: Needs, gpus: Mapping[int, Device], promised: Mapping[str, int]) -> int | None:
    """How many GPUs would hold one copy, evenly; None if all would not."""
    if needs.gpu_share is not None:
        return None
    free = sorted((gpu.free(promised) for gpu in gpus.values() if not _is_slice(gpu)), reverse=True)
    return next((n for n in range(1, len(free) + 1) if free[n - 1] >= _split(needs, n)), None)


def _refusal(reason: str, remedies: Iterable[str], *, for_ever: bool = False) -> NoRoom:
    by_means = {remedy.partition(":")[0]: remedy for remedy in reversed(list(remedies))}
    return NoRoom(reason=reason, remedies=tuple(by_means.values())[::-1], for_ever=for_ever)


def _gpus_named(indexes: Collection[int]) -> str:
    return f"{'GPU' if len(indexes) == 1 else 'GPUs'} {listed(indexes)}"
