"""SGLang: language and embedding models on GPUs, by its own server module under the Python that has it.

Which flags a version takes is read off its source. It listens on a loopback port, since it knows no Unix sockets; its
key travels in a file, since it reads none from the environment.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engines.base import (
    Adapter,
    Command,
    Endpoint,
    Engine,
    Launch,
    Needs,
    Placement,
    family_ends,
    forced_flags,
    visible_gpus,
)
from engines.environments import find_python, why_no_python
from engines.packages import annotated_fields, package_folder
from engines.parsers import reasoning_parser, tool_parser
from engines.vllm import Flag, flag_words, has_gpu, known_parser, template_file, with_extra_args
from registry.decode import DecodeError
from registry.resolve import Artifact
from registry.schema import ModelFamily

MODULE = "sglang.launch_server"
USUAL_SHARE = 0.88  # of a GPU's memory that it takes by itself
TENSOR_PARALLEL = (2, 4, 8, 16)
FORMATS = ("pytorch", "gptq", "awq", "fp8", "fp4", "bnb")
ARGUMENT_FILES = ("srt/arg_groups/fields/*.py", "srt/server_args.py")
TOOL_PARSERS = "srt/function_call/function_call_parser.py"
REASONING_PARSERS = "srt/parser/reasoning_parser.py"
OURS = frozenset(
    {"model_path", "served_model_name", "host", "port", "api_key", "admin_api_key", "lora_paths", "config"}
)
# Names of vLLM's that SGLang has others for.
ALSO = {
    "max_model_len": "context_length",
    "tensor_parallel_size": "tp_size",
    "pipeline_parallel_size": "pp_size",
    "data_parallel_size": "dp_size",
    "max_num_seqs": "max_running_requests",
    "gpu_memory_utilization": "mem_fraction_static",
}
Positive = Annotated[int, Meta(ge=1)]


class SglangOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to SGLang, by its own names. Any other flag that the installed version takes goes too."""

    context_length: Annotated[int, Meta(ge=1, description="tokens of one request, prompt and answer")] | None = None
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    tp_size: Annotated[int, Meta(ge=1, description="GPUs of one copy; else all that it got")] | None = None
    pp_size: Positive | None = None
    dp_size: Positive | None = None
    ep_size: Positive | None = None
    mem_fraction_static: (
        Annotated[float, Meta(gt=0, lt=1, description="share of memory for weights and cache")] | None
    ) = None
    max_running_requests: Positive | None = None
    max_total_tokens: Positive | None = None
    chunked_prefill_size: int | None = None
    schedule_policy: str | None = None
    attention_backend: str | None = None
    sampling_backend: str | None = None
    grammar_backend: str | None = None
    disable_radix_cache: bool | None = None
    disable_cuda_graph: bool | None = None
    enable_torch_compile: bool | None = None
    enable_memory_saver: Annotated[bool, Meta(description="so that it can give its memory back")] | None = None
    enable_metrics: bool = True
    cpu_offload_gb: Annotated[int, Meta(ge=0)] | None = None
    load_format: str | None = None
    tokenizer_path: str | None = None
    trust_remote_code: bool | None = None
    random_seed: int | None = None
    json_model_override_args: dict[str, Any] | None = None
    speculative_algorithm: str | None = None
    speculative_draft_model_path: str | None = None
    speculative_num_steps: Positive | None = None
    speculative_eagle_topk: Positive | None = None
    speculative_num_draft_tokens: Positive | None = None
    enable_multimodal: bool | None = None
    limit_mm_data_per_request: dict[str, int] | None = None
    chat_template: Annotated[str, Meta(description="a Jinja template, or the path or name of one")] | None = None
    enable_thinking: Annotated[bool, Meta(description="whether the model thinks, unless a request says")] | None = None
    reasoning_content: Annotated[bool, Meta(description="split thinking off the answer")] | None = None
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    lora_list: tuple[Adapter, ...] = ()
    max_lora_rank: Positive | None = None
    max_loras_per_batch: Positive | None = None
    device: str | None = None
    extra_args: Annotated[dict[str, Flag], Meta(description="further flags of SGLang")] = {}


# Options that are told to SGLang otherwise than by a flag of their name.
NOT_FLAGS = frozenset(
    {
        *("chat_template", "enable_thinking", "reasoning_content", "reasoning_parser", "tool_call_parser"),
        *("lora_list", "extra_args"),
    }
)


