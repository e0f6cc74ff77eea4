"""The contract between the gateway and every engine: plain data in, a Command out.

An engine is a description of an inference server that can be started; it holds no state of what runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import msgspec
from msgspec import Meta

from engines.environments import Environment, absolute_program, worker_argv
from registry.additions import Role
from registry.decode import decode
from registry.memory import Attention, Cache
from registry.resolve import Artifact, Selection

NUMBERED = re.compile(r"cuda:(\d+)")  # torch's name of a device

TORCH_BYTES = 600_000_000  # of a process that has torch, as measured

START_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 300.0


class Launch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The desired state of one uid. Written to disk before anything is done about it.

    `selection` and the fields of virtual environments are what was asked for, of which `artifact` and `environment`
    were chosen; None in launches that older releases kept. `is_applied` says that it came with `hostler apply`.
    """

    uid: str
    artifact: Artifact
    engine: str
    replica: int = 1
    gpu_idx: tuple[int, ...] | None = None
    n_gpu: int | None = None
    options: dict[str, Any] = {}
    forced_options: dict[str, Any] = {}
    envs: dict[str, str] = {}
    preload: bool = False
    request_limits: int | None = None
    queue_limit: int | None = None
    pinned: bool = False
    priority: int = 0
    group: str | None = None
    memory_bytes: int | None = None
    cpu_fallback: bool = False
    sleep_after_s: float | None = None
    idle_timeout_s: float | None = None
    start_timeout_s: float = START_TIMEOUT_S
    load_timeout_s: float = LOAD_TIMEOUT_S
    environment: Environment | None = None
    selection: Selection | None = None
    enable_virtual_env: bool | None = None
    virtual_env_packages: tuple[str, ...] = ()
    virtual_env_find_links: tuple[str, ...] = ()
    is_applied: bool = False

    def gpus_of(self, index: int) -> tuple[int, ...] | None:
        """Which of the GPUs that were named are for that replica: `n_gpu` of them each, or else all for all."""
        if not self.gpu_idx:
            return self.gpu_idx
        size = self.n_gpu or len(self.gpu_idx)
        begin = index * size % len(self.gpu_idx)
        return self.gpu_idx[begin : begin + size]


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica asks of the machine.

    `gpu_idx` names the GPUs; else `n_gpu` says how many, 0 being the CPU alone and None whatever is there.

    Its memory: `memory_bytes` is what one copy takes, on its GPUs or else of the machine's; 0 where nobody knows. Of it
    each of its GPUs has `overhead_bytes` whole: what the engine takes beside the model. `gpu_share` is the least share
    of each GPU. `can_spread` says whether one copy may be split over several GPUs, and `gpu_counts` over how many, if
    not over any number. `chooses`: unless the launch says which GPUs, or how much memory, it picks among all by itself.
    `is_elastic`: it fills what it is given, so that what it was seen to take tells nothing.

    Its cache of keys and values: `cache` as it is set up at the start, None where the engine does not say, in whole
    ones of `cache_unit_bytes`, and for at least `cache_tokens` of all sequences; or else `cache_bytes`. `copies_cache`:
    each step takes a copy of one layer's. `attention` is
    what it keeps of a token, `lighter` has the bytes that other specs of the family would take, by name. `weight_bytes`
    are those of its files, 0 where nobody knows.

    `can_shorten`: the launch leaves its context to it, so that it may be shorter than the model's; `shorter` then has
    the bytes of one copy by tokens of its context, the longest first.

    `can_split`: it can have some layers on the CPU. The launch says how many are to be on GPUs (`gpu_layers`), or
    allows any number (`may_split`), or wants all. `splits` has the bytes on GPUs and of the machine by layers on GPUs,
    the most first.
    """

    gpu_idx: tuple[int, ...] | None = None
    n_gpu: int | None = None
    memory_bytes: int = 0
    overhead_bytes: int = 0
    gpu_share: float | None = None
    can_spread: bool = False
    gpu_counts: tuple[int, ...] = ()
    chooses: bool = False
    is_elastic: bool = False
    cache: Cache | None = None
    cache_tokens: int = 0
    cache_unit_bytes: int = 1
    cache_bytes: int | None = None
    copies_cache: bool = False
    attention: tuple[Attention, ...] = ()
    lighter: Mapping[str, int] = {}
    weight_bytes: int = 0
    can_shorten: bool = False
    shorter: Mapping[int, int] = {}
    can_split: bool = False
    may_split: bool = False
    gpu_layers: int | None = None
    splits: Mapping[int, tuple[int, int]] = {}

    @property
    def is_for_cpu(self) -> bool:
        """Whether it is for the CPU alone, whatever there is."""
        return self.gpu_idx == () or self.n_gpu == 0


RAM = "ram"  # the machine's memory, among the devices of a placement


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """The GPUs and the memory given to one replica.

    `gpu_uuids`: None leaves the choice to the engine, () hides them all. `memory` is bytes by device: the uuid of a
    GPU, or RAM; of it `cache_bytes` are for the cache of keys and values. `gpu_totals` is the whole memory of each of
    its GPUs, for engines that take a share. 0 is what nobody knows. `context_tokens` are those that there is memory for
    if it is fewer than the model's; `gpu_layers` is how many layers are on its GPUs, if not all.
    """

    gpu_uuids: tuple[str, ...] | None = None
    memory: Mapping[str, int] = {}
    gpu_totals: Mapping[str, int] = {}
    cache_bytes: int = 0
    context_tokens: int | None = None
    gpu_layers: int | None = None


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a replica listens: a Unix socket, or a loopback port; and the key that opens it.

    Or else `url`, where a model is served without us: what OpenAI's clients take as base URL. `headers` go with every
    request to it, and a reply that says nothing for `silence_s` counts as lost.
    """

    socket: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    api_key: str = ""
    url: str | None = None
    headers: Mapping[str, str] = {}
    silence_s: float | None = None

    @property
    def address(self) -> str:
        """The endpoint as users read it."""
        if self.url:
            return self.url
        return f"unix:{self.socket}" if self.socket else f"http://{self.host}:{self.port}"

    def url_of(self, path: str) -> str:
        """Where a public path is. A base URL stands for everything up to and with the /v1 of paths that begin so."""
        if not self.url:
            return ("http://replica" if self.socket else f"http://{self.host}:{self.port}") + path
        if path.startswith("/v1/"):
            return self.url + path[3:]
        return self.url.removesuffix("/v1") + path


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What to run for one replica.

    `env` is added to the gateway's own environment. `files` are written to the run folder before it starts: name ->
    text. `ready_path`, or else one of `other_ready_paths`, answers 200 once
    requests can be served. `grace_s` is the time from SIGTERM to SIGKILL. `folder` is the working folder, if it
    matters. With an `endpoint` there is nothing to run: the model is served there. `probe_interval_s` is the time
    between two looks at whether it still answers, if the site's is not fitting.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = {}
    files: Mapping[str, str] = {}
    ready_path: str = "/health"
    other_ready_paths: tuple[str, ...] = ()
    grace_s: float = 10.0
    folder: str | None = None
    endpoint: Endpoint | None = None
    probe_interval_s: float | None = None


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request that we send to the engine on our own; any answer but 200 within `limit_s` is a failure of it."""

    method: str = "POST"
    path: str
    body: bytes | None = None
    limit_s: float


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """One way in which an engine that runs can sleep: it answers nobody, holds little, and is back soon.

    `name`: "ram" where its weights are kept in the machine's memory, "disk" where they are read again from their files.
    `sleep` are the calls by which it falls asleep, `wake` those by which it comes back, each in their order; `warm_up`
    asks for one token, which nobody has to wait for then. `proof` is a completion that comes out the same each time,
    asked before it sleeps and once it is awake: what may come back as garbage shows by that. Asleep it holds
    `residual_bytes` of each device that it has, and `host_bytes` of the machine's memory, which it keeps when it is
    awake again. `is_first_slow`: that memory is taken the first time, which may last seconds.
    """

    name: str
    sleep: tuple[Call, ...]
    wake: tuple[Call, ...]
    warm_up: tuple[Call, ...] = ()
    proof: Call | None = None
    residual_bytes: int = 0
    host_bytes: int = 0
    is_first_slow: bool = False


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a site says of one engine: the program to run, or the Python that has its library."""

    binary: Annotated[str, Meta(description="the engine's program, by its path or its name on PATH")] | None = None
    python: Annotated[str, Meta(description="the Python that has the engine's library")] | None = None
    version: (
        Annotated[str, Meta(description="of the environment that `hostler engines install NAME --version` made")] | None
    ) = None
    launchers: Annotated[
        tuple[str, ...], Meta(description="of engine flexible: launchers that may run, by their exact dotted names")
    ] = ()
    sleep: Annotated[
        bool, Meta(description="of engines whose models can sleep: whether they do, unless a launch says otherwise")
    ] = True


