"""Why an engine ended, read off how it ended and what it wrote last. Pure: data in, a Cause out.

TELLS is the table of what engines say. It is read from the top, so what tells more stands above what follows from it:
an engine that had no memory for a file's header complains of the header, too.
"""

from __future__ import annotations

import enum
import errno
import re
import signal
from collections.abc import Sequence

import msgspec

from engines.base import Engine
from gateway import limits

LINES_READ = 400  # of a log's end: a chain of tracebacks begins with the line that tells
LINE_SHOWN = 400
LINES_READ_AFTER_READY = 120  # of one that served: what it said in earlier hours is not why it ended
# Lines that tell no error, by the words of Python, vLLM and llama.cpp: warnings of what might happen, and the frames of
# tracebacks.
NO_ERROR = re.compile(
    r"(\([^)]*\) )?(DEBUG|INFO|WARNING)\b|\d+\.\d+\.\d+\.\d+ [DIW] |.*\b\w*Warning: "
    r"|(\([^)]*\) )?(ERROR \S+ \S+ \[[^]]*\])?\s+(File \"|\s{3})"
)


class Cause(enum.StrEnum):
    """Why a replica is not serving."""

    GPU_MEMORY = "gpu_memory"
    CACHE_MEMORY = "cache_memory"
    MEMORY = "memory"
    ARGUMENTS = "arguments"
    LIBRARY = "library"
    FILES = "files"
    GPU = "gpu"
    ADDRESS = "address"
    PERMISSION = "permission"
    DISK_FULL = "disk_full"
    LICENCE = "licence"
    LIMITS = "limits"
    KILLED = "killed"
    CRASH = "crash"
    SILENCE = "silence"
    SLOW_START = "slow_start"
    SLEEP = "sleep"
    PLACE = "place"
    DOWNLOAD = "download"
    ENVIRONMENT = "environment"
    REMOTE = "remote"
    GATEWAY = "gateway"
    UNKNOWN = "unknown"


OF_MEMORY = frozenset({Cause.GPU_MEMORY, Cause.CACHE_MEMORY, Cause.MEMORY})
# What is nobody's fault but the machine's: it is tried again for as long as it takes.
OF_MACHINE = frozenset({Cause.DISK_FULL, Cause.LIMITS})
# What the same start again cannot mend.
LASTING = frozenset({Cause.ARGUMENTS, Cause.LIBRARY, Cause.FILES, Cause.LICENCE})
OF_CRASHES = OF_MEMORY | {Cause.GPU}  # of which programs abort
CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP})
KILLS = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

SAYS = {
    Cause.GPU_MEMORY: "the memory of the GPU did not suffice",
    Cause.CACHE_MEMORY: "what memory there was for its cache of keys and values did not suffice",
    Cause.MEMORY: "the machine's memory did not suffice",
    Cause.ARGUMENTS: "the engine does not take its options",
    Cause.LIBRARY: "a library is missing",
    Cause.FILES: "the model's files are damaged, not whole, or of another kind",
    Cause.GPU: "the GPU or its driver failed",
    Cause.ADDRESS: "its address was taken",
    Cause.PERMISSION: "the system forbids it a file",
    Cause.DISK_FULL: "the disk is full",
    Cause.LICENCE: "the model's licence has not been accepted, or the token is missing",
    Cause.LIMITS: "a limit of the system was reached",
    Cause.KILLED: "somebody killed it",
    Cause.CRASH: "it crashed",
}
ADVICE = {
    Cause.ARGUMENTS: "Correct the option that the line names.",
    Cause.LIBRARY: "Install it for the engine (`hostler engines` shows how), or name another Python in the settings.",
    Cause.FILES: "Fetch them again (`hostler remove-cache` takes the old ones away), or correct the model's path.",
    Cause.GPU: (
        "Compare the driver and the GPU with what the engine's build asks for: `nvidia-smi`, `hostler doctor`."
    ),
    Cause.ADDRESS: "It is tried again at another address.",
    Cause.PERMISSION: "Let the user that the gateway runs as read the file.",
    Cause.DISK_FULL: "Make room: `hostler cached` shows what the models take.",
    Cause.LICENCE: "Accept the licence on the hub's page, and give a token (HF_TOKEN), also in the launch's `envs`.",
    Cause.LIMITS: "Raise the limits of open files and processes (`ulimit -n`, `ulimit -u`) where the gateway starts.",
    Cause.KILLED: "It is started again.",
    Cause.CRASH: "`hostler logs` shows more. Another version of the engine, or other options, may do.",
    Cause.MEMORY: "End what else takes memory on this machine, or launch less at once.",
    Cause.UNKNOWN: "Check the disk and the system's limits.",
}
OF_ERRNO = {
    **dict.fromkeys(limits.OUT_OF_DISK, Cause.DISK_FULL),
    **dict.fromkeys(limits.OUT_OF_MEMORY, Cause.MEMORY),
    **dict.fromkeys((*limits.OUT_OF_FILES, errno.EAGAIN), Cause.LIMITS),
    **dict.fromkeys((errno.EACCES, errno.EPERM), Cause.PERMISSION),
    errno.EADDRINUSE: Cause.ADDRESS,
}
# Who says it and when, in the words of vLLM and llama.cpp.
BEGIN = re.compile(r"\d+\.\d+\.\d+\.\d+ E |(\([^)]*\) )?((ERROR|CRITICAL) \S+ \S+ \[[^]]*\] )?")
FULL_DISK = re.compile(r"No space left on device|Disk quota exceeded|The disk is too small")
ANY = ""

