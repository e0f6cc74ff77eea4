"""What the figures of a run are, what they should be, and how they are told.

FIGURES is the table that Hostler is held to: for each figure a floor, which is the least to ship, and a goal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MIB, KIB = 2**20, 2**10
CPU = "cpu_us_per_request"
HELD = 0.97  # of the offered events a second: then a rate counts as held


class Run:
    """The runs of one bench, asked for medians. Whatever was not measured is None."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.facts = found["facts"]
        self.targets = [target["name"] for target in found["targets"]]
        self.ours = [target["name"] for target in found["targets"] if target["is_ours"]]
        self._runs, self._fresh = found["runs"], found["fresh"]
        doors = {target["name"]: target["shares"] or target["name"] for target in found["targets"]}
        measured = {doors[one["target"]]: one["target"] for one in self._fresh}
        self._fresh_of = {name: measured.get(door, name) for name, door in doors.items()}

    def values(self, target: str, cell: str, *path: str) -> list[float]:
        """One for each repetition, in order."""
        found = [run for run in self._runs if (run["target"], run["cell"]) == (target, cell)]
        for name in path:
            found = [None if run is None else run[name] for run in found]
        return [value for value in found if value is not None]

    def median(self, target: str, cell: str, *path: str) -> float | None:
        """Of a figure as it is."""
        return middle(self.values(target, cell, *path))

    def ratio(self, target: str, other: str, cell: str, *path: str) -> float | None:
        """The median of the ratios within a repetition."""
        pairs = zip(self.values(target, cell, *path), self.values(other, cell, *path), strict=False)
        return middle([mine / its for mine, its in pairs if its])

    def added(self, target: str, cell: str, *path: str, to: str = "direct") -> float | None:
        """On top of another way: the median of the differences within a repetition."""
        pairs = zip(self.values(target, cell, *path), self.values(to, cell, *path), strict=False)
        return middle([mine - its for mine, its in pairs])

    def fresh(self, target: str, *names: str) -> float | None:
        """Of a process that has served nothing yet; several names are several samples of one figure."""
        of = self._fresh_of[target]
        return middle([one[name] for one in self._fresh if one["target"] == of for name in names if name in one])


def middle(values: Sequence[float]) -> float | None:
    """The median, if there is any."""
    return statistics.median(values) if values else None


def divided(one: float | None, other: float | None) -> float | None:
    """None where nothing can be divided."""
    return one / other if one is not None and other else None


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    floor: float
    goal: float
    of: Callable[[Run, str], float | None]  # the run, and the target that it is about
    unit: str = ""
    is_less_better: bool = True
    only_unix: bool = False

    def verdict(self, value: float) -> str:
        """Which of the two is met."""
        if self._is_met(value, self.goal):
            return "goal"
        return "floor" if self._is_met(value, self.floor) else "**missed**"

    def _is_met(self, value: float, limit: float) -> bool:
        return value <= limit if self.is_less_better else value >= limit


def _latency(cell: str) -> Callable[[Run, str], float | None]:
    """The ratio of what both add: of the medians, since single differences are close to nothing."""

    def of(run: Run, target: str) -> float | None:
        return divided(run.added(target, cell, "latency_ms", "p50"), run.added("nginx", cell, "latency_ms", "p50"))

    return of


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


