"""vLLM behind the gateway: cold start and what of it is ours, chat, stream, tools, and what is added to a token."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from typing import Any

import aiohttp
import card
from batch import Bench
from door import Door, Refused, direct
from libraries import _way
from notes import quantile
from streams import Way, measure

START_LIMIT_S = 200
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "turn",
            "description": "Turn the table.",
            "parameters": {"type": "object", "properties": {"track": {"type": "integer"}}, "required": ["track"]},
        },
    }
]
LEVELS = (1, 16, 64, 256)
REPETITIONS = 3
WINDOW_S = 2.5
PARTS = ("first_ms", "gaps_ms")


def vllm(bench: Bench, path: str, memory: int | str, **options: Any) -> dict[str, Any]:
    """A launch of vLLM that gets so much of a card."""
    return {
        "model_path": path,
        "model_engine": "vLLM",
        "memory": memory,
        "options": {"max_model_len": 4096, **({"enforce_eager": True} if bench.is_eager else {}), **options},
        "start_timeout_s": START_LIMIT_S,
        "load_timeout_s": START_LIMIT_S,
    }


async def started(bench: Bench, door: Door, uid: str, launch: dict[str, Any]) -> None:
    """Launch it and tell when what happened, by the engine's own health beside the gateway's."""
    notes = bench.notes
    began, began_epoch = time.monotonic(), time.time()
    launching = asyncio.create_task(door.launch(uid, **launch))
    healthy: float | None = None
    engine = None
    while not launching.done() and healthy is None:
        await asyncio.sleep(0.02)
        engine = engine or door.engine(uid)
        if engine:
            try:
                async with direct(engine) as session, session.get("/health") as reply:
                    healthy = time.monotonic() if reply.status == 200 else None
            except (OSError, aiohttp.ClientError):
                continue
    ready_s = await launching
    engine = door.running(uid)
    before_s = engine.started_at - began_epoch
    after_s = began + ready_s - healthy if healthy else None
    notes.told(
        f"{uid}: start",
        {
            "launch to answer s": round(ready_s, 2),
            "launch until the engine is started s": round(before_s, 3),
            "engine healthy until the launch is answered s": None if after_s is None else round(after_s, 3),
            "ours of it s": None if after_s is None else round(before_s + after_s, 3),
            "promised GB": round(sum(engine.memory.values()) / 1e9, 2),
            "held GB": round(card.held_by(card.family(engine.pid)) / 1e9, 2),
        },
    )
    notes.keep(f"{uid}: what happened", await door.happenings(uid))


async def start(bench: Bench) -> None:
    """The 1 B model, from nothing."""
    door, notes = await bench.door(), bench.notes
    launch = vllm(bench, await bench.made("1b", "1b"), "20GiB", enable_sleep_mode=True, tool_call_parser="hermes")
    try:
        await started(bench, door, "m1b", launch)
    except Refused as exc:  # one that is not compiled may start where a compiled one does not
        notes.told("m1b did not start, and is tried without CUDA graphs", exc.text[:2000])
        bench.is_eager = True
        launch["options"]["enforce_eager"] = True
        await started(bench, door, "m1b", launch)
    notes.told("m1b: first tokens after ms", [round(await door.first_token_s("m1b") * 1e3, 1) for _ in range(4)])
    await said(bench, door, "m1b")


async def said(bench: Bench, door: Door, uid: str) -> None:
    """A chat, a stream with its usage, a tool that has to be called, an answer by a schema."""
    notes = bench.notes
    chat = {"model": uid, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16, "temperature": 0}
    asked: dict[str, dict[str, Any]] = {
        "chat": chat,
        "a tool that must be called": chat
        | {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "turn"}}, "max_tokens": 40},
        "tools, as the model wishes": chat | {"tools": TOOLS},
        "an answer by a schema": chat
        | {
            "max_tokens": 40,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "turn", "schema": TOOLS[0]["function"]["parameters"]},
            },
        },
    }
    for what, body in asked.items():
        status, text = await door.ask("POST", "/v1/chat/completions", body, 60)
        message = json.loads(text)["choices"][0]["message"] if status == 200 else text[:300]
        notes.told(f"{uid}: {what}", {"status": status, "message": str(message)[:300]})
    body = chat | {"stream": True, "stream_options": {"include_usage": True}}
    status, text = await door.ask("POST", "/v1/chat/completions", body, 60)
    events = [line for line in text.splitlines() if line.startswith("data: ")]
    usage = next((json.loads(line[6:])["usage"] for line in reversed(events) if '"usage":{' in line), None)
    notes.told(
        f"{uid}: stream",
        {"status": status, "events": len(events), "usage": usage, "ended": events[-1:] == ["data: [DONE]"]},
    )


async def latency(bench: Bench) -> None:
    """The same engine directly and through the gateway, by turns: first token, gaps, throughput, processor time."""
    door, notes = await bench.door(), bench.notes
    uid = "m1b"
    pooled: dict[tuple[int, str], dict[str, Any]] = {}
    ratios: dict[tuple[int, str], list[dict[str, float]]] = {}
    for kind in ("plain", "auto"):
        await _with_door(door, kind, uid)
        await _by_turns(bench, door, uid, kind, pooled, ratios)
        notes.keep("ratios of each repetition", [[*key, found] for key, found in ratios.items()])
        _latency_table(bench, pooled, ratios, is_last=kind == "auto")


async def _with_door(door: Door, kind: str, uid: str) -> None:
    """The engine stays: the gateway is killed, and the next one adopts it."""
    if door.settings.get("door", "plain") == kind:
        return
    door.settings["door"] = kind
    await door.kill()
    await door.start()
    await door.until_state(uid, "ready", limit_s=30)


async def _by_turns(bench: Bench, door: Door, uid: str, kind: str, pooled: Any, ratios: Any) -> None:
    notes = bench.notes
    ways = {"direct": _way(door.running(uid)), f"door {kind}": Way(f"door {kind}", port=door.port)}
    gateway = ways[f"door {kind}"]
    await measure(gateway, uid, 64, 1.0)  # what is compiled at the first time is not counted
    for _ in range(REPETITIONS):
        for streams in LEVELS:
            if notes.left_s < 20:
                notes.say("no time for more of the latency")
                return
            pair = {}
            for role in random.sample(tuple(ways), 2):
                pid = door.pid if role != "direct" else None
                one = pair[role] = await measure(ways[role], uid, streams, WINDOW_S, pid=pid)
                all_of = pooled.setdefault(
                    (streams, role), {"first_ms": [], "gaps_ms": [], "tokens_per_s": [], "cpu": []}
                )
                for part in PARTS:
                    all_of[part] += one[part]
                all_of["tokens_per_s"].append(one["tokens_per_s"])
                all_of["cpu"].append(one["cpu_us_per_token"])
            ours = pair[gateway.name]
            ratios.setdefault((streams, gateway.name), []).append(
                {
                    f"{part[:-3]} p{share * 100:.0f}": _q(ours, part, share) / _q(pair["direct"], part, share)
                    for part in PARTS
                    for share in (0.5, 0.99)
                }
                | {"throughput": ours["tokens_per_s"] / pair["direct"]["tokens_per_s"]}
            )


def _q(one: dict[str, Any], part: str, share: float) -> float:
    found = quantile(one[part], share)
    return float("nan") if found is None else found


def _latency_table(bench: Bench, pooled: Any, ratios: Any, *, is_last: bool) -> None:
    rows = []
    for (streams, role), one in sorted(pooled.items()):
        cpu = [value for value in one["cpu"] if value]
        rows.append(
            [
                *(streams, role),
                *(_q(one, part, share) for part in PARTS for share in (0.5, 0.99)),
                statistics.median(one["tokens_per_s"]),
                statistics.median(cpu) if cpu and role != "direct" else None,
                len(one["first_ms"]),
            ]
        )
    columns = [
        "streams",
        "way",
        "TTFT p50 ms",
        "p99 ms",
        "gap p50 ms",
        "gap p99 ms",
        "tokens/s",
        "CPU us/token",
        "streams counted",
    ]
    kept = [dict(zip(columns, row, strict=True)) for row in rows]
    bench.notes.keep("latency", kept)
    if not is_last:
        return
    bench.notes.table("latency", columns, rows)
    names = ["first p50", "first p99", "gaps p50", "gaps p99", "throughput"]
    bench.notes.table(
        "gateway / direct, median of the repetitions",
        ["streams", "way", *names],
        [
            [streams, way, *(statistics.median(one[name] for one in found) for name in names)]
            for (streams, way), found in sorted(ratios.items())
            if found
        ],
    )
