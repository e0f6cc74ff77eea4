"""llama.cpp: GGUF models, by a `llama-server` binary or by our worker over the xllamacpp package.

Both take the same flags, so there is one mapping of options here and one of flags in the worker.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engines.base import Command, Endpoint, Engine, Launch, Needs, Placement, forced_flags, visible_gpus
from engines.environments import find_binary, has_package, worker_argv
from registry.decode import decode
from registry.memory import CACHE_BITS, Cache
from registry.resolve import Artifact

CONTEXT_LENGTH = 4096  # of one request, where the launch does not say; the engine caps it at the model's own
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
    n_gpu_layers: Annotated[int, Meta(ge=-1, description="-1: as many as fit")] | None = None
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


class LlamaCpp(Engine, frozen=True, kw_only=True):
    """GGUF files, which answer and embed."""

    name = "llama.cpp"
    model_types = ("LLM", "embedding")
    takes_flags = True
    options = LlamaCppOptions

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.settings.binary:
            if find_binary("llama-server", self.settings.binary):
                return None
            return f"`engines.llama.cpp.binary` names {self.settings.binary!r}, which is not an executable file"
        if find_binary("llama-server", None) or has_package("xllamacpp"):
            return None
        return "there is no `llama-server` on PATH and no xllamacpp package: pip install xllamacpp"

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads GGUF files and nothing else."""
        if artifact.spec.model_format != "ggufv2":
            return f"llama.cpp loads GGUF files (model_format ggufv2), not {artifact.spec.model_format}"
        return None

    def defaults(self, launch: Launch) -> Mapping[str, Any]:
        """The texts that end an answer of the family; its files know their own end tokens."""
        stop = getattr(launch.artifact.family, "stop", None)
        return {"stop": list(stop)} if stop else {}

    def needs(self, launch: Launch) -> Needs:
        """What the launch says; it takes what GPUs it sees otherwise."""
        return Needs(gpu_idx=launch.gpu_idx, n_gpu=launch.n_gpu, cache=_cache(launch))

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The flags of llama-server; the key travels in the environment, where `ps` does not show it."""
        binary = self.settings.binary or find_binary("llama-server", None)
        program = (binary,) if binary else worker_argv("llama_cpp")
        listen = ("--host", endpoint.socket or endpoint.host, "--port", str(endpoint.port))
        options = decode(launch.options, LlamaCppOptions, "options", strict=False)
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


def _cache(launch: Launch) -> Cache:
    """The slots share the context evenly."""
    options = decode(launch.options, LlamaCppOptions, "options", strict=False)
    return Cache(
        tokens=max(1, _context(options) // options.n_parallel),
        sequences=options.n_parallel,
        key_bits=CACHE_BITS[options.cache_type_k or "f16"],
        value_bits=CACHE_BITS[options.cache_type_v or "f16"],
    )


def _context(options: LlamaCppOptions) -> int:
    """Tokens of all slots together."""
    return options.n_ctx or (options.context_length or CONTEXT_LENGTH) * options.n_parallel


def _template_kwargs(options: LlamaCppOptions) -> str | None:
    return None if options.enable_thinking is None else json.dumps({"enable_thinking": options.enable_thinking})


def _flags(options: LlamaCppOptions, launch: Launch) -> list[str]:
    can_embed = "embed" in launch.artifact.family.abilities
    threads = options.n_threads or max(1, (os.cpu_count() or 2) - 1)
    values: dict[str, object] = {
        "--ctx-size": _context(options),
        "--parallel": options.n_parallel,
        "--threads": threads,
        "--threads-batch": options.n_threads_batch or threads,
        "--batch-size": options.n_batch,
        "--ubatch-size": options.n_ubatch,
        "--n-gpu-layers": 0 if launch.n_gpu == 0 else options.n_gpu_layers,
        "--flash-attn": options.flash_attn,
        "--cache-type-k": options.cache_type_k,
        "--cache-type-v": options.cache_type_v,
        "--cache-ram": options.cache_ram_mib,
        "--chat-template": options.chat_template or getattr(launch.artifact.family, "chat_template", None),
        "--chat-template-kwargs": _template_kwargs(options),
        "--reasoning-format": options.reasoning_format or REASONING_FORMATS[options.reasoning_content],
        "--pooling": options.pooling,
    }
    switches = {
        "--metrics": True,
        "--jinja": True,
        "--embedding": can_embed if options.embedding is None else options.embedding,
        "--no-warmup": not options.warmup,
    }
    flags = [text for flag, value in values.items() if value is not None for text in (flag, str(value))]
    return flags + [flag for flag, is_on in switches.items() if is_on]
