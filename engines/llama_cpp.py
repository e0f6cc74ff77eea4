"""llama.cpp: GGUF models, by a `llama-server` binary or by our worker over the xllamacpp package.

Both take the same flags, so there is one mapping of options here and one of flags in the worker.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from mmap import ACCESS_READ, mmap
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
    forced_flags,
    visible_gpus,
    with_safer_options,
)
from engines.environments import find_binary, has_package, worker_argv
from engines.packages import package_folder
from engines.vllm import has_gpu
from registry.decode import DecodeError
from registry.memory import CACHE_BITS, Cache
from registry.resolve import Artifact
from registry.schema import EmbeddingFamily, RerankFamily

GPU_LIBRARIES = (b"libcuda.so", b"libvulkan.so", b"libamdhip64.so")
CONTEXT_LENGTH = 4096  # of one request, where the launch does not say; the engine caps it at the model's own
LEAST_CONTEXT_LENGTH = 2048  # that a launch is cut down to where the memory does not suffice
ALL_LAYERS = 999  # less than 0, or nothing, means all to one build, none to another, and "see what fits" to a third
CACHE_RAM_MIB = 1024  # the engine's own default of 8 GiB is a surprise on a small machine

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
REASONING_FORMATS = {None: None, True: "deepseek", False: "none"}
Positive = Annotated[int, Meta(ge=1)]


class LlamaCppOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to llama.cpp; names are those of its own parameters."""

    context_length: Annotated[int, Meta(ge=1, description="tokens of one request, prompt and answer")] | None = None
    n_ctx: Annotated[int, Meta(ge=1, description="tokens of all slots together")] | None = None
    n_parallel: Annotated[int, Meta(ge=1, description="slots: requests answered at once")] = 4
    n_threads: Positive | None = None
    n_threads_batch: Positive | None = None
    n_batch: Positive | None = None
    n_ubatch: Positive | None = None
    n_gpu_layers: (
        Annotated[int, Meta(ge=-1, description="the rest is on the CPU; -1 or auto: as many as fit; else all")]
        | Literal["auto"]
        | None
    ) = None
    flash_attn: Literal["auto", "on", "off"] | None = None
    cache_type_k: CacheType | None = None
    cache_type_v: CacheType | None = None
    cache_ram_mib: Annotated[int, Meta(ge=-1, description="RAM for prompt caches; -1: no limit")] = CACHE_RAM_MIB
    chat_template: str | None = None
    enable_thinking: Annotated[bool, Meta(description="whether the model thinks, unless a request says")] | None = None
    reasoning_content: Annotated[bool, Meta(description="split thinking off the answer")] | None = None
    reasoning_format: Literal["auto", "none", "deepseek", "deepseek-legacy"] | None = None
    embedding: bool | None = None
    pooling: Literal["none", "mean", "cls", "last", "rank"] | None = None
    warmup: bool = True
    lora_list: tuple[Adapter, ...] = ()
    model_draft: Annotated[str, Meta(description="GGUF file of a small model that guesses ahead")] | None = None
    draft_n_max: Annotated[int, Meta(ge=0, description="tokens guessed ahead at most")] | None = None
    draft_n_min: Annotated[int, Meta(ge=0)] | None = None
    draft_p_min: Annotated[float, Meta(ge=0, le=1)] | None = None
    draft_n_gpu_layers: Annotated[int, Meta(ge=-1)] | None = None
    sleep_idle_seconds: Annotated[int, Meta(ge=1, description="give the memory back after so long idle")] | None = None
    slots: Annotated[bool, Meta(description="tell of the slots at the engine's /slots")] = True
    slot_save_path: Annotated[str, Meta(description="folder for saved slots")] | None = None
    slot_prompt_similarity: Annotated[float, Meta(ge=0, le=1)] | None = None
    n_threads_http: Positive | None = None
    n_predict: Annotated[int, Meta(ge=-1, description="tokens of an answer at most")] | None = None
    n_keep: Annotated[int, Meta(ge=-1)] | None = None
    n_cache_reuse: Annotated[int, Meta(ge=0)] | None = None
    ctx_shift: bool | None = None
    swa_full: bool | None = None
    kv_unified: bool | None = None
    no_kv_offload: bool | None = None
    mmproj_use_gpu: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    check_tensors: bool | None = None
    main_gpu: Annotated[int, Meta(ge=0)] | None = None
    split_mode: Literal["none", "layer", "row", "tensor"] | None = None
    tensor_split: Annotated[tuple[float, ...], Meta(description="shares of the GPUs")] | None = None
    numa: Literal["distribute", "isolate", "numactl"] | None = None
    rope_scaling_type: Literal["none", "linear", "yarn"] | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    yarn_orig_ctx: Annotated[int, Meta(ge=0)] | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None


