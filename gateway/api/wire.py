"""What travels on the wire, in and out, and the lenient reading of launch bodies."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.responses import Response

from engines.base import Launch
from gateway.deployment import Deployment
from gateway.errors import BadRequest
from gateway.export import SECRET_OPTIONS
from gateway.launch import LaunchRequest
from gateway.process import memory_bytes
from gateway.replica import RESTING, Failure, Replica, State
from registry.additions import KINDS
from registry.decode import decode, did_you_mean
from registry.registry import Registry
from registry.resolve import Artifact
from registry.schema import FAMILIES, EmbeddingFamily, ModelFamily, ModelSpec

# Keys of a family that its description repeats, by model type.
DESCRIBED: dict[str, tuple[str, ...]] = {
    "LLM": ("model_lang", "model_description", "model_family", "context_length"),
    "embedding": ("dimensions", "max_tokens", "language"),
    "rerank": ("type", "language", "max_tokens"),
    "image": ("model_family", "controlnet"),
    "audio": ("model_family", "model_lang", "multilingual"),
    "video": ("model_family",),
    "flexible": ("launcher", "launcher_args"),
}
LOCAL_WORKER = "127.0.0.1"
MASK = "******"

# Launch fields that mean something elsewhere, and why they are refused here.
REFUSED = {
    "replica_config": "replicas here are alike; use replica and gpu_idx.",
}
# Launch fields about a cluster: one machine has no use for them.
WITHOUT_EFFECT = (
    "worker_ip",
    "n_worker",
)


class ReplicaCard(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as operators see it. Times in seconds, memory in bytes."""

    uid: str
    replica: int
    state: str
    tier: str | None
    state_s: float
    engine: str
    pid: int | None
    address: str | None
    memory_bytes: int | None
    in_flight: int
    waiting: int
    idle_s: float | None
    starts: int
    progress: str | None
    log: str
    failure: Failure | None
    degraded: str | None
    context_tokens: int | None


def json_answer(body: Any, status: int = 200) -> Response:
    """Any of our Structs, or plain data, as an answer."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def note_on(answer: Response, notes: str) -> None:
    """Sentences for people beside an answer."""
    answer.headers["x-hostler-notes"] = quote(notes, safe=" ,.;:'()/")


def model_card(deployment: Deployment, origin: str) -> dict[str, Any]:
    """A model for both worlds: OpenAI's fields, Xinference's description, its state, and where it is from."""
    launch = deployment.launch
    return {
        "id": launch.uid,
        "object": "model",
        "created": int(deployment.launched_at),
        "owned_by": "hostler",
        "status": str(deployment.shown_state),
        "tier": next(filter(None, (replica.shown_tier for replica in deployment.replicas)), None),
        "failure_cause": deployment.failure_cause,
        **description(deployment),
        "replica": launch.replica,
        "origin": origin,
    }


def description(deployment: Deployment) -> dict[str, Any]:
    """What a model is, in the keys that Xinference's clients read for its type."""
    launch = deployment.launch
    family, spec, source = launch.artifact.family, launch.artifact.spec, launch.artifact.source
    told = {key: getattr(family, key) for key in DESCRIBED.get(family.model_type, ()) if hasattr(family, key)}
    placements = [replica.placement for replica in deployment.replicas if replica.placement]
    facts: dict[str, Any] = {
        "model_type": family.model_type,
        "model_name": family.model_name,
        "model_engine": launch.engine,
        "model_format": spec.model_format,
        "model_size_in_billions": spec.model_size_in_billions,
        "quantization": spec.quantization,
        "model_hub": source.model_hub,
        "model_revision": source.model_revision,
        "address": next((replica.address for replica in deployment.replicas if replica.address), None),
        "accelerators": [uuid for placement in placements for uuid in (placement.gpu_uuids or ())],
    }
    facts |= {
        key: value
        for key, value in _addition_wishes(launch.artifact).items()
        if value is not None and key != "controlnet"  # which Xinference's clients read as those that there are
    }
    if launch.forced_options:
        facts["forced_options"] = launch.forced_options
    if family.model_type == "LLM":
        facts |= {
            "revision": source.model_revision,
            "multimodal_projector": launch.artifact.projector,
            "strict_system_first": False,
            "max_model_len": min(filter(None, (one.context_tokens for one in deployment.replicas)), default=None),
        }
        told["model_family"] = told.get("model_family") or family.model_name
    return facts | told | {"model_ability": list(family.abilities)}


