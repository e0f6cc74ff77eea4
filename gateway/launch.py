"""From what a user wishes to a Launch: the one place where every choice is made. No process is touched here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

import engines
from engines.base import LOAD_TIMEOUT_S, START_TIMEOUT_S, Engine, EngineSettings, Launch
from engines.environments import (
    WITHOUT_PYTHON,
    Environment,
    asks_for,
    facts_of,
    find_base,
    model_environment,
)
from engines.requirements import same_name
from gateway.amounts import bytes_of
from registry.decode import decode
from registry.registry import Registry
from registry.resolve import Artifact, Selection, candidates, without_files

UID = re.compile(r"(?!.*//)[^\s/\\?%#&=+]([^\s\\?%#&=+]{0,98}[^\s/\\?%#&=+])?")
UID_SHOWN = 120  # of one that is refused
# Paths below /v1/models that mean something else than a uid.
RESERVED_UIDS = frozenset(
    ["prompts", "families", "instances", "instance", "vllm-supported", "update_type", "llm", "recommend", "update_spec"]
)
RESERVED_ENDING = re.compile(
    r"/(start|stop|sleep|wake|logs|progress|cancel|events|queue|versions|reload(/config)?|replicas(/\d+)?|requests/[^/]+/abort)$"
)
SENT_TO_ALL = ("trust_remote_code", "device")
FLAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
OURS_TO_SAY = frozenset(["model", "host", "port", "alias", "api_key", "api_key_file", "served_model_name", "uds"])
REPLICA_NAME = re.compile(r"-rep\d+$")
REPLICA_LIMIT = 64
# Fields of a launch, beside the engine's options, that a model may change while it is served.
OPTION_FIELDS = ("options", "forced_options")
RELOADABLE = (
    "envs",
    "request_limits",
    "queue_limit",
    "pinned",
    "priority",
    "sleep_after_s",
    "idle_timeout_s",
    "start_timeout_s",
    "load_timeout_s",
)
# Variables by which a process loads or runs what they name, before or instead of what it was started for.
CODE_VARIABLES = re.compile(
    r"LD_\w+|DYLD_\w+|GLIBC_TUNABLES|GCONV_PATH|PATH|HOME|SHELL|ENV|BASH_ENV|"
    r"PYTHON(PATH|HOME|STARTUP|USERBASE|INSPECT|BREAKPOINT|PYCACHEPREFIX|EXECUTABLE|PLATLIBDIR|WARNINGS)|"
    r"CC|CXX|NVCC\w*|CUDA_(HOME|PATH)|(CUDA|NVTX)_INJECTION\w+|NCCL_\w+_PLUGIN|OPENSSL_(CONF|MODULES|ENGINES)|"
    r"GGML_BACKEND_PATH|IMAGEIO_FFMPEG_EXE|T(ORCHINDUCTOR|RITON)_CACHE_DIR|TORCH_EXTENSIONS_DIR"
)
FILE_NAME_BYTES = 200  # most file systems take 255; ours get endings

Seconds = Annotated[float, Meta(gt=0)]
Size = int | str  # bytes, or a text that `bytes_of` reads


class LaunchRequest(Selection, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that somebody wants served: which one, by which engine, how, and when."""

    model_engine: Annotated[str, Meta(description="engine; chosen if not given")] | None = None
    replica: Annotated[int, Meta(ge=1, le=REPLICA_LIMIT, description="copies to run")] = 1
    gpu_idx: (
        Annotated[tuple[int, ...], Meta(description="these GPUs and no others, split evenly over the copies")] | None
    ) = None
    n_gpu: Annotated[int, Meta(ge=0, description="how many GPUs for a copy; 0: the CPU alone")] | None = None
    options: Annotated[dict[str, Any], Meta(description="options of the engine, by its own names")] = {}
    force_options: Annotated[
        bool, Meta(description="pass options that are not known here to the engine's command line")
    ] = False
    envs: Annotated[dict[str, str], Meta(description="environment of the engine's process")] = {}
    request_limits: Annotated[int, Meta(ge=0, description="requests of one replica at once; more get 429")] | None = (
        None
    )
    queue_limit: (
        Annotated[int, Meta(ge=0, description="requests that may wait for the model; more get 429; else the site's")]
        | None
    ) = None
    pinned: Annotated[bool, Meta(description="once loaded, never unloaded to make room for another model")] = False
    priority: Annotated[
        int,
        Meta(ge=-10, le=10, description="who gets room first; each step doubles what unloading it counts for"),
    ] = 0
    group: Annotated[str, Meta(min_length=1, description="one of the site's `groups`")] | None = None
    memory: (
        Annotated[Size, Meta(description="of one copy, such as 6GiB; else estimated, and corrected by what was seen")]
        | None
    ) = None
    cpu_fallback: Annotated[
        bool, Meta(description="run on the CPU where the GPUs have no room; else that is refused")
    ] = False
    preload: Annotated[bool, Meta(description="load at start instead of at the first request")] = False
    sleep_after_s: (
        Annotated[Seconds, Meta(description="have it sleep after so long without a request, if its engine can")] | None
    ) = None
    idle_timeout_s: Annotated[Seconds, Meta(description="unload after so long without a request")] | None = None
    start_timeout_s: Annotated[Seconds, Meta(description="from the engine's start until it is ready")] = START_TIMEOUT_S
    load_timeout_s: Annotated[
        Seconds, Meta(description="how long a request that is not streamed waits for the model")
    ] = LOAD_TIMEOUT_S
    enable_virtual_env: Annotated[
        bool | None, Meta(description="a Python environment of its own; else as the site says")
    ] = None
    virtual_env_packages: Annotated[tuple[str, ...], Meta(description="requirements for that environment")] = ()
    virtual_env_find_links: Annotated[
        tuple[str, ...], Meta(description="folders of wheels for it, below one of the site's wheel_folders")
    ] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for what no system takes as a variable; passed on as it is, `A=B` would set A."""
        for name, value in self.envs.items():
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(f"`envs`: {name!r} cannot be set: names hold no =, and neither they nor values a NUL")
        if self.memory is not None:
            bytes_of(self.memory)


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """What a site says of Python environments.

    Args:
        model_environments: whether models get those that they ask for.
        skip_installed: whether what the engine's Python has need not be installed again.
        environments_folder: where environments are.
        wheel_folders: below which launches may name folders of wheels.
        engines: the settings of engines, by name.
        cuda_version: as the driver says; None without a GPU.
    """

    model_environments: bool = True
    skip_installed: bool = True
    environments_folder: Path | None = None
    wheel_folders: tuple[Path, ...] = ()
    engines: Mapping[str, EngineSettings] = {}
    cuda_version: str | None = None


def plan(
    uid: str,
    request: LaunchRequest,
    registry: Registry,
    known_engines: Sequence[Engine],
    hubs: Sequence[str] = (),
    site: Site = Site(),  # noqa: B008 (frozen)
) -> Launch:
    """Make every choice that the request leaves open.

    Args:
        hubs: those that the site prefers, best first.
        site: what it says of Python environments.
    Raises:
        ValueError: it cannot be done; the text says why and what there is instead.
    """
    check_uid(uid)
    artifacts = _artifacts(uid, request, registry, known_engines, hubs)
    _check_find_links(request.virtual_env_find_links, site.wheel_folders)

    def environment_for(artifact: Artifact, engine: Engine) -> Environment | None:
        return _environment(request, artifact, engine, site)

    artifact, engine = _choose(request.model_engine, artifacts, known_engines, request, environment_for)
    options, forced = _split_options(request, engine)
    options = _of_engine(options, engine)
    try:
        engine.read_options(options)
    except ValueError as exc:
        if set(options) <= set(engine.options.__struct_fields__) or not engine.takes_flags:
            raise
        raise ValueError(f"{exc} `force_options` passes on what is not known here, unchecked.") from exc
    return Launch(
        uid=uid,
        artifact=artifact,
        engine=engine.name,
        replica=request.replica,
        gpu_idx=request.gpu_idx,
        n_gpu=_n_gpu(request),
        options=options,
        forced_options=forced,
        envs=request.envs,
        request_limits=request.request_limits,
        queue_limit=request.queue_limit,
        pinned=request.pinned,
        priority=request.priority,
        group=request.group,
        memory_bytes=None if request.memory is None else bytes_of(request.memory),
        cpu_fallback=request.cpu_fallback,
        preload=request.preload,
        sleep_after_s=request.sleep_after_s,
        idle_timeout_s=request.idle_timeout_s,
        start_timeout_s=request.start_timeout_s,
        load_timeout_s=request.load_timeout_s,
        environment=environment_for(artifact, engine),
        selection=Selection(**{field: getattr(request, field) for field in Selection.__struct_fields__}),
        enable_virtual_env=request.enable_virtual_env,
        virtual_env_packages=request.virtual_env_packages,
        virtual_env_find_links=request.virtual_env_find_links,
    )


def _n_gpu(request: LaunchRequest) -> int | None:
    """How many GPUs each copy gets: its share, where they are named.

    Raises:
        ValueError: they cannot be shared out so.
    """
    named = request.gpu_idx
    if named is None:
        return request.n_gpu
    if len(set(named)) < len(named):
        raise ValueError(f"gpu_idx {list(named)} names a GPU twice.")
    if len(named) % request.replica:
        raise ValueError(
            f"Invalid input. Allocated gpu must be a multiple of replica: gpu_idx names {len(named)}, and each of the "
            f"{request.replica} copies gets as many as the others."
        )
    share = len(named) // request.replica
    if request.n_gpu not in (None, share):
        each = "" if request.replica == 1 else f", {share} for each copy"
        raise ValueError(f"gpu_idx names {len(named)} GPUs{each}, n_gpu says {request.n_gpu}: give one of them.")
    return share if request.replica > 1 and named else request.n_gpu


def _of_engine(options: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """Without what Xinference's clients send to every engine, where this one has no use for it."""
    takes = engine.options.__struct_fields__
    return {name: value for name, value in options.items() if name in takes or name not in SENT_TO_ALL}


