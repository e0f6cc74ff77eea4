"""vLLM on the CPU behind the gateway: one start for the whole module, since a start takes a minute or two."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest
import pytest_asyncio
from comers import come_and_leave
from harness import Gateway, until
from openai import AsyncOpenAI
from xinference_client import RESTfulClient

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

OPTIONS = {"n_threads": 1, "cpu_kv_cache_gib": 1, "context_length": 1024, "max-num-seqs": 16}
START_LIMIT_S = 400
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    vllm_python: str,
    torch_python: str,
    smollm2_hf: Path,
    lora_hf: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Gateway]:
    model = {
        "model_path": str(smollm2_hf),
        "model_engine": "vLLM",
        "options": OPTIONS | {"lora_list": [{"lora_name": "odd", "local_path": str(lora_hf)}]},
        "preload": True,
        "start_timeout_s": START_LIMIT_S,
        "load_timeout_s": START_LIMIT_S,
    }
    settings = {
        "engines": {"vLLM": {"python": vllm_python}, "transformers": {"python": torch_python}},
        "models": {
            "smol": model,
            "other": model
            | {
                "model_engine": "transformers",
                "preload": False,
                "options": {"n_threads": 1, "context_length": 1024},
            },
        },
    }
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), settings)
    first = {"model": "smol", "prompt": "x", "max_tokens": 1}
    answer = await gateway.post("/v1/completions", first, timeout=aiohttp.ClientTimeout(START_LIMIT_S))
    assert answer.status == 200, answer.body
    yield gateway
    assert await gateway.end() == 0


@pytest.fixture
def client(gateway: Gateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0, timeout=300)


async def test_a_completion_knows_the_capital_of_france(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="smol", prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.model == "smol"


async def test_a_chat_streams_what_it_answers_whole_and_tells_usage(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="smol", messages=HELLO, max_tokens=8, temperature=0)
    stream = await client.chat.completions.create(
        model="smol",
        messages=HELLO,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    parts, usage = [], None
    async for chunk in stream:
        parts += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(parts) == whole.choices[0].message.content
    assert usage == whole.usage


async def test_a_schema_is_enforced(client: AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": "Name a city."}],
        max_tokens=80,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city", "big"}


async def test_sixteen_streams_at_once_all_complete(client: AsyncOpenAI) -> None:
    async def one(number: int) -> int:
        stream = await client.completions.create(
            model="smol",
            prompt=f"{number} bottles of",
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        return max([chunk.usage.completion_tokens async for chunk in stream if chunk.usage])

    assert await asyncio.gather(*(one(number) for number in range(16))) == [6] * 16


async def test_a_client_that_leaves_frees_its_place(client: AsyncOpenAI, gateway: Gateway) -> None:
    stream = await client.completions.create(
        model="smol", prompt="1, 2, 3,", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    assert await requests_running(gateway) == 1
    await stream.close()
    async with asyncio.timeout(10):
        while await requests_running(gateway):
            await asyncio.sleep(0.1)


async def requests_running(gateway: Gateway) -> float:
    """What vLLM itself says; those that wait for their turn are some, too."""
    replica = await gateway.until("smol", state="ready")
    connector = aiohttp.UnixConnector(replica["address"].removeprefix("unix:"))
    async with aiohttp.ClientSession(connector=connector) as engine:
        text = await (await engine.get("http://x/metrics")).text()
    found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.MULTILINE)
    assert len(found) == 2
    return sum(map(float, found))


async def test_refusals_name_what_is_wrong(client: AsyncOpenAI, gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.completions.create(model="smol", prompt="x", max_tokens=2000)
    assert "1024" in too_long.value.message
    answer = await gateway.post("/v1/chat/completions", {"model": "smol", "messages": HELLO, "lora_name": "mine"})
    assert (answer.status, answer.error["param"]) == (400, "lora_name")
    assert "It has odd." in answer.error["message"]


async def test_an_adapter_is_used_by_requests_that_name_it(client: AsyncOpenAI) -> None:
    async def ask(**extra: Any) -> str:
        answer = await client.completions.create(
            model="smol", prompt="The capital of France is", max_tokens=6, temperature=0, extra_body=extra
        )
        return answer.choices[0].text

    plain = await ask()
    assert plain.startswith(" Paris")
    assert await ask(lora_name="odd") != plain
    assert await ask() == plain


async def test_xinferences_client_chats_and_generates(gateway: Gateway) -> None:
    def talk() -> tuple[dict[str, Any], dict[str, Any]]:
        model = RESTfulClient(gateway.address).get_model("smol")
        config = {"max_tokens": 6, "temperature": 0}
        return model.generate("The capital of France is", config), model.chat(HELLO, generate_config=config)

    generated, chat = await asyncio.to_thread(talk)
    assert generated["choices"][0]["text"].startswith(" Paris")
    assert chat["choices"][0]["message"]["content"]


async def test_engines_whose_libraries_clash_answer_side_by_side(client: AsyncOpenAI) -> None:
    """vLLM wants another version of transformers than the worker has; each runs under its own Python."""

    async def ask(model: str) -> str:
        answer = await client.completions.create(
            model=model, prompt="The capital of France is", max_tokens=4, temperature=0
        )
        return answer.choices[0].text

    both = await asyncio.gather(ask("smol"), ask("other"))
    assert [text.startswith(" Paris") for text in both] == [True, True]


async def test_streams_that_are_left_at_random_leave_nothing_behind(gateway: Gateway) -> None:
    seen = await come_and_leave(gateway, "smol", 256)
    assert (seen.whole > 20, seen.left > 200) == (True, True)
    async with asyncio.timeout(20):
        while await requests_running(gateway):
            await asyncio.sleep(0.1)


async def test_when_only_the_front_is_killed_nothing_of_the_engine_stays(gateway: Gateway) -> None:
    """The last test here: the model does not come back before the module ends."""
    pid = (await gateway.until("smol", state="ready"))["pid"]
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    assert len(family) > 1
    asking = asyncio.ensure_future(
        gateway.complete("smol", prompt="1, 2, 3,", max_tokens=900, ignore_eos=True, stream=True)
    )
    async with asyncio.timeout(10):
        while not await requests_running(gateway):
            await asyncio.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    answer = await asking
    assert "SIGKILL" in answer.body.decode()
    await until(lambda: not any(psutil.pid_exists(one) for one in family), limit_s=15)
    replica = await gateway.until("smol", limit_s=5)
    assert "SIGKILL" in replica["failure"]["reason"]


async def test_a_context_that_the_launch_leaves_open_is_what_the_memory_holds_and_told(
    vllm_python: str, smollm2_hf: Path, tmp_path: Path
) -> None:
    model = tmp_path / "million"
    model.mkdir()
    for file in smollm2_hf.iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((smollm2_hf / "config.json").read_text()) | {"max_position_embeddings": 2**20}
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config))
    launch = {"model_path": str(model), "model_engine": "vLLM", "options": {"n_threads": 1, "max_num_seqs": 4}}
    limits = {"start_timeout_s": START_LIMIT_S, "load_timeout_s": START_LIMIT_S}
    settings = {"engines": {"vLLM": {"python": vllm_python}}, "ram_limit": "4GiB", "models": {"fake": launch | limits}}
    gateway = await Gateway.start(tmp_path / "home", settings)
    try:
        body = {"model": "fake", "prompt": "x", "max_tokens": 2}
        answer = await gateway.post("/v1/completions", body, timeout=aiohttp.ClientTimeout(START_LIMIT_S))
        assert answer.status == 200, answer.body
        tokens = (await gateway.until(state="ready"))["context_tokens"]
        assert 32768 <= tokens < 100_000
        assert (await gateway.get("/v1/models/fake")).json["max_model_len"] == tokens
        assert f"takes requests of up to {tokens:,} tokens" in str((await gateway.get("/v1/models/fake/events")).json)
    finally:
        await gateway.end()
