"""Amounts as people read and write them."""

from __future__ import annotations

import re

SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]i?)?b?", re.IGNORECASE)
POWERS: dict[str, int] = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def megabytes(size_bytes: float | None) -> str:
    """A size, in the unit that all sizes have here."""
    return "-" if size_bytes is None else f"{size_bytes / 1e6:,.0f} MB"


def bytes_of(size: int | str) -> int:
    """A size in bytes: a number of them, or a text such as 500M, 6GB or 1.5 GiB.

    Raises:
        ValueError: it is no size.
    """
    found = SIZE.fullmatch(str(size).strip())
    if found is None:
        raise ValueError(f"{size!r} is no size: write bytes, or a number with a unit such as 500MB or 6GiB")
    unit = (found[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return round(float(found[1]) * float(base ** POWERS[unit.removesuffix("i")]))


def bytes_or_share(size: int | str, total_bytes: int) -> int:
    """A size in bytes; of a text such as 25% so much of the total.

    Raises:
        ValueError: it is neither a size nor a share from 0 to 100 %.
    """
    if (found := SHARE.fullmatch(str(size).strip())) is None:
        return bytes_of(size)
    if (share := float(found[1]) / 100) > 1:
        raise ValueError(f"{size!r} is more than all there is")
    return round(total_bytes * share)
