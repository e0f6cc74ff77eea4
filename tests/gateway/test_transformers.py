"""The transformers engine behind the gateway: SmolLM2 in PyTorch's format, all requests in one batch."""

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
from harness import Gateway
from openai import AsyncOpenAI
from xinference_client import RESTfulClient

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

OPTIONS = {"n_threads": 1, "context_length": 1024, "max_num_seqs": 4}
HELLO = [{"role": "user", "content": "Say hello."}]
FRANCE = "The capital of France is"
WITHOUT_END = {"ignore_eos": True}
# A chat template by which what the model is to say is known: it goes on with what it is given.
ECHO = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    torch_python: str, smollm2_hf: Path, lora_hf: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    model = {"model_path": str(smollm2_hf), "model_engine": "transformers", "options": OPTIONS}
    settings = {
        "engines": {"transformers": {"python": torch_python}},
        "restart_limit": 2,
        "models": {
            "smol": model,
            "alone": model | {"options": OPTIONS | {"continuous_batching": False}},
            "narrow": model | {"options": OPTIONS | {"kv_cache_tokens": 64}},
            "odd": model | {"options": OPTIONS | {"lora_list": [{"lora_name": "odd", "local_path": str(lora_hf)}]}},
            "caller": model | {"options": OPTIONS | {"chat_template": ECHO + "{# [TOOL_CALLS] #}"}},
        },
    }
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), settings)
    yield gateway
    assert await gateway.end() == 0


@pytest.fixture
def client(gateway: Gateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0, timeout=170)


async def complete(client: AsyncOpenAI, model: str = "smol", prompt: Any = FRANCE, **options: Any) -> Any:
    extra = {name: options.pop(name) for name in ("stop_token_ids", "top_k", "ignore_eos") if name in options}
    extra |= options.pop("extra_body", {})
    options = {"max_tokens": 4, "temperature": 0} | options
    return await client.completions.create(model=model, prompt=prompt, extra_body=extra, **options)


