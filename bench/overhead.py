"""What a gateway costs: the same engine, asked directly, through nginx, through Hostler, by turns.

    python bench/overhead.py                                # under three minutes: prints the tables
    python bench/overhead.py --quiet-full                   # for publishing: writes bench/results/overhead.md and .png
    python bench/overhead.py --cells c64,s512               # a part
    python bench/overhead.py --tree ../other-checkout       # both checkouts, paired
    python bench/overhead.py --with '{"workers": 2}'        # both ways to set it, paired
    python bench/overhead.py --peers vllm-router,litellm    # gateways of others too

Every repetition visits all targets in random order; a ratio is taken within a repetition, and the median of the ratios
is told. Traffic stays on loopback; every process that is started here is ended here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asks
import doors
import native
from doors import HOST, KEY, ROOT, Running, Setting, Target, all_targets
from figures import report
from native import BENCH, Failed

PEER_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hostler-bench"
WARM_UP_S = 0.3
WAVES = (
    7  # of short streams, for the time to the first byte: one burst alone tells more of the machine than of the door
)
STREAM_SLACK_S = 1.2  # a stream outlasts the time in which events count by so much, for those that begin late
HELD_STREAMS, HELD_PACE_MS, HELD_S = 1000, 500, 60
UPLOADS, UPLOAD_REQUESTS = 2, 8
SETTLE_S = 1.0
WAKE_S = 0.2
LEFT_OUT = ("hostler, plain door, Unix socket",)  # unless all is measured, or it is asked for


@dataclass(frozen=True)
class Cell:
    """One load, that every target gets."""

    name: str
    kind: str
    connections: int


CELLS = (
    Cell("c1", "chat", 1),
    Cell("c16", "chat", 16),
    Cell("c64", "chat", 64),
    Cell("s64", "stream", 64),
    Cell("s512", "stream", 512),
    Cell("large", "large", 4),
    Cell("upload", "upload", UPLOADS),
)
FRESH = "fresh"  # what is measured on processes that have served nothing yet


def main() -> int:
    options = parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        found = json.loads(options.read.read_text()) if options.read else measure_all(options)
    except Failed as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / f"{options.name}.md"
        picture = f"\n![The same as a picture]({options.name}.png)\n" if options.plot else ""
        file.write_text(text + picture)
        if options.plot:
            from drawing import draw

            draw(found, options.out / f"{options.name}.png")
        print(f"written: {file}", file=sys.stderr)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quiet-full", action="store_true", help="five repetitions of two seconds, written to --out")
    parser.add_argument("--seconds", type=float, help="counted in each run, after the warm-up")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--cells", help=f"of {', '.join(cell.name for cell in CELLS)}, {FRESH}; all if not given")
    parser.add_argument("--targets", help="names of targets, by commas after which no space stands; nginx is needed")
    parser.add_argument("--tree", type=Path, action="append", default=[], help="another checkout, measured beside ours")
    parser.add_argument(
        "--with",
        dest="settings",
        type=json.loads,
        action="append",
        default=[],
        help="""one more Hostler, with these settings, as JSON: '{"workers": 2}'""",
    )
    parser.add_argument("--peers", default="", help=f"gateways of others: {', '.join(doors.PEERS)}")
    parser.add_argument("--peer-folder", type=Path, default=PEER_FOLDER, help="where their environments are kept")
    parser.add_argument("--out", type=Path, help="folder for a table and a plot")
    parser.add_argument("--name", default="overhead", help="of the files in --out")
    parser.add_argument("--no-plot", dest="plot", action="store_false", help="no plot, which needs matplotlib")
    parser.add_argument("--json", type=Path, help="write every single run here")
    parser.add_argument("--read", type=Path, help="tell again what --json wrote, and measure nothing")
    options = parser.parse_args()
    options.seconds = options.seconds or (2.0 if options.quiet_full else 0.5)
    options.repetitions = options.repetitions or (5 if options.quiet_full else 2)
    options.out = options.out or (BENCH / "results" if options.quiet_full else None)
    options.peers = [name for name in options.peers.split(",") if name]
    if unknown := set(options.peers) - set(doors.PEERS):
        parser.error(f"there is no peer {', '.join(unknown)}")
    names = [*(cell.name for cell in CELLS), FRESH]
    options.cells = options.cells.split(",") if options.cells else names
    if unknown := set(options.cells) - set(names):
        parser.error(f"there is no cell {', '.join(unknown)}")
    if options.out and options.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("the plot needs matplotlib: install it, or say --no-plot")
    return options


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, and what they ran on."""
    cores = two_cores()
    targets = chosen(options)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        tools = native.build(folder)
        port, socket = stack.enter_context(native.mock_engine(tools, folder, core=cores[0]))
        setting = Setting(tools, port, socket, engine_core=cores[0], door_core=cores[1], folder=folder)
        bench = Bench(setting, targets, options)
        facts = facts_of(options, cores)
        fresh = bench.fresh() if FRESH in options.cells else []
        runs = bench.runs([cell for cell in CELLS if cell.name in options.cells])
        facts["load_after"] = os.getloadavg()[0]
    named = [{"name": one.name, "is_ours": one.is_ours, "shares": one.shares} for one in targets]
    return {"facts": facts, "targets": named, "fresh": fresh, "runs": runs}


