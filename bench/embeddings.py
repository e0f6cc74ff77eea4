"""What dynamic batching gives: 256 embeddings asked for at once, against the library in a loop of its own.

    python bench/embeddings.py --python PYTHON [--model FOLDER] [--repetitions 5] [--threads 1]

PYTHON is one that has sentence-transformers. Every repetition visits all ways in random order; a ratio is taken within
a repetition, and the median of the ratios is printed. The library and the worker have the same number of threads.
Traffic stays on loopback; every process that is started here is ended here.
"""

import argparse
import asyncio
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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil

ROOT = Path(__file__).resolve().parents[1]
INPUTS = 256
LONG_INPUTS, LONG_WORDS = 64, 8000
START_LIMIT_S = 300.0
KEEPALIVE_S = 2.0  # servers close what is idle for 5 s, and the ways take turns
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
UID = "bench"

# Reads what to do line by line: ONE (each text by itself) or ALL; answers with seconds and its peak memory in KiB.
LIBRARY = """
import json, re, sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps([0, peak()]), flush=True)
for line in sys.stdin:
    how, texts = json.loads(line)
    begin = time.perf_counter()
    if how == "ONE":
        for text in texts:
            model.encode(text, normalize_embeddings=True)
    else:
        model.encode(texts, normalize_embeddings=True)
    print(json.dumps([time.perf_counter() - begin, peak()]), flush=True)
"""

Way = Callable[[], Awaitable[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="one that has sentence-transformers")
    parser.add_argument("--model", help="a folder of sentence-transformers; MiniLM if not given")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.python:
        sys.exit("Give --python, one that has sentence-transformers: `hostler engines install sentence-transformers`.")
    if not options.model:
        sys.path.insert(0, str(ROOT / "tests"))
        from models import minilm

        options.model = str(minilm())
    asyncio.run(measure(options))


async def measure(options: argparse.Namespace) -> None:
    random.seed(options.seed)
    texts = [f"Number {n}: " + " ".join(random.choices(WORDS, k=random.randint(3, 60))) for n in range(INPUTS)]
    long_texts = [" ".join(random.choices(WORDS, k=LONG_WORDS)) for _ in range(LONG_INPUTS)]
    async with a_library(options) as library, a_gateway(options) as (gateway, worker, pid):
        ways: dict[str, Way] = {
            "library, all at once": lambda: library("ALL", texts),
            "library, one by one": lambda: library("ONE", texts),
            "worker, 256 requests at once": lambda: at_once(worker, texts),
            "gateway, 256 requests at once": lambda: at_once(gateway, texts),
            "worker, one request of 256": lambda: ask(worker, texts),
            "gateway, one request of 256": lambda: ask(gateway, texts),
        }
        for way in ways.values():
            await way()  # once for nothing
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repetitions):
            for name in random.sample(list(ways), len(ways)):
                seconds[name].append(await ways[name]())
        print_speed(seconds, next(iter(ways)))
        before = peak_kib(pid)
        took = await ask(worker, long_texts)
        print(
            f"\n{LONG_INPUTS} inputs of {LONG_WORDS} words in one request: {took:.1f} s; peak memory of the worker "
            f"{before / 1024:.0f} -> {peak_kib(pid) / 1024:.0f} MiB"
        )
        before = library.peak_kib
        took = await library("ALL", long_texts)
        print(
            f"the same by the library: {took:.1f} s; peak memory {before / 1024:.0f} -> "
            f"{library.peak_kib / 1024:.0f} MiB"
        )


WORDS = [
    *("the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over"),
    *("old", "towns", "and", "people", "read", "letters", "from", "far", "away", "friends"),
]


def print_speed(seconds: dict[str, list[float]], base: str) -> None:
    print(f"{'way':32} {'median s':>9} {'inputs/s':>9} {'speed against ' + base:>38}")
    for name, found in seconds.items():
        ratio = statistics.median(of_base / own for of_base, own in zip(seconds[base], found, strict=True))
        median = statistics.median(found)
        print(f"{name:32} {median:9.2f} {INPUTS / median:9.0f} {ratio:38.2f}")


