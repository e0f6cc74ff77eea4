"""How many tokens requests took: read off the ends of replies, by both ways in."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import sleepy
from harness import Gateway, StartGateway

from gateway.api import usage

pytestmark = pytest.mark.both_doors

VLLM_END = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop","stop_reason":null}]}\n\n'
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":12,"total_tokens":19,"completion_tokens":7}}\n\n'
    b"data: [DONE]\n\n"
)
LLAMA_END = (
    b'data: {"choices":[{"finish_reason":"length","index":0,"delta":{}}],"object":"chat.completion.chunk","timings":'
    b'{"cache_n":5,"prompt_n":30,"prompt_ms":1.5,"predicted_n":20,"predicted_ms":90.25}}\n\ndata: [DONE]\n\n'
)
LLAMA_WHOLE = (
    b'{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"x"}}],"usage":'
    b'{"completion_tokens":3,"prompt_tokens":9,"total_tokens":12,"prompt_tokens_details":{"cached_tokens":4}},'
    b'"timings":{"cache_n":4,"prompt_n":5,"predicted_n":3}}'
)
SPOKEN = json.dumps({"choices": [{"text": '"usage": {"prompt_tokens": 5}, "finish_reason":"stop"'}]}).encode()
ANTHROPIC_BEGIN = b'event: message_start\ndata: {"message":{"usage":{"input_tokens":8,"output_tokens":0}}}\n\n'
ANTHROPIC_END = (
    b'event: message_delta\ndata: {"delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":4}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)


@pytest.mark.parametrize(
    ("begin", "end", "told"),
    [
        (b"", VLLM_END, (12, 7, "stop")),
        (b"", LLAMA_END, (35, 20, "length")),
        (LLAMA_WHOLE, LLAMA_WHOLE, (9, 3, "stop")),
        (ANTHROPIC_BEGIN, ANTHROPIC_END, (8, 4, "end_turn")),
        (
            b'{"model":"m","object":"list","usage":{"prompt_tokens":6,"total_tokens":6},"data":[',
            b"0.5]}",
            (6, None, None),
        ),
        (SPOKEN, SPOKEN, (None, None, None)),
        (b"", b'"finish_reason":"made-up_by_x"}', (None, None, None)),
        (b"", b'"finish_reason":"made_up"}', (None, None, "other")),
        (b"", b'"usage":null}', (None, None, None)),
    ],
)
def test_the_ends_of_a_reply_tell_it(begin: bytes, end: bytes, told: tuple[int | None, int | None, str | None]) -> None:
    assert usage.read(begin, end) == told


def test_only_the_event_that_tells_it_is_taken_out() -> None:
    first, _, done = VLLM_END.split(b"\n\n")[:3]
    assert usage.without(VLLM_END) == first + b"\n\n" + done + b"\n\n"
    spoken = b"data: " + json.dumps({"choices": [{"text": '"choices":[],"usage":{}'}]}).encode() + b"\n\n"
    said = b'data: {"choices":[{"delta":{"content":"x"}}],"more":{"choices":[]},"usage":{"prompt_tokens":1}}\n\n'
    for kept in (spoken, said, LLAMA_END, b'data: {"choices":[],"usage":null}\n\n'):
        assert usage.without(kept) == kept
    for told in (b'data: {"usage":{"prompt_tokens":1},"choices":[]}\n\n', b'data:{"choices" : [],"usage" : {}}\n\n'):
        assert usage.without(told + VLLM_END) == usage.without(VLLM_END)


def test_a_long_event_takes_no_longer_for_what_is_in_it() -> None:
    begun = time.perf_counter()
    for end in (b"}", b""):
        usage.without(b'data: {"choices":[]' + b',"choices":[],"usage":{' * 20_000 + end + b"\n\n")
    assert time.perf_counter() - begun < 2


async def counted(gateway: Gateway, model: str) -> dict[str, float]:
    """What the metrics tell of its tokens."""
    text = (await gateway.get("/metrics")).body.decode()
    names = "prompt_tokens_total|completion_tokens_total|inter_token_seconds_count|finish_reasons_total"
    found = re.findall(rf'^hostler_({names}){{model="{model}"(?:,reason="(\w+)")?}} (\S+)$', text, re.MULTILINE)
    return {reason or name: float(count) for name, reason, count in found}


async def test_whole_replies_streams_and_embeddings_are_counted(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 5}, model={"preload": True})
    whole = (await gateway.complete(prompt="a b c")).json["usage"]
    asked: Any = {"stream_options": {"include_usage": True}}
    lines = await gateway.stream(prompt="a b c", max_tokens=2, **asked)
    streamed = json.loads(lines[-2].removeprefix("data: "))["usage"]
    await gateway.stream(prompt="a b c")  # nobody has asked, and the engine tells nothing
    embedded = (await gateway.post("/v1/embeddings", {"model": "fake", "input": "a b"})).json["usage"]
    assert await counted(gateway, "fake") == {
        "prompt_tokens_total": whole["prompt_tokens"] + streamed["prompt_tokens"] + embedded["prompt_tokens"],
        "completion_tokens_total": 5 + 2 + 5,
        "inter_token_seconds_count": 2,
        "stop": 2,
        "length": 1,
    }


async def test_of_a_stream_whose_client_leaves_the_tokens_that_came_are_counted(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 500, "token_delay_s": 0.05}, model={"preload": True})
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with gateway.session.post(gateway.address + "/v1/chat/completions", json=body) as response:
        seen = 0
        while seen < 4:
            seen += b"tok" in await response.content.readline()
    await gateway.until(in_flight=0)
    assert 4 <= (await counted(gateway, "fake"))["completion_tokens_total"] <= 8


async def test_an_engine_that_tells_only_if_asked_is_asked_and_clients_do_not_see_it(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    env = sleepy.installed_in(tmp_path / "engines")
    model = {"model_engine": "sleepy", "model_path": str(tmp_path), "preload": True}
    gateway = await start_gateway(models={"asked": model}, env=env)
    await gateway.until("asked", state="ready")
    for path, said in (("completions", {"prompt": "a b c"}), ("chat/completions", {"messages": [{"role": "user"}]})):
        body = {"model": "asked", "stream": True, "max_tokens": 3} | said
        plain = await gateway.post(f"/v1/{path}", body)
        assert b"usage" not in plain.body
        assert plain.body.endswith(b"data: [DONE]\n\n")
        told = await gateway.post(f"/v1/{path}", body | {"stream_options": {"include_usage": True}})
        assert told.body.count(b'"usage"') == 1
        declined = await gateway.post(f"/v1/{path}", body | {"stream_options": {"include_usage": False}})
        assert b"usage" not in declined.body
    figures = await counted(gateway, "asked")
    assert figures["completion_tokens_total"] == 2 * 3 * 3
    assert figures["length"] == 6
    assert figures["prompt_tokens_total"] > 0
