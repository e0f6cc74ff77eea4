"""What a launch would take, before anything is downloaded or started: choices, files, memory, GPUs, and who holds them.

Nothing here changes anything. What cannot be found out is a sentence among `unknown`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

import engines
from engines.base import Launch, Needs
from gateway.amounts import megabytes
from gateway.choice import engine_answers, why_this_engine
from gateway.downloads import DownloadFailed, list_files
from gateway.errors import RequestRefused
from gateway.fleet import Fleet
from gateway.launch import LaunchRequest
from gateway.process import CannotStart
from gateway.room import GpuUse, Ram, advice, find_room, observe_gpus, observe_ram, verdict
from gateway.sizing import Memory, Sizing, bytes_beside, size_up, told
from registry import weights
from registry.cache import LIBRARIES
from registry.hubs import find_cached, local
from registry.hubs.base import HubError
from registry.hubs.cache import digest, marker_path, read_marker
from registry.inspection import contradictions
from registry.resolve import Artifact, NotResolved, candidates
from registry.schema import Source
from registry.weights import Facts

ANY_UID = "a-model-that-is-checked"
LIST_LIMIT_S = 20.0
SHOWN = 10


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """What would be loaded, and the bytes of each. `free_bytes` is room on that disk.

    `what` is empty for the model's own, else what is loaded beside it.
    """

    what: str = ""
    are_here: bool
    place: str
    files: dict[str, int] | None
    total_bytes: int | None
    folder: str | None = None
    free_bytes: int | None = None


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
    additions: tuple[Files, ...] = ()
    facts: Facts | None = None
    contradictions: tuple[str, ...] = ()
    memory: Memory | None = None
    where: str = ""
    gpus: tuple[GpuUse, ...] = ()
    ram: Ram | None = None


async def check(fleet: Fleet, uid: str, request: LaunchRequest, hubs: Sequence[str] = ()) -> Report:
    """The report on a launch that somebody might ask for."""
    devices = await fleet.observe()
    silence = fleet.observer.silence
    given, owners = fleet.placements(), _owners(fleet)
    ram = await asyncio.to_thread(observe_ram, devices, given, owners)
    try:
        launch = fleet.try_launch(uid, request, hubs)
    except RequestRefused as exc:
        refused = _refused(fleet, uid, request, hubs, exc.message)
        gpus = await asyncio.to_thread(observe_gpus, devices, owners, None)
        return msgspec.structs.replace(refused, gpus=gpus, ram=ram)
    artifact = launch.artifact
    answers = engine_answers(fleet.engines, request, lambda wish: fleet.try_launch(uid, wish, hubs))
    spec_reason, passed_over = await asyncio.to_thread(_about_specs, fleet, request, artifact, hubs)
    problems: list[str] = []
    unknown = [f"How the GPUs are: {silence}."] if silence else []
    files = await _files(fleet, artifact.source, "", problems, unknown)
    additions = [await _files(fleet, one.source, str(one), problems, unknown) for one in artifact.additions]
    facts = await asyncio.to_thread(_facts, files, unknown)
    needs = engines.find(launch.engine, fleet.engines).needs(launch)
    has_gpus = any(device.gpu for device in devices)
    added_bytes = sum(addition.total_bytes or 0 for addition in additions)
    family = fleet.registry.find(artifact.family.model_name, artifact.family.model_type)
    specs = family.specs if family and not request.model_path else ()
    sizing = size_up(
        launch,
        needs,
        files.files,
        facts,
        unknown,
        fleet.experience,
        has_gpus=has_gpus,
        specs=specs,
        beside_bytes=await asyncio.to_thread(bytes_beside, launch, None) + added_bytes,
    )
    room = find_room(launch, sizing.needs, devices, given)
    if room.refusal and not room.is_there:
        problems.append(f"It cannot be placed: {room.refusal.text}")
    _check_disk([files, *additions], sizing, problems)
    gpus = await asyncio.to_thread(observe_gpus, devices, owners, room)
    return Report(
        verdict=verdict(problems, room, sizing.needs, launch.replica),
        can_launch=not problems,
        fits=room.fits if room.is_there else None,
        problems=tuple(problems),
        unknown=tuple(unknown),
        advice=tuple(advice(room, launch.replica)) if room.is_there else (),
        model_name=artifact.family.model_name,
        model_type=artifact.family.model_type,
        spec=_spec_told(artifact),
        spec_reason=spec_reason,
        passed_over=tuple(passed_over),
        model_engine=launch.engine,
        engine_reason="the launch names it." if request.model_engine else why_this_engine(launch.engine, answers),
        engines=answers,
        files=files,
        additions=tuple(additions),
        facts=facts,
        contradictions=tuple(_contradictions(launch, needs, facts)) if facts else (),
        memory=told(sizing, launch.replica),
        where=room.name,
        gpus=gpus,
        ram=ram,
    )


def _refused(fleet: Fleet, uid: str, request: LaunchRequest, hubs: Sequence[str], reason: str) -> Report:
    """The report on a launch that nothing can come of; with each engine's word if that is why."""
    answers = engine_answers(fleet.engines, request, lambda wish: fleet.try_launch(uid, wish, hubs))
    is_about_engines = any(answer != reason for answer in answers.values())
    return Report(
        verdict=f"It cannot be launched: {reason}",
        can_launch=False,
        problems=(reason,),
        engines=answers if is_about_engines else {},
        model_name=request.model_name,
        model_type=request.model_type,
    )