def version_of(family: ModelFamily, spec: ModelSpec) -> str:
    """A family's spec as one text, as Xinference's clients name versions."""
    if family.model_type == "LLM":
        size = str(spec.model_size_in_billions).replace(".", "_")
        return f"{family.model_name}--{size}B--{spec.model_format}--{spec.quantization}"
    if isinstance(family, EmbeddingFamily):
        return (
            f"{family.model_name}--{family.max_tokens}--{family.dimensions}--{spec.model_format}--{spec.quantization}"
        )
    return family.model_name


def find_version(registry: Registry, model_type: str, version: str) -> dict[str, Any]:
    """The fields of a launch that choose the spec of that version. Reads the whole type: not for the event loop.

    Raises:
        ValueError: there is none; the text names the nearest.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"Unsupported model type: {model_type}. {did_you_mean(model_type, FAMILIES)}")
    versions: list[str] = []
    for family in registry.list(model_type):
        if not version.startswith(family.model_name):
            continue
        for spec in family.specs:
            versions.append(version_of(family, spec))
            if versions[-1] == version:
                return {"model_type": model_type, "model_name": family.model_name} | _choice(family, spec)
    hint = did_you_mean(version, versions or registry.names(model_type), what="Versions" if versions else "Models")
    raise ValueError(f"There is no version {version!r} of any {model_type} model. {hint}")


def _choice(family: ModelFamily, spec: ModelSpec) -> dict[str, Any]:
    """What a version says of its spec; those of flat families say nothing."""
    if version_of(family, spec) == family.model_name:
        return {}
    fields = ("model_format", "quantization", "model_size_in_billions")
    return {field: getattr(spec, field) for field in fields if getattr(spec, field) is not None}


def instance_card(deployment: Deployment) -> dict[str, Any]:
    """A launch and how far it is, as Xinference's command line polls it."""
    launch = deployment.launch
    artifact = launch.artifact
    return {
        "model_name": artifact.family.model_name,
        "model_uid": launch.uid,
        "model_version": version_of(artifact.family, artifact.spec),
        "model_ability": list(artifact.family.abilities),
        "replica": launch.replica,
        "status": instance_status(deployment.state, is_wished=deployment.is_wished),
        "instance_created_ts": int(deployment.launched_at),
        "n_worker": 1,
        "replica_statuses": [instance_replica(replica) for replica in deployment.replicas],
    }


def instance_replica(replica: Replica) -> dict[str, Any]:
    """One copy, in the same words."""
    is_bad = replica.state in (State.FAILED, State.BACKOFF)
    return {
        "replica_id": replica.index,
        "replica_model_uid": replica.name,
        "replica_uid": replica.name,
        "worker_address": LOCAL_WORKER,
        "model_address": replica.address,
        "accelerators": list(replica.placement.gpu_uuids or ()) if replica.placement else [],
        "gpu_idx": list(replica.launch.gpus_of(replica.index) or ()),
        "status": instance_status(replica.state),
        "model_state": str(replica.shown_state),
        "created_ts": int(time.time() - (time.monotonic() - replica.state_since)),
        "error_message": str(replica.failure) if is_bad and replica.failure else None,
        "error_cause": replica.failure.cause if is_bad and replica.failure else None,
        "degraded": replica.degraded,
    }


def instance_status(state: State, *, is_wished: bool = False) -> str:
    """Our states in Xinference's words; a model that waits for its next request counts as ready.

    Args:
        is_wished: it is to be loaded, even if nothing has begun.
    """
    if (state is State.STOPPED and not is_wished) or state in RESTING:
        return "READY"
    return {State.READY: "READY", State.FAILED: "ERROR", State.STOPPING: "TERMINATING"}.get(state, "CREATING")


