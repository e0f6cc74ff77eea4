"""The official OpenAI SDK against a real model: SmolLM2 on llama.cpp, fetched from the package index.

Asserted on are raw completions, schemas, usage and errors, never the wit of an answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import pytest_asyncio
from harness import Gateway, until
from openai import AsyncOpenAI

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

OPTIONS = {"n_threads": 1, "context_length": 1024, "n_parallel": 4}
WITHOUT_END = {"ignore_eos": True}  # the model may not end its answer before max_tokens
MODEL = {"model_name": "smollm2-instruct", "model_hub": "pypi", "model_engine": "llama.cpp", "options": OPTIONS}


@pytest.fixture(scope="module")
def cache(model_cache: Path) -> Path:
    return model_cache


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    settings = {
        "cache": str(cache),
        "models": {
            "smol": MODEL,
            "embedder": MODEL | {"options": OPTIONS | {"embedding": True, "pooling": "mean"}},
        },
        "keepalive_interval_s": 0.2,
    }
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), settings)
    yield gateway
    assert await gateway.end() == 0


@pytest.fixture
def client(gateway: Gateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0, timeout=120)


async def test_the_first_request_fetches_and_loads_and_a_stream_is_kept_alive_meanwhile(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="smol", prompt="The capital of France is", max_tokens=4, temperature=0, stream=True
    )
    text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
    assert text.startswith(" Paris")


async def test_models_are_listed(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["smol", "embedder"]
    assert (await client.models.retrieve("smol")).object == "model"


async def test_a_chat_answers_whole_and_streamed_with_usage(client: AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    whole = await client.chat.completions.create(model="smol", messages=messages, max_tokens=8, temperature=0)
    assert whole.model == "smol"
    assert whole.usage.completion_tokens <= 8
    parts, usage = [], None
    stream = await client.chat.completions.create(
        model="smol",
        messages=messages,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        parts += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(parts) == whole.choices[0].message.content
    assert usage.prompt_tokens == whole.usage.prompt_tokens


async def test_a_schema_is_enforced(client: AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
    }
    answer = await client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": "Name a city."}],
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "big"}


async def test_embeddings_of_both_encodings_agree(client: AsyncOpenAI, gateway: Gateway) -> None:
    packed = await client.embeddings.create(model="embedder", input=["a cat", "a dog"])  # the SDK asks for base64
    body = {"model": "embedder", "input": ["a cat", "a dog"], "encoding_format": "float"}
    plain = (await gateway.post("/v1/embeddings", body)).json
    assert len(packed.data) == 2
    assert packed.data[1].embedding == pytest.approx(plain["data"][1]["embedding"], abs=1e-3)


async def test_refusals_are_the_sdks_own_exceptions(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        await client.chat.completions.create(model="smoll", messages=[{"role": "user", "content": "x"}])
    assert not_found.value.code == "model_not_found"
    assert "'smol'" in not_found.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        await client.post("/chat/completions", body={"model": "smol"}, cast_to=object)
    assert bad.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as of_engine:
        await client.chat.completions.create(model="smol", messages=[{"role": "user"}])
    assert of_engine.value.body["source"] == "engine"


async def test_a_client_that_times_out_frees_the_slot(client: AsyncOpenAI, gateway: Gateway) -> None:
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.5).completions.create(
            model="smol", prompt="x", max_tokens=900, extra_body=WITHOUT_END
        )
    left = time.monotonic()
    await gateway.until("smol", in_flight=0, limit_s=5)
    # For clients of whole answers llama.cpp looks only when a second has passed in which nothing else happened, our
    # own question included.
    await until_slots_idle(gateway, left, limit_s=6, pause_s=1.5)


async def test_a_client_that_leaves_in_mid_stream_frees_the_slot_within_a_second(
    client: AsyncOpenAI, gateway: Gateway
) -> None:
    stream = await client.completions.create(
        model="smol", prompt="1, 2, 3,", max_tokens=900, stream=True, extra_body=WITHOUT_END
    )
    async for _ in stream:
        break
    left = time.monotonic()
    await stream.close()
    await until_slots_idle(gateway, left, limit_s=3)  # a quiet machine takes 0.1 s


async def read_to_end(stream: Any) -> None:
    async for _ in stream:
        pass


async def until_slots_idle(gateway: Gateway, since: float, limit_s: float, pause_s: float = 0.02) -> None:
    """Ask the engine itself whether any of its slots still works."""
    import aiohttp

    replica = await gateway.until("smol", state="ready")
    key = psutil.Process(replica["pid"]).environ()["LLAMA_API_KEY"]
    connector = aiohttp.UnixConnector(replica["address"].removeprefix("unix:"))
    async with aiohttp.ClientSession(connector=connector, headers={"authorization": f"Bearer {key}"}) as engine:
        async with asyncio.timeout(10):
            while True:
                await asyncio.sleep(pause_s)
                slots = await (await engine.get("http://x/slots")).json()
                if not any(slot["is_processing"] for slot in slots):
                    break
    assert time.monotonic() - since < limit_s


async def test_sixty_four_streams_at_once_on_four_slots_all_complete(client: AsyncOpenAI) -> None:
    async def one(number: int) -> int:
        stream = await client.completions.create(
            model="smol",
            prompt=f"{number} bottles of",
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=WITHOUT_END,
        )
        return max([chunk.usage.completion_tokens async for chunk in stream if chunk.usage])

    assert await asyncio.gather(*(one(number) for number in range(64))) == [6] * 64


async def test_an_engine_killed_in_mid_stream_gives_an_error_and_is_back(client: AsyncOpenAI, gateway: Gateway) -> None:
    pid = (await gateway.until("smol", state="ready"))["pid"]
    stream = await client.completions.create(
        model="smol", prompt="1, 2, 3,", max_tokens=900, stream=True, extra_body=WITHOUT_END
    )
    await anext(aiter(stream))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError) as died:
        await read_to_end(stream)
    assert "SIGKILL" in died.value.message
    answer = await client.completions.create(
        model="smol", prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert answer.choices[0].text.startswith(" Paris")


async def test_an_engine_killed_before_the_first_byte_is_not_noticed_by_the_client(
    client: AsyncOpenAI, gateway: Gateway
) -> None:
    pid = (await gateway.until("smol", state="ready"))["pid"]
    prompt = "word " * 700  # long enough to read for the engine to be killed meanwhile
    asking = asyncio.ensure_future(client.completions.create(model="smol", prompt=prompt, max_tokens=2))
    await gateway.until("smol", in_flight=1)
    os.kill(pid, signal.SIGKILL)
    assert (await asking).usage.completion_tokens <= 2
    assert (await gateway.until("smol", state="ready"))["pid"] != pid


async def test_ctrl_c_with_streams_in_flight_ends_the_real_engine(cache: Path, tmp_path: Path) -> None:
    gateway = await Gateway.start(tmp_path / "home", {"cache": str(cache), "models": {"smol": MODEL}})
    client = AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0)

    async def one() -> str:
        try:
            stream = await client.completions.create(
                model="smol", prompt="1, 2, 3,", max_tokens=900, stream=True, extra_body=WITHOUT_END
            )
            await read_to_end(stream)
        except openai.APIError as exc:
            return str(exc.code)
        return "ended"

    streams = [asyncio.ensure_future(one()) for _ in range(4)]
    replica = await gateway.until("smol", in_flight=4)
    await asyncio.sleep(0.5)
    assert await gateway.end(signal.SIGINT) == 0
    assert await asyncio.gather(*streams) == ["shutting_down"] * 4
    await until(lambda: not psutil.pid_exists(replica["pid"]), limit_s=2)
