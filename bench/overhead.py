"""What Hostler adds to a request: the same engine, directly and through the gateway, by turns.

    python bench/overhead.py [--seconds 2] [--repetitions 5] [--connections 1,16,64] [--json FILE]

Every repetition visits all targets in random order; a ratio is taken within a repetition, and the median of
the ratios is printed. Traffic stays on loopback; every process that is started here is ended here.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import secrets
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

BENCH = Path(__file__).resolve().parent
MOCK_ENGINE = BENCH / "mock_engine.py"
LOAD = BENCH / "load.py"
ROOT = BENCH.parent

START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
LARGE_CONNECTIONS = 4
STREAMS = 64
HELD_STREAMS = 200
ADDRESS = r"http://127\.0\.0\.1:(\d+)"
LOOPBACK = {"127.0.0.1", "localhost", "::1"}

SETTINGS = """\
engines:
  llama.cpp:
    binary: {engine}
models:
  mock:
    model_path: {model}
    preload: true
"""

NGINX = """\
daemon off;
master_process off;
worker_processes 1;
error_log {folder}/error.log;
pid {folder}/nginx.pid;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    upstream engine {{
        server 127.0.0.1:{upstream};
        keepalive 512;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


class Failed(Exception):
    """The bench cannot go on; the sentence says why."""


@dataclass(frozen=True)
class Target:
    name: str
    url: str
    key: str
    pid: int | None  # of the process in the middle; None: there is nothing in the middle


@dataclass(frozen=True)
class Cell:
    kind: str
    connections: int


def main() -> int:
    options = parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with contextlib.ExitStack() as stack:
            cores = two_cores()
            targets = start_targets(options, cores, stack)
            memory = [hold(target, cores, options) for target in targets if target.pid]
            runs = measure(targets, cells(options), options, cores)
    except Failed as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    report(targets, cells(options), runs, memory)
    if options.json:
        found = {"targets": [asdict(target) for target in targets], "memory": memory, "runs": runs}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="counted for each run, after the warm-up")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--connections", default="1,16,64", help="for chat completions that are not streamed")
    parser.add_argument("--json", type=Path, help="write every single run here too")
    parser.add_argument("--no-gateway", action="store_true", help="leave Hostler out: a check of the bench itself")
    parser.add_argument("--target-url", help="measure this door too; it must run the mock engine as model `mock`")
    parser.add_argument("--target-key", default="none")
    parser.add_argument("--target-pid", type=int)
    options = parser.parse_args()
    options.connections = [int(number) for number in options.connections.split(",")]
    if options.target_url and urlsplit(options.target_url).hostname not in LOOPBACK:
        parser.error("--target-url has to be on loopback")
    return options


def cells(options: argparse.Namespace) -> list[Cell]:
    chats = [Cell("chat", connections) for connections in options.connections]
    return [*chats, Cell("stream", STREAMS), Cell("large", LARGE_CONNECTIONS)]


# Starting and ending


def start_targets(options: argparse.Namespace, cores: list[int], stack: contextlib.ExitStack) -> list[Target]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    key = secrets.token_hex(16)
    port = stack.enter_context(mock_engine(folder, key, cores))
    targets = [Target("direct", f"http://127.0.0.1:{port}", key, None)]
    if not options.no_gateway:
        targets.append(stack.enter_context(hostler(folder, cores)))
    if options.target_url:
        targets.append(Target("given", options.target_url, options.target_key, options.target_pid))
    if shutil.which("nginx"):
        targets.append(stack.enter_context(nginx(folder, port, key, cores)))
    else:
        print("nginx is not on PATH: no reference beside the direct way")
    return targets


@contextlib.contextmanager
def mock_engine(folder: Path, key: str, cores: list[int]) -> Iterator[int]:
    log = folder / "mock.log"
    argv = [sys.executable, MOCK_ENGINE, "--host", "127.0.0.1", "--port", "0", "--api-key", key]
    with child(argv, log) as process:
        found = wait_for_text(process, log, ADDRESS)
        pin(process.pid, cores[:1])
        yield int(found[1])


@contextlib.contextmanager
def hostler(folder: Path, cores: list[int]) -> Iterator[Target]:
    model = folder / "mock.gguf"
    model.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    settings = folder / "hostler.yaml"
    settings.write_text(SETTINGS.format(engine=json.dumps(str(MOCK_ENGINE)), model=json.dumps(str(model))))
    log = folder / "hostler.log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the mock's python3 is ours
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOSTLER_HOME": str(folder / "home")}
    argv = [sys.executable, "-P", "-m", "gateway.cli", "serve", "-c", str(settings), "--port", "0"]
    with child(argv, log, env) as process:
        url = wait_for_text(process, log, ADDRESS)[0]
        wait_for_ready(process, log, f"{url}/ready")
        pin(process.pid, cores[1:])
        engines = [engine for engine in descendants(process.pid) if is_mock(engine)]
        for engine in engines:
            pin(engine.pid, cores[:1])
        print(f"Hostler reaches its engine over {', '.join(sorted({address_of(e) for e in engines}))}")
        yield Target("hostler", url, "none", process.pid)


@contextlib.contextmanager
def nginx(folder: Path, upstream: int, key: str, cores: list[int]) -> Iterator[Target]:
    port = free_port()
    settings = folder / "nginx.conf"
    settings.write_text(NGINX.format(folder=folder, port=port, upstream=upstream))
    log = folder / "nginx.log"
    with child(["nginx", "-p", str(folder), "-c", str(settings)], log) as process:
        wait_for_ready(process, log, f"http://127.0.0.1:{port}/health")
        pin(process.pid, cores[1:])
        yield Target("nginx", f"http://127.0.0.1:{port}", key, process.pid)


@contextlib.contextmanager
def child(argv: list, log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A process of ours, ended with all that it started, whichever way we leave."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=end_with_parent
        )
    try:
        yield process
    finally:
        started = descendants(process.pid)
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"overhead: {argv[0]} did not end within {STOP_LIMIT_S:.0f} s of SIGTERM", file=sys.stderr)
            process.kill()
            process.wait()
        for left in [left for left in started if left.is_running()]:
            print(f"overhead: process {left.pid} was left behind; ending it", file=sys.stderr)
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Also when the bench is killed: the kernel then sends SIGTERM."""
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGTERM)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_mock(process: psutil.Process) -> bool:
    return any(word.endswith(MOCK_ENGINE.name) for word in process.cmdline())


def address_of(engine: psutil.Process) -> str:
    words = engine.cmdline()
    is_unix = any(word.endswith(".sock") for word in words)
    return "a Unix socket" if is_unix else "TCP"


def wait_for_text(process: subprocess.Popen, log: Path, pattern: str) -> re.Match:
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        if found := re.search(pattern, log.read_text(errors="replace")):
            return found
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise Failed(f"{process.args[0]} did not say where it listens; its last lines:\n{tail(log)}")


def wait_for_ready(process: subprocess.Popen, log: Path, url: str) -> None:
    limit = time.monotonic() + START_LIMIT_S
    said = "nothing"
    while time.monotonic() < limit and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except urllib.error.HTTPError as error:
            said = f"{error.code} {error.read(500).decode(errors='replace')}"
        except OSError as error:
            said = str(error)
        time.sleep(0.05)
    raise Failed(f"{url} was not ready, it said: {said}; the last lines of the log:\n{tail(log)}")


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_cores() -> list[int]:
    """The first for the client and the engines, the second for the middle; none if there are not two."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        print("fewer than two cores can be pinned: nothing is, and the figures say little")
        return []
    cores = sorted(os.sched_getaffinity(0))[:2]
    print(f"client and engine are pinned to core {cores[0]}, the gateway to core {cores[1]}")
    return cores


