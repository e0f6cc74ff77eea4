"""How lists are put into sentences."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[object], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`; each once."""
    *first, final = dict.fromkeys(map(str, names)) or [""]
    return f"{', '.join(first)} {last} {final}" if first else final


def said_of(names: Iterable[object], one: str, many: str) -> str:
    """A sentence's beginning about all of them, by what is said of one and what of many."""
    names = dict.fromkeys(map(str, names))
    return f"{listed(names)} {one if len(names) == 1 else many}"
