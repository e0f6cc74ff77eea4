"""Real engines, and gateways that are killed or restarted under load: nothing is loaded twice, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from harness import Gateway, is_running, until

from gateway.keeper import MARK_VARIABLE, marked

pytestmark = pytest.mark.engine

KILLS = int(os.environ.get("HOSTLER_TEST_KILLS", "4"))
STREAMS = 64
FIRST_ANSWER_LIMIT_S = 1.0


def settings_for(gguf: Path, *uids: str) -> dict[str, Any]:
    options = {"n_threads": 1, "context_length": 4096, "n_parallel": 8}
    model = {"model_path": str(gguf), "model_engine": "llama.cpp", "preload": True, "options": options}
    return {"models": dict.fromkeys(uids, model)}


async def ask(address: str, uid: str, tokens: int, *, stream: bool = False) -> int:
    """The status; of a stream 0 if it was broken off or ended with an error."""
    body = {"model": uid, "prompt": "One, two, three,", "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    async with aiohttp.ClientSession() as session, session.post(f"{address}/v1/completions", json=body) as response:
        text = await response.text()
        if stream and response.status == 200:
            return 200 if text.rstrip().endswith("data: [DONE]") and '"error"' not in text else 0
        return response.status


async def load_on(gateway: Gateway, uids: list[str], answers: list[int]) -> None:
    """Requests of all kinds until the gateway is gone."""
    while True:
        try:
            stream = random.random() < 0.5
            answers.append(await ask(gateway.address, random.choice(uids), random.randint(1, 40), stream=stream))
        except (aiohttp.ClientError, OSError):
            return


async def pids_of(gateway: Gateway) -> dict[str, int]:
    return {replica["uid"]: replica["pid"] for replica in await gateway.replicas()}


async def all_ready(gateway: Gateway) -> dict[str, int]:
    async with asyncio.timeout(120):
        while any(replica["state"] != "ready" for replica in await gateway.replicas()):
            await asyncio.sleep(0.05)
    return await pids_of(gateway)


def engines_below(home: Path) -> list[int]:
    """The pids of all processes that carry the mark of a life in this data folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK_VARIABLE, "").startswith(f"{home}/"):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def check_whole(home: Path) -> None:
    """What was being written lies beside its place until it is whole, also after a kill."""
    read = [json.loads(path.read_bytes()) for path in home.rglob("*.json")]
    assert read


async def test_a_gateway_killed_at_random_moments_under_load_finds_its_engines_again(
    smollm2_gguf: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    home, uids = tmp_path / "home", ["one", "two"]
    settings = settings_for(smollm2_gguf, *uids)
    env = {"HOSTLER_ORPHAN_TIMEOUT_S": "20", "HOSTLER_ON_EXIT": "keep"}
    gateway = await Gateway.start(home, settings, env)
    before = await all_ready(gateway)
    firsts: list[float] = []
    answers: list[int] = []
    for _ in range(KILLS):
        clients = [asyncio.create_task(load_on(gateway, uids, answers)) for _ in range(6)]
        await asyncio.sleep(random.uniform(0, 2))
        await gateway.end(9)
        await asyncio.gather(*clients)
        gateway = await Gateway.start(home, settings, env)
        opened = time.monotonic()
        assert await ask(gateway.address, random.choice(uids), 1) == 200
        firsts.append(time.monotonic() - opened)
        assert await all_ready(gateway) == before
    print(f"\nfirst answers after {sorted(round(one, 3) for one in firsts)} s, {len(answers)} answered before")
    record_property("first_answers_s", firsts)
    assert max(firsts) < FIRST_ANSWER_LIMIT_S
    assert set(answers) <= {0, 200}  # 0: its stream broke with the gateway
    assert {pid for pid in engines_below(home) if pid in before.values()} == set(before.values())
    gateway.process.kill()
    await gateway.end(9)
    await until(lambda: not any(map(is_running, before.values())), limit_s=60)
    await until(lambda: not engines_below(home))
    await until(lambda: not [path for path in (home / "run").iterdir() if path.is_dir()])
    check_whole(home)


async def test_a_restart_under_64_streams_fails_none_of_them(smollm2_gguf: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    gateway = await Gateway.start(home, settings_for(smollm2_gguf, "one") | {"drain_timeout_s": 120})
    try:
        before = await all_ready(gateway)
        streams = [asyncio.create_task(ask(gateway.address, "one", 24, stream=True)) for _ in range(STREAMS)]
        await gateway.until("one", in_flight=STREAMS)
        await asyncio.sleep(1)
        assert (await gateway.post("/v1/restart")).status == 200
        assert not all(stream.done() for stream in streams)
        more = [asyncio.create_task(ask(gateway.address, "one", 2, stream=number % 2 == 0)) for number in range(16)]
        assert set(await asyncio.gather(*streams, *more)) == {200}
        assert await all_ready(gateway) == before
    finally:
        await gateway.end()
    assert not marked(str(home / "run"))
    await until(lambda: not engines_below(home))