def pin(pid: int, cores: list[int]) -> None:
    """All threads: the affinity of a process is that of its first thread only."""
    if cores:
        for thread in psutil.Process(pid).threads():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, cores)


# Measuring


def measure(targets: list[Target], cells: list[Cell], options: argparse.Namespace, cores: list[int]) -> list[dict]:
    runs = []
    for repetition in range(options.repetitions):
        for cell in cells:
            for target in random.sample(targets, len(targets)):
                found = load(target, cell, options, cores)
                runs.append({"repetition": repetition, "target": target.name, **asdict(cell), **found})
        print(f"repetition {repetition + 1} of {options.repetitions} is done", file=sys.stderr)
    return runs


def hold(target: Target, cores: list[int], options: argparse.Namespace) -> dict:
    time.sleep(0.5)
    return {"target": target.name, **load(target, Cell("hold", HELD_STREAMS), options, cores)}


def load(target: Target, cell: Cell, options: argparse.Namespace, cores: list[int]) -> dict:
    argv = [sys.executable, LOAD, "--url", target.url, "--key", target.key, "--kind", cell.kind]
    argv += ["--connections", str(cell.connections), "--seconds", str(options.seconds)]
    argv += ["--pid", str(target.pid)] if target.pid else []

    def settle() -> None:
        end_with_parent()
        if cores:
            os.sched_setaffinity(0, cores[:1])

    limit = options.seconds + START_LIMIT_S
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit, preexec_fn=settle)
    except subprocess.TimeoutExpired:
        raise Failed(f"{target.name}, {cell.kind}: the load did not end within {limit:.0f} s") from None
    if done.returncode:
        raise Failed(f"{target.name}, {cell.kind} x {cell.connections}: {done.stderr.strip()}")
    return json.loads(done.stdout)


