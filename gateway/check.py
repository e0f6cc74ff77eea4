"""What a launch would take, before anything is downloaded or started: choices, files, memory, GPUs, and who holds them.

Nothing here changes anything. What cannot be found out is a sentence among `unknown`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

import engines
from engines.base import Launch, Needs, Placement
from gateway.choice import engine_answers, why_this_engine
from gateway.downloads import DownloadFailed, list_files
from gateway.errors import RequestRefused
from gateway.fleet import Fleet
from gateway.gpus import Gpu
from gateway.launch import LaunchRequest
from gateway.placement import place
from gateway.process import CannotStart, memory_bytes
from registry import weights
from registry.cache import LIBRARIES
from registry.hubs import find_cached, local
from registry.hubs.base import PICKLES, SAFETENSORS, HubError
from registry.hubs.cache import digest, marker_path, read_marker
from registry.inspection import contradictions
from registry.memory import (
    Attention,
    Cache,
    Estimate,
    billions_of,
    estimate,
    most_tokens,
    usual_shape,
    usual_weight_bytes,
)
from registry.resolve import Artifact, NotResolved, candidates
from registry.schema import ModelSpec
from registry.sources import is_gguf
from registry.weights import Facts

ANY_UID = "a-model-that-is-checked"
LIST_LIMIT_S = 20.0
USUAL_TOKENS = 4096  # of a cache, where nobody says
SHOWN = 10


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """What would be loaded, and the bytes of each; `are_here` None: not known. `free_bytes` is room on that disk."""

    are_here: bool
    place: str
    files: dict[str, int] | None
    total_bytes: int | None
    folder: str | None = None
    free_bytes: int | None = None


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What each copy takes, in bytes, and what that is told from. `tokens` are those of one of `sequences`."""

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    engine_bytes: int
    total_bytes: int
    tokens: int
    sequences: int
    replicas: int
    basis: str


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


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. `fits` is None where it is not known; `problems` say why it cannot be launched at all."""

    verdict: str
    can_launch: bool
    fits: bool | None = None
    problems: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    model_name: str | None = None
    model_type: str | None = None
    spec: dict[str, str | int | float | None] = {}
    spec_reason: str = ""
    passed_over: tuple[str, ...] = ()
    model_engine: str | None = None
    engine_reason: str = ""
    engines: dict[str, str | None] = {}
    files: Files | None = None
    facts: Facts | None = None
    contradictions: tuple[str, ...] = ()
    memory: Memory | None = None
    where: str = ""
    gpus: tuple[Device, ...] = ()
    ram: Ram | None = None


async def check(fleet: Fleet, uid: str, request: LaunchRequest, hubs: Sequence[str] = ()) -> Report:
    """The report on a launch that somebody might ask for."""
    gpus = await asyncio.to_thread(fleet.node.list_gpus, with_processes=True)
    owners = _owners(fleet)
    ram = await asyncio.to_thread(_ram, owners)
    try:
        launch = fleet.try_launch(uid, request, hubs)
    except RequestRefused as exc:
        answers = engine_answers(fleet.engines, request, lambda wish: fleet.try_launch(uid, wish, hubs))
        is_about_engines = any(reason != exc.message for reason in answers.values())
        return Report(
            verdict=f"It cannot be launched: {exc.message}",
            can_launch=False,
            problems=(exc.message,),
            engines=answers if is_about_engines else {},
            model_name=request.model_name,
            model_type=request.model_type,
            gpus=await asyncio.to_thread(_devices, gpus, owners, set()),
            ram=ram,
        )
    artifact = launch.artifact
    answers = engine_answers(fleet.engines, request, lambda wish: fleet.try_launch(uid, wish, hubs))
    spec_reason, passed_over = await asyncio.to_thread(_about_specs, fleet, request, artifact, hubs)
    problems: list[str] = []
    unknown: list[str] = []
    files = await _files(fleet, artifact, problems, unknown)
    facts = await asyncio.to_thread(_facts, files, unknown)
    needs = engines.find(launch.engine, fleet.engines).needs(launch)
    placements = _placements(fleet, needs, gpus, launch.replica, problems)
    is_on_gpu = bool(gpus) and any(one.gpu_uuids != () for one in placements)
    if is_on_gpu and any(one.gpu_uuids is None for one in placements):
        unknown.append(
            f"How {launch.engine} spreads it over the GPUs: the launch names none, so it uses what it can. "
            "Here all of them are taken, evenly."
        )
    sizing = _sizing(launch, needs, files, facts, unknown, is_on_gpu=is_on_gpu)
    room = _Room(gpus, placements, ram) if is_on_gpu else _Room((), (), ram)
    smaller = await asyncio.to_thread(_smaller_specs, fleet, request, artifact, sizing, room)
    fits = room.fits(sizing.estimate.total, launch.replica) if sizing else None
    if (
        not files.are_here
        and files.total_bytes
        and files.free_bytes is not None
        and files.free_bytes < files.total_bytes
    ):
        problems.append(
            f"The disk of {files.folder} is too small: {megabytes(files.total_bytes)} are to be fetched, and "
            f"{megabytes(files.free_bytes)} are free."
        )
    devices = await asyncio.to_thread(_devices, gpus, owners, room.uuids)
    return Report(
        verdict=_verdict(problems, fits, sizing, room, launch.replica),
        can_launch=not problems,
        fits=fits,
        problems=tuple(problems),
        unknown=tuple(unknown),
        advice=tuple(_advice(sizing, room, smaller, devices, ram, launch.replica)) if fits is False else (),
        model_name=artifact.family.model_name,
        model_type=artifact.family.model_type,
        spec=_spec_told(artifact),
        spec_reason=spec_reason,
        passed_over=tuple(passed_over),
        model_engine=launch.engine,
        engine_reason="the launch names it." if request.model_engine else why_this_engine(launch.engine, answers),
        engines=answers,
        files=files,
        facts=facts,
        contradictions=tuple(_contradictions(launch, needs, facts)) if facts else (),
        memory=_memory(sizing, launch.replica) if sizing else None,
        where=room.name,
        gpus=devices,
        ram=ram,
    )


# --- which spec


def _about_specs(fleet: Fleet, request: LaunchRequest, chosen: Artifact, hubs: Sequence[str]) -> tuple[str, list[str]]:
    """Why this spec, and which others were passed over."""
    try:
        found = candidates(fleet.registry, request, hubs or fleet.settings.preferred_hubs)
    except NotResolved as exc:  # it was resolved a moment ago
        return str(exc), []
    if request.model_path or request.model_id:
        return "the launch names its files.", []
    if len(found) == 1:
        return "it is the only one that fits what was asked for.", []
    at = next((i for i, one in enumerate(found) if (one.spec, one.source) == (chosen.spec, chosen.source)), 0)
    reason = f"of {len(found)} that fit what was asked for it is the first that an engine runs here."
    return reason, [*_refused(fleet, request, found[:at], hubs), *_later(found[at + 1 :])]


def _refused(fleet: Fleet, request: LaunchRequest, artifacts: Sequence[Artifact], hubs: Sequence[str]) -> list[str]:
    """Why no engine here runs these, by format."""
    by_format: dict[str, list[Artifact]] = {}
    for artifact in artifacts:
        by_format.setdefault(artifact.spec.model_format, []).append(artifact)
    said = []
    for model_format, of_format in by_format.items():
        spec = of_format[0].spec
        wish = msgspec.structs.replace(
            request,
            model_format=model_format,
            model_size_in_billions=spec.model_size_in_billions,
            quantization=spec.quantization,
        )
        try:
            fleet.try_launch(ANY_UID, wish, hubs)
            reason = "another source of it is taken."
        except RequestRefused as exc:
            reason = exc.message
        said.append(f"{_listed(of_format)}: {reason}")
    return said


def _later(artifacts: Sequence[Artifact]) -> list[str]:
    return [f"{_listed(artifacts)}: later in the order of preference."] if artifacts else []


def _listed(artifacts: Sequence[Artifact]) -> str:
    names = list(dict.fromkeys(map(_named, artifacts)))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _named(artifact: Artifact) -> str:
    spec = artifact.spec
    size = f" {spec.model_size_in_billions}B" if spec.model_size_in_billions is not None else ""
    return f"{spec.model_format}{size} {spec.quantization} ({artifact.source.model_hub})"


def _spec_told(artifact: Artifact) -> dict[str, str | int | float | None]:
    spec, source = artifact.spec, artifact.source
    return {
        "model_format": spec.model_format,
        "model_size_in_billions": spec.model_size_in_billions,
        "quantization": spec.quantization,
        "model_hub": source.model_hub,
        "model_id": source.model_id,
        "model_revision": source.model_revision,
        "multimodal_projector": artifact.projector,
    }


# --- files


async def _files(fleet: Fleet, artifact: Artifact, problems: list[str], unknown: list[str]) -> Files:
    """Where the files are and how large, asking the hub where they are not here."""
    source, cache = artifact.source, fleet.settings.cache_path
    if source.model_hub == "local":
        try:
            sizes = await asyncio.to_thread(local.list_files, source)
        except (HubError, OSError) as exc:
            problems.append(str(exc))
            sizes = {}
        found = local.find(source)
        path = str(found.path if found else source.model_id)
        return Files(are_here=bool(sizes), place=path, files=sizes, total_bytes=sum(sizes.values()) or None)
    if path_here := find_cached(source, cache, is_use=False):
        marker = read_marker(marker_path(digest(source), cache))
        sizes = {Path(name).name: size for name, size in marker.files.items()} if marker else {}
        return Files(are_here=True, place=str(path_here), files=sizes, total_bytes=sum(sizes.values()) or None)
    folder = LIBRARIES[source.model_hub](os.environ) if source.model_hub in LIBRARIES else cache
    place_told = f"{source.model_hub}:{source.model_id}"
    try:
        listed = await list_files(source, cache, folder=fleet.node.folder, limit_s=LIST_LIMIT_S)
    except (DownloadFailed, CannotStart) as exc:
        listed = None
        unknown.append(f"Which files would be fetched: {exc}")
    total = sum(listed.values()) if listed else None
    return Files(
        are_here=False,
        place=place_told,
        files=listed,
        total_bytes=total or None,
        folder=str(folder),
        free_bytes=_free_bytes(folder, unknown),
    )


def _free_bytes(folder: Path, unknown: list[str]) -> int | None:
    try:
        existing = next(one for one in (folder, *folder.parents) if one.exists())
        return shutil.disk_usage(existing).free
    except (OSError, StopIteration) as exc:
        unknown.append(f"How much room the disk of {folder} has: {exc}.")
        return None


def _facts(files: Files, unknown: list[str]) -> Facts | None:
    if not files.are_here:
        return None
    facts = weights.read(Path(files.place))
    unknown += facts.problems
    return facts


def _contradictions(launch: Launch, needs: Needs, facts: Facts) -> list[str]:
    """What the files gainsay: of the registration, and of the launch."""
    said = contradictions(launch.artifact.family, launch.artifact.spec, facts)
    most, asked = facts.context_length, needs.cache.tokens if needs.cache else 0
    if most and asked > most and not facts.is_encoder:
        said.append(
            f"The launch asks for {asked} tokens of each request, and the model was made for {most}: "
            "the cache takes memory for all of them."
        )
    return said


# --- memory


class _Sizing(msgspec.Struct, frozen=True):
    """An estimate, what it is of, and what it is told from."""

    estimate: Estimate
    attention: tuple[Attention, ...]
    cache: Cache
    basis: str


def _sizing(
    launch: Launch, needs: Needs, files: Files, facts: Facts | None, unknown: list[str], *, is_on_gpu: bool
) -> _Sizing | None:
    """What one copy takes; None, which is told, if nobody knows."""
    spec = launch.artifact.spec
    billions = billions_of(spec.model_size_in_billions) if spec.model_size_in_billions is not None else None
    weight_bytes, basis = _weight_bytes(files, facts, spec, billions)
    if weight_bytes is None:
        unknown.append("How much memory it takes: neither its files nor a size in billions are known.")
        return None
    if facts and facts.is_attention_known and facts.width:
        attention, width = facts.attention, facts.width
        basis += ", and the cache from them too"
    else:
        params = billions or (facts and facts.parameters and facts.parameters / 1e9) or _billions(weight_bytes, spec)
        attention, width = usual_shape(params)
        if launch.artifact.family.model_type != "LLM":
            attention = ()
        basis += ", and the cache as usual models of that size have it: an estimate"
    cache = needs.cache or Cache(tokens=_tokens(launch, facts))
    if launch.artifact.projector and files.files:
        weight_bytes += sum(
            size
            for name, size in files.files.items()
            if "mmproj" in name.lower() and (facts is None or name not in facts.files)
        )
    sized = estimate(weight_bytes, attention, width, cache, on_gpu=is_on_gpu)
    return _Sizing(sized, attention, cache, basis)


def _weight_bytes(files: Files, facts: Facts | None, spec: ModelSpec, billions: float | None) -> tuple[int | None, str]:
    if facts and facts.weight_bytes:
        headers = "the headers of its files" if facts.elements else "the size of its files"
        return facts.weight_bytes, f"weights from {headers}"
    if files.files and (listed := _listed_weights(files.files)):
        return listed, "weights from the sizes that the hub tells"
    if billions:
        return (
            usual_weight_bytes(billions, spec.model_format, spec.quantization),
            f"weights from {billions:g} billion parameters and the format, an estimate",
        )
    return None, ""


def _listed_weights(sizes: dict[str, int]) -> int:
    return sum(
        size
        for name, size in sizes.items()
        if not name.lower().endswith(".json")
        and ((is_gguf(name) and "mmproj" not in name.lower()) or SAFETENSORS.search(name) or PICKLES.search(name))
    )


def _billions(weight_bytes: int, spec: ModelSpec) -> float:
    """How many parameters so many bytes are, roughly."""
    per_billion = usual_weight_bytes(1, spec.model_format, spec.quantization)
    return min(max(weight_bytes / per_billion, 0.001), 9e4)


def _tokens(launch: Launch, facts: Facts | None) -> int:
    """Of a cache whose engine does not say how large it makes it."""
    family = launch.artifact.family
    for key in ("context_length", "max_model_len", "context_size", "n_ctx"):
        if isinstance(said := launch.options.get(key), int) and said > 0:
            return said
    known = (facts.context_length if facts else None, getattr(family, "context_length", None))
    return next(filter(None, (*known, getattr(family, "max_tokens", None))), USUAL_TOKENS)


def _memory(sizing: _Sizing, replicas: int) -> Memory:
    parts = sizing.estimate
    return Memory(
        weights_bytes=parts.weights,
        kv_cache_bytes=parts.kv_cache,
        activations_bytes=parts.activations,
        engine_bytes=parts.engine,
        total_bytes=parts.total,
        tokens=sizing.cache.tokens,
        sequences=sizing.cache.sequences,
        replicas=replicas,
        basis=f"{sizing.basis}; activations and the engine's own are always an estimate.",
    )


# --- where


class _Room:
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


def _placements(fleet: Fleet, needs: Needs, gpus: Sequence[Gpu], replicas: int, problems: list[str]) -> list[Placement]:
    """The GPUs of each copy, as its start would choose them now."""
    taken = [r.placement for d in fleet.deployments() for r in d.replicas if r.placement]
    placements: list[Placement] = []
    for _ in range(replicas):
        placement = place(needs, gpus, [*taken, *placements])
        if isinstance(placement, str):
            problems.append(f"It cannot be placed: {placement}. Change gpu_idx or n_gpu.")
            return []
        placements.append(placement)
    return placements


def _smaller_specs(
    fleet: Fleet, request: LaunchRequest, chosen: Artifact, sizing: _Sizing | None, room: _Room
) -> list[str]:
    """Other quantizations and sizes of the family whose weights are likely to fit, the largest first."""
    family = fleet.registry.find(chosen.family.model_name, chosen.family.model_type)
    if family is None or sizing is None or request.model_path:
        return []
    rest = sizing.estimate.total - sizing.estimate.weights
    room_bytes = room.for_one(request.replica) if room.is_measured else 0
    found: dict[str, int] = {}
    for spec in family.specs:
        billions = billions_of(spec.model_size_in_billions) if spec.model_size_in_billions is not None else None
        if billions is None or spec.model_format != chosen.spec.model_format:
            continue
        weight_bytes = usual_weight_bytes(billions, spec.model_format, spec.quantization)
        if weight_bytes < sizing.estimate.weights and weight_bytes + rest <= room_bytes:
            found.setdefault(f"{spec.model_size_in_billions}B {spec.quantization}", weight_bytes)
    return sorted(found, key=lambda name: -found[name])[:3]


# --- who holds the rest


def _owners(fleet: Fleet) -> dict[int, str]:
    """Leader of each engine's process group -> the copy that it is."""
    replicas = [replica for deployment in fleet.deployments() for replica in deployment.replicas]
    return {replica.process.pid: replica.name for replica in replicas if replica.process}


