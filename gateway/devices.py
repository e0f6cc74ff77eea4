"""The devices as they are now: GPUs by NVML, and the machine's memory; of each what others than our engines hold.

What is seen (`Seen`) is asked from the machine, or made up (`SimulatedMachine`); what follows from it is pure.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import psutil
from msgspec import Meta

from engines.base import RAM
from gateway.amounts import bytes_of, megabytes
from gateway.config import Settings
from gateway.footprint import Footprint, families, footprint
from gateway.gpus import Gpu, GpuProcess
from gateway.launch import Size
from gateway.placement import Device
from gateway.question import NoAnswer, Question

LOOK_LIMIT_S = 10.0
SILENT_GPUS = "NVML does not answer, so nobody knows what the GPUs have free"
SILENT_PROCESSES = "a look at the machine's processes hangs, so nobody knows what the GPUs have free"
SETTLED_S = 5.0  # memory that others have held for so long is theirs
UNTOLD_BYTES = 1_500_000_000  # in use on a GPU that shows no process: more than its driver takes
USUAL_HEADROOM_BYTES = 2**30  # of the machine's memory
HOLDERS = 5  # told of each device
CGROUPS = Path("/sys/fs/cgroup")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a site leaves free, and how much of the machine's memory engines may have.

    None: all there is, and a usual head-room of it.
    """

    ram_limit: int | None = None
    ram_headroom: int | None = 0
    gpu_headroom: int = 0


def limits_of(settings: Settings) -> Limits:
    """As the settings say."""
    return Limits(
        ram_limit=None if settings.ram_limit is None else bytes_of(settings.ram_limit),
        ram_headroom=None if settings.ram_headroom is None else bytes_of(settings.ram_headroom),
        gpu_headroom=bytes_of(settings.gpu_headroom),
    )


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of ours: its name, the leader of its processes if they run, and what it was promised by device."""

    name: str
    pid: int | None = None
    memory: Mapping[str, int] = {}


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A look at the machine.

    `ram_used_bytes` cannot be had without something ending. `families` has the leader of each process of ours, and
    `footprints` what each leader's take. `names` are those of processes on the GPUs that are here; one that is not may
    be of another container. `ram_limit` says what the total comes from, if it is not all of the machine. `silence` says
    why what is told of the GPUs is old, if it is.
    """

    gpus: tuple[Gpu, ...] = ()
    ram_total_bytes: int = 0
    ram_used_bytes: int = 0
    ram_limit: str = ""
    families: Mapping[int, int] = {}
    footprints: Mapping[int, Footprint] = {}
    names: Mapping[int, str] = {}
    silence: str | None = None


Look = Callable[[Collection[int]], Seen]


class Observer:
    """Looks at the devices, and remembers what others held of late. It never waits for long."""

    def __init__(
        self, look: Look, *, tell: Callable[[str, str], None] = lambda kind, text: None, limit_s: float = LOOK_LIMIT_S
    ) -> None:
        """
        Args:
            look: called in a thread, with the leaders of our processes.
            tell: is told, kind and sentence, that the GPUs can no longer be seen, and that they can again.
        """
        self.silence: str | None = None  # why nobody knows how the GPUs are
        self._look = Question(look, limit_s=limit_s)
        self._tell = tell
        self._threads = concurrent.futures.ThreadPoolExecutor(2, "observer")  # the usual ones may all be held up
        self._foreign: dict[str, deque[tuple[float, int]]] = defaultdict(lambda: deque(maxlen=1000))

    async def observe(self, held: Sequence[Held], limits: Limits) -> tuple[Device, ...]:
        """The devices now, GPUs first."""
        leaders = {one.pid for one in held if one.pid is not None}
        seen = await asyncio.get_running_loop().run_in_executor(self._threads, self._see, leaders)
        return self.devices_of(seen, held, limits)

    def devices_of(self, seen: Seen, held: Sequence[Held], limits: Limits) -> tuple[Device, ...]:
        """The devices as they were seen now."""
        now = time.monotonic()
        self._note(seen.silence)
        return tuple(self._settled(device, now) for device in devices_of(seen, held, limits))

    async def has_gpus(self, held: Sequence[Held], limits: Limits) -> bool:
        """Whether there are any; a driver that hangs has some."""
        return any(device.gpu for device in await self.observe(held, limits)) or self.silence is not None

    def _see(self, leaders: Collection[int]) -> Seen:
        """The machine now; what hangs is as it was seen last."""
        try:
            return self._look(leaders)
        except NoAnswer as exc:
            total, used, limit = _ram()
            return msgspec.structs.replace(
                exc.last or Seen(),
                ram_total_bytes=total,
                ram_used_bytes=used,
                ram_limit=limit,
                silence=SILENT_PROCESSES,
            )

    def _note(self, silence: str | None) -> None:
        before, self.silence = self.silence, silence
        if silence and not before:
            self._tell("ERROR", f"{silence}. Models that need one wait until it answers; `nvidia-smi` may show why.")
        elif before and not silence:
            self._tell("INFO", "The GPUs can be seen again.")

    def _settled(self, device: Device, now: float) -> Device:
        """With what of the foreign bytes came lately, and may be gone as soon."""
        history = self._foreign[device.key]
        history.append((now, device.foreign_bytes))
        while len(history) > 1 and history[1][0] < now - SETTLED_S:
            history.popleft()
        least = min(foreign for _, foreign in history)
        return msgspec.structs.replace(device, passing_bytes=device.foreign_bytes - least)


