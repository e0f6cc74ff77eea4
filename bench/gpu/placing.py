"""Placement against the real driver: what is free and who holds the rest, several models on a card, refusals."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from typing import Any

import card
from batch import Bench
from door import ROOT, Door, Refused
from notes import gib

STRANGER_BYTES = 60 * 10**9
NAMED = re.compile(r"needs about ([\d,]+) MB.*?has ([\d,]+) MB of ([\d,]+) MB free.*?([\d,]+) MB are held by others")
SAMPLE_S = 12.0  # so long until the gateway has looked at what an engine takes


async def facts(bench: Bench) -> None:
    """What the driver says, and the gateway of it; the tests that need a card."""
    door, notes = await bench.door(), bench.notes
    seen = card.gpus()
    notes.told(
        "cards",
        [{"name": gpu.name, "total_gib": gib(gpu.total_bytes), "used_gib": gib(gpu.used_bytes)} for gpu in seen],
    )
    status = (await door.get("/status"))["workers"] if False else await door.get("/status")
    notes.keep("status", status)
    told = await door.get("/v1/cluster/info?detailed=true")
    notes.told(
        "gateway tells of cards",
        {name: told[0].get(name) for name in ("gpu_count", "gpu_vram_total", "gpu_vram_available")},
    )
    if sys.platform == "linux":
        done = await asyncio.to_thread(
            subprocess.run,
            [
                *(sys.executable, "-m", "pytest", "-q", "-x", "-k", "real_gpu", "-p", "no:cacheprovider"),
                str(ROOT / "tests/gateway/test_devices.py"),
            ],
            capture_output=True,
            text=True,
            timeout=90,
            cwd=ROOT,
        )
        notes.told("tests with a card", (done.stdout + done.stderr).strip().splitlines()[-1:])
        notes.keep("tests said", done.stdout[-3000:] + done.stderr[-1000:])


async def placement(bench: Bench) -> None:
    """A stranger holds 60 GB; what is refused, with which numbers; what still fits; several models on the card."""
    door, notes = await bench.door(), bench.notes
    small = await bench.made("1b", "1b")
    launch = {"model_path": small, "model_engine": "transformers"}
    idle = card.used_bytes()
    total = card.gpus()[0].total_bytes
    refusals: list[list[Any]] = []

    async def refused(what: str, **body: Any) -> str:
        began = time.monotonic()
        try:
            await door.launch("refused", limit_s=60, **launch | body)
        except Refused as exc:
            text = exc.text
        else:
            text = "it was launched"
            await door.terminate("refused")
        refusals.append([what, round(time.monotonic() - began, 2), text[:700]])
        notes.say(f"{what}: {text[:500]}")
        notes.keep("refusals", refusals)
        return text

    await refused("a GPU that is not there (gpu_idx 5)", gpu_idx=[5])
    await refused("more GPUs than there are (n_gpu 9)", n_gpu=9)
    await refused("more memory than the card has", memory=int(total * 1.1))
    async with card.stranger(min(STRANGER_BYTES, int(total * 0.72))) as pid:
        used, held = card.used_bytes(), card.held_by([pid])
        notes.told("a stranger holds, as the driver says, GB", round(held / 1e9, 2))
        text = await refused("30 GB beside a stranger", memory="30GB")
        if found := NAMED.search(text):
            asked, free, whole, others = (int(number.replace(",", "")) * 10**6 for number in found.groups())
            headroom = 512 * 2**20
            notes.table(
                "the refusal's numbers against the driver's, GB",
                ["what", "refusal", "driver"],
                [
                    ["asked", asked / 1e9, 30.0],
                    ["total", whole / 1e9, total / 1e9],
                    ["held by others", others / 1e9, used / 1e9],
                    ["free, less 512 MiB", free / 1e9, (total - used - headroom) / 1e9],
                ],
            )
        else:
            notes.told("the refusal has no numbers that can be read", text[:300])
        notes.told("a model beside the stranger, ready after s", round(await door.launch("one", **launch), 1))
        await _row(bench, door, ["one"], "one model beside a stranger, never seen before")
        await door.terminate("one")
    back = await card.until(lambda: card.used_bytes() <= idle + 2**28, 5)
    notes.told("the stranger's memory is back after s", back)
    began = time.monotonic()
    await asyncio.gather(
        door.launch("one", **launch),
        door.launch("two", **launch | {"gpu_idx": [0]}),
        door.launch("words", model_path=bench.model("minilm"), model_type="embedding"),
    )
    notes.told("three models on one card, started together, ready after s", round(time.monotonic() - began, 1))
    await asyncio.gather(door.text("one"), door.text("two"), _embedding(door, "words"))
    await asyncio.sleep(SAMPLE_S)
    await _row(bench, door, ["one", "two", "words"], "three models on one card")
    await door.terminate("one", "two", "words")
    gone = await card.until(lambda: card.used_bytes() <= idle + 2**28, 10)
    notes.told("all memory is back after s", gone)
    await asyncio.gather(
        door.launch("one", **launch), door.launch("words", model_path=bench.model("minilm"), model_type="embedding")
    )
    await asyncio.gather(door.text("one"), _embedding(door, "words"))
    await asyncio.sleep(SAMPLE_S)
    await _row(bench, door, ["one", "words"], "the same again, by what was seen")
    for uid in ("one", "words"):
        body = launch if uid == "one" else {"model_path": bench.model("minilm"), "model_type": "embedding"}
        report = await door.get("/v1/models/check", "POST", {"model_uid": f"{uid}-again"} | body)
        notes.told(f"what a third launch of {uid} would get", report.get("memory"))
    await door.terminate("one", "words")


async def _embedding(door: Door, uid: str) -> int:
    answer = await door.get("/v1/embeddings", "POST", {"model": uid, "input": ["a locomotive", "a roundhouse"]})
    return len(answer["data"][0]["embedding"])


async def _row(bench: Bench, door: Door, uids: list[str], name: str) -> None:
    columns = ["model", "promised GB", "held now GB", "held / promised"]
    bench.notes.table(name, columns, [[uid, *share_of(door, uid)] for uid in uids])


def share_of(door: Door, uid: str) -> tuple[float, float, float | None]:
    """What was promised to a model of the cards, what it holds now, both in GB, and the ratio."""
    engine = door.running(uid)
    held = card.held_by(card.family(engine.pid))
    promised = sum(size for key, size in engine.memory.items() if key != "ram")
    return promised / 1e9, held / 1e9, held / promised if promised else None


async def several_cards(bench: Bench) -> None:
    """Two cards: where copies go, `gpu_idx` to the letter, a stranger on one of them."""
    door, notes = await bench.door(), bench.notes
    cards = card.gpus()
    notes.told("cards", [{"name": gpu.name, "total_gib": gib(gpu.total_bytes)} for gpu in cards])
    if len(cards) < 2:
        notes.told("left out", "there is one card only")
        return
    launch = {"model_path": await bench.made("1b", "1b"), "model_engine": "transformers"}
    names = {gpu.uuid: gpu.index for gpu in cards}
    rows: list[list[Any]] = []

    async def where(uid: str, what: str, copies: int = 1) -> None:
        for index in range(copies):
            engine = door.engine(uid, index)
            if engine:
                pids = card.family(engine.pid)
                real = [gpu.index for gpu in card.gpus() if any(one.pid in pids for one in gpu.processes)]
                rows.append([what, f"{uid}-{index}", [names.get(uuid) for uuid in engine.gpus], real])
        notes.keep("places", rows)

    await door.launch("pair", **launch | {"replica": 2})
    await where("pair", "two copies", 2)
    answers = await asyncio.gather(*(door.text("pair") for _ in range(8)))
    notes.told("eight requests to two copies, same text", len(set(answers)) == 1)
    replicas = [await door.replica("pair", index) for index in range(2)]
    notes.keep("copies", replicas)
    await door.terminate("pair")
    await asyncio.gather(
        door.launch("on0", **launch | {"gpu_idx": [0]}), door.launch("on1", **launch | {"gpu_idx": [1]})
    )
    await where("on0", "gpu_idx [0]")
    await where("on1", "gpu_idx [1]")
    await door.terminate("on0", "on1")
    async with card.stranger(min(STRANGER_BYTES, int(cards[0].total_bytes * 0.72)), 0):
        room = int((cards[0].total_bytes) * 0.5)
        await door.launch("roomy", **launch | {"memory": room})
        await where("roomy", "half a card, a stranger on 0")
        await door.terminate("roomy")
        for what, body in (
            ("half a card on gpu_idx [0], where the stranger is", {"gpu_idx": [0], "memory": room}),
            ("half a card on each of two", {"n_gpu": 2, "memory": room * 2}),
        ):
            try:
                await door.launch("refused", limit_s=60, **launch | body)
                notes.told(what, "it was launched")
                await door.terminate("refused")
            except Refused as exc:
                notes.told(what, exc.text[:900])
    notes.table("where they are", ["what", "copy", "promised on", "in use on"], rows)
