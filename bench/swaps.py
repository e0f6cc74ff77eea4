"""Ten models, memory for three: how often they are swapped, and how long clients wait, against a plain LRU.

    python bench/swaps.py                                     # both policies on one trace, in virtual time
    python bench/swaps.py --real fake                         # the same trace through a gateway, with fake engines
    python bench/swaps.py --real model.gguf --models 5 --requests 200    # ... and with real ones
    python bench/swaps.py --plot swaps.svg                    # what was loaded when, and the waits (matplotlib)

Fifty clients ask in turn: each stays with a model for some requests, then takes another, by popularity. The trace is
what each client asks for, for how long it is answered and how long it thinks; the next request comes after the answer,
as with people. In virtual time Hostler's own deployments and dispatcher decide; only engines are made up. The plain LRU
unloads the model that was used last the longest ago, whenever one is asked for that has no room, and never a busy one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import aiohttp  # noqa: E402
import msgspec  # noqa: E402
from simulated import GB, Model, World  # noqa: E402
from virtual_time import virtual_time  # noqa: E402

from engines.base import RAM  # noqa: E402
from gateway.config import Settings  # noqa: E402

START_LIMIT_S = 60.0
RUN_LIMIT_S = 3600.0
FAKE_ENGINE = ROOT / "tests" / "fake_engine.py"


class Ask(msgspec.Struct, frozen=True):
    """One request of a client: after so much thinking, of that model, answered for so long."""

    think_s: float
    uid: str
    service_s: float


class Outcome(msgspec.Struct):
    """What a policy made of a trace."""

    name: str
    waits_s: list[float] = []
    answered: int = 0
    failed: int = 0
    loads: int = 0
    evictions: int = 0
    busy_evictions: int = 0
    took_s: float = 0.0
    loaded: list[tuple[str, float, float]] = []  # uid, from, to


def main() -> int:
    """Run, print, draw."""
    options = parse()
    uids = [f"model-{index}" for index in range(options.models)]
    trace = make_trace(options, uids)
    load_s = {uid: random.Random(uid).uniform(4, 20) * options.scale for uid in uids}
    outcomes = []
    if options.real:
        outcomes.append(asyncio.run(through_a_gateway(options, trace, load_s)))
    else:
        outcomes += [by_hostler(options, trace, load_s), by_lru(options, trace, load_s)]
    report(options, outcomes)
    if options.plot:
        draw(outcomes, load_s, options.plot)
    return 1 if any(one.failed or one.busy_evictions for one in outcomes) else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--room", type=int, default=3, help="models that fit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="all times of the trace are multiplied by it")
    parser.add_argument("--real", help="'fake' for fake engines, or a GGUF file for real ones")
    parser.add_argument("--min-residency-s", type=float, default=3.0)
    parser.add_argument("--max-wait-s", type=float, default=60.0)
    parser.add_argument("--plot", help="write a picture there")
    parser.add_argument("--json", help="write the figures there")
    return parser.parse_args()


def make_trace(options: argparse.Namespace, uids: list[str]) -> list[list[Ask]]:
    """What each client asks for, one after the other."""
    chance = random.Random(options.seed)
    popularity = [1 / (rank + 1) for rank in range(len(uids))]
    each = options.requests // options.clients
    trace = []
    for _ in range(options.clients):
        asks: list[Ask] = []
        while len(asks) < each:
            uid = chance.choices(uids, popularity)[0]
            for _ in range(min(1 + int(chance.expovariate(1 / 6)), each - len(asks))):
                think_s = chance.expovariate(1 / 20)
                service_s = min(chance.lognormvariate(0.4, 0.7), 20)
                asks.append(Ask(think_s * options.scale, uid, service_s * options.scale))
        trace.append(asks)
    return trace


# --- in virtual time


def by_hostler(options: argparse.Namespace, trace: list[list[Ask]], load_s: dict[str, float]) -> Outcome:
    """Hostler's own dispatcher."""
    outcome = Outcome("hostler")
    with virtual_time() as loop:
        settings = Settings(
            drain_timeout_s=60,
            min_residency_s=options.min_residency_s * options.scale,
            max_wait_s=options.max_wait_s * options.scale,
        )
        world = World(settings, {RAM: options.room * GB})

        async def client(asks: list[Ask]) -> None:
            for ask in asks:
                await asyncio.sleep(ask.think_s)
                answer = await world.ask(ask.uid, ask.service_s)
                outcome.answered += answer == "answered"
                outcome.failed += answer != "answered"

        async def all_clients() -> None:
            world.begin()
            for uid, seconds in load_s.items():
                world.deploy(Model(uid=uid, memory=GB, load_s=seconds, stop_s=0.5 * options.scale))
            await asyncio.gather(*map(client, trace))

        begun = loop.time()
        loop.run_until_complete(all_clients())
        outcome.took_s = loop.time() - begun
        world.raise_faults()
        outcome.waits_s, outcome.loads, outcome.evictions = world.waits_s, world.starts, world.evictions
        outcome.loaded = [(uid, start - begun, end - begun) for uid, start, end in world.spans()]
        loop.run_until_complete(world.end())
    return outcome


