"""What a hub is: one function, the words it speaks with, and how patterns choose among its files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import msgspec

from registry.schema import Source

REPORT_INTERVAL_S = 0.2


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

    def fetch(self, source: Source, cache: Path, report: Report) -> Fetched:
        """Get the source's files.

        Args:
            source: which files of this hub.
            cache: our folder for fetched files; the hub may keep its files elsewhere.
            report: is told how far it is.
        Raises:
            HubError: with a sentence for the user.
        """


class Report:
    """Tells of the progress, a few times a second at most; a new stage and its end are told at once.

    What does not move is not told again, so that whoever listens can notice a download that hangs.
    """

    def __init__(self, emit: Callable[[dict[str, object]], None]) -> None:
        self._emit = emit
        self._told = ""
        self._told_bytes = 0
        self._told_at = 0.0

    def stage(self, stage: str) -> None:
        """A stage without a measure begins."""
        self._told = stage
        self._emit({"stage": stage})

    def bytes(self, stage: str, done_bytes: int, total_bytes: int | None, file: str) -> None:
        """So many bytes of `file` are done; `total_bytes` is None if nobody knows."""
        now = time.monotonic()
        if self._told == stage:
            is_early = done_bytes != total_bytes and now - self._told_at < REPORT_INTERVAL_S
            if is_early or done_bytes == self._told_bytes:
                return
        self._told, self._told_bytes, self._told_at = stage, done_bytes, now
        self._emit({"stage": stage, "done_bytes": done_bytes, "total_bytes": total_bytes, "file": file})


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


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")
