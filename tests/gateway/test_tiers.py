"""Models that sleep: a gateway in front of engines that do as vLLM's server does, or fail to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import Gateway, StartGateway, a_node, events_in, is_running, until
from sleepy import Sleepy, installed_in

from engines.base import RAM, Call, Endpoint, Launch, Needs, Placement, Tier
from gateway import tiers
from gateway.amounts import bytes_or_share
from gateway.async_client import AsyncClient
from gateway.client import Client
from gateway.config import Settings
from gateway.experience import Experience
from gateway.kept import EngineProcess
from gateway.lives import Slumber, Stage, note_slumber, slumber_of
from gateway.nodes.local import LocalNode
from gateway.replica import Replica, ReplicaFailed, State
from gateway.upstream import Upstream
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source

KEEP = {"HOSTLER_ORPHAN_TIMEOUT_S": "20"}  # after a gateway that was killed
GB = 10**9
Models = Callable[..., dict[str, Any]]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Of a gateway that knows the engine."""
    return installed_in(tmp_path / "site")


@pytest.fixture
def model(tmp_path: Path) -> Models:
    """A model that takes a gigabyte, and can sleep; what happens to its engine is in events of its name."""
    file = tmp_path / "fake.gguf"
    file.write_bytes(b"GGUF")

    def make(name: str, behaviour: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        told = {"can_sleep": True, "events_file": str(tmp_path / f"{name}.events")} | (behaviour or {})
        wish = {"model_path": str(file), "model_engine": "sleepy", "memory": "1GB"}
        return {name: wish | {"envs": {"FAKE_ENGINE": json.dumps(told)}} | fields}

    return make


def swapping(*models: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Settings of a gateway that has room for one awake beside one asleep."""
    together = {name: wish for one in models for name, wish in one.items()}
    return {"models": together, "ram_limit": "1.8GB", "sleep_memory": "100%", "min_residency_s": 0} | settings


async def state_of(gateway: Gateway, uid: str) -> tuple[str, str | None]:
    card = (await gateway.get(f"/v1/models/{uid}")).json
    return card["status"], card["tier"]


async def pid_of(gateway: Gateway, uid: str) -> int:
    return next(one["pid"] for one in await gateway.replicas() if one["uid"] == uid)


async def ask(gateway: Gateway, uid: str) -> str:
    answer = await gateway.complete(uid, max_tokens=2)
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["text"])


def paths(tmp_path: Path, name: str) -> list[str]:
    """What was asked of the engine about sleeping, in its order."""
    known = {"/sleep", "/wake_up", "/collective_rpc"}
    return [
        event["event"] + (f" {event['tags'][0]}" if event["tags"] else "")
        for event in events_in(tmp_path / f"{name}.events")
        if event["event"] in known
    ]


async def until_all_are(gateway: Gateway, state: str) -> None:
    async with asyncio.timeout(20):
        while {one["state"] for one in await gateway.replicas()} != {state}:
            await asyncio.sleep(0.02)


async def until_is(gateway: Gateway, uid: str, status: str, tier: str | None = None) -> None:
    async with asyncio.timeout(20):
        while await state_of(gateway, uid) != (status, tier):
            await asyncio.sleep(0.02)


async def test_two_models_that_have_room_for_one_take_turns_without_a_load(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping(model("a"), model("b")), env=env)
    assert await ask(gateway, "a") == "tok0 tok1"
    assert await ask(gateway, "b") == "tok0 tok1"
    assert await state_of(gateway, "a") == ("asleep", "ram")
    pids = [await pid_of(gateway, uid) for uid in ("a", "b")]
    for _ in range(3):
        assert await ask(gateway, "a") == "tok0 tok1"
        assert await state_of(gateway, "b") == ("asleep", "ram")
        assert await ask(gateway, "b") == "tok0 tok1"
    assert [await pid_of(gateway, uid) for uid in ("a", "b")] == pids
    assert paths(tmp_path, "a") == ["/sleep", "/wake_up"] * 3 + ["/sleep"]
    for name in ("a", "b"):
        events = events_in(tmp_path / f"{name}.events")
        assert [event["busy"] for event in events if event["event"] == "/sleep"] == [0] * paths(tmp_path, name).count(
            "/sleep"
        )
        assert not [event for event in events if event["event"] == "asked_asleep"]
    metrics = (await gateway.get("/metrics")).body.decode()
    assert 'hostler_model_sleeps_total{model="a",tier="ram"} 4.0' in metrics
    assert 'hostler_model_wakes_total{model="a",tier="ram"} 3.0' in metrics
    assert 'hostler_replica_state{model="a",replica="0",state="asleep"} 1.0' in metrics
    told = [event["event_content"] for event in (await gateway.get("/v1/models/a/events")).json]
    assert any("falls asleep (tier ram) to make room for b" in text for text in told)
    assert any("awake again" in text for text in told)


async def test_without_memory_to_sleep_in_the_weights_are_read_again_in_the_right_order(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping(model("a"), model("b"), sleep_memory=0), env=env)
    await ask(gateway, "a")
    await ask(gateway, "b")
    assert await state_of(gateway, "a") == ("asleep", "disk")
    assert await ask(gateway, "a") == "tok0 tok1"
    assert paths(tmp_path, "a") == ["/sleep", "/wake_up weights", "/collective_rpc", "/wake_up kv_cache"]


async def test_requests_of_both_models_at_once_are_all_answered_by_who_is_awake(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    slow = {"sleep_s": 0.05, "wake_s": 0.05, "token_delay_s": 0.01}
    gateway = await start_gateway(**swapping(model("a", slow), model("b", slow), max_wait_s=2), env=env)

    async def client(number: int) -> None:
        for turn in range(6):
            assert await ask(gateway, "ab"[(number + turn // 2) % 2]) == "tok0 tok1"

    await asyncio.gather(*map(client, range(8)))
    assert len(events_in(tmp_path / "a.events", "start")) == len(events_in(tmp_path / "b.events", "start")) == 1
    assert not [one for name in "ab" for one in events_in(tmp_path / f"{name}.events", "asked_asleep")]
    sleeps = [one for name in "ab" for one in events_in(tmp_path / f"{name}.events", "/sleep")]
    assert sleeps
    assert {one["busy"] for one in sleeps} == {0}


@pytest.mark.parametrize("failing", ["sleep_fails", "wake_fails"])
async def test_an_engine_that_fails_to_is_ended_and_started_anew(
    failing: str, start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping(model("a", {failing: 1}), model("b")), env=env)
    await ask(gateway, "a")
    before = await pid_of(gateway, "a")
    await ask(gateway, "b")
    assert await ask(gateway, "a") == "tok0 tok1"
    assert not is_running(before)
    assert len(events_in(tmp_path / "a.events", "start")) == 2
    told = [event["event_content"] for event in (await gateway.get("/v1/models/a/events")).json]
    assert any("made to fail by FAKE_ENGINE" in text and "started anew" in text for text in told)


async def test_who_comes_back_answering_garbage_is_started_anew_and_never_sleeps_so_again(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    garbling = swapping(model("a", {"reload_garbles": 9}), model("b"), sleep_memory=0)
    gateway = await start_gateway(**garbling, env=env)
    for _ in range(3):
        assert await ask(gateway, "a") == "tok0 tok1"
        assert await ask(gateway, "b") == "tok0 tok1"
    assert paths(tmp_path, "a").count("/sleep") == 1
    assert paths(tmp_path, "b").count("/sleep") == 1  # nor do others that are made of the same files
    told = [event["event_content"] for event in (await gateway.get("/v1/models/a/events")).json]
    assert any("it answers 'garbage" in text and "does not sleep in tier disk any more" in text for text in told)
    await ask(gateway, "a")
    answer = await gateway.post("/v1/models/a/sleep")
    assert (answer.status, "no bed" in answer.error["message"]) == (400, True)


async def test_what_it_answered_before_its_sleep_is_known_to_the_next_gateway(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    garbling = swapping(model("a", {"reload_garbles": 9}), sleep_memory=0)
    gateway = await start_gateway(**garbling, env=env | KEEP)
    await ask(gateway, "a")
    assert (await gateway.post("/v1/models/a/sleep")).json["tier"] == "disk"
    await gateway.end(signal.SIGKILL)
    gateway = await start_gateway(**garbling, env=env, home=gateway.home)
    await until_is(gateway, "a", "asleep", "disk")
    assert await ask(gateway, "a") == "tok0 tok1"
    assert len(events_in(tmp_path / "a.events", "start")) == 2


async def test_whose_sleep_was_disturbed_by_others_on_its_gpu_is_put_to_sleep_again(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    disturbed = "Call to sleep method failed: Memory usage increased after sleeping."
    behaviour = {"sleep_fails": 1, "sleep_says": disturbed}  # each time it was started anew
    gateway = await start_gateway(**swapping(model("a", behaviour), model("b"), restart_limit=9), env=env)
    for _ in range(6):
        assert await ask(gateway, "a") == "tok0 tok1"
        assert await ask(gateway, "b") == "tok0 tok1"
    assert paths(tmp_path, "a") == ["/sleep"] * 6
    told = [event["event_content"] for event in (await gateway.get("/v1/models/a/events")).json]
    assert any(disturbed in text and "Something else took memory of its GPU meanwhile" in text for text in told)


async def test_who_never_manages_to_is_unloaded_after_two_tries_of_each_tier(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping(model("a", {"sleep_fails": 9}), model("b"), restart_limit=9), env=env)
    for _ in range(6):
        assert await ask(gateway, "a") == "tok0 tok1"
        assert await ask(gateway, "b") == "tok0 tok1"
    assert len(paths(tmp_path, "a")) == 4
    answer = await gateway.post("/v1/models/a/sleep")
    await ask(gateway, "a")
    answer = await gateway.post("/v1/models/a/sleep")
    assert answer.status == 400
    assert "has failed to" in answer.error["message"]


async def test_an_engine_that_ends_in_its_sleep_is_loaded_for_the_next_request(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping(model("a")), env=env)
    await ask(gateway, "a")
    assert (await gateway.post("/v1/models/a/sleep")).json["status"] == "asleep"
    os.kill(await pid_of(gateway, "a"), signal.SIGKILL)
    await until_is(gateway, "a", "stopped")
    assert await ask(gateway, "a") == "tok0 tok1"
    assert len(events_in(tmp_path / "a.events", "start")) == 2


async def test_it_is_not_taken_for_dead_while_it_sleeps_and_says_how_it_is(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    settings = swapping(model("a", preload=True), probe_interval_s=0.1, probe_failures=2)
    gateway = await start_gateway(**settings, env=env)
    await gateway.until("a", state="ready")
    assert (await gateway.post("/v1/models/a/sleep")).json["tier"] == "ram"
    await asyncio.sleep(1)
    assert await state_of(gateway, "a") == ("asleep", "ram")
    queue = (await gateway.get("/v1/models/a/queue")).json
    assert (queue["state"], queue["stage"], queue["waiting"]) == ("asleep", "asleep (tier ram)", 0)
    (card,) = await gateway.replicas()
    assert (card["state"], card["tier"]) == ("asleep", "ram")
    assert (await gateway.get("/ready")).status == 200
    assert (await gateway.get("/v1/models/instances")).json[0]["status"] == "READY"
    assert (await gateway.post("/v1/models/a/wake")).json["status"] == "ready"
    assert len(events_in(tmp_path / "a.events", "start")) == 1
    assert (await gateway.post("/v1/models/a/sleep")).status == 200
    assert (await gateway.get("/v1/models/a/queue")).json["left_s"] > 0
    assert (await gateway.post("/v1/models/a/stop")).json["status"] == "stopped"
    assert await ask(gateway, "a") == "tok0 tok1"


async def test_idle_for_long_it_sleeps_and_idle_for_longer_it_is_unloaded(
    start_gateway: StartGateway, env: dict[str, str], model: Models
) -> None:
    gateway = await start_gateway(**swapping(model("a", sleep_after_s=0.5, idle_timeout_s=2)), env=env)
    await ask(gateway, "a")
    await until_is(gateway, "a", "asleep", "ram")
    assert await ask(gateway, "a") == "tok0 tok1"
    await until_is(gateway, "a", "asleep", "ram")
    await until_is(gateway, "a", "stopped")


async def test_who_cannot_sleep_or_is_busy_says_so(
    start_gateway: StartGateway, env: dict[str, str], model: Models
) -> None:
    slow = model("a", {"token_delay_s": 0.5}) | model("tight")
    llama_cpp = {"fake": {}, "model": {"memory": "100MB"}}
    gateway = await start_gateway(**llama_cpp, **swapping(slow, sleep_memory=0), env=env)
    asking = asyncio.create_task(ask(gateway, "a"))
    await gateway.until("a", in_flight=1)
    answer = await gateway.post("/v1/models/a/sleep")
    assert (answer.status, "answers 1 requests" in answer.error["message"]) == (409, True)
    assert await asking == "tok0 tok1"
    answer = await gateway.complete("fake")
    assert answer.status == 200, answer.body
    answer = await gateway.post("/v1/models/fake/sleep")
    assert (answer.status, "llama.cpp has no way to" in answer.error["message"]) == (400, True)
    answer = await gateway.post("/v1/models/tight/sleep")
    assert (answer.status, "only a model that is ready" in answer.error["message"]) == (400, True)


async def test_who_is_forced_to_stay_awake_says_so(
    start_gateway: StartGateway, env: dict[str, str], model: Models
) -> None:
    forced = model("a", options={"no-sleep": True}, force_options=True, preload=True)
    gateway = await start_gateway(**swapping(forced), env=env)
    await gateway.until("a", state="ready")
    answer = await gateway.post("/v1/models/a/sleep")
    why = "its forced options say no-sleep"
    assert (answer.status, f"a cannot sleep: {why}." in answer.error["message"]) == (400, True)
    told = [event["event_content"] for event in (await gateway.get("/v1/models/a/events")).json]
    assert f"a-rep0 never sleeps: {why}" in told


async def test_a_gateway_that_was_killed_finds_its_models_asleep(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    settings = swapping(model("a", preload=True), model("b"))
    gateway = await start_gateway(**settings, env=env | KEEP)
    await gateway.until("a", state="ready")
    await ask(gateway, "b")
    assert await state_of(gateway, "a") == ("asleep", "ram")
    pids = [await pid_of(gateway, uid) for uid in ("a", "b")]
    await gateway.end(signal.SIGKILL)
    gateway = await start_gateway(**settings, env=env, home=gateway.home)
    await until_is(gateway, "a", "asleep", "ram")
    await gateway.until("b", state="ready")
    await asyncio.sleep(0.5)  # nobody asks for it, so it goes on sleeping
    assert await state_of(gateway, "a") == ("asleep", "ram")
    assert await ask(gateway, "a") == "tok0 tok1"
    assert await ask(gateway, "b") == "tok0 tok1"
    assert [await pid_of(gateway, uid) for uid in ("a", "b")] == pids
    assert len(events_in(tmp_path / "a.events", "start")) == 1


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "restarted"])
async def test_gateways_that_go_under_load_leave_nobody_to_answer_garbage_or_to_be_asked_asleep(
    is_killed: bool, start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    slow = {"sleep_s": 0.05, "wake_s": 0.05, "token_delay_s": 0.02}
    settings = swapping(*(model(name, slow) for name in "abc"), max_wait_s=2)
    gateway = await start_gateway(**settings, env=env | KEEP)
    answers: list[str] = []

    async def client() -> None:
        with contextlib.suppress(aiohttp.ClientError):
            while True:
                answers.append(await ask(gateway, random.choice("abc")))

    for _ in range(3):
        clients = [asyncio.create_task(client()) for _ in range(6)]
        await asyncio.sleep(random.uniform(0.5, 2))
        if is_killed:
            await gateway.end(signal.SIGKILL)
            await asyncio.gather(*clients)
            gateway = await start_gateway(**settings, env=env | KEEP, home=gateway.home)
        else:
            assert (await gateway.post("/v1/restart")).status == 200
            await asyncio.sleep(1)
            assert not any(one.done() for one in clients)  # none was refused, or lost its connection
            for one in clients:
                one.cancel()
        assert await ask(gateway, random.choice("abc")) == "tok0 tok1"
    assert set(answers) == {"tok0 tok1"}
    events = [event for name in "abc" for event in events_in(tmp_path / f"{name}.events")]
    assert not [event for event in events if event["event"] == "asked_asleep"]
    assert not [event for event in events if event["event"] == "/sleep" and event["busy"]]
    if not is_killed:
        assert len([event for event in events if event["event"] == "start"]) == 3


@pytest.mark.parametrize(("behaviour", "half_way"), [({"sleep_s": 3}, "/sleep"), ({"wake_s": 3}, "/wake_up")])
async def test_what_was_half_asleep_as_its_gateway_was_killed_is_started_anew(
    behaviour: dict[str, Any],
    half_way: str,
    start_gateway: StartGateway,
    env: dict[str, str],
    model: Models,
    tmp_path: Path,
) -> None:
    settings = swapping(model("a", behaviour))
    gateway = await start_gateway(**settings, env=env | KEEP)
    await ask(gateway, "a")
    pid = await pid_of(gateway, "a")
    if half_way == "/wake_up":
        await gateway.post("/v1/models/a/sleep")
    path = "/v1/models/a/sleep" if half_way == "/sleep" else "/v1/models/a/wake"
    asking = asyncio.create_task(gateway.post(path))
    await until(lambda: events_in(tmp_path / "a.events", half_way))
    await gateway.end(signal.SIGKILL)
    with pytest.raises(aiohttp.ClientError):
        await asking
    gateway = await start_gateway(**settings, env=env, home=gateway.home)
    assert await ask(gateway, "a") == "tok0 tok1"
    assert not is_running(pid)
    told = [event["event_content"] for event in (await gateway.get("/v1/models/a/events")).json]
    assert any("how far it came is not known" in text for text in told)


async def test_an_engine_that_was_woken_behind_our_back_is_started_anew(
    start_gateway: StartGateway, env: dict[str, str], model: Models
) -> None:
    settings = swapping(model("a"))
    gateway = await start_gateway(**settings, env=env | KEEP)
    await ask(gateway, "a")
    await gateway.post("/v1/models/a/sleep")
    pid = await pid_of(gateway, "a")
    await gateway.end(signal.SIGKILL)
    (life,) = (gateway.home / "run").glob("*/life.json")
    socket = json.loads(life.read_bytes())["endpoint"]["socket"]
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as session:
        assert (await session.post("http://engine/wake_up")).status == 200
    gateway = await start_gateway(**settings, env=env, home=gateway.home)
    assert await ask(gateway, "a") == "tok0 tok1"
    assert not is_running(pid)


async def test_a_restart_hands_over_models_that_sleep(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping(model("a"), model("b")), env=env)
    await ask(gateway, "a")
    await ask(gateway, "b")
    pids = [await pid_of(gateway, uid) for uid in ("a", "b")]
    assert (await gateway.post("/v1/restart")).status == 200
    await until_is(gateway, "a", "asleep", "ram")
    assert await ask(gateway, "a") == "tok0 tok1"
    assert [await pid_of(gateway, uid) for uid in ("a", "b")] == pids


async def test_a_reload_gives_a_model_that_sleeps_its_new_options(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping({}), env=env)
    ((uid, wish),) = model("a").items()
    assert (await gateway.post("/v1/models", wish | {"model_uid": uid})).status == 200
    await gateway.post("/v1/models/a/sleep")
    answer = await gateway.post("/v1/models/a/reload", {"model_config": {"sleep_after_s": 100}})
    assert answer.status in (200, 202), answer.body
    async with asyncio.timeout(20):
        while (await gateway.get("/v1/models/a/reload")).json["stage"] not in ("ready", "error"):
            await asyncio.sleep(0.05)
    assert (await gateway.get("/v1/models/a/reload")).json["error"] is None
    assert await ask(gateway, "a") == "tok0 tok1"


@pytest.mark.parametrize("replica", [1, 2])
async def test_what_is_preloaded_and_slept_is_loaded_again_once_its_options_change(
    replica: int, start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping({}, ram_limit="3GB"), env=env)
    ((uid, wish),) = model("a", preload=True, replica=replica).items()
    assert (await gateway.post("/v1/models", wish | {"model_uid": uid})).status == 200
    await until_all_are(gateway, "ready")
    assert (await gateway.post("/v1/models/a/sleep")).status == 200
    await until_all_are(gateway, "asleep")
    answer = await gateway.post("/v1/models/a/reload", {"model_config": {"request_limits": 7}})
    assert answer.status in (200, 202), answer.body
    await until(lambda: len(events_in(tmp_path / "a.events", "start")) == 2 * replica)
    await until_all_are(gateway, "ready")
    async with asyncio.timeout(20):
        while (await gateway.get("/v1/models/a/reload")).json["stage"] != "ready":
            await asyncio.sleep(0.05)


async def test_what_is_preloaded_and_was_left_asleep_with_other_options_is_loaded(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping(model("a", preload=True)), env=env | KEEP)
    await gateway.until("a", state="ready")
    assert (await gateway.post("/v1/models/a/sleep")).status == 200
    await gateway.end(signal.SIGKILL)
    changed = swapping(model("a", {"wake_s": 0.01}, preload=True))
    gateway = await start_gateway(**changed, env=env, home=gateway.home)
    await until_is(gateway, "a", "ready")
    assert len(events_in(tmp_path / "a.events", "start")) == 2


async def test_operators_and_programs_have_it_sleep_and_wake(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping(model("a", preload=True)), env=env)
    await gateway.until("a", state="ready")

    async def hostler(*words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "gateway.cli", *words, "--endpoint", gateway.address),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out.decode()

    assert await hostler("sleep", "a") == "a is asleep (tier ram).\n"
    assert "asleep (ram)" in await hostler("list")
    assert "asleep (ram)" in await hostler("ps")
    assert await hostler("wake", "a") == "a is ready.\n"
    async with AsyncClient(gateway.address) as client:
        assert (await client.sleep("a"))["tier"] == "ram"
        assert (await client.wake("a"))["status"] == "ready"
    sync = Client(gateway.address)
    assert (await asyncio.to_thread(sync.sleep, "a"))["status"] == "asleep"
    assert (await asyncio.to_thread(sync.wake, "a"))["tier"] is None


def test_what_is_on_disk_of_a_sleep_and_cannot_be_read_is_not_trusted(tmp_path: Path) -> None:
    assert slumber_of(tmp_path) == Slumber()
    note_slumber(tmp_path, Slumber(stage=Stage.ASLEEP, tier="ram", host_bytes=7))
    assert slumber_of(tmp_path) == Slumber(stage=Stage.ASLEEP, tier="ram", host_bytes=7)
    (tmp_path / "slumber.json").write_text("{")
    assert slumber_of(tmp_path).stage is Stage.UNSURE


async def test_a_pause_waits_for_who_falls_asleep_and_lets_nobody_begin(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        begun, end = asyncio.Event(), asyncio.Event()

        async def fall_asleep() -> None:
            async with node.change():
                begun.set()
                await end.wait()

        first = asyncio.create_task(fall_asleep())
        await begun.wait()
        begun.clear()
        pause = asyncio.create_task(node.pause())
        second = asyncio.create_task(fall_asleep())
        await asyncio.sleep(0.1)
        assert not pause.done()
        assert not begun.is_set()
        end.set()
        await asyncio.gather(first, pause)
        await asyncio.sleep(0.1)
        assert not begun.is_set()
        node.go_on()
        await second


async def test_a_pause_that_goes_on_without_who_takes_too_long_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.nodes.local.PAUSE_LIMIT_S", 0.05)
    async with a_node(tmp_path) as node, node.change():
        await node.pause()
    assert "1 engines that start, fall asleep or wake were not done" in caplog.text


@contextlib.asynccontextmanager
async def a_replica(tmp_path: Path) -> AsyncIterator[tuple[Replica, LocalNode]]:
    """One whose engine takes half a second to fall asleep; nobody runs it yet."""
    (tmp_path / "fake.gguf").write_bytes(b"GGUF")
    spec = ModelSpec(model_format="ggufv2", model_hub="local", model_id=str(tmp_path / "fake.gguf"))
    source = Source(model_hub="local", model_id=spec.model_id)
    artifact = Artifact(family=LLMFamily(model_name="a", model_specs=(spec,)), spec=spec, source=source)
    envs = {
        "FAKE_ENGINE": json.dumps({"can_sleep": True, "sleep_s": 0.5}),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    async def place(replica: Replica, needs: Needs, awake: Placement | None) -> Placement:
        replica.placement = Placement(memory={RAM: GB})
        return replica.placement

    async def has_gpus() -> bool:
        return False

    async with a_node(tmp_path / "home") as node:
        yield (
            Replica(
                Launch(uid="a", artifact=artifact, engine="sleepy", envs=envs),
                0,
                Sleepy(),
                node,
                log=tmp_path / "log",
                settings=Settings,
                changed=lambda: None,
                place=place,
                has_gpus=has_gpus,
                experience=Experience(),
                tell=lambda kind, text: None,
            ),
            node,
        )


async def test_who_tries_its_first_sleep_as_another_gateway_takes_over_is_known_to_sleep(tmp_path: Path) -> None:
    async with a_replica(tmp_path) as (replica, node):
        running = asyncio.create_task(replica.run())
        try:
            await until(lambda: replica.state is State.READY)
            assert isinstance(replica.process, EngineProcess)
            folder = replica.process.folder
            replica.fall_asleep("ram", is_rehearsal=True)
            await until(lambda: slumber_of(folder).stage is Stage.UNSURE)
            await node.pause()
            assert slumber_of(folder).stage is Stage.ASLEEP
            node.go_on()
            await until(lambda: replica.state is State.READY)
            assert slumber_of(folder).stage is Stage.AWAKE
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_what_cannot_sleep_while_the_disk_is_full_is_tried_again_later_and_less_and_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.replica.TIER_REST_S", 0.2)
    is_full = True

    def note(folder: Path, slumber: Slumber) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        note_slumber(folder, slumber)

    monkeypatch.setattr("gateway.replica.note_slumber", note)
    async with a_replica(tmp_path) as (replica, _):
        told: list[str] = []
        replica._tell = lambda kind, text: told.append(text)
        running = asyncio.create_task(replica.run())
        try:
            await until(lambda: replica.state is State.READY)
            for _ in range(3):
                await until(lambda: "ram" in [bed.tier for bed in replica.beds()])
                replica.fall_asleep("ram")
                await until(lambda: replica.state is State.READY)
                assert [bed.tier for bed in replica.beds()] == ["disk"]
            is_full = False
            await until(lambda: "ram" in [bed.tier for bed in replica.beds()])
            replica.fall_asleep("ram")
            await until(lambda: replica.state is State.ASLEEP)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    rests = [text.rpartition("again in ")[2] for text in told if "No space left" in text]
    assert rests == [f"{rest_s} s at the earliest" for rest_s in (0.2, 0.4, 0.8)]


@pytest.mark.parametrize(
    ("left", "says", "is_believed"),
    [
        (Stage.AWAKE, False, True),
        (Stage.AWAKE, None, True),  # it answers others, and has no time
        (Stage.AWAKE, True, False),
        (Stage.ASLEEP, True, True),
        (Stage.ASLEEP, None, False),
        (Stage.ASLEEP, False, False),
    ],
)
async def test_an_engine_that_is_taken_over_is_as_it_was_left(
    left: Stage, says: bool | None, is_believed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sleeps(upstream: Upstream, is_asleep: Call) -> bool | None:
        return says

    monkeypatch.setattr(tiers, "sleeps", sleeps)
    async with a_replica(tmp_path) as (replica, _):
        upstream = Upstream(Endpoint(socket=str(tmp_path / "e.sock"), api_key=""))
        replica.tiers = (Tier(name="ram", sleep=(), wake=()),)
        try:
            asked = replica._is_left_asleep(upstream, Slumber(stage=left, tier="ram"))
            if is_believed:
                assert await asked is (left is Stage.ASLEEP)
            else:
                with pytest.raises(ReplicaFailed, match=f"it was left {left}"):
                    await asked
        finally:
            await upstream.close()


@pytest.mark.parametrize(
    ("memory", "bytes_asleep"),
    [({"GPU-0": 60 * GB}, {"GPU-0": 2 * GB, RAM: 9 * GB}), ({RAM: 5 * GB}, {RAM: 11 * GB}), ({"GPU-0": GB}, None)],
    ids=str,
)
def test_what_is_held_asleep_and_awake_again(memory: dict[str, int], bytes_asleep: dict[str, int] | None) -> None:
    awake = Placement(gpu_uuids=("GPU-0",), memory=memory)
    tier = Tier(name="ram", sleep=(), wake=(), residual_bytes=2 * GB, host_bytes=9 * GB)
    assert tiers.asleep(awake, tier).memory == (bytes_asleep or {"GPU-0": GB, RAM: 9 * GB})
    assert tiers.awake_again(awake, 9 * GB).memory == {**memory, RAM: memory.get(RAM, 0) + 9 * GB}


def test_a_size_or_a_share() -> None:
    assert [bytes_or_share(size, 200) for size in ("25%", "1.5 %", "7KB", 3)] == [50, 3, 7000, 3]
    for wrong in ("101%", "much", "-1%"):
        with pytest.raises(ValueError, match=wrong):
            bytes_or_share(wrong, 200)
    with pytest.raises(ValueError, match="sleep_memory"):
        Settings(sleep_memory="much")


async def test_two_copies_sleep_and_wake_together(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping(model("a", replica=2, preload=True), ram_limit="3GB"), env=env)
    await until_all_are(gateway, "ready")
    assert (await gateway.post("/v1/models/a/sleep")).json["status"] == "asleep"
    await until_all_are(gateway, "asleep")
    assert await ask(gateway, "a") == "tok0 tok1"
    await until_all_are(gateway, "ready")
    assert len(events_in(tmp_path / "a.events", "start")) == 2


async def test_who_may_not_wait_for_a_model_that_sleeps_wakes_it(
    start_gateway: StartGateway, env: dict[str, str], model: Models
) -> None:
    gateway = await start_gateway(**swapping(model("a", queue_limit=0, preload=True)), env=env)
    await gateway.until("a", state="ready")
    assert (await gateway.post("/v1/models/a/sleep")).status == 200
    assert (await gateway.complete("a")).status == 429
    await gateway.until("a", state="ready")
    assert await ask(gateway, "a") == "tok0 tok1"


async def test_who_asks_for_a_sleep_that_fails_is_told_so(
    start_gateway: StartGateway, env: dict[str, str], model: Models
) -> None:
    gateway = await start_gateway(**swapping(model("a", {"sleep_fails": 1}, preload=True)), env=env)
    await gateway.until("a", state="ready")
    answer = await gateway.post("/v1/models/a/sleep")
    assert (answer.status, "made to fail by FAKE_ENGINE" in answer.error["message"]) == (503, True)
    assert await ask(gateway, "a") == "tok0 tok1"


async def test_who_slept_before_it_was_stopped_does_not_sleep(
    start_gateway: StartGateway, env: dict[str, str], model: Models
) -> None:
    gateway = await start_gateway(**swapping(model("a", preload=True)), env=env)
    await gateway.until("a", state="ready")
    assert (await gateway.post("/v1/models/a/sleep")).status == 200
    assert (await gateway.post("/v1/models/a/stop")).json["status"] == "stopped"
    answer = await gateway.post("/v1/models/a/sleep")
    assert (answer.status, "a is stopped" in answer.error["message"]) == (400, True)


async def test_a_reload_does_not_wait_for_copies_that_sleep_to_wake(
    start_gateway: StartGateway, env: dict[str, str], model: Models, tmp_path: Path
) -> None:
    gateway = await start_gateway(**swapping({}, ram_limit="3GB"), env=env)
    ((uid, wish),) = model("a", replica=2).items()
    assert (await gateway.post("/v1/models", wish | {"model_uid": uid})).status == 200
    await until_all_are(gateway, "ready")
    assert (await gateway.post("/v1/models/a/sleep")).status == 200
    answer = await gateway.post("/v1/models/a/reload", {"model_config": {"sleep_after_s": 100}})
    assert answer.status in (200, 202), answer.body
    async with asyncio.timeout(20):
        while (await gateway.get("/v1/models/a/reload")).json["stage"] not in ("ready", "error"):
            await asyncio.sleep(0.05)
    assert (await gateway.get("/v1/models/a/reload")).json["error"] is None
    assert await ask(gateway, "a") == "tok0 tok1"
    assert len(events_in(tmp_path / "a.events", "start")) >= 3


async def test_how_long_requests_may_be_is_still_known_after_a_sleep(
    start_gateway: StartGateway, env: dict[str, str], model: Models
) -> None:
    gateway = await start_gateway(**swapping(model("a", preload=True)), env=env)

    async def length() -> int | None:
        told: int | None = (await gateway.get("/v1/models/a")).json["max_model_len"]
        return told

    async with asyncio.timeout(20):
        while await length() is None:
            await asyncio.sleep(0.02)
    before = await length()
    assert (await gateway.post("/v1/models/a/sleep")).status == 200
    assert await length() == before
    assert await ask(gateway, "a") == "tok0 tok1"
    assert await length() == before
    assert (await gateway.post("/v1/models/a/stop")).status == 200
    assert await length() is None