FIGURES = (
    Figure("CPU per request, 64 connections, x nginx", 1.5, 1.2, lambda r, t: r.ratio(t, "nginx", "c64", CPU)),
    Figure("CPU per request, 16 connections, x nginx", 1.9, 1.5, lambda r, t: r.ratio(t, "nginx", "c16", CPU)),
    Figure(
        "the same at 64 over a Unix socket, x nginx over TCP",
        1.5,
        1.0,
        lambda r, t: r.ratio(t, "nginx", "c64", CPU),
        only_unix=True,
    ),
    Figure(
        "requests/s, 64 connections, of nginx",
        0.65,
        0.85,
        lambda r, t: r.ratio(t, "nginx", "c64", "requests_per_s"),
        is_less_better=False,
    ),
    Figure("added p50, 1 connection, x nginx's", 1.5, 1.2, _latency("c1")),
    Figure("added p50, 16 connections, x nginx's", 4, 2, _latency("c16")),
    Figure(
        "512 streams x 50 events/s: share of the events that came in time",
        HELD,
        HELD,
        lambda r, t: divided(r.median(t, "s512", "events_per_s"), r.median(t, "s512", "offered_per_s")),
        is_less_better=False,
    ),
    Figure(
        "CPU per event, 512 streams, x nginx", 1.3, 1.1, lambda r, t: r.ratio(t, "nginx", "s512", "cpu_us_per_event")
    ),
    Figure("added TTFT p50, 64 streams", 1.0, 0.3, lambda r, t: r.added(t, "s64", "first_ms", "p50"), "ms"),
    Figure(
        "TTFT p50, 512 streams, on top of nginx's",
        25,
        5,
        lambda r, t: r.added(t, "s512", "first_ms", "p50", to="nginx"),
        "ms",
    ),
    Figure(
        "2 MiB reply, requests/s of vllm-router",
        0.9,
        1.1,
        lambda r, t: r.ratio(t, "vllm-router", "large", "requests_per_s"),
        is_less_better=False,
    ),
    Figure(
        "10 MiB upload, requests/s of nginx",
        0.6,
        0.9,
        lambda r, t: r.ratio(t, "nginx", "upload", "requests_per_s"),
        is_less_better=False,
    ),
    Figure("10 MiB upload, peak memory of each", 25, 1, lambda r, t: _scaled(r.fresh(t, "upload_peak"), MIB), "MiB"),
    Figure("idle RSS of the process that serves", 45, 35, lambda r, t: _scaled(r.fresh(t, "rss"), MIB), "MiB"),
    Figure("memory of an open stream, 1,000 open", 12, 8, lambda r, t: _scaled(r.fresh(t, "rss_stream"), KIB), "KiB"),
    Figure("start to the first 200", 0.5, 0.25, lambda r, t: r.fresh(t, "start_s", "start_again_s"), "s"),
    Figure(
        "CPU per request, 64 connections: vllm-router's by ours",
        3,
        4,
        lambda r, t: divided(1, r.ratio(t, "vllm-router", "c64", CPU)),
        is_less_better=False,
    ),
    Figure(
        "CPU per request, 64 connections: LiteLLM's by ours",
        150,
        250,
        lambda r, t: divided(1, r.ratio(t, "litellm", "c64", CPU)),
        is_less_better=False,
    ),
)


# Telling


def report(found: dict[str, Any]) -> str:
    """Everything, in Markdown."""
    run = Run(found)
    tables = [_reach(run), *(_cell(run, *cell) for cell in TABLES), _fresh(run)]
    return "\n".join(["# What the gateway costs", "", _about(run.facts), *filter(None, tables)])


def _about(facts: dict[str, Any]) -> str:
    pinned = "nothing is pinned"
    if facts["cores"][1] is not None:
        pinned = f"client and engine on core {facts['cores'][0]}, the gateway on core {facts['cores'][1]}"
    peers = "".join(f", {package}" for package in facts["peers"].values())
    return (
        f"{facts['date']}, commit {facts['commit']}; {facts['machine']}, Linux {facts['kernel']}, Python "
        f"{facts['python']}, nginx {facts['nginx']}{peers}. {facts['repetitions']} repetitions of {facts['seconds']:g} "
        f"s; {pinned}; load before the run {facts['load_before']:.2f}. Keys, metrics, routing and accounting are on. "
        "How it is measured: [bench/README.md](../README.md).\n"
    )


def _reach(run: Run) -> str:
    if not run.ours:
        return ""
    rows = []
    for figure in FIGURES:
        row = [figure.name, _amount(figure.floor, figure.unit), _amount(figure.goal, figure.unit)]
        for target in run.ours:
            value = figure.of(run, target)
            if figure.only_unix and "Unix" not in target:
                row.append("")
            elif value is None:
                row.append("not measured")
            else:
                row.append(f"{_amount(value, figure.unit)} {figure.verdict(value)}")
        rows.append(row)
    return "## What it should reach\n\n" + table(["figure", "floor", "goal", *run.ours], rows)