class Sglang(Engine, frozen=True, kw_only=True):
    """Answers and embeds, on GPUs."""

    name = "SGLang"
    model_types = ("LLM", "embedding")
    keeps_prefixes = True
    asks_for_usage = True
    takes_chunks = True
    takes_flags = True
    options = SglangOptions
    context_from = ("/v1/models", ("data", 0, "max_model_len"))
    less_memory = "Change mem_fraction_static, or lower context_length or max_running_requests."
    unix_socket = False

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        if not sys.platform.startswith("linux"):
            return "SGLang runs on Linux only"
        if self._folder() is None:
            return why_no_python("sglang", self.settings)
        return None if has_gpu() else "SGLang needs a GPU, and there is none here"

    def accepts(self, artifact: Artifact) -> str | None:
        """PyTorch's formats."""
        if artifact.spec.model_format not in FORMATS:
            return f"SGLang loads {', '.join(FORMATS)}, not {artifact.spec.model_format}"
        return None

    def read_options(self, options: Mapping[str, Any]) -> SglangOptions:
        """The options by name; what is none of ours but a flag of the installed version is added to `extra_args`.

        Raises:
            DecodeError: naming the option that is wrong, or that this SGLang does not take.
        """
        given = {name.lstrip("-").replace("-", "_"): value for name, value in options.items()}
        given = {ALSO.get(name, name): value for name, value in given.items()}
        known = self._flags()
        own = with_extra_args(given, SglangOptions, known, OURS)
        read: SglangOptions = super().read_options(own)
        for name in SglangOptions.__struct_fields__:
            if known and name not in NOT_FLAGS and name in own and name not in known:
                raise DecodeError(f"The installed version of SGLang has no {name!r} - at `options`. Leave it out.")
        return read

    def defaults(self, launch: Launch) -> Mapping[str, Any]:
        """The texts and tokens that end an answer of the family, and whether it is to think."""
        found: dict[str, Any] = dict(family_ends(launch))
        if launch.options.get("enable_thinking") is not None:
            thinking = self.read_options(launch.options).enable_thinking
            found["chat_template_kwargs"] = {"enable_thinking": thinking, "thinking": thinking}
        return found

    def choose_adapter(self, names: Sequence[str], lora_name: str) -> Mapping[str, Any]:
        """By SGLang's word for it."""
        return {"lora_path": lora_name}

    def needs(self, launch: Launch) -> Needs:
        """A share of each GPU: it takes what it finds free, unless the launch says how much."""
        options = self.read_options(launch.options)
        n_gpu = launch.n_gpu
        sizes = (options.tp_size, options.pp_size, options.dp_size)
        if launch.gpu_idx is None and n_gpu is None and any(sizes):
            n_gpu = math.prod(size or 1 for size in sizes)
        return Needs(
            gpu_idx=launch.gpu_idx,
            n_gpu=n_gpu,
            gpu_share=options.mem_fraction_static or USUAL_SHARE,
            can_spread=True,
            gpu_counts=TENSOR_PARALLEL,
            is_elastic=True,
        )

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The server's module. The key travels in a file of settings, where `ps` does not show it."""
        program = python or self._python() or sys.executable
        folder = package_folder(program, "sglang")
        options = self.read_options(launch.options)
        template = template_file(options.chat_template or getattr(launch.artifact.family, "chat_template", None))
        settings = f"sglang-{endpoint.port}.yaml"
        files = {settings: json.dumps({"api-key": endpoint.api_key})}
        flags = {
            **_of_options(options, placement),
            **_of_family(options, launch.artifact.family, folder),
            **options.extra_args,
        }
        if template:
            flags["chat_template"] = template[0]
            files |= {template[0]: template[1]} if template[1] else {}
        if launch.artifact.family.model_type == "embedding":
            flags["is_embedding"] = True
        return Command(
            argv=(
                *(program, "-P", "-m", MODULE, "--config", settings),
                *("--model-path", str(model_path), "--served-model-name", launch.uid),
                *("--host", endpoint.host, "--port", str(endpoint.port)),
                *(word for name, value in flags.items() for word in flag_words(name, value)),
                *forced_flags(launch),
            ),
            env={"HF_HUB_OFFLINE": "1"} | visible_gpus(placement) | launch.envs,
            files=files,
        )

    def _python(self) -> str | None:
        return find_python("sglang", ("sglang",), self.settings, self.environments)

    def _folder(self) -> Path | None:
        python = self._python()
        return package_folder(python, "sglang") if python else None

    def _flags(self) -> Mapping[str, str]:
        """The flags of the installed version, by their names in its code -> their types; none where it is not here."""
        folder = self._folder()
        return annotated_fields(folder, ARGUMENT_FILES) if folder else {}


def _of_options(options: SglangOptions, placement: Placement) -> dict[str, Flag]:
    values = {name: getattr(options, name) for name in SglangOptions.__struct_fields__ if name not in NOT_FLAGS}
    flags: dict[str, Flag] = {name: value for name, value in values.items() if value not in (None, False)}
    n_gpu = len(placement.gpu_uuids or ())
    if not options.tp_size and n_gpu > 1:
        flags["tp_size"] = max(1, n_gpu // (options.pp_size or 1) // (options.dp_size or 1))
    if options.lora_list:
        flags["lora_paths"] = [f"{one.lora_name}={one.local_path}" for one in options.lora_list]
    return flags


def _of_family(options: SglangOptions, family: ModelFamily, folder: Path | None) -> dict[str, Flag]:
    flags: dict[str, Flag] = {}
    if tools := options.tool_call_parser or known_parser(tool_parser(family, "sglang"), folder, TOOL_PARSERS):
        flags["tool_call_parser"] = tools
    thinking = options.reasoning_parser or known_parser(reasoning_parser(family, "sglang"), folder, REASONING_PARSERS)
    if thinking and (options.reasoning_parser or options.reasoning_content is not False):
        flags["reasoning_parser"] = thinking
    return flags
