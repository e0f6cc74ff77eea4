"""transformers: language models in PyTorch's formats, by a worker of ours over the library.

The library's own server (`transformers serve`) answers one request at a time, wants the model's path as its name and
refuses fields that clients send; its continuous batching does well also on a CPU, and is what the worker uses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engines.base import (
    TORCH_BYTES,
    Adapter,
    Command,
    Endpoint,
    Engine,
    Launch,
    Needs,
    Placement,
    family_ends,
    with_safer_options,
    worker_command,
)
from engines.environments import find_python, why_no_python
from engines.packages import package_folder
from registry.decode import DecodeError
from registry.memory import CACHE_BITS, Cache
from registry.resolve import Artifact
from registry.schema import LLMFamily

FORMATS = ("pytorch", "gptq", "awq", "bnb", "fp4", "fp8")
MODULES = ("torch", "transformers")
CONTEXT_LENGTH = 4096  # where the launch says none; no longer than the model's own
SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")  # values of device_map
Positive = Annotated[int, Meta(ge=1)]


class TransformersOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to the worker."""

    context_length: Annotated[int, Meta(ge=1, description="tokens of one request, prompt and answer")] | None = None
    max_num_seqs: Annotated[int, Meta(ge=1, description="sequences written at once; more wait")] = 8
    max_num_batched_tokens: Annotated[int, Meta(ge=16, description="tokens read in one step")] = 512
    kv_cache_tokens: Annotated[int, Meta(ge=1, description="tokens in the cache; else half of all")] | None = None
    continuous_batching: Annotated[bool, Meta(description="false: one request after the other")] = True
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    quantization_config: Annotated[dict[str, Any], Meta(description="of bitsandbytes")] | None = None
    trust_remote_code: bool | None = None
    n_threads: Positive | None = None
    chat_template: str | None = None
    enable_thinking: Annotated[bool, Meta(description="whether the model thinks, unless a request says")] | None = None
    tool_form: (
        Annotated[
            Literal["tagged", "mistral", "deepseek", "llama3", "pythonic"],
            Meta(description="how the model writes tool calls; else as its chat template tells"),
        ]
        | None
    ) = None
    reasoning_content: Annotated[bool, Meta(description="split thinking off the answer")] | None = None
    lora_list: Annotated[tuple[Adapter, ...], Meta(description="one, merged into the model")] = ()


def _context(options: TransformersOptions) -> int:
    return options.context_length or CONTEXT_LENGTH


def _cache_tokens(options: TransformersOptions) -> int:
    return options.kv_cache_tokens or _context(options) * max(1, options.max_num_seqs // 2)


def _cache(options: TransformersOptions) -> Cache:
    """As the worker has it made."""
    context, tokens = _context(options), _cache_tokens(options)
    bits = CACHE_BITS.get(options.dtype or "auto", 16.0)
    return Cache(
        tokens=min(context, tokens),
        sequences=-(-tokens // min(context, tokens)),
        key_bits=bits,
        value_bits=bits,
        is_even=True,
    )


class Transformers(Engine, frozen=True, kw_only=True):
    """Whatever the library loads as a causal language model; slower than vLLM and SGLang, and at home everywhere."""

    name = "transformers"
    model_types = ("LLM",)
    asks_for_usage = True
    takes_chunks = True
    overhead_bytes = TORCH_BYTES
    options = TransformersOptions
    less_memory = "Lower kv_cache_tokens, max_num_seqs or context_length, or say dtype: bfloat16."

    def safer(self, launch: Launch, said: Sequence[str]) -> tuple[Launch, str] | None:
        """One sequence at a time, so that the cache is for one."""
        return with_safer_options(launch, {"max_num_seqs": (1, "1 request at once")})

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        python = self._python()
        if python is None:
            return why_no_python(self.name, self.settings)
        lacking = [module for module in MODULES if package_folder(python, module) is None]
        return f"{python} has no {' and no '.join(lacking)}" if lacking else None

    def accepts(self, artifact: Artifact) -> str | None:
        """PyTorch's formats."""
        if artifact.spec.model_format not in FORMATS:
            return f"transformers loads {', '.join(FORMATS)}, not {artifact.spec.model_format}"
        return None

    def read_options(self, options: Mapping[str, Any]) -> TransformersOptions:
        """The options; of adapters one, which becomes part of the model."""
        read: TransformersOptions = super().read_options(options)
        if len(read.lora_list) > 1:
            raise DecodeError(
                "The transformers engine merges one LoRA adapter into the model - at `options.lora_list`. Launch the "
                "model once for each, or use vLLM, SGLang or llama.cpp, which choose by request."
            )
        return read

    def defaults(self, launch: Launch) -> Mapping[str, Any]:
        """The texts and tokens that end an answer of the family."""
        return family_ends(launch)

    def needs(self, launch: Launch) -> Needs:
        """One GPU; several where the launch leaves it to the library to spread it. The cache is made at the start."""
        options: TransformersOptions = self.read_options(launch.options)
        asked = msgspec.structs.replace(super().needs(launch), can_spread=options.device_map in SPREADING)
        if not options.continuous_batching:
            return asked
        return msgspec.structs.replace(asked, cache=_cache(options), copies_cache=True)

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The worker, with what the family says of its thinking and its template."""
        options = self.read_options(launch.options)
        family = launch.artifact.family
        given = {name: value for name, value in msgspec.to_builtins(options).items() if value not in (None, (), [])}
        given |= {"context_length": _context(options), "kv_cache_tokens": _cache_tokens(options)}
        given.setdefault("n_threads", max(1, (os.cpu_count() or 2) - 1))
        if launch.n_gpu == 0:
            given.setdefault("device", "cpu")
        if isinstance(family, LLMFamily):
            if family.chat_template:
                given.setdefault("chat_template", family.chat_template)
            if family.reasoning_start_tag and family.reasoning_end_tag and options.reasoning_content is not False:
                given["reasoning_tags"] = [family.reasoning_start_tag, family.reasoning_end_tag]
        if options.enable_thinking is not None:
            given["template_values"] = {"enable_thinking": options.enable_thinking}
        program = python or self._python()
        assert program
        return worker_command("generation", program, launch, model_path, placement, endpoint, given)

    def _python(self) -> str | None:
        return find_python(self.name, MODULES, self.settings, self.environments)