def _artifacts(
    uid: str, request: LaunchRequest, registry: Registry, known: Sequence[Engine], hubs: Sequence[str]
) -> tuple[Artifact, ...]:
    """What could be launched, best first."""
    engine = engines.find(request.model_engine, tuple(known)) if request.model_engine else None
    if engine and not engine.wants_files(request.options) and not (request.model_path or request.model_id):
        return (without_files(registry, request, uid),)
    return candidates(registry, request, hubs)


def request_of(launch: Launch) -> LaunchRequest:
    """A request that gives the launch again: what was asked for, with the choices that were made of it."""
    selection = launch.selection or _selection_of(launch.artifact)
    spec = launch.artifact.spec
    pinned: dict[str, Any] = {}
    if launch.artifact.has_files and not (selection.model_path or selection.model_id):
        pinned = {
            "model_format": spec.model_format,
            "model_size_in_billions": spec.model_size_in_billions,
            "quantization": spec.quantization,
        }
        if spec.model_uri is None:
            pinned["model_hub"] = launch.artifact.source.model_hub
    same = set(LaunchRequest.__struct_fields__) & set(Launch.__struct_fields__)
    fields = {field: getattr(selection, field) for field in Selection.__struct_fields__}
    fields |= {field: getattr(launch, field) for field in same} | pinned
    return LaunchRequest(
        **fields
        | {
            "model_engine": launch.engine,
            "options": launch.options | launch.forced_options,
            "force_options": bool(launch.forced_options),
            "memory": launch.memory_bytes,
        }
    )