def progress_card(deployment: Deployment | None) -> dict[str, Any]:
    """How far a launch is, from 0 to 1."""
    if deployment is None:
        return {"progress": 0.0, "stage": "pending", "download_files": [], "replicas": []}
    downloading = next((replica.progress for replica in deployment.replicas if replica.progress), None)
    stages = {
        State.READY: ("completed", 1.0),
        **dict.fromkeys(RESTING, ("completed", 1.0)),
        State.WAKING: ("loading", 0.9),
        State.STARTING: ("loading", 0.9),
        State.DOWNLOADING: ("downloading", 0.1),
    }
    stage, progress = stages.get(deployment.state, ("launching", 0.0))
    files: list[dict[str, Any]] = []
    if stage == "downloading" and downloading:
        share = downloading.done_bytes / downloading.total_bytes if downloading.total_bytes else 0.0
        progress = 0.9 * share
        files = [
            {
                "name": downloading.file,
                "downloaded": downloading.done_bytes,
                "total": downloading.total_bytes,
                "rate_bytes_s": downloading.rate_bytes_s,
                "eta_s": downloading.eta_s,
            }
        ]
    if deployment.is_cancelled and deployment.state is not State.READY:
        stage = "cancelled"
    cards = [instance_replica(replica) for replica in deployment.replicas]
    return {"progress": progress, "stage": stage, "download_files": files, "replicas": cards}


def replica_card(deployment: Deployment, replica: Replica, now: float) -> ReplicaCard:
    """A replica for `hostler ps`; `now` is of time.monotonic."""
    pid = replica.process.pid if replica.process else None
    return ReplicaCard(
        uid=deployment.launch.uid,
        replica=replica.index,
        state=replica.shown_state,
        tier=replica.shown_tier,
        state_s=now - (replica.dozes_since if replica.dozes else replica.state_since),
        engine=deployment.launch.engine,
        pid=pid,
        address=replica.address,
        memory_bytes=memory_bytes(pid) if pid else None,
        in_flight=replica.in_flight,
        waiting=deployment.waiting,
        idle_s=now - replica.last_used if replica.upstream and not replica.in_flight else None,
        starts=replica.starts,
        progress=str(replica.progress) if replica.progress else None,
        log=str(replica.log),
        failure=replica.failure,
        degraded=replica.degraded,
        context_tokens=replica.context_tokens,
    )


def launch_body(launch: Launch) -> dict[str, Any]:
    """A launch as the body that would make it; the values of `envs`, which may be secret, are masked."""
    artifact = launch.artifact
    spec, path = artifact.spec, artifact.local_path
    body = {
        "model_uid": launch.uid,
        "model_name": artifact.family.model_name,
        "model_type": artifact.family.model_type,
        "model_engine": launch.engine,
        "model_format": spec.model_format,
        "model_size_in_billions": spec.model_size_in_billions,
        "quantization": spec.quantization,
        "model_path": str(path) if path else None,
        **_addition_wishes(artifact),
        "replica": launch.replica,
        "n_gpu": "auto" if launch.n_gpu is None else launch.n_gpu,
        "gpu_idx": list(launch.gpu_idx) if launch.gpu_idx else None,
        "request_limits": launch.request_limits,
        "sleep_after_s": launch.sleep_after_s,
        "idle_timeout_s": launch.idle_timeout_s,
        "envs": dict.fromkeys(launch.envs, MASK) or None,
        "force_options": True if launch.forced_options else None,
    }
    return {key: value for key, value in body.items() if value is not None} | shown_options(launch)


def _addition_wishes(artifact: Artifact) -> dict[str, Any]:
    """The fields of a launch that such additions come of."""
    wishes: dict[str, Any] = {}
    for kind in KINDS:
        for addition in artifact.additions:
            if addition.role == kind.role:
                wishes[kind.choice] = addition.name or None
                wishes[kind.path] = str(addition.local_path) if addition.local_path else None
    controlnets = [addition.name for addition in artifact.additions if addition.role == "controlnet"]
    return wishes | ({"controlnet": controlnets} if controlnets else {})


def shown_options(launch: Launch) -> dict[str, Any]:
    """The options of a launch, what may be secret masked."""
    options = launch.options | launch.forced_options
    for name in SECRET_OPTIONS:
        if value := options.get(name):
            options[name] = dict.fromkeys(value, MASK) if isinstance(value, dict) else MASK
    return options