# Options whose value is their flag's, and options that are two flags, one for each answer; None: nothing to say.
VALUE_FLAGS = {
    "model_draft": "--model-draft",
    "draft_n_max": "--draft-max",
    "draft_n_min": "--draft-min",
    "draft_p_min": "--draft-p-min",
    "draft_n_gpu_layers": "--n-gpu-layers-draft",
    "sleep_idle_seconds": "--sleep-idle-seconds",
    "slot_save_path": "--slot-save-path",
    "slot_prompt_similarity": "--slot-prompt-similarity",
    "n_threads_http": "--threads-http",
    "n_predict": "--n-predict",
    "n_keep": "--keep",
    "n_cache_reuse": "--cache-reuse",
    "main_gpu": "--main-gpu",
    "split_mode": "--split-mode",
    "numa": "--numa",
    "rope_scaling_type": "--rope-scaling",
    "rope_freq_base": "--rope-freq-base",
    "rope_freq_scale": "--rope-freq-scale",
    "yarn_orig_ctx": "--yarn-orig-ctx",
    "yarn_ext_factor": "--yarn-ext-factor",
    "yarn_attn_factor": "--yarn-attn-factor",
    "yarn_beta_fast": "--yarn-beta-fast",
    "yarn_beta_slow": "--yarn-beta-slow",
}
ANSWER_FLAGS: dict[str, tuple[str | None, str | None]] = {
    "slots": (None, "--no-slots"),
    "ctx_shift": ("--context-shift", "--no-context-shift"),
    "swa_full": ("--swa-full", None),
    "kv_unified": ("--kv-unified", "--no-kv-unified"),
    "no_kv_offload": ("--no-kv-offload", None),
    "mmproj_use_gpu": (None, "--no-mmproj-offload"),
    "use_mmap": (None, "--no-mmap"),
    "use_mlock": ("--mlock", None),
    "check_tensors": ("--check-tensors", None),
}


