"""Our workers over transformers, sentence-transformers and diffusers on the card: directly and through the gateway."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from batch import Bench
from door import Door, direct
from notes import quantile
from placing import share_of
from streams import Way, measure

REPETITIONS = 8
WINDOW_S = 3.0
TEXTS_EACH, ASKED_AT_ONCE = 64, 8
WORDS = ("the", "locomotive", "turns", "slowly", "in", "a", "roundhouse", "while", "steam", "and", "smoke", "rise")
ROLES = ("direct", "gateway")


async def embeddings(bench: Bench) -> None:
    """Vectors per second, and that the card's are those of the processor."""
    door, notes = await bench.door(), bench.notes
    launch = {"model_path": bench.model("minilm"), "model_type": "embedding", "model_engine": "sentence-transformers"}
    notes.told("ready after s", round(await door.launch("words", **launch, **bench.device), 1))
    await door.launch("words-cpu", **launch, device="cpu")
    texts = [" ".join(random.Random(n).choices(WORDS, k=12)) for n in range(TEXTS_EACH)]
    vectors = [await _vectors(door, uid, texts) for uid in ("words", "words-cpu")]
    notes.told("least cosine of the card's vectors to the processor's", round(min(map(_cosine, *vectors)), 5))
    await door.terminate("words-cpu")
    notes.told("promised and held GB, ratio", share_of(door, "words"))
    body = {"model": "words", "input": texts}
    per_s = await _by_turns(bench, door, "words", "/v1/embeddings", body, ASKED_AT_ONCE)
    _ratios(bench, f"vectors per second, {ASKED_AT_ONCE} x {TEXTS_EACH} texts at once", per_s, TEXTS_EACH)
    await door.terminate("words")


async def transformers(bench: Bench) -> None:
    """A language model by the library: a chat, a stream, tokens per second."""
    door, notes = await bench.door(), bench.notes
    path = await bench.made("1b", "1b")
    launch = {"model_path": path, "model_engine": "transformers", "options": {"max_num_seqs": 16}}
    notes.told("ready after s", round(await door.launch("lm", **launch, **bench.device), 1))
    notes.told(
        "first token after s, first and second stream", [round(await door.first_token_s("lm"), 3) for _ in range(2)]
    )
    chat = {"model": "lm", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
    answer = await door.get("/v1/chat/completions", "POST", chat)
    notes.told("usage of a chat", answer.get("usage"))
    notes.told("promised and held GB, ratio", share_of(door, "lm"))
    engine = door.running("lm")
    ways = {"direct": _way(engine), "gateway": Way("gateway", port=door.port)}
    found: dict[str, list[float]] = {role: [] for role in ROLES}
    for _ in range(2):
        for role in random.sample(ROLES, 2):
            try:
                one = await measure(ways[role], "lm", 8, WINDOW_S * 2, more={})
            except RuntimeError as exc:
                notes.told(f"{role}: no figure", str(exc)[:400])
                continue
            found[role].append(one["tokens_per_s"])
    if all(found.values()):
        _ratios(bench, "tokens per second, 8 streams", found, 1)
    await door.terminate("lm")


async def diffusers(bench: Bench) -> None:
    """Pictures of a pipeline of random weights."""
    door, notes = await bench.door(), bench.notes
    launch = {"model_path": bench.model("tiny-sd"), "model_type": "image", "model_engine": "diffusers"}
    notes.told("ready after s", round(await door.launch("brush", **launch, **bench.device), 1))
    body = {"model": "brush", "prompt": "a locomotive", "size": "64x64", "response_format": "b64_json"}
    body |= {"kwargs": json.dumps({"num_inference_steps": 8})}
    answer = await door.get("/v1/images/generations", "POST", body)
    notes.told("bytes of a picture", len(answer["data"][0]["b64_json"]))
    per_s = await _by_turns(bench, door, "brush", "/v1/images/generations", body, 2)
    _ratios(bench, "pictures per second, 2 at once", per_s, 1)
    notes.told("promised and held GB, ratio", share_of(door, "brush"))
    await door.terminate("brush")


def _way(engine: Any) -> Way:
    port = 0 if engine.socket else int(engine.url.rpartition(":")[2])
    return Way("direct", socket=engine.socket, port=port, key=engine.key)


async def _vectors(door: Door, uid: str, texts: list[str]) -> list[list[float]]:
    answer = await door.get("/v1/embeddings", "POST", {"model": uid, "input": texts})
    return [one["embedding"] for one in answer["data"]]


def _cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


async def _by_turns(
    bench: Bench, door: Door, uid: str, path: str, body: dict[str, Any], at_once: int
) -> dict[str, list[float]]:
    """Answers per second, by the way they were asked for, of each repetition."""
    engine = door.running(uid)
    found: dict[str, list[float]] = {role: [] for role in ROLES}
    async with direct(engine) as engine_session, aiohttp.ClientSession(base_url=door.address) as door_session:
        sessions = {"direct": engine_session, "gateway": door_session}

        async def ask(session: aiohttp.ClientSession) -> None:
            async with session.post(path, json=body) as reply:
                text = await reply.read()
                if reply.status != 200:
                    raise RuntimeError(f"{path}: {reply.status} {text[:300]!r}")

        for role in ROLES:
            await asyncio.gather(*(ask(sessions[role]) for _ in range(at_once)))
        for _ in range(REPETITIONS):
            for role in random.sample(ROLES, 2):
                found[role].append(await _per_s(lambda role=role: ask(sessions[role]), at_once))
    return found


async def _per_s(ask: Callable[[], Awaitable[None]], at_once: int) -> float:
    began, count = time.monotonic(), 0

    async def again() -> None:
        nonlocal count
        while time.monotonic() - began < WINDOW_S:
            await ask()
            count += 1

    await asyncio.gather(*(again() for _ in range(at_once)))
    return count / (time.monotonic() - began)


def _ratios(bench: Bench, name: str, found: dict[str, list[float]], each: int) -> None:
    ratios = [b / a for a, b in zip(found["direct"], found["gateway"], strict=False)]
    bench.notes.keep(f"{name}, each repetition", found)
    bench.notes.table(
        name,
        ["direct", "gateway", "ratio", "least", "most"],
        [
            [
                *(statistics.median(found[role]) * each for role in ROLES),
                statistics.median(ratios),
                quantile(ratios, 0),
                quantile(ratios, 1),
            ]
        ],
    )