class Client:
    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self.session, self.url = session, f"{address}/v1/embeddings"

    async def embed(self, given: str | list[str]) -> None:
        async with self.session.post(self.url, json={"model": UID, "input": given}) as answer:
            body = await answer.json()
            assert answer.status == 200, body
            assert len(body["data"]) == (1 if isinstance(given, str) else len(given))


async def at_once(client: Client, texts: list[str]) -> float:
    begin = time.perf_counter()
    await asyncio.gather(*(client.embed(text) for text in texts))
    return time.perf_counter() - begin


async def ask(client: Client, texts: list[str]) -> float:
    begin = time.perf_counter()
    await client.embed(texts)
    return time.perf_counter() - begin


class Library:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process, self.peak_kib = process, 0

    async def answer(self) -> float:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, "the library's process has ended"
        seconds, self.peak_kib = json.loads(line)
        return float(seconds)

    async def __call__(self, how: str, texts: list[str]) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([how, texts]).encode() + b"\n")
        await self._process.stdin.drain()
        return await self.answer()


@asynccontextmanager
async def a_library(options: argparse.Namespace) -> AsyncIterator[Library]:
    process = await asyncio.create_subprocess_exec(
        *(options.python, "-P", "-c", LIBRARY, options.model, str(options.threads)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=clean_environment() | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        limit=2**20,
    )
    try:
        library = Library(process)
        await asyncio.wait_for(library.answer(), START_LIMIT_S)
        yield library
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def a_gateway(options: argparse.Namespace) -> AsyncIterator[tuple[Client, Client, int]]:
    """A gateway with the model loaded: its client, a client of its worker, and the worker's process."""
    with tempfile.TemporaryDirectory(prefix="hostler-bench-") as home:
        model = {"model_path": options.model, "model_type": "embedding", "options": {"n_threads": options.threads}}
        settings = {
            "engines": {"sentence-transformers": {"python": options.python}},
            "models": {UID: model | {"preload": True}},
        }
        file, log = Path(home, "settings.json"), Path(home, "log")
        file.write_text(json.dumps(settings))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gateway.cli", "serve", "-c", str(file), "--port", "0", "--home", home],
                stdout=output,
                stderr=output,
                env=clean_environment() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'gateway' / 'sdk'}"},
            )
        try:
            through = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            async with aiohttp.ClientSession(connector=through, timeout=LONG) as session:
                address = await until(lambda: ADDRESS.search(log.read_text()))
                replica = await ready(session, address[0])
                key = psutil.Process(replica["pid"]).environ()["WORKER_API_KEY"]
                connector = aiohttp.UnixConnector(
                    replica["address"].removeprefix("unix:"), limit=0, keepalive_timeout=KEEPALIVE_S
                )
                headers = {"authorization": f"Bearer {key}"}
                async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=LONG) as direct:
                    yield Client(session, address[0]), Client(direct, "http://worker"), replica["pid"]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


LONG = aiohttp.ClientTimeout(total=1200)


async def ready(session: aiohttp.ClientSession, address: str) -> dict:
    async with asyncio.timeout(START_LIMIT_S):
        while True:
            async with session.get(f"{address}/v1/replicas") as answer:
                (replica,) = await answer.json()
            assert replica["state"] != "failed", replica
            if replica["state"] == "ready":
                return replica
            await asyncio.sleep(0.2)


async def until(condition: Callable[[], object]) -> object:
    async with asyncio.timeout(START_LIMIT_S):
        while not (found := condition()):
            await asyncio.sleep(0.05)
        return found


def clean_environment() -> dict[str, str]:
    """Without settings of ours, and without what would have torch compiled anew at every start."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HOSTLER_") and name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
    }


def peak_kib(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    main()