@pytest.mark.parametrize("model", ["smol", "alone"])
async def test_a_completion_knows_the_capital_of_france(model: str, client: AsyncOpenAI) -> None:
    answer = await complete(client, model)
    assert answer.choices[0].text.startswith(" Paris")
    assert (answer.model, answer.usage.completion_tokens) == (model, 4)
    stream = await complete(client, model, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == answer.choices[0].text


async def test_a_chat_streams_what_it_answers_whole_and_tells_usage(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="smol", messages=HELLO, max_tokens=8, temperature=0)
    stream = await client.chat.completions.create(
        model="smol", messages=HELLO, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    parts, usage, ends = [], None, []
    async for chunk in stream:
        parts += [choice.delta.content or "" for choice in chunk.choices]
        ends += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
        usage = chunk.usage or usage
    assert "".join(parts) == whole.choices[0].message.content
    assert (usage, ends) == (whole.usage, [whole.choices[0].finish_reason])


@pytest.mark.parametrize("model", ["smol", "alone"])
async def test_an_answer_ends_at_a_stop_text_and_at_a_stop_token(model: str, client: AsyncOpenAI) -> None:
    text = (await complete(client, model, max_tokens=12)).choices[0].text
    middle = text[5:8]
    for stream in (False, True):
        answer = await complete(client, model, max_tokens=12, stop=[middle], stream=stream)
        chunks = [chunk async for chunk in answer] if stream else [answer]
        told = "".join(chunk.choices[0].text for chunk in chunks)
        assert (told, chunks[-1].choices[0].finish_reason) == (text[: text.index(middle)], "stop")
    ids = (await tokenize(client, FRANCE + " Paris"))[-1:]
    answer = await complete(client, model, stop_token_ids=ids)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")


async def tokenize(client: AsyncOpenAI, prompt: str) -> list[int]:
    url = str(client.base_url).removesuffix("v1/") + "tokenize"
    found: dict[str, Any] = await client.post(url, body={"model": "smol", "prompt": prompt}, cast_to=object)
    return found["tokens"]


@pytest.mark.parametrize("model", ["smol", "alone"])
async def test_a_seed_repeats_an_answer_also_beside_others(model: str, client: AsyncOpenAI) -> None:
    def drawn(seed: int) -> Any:
        return complete(client, model, prompt="Once", max_tokens=8, temperature=1.5, seed=seed)

    alone = (await drawn(7)).choices[0].text
    among = await asyncio.gather(*(drawn(seed) for seed in (1, 7, 2)))
    texts = [answer.choices[0].text for answer in among]
    assert texts[1] == alone
    assert len(set(texts)) == 3


async def test_top_k_of_one_and_a_bias_choose_the_token(client: AsyncOpenAI) -> None:
    answer = await complete(client, temperature=2.0, top_k=1)
    assert answer.choices[0].text.startswith(" Paris")
    (token,) = (await tokenize(client, " Rome"))[-1:]
    biased = await complete(client, max_tokens=1, logit_bias={str(token): 100})
    assert biased.choices[0].text == " Rome"


async def test_several_choices_and_prompts_come_numbered(client: AsyncOpenAI) -> None:
    answer = await complete(client, prompt=[FRANCE, "Once upon a"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text != answer.choices[2].text
    assert answer.usage.completion_tokens == 16


async def test_probabilities_of_tokens_are_told(client: AsyncOpenAI) -> None:
    answer = await complete(client, logprobs=2)
    told = answer.choices[0].logprobs
    assert told.tokens[0] == " Paris"
    assert told.token_logprobs[0] == max(told.top_logprobs[0].values()) < 0
    chat = await client.chat.completions.create(
        model="smol", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    assert [len(one.top_logprobs) for one in chat.choices[0].logprobs.content] == [2, 2, 2]


async def test_more_streams_than_places_all_complete(client: AsyncOpenAI) -> None:
    async def one(number: int) -> int:
        stream = await complete(
            client,
            prompt=f"{number} bottles of",
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
            ignore_eos=True,
        )
        return max([chunk.usage.completion_tokens async for chunk in stream if chunk.usage])

    assert await asyncio.gather(*(one(number) for number in range(12))) == [6] * 12


@pytest.mark.parametrize("model", ["smol", "alone"])
async def test_a_client_that_leaves_frees_its_place(model: str, client: AsyncOpenAI, gateway: Gateway) -> None:
    stream = await complete(client, model, prompt="1, 2,", max_tokens=900, stream=True, ignore_eos=True)
    await anext(aiter(stream))
    assert await lines_written(gateway, model) == 1
    await stream.close()
    await until_free(gateway, model)
    with pytest.raises(openai.APITimeoutError):
        await complete(client.with_options(timeout=0.5), model, prompt="1, 2,", max_tokens=900, ignore_eos=True)
    await until_free(gateway, model)


async def until_free(gateway: Gateway, model: str) -> None:
    async with asyncio.timeout(10):
        while await lines_written(gateway, model):
            await asyncio.sleep(0.05)


async def lines_written(gateway: Gateway, model: str) -> int:
    """What the worker itself says."""
    replica = await gateway.until(model, state="ready")
    key = psutil.Process(replica["pid"]).environ()["WORKER_API_KEY"]
    connector = aiohttp.UnixConnector(replica["address"].removeprefix("unix:"))
    async with aiohttp.ClientSession(connector=connector, headers={"authorization": f"Bearer {key}"}) as engine:
        return (await (await engine.get("http://x/load")).json())["server_load"]


async def test_refusals_name_what_is_wrong(client: AsyncOpenAI, gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        await complete(client, prompt="word " * 1100)
    assert "context is 1024" in too_long.value.message
    assert too_long.value.code == "context_length_exceeded"
    bodies: list[tuple[dict[str, Any], str]] = [
        ({"max_tokens": 2000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}}, "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar"),
        ({"guided_json": {}, "guided_regex": "x"}, "guided_json"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"lora_name": "mine"}, "lora_name"),
        ({"stop": 3}, "stop"),
    ]
    for body, param in bodies:
        answer = await gateway.post("/v1/chat/completions", {"model": "smol", "messages": HELLO} | body)
        assert (answer.status, answer.error["param"]) == (400, param), answer.body


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", ["smol", "alone"])
async def test_an_answer_keeps_to_a_schema_beside_others_that_are_free(model: str, client: AsyncOpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}

    def ask(temperature: float) -> Any:
        return client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Name a city."}],
            max_tokens=80,
            temperature=temperature,
            seed=3,
            response_format=form,
        )

    free = (await complete(client, model, max_tokens=8)).choices[0].text
    bound, drawn, beside = await asyncio.gather(ask(0), ask(1.5), complete(client, model, max_tokens=8))
    for answer in (bound, drawn):
        told = json.loads(answer.choices[0].message.content)
        assert set(told) == {"city", "big"}
        assert type(told["big"]) is bool
        assert answer.choices[0].finish_reason == "stop"
    assert beside.choices[0].text == free


async def test_an_answer_is_an_object_a_choice_or_fits_an_expression(client: AsyncOpenAI) -> None:
    async def ask(**extra: Any) -> str:
        answer = await client.chat.completions.create(
            model="smol", messages=HELLO, max_tokens=60, temperature=0, extra_body=extra
        )
        return answer.choices[0].message.content or ""

    assert (await ask(response_format={"type": "json_object"})).startswith("{")
    assert await ask(guided_choice=["rot", "grün"]) in ("rot", "grün")
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", await ask(structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"}))
    answer = await complete(client, max_tokens=30, extra_body={"guided_json": {"enum": ["Rome"]}}, n=2)
    assert [choice.text for choice in answer.choices] == ['"Rome"', '"Rome"']


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call_is_read_as_the_template_says(client: AsyncOpenAI, stream: bool) -> None:
    """What the model is to write is prescribed, so that it calls the tool."""
    call = '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'
    answer = await client.chat.completions.create(
        model="caller",
        messages=HELLO,
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        temperature=0,
        stream=stream,
        extra_body={"guided_choice": [call]},
    )
    if stream:
        chunks = [chunk.choices[0] async for chunk in answer]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
        (told,) = [one for chunk in chunks for one in chunk.delta.tool_calls or ()]
        finish = chunks[-1].finish_reason
    else:
        (told,) = answer.choices[0].message.tool_calls
        finish = answer.choices[0].finish_reason
    assert (told.function.name, told.function.arguments, finish) == ("f", '{"a": 1}', "tool_calls")