def look_here(list_gpus: Callable[..., Sequence[Gpu]], leaders: Collection[int]) -> Seen:
    """This machine. Takes milliseconds; call it in a thread."""
    silence = None
    try:
        gpus = tuple(list_gpus(with_processes=True))
    except NoAnswer as exc:
        gpus, silence = tuple(exc.last or ()), SILENT_GPUS
    ours = families(leaders)
    members: dict[int, list[int]] = defaultdict(list)
    for pid, leader in ours.items():
        members[leader].append(pid)
    total, used, limit = _ram()
    return Seen(
        gpus=gpus,
        ram_total_bytes=total,
        ram_used_bytes=used,
        ram_limit=limit,
        families=ours,
        footprints={leader: footprint(pids) for leader, pids in members.items()},
        names=_names({process.pid for gpu in gpus for process in gpu.processes}),
        silence=silence,
    )


def devices_of(seen: Seen, held: Sequence[Held], limits: Limits) -> tuple[Device, ...]:
    """GPUs and the machine's memory, with what others hold of each. Pure."""
    return (*(_gpu_device(gpu, seen, held, limits) for gpu in seen.gpus), _ram_device(seen, held, limits))


def _gpu_device(gpu: Gpu, seen: Seen, held: Sequence[Held], limits: Limits) -> Device:
    promised = {one.pid: one.memory.get(gpu.uuid, 0) for one in held if one.pid is not None}
    if _tells_processes(gpu, seen):
        measured: dict[int, int] = defaultdict(int)
        for process in gpu.processes:
            if (leader := seen.families.get(process.pid)) is not None:
                measured[leader] += process.used_bytes or 0
        # What an engine takes beyond what it was promised is as gone for others as if it were foreign.
        ours = sum(min(size, promised.get(leader, 0)) for leader, size in measured.items())
    else:
        ours = sum(promised.values())
    return Device(
        key=gpu.uuid,
        total_bytes=gpu.total_bytes,
        foreign_bytes=max(0, gpu.used_bytes - ours),
        headroom_bytes=limits.gpu_headroom,
        gpu=gpu,
        holders=_holders([*_own(held, gpu.uuid), *_others(gpu, seen)]),
    )


def _tells_processes(gpu: Gpu, seen: Seen) -> bool:
    """Whether the device says what each of its processes holds, by pids that mean something here."""
    if not gpu.processes:
        return gpu.used_bytes < UNTOLD_BYTES
    return all(one.used_bytes is not None and one.pid in seen.names for one in gpu.processes)


def _ram_device(seen: Seen, held: Sequence[Held], limits: Limits) -> Device:
    ours, beyond = 0, 0
    for one in held:
        if one.pid is not None and (has := seen.footprints.get(one.pid)):
            promised = one.memory.get(RAM, 0)
            ours += min(has.own_bytes, promised)
            beyond += max(0, has.own_bytes - promised) if promised else 0
    device = Device(
        key=RAM,
        total_bytes=seen.ram_total_bytes,
        foreign_bytes=max(0, seen.ram_used_bytes - ours),
        headroom_bytes=_usual_headroom(seen.ram_total_bytes) if limits.ram_headroom is None else limits.ram_headroom,
        holders=_holders(_own(held, RAM)),
        limit=seen.ram_limit,
    )
    if limits.ram_limit is not None and limits.ram_limit < device.free({}):
        return msgspec.structs.replace(
            device, total_bytes=limits.ram_limit, foreign_bytes=beyond, headroom_bytes=0, limit="ram_limit"
        )
    return device