class Lru:
    """Room for so many models; the one whose last request began the longest ago goes, unless it is busy."""

    def __init__(self, room: int, load_s: dict[str, float], stop_s: float, outcome: Outcome) -> None:
        self._room, self._load_s, self._stop_s, self._outcome = room, load_s, stop_s, outcome
        self._used: dict[str, float] = {}  # uid -> when last, of those that are loaded or being loaded
        self._since: dict[str, float] = {}
        self._ready: set[str] = set()
        self._busy = Counter[str]()
        self._queue: deque[tuple[str, asyncio.Future[None]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self, uid: str) -> None:
        """Wait until the model is there."""
        if uid not in self._ready:
            place = asyncio.get_running_loop().create_future()
            self._queue.append((uid, place))
            self._serve()
            await place
        else:
            self._busy[uid] += 1
        self._used[uid] = time.monotonic()

    def release(self, uid: str) -> None:
        """The request has ended."""
        self._busy[uid] -= 1
        self._serve()

    def _serve(self) -> None:
        for uid, place in list(self._queue):
            if uid in self._ready:
                self._queue.remove((uid, place))
                self._busy[uid] += 1
                place.set_result(None)
        wanted = next((uid for uid, _ in self._queue if uid not in self._used), None)
        if wanted is None:
            return
        if len(self._used) >= self._room:
            idle = [uid for uid in self._ready if not self._busy[uid]]
            if not idle:
                return
            victim = min(idle, key=self._used.__getitem__)
            self._ready.discard(victim)
            self._begin(self._swap(victim, wanted))
        else:
            self._begin(self._load(wanted))

    def _begin(self, work) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _swap(self, victim: str, wanted: str) -> None:
        self._outcome.evictions += 1
        await asyncio.sleep(self._stop_s)
        del self._used[victim]
        self._outcome.loaded.append((victim, self._since.pop(victim), time.monotonic()))
        if wanted not in self._used:
            await self._load(wanted)
        self._serve()

    async def _load(self, uid: str) -> None:
        self._used[uid] = self._since[uid] = time.monotonic()
        self._outcome.loads += 1
        await asyncio.sleep(self._load_s[uid])
        self._ready.add(uid)
        self._serve()

    def finish(self) -> None:
        """Note what is still loaded."""
        self._outcome.loaded += [(uid, since, time.monotonic()) for uid, since in self._since.items()]


def by_lru(options: argparse.Namespace, trace: list[list[Ask]], load_s: dict[str, float]) -> Outcome:
    """The plain policy."""
    outcome = Outcome("plain LRU")
    with virtual_time() as loop:
        begun = loop.time()
        yard = Lru(options.room, load_s, 0.5 * options.scale, outcome)

        async def client(asks: list[Ask]) -> None:
            for ask in asks:
                await asyncio.sleep(ask.think_s)
                asked = time.monotonic()
                await yard.acquire(ask.uid)
                outcome.waits_s.append(time.monotonic() - asked)
                await asyncio.sleep(ask.service_s)
                yard.release(ask.uid)
                outcome.answered += 1

        async def all_clients() -> None:
            await asyncio.gather(*map(client, trace))

        loop.run_until_complete(all_clients())
        yard.finish()
        outcome.took_s = loop.time() - begun
        outcome.loaded = [(uid, start - begun, end - begun) for uid, start, end in outcome.loaded]
    return outcome


# --- through a gateway


async def through_a_gateway(options: argparse.Namespace, trace: list[list[Ask]], load_s: dict[str, float]) -> Outcome:
    """Real processes, real time."""
    outcome = Outcome(f"hostler, {'fake' if options.real == 'fake' else 'real'} engines")
    with tempfile.TemporaryDirectory(prefix="swaps-") as name:
        folder = Path(name)
        settings = settings_of(options, load_s, folder)
        async with running(settings, folder) as (url, _), aiohttp.ClientSession(url) as http:

            async def client(asks: list[Ask]) -> None:
                for ask in asks:
                    await asyncio.sleep(ask.think_s)
                    waited_s = await one_request(http, options, ask)
                    if waited_s is None:
                        outcome.failed += 1
                    else:
                        outcome.answered += 1
                        outcome.waits_s.append(waited_s)

            begun = time.monotonic()
            async with asyncio.timeout(RUN_LIMIT_S):
                await asyncio.gather(*map(client, trace))
            outcome.took_s = time.monotonic() - begun
            async with http.get("/metrics") as reply:
                text = await reply.text()
            outcome.evictions = total(text, "hostler_model_evictions_total")
            outcome.loads = total(text, "hostler_model_load_seconds_count")
    return outcome


async def one_request(http: aiohttp.ClientSession, options: argparse.Namespace, ask: Ask) -> float | None:
    """How long it waited beyond what its answer takes; None if it failed."""
    begun = time.monotonic()
    tokens = max(1, round(ask.service_s * 100)) if options.real == "fake" else 8
    body = {"model": ask.uid, "prompt": "Once", "max_tokens": tokens}
    async with http.post("/v1/completions", json=body, timeout=aiohttp.ClientTimeout(total=RUN_LIMIT_S)) as reply:
        content = await reply.read()
        if reply.status != 200:
            print(f"{reply.status}: {content[:300]!r}", file=sys.stderr)
            return None
    return max(0.0, time.monotonic() - begun - (ask.service_s if options.real == "fake" else 0.0))


def settings_of(options: argparse.Namespace, load_s: dict[str, float], folder: Path) -> dict[str, object]:
    """Of a gateway with so many models, and a limit of memory for a few."""
    models: dict[str, object] = {}
    file = folder / "fake.gguf"
    file.write_bytes(b"GGUF")
    for uid, seconds in load_s.items():
        model: dict[str, object] = {"model_path": options.real, "memory": "1GB", "load_timeout_s": RUN_LIMIT_S}
        if options.real == "fake":
            behaviour = {"ready_after_s": seconds, "first_token_delay_s": 0.02}
            model |= {"model_path": str(file), "envs": {"FAKE_ENGINE": json.dumps(behaviour)}}
        else:
            model |= {"options": {"context_length": 512, "n_threads": 1}}
        models[uid] = model
    return {
        "port": 0,
        "access_log": False,
        "home": str(folder / "home"),
        "ram_limit": f"{options.room}GB",
        "ram_headroom": 0,
        "min_residency_s": options.min_residency_s * options.scale,
        "max_wait_s": max(0.1, options.max_wait_s * options.scale),
        "engines": {"llama.cpp": {"binary": str(FAKE_ENGINE)}} if options.real == "fake" else {},
        "models": models,
    }


@contextlib.asynccontextmanager
async def running(settings: dict[str, object], folder: Path):
    """A gateway: its address and its pid."""
    file, log = folder / "settings.json", folder / "log"
    file.write_text(json.dumps(settings))
    environment = os.environ | {"HOSTLER_ON_EXIT": "stop", "PYTHONPATH": f"{ROOT}:{ROOT / 'gateway' / 'sdk'}"}
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.cli", "serve", "-c", str(file), stdout=output, stderr=output, env=environment
        )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            if process.returncode is not None or time.monotonic() > deadline:
                raise SystemExit(f"The gateway did not start: {log.read_text()[-2000:]}")
            await asyncio.sleep(0.05)
        yield found[0], process.pid
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 60)


