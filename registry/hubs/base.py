"""What a hub is: two functions, the words it speaks with, and how patterns choose among its files."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import msgspec

from registry.schema import Source

REPORT_INTERVAL_S = 0.2
RATE_WINDOW_S = 5.0

# What no engine of ours reads: other frameworks, exports, training state, pictures.
NEVER = re.compile(
    r"(^|/)(\.git\w*|onnx|openvino|coreml|original|runs|checkpoint-\d+|logs|flax|tf)/"
    r"|\.(onnx|onnx_data|h5|msgpack|tflite|ot|mlmodel|mlpackage|pb|npz|gguf|pdf|png|jpe?g|gif|webp|mp4|zip)$"
    r"|(^|/)(\.gitattributes|optimizer\.(pt|bin)|scheduler\.(pt|bin)|training_args\.bin|rng_state[^/]*\.pth)$",
    re.IGNORECASE,
)
SAFETENSORS = re.compile(r"\.safetensors$", re.IGNORECASE)
PICKLES = re.compile(r"\.(bin|pth|pt|ckpt)(\.index\.json)?$", re.IGNORECASE)
CONSOLIDATED = re.compile(r"^consolidated[^/]*\.safetensors$", re.IGNORECASE)


class HubError(Exception):
    """Files could not be fetched. The text is a sentence for the user.

    Args:
        permanent: trying again cannot help until someone changes something.
    """

    def __init__(self, sentence: str, *, permanent: bool) -> None:
        super().__init__(sentence)
        self.permanent = permanent


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """Whole files on this machine: what to load, and every file that it consists of."""

    path: Path
    files: tuple[Path, ...]


class Hub(Protocol):
    """What each module in HUBS provides."""

    def list_files(self, source: Source) -> dict[str, int]:
        """The files that `fetch` would get, and the bytes of each; 0 where the hub does not tell.

        Raises:
            HubError: with a sentence for the user.
        """

    def fetch(self, source: Source, cache: Path, report: Report) -> Fetched:
        """Get the source's files.

        Args:
            source: which files of this hub.
            cache: our folder for fetched files; the hub may keep its files elsewhere.
            report: is told how far it is.
        Raises:
            HubError: with a sentence for the user.
        """


class Rate:
    """How fast a count of bytes grows: over its last few seconds, so that it neither jumps nor drags."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, done_bytes: int) -> None:
        """So many bytes are done at that time; fewer than before is a new beginning."""
        if self._samples and done_bytes < self._samples[-1][1]:
            self._samples.clear()
        if self._samples and now - self._samples[-1][0] < REPORT_INTERVAL_S:
            return
        self._samples.append((now, done_bytes))
        while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_WINDOW_S:
            self._samples.popleft()

    def bytes_s(self, now: float, done_bytes: int) -> int | None:
        """Bytes a second; None while too little is known."""
        if not self._samples or now - self._samples[0][0] < REPORT_INTERVAL_S:
            return None
        began_at, began_bytes = self._samples[0]
        return round((done_bytes - began_bytes) / (now - began_at))


