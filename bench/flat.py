"""Ten million events through one gateway: its memory has to stay where it is after the first of them.

    python bench/flat.py [--events 10000000] [--model mock-tcp] [--door plain] [--plot flat.png] [--json FILE]

Rounds of 512 streams with 500 events each, 20 ms apart, on new connections; every event is checked. Memory is the most
that the process had in a round. The first fifth, in which pools fill, is not judged; growth is the slope of a line
through the rest; exit code 1 if it is more than the limit. Seven minutes, if the pace is held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import asks
import doors
import native
import psutil
from doors import HOST, KEY, Running, Setting
from native import Failed

STREAMS, EVENTS, PACE_MS = 512, 500, 20
LOOK_S = 0.25
SETTLE_S = 1.0  # until the connections of a round are closed
MIB = 2**20
LIMIT_KIB = 100.0  # of growth for a million events: a byte in ten events


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--model", choices=["mock-unix", "mock-tcp"], default="mock-unix")
    parser.add_argument("--door", help="a value of the setting `door`")
    parser.add_argument("--plot", type=Path, help="write a picture there (matplotlib)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2] if len(os.sched_getaffinity(0)) > 1 else [None, None]
    native.pin_us(cores[0])
    with tempfile.TemporaryDirectory(prefix="flat-") as name:
        folder = Path(name)
        try:
            setting = Setting(native.build(folder), 0, "", cores[0], cores[1], folder)
            more = {"door": options.door} if options.door else {}
            with doors.hostler(**more)(setting) as running:
                rounds = run(setting, running, options)
        except Failed as exc:
            print(f"flat: {exc}", file=sys.stderr)
            return 1
    growth = growth_kib(rounds)
    report(rounds, growth)
    if options.json:
        options.json.write_text(json.dumps(rounds))
    if options.plot:
        draw(rounds, growth, options.plot)
    return 0 if growth is not None and growth <= LIMIT_KIB else 1


def run(setting: Setting, running: Running, options: argparse.Namespace) -> list[dict[str, float]]:
    """Round after round, each with all its events."""
    ask = asks.stream(options.model, EVENTS, PACE_MS)
    file = asks.write(setting.folder / "request", ask.request(f"{HOST}:{running.port}", KEY))
    arguments = ["--port", str(running.port), "--request", file, "--events", str(EVENTS), "--exact"]
    arguments += ["--connections", str(STREAMS), "--requests", str(STREAMS)]
    assert running.pid is not None
    process = psutil.Process(running.pid)
    events, rounds = 0, [{"events": 0.0, "rss": float(process.memory_info().rss), "files": float(process.num_fds())}]
    while events < options.events:
        with looking(process) as seen:
            begin = time.monotonic()
            counted = native.load(setting.tools, arguments, setting.engine_core)
            seconds = time.monotonic() - begin
        events += counted["events"]
        rounds.append(
            {"events": events, "rss": max(seen), "files": process.num_fds(), "rate": counted["events"] / seconds}
        )
        print(f"{events:>12,} events, {max(seen) / MIB:.2f} MiB", file=sys.stderr, flush=True)
    return rounds


@contextlib.contextmanager
def looking(process: psutil.Process) -> Any:
    """The memory of a process, again and again until the block is left."""
    seen: list[float] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(LOOK_S):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def judged(rounds: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without the first fifth."""
    return rounds[1 + len(rounds) // 5 :]


def growth_kib(rounds: list[dict[str, float]]) -> float | None:
    """For a million events; None of too few rounds for a line."""
    rest = judged(rounds)
    if len(rest) < 3:
        return None
    millions, kib = [one["events"] / 1e6 for one in rest], [one["rss"] / 1024 for one in rest]
    return statistics.linear_regression(millions, kib).slope


def report(rounds: list[dict[str, float]], growth: float | None) -> None:
    """One line for each figure."""
    rest = judged(rounds)
    if growth is None:
        print("too few events to tell growth")
        return
    print(f"{rounds[-1]['events']:,.0f} events, each as the engine sent it, {median(rest, 'rate'):,.0f} a second")
    print(
        f"memory: {rounds[0]['rss'] / 2**20:.1f} MiB before, {median(rest, 'rss') / 2**20:.1f} MiB in the median round"
    )
    print(f"growth: {growth:+.1f} KiB for a million events; at most {LIMIT_KIB:g}")
    print(f"open files at the end of a round: {rest[0]['files']:.0f} at first, {rest[-1]['files']:.0f} at last")


def median(rounds: list[dict[str, float]], name: str) -> float:
    """Of all rounds."""
    return statistics.median(one[name] for one in rounds)


def draw(rounds: list[dict[str, float]], growth: float | None, path: Path) -> None:
    """Memory over events."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 3.2), layout="constrained")
    axis.plot(
        [one["events"] / 1e6 for one in rounds], [one["rss"] / 2**20 for one in rounds], marker=".", color="#c2410c"
    )
    axis.set(xlabel="million events relayed", ylabel="RSS, MiB", ylim=(0, None))
    axis.set_title(
        f"{STREAMS} streams at once; growth {growth or 0:+.1f} KiB for a million events", fontsize=11, loc="left"
    )
    axis.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