# Which engine says it (ANY: all of them), what it says, what that means.
TELLS: tuple[tuple[str, str, Cause], ...] = (
    # memory: of GPUs before the machine's
    (ANY, r"CUDA out of memory|HIP out of memory|MPS backend out of memory", Cause.GPU_MEMORY),
    (ANY, r"torch\.(cuda\.)?OutOfMemoryError|CUDA failed with error out of memory", Cause.GPU_MEMORY),
    (ANY, r"CUDA error: out of memory|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED", Cause.GPU_MEMORY),
    (ANY, r"cudaMalloc failed: out of memory|ErrorOutOfDeviceMemory|allocate (CUDA|ROCm|Vulkan)\d", Cause.GPU_MEMORY),
    ("vLLM", r"Free memory on device .* is less than desired GPU memory utilization", Cause.GPU_MEMORY),
    ("vLLM", r"No available memory for the cache blocks", Cause.CACHE_MEMORY),
    ("vLLM", r"larger than the available KV cache memory", Cause.CACHE_MEMORY),
    ("vLLM", r"larger than the maximum number of tokens that can be stored in KV cache", Cause.CACHE_MEMORY),
    ("SGLang", r"Not enough memory[.;:]|Please try (to increase|increasing) --mem-fraction-static", Cause.CACHE_MEMORY),
    (ANY, r"\bMemoryError\b|bad_alloc\b|Cannot allocate memory|DefaultCPUAllocator", Cause.MEMORY),
    (ANY, r"[Ii]nsufficient memory|[Nn]ot enough memory|failed to mmap|[Uu]nable to allocate", Cause.MEMORY),
    ("vLLM", r"on kv cache allocation is less than requested memory", Cause.MEMORY),
    (ANY, r"failed to allocate (memory|compute|buffer|(CPU|Host)\w* buffer)", Cause.MEMORY),
    # limits of the system
    (ANY, r"No space left on device|Disk quota exceeded|\[Errno (28|122)\]", Cause.DISK_FULL),
    (ANY, r"Too many open files|can't start new thread|Resource temporarily unavailable", Cause.LIMITS),
    (ANY, r"pthread_create failed", Cause.LIMITS),
    # the GPU and its driver
    (ANY, r"no kernel image is available|CUDA driver version is insufficient", Cause.GPU),
    (ANY, r"NVIDIA driver on your system is too old|Found no NVIDIA driver|no CUDA-capable device", Cause.GPU),
    (ANY, r"illegal memory access|device-side assert triggered|uncorrectable ECC|\bXid\b", Cause.GPU),
    (ANY, r"\bCUDA error\b|CUDA initialization|unspecified launch failure|CUDNN_STATUS_", Cause.GPU),
    (ANY, r"NCCL error|ncclSystemError|ncclUnhandledCudaError", Cause.GPU),
    (ANY, r"Torch not compiled with CUDA enabled|No CUDA GPUs are available|invalid device ordinal", Cause.GPU),
    # addresses
    (ANY, r"[Aa]ddress already in use|\[Errno 98\]|couldn't bind HTTP server socket", Cause.ADDRESS),
    # options
    ("vLLM", r"are not supported for now|does not recognize this architecture", Cause.FILES),
    (ANY, r"error: (unrecognized arguments|argument |the following arguments are required)", Cause.ARGUMENTS),
    (ANY, r"error: (invalid argument|unknown argument|invalid value|while handling argument)", Cause.ARGUMENTS),
    ("llama.cpp", r"has no parameter that --", Cause.ARGUMENTS),
    ("llama.cpp", r"quantized V cache requires flash_attn|V cache quantization requires flash_attn", Cause.ARGUMENTS),
    ("llama.cpp", r"expect general\.type to be 'adapter'|failed to load lora adapter", Cause.ARGUMENTS),
    ("vLLM", r"is greater than the derived max_model_len|ValidationError: \d+ validation error", Cause.ARGUMENTS),
    ("vLLM", r"must be divisible by tensor parallel size|exceeds the model's maximum", Cause.ARGUMENTS),
    (ANY, r"The launch says device '.*', but torch", Cause.ARGUMENTS),
    # libraries; only where the line is an exception's, as engines also warn of what they can do without
    (
        ANY,
        r"(^|[\]):] )(ModuleNotFoundError|ImportError): |lacks what the worker |finding module specification",
        Cause.LIBRARY,
    ),
    (ANY, r"error while loading shared libraries|(^|[\]):] )OSError: .*cannot open shared object file", Cause.LIBRARY),
    # files
    (ANY, r"gated repo|[Aa]ccess to model .* is restricted|401 Client Error|403 Client Error", Cause.LICENCE),
    (ANY, r"Permission denied|\[Errno 13\]", Cause.PERMISSION),
    (ANY, r"SafetensorError|[Ee]rror while deserializing header|Unable to load weights from checkpoint", Cause.FILES),
    (ANY, r"invalid magic|failed to read magic|failed to read key-value pairs|corrupted or incomplete", Cause.FILES),
    (ANY, r"unknown model architecture|missing tensor|wrong number of tensors|tensor '.*' not found", Cause.FILES),
    (ANY, r"The weights are damaged|is damaged: |it may be damaged|Are its files whole", Cause.FILES),
    (ANY, r"PytorchStreamReader|[Ii]nvalid load key|UnpicklingError|size mismatch for", Cause.FILES),
    (ANY, r"Error no file named|does not appear to have a file named|there is no file /", Cause.FILES),
    (ANY, r"(^|[\]):] )FileNotFoundError: ", Cause.FILES),
)
COMPILED = tuple((engine, re.compile(pattern), cause) for engine, pattern, cause in TELLS)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A cause, the line of the log that told it, what to do, and whether the same start again may go well."""

    cause: Cause
    line: str = ""
    advice: str
    is_lasting: bool = False

    @property
    def text(self) -> str:
        """What to say of it; empty where nothing is known."""
        return ": ".join(filter(None, (SAYS.get(self.cause, ""), self.line)))


def find(
    engine: Engine,
    log: Sequence[str],
    *,
    signal_number: int | None = None,
    was_ready: bool = False,
    was_out_of_memory: bool | None = False,
    is_disk_full: bool = False,
) -> Finding:
    """Why an engine's process ended.

    Args:
        log: its last lines.
        was_ready: it could serve in this life, so what it said in earlier minutes counts for less.
        was_out_of_memory: the kernel ended processes for want of memory meanwhile; None if it does not tell.
        is_disk_full: where its log is, so that it may have had nowhere to say why.
    """
    if signal_number == signal.SIGKILL and was_out_of_memory:
        return _finding(Cause.MEMORY, engine, "the kernel killed it to get memory back")
    told = _told(engine.name, log[-(LINES_READ_AFTER_READY if was_ready else LINES_READ) :])
    if signal_number in KILLS and not (told and told[0] in OF_MEMORY):
        found = _finding(Cause.KILLED, engine, _name(signal_number))
        if was_out_of_memory is None and signal_number == signal.SIGKILL:
            advice = f"If nobody killed it, the system ran out of memory: {advice_for(Cause.MEMORY, engine)}"
            return msgspec.structs.replace(found, advice=advice)
        return found
    if told and not (was_ready and signal_number in CRASHES and told[0] not in OF_CRASHES):
        return _finding(told[0], engine, told[1])
    if was_out_of_memory:
        return _finding(Cause.MEMORY, engine, "the kernel killed a process to get memory back")
    if is_disk_full:
        return _finding(Cause.DISK_FULL, engine)
    if signal_number in CRASHES:
        return _finding(Cause.CRASH, engine, _name(signal_number))
    return Finding(cause=Cause.UNKNOWN, advice="`hostler logs` shows more.")


def of_errno(number: int | None) -> Cause:
    """What the system's refusal of a call means."""
    return OF_ERRNO.get(number or 0, Cause.UNKNOWN)


