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
from typing import Any

STOP_LIMIT_S = 5


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
    for flag in ("--metrics", "--jinja", "--embedding", "--no-warmup"):
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
    return params


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
