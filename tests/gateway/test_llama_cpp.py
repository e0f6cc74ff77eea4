"""Further options of llama.cpp, by the real engine: LoRA adapters, a draft model, and sleep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from comers import come_and_leave, environment_of
from harness import Gateway
from xinference_client import RESTfulClient

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

SMALL = {"n_threads": 1, "context_length": 512, "n_parallel": 2, "model_engine": "llama.cpp"}
FRANCE = {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), {})
    yield gateway
    assert await gateway.end() == 0


async def test_an_adapter_is_used_by_requests_that_name_it(
    gateway: Gateway, smollm2_gguf: Path, lora_gguf: Path
) -> None:
    def launch_and_ask() -> list[str]:
        client = RESTfulClient(gateway.address)
        adapters = {"lora_list": [{"lora_name": "odd", "local_path": str(lora_gguf)}]}
        client.launch_model(
            "smol",
            model_uid="smol",
            model_path=str(smollm2_gguf),
            peft_model_config=adapters,
            trust_remote_code=True,
            **SMALL,
        )
        model = client.get_model("smol")
        prompt, config = FRANCE["prompt"], {"max_tokens": 6, "temperature": 0}
        named = config | {"lora_name": "odd"}
        return [model.generate(prompt, how)["choices"][0]["text"] for how in (config, named, config)]

    plain, odd, again = await asyncio.to_thread(launch_and_ask)
    assert plain.startswith(" Paris")
    assert (again, odd != plain) == (plain, True)
    answer = await gateway.complete("smol", **FRANCE, lora_name="other")
    assert (answer.status, answer.error["param"]) == (400, "lora_name")
    assert "It has odd." in answer.error["message"]


async def test_a_draft_model_changes_nothing_of_the_answer(gateway: Gateway, smollm2_gguf: Path) -> None:
    launch: dict[str, Any] = {
        "model_uid": "drafted",
        "model_path": str(smollm2_gguf),
        "model_draft": str(smollm2_gguf),
        "draft_n_max": 4,
    }
    assert (await gateway.post("/v1/models", launch | SMALL)).status == 200
    answer = await gateway.complete("drafted", **FRANCE)
    assert answer.json["choices"][0]["text"].startswith(" Paris")
    assert answer.json["timings"]["draft_n"] > 0


async def test_an_idle_engine_gives_its_memory_back_and_wakes_up(gateway: Gateway, smollm2_gguf: Path) -> None:
    launch = {"model_uid": "sleeper", "model_path": str(smollm2_gguf), "sleep_idle_seconds": 2} | SMALL
    assert (await gateway.post("/v1/models", launch)).status == 200
    awake = await gateway.until("sleeper", state="ready", tier=None)
    for _ in range(2):
        asleep = await gateway.until("sleeper", state="asleep", tier="disk")
        assert asleep["memory_bytes"] < awake["memory_bytes"] / 2
        model = (await gateway.get("/v1/models/sleeper")).json
        assert (model["status"], model["tier"]) == ("asleep", "disk")
        assert (await gateway.get("/v1/models/sleeper/queue")).json["state"] == "asleep"
        refused = await gateway.post("/v1/models/sleeper/sleep")
        assert "sleeper cannot sleep: it does so by itself, after 2 s without a request." in refused.error["message"]
        await asyncio.sleep(3)  # being asked for its state does not wake it
        assert (await gateway.until("sleeper"))["state"] == "asleep"
        assert (await gateway.complete("sleeper", **FRANCE)).json["choices"][0]["text"].startswith(" Paris")
        assert (await gateway.until("sleeper"))["state"] == "ready"
    assert (await gateway.until("sleeper"))["pid"] == awake["pid"]


async def test_an_adapter_that_is_not_there_ends_in_a_sentence(
    gateway: Gateway, smollm2_gguf: Path, tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.gguf")
    launch = {"model_uid": "without", "model_path": str(smollm2_gguf)} | SMALL
    launch["lora_list"] = [{"lora_name": "a", "local_path": missing}]
    answer = await gateway.post("/v1/models", launch)
    assert answer.status >= 400
    assert missing in answer.error["message"]


async def test_streams_that_are_left_at_random_leave_nothing_behind(gateway: Gateway, smollm2_gguf: Path) -> None:
    launch = {"model_uid": "crowded", "model_path": str(smollm2_gguf), "n_threads_http": 300}
    assert (await gateway.post("/v1/models", launch | SMALL | {"n_parallel": 8, "context_length": 256})).status == 200
    assert (await gateway.complete("crowded", max_tokens=1)).status == 200
    replica = await gateway.until("crowded", in_flight=0)
    seen = await come_and_leave(gateway, "crowded", 256)
    assert (seen.whole > 20, seen.left > 200) == (True, True)
    key = environment_of(replica["pid"])["LLAMA_API_KEY"]
    connector = aiohttp.UnixConnector(replica["address"].removeprefix("unix:"))
    async with (
        aiohttp.ClientSession("http://x", connector=connector, headers={"authorization": f"Bearer {key}"}) as engine,
        asyncio.timeout(20),
    ):
        while any(slot["is_processing"] for slot in await (await engine.get("/slots")).json()):
            await asyncio.sleep(0.1)
