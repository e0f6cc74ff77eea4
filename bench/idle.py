"""What the gateway takes before anybody asks it: how long its start is, and how much memory it holds.

    python bench/idle.py [--tree ../other-checkout] [--repetitions 7]
    python bench/idle.py --owners          # instead: what each package that is imported adds to the memory

Several checkouts take turns. Of each: `hostler serve` without a model, and with two mock engines that are ready; the
first request to one of them, and the tenth. The first round writes Python's bytecode, as installers do, and is not
counted.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import asks
import doors
import native
from doors import HOST, KEY, ROOT, Running, Setting
from native import Failed

SETTLE_S = 1.5
MIB = 2**20
HEAD = (
    *("start to 200, s", "CPU of it, s", "RSS, MiB", "PSS, MiB", "threads"),
    *("with 2 models: start to 200, s", "RSS, MiB", "first request, ms", "tenth, ms", "RSS after, MiB"),
)

OWNERS = """
import _frozen_importlib, importlib, sys

def rss():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss:"))

within, own = [], {}
load = _frozen_importlib._load_unlocked

def looked_at(spec):
    before = rss()
    within.append(0)
    try:
        return load(spec)
    finally:
        grown = rss() - before
        own[spec.name] = grown - within.pop()
        if within:
            within[-1] += grown

begin = rss()
_frozen_importlib._load_unlocked = looked_at
for name in MODULES:
    importlib.import_module(name)
print(begin, rss())
for name, grown in own.items():
    print(name, grown)
"""
SERVING = ("gateway.cli.serve", "gateway.server", "uvicorn.protocols.http.httptools_impl", "uvicorn.loops.auto")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tree", type=Path, action="append", default=[], help="another checkout")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--owners", action="store_true", help="what holds the memory")
    options = parser.parse_args()
    trees = [ROOT, *(tree.resolve() for tree in options.tree)]
    with tempfile.TemporaryDirectory(prefix="idle-") as name:
        folder = Path(name)
        try:
            if options.owners:
                for tree in trees:
                    print(owners(tree))
                return 0
            setting = Setting(native.build(folder), 0, "", None, None, folder)
            for tree in trees:
                measure(setting, tree)  # uncounted: bytecode, and the pages of files
            runs = [{tree: measure(setting, tree) for tree in trees} for _ in range(options.repetitions)]
        except Failed as exc:
            print(f"idle: {exc}", file=sys.stderr)
            return 1
    print(table(trees, runs))
    return 0


def measure(setting: Setting, tree: Path) -> list[float]:
    """The columns of the table."""
    with doors.hostler(tree, models={})(setting) as running:
        process = running.processes()[0]
        times = process.cpu_times()
        time.sleep(SETTLE_S)
        memory = process.memory_full_info()
        alone = [running.start_s, times.user + times.system, memory.rss / MIB, memory.pss / MIB, process.num_threads()]
    with doors.hostler(tree)(setting) as running:
        process = running.processes()[0]
        time.sleep(SETTLE_S)
        ready = process.memory_info().rss / MIB
        asked = [ask_ms(running) for _ in range(10)]
        return [*alone, running.start_s, ready, asked[0], asked[-1], process.memory_info().rss / MIB]


def ask_ms(running: Running) -> float:
    """One chat completion, on a connection of its own."""
    ask = asks.chat("mock-tcp")
    connection = http.client.HTTPConnection(HOST, running.port, timeout=native.START_LIMIT_S)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    try:
        since = time.perf_counter()
        connection.request("POST", ask.path, ask.body, headers)
        reply = connection.getresponse()
        body = reply.read()
        took = time.perf_counter() - since
    finally:
        connection.close()
    if reply.status != 200 or ask.needle not in body.decode():
        raise Failed(f"{ask.path} answered {reply.status}: {body[:300]!r}")
    return took * 1000


def table(trees: list[Path], runs: list[dict[Path, list[float]]]) -> str:
    """Medians, and from least to most."""
    lines = [f"| {len(runs)} starts, by turns | " + " | ".join(tree.name for tree in trees) + " |"]
    lines.append("| --- " * (len(trees) + 1) + "|")
    for column, name in enumerate(HEAD):
        cells = []
        for tree in trees:
            found = [run[tree][column] for run in runs]
            cells.append(f"{statistics.median(found):.3g} ({min(found):.3g} to {max(found):.3g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def owners(tree: Path) -> str:
    """What each package adds; shared libraries are within."""
    env = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'gateway' / 'sdk'}"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    argv = [sys.executable, "-P", "-c", OWNERS.replace("MODULES", json.dumps(SERVING))]
    for _ in range(2):  # the first may have to compile
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=native.START_LIMIT_S)
        if done.returncode:
            raise Failed(f"{tree}: {done.stderr.strip()}")
    first, *lines = done.stdout.splitlines()
    begin, end = map(int, first.split())
    found: Counter[str] = Counter()
    for line in lines:
        name, _, grown = line.rpartition(" ")
        found[name.partition(".")[0]] += int(grown)
    told = [f"{tree.name}: the interpreter {begin / 1024:.1f} MiB, with all imports {end / 1024:.1f} MiB"]
    return "\n".join([*told, *(f"  {name:24}{grown:7} KiB" for name, grown in found.most_common(40))])


if __name__ == "__main__":
    sys.exit(main())
