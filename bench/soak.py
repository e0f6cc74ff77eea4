"""Half an hour of mixed load: memory, open files, threads and processes of the gateway have to stay where they are.

    python bench/soak.py [--minutes 30] [--plot soak.svg] [--json FILE]

Five models of which three fit, two copies of one; streams, whole answers, clients that leave, models that are stopped,
others that are launched for one request and removed, engines that are killed, bad requests. The figures are taken every
ten seconds. What they do in the first half of the time, while caches and pools fill, is not judged; growth is the slope
of a line through the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from swaps import FAKE_ENGINE, running, total

PAUSE_S = 10.0
CLIENTS = 12
REQUEST_LIMIT_S = 120.0
FIGURES = {
    "RSS, MiB": "memory_mib",
    "open files": "files",
    "tasks": "tasks",
    "threads": "threads",
    "processes": "processes",
    "/metrics, KiB": "metrics_kib",
}


async def soak(options: argparse.Namespace) -> int:
    """Load, look, print."""
    outcomes = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        settings = settings_of(folder)
        async with running(settings, folder) as (url, pid), aiohttp.ClientSession(url) as http:
            end = time.monotonic() + options.minutes * 60
            uids = list(settings["models"])
            work = [asyncio.create_task(client(http, uids, number, end, outcomes)) for number in range(CLIENTS)]
            work.append(asyncio.create_task(trouble(http, uids, end, outcomes)))
            work.append(asyncio.create_task(guests(http, settings["models"][uids[-1]], end, outcomes)))
            looks = await watch(http, pid, end)
            await asyncio.wait_for(asyncio.gather(*work), 2 * REQUEST_LIMIT_S)
    report(looks, outcomes, options)
    if options.json:
        facts = {"growth_in_an_hour": growth(looks), "outcomes": outcomes, "looks": looks}
        Path(options.json).write_text(json.dumps(facts) + "\n")
    if options.plot:
        draw(looks, options.plot)
    return 1 if outcomes["wrong"] else 0


def settings_of(folder: Path) -> dict[str, Any]:
    """Room for three of five."""
    file = folder / "fake.gguf"
    file.write_bytes(b"GGUF")
    behaviour = {"ready_after_s": 0.5, "tokens": 20, "token_delay_s": 0.02}
    fake = {"model_path": str(file), "memory": "1GB", "envs": {"FAKE_ENGINE": json.dumps(behaviour)}}
    return {
        "port": 0,
        "access_log": False,
        "home": str(folder / "home"),
        "ram_limit": "3GB",
        "ram_headroom": 0,
        "min_residency_s": 1,
        "max_wait_s": 10,
        "engines": {"llama.cpp": {"binary": str(FAKE_ENGINE)}},
        "models": {f"fake-{number}": fake | {"replica": 2 if number == 0 else 1} for number in range(5)},
    }


async def client(http: aiohttp.ClientSession, uids: list[str], number: int, end: float, outcomes: Counter[str]) -> None:
    """Ask in turn, in every way there is."""
    chance = random.Random(number)
    while time.monotonic() < end:
        uid = chance.choices(uids, [5, 3, 2, 1, 1])[0]
        kind = chance.choices(["stream", "whole", "leaves", "wrong model", "no JSON"], [6, 6, 3, 1, 1])[0]
        try:
            outcomes[await one(http, uid, kind, chance)] += 1
        except (aiohttp.ClientError, TimeoutError) as exc:
            print(f"{kind} of {uid}: {exc!r}", file=sys.stderr)
            outcomes["wrong"] += 1
        await asyncio.sleep(chance.expovariate(2))


async def one(http: aiohttp.ClientSession, uid: str, kind: str, chance: random.Random) -> str:
    """One request; what became of it."""
    body: Any = {"model": uid if kind != "wrong model" else "nobody", "prompt": "x", "stream": kind == "stream"}
    limit_s = chance.uniform(0, 0.6) if kind == "leaves" else REQUEST_LIMIT_S
    data = b"{" if kind == "no JSON" else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    try:
        async with asyncio.timeout(limit_s), http.post("/v1/completions", data=data, headers=headers) as reply:
            text = await reply.text()
    except TimeoutError:
        if kind == "leaves":
            return "left"
        raise
    if kind in ("wrong model", "no JSON"):
        return "refused" if reply.status in (400, 404) else "wrong"
    if reply.status == 200 and (kind != "stream" or text.endswith("data: [DONE]\n\n")):
        return "answered" if '"error"' not in text else "told of its engine's end"
    return "told of its engine's end" if reply.status in (502, 503) else "wrong"


async def trouble(http: aiohttp.ClientSession, uids: list[str], end: float, outcomes: Counter[str]) -> None:
    """Kill an engine or stop a model, now and then."""
    chance = random.Random(-1)
    while time.monotonic() < end:
        await asyncio.sleep(chance.uniform(2, 8))
        async with http.get("/v1/replicas") as reply:
            pids = [one["pid"] for one in await reply.json() if one["state"] == "ready" and one["pid"]]
        if pids and chance.random() < 0.5:
            os.kill(chance.choice(pids), signal.SIGKILL)
            outcomes["engines killed"] += 1
        else:
            async with http.post(f"/v1/models/{chance.choice(uids)}/stop"):
                outcomes["models stopped"] += 1


async def guests(http: aiohttp.ClientSession, model: dict[str, Any], end: float, outcomes: Counter[str]) -> None:
    """Launch a model under a name that was never there, ask it once, remove it; again and again."""
    number = 0
    while time.monotonic() < end:
        number += 1
        uid = f"guest-{number}"
        async with http.post("/v1/models?wait_ready=false", json=model | {"model_uid": uid}) as reply:
            reply.raise_for_status()
        outcomes[await one(http, uid, "stream", random.Random(number))] += 1
        async with http.delete(f"/v1/models/{uid}") as reply:
            reply.raise_for_status()
        outcomes["models launched and removed"] += 1
        await asyncio.sleep(1)


async def watch(http: aiohttp.ClientSession, pid: int, end: float) -> list[dict[str, float]]:
    """The gateway's figures, until the end."""
    gateway = psutil.Process(pid)
    begun = time.monotonic()
    looks = []
    while time.monotonic() < end:
        async with http.get("/metrics") as reply:
            metrics = await reply.text()
        with gateway.oneshot():
            looks.append(
                {
                    "s": round(time.monotonic() - begun, 1),
                    "memory_mib": round(gateway.memory_info().rss / 2**20, 2),
                    "files": gateway.num_fds(),
                    "tasks": total(metrics, "hostler_tasks"),
                    "threads": gateway.num_threads(),
                    "processes": len(gateway.children(recursive=True)),
                    "metrics_kib": round(len(metrics) / 2**10, 1),
                }
            )
        await asyncio.sleep(PAUSE_S)
    return looks


def judged(looks: list[dict[str, float]]) -> list[dict[str, float]]:
    """The last half."""
    return looks[len(looks) // 2 :]


def growth(looks: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure in an hour."""
    hours = [look["s"] / 3600 for look in judged(looks)]
    if len(set(hours)) < 2:
        return dict.fromkeys(FIGURES.values(), 0.0)
    return {
        key: round(statistics.linear_regression(hours, [look[key] for look in judged(looks)]).slope, 2)
        for key in FIGURES.values()
    }


def report(looks: list[dict[str, float]], outcomes: Counter[str], options: argparse.Namespace) -> None:
    """Two tables, in Markdown."""
    slopes = growth(looks)
    print(f"{options.minutes:g} minutes, {CLIENTS} clients; all but the first is of the last half\n")
    print("| of the gateway | first | median | most | growth in an hour |\n| --- | --- | --- | --- | --- |")
    for name, key in FIGURES.items():
        values = [look[key] for look in judged(looks)]
        median, most = statistics.median(values), max(values)
        print(f"| {name} | {looks[0][key]:.0f} | {median:.0f} | {most:.0f} | {slopes[key]:+.1f} |")
    print("\n| what became of it | times |\n| --- | --- |")
    for name, count in sorted(outcomes.items()):
        print(f"| {name} | {count} |")


def draw(looks: list[dict[str, float]], path: str) -> None:
    """The figures over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(FIGURES), 1, figsize=(10, 1.6 * len(FIGURES)), sharex=True, layout="constrained")
    for axis, (name, key) in zip(axes, FIGURES.items(), strict=True):
        axis.plot([look["s"] / 60 for look in looks], [look[key] for look in looks])
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, alpha=0.3)
    axes[-1].set_xlabel("minutes")
    figure.savefig(path)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--plot", help="write a picture there (matplotlib)")
    parser.add_argument("--json", help="write the figures there")
    return asyncio.run(soak(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
