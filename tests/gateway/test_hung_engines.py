"""Engines that are ready and then answer nobody any more are noticed and started again; busy ones are not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
from aiohttp import ClientTimeout
from harness import Gateway, StartGateway, is_running, until

PROBES = {"probe_interval_s": 0.4, "probe_failures": 2}


async def test_an_engine_that_is_stopped_while_idle_is_killed_and_started_again(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    grandchildren = tmp_path / "grandchildren"
    fake = {"grandchild": True, "grandchild_file": str(grandchildren)}
    gateway = await start_gateway(fake=fake, model={"preload": True}, **PROBES)
    replica = await gateway.until(state="ready")
    group = [replica["pid"], *json.loads(grandchildren.read_text())]
    os.kill(replica["pid"], signal.SIGSTOP)
    back = await gateway.until(state="ready", starts=2)
    await until(lambda: not any(is_running(pid) for pid in group))
    failure = back["failure"]
    assert failure["reason"].startswith("it has not answered its health check for ")
    assert "hostler logs" in failure["advice"]
    assert (await gateway.complete()).status == 200


async def test_a_request_before_whose_first_byte_the_engine_hangs_is_answered_by_the_next_one(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    fake = {"hang_after_requests": 1, "die_only_first": True, "counter_file": str(tmp_path / "starts")}
    gateway = await start_gateway(fake=fake, **PROBES)
    assert (await gateway.complete()).status == 200
    assert (await gateway.until())["starts"] == 2


async def test_a_request_that_hangs_every_engine_is_tried_twice_and_no_more(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"hang_after_requests": 1}, **PROBES)
    answer = await gateway.complete()
    assert (answer.status, answer.error["code"]) == (502, "engine_died")
    assert "it has not answered its health check for" in answer.error["message"]
    assert "killed" in answer.error["message"]


async def test_an_engine_that_hangs_in_mid_stream_ends_it_with_an_error_event(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 500, "token_delay_s": 0.05}, **PROBES)
    running = asyncio.ensure_future(gateway.stream())
    replica = await gateway.until(state="ready", in_flight=1)
    await asyncio.sleep(0.3)
    os.kill(replica["pid"], signal.SIGSTOP)
    lines = await running
    error = json.loads(lines[-2][6:])["error"]
    assert error["code"] == "engine_died"
    assert "has not answered its health check" in error["message"]
    assert lines[-1] == "data: [DONE]"
    await gateway.until(state="ready", starts=2)


async def test_an_engine_that_computes_and_answers_nobody_meanwhile_is_busy_and_not_hung(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake={"compute_s": 4}, **PROBES)
    answer = await gateway.complete()
    assert answer.status == 200
    assert (await gateway.until())["starts"] == 1


async def test_an_engine_that_computes_on_for_a_client_that_left_is_busy_and_not_hung(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake={"compute_s": 4}, model={"preload": True}, **PROBES)
    replica = await gateway.until(state="ready")
    with pytest.raises(TimeoutError):
        await gateway.post("/v1/completions", {"model": "fake", "prompt": "x"}, timeout=ClientTimeout(total=0.5))
    await gateway.until(in_flight=0)
    await asyncio.sleep(4)
    again = await gateway.until(state="ready")
    assert (again["starts"], again["pid"], again["failure"]) == (1, replica["pid"], None)


async def test_an_engine_that_answers_is_never_taken_for_hung(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={"tokens": 60, "token_delay_s": 0.05}, probe_interval_s=0.3, probe_failures=1)
    lines = await gateway.stream()
    assert lines[-1] == "data: [DONE]"
    await asyncio.sleep(1)
    replica = await gateway.until(state="ready")
    assert (replica["starts"], replica["failure"]) == (1, None)


async def test_a_second_replica_serves_while_the_hung_one_comes_back(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"replica": 2, "preload": True}, **PROBES)
    await until_all_ready(gateway)
    first = (await gateway.replicas())[0]
    os.kill(first["pid"], signal.SIGSTOP)
    answers = await asyncio.gather(*(gateway.complete() for _ in range(10)))
    assert {answer.status for answer in answers} == {200}
    await gateway.until(state="ready", starts=2)


async def until_all_ready(gateway: Gateway) -> None:
    async with asyncio.timeout(20):
        while {replica["state"] for replica in await gateway.replicas()} != {"ready"}:
            await asyncio.sleep(0.05)


@pytest.mark.engine
async def test_a_real_engine_that_is_stopped_in_mid_answer_is_started_again(
    start_gateway: StartGateway, smollm2_gguf: Path
) -> None:
    model = {"model_path": str(smollm2_gguf), "options": {"n_threads": 1, "context_length": 1024}, "preload": True}
    gateway = await start_gateway(engines={}, models={"smol": model}, probe_interval_s=1, probe_failures=2)
    replica = await gateway.until("smol", limit_s=120, state="ready")
    running = asyncio.ensure_future(gateway.stream("smol", max_tokens=900, ignore_eos=True))
    await gateway.until("smol", in_flight=1)
    await asyncio.sleep(2)
    os.kill(replica["pid"], signal.SIGSTOP)
    lines = await running
    assert "has not answered its health check" in json.loads(lines[-2][6:])["error"]["message"]
    await gateway.until("smol", limit_s=120, state="ready", starts=2)
    assert (await gateway.complete("smol", max_tokens=2)).status == 200
    assert not is_running(replica["pid"])
