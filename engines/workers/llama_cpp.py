"""A llama-server look-alike over the xllamacpp package: the same flags, the same HTTP.

Run as `python -P -m engines.workers.llama_cpp --model M.gguf --host X.sock ...`; the key comes from
LLAMA_API_KEY. The wheel has no parser of flags, so the table here maps them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

STOP_LIMIT_S = 5
# flag -> (where: of the parameters, or of those of the draft; name; type)
MORE_VALUES: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "--draft-max": ("draft", "n_max", int),
    "--draft-min": ("draft", "n_min", int),
    "--draft-p-min": ("draft", "p_min", float),
    "--n-gpu-layers-draft": ("draft", "n_gpu_layers", int),
    "--sleep-idle-seconds": ("", "sleep_idle_seconds", int),
    "--slot-save-path": ("", "slot_save_path", lambda path: os.path.join(path, "")),  # it joins names to it as it is
    "--slot-prompt-similarity": ("", "slot_prompt_similarity", float),
    "--threads-http": ("", "n_threads_http", int),
    "--n-predict": ("", "n_predict", int),
    "--keep": ("", "n_keep", int),
    "--cache-reuse": ("", "n_cache_reuse", int),
    "--main-gpu": ("", "main_gpu", int),
    "--rope-freq-base": ("", "rope_freq_base", float),
    "--rope-freq-scale": ("", "rope_freq_scale", float),
    "--yarn-orig-ctx": ("", "yarn_orig_ctx", int),
    "--yarn-ext-factor": ("", "yarn_ext_factor", float),
    "--yarn-attn-factor": ("", "yarn_attn_factor", float),
    "--yarn-beta-fast": ("", "yarn_beta_fast", float),
    "--yarn-beta-slow": ("", "yarn_beta_slow", float),
}
# flag -> (name of the parameter, word -> the library's)
MORE_NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "--split-mode": (
        "split_mode",
        {word: f"llama_split_mode.LLAMA_SPLIT_MODE_{word.upper()}" for word in ("none", "layer", "row", "tensor")},
    ),
    "--numa": (
        "numa",
        {
            word: f"ggml_numa_strategy.GGML_NUMA_STRATEGY_{word.upper()}"
            for word in ("distribute", "isolate", "numactl")
        },
    ),
    "--rope-scaling": (
        "rope_scaling_type",
        {
            word: f"llama_rope_scaling_type.LLAMA_ROPE_SCALING_TYPE_{word.upper()}"
            for word in ("none", "linear", "yarn")
        },
    ),
}
# flag -> (name of the parameter, what it is then; texts are of the library's ways to load)
MORE_SWITCHES: dict[str, tuple[str, bool | str]] = {
    "--no-slots": ("endpoint_slots", False),
    "--context-shift": ("ctx_shift", True),
    "--no-context-shift": ("ctx_shift", False),
    "--swa-full": ("swa_full", True),
    "--kv-unified": ("kv_unified", True),
    "--no-kv-unified": ("kv_unified", False),
    "--no-kv-offload": ("no_kv_offload", True),
    "--no-mmproj-offload": ("mmproj_use_gpu", False),
    "--no-mmap": ("load_mode", "LLAMA_LOAD_MODE_NONE"),
    "--mlock": ("load_mode", "LLAMA_LOAD_MODE_MLOCK"),
    "--check-tensors": ("check_tensors", True),
}


def main() -> None:
    """Serve until SIGTERM or SIGINT. Exit code 1: the model cannot be loaded, the log says why."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    arguments, forced = _parser().parse_known_args()
    if arguments.host.endswith(".sock") and os.path.exists(arguments.host):
        os.unlink(arguments.host)  # the engine refuses to start on a stale one

    import xllamacpp  # here, so that --help and bad values answer without the native library

    try:
        params = _params(xllamacpp, arguments)
        _force(params, forced)
        for path in (arguments.model, arguments.mmproj, arguments.model_draft, *arguments.lora):
            if path and not os.path.exists(path):
                raise RuntimeError(f"there is no file {path}")
        server = xllamacpp.Server(params)
    except ValueError as exc:
        _parser().error(str(exc))
    except RuntimeError as exc:
        sys.exit(f"llama.cpp cannot start: {exc}")
    print(f"listening on {server.listening_address}", file=sys.stderr, flush=True)
    stop.wait()

    # With requests in flight the destructor blocks and holds the GIL, so that no Python thread could cut
    # it short: the default action of SIGALRM does.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(STOP_LIMIT_S)
    del server
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="engines.workers.llama_cpp", allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--alias", default="")
    for flag in ("--ctx-size", "--parallel", "--threads", "--threads-batch", "--batch-size", "--ubatch-size"):
        parser.add_argument(flag, type=int)
    for flag in ("--n-gpu-layers", "--cache-ram"):
        parser.add_argument(flag, type=int)
    for flag in ("--flash-attn", "--cache-type-k", "--cache-type-v", "--chat-template"):
        parser.add_argument(flag)
    for flag in ("--reasoning-format", "--pooling", "--chat-template-kwargs", "--mmproj"):
        parser.add_argument(flag)
    for flag in ("--metrics", "--jinja", "--embedding", "--no-warmup", "--lora-init-without-apply"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--tensor-split", type=lambda text: [float(share) for share in text.split(",")])
    parser.add_argument("--model-draft")
    for flag, (_, _, kind) in MORE_VALUES.items():
        parser.add_argument(flag, type=kind)
    for flag, (_, values) in MORE_NAMES.items():
        parser.add_argument(flag, choices=sorted(values))
    for flag in MORE_SWITCHES:
        parser.add_argument(flag, action="store_true")
    return parser


def _params(xllamacpp: Any, arguments: argparse.Namespace) -> Any:
    def member(enum: str, name: str | None) -> Any:
        return None if name is None else getattr(getattr(xllamacpp, enum), name)

    def upper(prefix: str, value: str | None) -> str | None:
        return None if value is None else prefix + value.upper().replace("-", "_")

    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    params.hostnames = [arguments.host]
    params.port = arguments.port
    params.model_alias = {arguments.alias} if arguments.alias else set()
    params.api_keys = [key for key in [os.environ.get("LLAMA_API_KEY")] if key]
    params.ui = False
    if arguments.mmproj:
        params.mmproj.path = arguments.mmproj
    if arguments.chat_template_kwargs:
        values = json.loads(arguments.chat_template_kwargs)
        params.default_template_kwargs = {name: json.dumps(value) for name, value in values.items()}
    params.endpoint_metrics = arguments.metrics
    params.embedding = arguments.embedding
    params.warmup = not arguments.no_warmup
    flash_attn = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO", None: None}[arguments.flash_attn]
    wanted = {
        (params, "n_ctx"): arguments.ctx_size,
        (params, "n_parallel"): arguments.parallel,
        (params, "n_batch"): arguments.batch_size,
        (params, "n_ubatch"): arguments.ubatch_size,
        (params, "n_gpu_layers"): arguments.n_gpu_layers,
        (params, "cache_ram_mib"): arguments.cache_ram,
        (params, "chat_template"): arguments.chat_template,
        (params.cpuparams, "n_threads"): arguments.threads,
        (params.cpuparams_batch, "n_threads"): arguments.threads_batch,
        (params, "flash_attn_type"): member("llama_flash_attn_type", upper("LLAMA_FLASH_ATTN_TYPE_", flash_attn)),
        (params, "cache_type_k"): member("ggml_type", upper("GGML_TYPE_", arguments.cache_type_k)),
        (params, "cache_type_v"): member("ggml_type", upper("GGML_TYPE_", arguments.cache_type_v)),
        (params, "pooling_type"): member("llama_pooling_type", upper("LLAMA_POOLING_TYPE_", arguments.pooling)),
        (params, "reasoning_format"): member(
            "common_reasoning_format", upper("COMMON_REASONING_FORMAT_", arguments.reasoning_format)
        ),
    }
    for (target, name), value in wanted.items():
        if value is not None:
            setattr(target, name, value)
    _set_more(xllamacpp, params, arguments)
    return params


def _set_more(xllamacpp: Any, params: Any, arguments: argparse.Namespace) -> None:
    def given(flag: str) -> Any:
        return getattr(arguments, flag[2:].replace("-", "_"))

    places = {"": params, "draft": params.speculative.draft}
    for flag, (place, name, _) in MORE_VALUES.items():
        if given(flag) is not None:
            setattr(places[place], name, given(flag))
    for flag, (name, values) in MORE_NAMES.items():
        if given(flag) is not None:
            enum, member = values[given(flag)].split(".")
            setattr(params, name, getattr(getattr(xllamacpp, enum), member))
    for flag, (name, value) in MORE_SWITCHES.items():
        if given(flag):
            setattr(params, name, getattr(xllamacpp.llama_load_mode, value) if isinstance(value, str) else value)
    if arguments.tensor_split:
        shares = list(params.tensor_split)
        shares[: len(arguments.tensor_split)] = arguments.tensor_split
        params.tensor_split = shares
    if arguments.model_draft:
        model = params.speculative.draft.mparams
        model.path = arguments.model_draft
        params.speculative.draft.mparams = model
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    adapters = []
    for path in arguments.lora:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, 1.0
        adapters.append(adapter)
    if adapters:
        params.lora_adapters = adapters
        params.lora_init_without_apply = arguments.lora_init_without_apply


def _force(params: Any, words: list[str]) -> None:
    """Set what flags beyond our table name, if it is a plain field of the engine's parameters.

    Raises:
        ValueError: it is none, or cannot have that value.
    """
    while words:
        flag = words.pop(0)
        text = words.pop(0) if words and not words[0].startswith("--") else "true"
        name = flag.removeprefix("--").replace("-", "_")
        there = getattr(params, name, None)
        if not isinstance(there, bool | int | float | str):
            raise ValueError(f"llama.cpp has no parameter that {flag} could set here.")
        try:
            value = {"true": True, "false": False}[text] if isinstance(there, bool) else type(there)(text)
            setattr(params, name, value)
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            raise ValueError(f"{flag} is {there!r} by default: it cannot be {text!r}.") from exc


if __name__ == "__main__":
    main()