def _selection_of(artifact: Artifact) -> Selection:
    """For launches that older releases kept: the family by its name, or the files where they are."""
    family, path = artifact.family, artifact.local_path
    named = Selection(model_name=family.model_name, model_type=family.model_type)
    if path is None:
        return named
    return msgspec.structs.replace(
        named,
        model_path=str(path),
        model_format=artifact.spec.model_format,
        quantization=artifact.spec.quantization,
        model_size_in_billions=artifact.spec.model_size_in_billions,
        multimodal_projector=artifact.projector,
    )


def changed(launch: Launch, changes: Mapping[str, Any], engine: Engine) -> Launch:
    """The launch with other options, and other values of the fields in RELOADABLE; None takes one away.

    Raises:
        ValueError: one cannot be changed, or not so; the text says what can be.
    """
    options, forced, fields = dict(launch.options), dict(launch.forced_options), dict[str, Any]()
    for key, value in changes.items():
        if key in RELOADABLE:
            fields[key] = value
        elif key in LaunchRequest.__struct_encode_fields__:
            raise ValueError(f"{key!r} cannot be changed by a reload: launch the model anew, or under another uid.")
        else:
            target = forced if key in forced else options
            target.pop(key, None)
            if value is not None:
                target[key] = value
    engine.read_options(options)
    whole = {name: getattr(launch, name) for name in RELOADABLE} | fields
    wish = decode({name: value for name, value in whole.items() if value is not None}, LaunchRequest, "$", strict=False)
    fields = {name: getattr(wish, name) for name in RELOADABLE}
    return msgspec.structs.replace(launch, options=options, forced_options=forced, **fields)