class Adapter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A LoRA adapter that is loaded with a model, and the name by which requests ask for it (`lora_name`)."""

    lora_name: Annotated[str, Meta(min_length=1)]
    local_path: Annotated[str, Meta(min_length=1)]


class NoOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For engines that take none."""


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of inference server: how it is started, what it can load, what it asks for.

    Each engine is a subclass that answers by its class attributes and methods; instances differ by their site's
    settings alone.
    """

    name: ClassVar[str]
    """What it is called in launches and settings."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """What Xinference's users call it."""
    model_types: ClassVar[tuple[str, ...]]
    """Which types of family it can serve."""
    unix_socket: ClassVar[bool] = True
    """Whether it can listen on a Unix socket whose path ends in .sock; else it gets a loopback port."""
    by_name_only: ClassVar[bool] = False
    """Whether it is only taken where a launch names it: it has no way to tell what it can load."""
    runs_given_programs: ClassVar[bool] = False
    """Whether a launch says which program is run, so that launching is for those who may write the settings."""
    retry_s: ClassVar[float | None] = None
    """After how long a replica that has failed is tried again by itself; None: not before somebody says so."""
    options: ClassVar[type[msgspec.Struct]] = NoOptions
    """The Struct that a launch's options decode to; its fields are the options there are."""
    additions: ClassVar[tuple[Role, ...]] = ()
    """What it can load beside a model's own files. Its launches' artifacts have them, as paths of this machine."""
    takes_flags: ClassVar[bool] = False
    """Whether its program gets a launch's `forced_options` as flags."""
    overhead_bytes: ClassVar[int] = 0
    """What its process takes beside the model, where it is more than of a program in C; 0: not known."""
    routes: ClassVar[Mapping[str, str]] = {}
    """Public path -> upstream path, only where they differ."""
    chat_words: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()
    """What is replaced in replies to chats, whole and streamed, where the engine's word is not that of clients."""
    asks_for_usage: ClassVar[bool] = False
    """Whether it tells how many tokens a stream took only where `stream_options` ask for it, as OpenAI's API has it."""
    takes_chunks: ClassVar[bool] = False
    """Whether its server takes bodies that do not say before how long they are (`transfer-encoding: chunked`)."""
    less_memory: ClassVar[str] = ""
    """Which options make it need less memory; users read the sentence when it had too little."""

    refusals: ClassVar[Mapping[str, str]] = {}
    """How its errors begin that are the request's fault though it blames itself -> what users are told of the model."""

    is_asleep: ClassVar[Call | None] = None
    """What tells, by `is_sleeping` in its JSON, whether it sleeps; None: it has no tiers."""

    disturbed_sleep: ClassVar[str | None] = None
    """What its refusal to fall asleep says where others took memory of its GPU meanwhile: no fault of the tier."""

    context_from: ClassVar[tuple[str, tuple[str | int, ...]] | None] = None
    """Where it tells how many tokens a request may have: the path, and the keys in its answer."""

    keeps_prefixes: ClassVar[bool] = False
    """Whether it keeps what it has read, so that a conversation is answered faster where it was before."""

    settings: EngineSettings = EngineSettings()
    environments: Path | None = None
    """The folder of the environments that `hostler engines install` makes."""

    def configured(self, settings: EngineSettings, environments: Path | None = None) -> Self:
        """This engine with a site's settings."""
        absolute = {field: absolute_program(getattr(settings, field)) for field in ("binary", "python")}
        settings = msgspec.structs.replace(settings, **absolute)
        return msgspec.structs.replace(self, settings=settings, environments=environments)

    def installed(self) -> str | None:
        """Why it cannot run here, or None. Looks, never imports."""
        raise NotImplementedError

    def accepts(self, artifact: Artifact) -> str | None:
        """Why it cannot load this, or None; users read the sentence."""
        raise NotImplementedError

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """What to run. The uid is passed as served name, so that request bodies go through untouched.

        Args:
            python: of the model's own environment, if it has one.
        """
        raise NotImplementedError

    def tiers(self, launch: Launch, placement: Placement, needs: Needs) -> tuple[Tier, ...]:
        """How it could sleep, run by the `command` of the same launch and placement; who wakes quickest first."""
        return ()

    def why_sleepless(self, launch: Launch) -> str | None:
        """By which of its words the launch is never put to sleep, if that is not plain; part of a sentence."""
        return None

    def own_sleep(self, launch: Launch) -> tuple[float, Call] | None:
        """After how long without a request it falls asleep by itself, so that whoever asks it then wakes it, and what
        tells whether it sleeps, as `is_asleep`, without waking it. None: it never does.
        """
        return None

    def read_options(self, options: Mapping[str, Any]) -> Any:
        """A launch's options as the engine's Struct.

        Raises:
            DecodeError: naming the option that is wrong.
        """
        return decode(dict(options), self.options, "options", strict=False)

    def wants_files(self, options: Mapping[str, Any]) -> bool:
        """Whether it loads a model's files; else a launch need not say where they are."""
        return True

    def listens_on_socket(self, launch: Launch) -> bool:
        """Whether this launch's replicas listen on a Unix socket."""
        return self.unix_socket

    def safer(self, launch: Launch, said: Sequence[str]) -> tuple[Launch, str] | None:
        """The launch with options that need less memory, and what has changed; None if there are none to change.

        What the launch itself says is left as it is.

        Args:
            said: the last lines of the engine that had too little.
        """
        return None

    def served_name(self, launch: Launch) -> str:
        """By what name the model is known to the server, if that cannot be the uid."""
        return launch.uid

    def needs(self, launch: Launch) -> Needs:
        """What one replica asks of the machine: what the launch says, else where its options have it compute."""
        if launch.gpu_idx is None and launch.n_gpu is None:
            device = str(getattr(self.read_options(launch.options), "device", ""))
            if device == "cpu":
                return Needs(n_gpu=0, overhead_bytes=self.overhead_bytes)
            if number := NUMBERED.fullmatch(device):
                return Needs(gpu_idx=(int(number[1]),), overhead_bytes=self.overhead_bytes)
        return Needs(gpu_idx=launch.gpu_idx, n_gpu=launch.n_gpu, overhead_bytes=self.overhead_bytes)

    def defaults(self, launch: Launch) -> Mapping[str, Any]:
        """What requests get that do not say it themselves; lists are added to a request's own."""
        return {}

    def with_adapter(self, launch: Launch, lora_name: str) -> Mapping[str, Any]:
        """What the body of a request gets that asks for a LoRA adapter by its name.

        Raises:
            ValueError: the model has no such adapter; the text says which it has.
        """
        adapters = getattr(self.read_options(launch.options), "lora_list", ())
        names = [adapter.lora_name for adapter in adapters]
        if lora_name not in names:
            hint = f"It has {', '.join(names)}." if names else "It was launched without any."
            raise ValueError(f"{launch.uid!r} has no LoRA adapter {lora_name!r}. {hint}")
        return self.choose_adapter(names, lora_name)

    def choose_adapter(self, names: Sequence[str], lora_name: str) -> Mapping[str, Any]:
        """The fields by which the engine is told to use the adapter of that name, one of the launch's names."""
        return {"lora_name": lora_name}