class LlamaCpp(Engine, frozen=True, kw_only=True):
    """GGUF files, which answer, embed and rank."""

    name = "llama.cpp"
    model_types = ("LLM", "embedding", "rerank")
    keeps_prefixes = True
    takes_chunks = True
    takes_flags = True
    options = LlamaCppOptions
    context_from = ("/props", ("default_generation_settings", "n_ctx"))
    less_memory = "Lower context_length, n_parallel or n_gpu_layers, or say cache_type_k: q8_0 and cache_type_v: q8_0."
    refusals = {
        f"{what} input is not supported": (
            f"takes no {what}: it was launched without a projector that can. Launch it with `multimodal_projector`, "
            "the name of such a file (mmproj) beside the model's own."
        )
        for what in ("image", "audio", "video")
    }

    def listens_on_socket(self, launch: Launch) -> bool:
        """All but llama-cpp-python's server can."""
        return self._python_server() is None

    def _python_server(self) -> str | None:
        """The Python whose llama-cpp-python serves, where that is all there is."""
        if self.settings.binary or find_binary("llama-server", None) or has_package("xllamacpp"):
            return None
        python = self.settings.python or sys.executable
        return python if package_folder(python, "llama_cpp") else None

    def _is_for_cpu(self) -> bool:
        """Whether there are GPUs that it is known to be unable to use."""
        if not has_gpu() or self.settings.binary or find_binary("llama-server", None):
            return False
        folder = package_folder(sys.executable, "xllamacpp")
        return folder is not None and not any(_links(file, GPU_LIBRARIES) for file in sorted(folder.glob("*.so")))

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.settings.binary:
            if find_binary("llama-server", self.settings.binary):
                return None
            return f"`engines.llama.cpp.binary` names {self.settings.binary!r}, which is not an executable file"
        if find_binary("llama-server", None) or has_package("xllamacpp") or self._python_server():
            return None
        return "there is no `llama-server` on PATH and no xllamacpp package: pip install xllamacpp"

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads GGUF files and nothing else."""
        if artifact.spec.model_format != "ggufv2":
            return f"llama.cpp loads GGUF files (model_format ggufv2), not {artifact.spec.model_format}"
        return None

    def defaults(self, launch: Launch) -> Mapping[str, Any]:
        """The texts that end an answer of the family; its files know their own end tokens.

        Requests that name no adapter say so: else llama.cpp goes on from what it has kept of a prompt that it read
        with one.
        """
        stop = getattr(launch.artifact.family, "stop", None)
        found: dict[str, Any] = {"stop": list(stop)} if stop else {}
        adapters = launch.options.get("lora_list") and self.read_options(launch.options).lora_list
        names = [adapter.lora_name for adapter in adapters or ()]
        return found | ({"lora": _scales(names)} if names else {})

    def choose_adapter(self, names: Sequence[str], lora_name: str) -> Mapping[str, Any]:
        """By its number, and none of the others."""
        return {"lora": _scales(names, lora_name)}

    def own_sleep(self, launch: Launch) -> tuple[float, Call] | None:
        """As the launch says. It gives back all of the model's memory, and keeps the room that it was promised."""
        after_s = self.read_options(launch.options).sleep_idle_seconds
        return (after_s, Call(method="GET", path="/props", limit_s=5.0)) if after_s else None

    def needs(self, launch: Launch) -> Needs:
        """What the launch says, else one GPU or several, by layers; no GPU where none of its layers may go there."""
        options: LlamaCppOptions = self.read_options(launch.options)
        n_gpu = launch.n_gpu
        if launch.gpu_idx is None and n_gpu is None:
            if options.n_gpu_layers == 0 or self._is_for_cpu():
                n_gpu = 0
            elif options.tensor_split:
                n_gpu = len(options.tensor_split)
        return Needs(
            gpu_idx=launch.gpu_idx,
            n_gpu=n_gpu,
            can_spread=options.split_mode != "none",
            cache=_cache(options, launch),
            can_split=True,
            may_split=options.n_gpu_layers in (-1, "auto")
            or (options.n_gpu_layers is None and launch.cpu_fallback and launch.gpu_idx is None),
            gpu_layers=options.n_gpu_layers
            if isinstance(options.n_gpu_layers, int) and options.n_gpu_layers > 0
            else None,
        )

    def safer(self, launch: Launch, said: Sequence[str]) -> tuple[Launch, str] | None:
        """One slot, and half of the context; an input that is read whole needs all of it."""
        options: LlamaCppOptions = self.read_options(launch.options)
        safer: dict[str, tuple[Any, str]] = {}
        length = _per_request(options, launch)
        if options.n_ctx is None and options.n_parallel > 1:
            safer["n_parallel"] = (1, f"1 slot instead of {options.n_parallel}")
        if options.n_ctx is None and length > LEAST_CONTEXT_LENGTH and not _reads_whole(launch):
            less = max(LEAST_CONTEXT_LENGTH, length // 2)
            safer["context_length"] = (less, f"context {less} instead of {length}")
        if options.cache_ram_mib:
            safer["cache_ram_mib"] = (0, "no cache of prompts")
        return with_safer_options(launch, safer)

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The flags of llama-server; the key travels in the environment, where `ps` does not show it."""
        options: LlamaCppOptions = self.read_options(launch.options)
        if placement.gpu_uuids == ():
            launch = msgspec.structs.replace(launch, n_gpu=0)
        if placement.gpu_layers is not None:
            options = msgspec.structs.replace(options, n_gpu_layers=placement.gpu_layers)
        elif options.n_gpu_layers in (-1, "auto") or (options.n_gpu_layers is None and placement.gpu_uuids):
            options = msgspec.structs.replace(options, n_gpu_layers=ALL_LAYERS)
        if options.draft_n_gpu_layers == -1:
            options = msgspec.structs.replace(options, draft_n_gpu_layers=ALL_LAYERS)
        if python_server := self._python_server():
            return _of_python_server(python_server, options, launch, model_path, placement, endpoint)
        binary = self.settings.binary or find_binary("llama-server", None)
        program = (binary,) if binary else worker_argv("llama_cpp")
        listen = ("--host", endpoint.socket or endpoint.host, "--port", str(endpoint.port))
        projector: tuple[str, ...] = ()
        if launch.artifact.projector:
            projector = ("--mmproj", str(model_path.parent / Path(launch.artifact.projector).name))
        env = {"LLAMA_API_KEY": endpoint.api_key} | visible_gpus(placement)
        return Command(
            argv=(
                *program,
                "--model",
                str(model_path),
                "--alias",
                launch.uid,
                *listen,
                *projector,
                *_flags(options, launch),
                *forced_flags(launch),
            ),
            env=env | launch.envs,
        )


@cache
def _links(file: Path, libraries: tuple[bytes, ...]) -> bool:
    """Whether a program names any of the libraries."""
    with open(file, "rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
        return any(content.find(library) >= 0 for library in libraries)


def _scales(names: Sequence[str], lora_name: str | None = None) -> list[dict[str, float]]:
    """How much each adapter counts: one of them, or none."""
    return [{"id": number, "scale": float(name == lora_name)} for number, name in enumerate(names)]


PYTHON_SERVER = "llama_cpp.server"
# What llama-cpp-python's server calls our options; of the rest it has none.
IN_PYTHON_SERVER = {
    **{name: name for name in ("n_threads", "n_threads_batch", "n_batch", "n_gpu_layers", "main_gpu", "embedding")},
    **{name: name for name in ("rope_freq_base", "rope_freq_scale", "yarn_orig_ctx", "yarn_ext_factor")},
    **{name: name for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "use_mmap", "use_mlock")},
}
# What asks for nothing there: it answers one request at a time, and always has its own templates.
NOT_IN_PYTHON_SERVER = frozenset({"context_length", "n_ctx", "n_parallel", "cache_ram_mib", "warmup", "slots"})


def _of_python_server(
    python: str,
    options: LlamaCppOptions,
    launch: Launch,
    model_path: Path,
    placement: Placement,
    endpoint: Endpoint,
) -> Command:
    """llama-cpp-python's server: one request at a time, and fewer options."""
    nothing = LlamaCppOptions()
    changed = [name for name in LlamaCppOptions.__struct_fields__ if getattr(options, name) != getattr(nothing, name)]
    for name in changed:
        if name not in IN_PYTHON_SERVER and name not in NOT_IN_PYTHON_SERVER:
            raise DecodeError(
                f"llama-cpp-python's server has no {name!r} - at `options`. Leave it out, or install xllamacpp or a "
                "`llama-server`."
            )
    flags: dict[str, Any] = {
        IN_PYTHON_SERVER[name]: getattr(options, name) for name in changed if name in IN_PYTHON_SERVER
    }
    flags.setdefault("n_threads", max(1, (os.cpu_count() or 2) - 1))
    if launch.n_gpu == 0:
        flags["n_gpu_layers"] = 0
    if "embed" in launch.artifact.family.abilities:
        flags.setdefault("embedding", True)
    context = options.n_ctx or options.context_length or CONTEXT_LENGTH
    return Command(
        argv=(
            *(python, "-P", "-m", PYTHON_SERVER, "--model", str(model_path), "--model_alias", launch.uid),
            *("--host", endpoint.host, "--port", str(endpoint.port), "--n_ctx", str(context)),
            *("--interrupt_requests", "false"),  # else a request ends the one before it
            *(word for name, value in flags.items() for word in (f"--{name}", str(value).lower())),
        ),
        env={"API_KEY": endpoint.api_key} | visible_gpus(placement) | launch.envs,
        ready_path="/v1/models",
    )


def _cache(options: LlamaCppOptions, launch: Launch) -> Cache:
    """The slots share the context evenly."""
    return Cache(
        tokens=max(1, _context(options, launch) // options.n_parallel),
        sequences=options.n_parallel,
        key_bits=CACHE_BITS[options.cache_type_k or "f16"],
        value_bits=CACHE_BITS[options.cache_type_v or "f16"],
    )


def _context(options: LlamaCppOptions, launch: Launch) -> int:
    """Tokens of all slots together."""
    return options.n_ctx or _per_request(options, launch) * options.n_parallel


def _per_request(options: LlamaCppOptions, launch: Launch) -> int:
    own = getattr(launch.artifact.family, "max_tokens", None) if _reads_whole(launch) else None
    return options.context_length or min(own or CONTEXT_LENGTH, CONTEXT_LENGTH)


def _reads_whole(launch: Launch) -> bool:
    """Whether an input goes into one batch, or not at all."""
    return isinstance(launch.artifact.family, EmbeddingFamily | RerankFamily)


def _template_kwargs(options: LlamaCppOptions) -> str | None:
    return None if options.enable_thinking is None else json.dumps({"enable_thinking": options.enable_thinking})


def _flags(options: LlamaCppOptions, launch: Launch) -> list[str]:
    family, reads_whole = launch.artifact.family, _reads_whole(launch)
    n_batch = options.n_batch or (_per_request(options, launch) if reads_whole else None)
    can_rank = "rerank" in family.abilities
    can_embed = can_rank or "embed" in family.abilities
    threads = options.n_threads or max(1, (os.cpu_count() or 2) - 1)
    values: dict[str, object] = {
        "--ctx-size": _context(options, launch),
        "--parallel": options.n_parallel,
        "--threads": threads,
        "--threads-batch": options.n_threads_batch or threads,
        "--batch-size": n_batch,
        "--ubatch-size": options.n_ubatch or (n_batch if reads_whole else None),
        "--n-gpu-layers": 0 if launch.n_gpu == 0 else options.n_gpu_layers,
        "--flash-attn": options.flash_attn,
        "--cache-type-k": options.cache_type_k,
        "--cache-type-v": options.cache_type_v,
        "--cache-ram": options.cache_ram_mib,
        "--chat-template": options.chat_template or getattr(launch.artifact.family, "chat_template", None),
        "--chat-template-kwargs": _template_kwargs(options),
        "--reasoning-format": options.reasoning_format or REASONING_FORMATS[options.reasoning_content],
        "--pooling": options.pooling or ("rank" if can_rank else None),
    }
    switches = {
        "--metrics": True,
        "--jinja": True,
        "--embedding": can_embed if options.embedding is None else options.embedding,
        "--no-warmup": not options.warmup,
    }
    values |= {flag: getattr(options, name) for name, flag in VALUE_FLAGS.items()}
    values["--tensor-split"] = None if options.tensor_split is None else ",".join(map(str, options.tensor_split))
    flags = [text for flag, value in values.items() if value is not None for text in (flag, str(value))]
    flags += [flag for flag, is_on in switches.items() if is_on]
    for name, (yes, no) in ANSWER_FLAGS.items():
        answer = getattr(options, name)
        flag = None if answer is None else yes if answer else no
        flags += [flag] if flag else []
    for adapter in options.lora_list:
        flags += ["--lora", adapter.local_path]
    return [*flags, "--lora-init-without-apply"] if options.lora_list else flags
