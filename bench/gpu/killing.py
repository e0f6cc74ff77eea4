"""kill -9: of an engine, whole and in part, and of the gateway. Is the card's memory free before the next start?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import Any

import card
from batch import Bench
from door import Door, Engine

RESTART_LIMIT_S = 120.0
SLACK_BYTES = 64 * 2**20


async def worker(bench: Bench) -> None:
    """A worker of ours, then the gateway."""
    door = await bench.door()
    path = await bench.made("1b", "1b")
    await door.launch("victim", model_path=path, model_engine="transformers", **bench.device)
    await door.text("victim")
    await killed(bench, door, "victim", "kill -9 of the worker", whole_group=True)
    await gateway(bench, door, "victim")
    await door.terminate("victim")


async def vllm(bench: Bench) -> None:
    """vLLM: the gateway, then the API server alone, which leaves its engine core behind."""
    door = await bench.door()
    uid = await _running(door)
    await gateway(bench, door, uid)
    await killed(bench, door, uid, "kill -9 of the API server alone", whole_group=False)


async def vllm_group(bench: Bench) -> None:
    """vLLM: the whole process group."""
    door = await bench.door()
    await killed(bench, door, await _running(door), "kill -9 of the whole group", whole_group=True)


async def _running(door: Door) -> str:
    for one in await door.get("/v1/replicas"):
        if one["state"] == "ready" and one["engine"] == "vLLM":
            return str(one["uid"])
    raise RuntimeError("no model of vLLM is ready: the part `start` has to go before")


async def killed(bench: Bench, door: Door, uid: str, what: str, *, whole_group: bool) -> None:
    """Kill it and see, by the driver and the process table, what is left when the next one is started."""
    notes, engine = bench.notes, door.running(uid)
    pids = card.family(engine.pid)
    held = card.held_by(pids)
    notes.say(f"{what}: processes {pids} hold {held / 1e9:.2f} GB")
    used, began, began_epoch = card.used_bytes(), time.monotonic(), time.time()
    with contextlib.suppress(ProcessLookupError):
        if whole_group:
            os.killpg(os.getpgid(engine.pid), signal.SIGKILL)
        else:
            os.kill(engine.pid, signal.SIGKILL)
    freed: float | None = None
    gone: float | None = None
    following: Engine | None = None
    held_at_start: int | None = None
    while time.monotonic() - began < RESTART_LIMIT_S:
        now = time.monotonic() - began
        holding = card.held_by(pids)
        if gone is None and not any(map(card.is_running, pids)):
            gone = now
        if freed is None and not holding and (following or card.used_bytes() <= used - held + SLACK_BYTES):
            freed = now
        if following is None:
            found = door.engine(uid)
            if found and found.pid != engine.pid and card.is_running(found.pid):
                following, held_at_start = found, holding
        if following and freed is not None and gone is not None:
            break
        await asyncio.sleep(0.01)
    notes.keep(f"{what}: memory free s, so far", freed)
    limit_s = max(1.0, min(RESTART_LIMIT_S, notes.left_s - 2))
    after = await door.until_state(uid, "ready", "failed", limit_s=limit_s)
    ready_s = time.monotonic() - began
    row: dict[str, Any] = {
        "held GB": held / 1e9,
        "all processes gone s": gone,
        "memory free s": freed,
        "next one was decided on s": following.started_at - began_epoch if following else None,
        "of the old one still held then, bytes": held_at_start,
        "ready again s": ready_s if after.get("state") == "ready" else None,
        "state": after.get("state"),
        "what was told": (after.get("failure") or {}).get("reason") if after else None,
    }
    notes.told(what, {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    happened = await door.happenings(uid)
    notes.keep(f"{what}: what happened", [one for one in happened if one["time"] >= began_epoch])
    with contextlib.suppress(Exception):
        notes.told(f"{what}: answers again", bool(await door.text(uid, 4)) or True)


async def gateway(bench: Bench, door: Door, uid: str) -> None:
    """kill -9 of the gateway: the engine goes on, is adopted with what it holds, and answers at once."""
    notes, engine = bench.notes, door.running(uid)
    pids = card.family(engine.pid)
    before = card.held_by(pids)
    await door.kill()
    between = card.held_by(pids)
    up_s = await door.start()
    began = time.monotonic()
    await door.text(uid, 1)
    answer_s = time.monotonic() - began
    after = door.engine(uid)
    replica = await door.replica(uid)
    notes.told(
        "kill -9 of the gateway",
        {
            "door up again s": round(up_s, 2),
            "first answer after s": round(answer_s, 3),
            "same pid": bool(after) and after.pid == engine.pid == replica.get("pid"),
            "GB before, between, after": [round(one / 1e9, 3) for one in (before, between, card.held_by(pids))],
            "promised bytes are the same": bool(after) and after.memory == engine.memory,
            "state": replica.get("state"),
        },
    )