def is_of_full_disk(text: str) -> bool:
    """Whether it tells that a disk is full."""
    return FULL_DISK.search(text) is not None


def advice_for(cause: Cause, engine: Engine) -> str:
    """What to change."""
    if cause in OF_MEMORY:
        return f"{engine.less_memory} A smaller model or quantization, or fewer models at once, need less.".strip()
    return ADVICE[cause]


def _finding(cause: Cause, engine: Engine, line: str = "") -> Finding:
    return Finding(cause=cause, line=line, advice=advice_for(cause, engine), is_lasting=cause in LASTING)


def _told(engine: str, log: Sequence[str]) -> tuple[Cause, str] | None:
    """The first entry of the table that any line matches, and the last such line."""
    lines = [line for line in log if not NO_ERROR.match(line)]
    for name, pattern, cause in COMPILED:
        if name in (ANY, engine):
            line = next((line for line in reversed(lines) if pattern.search(line)), None)
            if line is not None:
                return cause, _shown(line)
    return None


def _shown(line: str) -> str:
    """Without who says it when, and not too long."""
    found = BEGIN.match(line)
    text = line[found.end() :].strip() if found else line.strip()
    return text if len(text) <= LINE_SHOWN else f"{text[:LINE_SHOWN]}..."


def _name(number: int | None) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