def _split_options(request: LaunchRequest, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that the engine has here, and those that are forced on it.

    Raises:
        ValueError: some are forced, and the engine's program takes none, or they cannot be flags.
    """
    if not request.force_options:
        return request.options, {}
    known = engine.options.__struct_fields__
    forced = {key: value for key, value in request.options.items() if key not in known}
    if forced and not engine.takes_flags:
        raise ValueError(f"{engine.name} takes no options but its own, so {', '.join(forced)} cannot be forced on it.")
    for key in forced:
        if not FLAG.fullmatch(key):
            raise ValueError(f"{key!r} cannot be a flag of {engine.name}: letters, digits, - and _ make one.")
        if key.replace("-", "_") in OURS_TO_SAY:
            raise ValueError(f"{key!r} cannot be forced on {engine.name}: the gateway says it itself.")
    return {key: value for key, value in request.options.items() if key in known}, forced


def check_uid(uid: str) -> None:
    """Raises ValueError unless the text can stand for a model in a path and in a request."""
    if uid in RESERVED_UIDS:
        raise ValueError(f"{uid!r} cannot name a model: the API uses that path. Choose another name.")
    if REPLICA_NAME.search(uid):
        raise ValueError(f"{uid!r} cannot name a model: replicas are named so. Choose another name.")
    parts = uid.split("/")
    if RESERVED_ENDING.search(uid):
        raise ValueError(f"{uid!r} cannot name a model: the API uses paths that end so. Choose another name.")
    if not (
        UID.fullmatch(uid)
        and uid.isprintable()
        and not uid.startswith("-")
        and not {".", ".."} & set(parts)
        and len(file_name(uid).encode()) <= FILE_NAME_BYTES
    ):
        raise ValueError(
            f"{uid[:UID_SHOWN]!r} cannot name a model: 1 to 100 characters, no white space, none of \\ ? % # & = +, no "
            "dash at its begin, and slashes only inside."
        )


def file_name(uid: str) -> str:
    """The uid as the name of a file or folder."""
    return uid.replace("/", "%2F")


def _check_find_links(folders: Sequence[str], allowed: Sequence[Path]) -> None:
    for folder in folders:
        path = Path(folder)
        if not path.is_absolute():
            raise ValueError(f"virtual_env_find_links: {folder!r} is no absolute path.")
        real = path.resolve()
        if not any(real == root.resolve() or root.resolve() in real.parents for root in allowed):
            shown = ", ".join(map(str, allowed)) or "none"
            raise ValueError(
                f"virtual_env_find_links: {folder} is below none of the site's `wheel_folders` ({shown}). Put the "
                "wheels there, or add the folder to that setting."
            )
        if not path.is_dir():
            raise ValueError(f"virtual_env_find_links: there is no folder {folder}.")


EnvironmentFor = Callable[[Artifact, Engine], Environment | None]


def _environment(request: LaunchRequest, artifact: Artifact, engine: Engine, site: Site) -> Environment | None:
    """The environment that the model gets with this engine.

    Raises:
        ValueError: what it asks for cannot be had.
    """
    if engine.by_name_only:  # what runs there is not ours to equip
        return None
    is_on = site.model_environments if request.enable_virtual_env is None else request.enable_virtual_env
    if not is_on:
        if request.virtual_env_packages:
            raise ValueError(
                "virtual_env_packages are given, and environments of models are off. Say enable_virtual_env=true, or "
                "leave the packages out."
            )
        return None
    block = artifact.family.virtualenv
    is_wished = request.enable_virtual_env is True
    if not (is_wished or request.virtual_env_packages or (block and block.packages)):
        return None
    base = None
    if same_name(engine.name) not in WITHOUT_PYTHON:
        base = find_base(engine.name, site.engines.get(engine.name, EngineSettings()), site.environments_folder)
    return model_environment(
        artifact.family.model_name,
        engine.name,
        block,
        facts_of(base, site.cuda_version),
        packages=request.virtual_env_packages,
        find_links=request.virtual_env_find_links,
        is_wished=is_wished,
        skip_installed=site.skip_installed,
    )


def _choose(
    name: str | None,
    artifacts: Sequence[Artifact],
    known: Sequence[Engine],
    request: LaunchRequest,
    environment_for: EnvironmentFor,
) -> tuple[Artifact, Engine]:
    """The first artifact that an engine here takes, and that engine.

    Raises:
        ValueError: there is none; of one that is only not installed if there is one, else of the first artifact.
    """
    refusal, is_near = None, False
    for artifact in artifacts:
        try:
            return artifact, _choose_engine(name, artifact, known, request, environment_for)
        except ValueError as exc:
            accepting = any(
                (not engine.by_name_only if name is None else engine is _named(name, artifact, known))
                and artifact.family.model_type in engine.model_types
                and engine.accepts(artifact) is None
                for engine in known
            )
            if refusal is None or (accepting and not is_near):
                refusal, is_near = exc, accepting
    raise refusal or ValueError("There is nothing to choose from.")


def _named(name: str, artifact: Artifact, known: Sequence[Engine]) -> Engine:
    return engines.find(name, tuple(known), artifact.family.model_type)


def _choose_engine(
    name: str | None,
    artifact: Artifact,
    known: Sequence[Engine],
    request: LaunchRequest,
    environment_for: EnvironmentFor,
) -> Engine:
    """The engine asked for, or the first that is installed and accepts the artifact."""
    what = f"{artifact.family.model_name} ({artifact.spec.model_format})"
    if name is not None:
        engine = _named(name, artifact, known)
        if reason := _why_not(engine, artifact, request, environment_for):
            raise ValueError(f"{what} cannot run on {engine.name}: {reason}.")
        return engine
    refusals = []
    for engine in known:
        if engine.by_name_only:
            continue
        reason = _why_not(engine, artifact, request, environment_for)
        if reason is None:
            return engine
        refusals.append(f"{engine.name}: {reason}")
    raise ValueError(f"No engine here can run {what}. " + "; ".join(refusals) + ".")


def _why_not(engine: Engine, artifact: Artifact, request: LaunchRequest, environment_for: EnvironmentFor) -> str | None:
    if artifact.family.model_type not in engine.model_types:
        return f"it serves {', '.join(engine.model_types)} models, not {artifact.family.model_type}"
    if reason := engine.accepts(artifact):
        return reason
    if strange := [str(addition) for addition in artifact.additions if addition.role not in engine.additions]:
        return f"it loads nothing beside a model's own files, such as {', '.join(strange)}"
    try:
        environment = environment_for(artifact, engine)
    except ValueError as exc:
        return str(exc).rstrip(".")
    if environment is not None and _brings_engine(engine, artifact, request):
        return None
    return engine.installed()


def _brings_engine(engine: Engine, artifact: Artifact, request: LaunchRequest) -> bool:
    """Whether the model's environment is meant to hold the engine too."""
    block = artifact.family.virtualenv
    packages = (*(block.packages if block else ()), *request.virtual_env_packages)
    return request.enable_virtual_env is True or asks_for(engine.name, packages)
