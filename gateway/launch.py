"""From what a user wishes to a Launch: the one place where every choice is made. No process is touched here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta

import engines
from engines.base import LOAD_TIMEOUT_S, START_TIMEOUT_S, Engine, Launch
from registry.decode import decode
from registry.registry import Registry
from registry.resolve import Artifact, Selection, candidates, without_files

UID = re.compile(r"(?!.*//)[^\s/\\?%#&=+]([^\s\\?%#&=+]{0,98}[^\s/\\?%#&=+])?")
# Paths below /v1/models that mean something else than a uid.
RESERVED_UIDS = frozenset(
    ["prompts", "families", "instances", "instance", "vllm-supported", "update_type", "llm", "recommend", "update_spec"]
)

RESERVED_ENDINGS = frozenset(["start", "stop", "logs", "progress", "cancel", "events", "replicas", "versions"])
REPLICA_NAME = re.compile(r"-rep\d+$")
FILE_NAME_BYTES = 200  # most file systems take 255; ours get endings

Seconds = Annotated[float, Meta(gt=0)]


class LaunchRequest(Selection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that somebody wants served: which one, by which engine, how, and when."""

    model_engine: Annotated[str, Meta(description="engine; chosen if not given")] | None = None
    replica: Annotated[int, Meta(ge=1, le=64, description="copies to run")] = 1
    gpu_idx: Annotated[tuple[int, ...], Meta(description="these GPUs and no others")] | None = None
    n_gpu: Annotated[int, Meta(ge=0, description="how many GPUs; 0: the CPU alone")] | None = None
    options: Annotated[dict[str, Any], Meta(description="options of the engine, by its own names")] = {}
    envs: Annotated[dict[str, str], Meta(description="environment of the engine's process")] = {}
    request_limits: Annotated[int, Meta(ge=0, description="requests of one replica at once; more get 429")] | None = (
        None
    )
    preload: Annotated[bool, Meta(description="load at start instead of at the first request")] = False
    idle_timeout_s: Annotated[Seconds, Meta(description="unload after so long without a request")] | None = None
    start_timeout_s: Annotated[Seconds, Meta(description="from the engine's start until it is ready")] = START_TIMEOUT_S
    load_timeout_s: Annotated[
        Seconds, Meta(description="how long a request that is not streamed waits for the model")
    ] = LOAD_TIMEOUT_S


def plan(
    uid: str,
    request: LaunchRequest,
    registry: Registry,
    known_engines: Sequence[Engine],
    hubs: Sequence[str] = (),
) -> Launch:
    """Make every choice that the request leaves open.

    Args:
        hubs: those that the site prefers, best first.
    Raises:
        ValueError: it cannot be done; the text says why and what there is instead.
    """
    check_uid(uid)
    artifacts = _artifacts(uid, request, registry, known_engines, hubs)
    artifact, engine = _choose(request.model_engine, artifacts, known_engines)
    decode(request.options, engine.options, "options", strict=False)
    if request.gpu_idx is not None and len(set(request.gpu_idx)) < len(request.gpu_idx):
        raise ValueError(f"gpu_idx {list(request.gpu_idx)} names a GPU twice.")
    if request.gpu_idx is not None and request.n_gpu is not None and len(request.gpu_idx) != request.n_gpu:
        raise ValueError(f"gpu_idx names {len(request.gpu_idx)} GPUs, n_gpu says {request.n_gpu}: give one of them.")
    return Launch(
        uid=uid,
        artifact=artifact,
        engine=engine.name,
        replica=request.replica,
        gpu_idx=request.gpu_idx,
        n_gpu=request.n_gpu,
        options=request.options,
        envs=request.envs,
        request_limits=request.request_limits,
        preload=request.preload,
        idle_timeout_s=request.idle_timeout_s,
        start_timeout_s=request.start_timeout_s,
        load_timeout_s=request.load_timeout_s,
    )


def _artifacts(
    uid: str, request: LaunchRequest, registry: Registry, known: Sequence[Engine], hubs: Sequence[str]
) -> tuple[Artifact, ...]:
    """What could be launched, best first."""
    engine = engines.find(request.model_engine, tuple(known)) if request.model_engine else None
    if engine and not engine.wants_files(request.options) and not (request.model_path or request.model_id):
        return (without_files(registry, request, uid),)
    return candidates(registry, request, hubs)


def check_uid(uid: str) -> None:
    """Raises ValueError unless the text can stand for a model in a path and in a request."""
    if uid in RESERVED_UIDS:
        raise ValueError(f"{uid!r} cannot name a model: the API uses that path. Choose another name.")
    if REPLICA_NAME.search(uid):
        raise ValueError(f"{uid!r} cannot name a model: replicas are named so. Choose another name.")
    parts = uid.split("/")
    if parts[1:] and parts[-1] in RESERVED_ENDINGS:
        raise ValueError(f"{uid!r} cannot name a model: the API uses paths that end so. Choose another name.")
    if not (
        UID.fullmatch(uid)
        and uid.isprintable()
        and not uid.startswith("-")
        and not {".", ".."} & set(parts)
        and len(file_name(uid).encode()) <= FILE_NAME_BYTES
    ):
        raise ValueError(
            f"{uid!r} cannot name a model: 1 to 100 characters, no white space, none of \\ ? % # & = +, no "
            "dash at its begin, and slashes only inside."
        )


def file_name(uid: str) -> str:
    """The uid as the name of a file or folder."""
    return uid.replace("/", "%2F")


def _choose(name: str | None, artifacts: Sequence[Artifact], known: Sequence[Engine]) -> tuple[Artifact, Engine]:
    """The first artifact that an engine here takes, and that engine.

    Raises:
        ValueError: there is none; of one that is only not installed if there is one, else of the first artifact.
    """
    refusal, is_near = None, False
    for artifact in artifacts:
        try:
            return artifact, _choose_engine(name, artifact, known)
        except ValueError as exc:
            accepting = any(
                (not engine.by_name_only if name is None else engine.name.casefold() == name.casefold())
                and artifact.family.model_type in engine.model_types
                and engine.accepts(artifact) is None
                for engine in known
            )
            if refusal is None or (accepting and not is_near):
                refusal, is_near = exc, accepting
    raise refusal or ValueError("There is nothing to choose from.")


def _choose_engine(name: str | None, artifact: Artifact, known: Sequence[Engine]) -> Engine:
    """The engine asked for, or the first that is installed and accepts the artifact."""
    what = f"{artifact.family.model_name} ({artifact.spec.model_format})"
    if name is not None:
        engine = engines.find(name, tuple(known))
        if reason := _why_not(engine, artifact):
            raise ValueError(f"{what} cannot run on {engine.name}: {reason}.")
        return engine
    refusals = []
    for engine in known:
        if engine.by_name_only:
            continue
        reason = _why_not(engine, artifact)
        if reason is None:
            return engine
        refusals.append(f"{engine.name}: {reason}")
    raise ValueError(f"No engine here can run {what}. " + "; ".join(refusals) + ".")


def _why_not(engine: Engine, artifact: Artifact) -> str | None:
    if artifact.family.model_type not in engine.model_types:
        return f"it serves {', '.join(engine.model_types)} models, not {artifact.family.model_type}"
    return engine.accepts(artifact) or engine.installed()