def _usual_headroom(total_bytes: int) -> int:
    return min(USUAL_HEADROOM_BYTES, total_bytes // 10)  # 1 GiB is much of a small machine


def _own(held: Sequence[Held], key: str) -> list[tuple[int, str]]:
    return [(one.memory[key], one.name) for one in held if key in one.memory]


def _others(gpu: Gpu, seen: Seen) -> list[tuple[int, str]]:
    return [
        (one.used_bytes or 0, f"process {one.pid}, {seen.names.get(one.pid, 'of another container or user')}")
        for one in gpu.processes
        if one.pid not in seen.families
    ]


def _holders(found: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """The largest, as people read them."""
    largest = sorted(found, reverse=True)[:HOLDERS]
    return tuple(f"{name} ({megabytes(size)})" if size else name for size, name in largest)


def _names(pids: Collection[int]) -> dict[int, str]:
    found = {}
    for pid in pids:
        try:
            found[pid] = psutil.Process(pid).name()
        except psutil.Error:  # gone, or of another container
            continue
    return found


# --- the machine's memory


def _ram() -> tuple[int, int, str]:
    """All of it, what of it cannot be had, and where the limit is from; of the control group that has least left, where
    that is less than the machine has.
    """
    memory = psutil.virtual_memory()
    total, used, limit = memory.total, memory.total - memory.available, ""
    for folder, names in _control_groups():
        most = _number(folder / names[0])
        now = _number(folder / names[1])
        if most is None or now is None or most <= 0:
            continue
        statistics = _statistics(folder / "memory.stat")
        kept = sum(statistics.get(names[2] + name, 0) for name in ("inactive_file", "active_file"))
        held = max(0, now - kept - statistics.get("slab_reclaimable", 0))
        if most - held < total - used:
            total, used, limit = most, held, "the limit of our control group"
    return total, used, limit


def _control_groups(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> list[tuple[Path, tuple[str, ...]]]:
    """The folders of our memory's control groups and of those above; of each version's the names of its files."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[Path, tuple[str, ...]]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            at, names = root, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            at, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = at / path.lstrip("/")
        folders = [group, *group.parents]
        found += [(folder, names) for folder in folders[: folders.index(at) + 1] if (folder / names[0]).is_file()]
    return found


def _number(path: Path) -> int | None:
    """None if it is not there, or `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistics(path: Path) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", path.read_text())}
    except OSError:
        return {}


# --- machines that are made up


class SimulatedProcess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Somebody else's, on a GPU."""

    name: str
    used: Size


class SimulatedGpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` GPUs that are alike. `slices` are the sizes of those that it is cut into."""

    total: Size
    name: str = "made up"
    count: Annotated[int, Meta(ge=1, le=64)] = 1
    processes: tuple[SimulatedProcess, ...] = ()
    slices: tuple[Size, ...] = ()


class SimulatedMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine that is not there: its GPUs, its memory, and what others hold of both."""

    gpus: tuple[SimulatedGpu, ...] = ()
    ram: Size = "64GiB"
    ram_used: Size = 0

    def __post_init__(self) -> None:
        """Raises ValueError for what is no size."""
        self.look(())

    def look(self, leaders: Collection[int]) -> Seen:
        """As if it were seen."""
        pids = iter(range(1, 1_000_000))
        gpus: list[Gpu] = []
        names: dict[int, str] = {}
        cards = [card for card in self.gpus for _ in range(card.count)]
        for index, card in enumerate(cards):
            if card.slices:
                continue
            processes = tuple(GpuProcess(pid=next(pids), used_bytes=bytes_of(one.used)) for one in card.processes)
            names |= {one.pid: told.name for one, told in zip(processes, card.processes, strict=True)}
            gpus.append(
                Gpu(
                    index=index,
                    uuid=f"GPU-{index}",
                    name=card.name,
                    total_bytes=bytes_of(card.total),
                    used_bytes=sum(one.used_bytes or 0 for one in processes),
                    processes=processes,
                )
            )
        parts = [(index, size) for index, card in enumerate(cards) for size in card.slices]
        for number, (index, size) in enumerate(parts, len(cards)):
            gpus.append(
                Gpu(
                    index=number,
                    uuid=f"MIG-{number}",
                    name=f"slice of {cards[index].name}",
                    total_bytes=bytes_of(size),
                    used_bytes=0,
                    slice_of=index,
                )
            )
        return Seen(
            gpus=tuple(gpus),
            ram_total_bytes=bytes_of(self.ram),
            ram_used_bytes=bytes_of(self.ram_used),
            names=names,
        )


ALIKE = re.compile(r"(?:(\d+)x)?(.+)")


def machine_of(text: str) -> SimulatedMachine:
    """A machine from a text such as 8x80GiB or 2x24GiB,1x80GiB.

    Raises:
        ValueError: it is none.
    """
    gpus = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = ALIKE.fullmatch(part)
        assert found is not None
        gpus.append(SimulatedGpu(total=found[2], count=int(found[1] or 1)))
    return SimulatedMachine(gpus=tuple(gpus), ram="1TiB")