async def test_an_adapter_is_part_of_the_model(client: AsyncOpenAI, gateway: Gateway) -> None:
    plain = (await complete(client, max_tokens=6)).choices[0].text
    assert (await complete(client, "odd", max_tokens=6)).choices[0].text != plain
    named = await gateway.complete("odd", prompt=FRANCE, max_tokens=6, temperature=0, lora_name="odd")
    assert named.json["choices"][0]["text"] != plain
    other = await gateway.complete("odd", prompt=FRANCE, lora_name="even")
    assert "It has odd." in other.error["message"]


async def test_an_adapter_that_does_not_fit_says_so(gateway: Gateway, smollm2_hf: Path, tmp_path: Path) -> None:
    launch = {"model_uid": "bad", "model_path": str(smollm2_hf), "model_engine": "transformers"}
    options = OPTIONS | {"lora_list": [{"lora_name": "x", "local_path": str(tmp_path)}]}
    answer = await gateway.post("/v1/models", launch | {"options": options}, timeout=aiohttp.ClientTimeout(170))
    assert answer.status >= 400
    assert f"The LoRA adapter in {tmp_path} does not go into this model" in answer.error["message"]


async def test_nothing_is_written_for_a_request_that_is_refused(client: AsyncOpenAI, gateway: Gateway) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": [FRANCE, "word " * 1100]},
        {"prompt": FRANCE, "stream": True, "stream_options": {"include_usage": "perhaps"}},
    ]
    for body in bodies:
        more = {"model": "smol", "max_tokens": 900, "ignore_eos": True}
        assert (await gateway.post("/v1/completions", more | body)).status == 400
        assert await lines_written(gateway, "smol") == 0


async def test_a_request_that_the_cache_cannot_hold_is_refused_and_spoils_no_other(client: AsyncOpenAI) -> None:
    assert (await complete(client, "narrow")).choices[0].text.startswith(" Paris")
    other = asyncio.create_task(complete(client, "narrow", max_tokens=50, ignore_eos=True))
    for body in ({"prompt": "word " * 100}, {"max_tokens": 100}):
        with pytest.raises(openai.BadRequestError, match=r"context (is|of) 64"):
            await complete(client, "narrow", **body)
    assert (await other).usage.completion_tokens == 50


