"""Amounts as people read them."""

from __future__ import annotations


def megabytes(size_bytes: float | None) -> str:
    """A size, in the unit that all sizes have here."""
    return "-" if size_bytes is None else f"{size_bytes / 1e6:,.0f} MB"