# Telling


def report(targets: list[Target], cells: list[Cell], runs: list[dict], memory: list[dict]) -> None:
    for cell in cells:
        columns = STREAM_COLUMNS if cell.kind == "stream" else REPLY_COLUMNS
        print(f"\n{TITLES[cell.kind].format(cell.connections)}\n")
        rows = [[target.name, *(tell(cell, runs, target.name) for tell in columns.values())] for target in targets]
        print_table(["target", *columns], rows)
    if memory:
        print(f"\nMemory, before any other load, MiB; then with {HELD_STREAMS} open streams, and KiB for each\n")
        rows = [
            [
                held["target"],
                f"{held['rss_idle_bytes'] / 2**20:.1f}",
                f"{held['rss_held_bytes'] / 2**20:.1f}",
                f"{(held['rss_held_bytes'] - held['rss_idle_bytes']) / 2**10 / held['streams']:.1f}",
            ]
            for held in memory
        ]
        print_table(["target", "RSS idle", "RSS held", "KiB/stream"], rows)


TITLES = {
    "chat": "Chat completions, 360 B in, 480 B out, {} connections",
    "stream": "Streams of 50 events at 5 ms, {} at once",
    "large": "Replies of 2 MiB, {} connections",
}


def values(cell: Cell, runs: list[dict], target: str, *path: str) -> list[float]:
    """One for each repetition, in order."""
    found = [
        run for run in runs if (run["target"], run["kind"], run["connections"]) == (target, cell.kind, cell.connections)
    ]
    for name in path:
        found = [run[name] for run in found]
    return found


def middle(*path: str, form: str = "{:,.0f}"):
    return lambda cell, runs, target: form.format(statistics.median(values(cell, runs, target, *path)))


def ratio(*path: str, to: str):
    """The median of the ratios within a repetition; empty for a target that is not there or used no time."""

    def tell(cell: Cell, runs: list[dict], target: str) -> str:
        pairs = zip(values(cell, runs, target, *path), values(cell, runs, to, *path), strict=False)
        ratios = [mine / other for mine, other in pairs if other]
        return f"{statistics.median(ratios):.2f}" if ratios else "-"

    return tell


def added(*path: str):
    """Microseconds on top of the direct way: the median of the differences within a repetition."""

    def tell(cell: Cell, runs: list[dict], target: str) -> str:
        pairs = zip(values(cell, runs, target, *path), values(cell, runs, "direct", *path), strict=True)
        return f"{statistics.median(mine - direct for mine, direct in pairs) * 1000:+,.0f}"

    return tell


REPLY_COLUMNS = {
    "req/s": middle("requests_per_s"),
    "of direct": ratio("requests_per_s", to="direct"),
    "of nginx": ratio("requests_per_s", to="nginx"),
    "p50 ms": middle("latency_ms", "p50", form="{:.2f}"),
    "p99 ms": middle("latency_ms", "p99", form="{:.2f}"),
    "p50 added us": added("latency_ms", "p50"),
    "p99 x direct": ratio("latency_ms", "p99", to="direct"),
    "CPU us/req": middle("cpu_us_per_request", form="{:.1f}"),
    "CPU x nginx": ratio("cpu_us_per_request", to="nginx"),
}
STREAM_COLUMNS = {
    "events/s": lambda cell, runs, target: f"{statistics.median(event_rates(cell, runs, target)):,.0f}",
    "TTFT p50 ms": middle("first_ms", "p50", form="{:.2f}"),
    "TTFT added us": added("first_ms", "p50"),
    "TTFT p99 added us": added("first_ms", "p99"),
    "transit p50 us": lambda cell, runs, target: (
        f"{statistics.median(values(cell, runs, target, 'transit_ms', 'p50')) * 1000:,.0f}"
    ),
    "transit added us": added("transit_ms", "p50"),
    "transit p99 added us": added("transit_ms", "p99"),
    "CPU us/event": middle("cpu_us_per_event", form="{:.1f}"),
    "CPU x nginx": ratio("cpu_us_per_event", to="nginx"),
}


def event_rates(cell: Cell, runs: list[dict], target: str) -> list[float]:
    counts = values(cell, runs, target, "events")
    return [count / seconds for count, seconds in zip(counts, values(cell, runs, target, "seconds"), strict=True)]


def print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(word.rjust(w) for word, w in zip(row[1:], widths[1:], strict=True)),
                ]
            )
        )


if __name__ == "__main__":
    sys.exit(main())