def _check_disk(all_files: Sequence[Files], sizing: Sizing, problems: list[str]) -> None:
    """Whether what is to be fetched has room; where the hub does not tell how much it is, its weights at least."""
    for folder in dict.fromkeys(files.folder for files in all_files if files.free_bytes is not None):
        to_fetch = [files for files in all_files if files.folder == folder]
        needed_bytes = sum(files.total_bytes or 0 for files in to_fetch)
        is_known = all(files.total_bytes for files in to_fetch)
        if not is_known and sizing.estimate:
            needed_bytes = max(needed_bytes, sizing.estimate.weights)
        free_bytes = to_fetch[0].free_bytes or 0
        if free_bytes < needed_bytes:
            about = "" if is_known else "about "
            problems.append(
                f"The disk of {folder} is too small: {about}{megabytes(needed_bytes)} are to be fetched, and "
                f"{megabytes(free_bytes)} are free."
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
    return reason, [*_not_run(fleet, request, found[:at], hubs), *_later(found[at + 1 :])]


def _not_run(fleet: Fleet, request: LaunchRequest, artifacts: Sequence[Artifact], hubs: Sequence[str]) -> list[str]:
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


async def _files(fleet: Fleet, source: Source, what: str, problems: list[str], unknown: list[str]) -> Files:
    """Where the files are and how large, asking the hub where they are not here."""
    cache = fleet.settings.cache_path
    if source.model_hub == "local":
        try:
            sizes = await asyncio.to_thread(local.list_files, source)
        except (HubError, OSError) as exc:
            problems.append(str(exc))
            sizes = {}
        found = local.find(source)
        path = str(found.path if found else source.model_id)
        total = sum(sizes.values()) or None
        return Files(what=what, are_here=bool(sizes), place=path, files=sizes, total_bytes=total)
    if path_here := find_cached(source, cache, is_use=False):
        marker = read_marker(marker_path(digest(source), cache))
        sizes = {Path(name).name: size for name, size in marker.files.items()} if marker else {}
        total = sum(sizes.values()) or None
        return Files(what=what, are_here=True, place=str(path_here), files=sizes, total_bytes=total)
    folder = LIBRARIES[source.model_hub](os.environ) if source.model_hub in LIBRARIES else cache
    place_told = f"{source.model_hub}:{source.model_id}"
    try:
        listed = await list_files(source, cache, folder=fleet.node.folder, limit_s=LIST_LIMIT_S)
    except (DownloadFailed, CannotStart) as exc:
        listed = None
        unknown.append(f"Which files would be fetched{f' for {what}' if what else ''}: {exc}")
    listed_bytes = sum(listed.values()) if listed else None
    return Files(
        what=what,
        are_here=False,
        place=place_told,
        files=listed,
        total_bytes=listed_bytes or None,
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


def _owners(fleet: Fleet) -> dict[int, str]:
    """Leader of each engine's process group -> the copy that it is."""
    replicas = [replica for deployment in fleet.deployments() for replica in deployment.replicas]
    return {replica.process.pid: replica.name for replica in replicas if replica.process and replica.process.pid}