def chosen(options: argparse.Namespace) -> list[Target]:
    trees = [tree.resolve() for tree in options.tree]
    targets = all_targets(options.peers, options.peer_folder, trees, options.settings)
    if not options.targets:
        return targets if options.quiet_full else [target for target in targets if target.name not in LEFT_OUT]
    wanted = re.split(r",(?! )", options.targets)
    if unknown := set(wanted) - {target.name for target in targets}:
        raise Failed(f"There is no target {unknown.pop()!r}, but {', '.join(target.name for target in targets)}.")
    return [target for target in targets if target.name in {*wanted, "direct", "nginx"}]


def two_cores() -> tuple[int | None, int | None]:
    """One for the client, the engines and the bench, one for the door; none if there are not two."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        print("fewer than two cores: nothing is pinned, and the figures say little", file=sys.stderr)
        return None, None
    native.pin_us(cores[0])
    return cores[0], cores[1]


def facts_of(options: argparse.Namespace, cores: tuple[int | None, int | None]) -> dict[str, Any]:
    """What a reader has to know of the run."""

    def said(*argv: str) -> str:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, cwd=ROOT)
        return (done.stdout + done.stderr).strip()

    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or ["unknown"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": said("git", "describe", "--always", "--dirty"),
        "python": sys.version.split()[0],
        "nginx": said("nginx", "-v").rpartition("/")[2],
        "kernel": os.uname().release,
        "machine": f"{len(models)} x {models[0]}",
        "cores": cores,
        "load_before": os.getloadavg()[0],
        "seconds": options.seconds,
        "repetitions": options.repetitions,
        "peers": {name: doors.PEERS[name].package for name in options.peers},
    }


class Bench:
    """Runs the cells, target by target."""

    def __init__(self, setting: Setting, targets: list[Target], options: argparse.Namespace) -> None:
        self._setting, self._targets, self._options = setting, targets, options
        self._direct: dict[str, bytes] = {}  # what the engine says to each kind of request

    # --- on processes that have served nothing

    def fresh(self) -> list[dict[str, Any]]:
        """Start, idle memory, open streams; then, on another process, uploads."""
        found = []
        for repetition in range(max(1, self._options.repetitions // 2)):
            doors_ = {target.shares or target.name: target for target in self._targets if target.name != "direct"}
            for target in random.sample(list(doors_.values()), len(doors_)):
                with self._named(target, FRESH):
                    one: dict[str, Any] = {"repetition": repetition, "target": target.name}
                    with target.start(self._setting) as running:
                        one |= {"start_s": running.start_s} | self._memory(target, running)
                    if not target.cells:
                        with target.start(self._setting) as running:
                            one |= {"start_again_s": running.start_s} | self._peak(target, running)
                    found.append(one)
            self._say(f"{FRESH}: repetition {repetition + 1} is done")
        return found

    def _memory(self, target: Target, running: Running) -> dict[str, Any]:
        time.sleep(SETTLE_S)
        idle = memory(running)
        if target.cells:
            return idle
        ask = asks.stream(target.model, HELD_S * 1000 // HELD_PACE_MS, HELD_PACE_MS)
        arguments = [*self._arguments(target, running, ask), "--connections", str(HELD_STREAMS)]
        with native.held(self._setting.tools, arguments, self._setting.engine_core):
            time.sleep(SETTLE_S)
            full = memory(running)
        per_stream = {f"{key}_stream": (full[key] - idle[key]) / HELD_STREAMS for key in ("rss", "tree_pss")}
        return idle | per_stream

    def _peak(self, target: Target, running: Running) -> dict[str, Any]:
        time.sleep(SETTLE_S / 2)
        for process in running.processes():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        before = peak_of(running)
        arguments = self._arguments(target, running, asks.upload(target.model))
        arguments += ["--connections", str(UPLOADS), "--requests", str(UPLOAD_REQUESTS)]
        native.load(self._setting.tools, arguments, self._setting.engine_core)
        return {"upload_peak": (peak_of(running) - before) / UPLOADS}

    # --- by turns

    def runs(self, cells: list[Cell]) -> list[dict[str, Any]]:
        """Every repetition, every cell, every target in random order."""
        found = []
        if not cells:
            return found
        with contextlib.ExitStack() as stack:
            running = self._start(stack)
            expected = self._expectations(cells, running)
            stack.enter_context(asleep([running[target.name] for target in self._targets if target.rests]))
            for repetition in range(self._options.repetitions):
                for cell in cells:
                    able = [target for target in self._targets if not target.cells or cell.name in target.cells]
                    for target in random.sample(able, len(able)):
                        with self._named(target, cell.name), awake(target, running[target.name]):
                            one = self._run(target, running[target.name], cell, expected)
                        found.append({"repetition": repetition, "target": target.name, "cell": cell.name, **one})
                self._say(f"repetition {repetition + 1} of {self._options.repetitions} is done")
        return found

    def _start(self, stack: contextlib.ExitStack) -> dict[str, Running]:
        running: dict[str, Running] = {}
        shared: dict[str, Running] = {}
        for target in self._targets:
            if target.shares not in shared or not target.shares:
                with self._named(target, "start"):
                    shared[target.shares] = stack.enter_context(target.start(self._setting))
            running[target.name] = shared[target.shares]
        return running

    def _expectations(self, cells: list[Cell], running: dict[str, Running]) -> dict[tuple[str, str], str]:
        """Files with the bodies that have to come back, by target and kind; none for who writes replies anew."""
        found: dict[tuple[str, str], str] = {}
        for cell in {cell.kind: cell for cell in cells}.values():
            for number, target in enumerate(self._targets):
                if target.cells and cell.name not in target.cells:
                    continue
                with self._named(target, f"a first look at {cell.kind}"):
                    ask = self._ask(target, cell)
                    direct = None if target.rebuilds else self._direct.get(cell.kind)
                    body = asks.expectation(ask, HOST, running[target.name].port, KEY, direct)
                    self._direct.setdefault(cell.kind, body)
                    if ask.events is None and not target.rebuilds:
                        file = self._setting.folder / f"expected-{number}-{cell.kind}"
                        found[target.name, cell.kind] = asks.write(file, body)
        return found

    def _ask(self, target: Target, cell: Cell) -> asks.Ask:
        if cell.kind == "stream":
            seconds = self._options.seconds + WARM_UP_S + STREAM_SLACK_S
            return asks.stream(target.model, int(seconds * 1000 / asks.PACE_MS))
        return {"chat": asks.chat, "large": asks.large, "upload": asks.upload}[cell.kind](target.model)

    def _arguments(self, target: Target, running: Running, ask: asks.Ask) -> list[str]:
        file = self._setting.folder / "request"
        arguments = ["--port", str(running.port), "--needle", ask.needle]
        arguments += ["--request", asks.write(file, ask.request(f"{HOST}:{running.port}", KEY))]
        if ask.events is not None:
            arguments += ["--events", str(ask.events), *([] if target.rebuilds else ["--exact"])]
        return arguments

    def _run(
        self, target: Target, running: Running, cell: Cell, expected: dict[tuple[str, str], str]
    ) -> dict[str, Any]:
        ask = self._ask(target, cell)
        arguments = self._arguments(target, running, ask)
        arguments += ["--connections", str(cell.connections), "--seconds", str(self._options.seconds)]
        arguments += ["--warm-up", str(WARM_UP_S), "--mode", "streams" if cell.kind == "stream" else "replies"]
        if (target.name, cell.kind) in expected:
            arguments += ["--expect", expected[target.name, cell.kind]]
        if processes := running.processes():
            arguments += ["--pids", ",".join(str(process.pid) for process in processes)]
        before = doors.counted(running, target.model)
        one = native.load(self._setting.tools, arguments, self._setting.engine_core)
        if cell.kind == "stream":
            one["first_ms"] = self._first_ms(target, running, cell)
        after = doors.counted(running, target.model)
        one["engine_connections"] = after["accepted"] - before["accepted"] - 1  # the last is our own look
        one["requests_per_s"] = one["requests"] / one["seconds"]
        one["events_per_s"] = one["events"] / one["seconds"]
        one["cpu_us_per_request"] = one["cpu_s"] * 1e6 / one["requests"] if cell.kind != "stream" else None
        one["cpu_us_per_event"] = one["cpu_s"] * 1e6 / one["events"] if one["events"] else None
        if cell.kind == "stream":
            one["offered_per_s"] = cell.connections * 1000 / asks.PACE_MS
            if one["over"] < cell.connections:
                self._say(f"{target.name}, {cell.name}: only {one['over']} streams of {cell.connections} ended in time")
        return one

    def _first_ms(self, target: Target, running: Running, cell: Cell) -> dict[str, float]:
        """Of bursts of new connections that each ask for a short stream: the medians over the bursts."""
        arguments = self._arguments(target, running, asks.stream(target.model, events=2))
        arguments += ["--connections", str(cell.connections), "--mode", "streams", "--seconds", "0", "--warm-up", "0"]
        core = self._setting.engine_core
        waves = [native.load(self._setting.tools, arguments, core)["first_ms"] for _ in range(WAVES)]
        return {name: statistics.median(wave[name] for wave in waves) for name in ("p50", "p99")}

    @contextlib.contextmanager
    def _named(self, target: Target, what: str) -> Iterator[None]:
        try:
            yield
        except Failed as exc:
            raise Failed(f"{target.name}, {what}: {exc}") from exc

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def asleep(all_running: list[Running]) -> Iterator[None]:
    """Doors that do things of their own accord, stopped while it is not their turn."""
    for running in all_running:
        for process in running.processes():
            process.suspend()
    try:
        yield
    finally:
        for running in all_running:
            for process in running.processes():
                process.resume()


@contextlib.contextmanager
def awake(target: Target, running: Running) -> Iterator[None]:
    """For its turn."""
    if not target.rests:
        yield
        return
    for process in running.processes():
        process.resume()
    time.sleep(WAKE_S)  # what they have slept over
    try:
        yield
    finally:
        for process in running.processes():
            process.suspend()


def memory(running: Running) -> dict[str, float]:
    """Bytes: RSS of the door's own process; PSS of all that it has started, engines left out."""
    processes = running.processes()
    return {
        "rss": processes[0].memory_info().rss,
        "tree_pss": sum(one.memory_full_info().pss for one in processes),
        "processes": len(processes),
    }


def peak_of(running: Running) -> int:
    """The most that each process had in memory since it was last asked to forget it, in sum; bytes."""
    status = [Path(f"/proc/{one.pid}/status").read_text() for one in running.processes()]
    return sum(int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) * 1024 for text in status)


if __name__ == "__main__":
    sys.exit(main())