async def test_a_custom_familys_template_tags_and_ends_reach_the_engine(
    gateway: Gateway, smollm2_hf: Path, client: AsyncOpenAI
) -> None:
    family = {
        "version": 2,
        "model_name": "thinker",
        "model_family": "my-thinker",
        "model_lang": ["en"],
        "model_ability": ["chat", "generate", "reasoning"],
        "model_specs": [
            {
                "model_format": "pytorch",
                "model_size_in_billions": 1,
                "quantization": "none",
                "model_uri": str(smollm2_hf),
            }
        ],
        "chat_template": ECHO,
        "reasoning_start_tag": " is",
        "reasoning_end_tag": ".",
        "stop": ["\n"],
    }
    registered = await gateway.post("/v1/model_registrations/LLM", {"model": json.dumps(family), "persist": False})
    assert registered.status == 200, registered.body
    assert "x-hostler-notes" not in registered.headers
    launch = {"model_name": "thinker", "model_uid": "thinker", "model_engine": "transformers"} | OPTIONS
    assert (await gateway.post("/v1/models", launch, timeout=aiohttp.ClientTimeout(170))).status == 200
    ask: dict[str, Any] = {"model": "thinker", "max_tokens": 12, "temperature": 0}
    # The prompt is the chat itself, and so ends with an open tag: what follows, up to the end tag, is thinking.
    chat = await client.chat.completions.create(messages=[{"role": "user", "content": FRANCE}], **ask)
    message = chat.choices[0].message
    assert ((message.model_extra or {}).get("reasoning_content"), message.content) == (" Paris", "")
    # And the family's stop ends any answer.
    answer = await client.completions.create(prompt=FRANCE, **ask)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" Paris.", "stop")
    assert (await gateway.request("DELETE", "/v1/models/thinker")).status == 200


async def test_xinferences_client_chats_and_generates(gateway: Gateway) -> None:
    def talk() -> tuple[dict[str, Any], dict[str, Any]]:
        model = RESTfulClient(gateway.address).get_model("smol")
        config = {"max_tokens": 6, "temperature": 0}
        return model.generate(FRANCE, config), model.chat(HELLO, generate_config=config)

    generated, chat = await asyncio.to_thread(talk)
    assert generated["choices"][0]["text"].startswith(" Paris")
    assert chat["choices"][0]["message"]["content"]


async def test_a_worker_killed_in_mid_stream_gives_an_error_and_is_back(client: AsyncOpenAI, gateway: Gateway) -> None:
    pid = (await gateway.until("smol", state="ready"))["pid"]
    stream = await complete(client, prompt="1, 2,", max_tokens=900, stream=True, ignore_eos=True)
    await anext(aiter(stream))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="SIGKILL"):
        async for _ in stream:
            pass
    assert (await complete(client)).choices[0].text.startswith(" Paris")


async def test_a_gpu_that_is_not_there_is_told(gateway: Gateway, smollm2_hf: Path) -> None:
    launch = {"model_uid": "away", "model_path": str(smollm2_hf), "model_engine": "transformers"}
    wish = {"options": {"device": "cuda"}, "envs": {"CUDA_VISIBLE_DEVICES": ""}}
    answer = await gateway.post("/v1/models", launch | wish, timeout=aiohttp.ClientTimeout(170))
    assert "sees no GPU here. Leave `device` out" in answer.error["message"]
    await gateway.request("DELETE", "/v1/models/away")


async def test_files_that_are_no_model_end_in_a_sentence(gateway: Gateway, smollm2_hf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in smollm2_hf.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"no weights at all")
    launch = {"model_uid": "broken", "model_path": str(broken), "model_engine": "transformers"} | OPTIONS
    answer = await gateway.post("/v1/models", launch, timeout=aiohttp.ClientTimeout(170))
    assert answer.status >= 400
    assert "cannot be loaded" in answer.error["message"]
    await gateway.request("DELETE", "/v1/models/broken")