def _devices(gpus: Sequence[Gpu], owners: dict[int, str], wanted: set[str]) -> tuple[Device, ...]:
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


def _holder(pid: int, used_bytes: int | None, owners: dict[int, str]) -> Holder:
    try:
        name = psutil.Process(pid).name()
        leader = os.getpgid(pid)
    except (psutil.Error, OSError):  # gone, or of another container
        return Holder(pid=pid, used_bytes=used_bytes)
    return Holder(pid=pid, used_bytes=used_bytes, name=name, model=owners.get(leader))


def _ram(owners: dict[int, str]) -> Ram:
    memory = psutil.virtual_memory()
    holders = [Holder(pid=pid, used_bytes=memory_bytes(pid), model=name) for pid, name in owners.items()]
    return Ram(total_bytes=memory.total, free_bytes=memory.available, holders=tuple(holders))


# --- the verdict


def _verdict(problems: list[str], fits: bool | None, sizing: _Sizing | None, room: _Room, replicas: int) -> str:
    if problems:
        return f"It cannot be launched: {problems[0]}"
    if sizing is None or fits is None:
        return "It can be launched; whether its memory suffices is not known."
    each = " each" if replicas > 1 else ""
    copies = f"{replicas} copies take" if replicas > 1 else "It takes"
    needed = f"{copies} about {megabytes(sizing.estimate.total)}{each}, and {room.name} has {megabytes(room.free_bytes)} free"
    return f"It fits. {needed}." if fits else f"It does not fit. {needed}."


def _advice(
    sizing: _Sizing | None,
    room: _Room,
    smaller: list[str],
    devices: Sequence[Device],
    ram: Ram,
    replicas: int,
) -> list[str]:
    """What would make it fit."""
    if sizing is None:
        return []
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
    said += _who_could_go(holders if room.is_gpu else ram.holders, lambda one: one.used_bytes or 0)
    return said


def _who_could_go(holders: Sequence[Holder], size: Callable[[Holder], int]) -> list[str]:
    largest = sorted(holders, key=size, reverse=True)[:3]
    return [f"The end of {holder_name(one)}, which holds {_amount(one.used_bytes)}." for one in largest]


def holder_name(holder: Holder) -> str:
    """A process as people know it."""
    return holder.model or f"process {holder.pid} ({holder.name or 'of another container or user'})"


def _amount(size_bytes: int | None) -> str:
    return "an unknown amount" if size_bytes is None else megabytes(size_bytes)


def megabytes(size_bytes: int) -> str:
    """A size, in the unit that all sizes have here."""
    return f"{size_bytes / 1e6:,.0f} MB"