class Report:
    """Tells of the progress, a few times a second at most; a new stage and its end are told at once.

    What does not move is not told again, so that whoever listens can notice a download that hangs.
    """

    def __init__(self, emit: Callable[[dict[str, object]], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._told = ""
        self._told_bytes = 0
        self._told_at = 0.0
        self._rate = Rate()

    def stage(self, stage: str) -> None:
        """A stage without a measure begins."""
        self._told = stage
        self._emit({"stage": stage})

    def bytes(self, stage: str, done_bytes: int, total_bytes: int | None, file: str) -> None:
        """So many bytes of `file` are done; `total_bytes` is None if nobody knows."""
        now = self._clock()
        if self._told != stage:
            self._rate = Rate()
        self._rate.add(now, done_bytes)
        if self._told == stage:
            is_early = done_bytes != total_bytes and now - self._told_at < REPORT_INTERVAL_S
            if is_early or done_bytes == self._told_bytes:
                return
        self._told, self._told_bytes, self._told_at = stage, done_bytes, now
        rate = self._rate.bytes_s(now, done_bytes)
        eta_s = None
        if total_bytes is not None and (rate or done_bytes == total_bytes):
            eta_s = round((total_bytes - done_bytes) / (rate or 1), 1)
        self._emit(
            {
                "stage": stage,
                "done_bytes": done_bytes,
                "total_bytes": total_bytes,
                "file": file,
                "rate_bytes_s": rate,
                "eta_s": eta_s,
            }
        )


def choose(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any pattern: by the order of the patterns, then sorted.

    A pattern matches a whole path or its last part, whatever the case. A pattern with wildcards leaves out
    multimodal projectors (`mmproj*`) unless it names them.
    """
    names = sorted(names)
    chosen: dict[str, None] = {}
    for pattern in patterns:
        folded = pattern.casefold()
        for name in names:
            path = name.casefold()
            base = path.rpartition("/")[2]
            if not (fnmatchcase(path, folded) or fnmatchcase(base, folded)):
                continue
            if base.startswith("mmproj") and "mmproj" not in folded:
                continue
            chosen[name] = None
    return list(chosen)


def choose_or_explain(sizes: dict[str, int], patterns: Sequence[str], where: str) -> list[str]:
    """Like `choose`, for files of a hub that a model is to be loaded from.

    Args:
        sizes: each file's path there and its bytes.
        where: what holds the files, for the error's sentence.
    Raises:
        HubError: nothing matches, or one pattern matches several GGUF models.
    """
    chosen = choose(sizes, patterns)
    wanted = " or ".join(repr(pattern) for pattern in patterns)
    if not chosen:
        largest = sorted(sizes, key=lambda name: (-sizes[name], name))
        raise HubError(f"No file in {where} matches {wanted}. It has: {listing(largest)}.", permanent=True)
    for pattern in patterns:
        models = {_SPLIT_PART.sub("", name) for name in choose(sizes, [pattern]) if _is_gguf(name)}
        if len(models) > 1:
            raise HubError(
                f"{len(models)} models in {where} match {pattern!r}: {listing(sorted(models))}. "
                "Say which by its quantization, or by its file name as model_file.",
                permanent=True,
            )
    return chosen


def what_engines_need(sizes: dict[str, int], where: str) -> list[str]:
    """All of a repository but what no engine reads; safetensors go before pickles of the same weights.

    Raises:
        HubError: nothing is left.
    """
    chosen = sorted(name for name in sizes if not NEVER.search(name))
    if "model_index.json" in sizes:  # a pipeline is loaded from its folders; beside them are other forms of it
        chosen = [n for n in chosen if _folder(n) or not (SAFETENSORS.search(n) or PICKLES.search(n))]
    safe_folders = {_folder(name) for name in chosen if SAFETENSORS.search(name)}
    chosen = [n for n in chosen if not (PICKLES.search(n) and _folder(n) in safe_folders)]
    # Some publishers put the same weights there twice: for everyone, and for their own library.
    if any(SAFETENSORS.search(n) and not CONSOLIDATED.search(n) for n in chosen):
        chosen = [n for n in chosen if not CONSOLIDATED.search(n)]
    if not chosen:
        ggufs = sorted(name for name in sizes if name.lower().endswith(".gguf"))
        hint = "Say which GGUF file by a quantization or a model_file." if ggufs else "Check model_id."
        raise HubError(f"No file in {where} is of use to an engine. {hint}", permanent=True)
    return chosen


def choose_files(source: Source, sizes: dict[str, int]) -> list[str]:
    """What to fetch of a repository: what `source.files` match, or what an engine could need.

    Raises:
        HubError: nothing fits.
    """
    where = f"repository {source.model_id}"
    if source.allow_patterns or source.ignore_patterns:
        sizes = {name: size for name, size in sizes.items() if _is_wanted(name, source)}
    return choose_or_explain(sizes, source.files, where) if source.files else what_engines_need(sizes, where)


def _is_wanted(name: str, source: Source) -> bool:
    """By the patterns of the source, which are those of whole paths, as the Hugging Face Hub's library has them."""
    if source.allow_patterns and not any(fnmatchcase(name, pattern) for pattern in source.allow_patterns):
        return False
    return not any(fnmatchcase(name, pattern) for pattern in source.ignore_patterns)


def listing(names: Sequence[str], limit: int = 10) -> str:
    """Up to `limit` names in one text, and how many more there are."""
    if not names:
        return "nothing"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def readable(size_bytes: int) -> str:
    """A size as people read it, such as 1.5 GiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


_SPLIT_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")