def unmasked(given: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """What was given, with the launch's own values for what came back masked."""
    shown = shown_options(launch)
    kept = {name: launch.options[name] for name in SECRET_OPTIONS if name in given and given[name] == shown.get(name)}
    return given | kept


def read_launch(body: dict[str, Any]) -> tuple[str | None, LaunchRequest]:
    """A launch body as users write it: nulls but that of `n_gpu` count as absent, unknown keys are engine options.

    Returns:
        the uid wished for, if any, and the request.
    Raises:
        ValueError: naming the key and what is allowed.
    """
    given: dict[str, Any] = {"preload": True}  # launched means running, after a restart too
    given |= {key: value for key, value in body.items() if value is not None or key == "n_gpu"}
    uid = given.pop("model_uid", None)
    _read_replica(given, body)
    _read_gpus(given)
    for key, reason in REFUSED.items():
        if given.get(key):
            raise ValueError(f"`{key}` cannot be used here: {reason}")
    for key in WITHOUT_EFFECT:
        given.pop(key, None)
    _read_adapters(given)
    if "download_hub" in given:
        hub = given.pop("download_hub")
        given |= {} if str(hub).lower() == "auto" else {"model_hub": hub}
    known = set(LaunchRequest.__struct_encode_fields__)
    options = {key: given.pop(key) for key in list(given) if key not in known}
    if not isinstance(given.get("options", {}), dict):
        raise ValueError(f"`options` is an object of the engine's options, not {given['options']!r}.")
    if not isinstance(uid, str | int | None):
        raise ValueError(f"`model_uid` is a text, not {uid!r}.")
    if options:
        given["options"] = options | given.get("options", {})
    return None if uid is None else str(uid), decode(given, LaunchRequest, "$", strict=False)


def read_more_replicas(body: dict[str, Any], launch: Launch) -> int:
    """How many copies a body wants to be added to a launch.

    Raises:
        BadRequest: it wants copies that differ from those there are.
    """
    given = {key: value for key, value in body.items() if value is not None}
    if given.get("replica_config"):
        raise BadRequest(f"`replica_config` cannot be used here: {REFUSED['replica_config']}", param="replica_config")
    engine, n_gpu = given.get("model_engine", launch.engine), given.get("n_gpu", "auto")
    for field, wished, there in (("model_engine", engine, launch.engine), ("n_gpu", n_gpu, launch.n_gpu)):
        if wished != "auto" and str(wished).casefold() != str(there).casefold():
            raise BadRequest(
                f"Replicas of a model are alike: {launch.uid} has {field} {'auto' if there is None else there}, so "
                f"none can have {wished}. Launch that one under another uid.",
                param=field,
            )
    try:
        _read_replica(given, given)
    except ValueError as exc:
        raise BadRequest(str(exc), param="replica") from exc
    return int(given["replica"])


def _read_replica(given: dict[str, Any], body: dict[str, Any]) -> None:
    replica = body.get("replica", 1)
    if isinstance(replica, str) and replica.isdecimal():
        replica = int(replica)
    if not isinstance(replica, int) or isinstance(replica, bool) or replica < 1:
        raise ValueError(f"`replica` is how many copies to run, a whole number from 1 on, not {body.get('replica')!r}.")
    given["replica"] = replica


def _read_adapters(given: dict[str, Any]) -> None:
    """LoRA adapters, and how images load them: each an option of the engines that can."""
    adapters = given.pop("peft_model_config", None) or {}
    if not isinstance(adapters, dict):
        raise ValueError(
            '`peft_model_config` is an object such as {"lora_list": [{"lora_name": "a", "local_path": "/b"}]}, not '
            f"{adapters!r}."
        )
    given.update((key, value) for key, value in adapters.items() if value not in (None, [], {}))


def _read_gpus(given: dict[str, Any]) -> None:
    """n_gpu: "auto", a number, or null or 0 for the CPU alone; gpu_idx: a number, some, or a text of some.

    `device` cpu means the CPU alone too; any other is an option of the engines that have one.
    """
    n_gpu = given.pop("n_gpu", "auto")
    if str(given.get("device", "")).lower().startswith("cpu"):
        del given["device"]
        given["n_gpu"] = 0
        return
    gpu_idx = given.pop("gpu_idx", None)
    if gpu_idx is not None:
        given["gpu_idx"] = [gpu_idx] if isinstance(gpu_idx, int) else gpu_idx
        if isinstance(gpu_idx, str):
            given["gpu_idx"] = [part.strip() for part in gpu_idx.split(",") if part.strip()]
        if not isinstance(given["gpu_idx"], list):
            raise ValueError(f"`gpu_idx` is the number of a GPU, or a list of such, not {gpu_idx!r}.")
        return
    if n_gpu == "auto":
        return
    number = 0 if n_gpu is None else int(n_gpu) if str(n_gpu).isdecimal() else n_gpu
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(
            f"The parameter `n_gpu` must be greater than 0, or auto, or 0 or null for the CPU alone, not {n_gpu!r}."
        )
    given["n_gpu"] = number