def total(metrics: str, name: str) -> int:
    """The sum of a metric over all that it has labels for."""
    return round(
        sum(
            float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith((f"{name}{{", f"{name} "))
        )
    )


# --- what is shown


def report(options: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """A table, in Markdown."""
    print(
        f"{options.models} models, room for {options.room}; {options.requests} requests of {options.clients} clients; "
        f"seed {options.seed}, times x {options.scale:g}\n"
    )
    print("| policy | answered | failed | loads | evictions | of busy ones | took | wait p50 | p95 | longest |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in outcomes:
        waits = sorted(one.waits_s) or [0.0]
        print(
            f"| {one.name} | {one.answered} | {one.failed} | {one.loads} | {one.evictions} | {one.busy_evictions} | "
            f"{one.took_s:.0f} s | {statistics.median(waits):.1f} s | {waits[int(0.95 * (len(waits) - 1))]:.1f} s | "
            f"{waits[-1]:.1f} s |"
        )
    if len(outcomes) == 2:
        ours, theirs = outcomes
        print(f"\nevictions: {ours.evictions / theirs.evictions:.2f} of the plain LRU's")
    if options.json:
        Path(options.json).write_text(json.dumps([msgspec.to_builtins(one) for one in outcomes]))


def draw(outcomes: list[Outcome], load_s: dict[str, float], path: str) -> None:
    """Which models were loaded when, and how many waited how long."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(outcomes) + 1, 1, figsize=(11, 3 * (len(outcomes) + 1)), layout="constrained")
    uids = list(load_s)
    for axis, one in zip(axes, outcomes, strict=False):
        for uid, start, end in one.loaded:
            axis.barh(uids.index(uid), end - start, left=start, height=0.8, color=f"C{uids.index(uid)}")
        axis.set_yticks(range(len(uids)), uids)
        axis.set_title(f"{one.name}: {one.evictions} evictions", loc="left")
        axis.set_xlabel("s")
    for one in outcomes:
        waits = sorted(one.waits_s)
        axes[-1].plot(waits, [(rank + 1) / len(waits) for rank in range(len(waits))], label=one.name)
    axes[-1].set(xlabel="wait, s", ylabel="part of the requests", title="How long requests wait")
    axes[-1].grid(visible=True, alpha=0.3)
    axes[-1].legend()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
