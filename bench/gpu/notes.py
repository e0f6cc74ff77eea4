"""What a run finds: said at once, kept as JSON after each figure, so that a run that is cut off leaves what it had."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Notes:
    """The figures of a run, by part. `left_s` is what is left of its time."""

    def __init__(self, folder: Path, name: str, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / f"{name}.json"
        self.found: dict[str, Any] = {"command": "", "machine": {}, "parts": {}}
        self._part: dict[str, Any] = {}
        self._began = time.monotonic()
        self._seconds = seconds

    @property
    def left_s(self) -> float:
        """Until the run has to end."""
        return self._seconds - (time.monotonic() - self._began)

    def begin(self, part: str) -> None:
        """What is noted from now on is of that part."""
        self._part = self.found["parts"].setdefault(part, {})
        self.say(f"--- {part}")

    def say(self, *words: Any) -> None:
        """One line, with the time since the start."""
        print(f"[{time.monotonic() - self._began:6.1f}]", *words, flush=True)

    def keep(self, name: str, value: Any) -> None:
        """Keep a figure of the part."""
        self._part[name] = value
        self.write()

    def told(self, name: str, value: Any) -> None:
        """Keep it and say it."""
        self.keep(name, value)
        self.say(f"{name}: {value if isinstance(value, str) else json.dumps(value, default=str)}")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Keep and print it."""
        self.keep(name, [dict(zip(columns, row, strict=True)) for row in rows])
        cells = [list(columns), *([_cell(one) for one in row] for row in rows)]
        widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
        self.say(name)
        for row in cells:
            print("   ", "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), flush=True)

    def write(self) -> None:
        """At once whole, or not at all."""
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1, default=str) + "\n")
        os.replace(new, self.file)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which that share is; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


def gib(size: float) -> float:
    """Bytes as GiB."""
    return round(size / 2**30, 2)