def _amount(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".strip()


Column = tuple[str, Callable[[Run, str, str], float | None], str]


def _plain(title: str, form: str, *path: str) -> Column:
    return (title, lambda run, target, cell: run.median(target, cell, *path), form)


def _ratio(title: str, other: str, *path: str) -> Column:
    return (title, lambda run, target, cell: run.ratio(target, other, cell, *path), "{:.2f}")


def _added_us(title: str, *path: str) -> Column:
    return (title, lambda run, target, cell: _scaled(run.added(target, cell, *path), 1e-3), "{:+,.0f}")


REPLIES: tuple[Column, ...] = (
    _plain("requests/s", "{:,.0f}", "requests_per_s"),
    _ratio("of direct", "direct", "requests_per_s"),
    _ratio("of nginx", "nginx", "requests_per_s"),
    _plain("CPU us/request", "{:,.1f}", CPU),
    _ratio("CPU x nginx", "nginx", CPU),
    _plain("p50 ms", "{:.3f}", "latency_ms", "p50"),
    _plain("p99 ms", "{:.3f}", "latency_ms", "p99"),
    _added_us("p50 added us", "latency_ms", "p50"),
    _plain("connections to the engine", "{:,.0f}", "engine_connections"),
)
STREAMS: tuple[Column, ...] = (
    _plain("events/s", "{:,.0f}", "events_per_s"),
    _plain("offered", "{:,.0f}", "offered_per_s"),
    _plain("CPU us/event", "{:,.1f}", "cpu_us_per_event"),
    _ratio("CPU x nginx", "nginx", "cpu_us_per_event"),
    _plain("TTFT p50 ms", "{:.2f}", "first_ms", "p50"),
    _plain("TTFT p99 ms", "{:.2f}", "first_ms", "p99"),
    _added_us("TTFT p50 added us", "first_ms", "p50"),
    _plain("transit p50 ms", "{:.3f}", "transit_ms", "p50"),
    _added_us("transit p50 added us", "transit_ms", "p50"),
)
TABLES: tuple[tuple[str, str, tuple[Column, ...]], ...] = (
    ("c1", "Chat completions, 360 B in, 480 B out, 1 connection", REPLIES),
    ("c16", "Chat completions, 16 connections", REPLIES),
    ("c64", "Chat completions, 64 connections", REPLIES),
    ("s64", "64 streams that begin at once, 50 events/s each", STREAMS),
    ("s512", "512 streams that begin at once, 50 events/s each", STREAMS),
    ("large", "Embeddings of 2 MiB, 4 connections", REPLIES),
    ("upload", "Uploads of 10 MiB, 2 connections", REPLIES),
)


def _cell(run: Run, cell: str, title: str, columns: Sequence[Column]) -> str:
    rows = []
    for target in run.targets:
        if run.values(target, cell, "seconds"):
            rows.append([target, *(_form(of(run, target, cell), form) for _, of, form in columns)])
    return f"## {title}\n\n" + table(["", *(name for name, _, _ in columns)], rows) if rows else ""


def _fresh(run: Run) -> str:
    rows = []
    for target in run.targets:
        if run.fresh(target, "rss") is not None:
            row = [run.fresh(target, "start_s", "start_again_s"), _scaled(run.fresh(target, "rss"), MIB)]
            row += [_scaled(run.fresh(target, "tree_pss"), MIB), run.fresh(target, "processes")]
            row += [_scaled(run.fresh(target, "rss_stream"), KIB), _scaled(run.fresh(target, "tree_pss_stream"), KIB)]
            row += [_scaled(run.fresh(target, "upload_peak"), MIB)]
            rows.append([target, *(_form(value, form) for value, form in zip(row, FRESH_FORMS, strict=True))])
    head = ["", "start to 200, s", "idle RSS, MiB", "PSS of all, MiB", "processes"]
    head += ["RSS KiB/stream", "PSS KiB/stream", "MiB/upload at the peak"]
    return "## Processes that have served nothing yet\n\n" + table(head, rows) if rows else ""


FRESH_FORMS = ("{:.2f}", "{:.1f}", "{:.1f}", "{:.0f}", "{:.1f}", "{:.1f}", "{:.1f}")


def _form(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, and readable as text."""
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )
