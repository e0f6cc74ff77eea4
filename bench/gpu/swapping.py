"""Models that do not fit together: sleep and wake, swaps by each tier, and a trace of requests over too many models."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import card
import psutil
from batch import SETTINGS, Bench
from door import Door, Engine, Refused, direct
from notes import gib, quantile
from streams import Way, measure
from tokens import started, vllm

SHARE, SMALL_SHARE = 0.57, 0.25  # of the card; two of the former do not fit together
LARGE_CACHE, SMALL_CACHE = 27 * 2**30, 14 * 2**30
NAMES = {"asleep ram": "RAM (sleep level 1)", "asleep disk": "disk (sleep level 2)", "stopped": "stop and start"}
WAKE = ("/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache")
TRACE, CLIENTS, TRACE_LIMIT_S, TRACE_TOKENS = 500, 24, 140.0, 16
NO_TIERS = "this gateway has no tiers: POST /v1/models/{uid}/sleep is answered"


async def large(bench: Bench) -> None:
    """The 7 B model from nothing, and asleep and awake by vLLM's own routes."""
    door, notes = await bench.door(), bench.notes
    launch = await _large(bench)
    await started(bench, door, "big-a", launch)
    notes.told("big-a: first tokens after ms", [round(await door.first_token_s("big-a") * 1e3, 1) for _ in range(4)])
    await sleeping(bench, door, "big-a")


async def small(bench: Bench) -> None:
    """The 1 B model asleep and awake by vLLM's own routes."""
    await sleeping(bench, await bench.door(), "m1b")


async def _large(bench: Bench) -> dict[str, Any]:
    total = card.gpus()[0].total_bytes
    return vllm(bench, await bench.made("7b", "7b"), int(total * SHARE), enable_sleep_mode=True)


async def _small(bench: Bench) -> dict[str, Any]:
    total = card.gpus()[0].total_bytes
    return vllm(bench, await bench.made("1b", "1b"), int(total * SMALL_SHARE), enable_sleep_mode=True)


async def sleeping(bench: Bench, door: Door, uid: str) -> None:
    """Level 1 and level 2, timed at the engine itself: what it holds, how long it takes, the first token after."""
    notes, engine = bench.notes, door.running(uid)
    before = await door.text(uid)
    rows: list[list[Any]] = []
    async with direct(engine) as session:

        async def call(path: str, body: Any = None) -> float:
            began = time.monotonic()
            async with session.post(path, json=body) as reply:
                text = await reply.text()
                if reply.status != 200:
                    raise Refused(reply.status, text)
            return time.monotonic() - began

        for level, which in ((1, "first"), (1, "second"), (2, "first")):
            awake, ram = card.held_by(card.family(engine.pid)), psutil.virtual_memory().available
            sleep_s = await call(f"/sleep?level={level}")
            asleep = card.held_by(card.family(engine.pid))
            took = ram - psutil.virtual_memory().available
            if level == 1:
                wake_s = await call("/wake_up")
            else:
                steps = [await call(path, {"method": "reload_weights"} if "rpc" in path else None) for path in WAKE]
                wake_s = sum(steps)
                notes.keep(f"{uid}: steps of a wake from level 2 s", steps)
            first = await door.first_token_s(uid)
            again = await door.first_token_s(uid)
            is_same = await door.text(uid) == before
            rows.append(
                [level, which, sleep_s, wake_s, first * 1e3, again * 1e3, gib(awake), gib(asleep), gib(took), is_same]
            )
            notes.keep(f"{uid}: sleep so far", rows)
    columns = ["level", "time", "sleep s", "wake s", "first token ms", "next ms", "awake GiB", "asleep GiB", "host GiB"]
    notes.table(f"{uid}: asleep and awake", [*columns, "same text"], rows)


async def tiers(bench: Bench) -> None:
    """One model through the gateway's own tiers, by its routes, and then asked for while it sleeps."""
    door, notes = await bench.door(), bench.notes
    uid = next((one["uid"] for one in await door.get("/v1/replicas") if one["state"] == "ready"), "m1b")
    for attempt in ("first", "second"):
        began = time.monotonic()
        status, text = await door.ask("POST", f"/v1/models/{uid}/sleep", None, 120)
        if status >= 400:
            notes.told("left out", f"{NO_TIERS} {status}: {text[:200]}")
            return
        replica = await door.until_state(uid, "asleep", limit_s=30)
        slept_s = time.monotonic() - began
        held = card.held_by(card.family(door.running(uid).pid))
        shown = await door.card(uid)
        first = await door.first_token_s(uid)
        notes.told(
            f"{uid}: asleep by the gateway, {attempt}",
            {
                "asleep after s": round(slept_s, 3),
                "state": replica.get("state"),
                "tier": shown.get("tier") or replica.get("tier"),
                "held asleep GB": round(held / 1e9, 2),
                "a request wakes it: first token after s": round(first, 3),
                "next first token s": round(await door.first_token_s(uid), 3),
            },
        )
    status, text = await door.ask("POST", f"/v1/models/{uid}/sleep", None, 60)
    began = time.monotonic()
    status, text = await door.ask("POST", f"/v1/models/{uid}/wake", None, 60)
    notes.told("wake by its route", {"status": status, "s": round(time.monotonic() - began, 3), "said": text[:200]})


async def crowd(bench: Bench) -> None:
    """Two large models and two small ones, each started once; together they are more than the card holds.

    The gateway is told from its start that no weights are kept in RAM: RAM that vLLM once took to sleep it keeps.
    """
    door, notes = await bench.door(sleep_memory=0), bench.notes
    large, small = await _large(bench), await _small(bench)
    # Two that start at once on a card: each would take what the other takes for its own, and find less for its cache.
    for launch, cache in ((large, LARGE_CACHE), (small, SMALL_CACHE)):
        launch["options"]["kv_cache_memory_bytes"] = cache
    for number, pair in enumerate((("big-a", "small-a"), ("big-b", "small-b"))):
        if number:
            await _to_sleep(bench, door, "big-a", "small-a")
        began = time.monotonic()
        took = await asyncio.gather(
            *(door.launch(uid, **(large if uid.startswith("big") else small)) for uid in pair), return_exceptions=True
        )
        for uid, one in zip(pair, took, strict=True):
            notes.told(f"{uid}: ready after s", one if isinstance(one, float) else str(one)[:1500])
            notes.keep(f"{uid}: what happened", await door.happenings(uid))
        notes.say(f"both after {time.monotonic() - began:.1f} s; {await _beds(door)}")
    await _to_sleep(bench, door, "small-b")
    notes.told("all four", await _beds(door))


async def _to_sleep(bench: Bench, door: Door, *uids: str) -> None:
    for uid in uids:
        status, text = await door.ask("POST", f"/v1/models/{uid}/sleep", None, 120)
        if status >= 400:
            bench.notes.told(f"{uid} does not sleep", f"{status}: {text[:500]}")
            continue
        await door.until_state(uid, "asleep", "failed", limit_s=60)
        bench.notes.say(f"{uid} is put to sleep: {(await _beds(door)).get(uid)}")


async def _beds(door: Door) -> dict[str, str]:
    """Each model's state and, if it sleeps, in which tier, as the gateway tells."""
    replicas = await door.get("/v1/replicas")
    return {one["uid"]: f"{one['state']} {one.get('tier') or ''}".strip() for one in replicas}


async def swaps(bench: Bench) -> None:
    """Two large models by turns: seconds from a request until its first token, by the tier that both were seen in."""
    door, notes = await bench.door(sleep_memory=0), bench.notes
    if missing := {"big-a", "big-b"} - set(await _beds(door)):
        raise RuntimeError(f"there is no {' and no '.join(sorted(missing))}: the part `crowd` has to go before")
    rows: list[list[Any]] = []
    for setting, times in ((None, 6), ("64GiB", 8)):
        if setting and not await _tell(bench, door, {"sleep_memory": setting}):
            notes.told("RAM", "left out: this gateway does not know the setting sleep_memory")
            continue
        for number in range(times):
            if notes.left_s < 30:
                notes.told(f"sleep_memory {setting}, swap {number}", "left out: no time")
                break
            await asyncio.sleep(2 * SETTINGS["min_residency_s"])  # who was just loaded stays for so long
            await _swap(bench, door, rows)
    by: dict[str, list[float]] = {}
    for woken, gone, _, seconds, *_ in rows:
        by.setdefault(f"{NAMES.get(gone, gone)}" + ("" if woken == gone else f", the other from {woken}"), []).append(
            seconds
        )
    columns = ["the other goes by", "swaps", "least s", "median s", "most s"]
    notes.table(
        "swaps of two models of 7 B, request to first token",
        columns,
        [[tier, len(s), min(s), quantile(s, 0.5), max(s)] for tier, s in by.items()],
    )


async def _swap(bench: Bench, door: Door, rows: list[list[Any]]) -> None:
    """Ask for the large one that is not ready."""
    notes, before = bench.notes, await _beds(door)
    uid, other = ("big-a", "big-b") if before.get("big-b") == "ready" else ("big-b", "big-a")
    began = time.monotonic()
    try:
        await door.first_token_s(uid)
    except Refused as exc:
        notes.told(f"{uid}, {before}", f"was answered {exc.status}: {exc.text[:500]}")
        return
    seconds, after, used = time.monotonic() - began, await _beds(door), card.used_bytes()
    rows.append([before.get(uid), after.get(other), uid, seconds, after, round(used / 1e9, 2)])
    notes.keep("swaps so far", rows)
    notes.say(f"{uid} ({before.get(uid)}) in {seconds:.2f} s; {after}, {used / 1e9:.1f} GB in use")


async def _tell(bench: Bench, door: Door, more: dict[str, Any]) -> bool:
    """Other settings while it runs; whether the gateway knows them."""
    import yaml

    body = bench.settings | more
    file = Path(door.home / "settings.yaml")
    old = file.read_text()
    file.write_text(yaml.safe_dump(body, sort_keys=False))
    status, text = await door.ask("POST", "/v1/config/apply", None, 30)
    bench.notes.say(f"settings {more}: {status} {text[:200]}")
    if status >= 400:
        file.write_text(old)
        return False
    door.settings = body
    return True


async def trace(bench: Bench) -> None:
    """Requests at random over models that sum to more than the card; none may run out of memory or be refused."""
    door, notes = await bench.door(), bench.notes
    total = card.gpus()[0].total_bytes
    known = [one["id"] for one in (await door.get("/v1/models"))["data"]]
    uids = [uid for uid in known if uid.startswith(("big-", "small-"))]
    if len(uids) < 2:
        raise RuntimeError("there are too few models: the part `crowd` has to go before")
    shares = {uid: (SHARE if uid.startswith("big") else SMALL_SHARE) for uid in uids}
    notes.told("models and their shares of the card, together", [shares, round(sum(shares.values()), 2)])
    dice = random.Random(7)
    asks = iter([dice.choices(uids, [4 if uid.startswith("big") else 2 for uid in uids])[0] for _ in range(TRACE)])
    waits: dict[str, list[float]] = {uid: [] for uid in uids}
    wrong: list[str] = []
    most = 0
    limit = time.monotonic() + min(TRACE_LIMIT_S, notes.left_s - 40)
    started_before = {one["uid"]: one["starts"] for one in await door.get("/v1/replicas")}

    async def client() -> None:
        for uid in asks:
            if time.monotonic() > limit:
                return
            began = time.monotonic()
            try:
                await door.first_token_s(uid, TRACE_TOKENS)
                waits[uid].append(time.monotonic() - began)
            except Exception as exc:
                wrong.append(f"{uid}: {type(exc).__name__} {exc}"[:400])

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, card.used_bytes())
            notes.keep("answered so far", {uid: len(one) for uid, one in waits.items()})
            await asyncio.sleep(0.25)

    watching = asyncio.create_task(watch())
    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    everything = [wait for one in waits.values() for wait in one]
    moves: Counter[str] = Counter()
    for uid in uids:
        moves.update(
            f"{one.get('from')} -> {one.get('to')}" for one in await door.happenings(uid) if one["type"] == "state"
        )
    starts = {one["uid"]: one["starts"] - started_before.get(one["uid"], 0) for one in await door.get("/v1/replicas")}
    notes.told(
        "trace",
        {
            "asked": len(everything) + len(wrong),
            "of": TRACE,
            "answered": len(everything),
            "wrong": len(wrong),
            "out of memory": sum("memory" in one.lower() for one in wrong),
            "engines that said so": sorted(
                path.parent.name
                for path in (door.home / "logs").glob("*/*.log")
                if "OutOfMemoryError" in path.read_text(errors="replace")
            ),
            "seconds": round(time.monotonic() - began, 1),
            "starts": starts,
            "moves of state": dict(moves),
            "first token p50, p99, longest s": [round(quantile(everything, at) or 0, 3) for at in (0.5, 0.99, 1)],
            "most in use GB of": [round(most / 1e9, 2), round(total / 1e9, 2)],
        },
    )
    notes.keep("wrong", wrong[:50])
    notes.keep("waits s", {uid: [round(one, 3) for one in found] for uid, found in waits.items()})


async def parallel(bench: Bench) -> None:
    """Two cards: a model over both by tensor parallelism, and two copies, one on each."""
    door, notes = await bench.door(), bench.notes
    cards = card.gpus()
    if len(cards) < 2:
        notes.told("left out", "there is one card only")
        return
    path = await bench.made("7b", "7b")
    envs = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    half = int(cards[0].total_bytes * 0.5)
    await started(bench, door, "wide", vllm(bench, path, half * 2, enforce_eager=True) | {"n_gpu": 2, "envs": envs})
    await _where(bench, door, "wide", 1)
    notes.told("wide: first tokens after ms", [round(await door.first_token_s("wide") * 1e3, 1) for _ in range(3)])
    notes.told("wide: text", await door.text("wide"))
    await door.terminate("wide")


async def copies(bench: Bench) -> None:
    """Two copies of the 1 B model, one on each card, and how the requests are shared."""
    door, notes = await bench.door(), bench.notes
    if len(card.gpus()) < 2:
        notes.told("left out", "there is one card only")
        return
    launch = vllm(bench, await bench.made("1b", "1b"), "20GiB", enforce_eager=True) | {"replica": 2}
    notes.told("two copies ready after s", round(await door.launch("twin", **launch), 1))
    await _where(bench, door, "twin", 2)
    way = Way("gateway", port=door.port)
    for streams in (16, 64, 256):
        measuring = asyncio.create_task(measure(way, "twin", streams, 2.5))
        shared: list[list[int]] = []
        while not measuring.done():
            await asyncio.sleep(0.25)
            shared.append([(await door.replica("twin", index)).get("in_flight", 0) for index in (0, 1)])
        one = await measuring
        busiest = max(shared, key=sum)
        notes.told(f"two copies, {streams} streams", {"tokens/s": round(one["tokens_per_s"]), "in flight": busiest})
    await door.terminate("twin")


async def _where(bench: Bench, door: Door, uid: str, count: int) -> None:
    names = {gpu.uuid: gpu.index for gpu in card.gpus()}
    for index in range(count):
        engine: Engine | None = door.running(uid, index)
        pids = card.family(engine.pid)
        real = {
            gpu.index: round(sum(one.used_bytes or 0 for one in gpu.processes if one.pid in pids) / 1e9, 2)
            for gpu in card.gpus()
        }
        bench.notes.told(
            f"{uid}-{index}: promised on, GB held by card",
            [[names.get(uuid) for uuid in engine.gpus], {at: size for at, size in real.items() if size}],
        )
