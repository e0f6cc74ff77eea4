"""A run as a picture: six figures, one bar for each target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from figures import CPU, KIB, MIB, Run
from matplotlib import pyplot
from matplotlib.axes import Axes

OURS, REFERENCE, OTHERS = "#c2410c", "#334155", "#94a3b8"
WIDE = 30.0  # from least to most: beyond that the scale is logarithmic


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    run = Run(found)
    panels: list[tuple[str, str, Callable[[str], float | None], bool]] = [
        ("CPU per request, 64 connections", "us", lambda t: run.median(t, "c64", CPU), True),
        ("Requests a second, 64 connections", "", lambda t: run.median(t, "c64", "requests_per_s"), False),
        ("Added p50, 1 connection", "us", lambda t: scaled(run.added(t, "c1", "latency_ms", "p50"), 1e3), True),
        ("CPU per event, 512 streams", "us", lambda t: run.median(t, "s512", "cpu_us_per_event"), True),
        ("TTFT p50, 512 streams at once", "ms", lambda t: run.median(t, "s512", "first_ms", "p50"), False),
        ("Idle, and with 1,000 streams", "MiB", lambda t: scaled(run.fresh(t, "rss"), 1 / MIB), True),
    ]
    height = 1.1 + 0.32 * len(run.targets)
    figure, axes = pyplot.subplots(2, 3, figsize=(16, 2 * height + 0.9), layout="constrained")
    for axis, (title, unit, of, is_of_middle) in zip(axes.flat, panels, strict=True):
        names = [name for name in run.targets if of(name) is not None and not (is_of_middle and name == "direct")]
        panel(axis, title, unit, {name: of(name) or 0.0 for name in names}, run)
        if title.startswith("Idle"):
            add_streams(axis, names, run)
    facts = run.facts
    figure.suptitle(
        f"{facts['machine']}, the gateway on one core; {facts['repetitions']} repetitions of {facts['seconds']:g} s, "
        f"medians; {facts['date']}, {facts['commit']}",
        fontsize=10,
        color="#475569",
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def panel(axis: Axes, title: str, unit: str, values: dict[str, float], run: Run) -> None:
    """Bars from the top down, each with its number."""
    axis.set_title(f"{title}, {unit}" if unit else title, fontsize=11, loc="left")
    if not values:
        axis.set_axis_off()
        return
    colours = [OURS if n in run.ours else REFERENCE if n in ("direct", "nginx") else OTHERS for n in values]
    axis.barh([*values], [*values.values()], color=colours, height=0.68)
    axis.invert_yaxis()
    least, most = min(values.values()), max(values.values())
    if least > 0 and most / least > WIDE:
        axis.set_xscale("log")
        axis.set_xlim(least / 2, most * 4)
        axis.set_xlabel("logarithmic", fontsize=8, color="#475569", labelpad=0)
    else:
        axis.set_xlim(min(0, least * 1.2), most * 1.25)
    for row, value in enumerate(values.values()):
        text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        axis.annotate(text, (max(value, 0), row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0, labelsize=9)
    axis.grid(visible=True, axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def add_streams(axis: Axes, names: list[str], run: Run) -> None:
    """What 1,000 open streams take on top, in a lighter colour."""
    more = [(run.fresh(name, "rss_stream") or 0.0) * 1000 / MIB for name in names]
    base = [(run.fresh(name, "rss") or 0.0) / MIB for name in names]
    for text in [*axis.texts]:
        text.remove()
    axis.barh(names, more, left=base, color="#fdba74", height=0.68)
    for row, (own, streams) in enumerate(zip(base, more, strict=True)):
        label = f"{own:.0f} + {streams * MIB / KIB / 1000:.0f} KiB a stream" if streams else f"{own:.0f}"
        axis.annotate(label, (own + streams, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xscale("linear")
    axis.set_xlabel("")
    axis.set_xlim(0, max([own + streams for own, streams in zip(base, more, strict=True)], default=1) * 1.6)


def scaled(value: float | None, unit: float) -> float | None:
    """In another unit."""
    return None if value is None else value * unit