def with_safer_options(launch: Launch, safer: Mapping[str, tuple[Any, str]]) -> tuple[Launch, str] | None:
    """The launch with those of the options that it does not say itself, and a sentence's part that tells them.

    Args:
        safer: name -> the value, and how to tell it.
    """
    new = {name: one for name, one in safer.items() if launch.options.get(name) is None}
    if not new:
        return None
    options = launch.options | {name: value for name, (value, _) in new.items()}
    return msgspec.structs.replace(launch, options=options), ", ".join(text for _, text in new.values())


def worker_command(
    name: str,
    python: str,
    launch: Launch,
    model_path: Path,
    placement: Placement,
    endpoint: Endpoint,
    options: Mapping[str, Any],
) -> Command:
    """How a worker of ours is run: see `engines/workers/server.py`. Its options and key travel in the environment."""
    if placement.gpu_uuids and NUMBERED.fullmatch(str(options.get("device"))):
        options = {**options, "device": "cuda"}  # the only one that it sees
    ours = {"WORKER_API_KEY": endpoint.api_key, "WORKER_OPTIONS": msgspec.json.encode(options).decode()}
    env = {
        "HF_HUB_OFFLINE": "1",  # the files are here; a worker has no business with a hub
        "TOKENIZERS_PARALLELISM": "false",
    }
    return Command(
        argv=(
            *worker_argv(name, python),
            *("--model", str(model_path), "--uid", launch.uid),
            *("--host", endpoint.socket or endpoint.host, "--port", str(endpoint.port)),
        ),
        env=env | visible_gpus(placement) | launch.envs | ours,  # whoever launches may not change what was checked
    )


def family_ends(launch: Launch) -> dict[str, list[Any]]:
    """The texts and the tokens that end an answer of the launch's family, by the names that requests have for them."""
    ends = {name: getattr(launch.artifact.family, name, None) for name in ("stop", "stop_token_ids")}
    return {name: list(value) for name, value in ends.items() if value}


def visible_gpus(placement: Placement) -> dict[str, str]:
    """The variable by which CUDA's libraries see the GPUs of the placement and no others."""
    if placement.gpu_uuids is None:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(placement.gpu_uuids)}


def forced_flags(launch: Launch) -> list[str]:
    """The options that we do not know as flags: `--key value`, or `--key` alone for true; false and null are left out.

    A list repeats the flag, an object is written as JSON.
    """
    flags: list[str] = []
    for key, given in launch.forced_options.items():
        flag = f"--{key.replace('_', '-')}"
        for value in given if isinstance(given, list | tuple) else (given,):
            if value is None or value is False:
                continue
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            flags += [flag] if value is True else [flag, text]
    return flags
