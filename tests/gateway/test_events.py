"""GET /v1/events: all that happens to models, as one who listens hears it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Gateway, StartGateway, fake_model
from hostler import AsyncClient, Client
from starlette.types import Message

from gateway.api import events as api_events
from gateway.api.events import EventStream
from gateway.cli.events import line_of
from gateway.config import Settings
from gateway.events import BEHIND_LIMIT, HAPPENINGS_KEPT, EventLog

LIMIT_S = 20


class Ear:
    """One who listens: what was heard so far."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.comments = 0
        self.has_ended = False

    def states(self, replica: int = 0) -> list[str]:
        return [one["to"] for one in self.heard if one["type"] == "state" and one["replica"] == replica]

    def texts(self) -> list[str]:
        return [one["text"] for one in self.heard if one["type"] in ("info", "warning", "error")]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [one for one in self.heard if one["type"] == kind]

    async def until(self, condition: Callable[[Ear], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition(self):
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def listening(gateway: Gateway, query: str = "", **headers: str) -> AsyncIterator[Ear]:
    ear = Ear()

    async def listen() -> None:
        async with gateway.session.get(gateway.address + "/v1/events" + query, headers=headers) as response:
            assert response.status == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            async for line in response.content:
                name, _, value = line.decode().strip().partition(": ")
                if name == "data":
                    ear.heard.append(json.loads(value))
                elif name == "id":
                    ear.ids.append(value)
                elif line.startswith(b":"):
                    ear.comments += 1
        ear.has_ended = True

    task = asyncio.create_task(listen())
    try:
        yield ear
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_load_a_crash_a_reload_and_an_end_are_heard(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    async with listening(gateway) as ear:
        await asyncio.sleep(0.2)
        launch = fake_model(tmp_path / "fake.gguf", {"ready_after_s": 0.3}) | {"model_uid": "m"}
        assert (await gateway.post("/v1/models", launch)).status == 200
        await ear.until(lambda ear: ear.states()[-1:] == ["ready"])
        assert ear.states() == ["waiting", "starting", "ready"]
        assert [(one.get("from"), one["to"]) for one in ear.of("state")][:2] == [
            ("stopped", "waiting"),
            ("waiting", "starting"),
        ]
        await ear.until(lambda ear: "m-rep0 is ready" in ear.texts())
        assert ear.texts()[0] == "Launch model"
        os.kill((await gateway.until("m"))["pid"], signal.SIGKILL)
        await ear.until(lambda ear: ear.states().count("ready") == 2)
        assert "backoff" in ear.states()
        (warning,) = ear.of("warning")
        assert (warning["model_uid"], "SIGKILL" in warning["text"]) == ("m", True)
        reload = {"model_config": {"load_timeout_s": 9}}
        assert (await gateway.post("/v1/models/m/reload", reload)).status < 300
        await ear.until(lambda ear: ear.states().count("ready") == 3)
        assert "Reload model" in ear.texts()
        await gateway.request("DELETE", "/v1/models/m")
        await ear.until(lambda ear: "Terminate model" in ear.texts() and ear.states()[-1] == "stopped")
        numbers = [int(one.rpartition("-")[2]) for one in ear.ids]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # nothing is left out or told twice


async def test_who_comes_back_hears_what_was_missed_and_no_more(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    async with listening(gateway) as ear:
        await ear.until(lambda ear: ear.states())
        assert [(one.get("from"), one["to"]) for one in ear.of("state")] == [(None, "stopped")]  # how it is now
        await gateway.complete()
        await ear.until(lambda ear: "fake-rep0 is ready" in ear.texts())
        last = ear.ids[-1]
    await gateway.post("/v1/models/fake/stop")
    async with listening(gateway, **{"last-event-id": last}) as ear:
        await ear.until(lambda ear: len(ear.states()) == 2)
        assert ear.states() == ["stopping", "stopped"]
    async with listening(gateway, f"?last_event_id={last}") as ear:
        await ear.until(lambda ear: len(ear.states()) == 2)
    for unknown in ("0123abcd-7", "nonsense", last + "000"):
        async with listening(gateway, **{"last-event-id": unknown}) as ear:
            await ear.until(lambda ear: ear.of("missed") and ear.states() == ["stopped"])


async def test_queues_and_loads_are_told_twice_a_second_at_the_most(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"ready_after_s": 2.2, "tokens": 1}, keepalive_interval_s=0.6)
    async with listening(gateway) as ear:
        await ear.until(lambda ear: ear.comments)  # nothing happens, and the line is kept open
        started = time.monotonic()
        answers = await asyncio.gather(*(gateway.complete() for _ in range(30)))
        assert {answer.status for answer in answers} == {200}
        await ear.until(lambda ear: [one["waiting"] for one in ear.of("queue")][-1:] == [0])
        looks = (time.monotonic() - started) / api_events.LOOK_S + 1
        waiting = [one["waiting"] for one in ear.of("queue")]
        assert 30 in waiting
        assert len(waiting) <= looks
        oldest = [one["oldest_wait_s"] for one in ear.of("queue") if one["waiting"]]
        assert all(0 <= one < 5 for one in oldest)
        progress = ear.of("progress")
        assert any(one["text"].startswith("starting") for one in progress)
        assert len(progress) <= looks


async def test_one_model_can_be_listened_to(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={})
    for uid in ("a", "b"):
        launch = fake_model(tmp_path / "fake.gguf", {}) | {"model_uid": uid}
        assert (await gateway.post("/v1/models", launch)).status == 200
    async with listening(gateway, "?model_uid=b") as ear:
        await gateway.post("/v1/models/a/stop")
        await gateway.post("/v1/models/b/stop")
        await ear.until(lambda ear: ear.states()[-1:] == ["stopped"])
        assert {one["model_uid"] for one in ear.heard} == {"b"}
    kept = (await gateway.get("/v1/events?follow=false&model_uid=a")).json
    assert {one["model_uid"] for one in kept} == {"a"}
    assert kept[0]["text"] == "Launch model"


async def test_the_end_of_the_gateway_is_told(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    async with listening(gateway) as ear:
        await ear.until(lambda ear: ear.states())
        gateway.process.send_signal(signal.SIGTERM)
        await ear.until(lambda ear: ear.has_ended)
        assert ear.heard[-1]["type"] == "end"
    async with asyncio.timeout(10):
        assert await gateway.process.wait() == 0


async def test_the_verb_and_both_clients_hear_the_same(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    assert (await gateway.complete()).status == 200
    kept = await asyncio.to_thread(lambda: list(Client(gateway.address).watch(follow=False)))
    async with AsyncClient(gateway.address) as client:
        assert [one async for one in client.watch("fake", follow=False)] == kept
    argv = (sys.executable, "-P", "-m", "gateway.cli", "events", "-e", gateway.address)
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.decode().splitlines() == [line_of(one) for one in kept]
    assert "fake  replica 0: starting -> ready" in output.decode()
    process = await asyncio.create_subprocess_exec(
        *(*argv, "-f", "--json"), stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        assert json.loads(await process.stdout.readline())["to"] == "ready"  # how it is
        await gateway.post("/v1/models/fake/stop")
        assert json.loads(await process.stdout.readline())["to"] == "stopping"
    process.send_signal(signal.SIGINT)
    await process.wait()


# --- those who do not read


async def test_a_listener_that_does_not_read_holds_little_and_is_told_why_it_ends() -> None:
    log = EventLog()
    with log.listening(None) as slow, log.listening("m") as other:
        for number in range(3 * HAPPENINGS_KEPT):
            log.add("x", "INFO", str(number))
            assert len(slow._unread) <= BEHIND_LIMIT
        assert slow.is_behind
        assert slow.read() == []
        assert not other.is_behind
    assert len(log.after(0)) == HAPPENINGS_KEPT
    assert not log.has_all_after(log.life, 5)
    assert log.has_all_after(log.life, 2 * HAPPENINGS_KEPT)
    assert not log.has_all_after(log.life, 4 * HAPPENINGS_KEPT)  # what has not happened yet
    log.add("x", "INFO", "more")
    assert slow.read() == []  # who has left hears nothing more


class Place:
    """As much of a fleet as the stream looks at."""

    def __init__(self) -> None:
        self.events = EventLog()
        self.settings = Settings()
        self.is_closing = False

    def deployments(self) -> list[Any]:
        return []


async def listen_to(place: Place, send: Callable[[Message], Any]) -> None:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    scope = {"type": "http", "method": "GET", "path": "/v1/events", "query_string": b"", "headers": []}
    await EventStream(place)(scope, receive, send)  # type: ignore[arg-type]


async def test_a_slow_reader_gets_a_last_event_and_the_others_go_on() -> None:
    place, sent, may_send = Place(), [], asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) > 1:
            await may_send.wait()

    telling = asyncio.create_task(listen_to(place, send))
    await asyncio.sleep(0.05)
    place.events.add("x", "INFO", "the first")
    await asyncio.sleep(0.05)
    for number in range(BEHIND_LIMIT + 1):
        place.events.add("x", "INFO", str(number))
    may_send.set()
    await asyncio.wait_for(telling, 5)
    last = sent[-1]
    assert b"the first" in sent[1]["body"]
    assert (last["body"].startswith(b"event: dropped\n"), last["more_body"]) == (True, False)


async def test_a_reader_that_takes_nothing_at_all_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_events, "SEND_LIMIT_S", 0.1)
    place = Place()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    telling = asyncio.create_task(listen_to(place, send))
    await asyncio.sleep(0.05)
    place.events.add("x", "INFO", "it happens")
    await asyncio.wait_for(telling, 5)
    assert not place.events._listeners


async def test_a_client_that_never_reads_leaves_the_door_open_for_others(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    host, port = gateway.address.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(b"GET /v1/events HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    await writer.drain()
    async with listening(gateway) as ear:
        for _ in range(3):
            await gateway.post("/v1/models/fake/start")
            await gateway.until(state="ready")
            await gateway.post("/v1/models/fake/stop")
        await ear.until(lambda ear: ear.states().count("ready") == 3)
    writer.close()
    gateway.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(10):
        assert await gateway.process.wait() == 0
