"""What ended an engine, read off what real ones wrote: `logs/` holds their last lines, as they were provoked."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

import engines
from engines.base import NoOptions
from gateway import causes
from gateway.causes import Cause

LOGS = Path(__file__).with_name("logs")
LASTING = True

# The log, whose engine begins its name -> the cause, whether it is for good, what the line that tells has.
FOUND: dict[str, tuple[Cause, bool, str]] = {
    "llama.cpp-wrong-value": (Cause.ARGUMENTS, LASTING, "--ctx-size: invalid int value: 'many'"),
    "llama.cpp-unknown-flag": (Cause.ARGUMENTS, LASTING, "--no-such-flag"),
    "llama.cpp-wrong-choice": (Cause.ARGUMENTS, LASTING, "invalid choice: 'diagonal'"),
    "llama.cpp-quantized-cache": (Cause.ARGUMENTS, LASTING, "flash_attn"),
    "llama.cpp-wrong-lora": (Cause.ARGUMENTS, LASTING, "lora adapter"),
    "llama.cpp-truncated": (Cause.FILES, LASTING, "corrupted or incomplete"),
    "llama.cpp-truncated-header": (Cause.FILES, LASTING, "failed to read key-value pairs"),
    "llama.cpp-no-gguf": (Cause.FILES, LASTING, "invalid magic characters: '<htm'"),
    "llama.cpp-empty-file": (Cause.FILES, LASTING, "failed to read magic"),
    "llama.cpp-context-too-large": (Cause.MEMORY, False, "insufficient memory"),
    "llama.cpp-limited-memory": (Cause.MEMORY, False, "5760.00 MB"),
    "llama.cpp-no-memory-for-header": (Cause.MEMORY, False, "bad_alloc"),
    "llama.cpp-port-taken": (Cause.ADDRESS, False, "couldn't bind"),
    "llama.cpp-forbidden": (Cause.PERMISSION, False, "Permission denied"),
    "sentence-transformers-no-torch": (Cause.LIBRARY, LASTING, "No module named 'torch'"),
    "sentence-transformers-truncated": (Cause.FILES, LASTING, "incomplete metadata"),
    "sentence-transformers-html": (Cause.FILES, LASTING, "header too large"),
    "sentence-transformers-no-weights": (Cause.FILES, LASTING, "model.safetensors"),
    "sentence-transformers-damaged-config": (Cause.FILES, LASTING, "config.json is damaged"),
    "sentence-transformers-no-gpu": (Cause.ARGUMENTS, LASTING, "device 'cuda'"),
    "sentence-transformers-port-taken": (Cause.ADDRESS, False, "address already in use"),
    "sentence-transformers-memory": (Cause.MEMORY, False, ""),
    "diffusers-truncated": (Cause.FILES, LASTING, "unet"),
    "diffusers-variant": (Cause.FILES, LASTING, "variant=nope"),
    "diffusers-memory": (Cause.MEMORY, False, ""),
    "transformers-truncated": (Cause.FILES, LASTING, "incomplete metadata"),
    "transformers-memory": (Cause.MEMORY, False, "378961920 bytes"),
    "transformers-gpu-memory": (Cause.GPU_MEMORY, False, "Tried to allocate 3725.29 GiB"),
    "transformers-gpu-memory-shared": (Cause.GPU_MEMORY, False, "of which 8.66 GiB is free"),
    "transformers-gpu-number": (Cause.GPU, False, "invalid device ordinal"),
    "transformers-gpu-assert": (Cause.GPU, False, "device-side assert"),
    "transformers-no-gpu": (Cause.GPU, False, "No CUDA GPUs"),
    "faster-whisper-truncated": (Cause.FILES, LASTING, "invalid payload size"),
    "faster-whisper-memory": (Cause.MEMORY, False, "failed to allocate memory"),
    "vLLM-unknown-flag": (Cause.ARGUMENTS, LASTING, "--no-such-flag"),
    "vLLM-wrong-value": (Cause.ARGUMENTS, LASTING, "'lots'"),
    "vLLM-truncated": (Cause.FILES, LASTING, "safetensors._safetensors_rust.SafetensorError"),
    "vLLM-context": (Cause.ARGUMENTS, LASTING, "max_model_len"),
    "vLLM-cache-too-small": (Cause.CACHE_MEMORY, False, "estimated maximum model length"),
    "vLLM-unknown-architecture": (Cause.FILES, LASTING, "nosuch"),
    "vLLM-cache-space": (Cause.MEMORY, False, ""),
    "vLLM-missing": (Cause.LIBRARY, LASTING, "vllm"),
}


def lines_of(name: str) -> list[str]:
    return (LOGS / f"{name}.log").read_text().splitlines()


def engine_of(name: str) -> engines.Engine:
    return max(
        (engine for engine in engines.ENGINES if name.startswith(engine.name)), key=lambda engine: len(engine.name)
    )


@pytest.mark.parametrize("name", FOUND)
def test_what_an_engine_wrote_tells_why_it_ended(name: str) -> None:
    cause, is_lasting, telling = FOUND[name]
    found = causes.find(engine_of(name), lines_of(name))
    assert (found.cause, found.is_lasting) == (cause, is_lasting), found.line
    assert telling in found.line
    assert found.text.endswith(found.line)
    assert found.advice.endswith(".")


def test_every_log_is_looked_at() -> None:
    assert {path.stem for path in LOGS.iterdir()} == set(FOUND)


# What is said on machines with GPUs and other systems.
@pytest.mark.parametrize(
    ("engine", "line", "cause"),
    [
        ("llama.cpp", "allocating 14136.04 MiB on device 0: cudaMalloc failed: out of memory", "gpu_memory"),
        ("llama.cpp", "alloc_tensor_range: failed to allocate CUDA0 buffer of size 151851674624", "gpu_memory"),
        ("llama.cpp", "ggml_vulkan: allocation failed. vk::Device::x: ErrorOutOfDeviceMemory", "gpu_memory"),
        ("transformers", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "gpu_memory"),
        ("diffusers", "RuntimeError: MPS backend out of memory (MPS allocated: 17.9 GB)", "gpu_memory"),
        ("faster-whisper", "RuntimeError: CUDA failed with error out of memory", "gpu_memory"),
        (
            "vLLM",
            "(EngineCore pid=77) ValueError: Free memory on device cuda:0 (117.5/139.8 GiB) on startup is less than "
            "desired GPU memory utilization (0.95, 132.81 GiB). Decrease it.",
            "gpu_memory",
        ),
        ("vLLM", "ValueError: No available memory for the cache blocks. Try increasing it.", "cache_memory"),
        ("SGLang", "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "cache_memory"),
        ("vLLM", "RuntimeError: CUDA error: no kernel image is available for execution on the device", "gpu"),
        ("vLLM", "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).", "gpu"),
        ("llama.cpp", "ggml_cuda_init: CUDA driver version is insufficient for CUDA runtime version", "gpu"),
        ("llama.cpp", "CUDA error: an illegal memory access was encountered", "gpu"),
        ("vLLM", "RuntimeError: CUDA error: device-side assert triggered", "gpu"),
        ("vLLM", "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", "gpu"),
        ("vLLM", "RuntimeError: NCCL error: unhandled system error", "gpu"),
        ("vLLM", "OSError: libcudart.so.12: cannot open shared object file: No such file or directory", "library"),
        ("llama.cpp", "./llama-server: error while loading shared libraries: libgomp.so.1: cannot open it", "library"),
        ("llama.cpp", "error: unknown argument: --ctx-sise", "arguments"),
        ("llama.cpp", "llama_model_load: error loading model: unknown model architecture: 'nova'", "files"),
        ("transformers", "OSError: You are trying to access a gated repo.", "licence"),
        ("vLLM", "OSError: [Errno 28] No space left on device", "disk_full"),
        ("vLLM", "OSError: [Errno 24] Too many open files", "limits"),
        ("vLLM", "RuntimeError: can't start new thread", "limits"),
    ],
)  # fmt: skip
def test_what_engines_say_elsewhere(engine: str, line: str, cause: str) -> None:
    assert causes.find(engines.find(engine), ["a line before", line, "a line after"]).cause == cause


LLAMA = engines.find("llama.cpp")


def test_who_killed_an_engine_is_told_apart() -> None:
    killed = signal.SIGKILL
    assert causes.find(LLAMA, ["all is well"], signal_number=killed).cause == Cause.KILLED
    assert causes.find(LLAMA, ["all is well"], signal_number=killed, was_out_of_memory=True).cause == Cause.MEMORY
    assert "out of memory" in causes.find(LLAMA, [], signal_number=killed, was_out_of_memory=None).advice
    assert causes.find(LLAMA, ["std::bad_alloc"], signal_number=signal.SIGABRT).cause == Cause.MEMORY
    assert causes.find(LLAMA, [], signal_number=signal.SIGSEGV).cause == Cause.CRASH
    assert causes.find(LLAMA, [], was_out_of_memory=True).cause == Cause.MEMORY
    assert causes.find(LLAMA, [], is_disk_full=True).cause == Cause.DISK_FULL
    assert causes.find(LLAMA, ["what is this"]).cause == Cause.UNKNOWN


def test_a_crash_of_one_that_served_is_not_laid_to_what_it_said_of_a_request() -> None:
    said = ["PermissionError: [Errno 13] Permission denied: 'picture.png'"]
    assert causes.find(LLAMA, said, signal_number=signal.SIGSEGV, was_ready=True).cause == Cause.CRASH
    old = ["CUDA error: out of memory", *["a line"] * causes.LINES_READ_AFTER_READY]
    assert causes.find(LLAMA, old, was_ready=True).cause == Cause.UNKNOWN
    assert causes.find(LLAMA, old).cause == Cause.GPU_MEMORY


def test_warnings_are_no_causes() -> None:
    warned = [
        "(APIServer pid=9) WARNING 11-25 04:34:24 [system_utils.py:255] May cause [Errno 24] Too many open files",
        "0.00.006.590 W common_fit_params: unable to allocate, going on",
        "/x/torch/cuda.py:1: UserWarning: CUDA initialization: Found no NVIDIA driver on your system.",
        "Failed to import from vllm._C with ModuleNotFoundError: No module named 'vllm._C'",
    ]
    assert causes.find(engines.find("vLLM"), warned).cause == Cause.UNKNOWN


def test_a_line_is_told_without_who_said_it_when() -> None:
    line = "ValueError: No available memory for the cache blocks."
    said = f"(Worker pid=2098) ERROR 11-25 04:34:41 [multiproc_executor.py:953] {line}"
    assert causes.find(engines.find("vLLM"), [said]).line == line


@pytest.mark.parametrize(
    "engine", [engine for engine in engines.ENGINES if engine.less_memory], ids=lambda one: one.name
)
def test_advice_names_options_that_the_engine_has(engine: engines.Engine) -> None:
    words = re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b|\bdtype\b", engine.less_memory)
    assert words
    assert engine.options is not NoOptions
    assert set(words) - {"q8_0"} <= set(engine.options.__struct_fields__)
