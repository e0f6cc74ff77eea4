"""`hostler restart`: another gateway takes over, with the same door; no request fails and no engine is loaded anew."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml
from harness import Answer, Gateway, StartGateway, events_in, fake_model, is_running, until

# Long enough that a stream lasts over a restart.
SLOW = {"tokens": 120, "token_delay_s": 0.05}


async def restart(gateway: Gateway) -> int:
    answer = await gateway.post("/v1/restart")
    assert answer.status == 200, answer.body
    pid: int = answer.json["pid"]
    return pid


async def engine_of(gateway: Gateway) -> int:
    pid: int = (await gateway.until(state="ready"))["pid"]
    return pid


def is_stand_in(pid: int) -> bool:
    return any(word.endswith("stand_in.py") for word in psutil.Process(pid).cmdline())


async def test_a_restart_keeps_door_engines_and_streams(start_gateway: StartGateway, tmp_path: Path) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake=SLOW | {"events_file": str(events)}, model={"preload": True}, drain_timeout_s=15)
    engine = await engine_of(gateway)
    before = gateway.process.pid
    streams = [asyncio.create_task(gateway.stream()) for _ in range(16)]
    await gateway.until(in_flight=16)
    after = await restart(gateway)
    assert after != before
    assert (await gateway.complete()).status == 200
    assert await engine_of(gateway) == engine
    for lines in await asyncio.gather(*streams):
        assert lines[-1] == "data: [DONE]"
        assert not any("error" in line for line in lines)
    assert len(events_in(events, "start")) == 1
    assert (gateway.home / "gateway.lock").read_text() == str(after)
    # The old process is small now, and stands in: its end is that of the new one.
    await until(lambda: is_stand_in(before))
    assert psutil.Process(before).memory_info().rss < 16 * 2**20
    assert await gateway.end(signal.SIGTERM) == 0
    assert not is_running(after)
    assert not is_running(engine)


async def ask_on(gateway: Gateway, answers: list[int], until_set: asyncio.Event) -> None:
    """One request after the other, each by the connection that is kept."""
    async with aiohttp.ClientSession() as session:
        while not until_set.is_set():
            body = {"model": "fake", "prompt": "x"}
            async with session.post(f"{gateway.address}/v1/completions", json=body) as response:
                assert "text" in await response.text(), await response.text()
                answers.append(response.status)


@pytest.mark.both_doors
async def test_no_request_is_lost_over_three_restarts_under_load(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 4, "token_delay_s": 0.01}, model={"preload": True}, drain_timeout_s=3)
    engine = await engine_of(gateway)
    answers: list[int] = []
    over = asyncio.Event()
    clients = [asyncio.create_task(ask_on(gateway, answers, over)) for _ in range(8)]
    pids = [gateway.process.pid]
    for _ in range(3):
        pids.append(await restart(gateway))
        await asyncio.sleep(0.5)
    over.set()
    await asyncio.gather(*clients)
    assert set(answers) == {200}
    assert len(answers) > 50
    assert len(set(pids)) == 4
    assert await engine_of(gateway) == engine
    # Those in between are gone; the first stands in for the last.
    await until(lambda: not any(map(is_running, pids[1:-1])), limit_s=40)
    assert is_stand_in(pids[0])
    assert psutil.Process(pids[-1]).ppid() == pids[0]


class Wire:
    """A client's connection, byte by byte: nothing is tried again, and it is only closed by who serves it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(cls, gateway: Gateway) -> Wire:
        host, port = gateway.address.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    def say(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        """The status of the next one, and its head."""
        async with asyncio.timeout(30):
            head = await self._reader.readuntil(b"\r\n\r\n")
            (length,) = re.findall(rb"content-length: (\d+)", head)
            await self._reader.readexactly(int(length))
            return int(head.split()[1]), head

    async def end_of_stream(self) -> None:
        """Of a chunked answer."""
        async with asyncio.timeout(30):
            await self._reader.readuntil(b"\r\n0\r\n\r\n")

    async def ask(self) -> tuple[int, bytes]:
        self.say(A_REQUEST)
        return await self.answer()

    def close(self) -> None:
        self._writer.close()


BODY = b'{"model":"fake","prompt":"x"}'


def request(body: bytes, path: bytes = b"/v1/completions") -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        path,
        len(body),
        body,
    )


A_REQUEST = request(BODY)


@pytest.mark.both_doors
async def test_clients_between_two_requests_keep_their_connections_and_the_old_process_is_done_at_once(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake={"tokens": 1}, model={"preload": True})
    old = gateway.process.pid
    used, fresh = [await Wire.to(gateway) for _ in range(150)], await Wire.to(gateway)
    for wire in used:
        assert (await wire.ask())[0] == 200
    after = await restart(gateway)
    await until(lambda: is_stand_in(old), limit_s=5)
    for wire in (*used, fresh):
        status, head = await wire.ask()
        assert status == 200
        assert b"connection: close" not in head
    # A restart later they are passed on again, among them those that were never used in between.
    await restart(gateway)
    await until(lambda: not is_running(after), limit_s=5)
    for wire in (*used, fresh):
        assert (await wire.ask())[0] == 200
        wire.close()


@pytest.mark.both_doors
async def test_no_request_on_a_kept_connection_is_lost_whenever_it_comes(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 1}, model={"preload": True})
    over = asyncio.Event()
    answered = 0

    async def ask_now_and_then(wire: Wire) -> None:
        nonlocal answered
        while not over.is_set():
            if random.randrange(2):
                wire.say(A_REQUEST)
            else:  # a restart may come between the two
                wire.say(A_REQUEST[: -len(BODY)])
                await asyncio.sleep(random.uniform(0, 0.1))
                wire.say(BODY)
            status, head = await wire.answer()
            assert status == 200
            answered += 1
            if b"connection: close" in head:  # as it may: said beforehand
                wire.close()
                wire = await Wire.to(gateway)
            await asyncio.sleep(random.uniform(0, 0.15))
        wire.close()

    clients = [asyncio.create_task(ask_now_and_then(await Wire.to(gateway))) for _ in range(32)]
    for _ in range(4):
        await restart(gateway)
        await asyncio.sleep(0.3)
    over.set()
    await asyncio.gather(*clients)
    assert answered > 200


async def test_half_a_request_is_waited_for_and_answered(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 1}, model={"preload": True})
    begun, answered, known = [await Wire.to(gateway) for _ in range(3)]
    assert (await answered.ask())[0] == 200
    for _ in range(3):
        assert (await known.ask())[0] == 200
    begun.say(A_REQUEST[:20])
    answered.say(A_REQUEST[:-5])
    known.say(A_REQUEST[:-5])
    await asyncio.sleep(0.2)
    await restart(gateway)
    await asyncio.sleep(1)
    begun.say(A_REQUEST[20:])
    for wire in (answered, known):
        wire.say(A_REQUEST[-5:])
    for wire in (begun, answered, known):
        assert (await wire.answer())[0] == 200
    await until(lambda: is_stand_in(gateway.process.pid), limit_s=5)
    for wire in (begun, answered, known):
        wire.close()


async def test_half_a_request_to_change_something_is_to_be_sent_again(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 1})
    file = str(gateway.home.parent / "fake.gguf")
    spec = {"model_format": "ggufv2", "model_size_in_billions": 1, "model_uri": file, "quantizations": ["q"]}
    own = {
        "version": 2,
        "model_name": "own",
        "model_family": "own",
        "model_ability": ["generate"],
        "model_lang": ["en"],
    }
    family = own | {"model_ability": ["generate"], "context_length": 2048, "model_specs": [spec]}
    asked = {
        b"/v1/models": {"model_uid": "late", "model_path": file},
        b"/v1/model_registrations/LLM": {"model": family, "persist": True},
    }
    wires = []
    for path, body in asked.items():
        wires.append((wire := await Wire.to(gateway), whole := request(json.dumps(body).encode(), path)))
        wire.say(whole[:-5])
    await asyncio.sleep(0.2)
    await restart(gateway)
    for wire, whole in wires:
        wire.say(whole[-5:])
        status, head = await wire.answer()
        assert (status, b"retry-after: " in head) == (503, True), head
        wire.close()
    assert "own" not in [one["model_name"] for one in (await gateway.get("/v1/model_registrations/LLM")).json]
    assert "late" not in [one["id"] for one in (await gateway.get("/v1/models")).json["data"]]


async def test_a_request_that_is_sent_on_after_its_answer_stays_where_it_was(start_gateway: StartGateway) -> None:
    """Refused at its head, its body is still to come: that is no request of its own."""
    gateway = await start_gateway(fake={}, max_body_bytes=2000, drain_timeout_s=2)
    wire = await Wire.to(gateway)
    wire.say(A_REQUEST.replace(b"content-length: %d" % len(BODY), b"content-length: 5000")[: -len(BODY)])
    assert (await wire.answer())[0] == 413
    await restart(gateway)
    await asyncio.sleep(0.5)
    assert "Invalid HTTP request" not in gateway.log.read_text()
    wire.say(b"x" * 5000)
    await asyncio.sleep(0.5)
    assert "Invalid HTTP request" not in gateway.log.read_text()
    wire.close()


async def test_a_stream_outlasts_the_usual_drain_in_the_old_gateway(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake=SLOW, model={"preload": True}, drain_timeout_s=0.5)
    engine = await engine_of(gateway)
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    await restart(gateway)
    lines = await stream  # six seconds
    assert lines[-1] == "data: [DONE]"
    assert not any("error" in line for line in lines)
    assert await engine_of(gateway) == engine


async def test_the_connection_of_a_stream_that_outlasts_the_usual_drain_goes_on_too(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake=SLOW | {"tokens": 60}, model={"preload": True}, drain_timeout_s=0.5)
    wire = await Wire.to(gateway)
    wire.say(request(BODY.replace(b"}", b',"stream":true}')))
    await gateway.until(in_flight=1)
    await restart(gateway)
    await wire.end_of_stream()
    await until(lambda: is_stand_in(gateway.process.pid), limit_s=5)
    assert (await wire.ask())[0] == 200
    wire.close()


async def test_how_long_streams_may_go_on_in_the_old_gateway_can_be_set(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake=SLOW, model={"preload": True}, restart_drain_s=1)
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    await restart(gateway)
    assert any("error" in line for line in await stream)


async def test_the_old_gateway_drains_as_usual_once_it_is_told_to_end(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake=SLOW, model={"preload": True}, drain_timeout_s=20)
    streams = [asyncio.create_task(gateway.stream()) for _ in range(2)]
    await gateway.until(in_flight=2)
    after = await restart(gateway)
    await asyncio.sleep(1)
    os.kill(gateway.process.pid, signal.SIGTERM)
    for stream in streams:
        assert (await stream)[-1] == "data: [DONE]"
    assert await asyncio.wait_for(gateway.process.wait(), 10) == 0
    assert not is_running(after)


async def test_the_old_gateway_ends_with_the_new_one_though_it_answers_still(start_gateway: StartGateway) -> None:
    """A service manager is to start the next one, and sees only the old one."""
    gateway = await start_gateway(fake=SLOW | {"tokens": 1000}, model={"preload": True})
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    first = await restart(gateway)
    second = await restart(gateway)
    await until(lambda: not is_running(first))  # it had nothing to answer, which is no end of all
    await asyncio.sleep(1.5)
    assert not is_stand_in(gateway.process.pid)
    assert not stream.done()
    os.kill(second, signal.SIGKILL)
    assert await asyncio.wait_for(gateway.process.wait(), 5) == -signal.SIGKILL
    assert "is gone, so this one ends, too" in gateway.log.read_text()
    await asyncio.gather(stream, return_exceptions=True)


async def test_a_model_that_has_changed_lets_the_old_gateway_end_its_answers_first(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake=SLOW, model={"preload": True})
    file = gateway.home / "settings.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["models"]["gone"] = settings["models"]["fake"]
    file.write_text(yaml.safe_dump(settings))
    await restart(gateway)
    engines = {(await gateway.until(uid, state="ready"))["pid"] for uid in ("fake", "gone")}
    streams = [asyncio.create_task(gateway.stream(uid)) for uid in ("fake", "gone")]
    for uid in ("fake", "gone"):
        await gateway.until(uid, in_flight=1)
    settings["models"] = {"fake": settings["models"]["fake"] | {"options": {"n_parallel": 2}}}
    file.write_text(yaml.safe_dump(settings))
    await restart(gateway)
    for stream in streams:
        lines = await stream
        assert lines[-1] == "data: [DONE]"
        assert not any("error" in line for line in lines)
    assert (await gateway.complete()).status == 200
    await until(lambda: not any(map(is_running, engines)))


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_that_wait_for_a_load_are_answered_by_the_next_gateway(
    start_gateway: StartGateway, tmp_path: Path, stream: bool
) -> None:
    events = tmp_path / "events"
    fake = {"ready_after_s": 6, "events_file": str(events)}
    gateway = await start_gateway(fake=fake, keepalive_interval_s=0.5, drain_timeout_s=1)  # shorter than the load

    async def ask() -> Any:
        return await gateway.stream() if stream else await gateway.complete()

    asked = [asyncio.create_task(ask()) for _ in range(4)]
    await until(lambda: events_in(events, "start"))
    await asyncio.sleep(0.7)
    await restart(gateway)
    for answer in await asyncio.gather(*asked):
        if stream:
            assert answer[0].startswith(": fake is loading")
            assert answer[-1] == "data: [DONE]"
            assert not any("error" in line for line in answer)
        else:
            assert isinstance(answer, Answer)
            assert answer.status == 200
    assert len(events_in(events, "start")) == 1


async def test_requests_that_wait_for_a_model_that_is_not_started_yet_are_answered_by_the_next_gateway(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    """Here: it crashes at its start, and the old gateway is in the pause before the next try."""
    fake = {"exit_before_ready_times": 3, "counter_file": str(tmp_path / "starts")}
    gateway = await start_gateway(fake=fake, restart_limit=10)
    asked = asyncio.create_task(gateway.complete())
    await gateway.until(state="backoff")
    await restart(gateway)
    assert (await asked).status == 200


async def test_a_launch_that_its_client_waits_for_is_answered_once_it_is_ready_there(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    gateway = await start_gateway()
    wish = {"model_uid": "mine", "model_engine": "llama.cpp"} | fake_model(tmp_path / "m.gguf", {"ready_after_s": 4})
    launching = asyncio.create_task(gateway.post("/v1/models", wish))
    await until(lambda: list((gateway.home / "launches").glob("*.json")))
    await gateway.until("mine", state="starting")
    await restart(gateway)
    answer = await launching
    assert (answer.status, answer.json) == (200, {"model_uid": "mine"})
    replica = await gateway.until("mine", state="ready")
    assert replica["starts"] == 1


async def test_the_new_gateway_does_not_unload_what_the_old_one_still_answers_by(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake=SLOW, model={"preload": True, "idle_timeout_s": 0.3})
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    engine = await engine_of(gateway)
    await restart(gateway)
    replica = await gateway.until(state="ready", in_flight=1)
    assert replica["pid"] == engine
    lines = await stream
    assert lines[-1] == "data: [DONE]"
    assert not any("error" in line for line in lines)
    await gateway.until(state="stopped")  # idle at last
    assert not is_running(engine)


async def test_settings_are_read_anew_and_only_what_they_change_is_loaded_anew(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    file = gateway.home / "settings.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["models"]["other"] = settings["models"]["fake"]
    file.write_text(yaml.safe_dump(settings))
    engine = await engine_of(gateway)
    await restart(gateway)
    other = await gateway.until("other", state="ready")
    assert await engine_of(gateway) == engine
    settings["models"]["other"] = settings["models"]["other"] | {"envs": {"FAKE_ENGINE": '{"tokens": 3}'}}
    file.write_text(yaml.safe_dump(settings))
    await restart(gateway)
    await until(lambda: not is_running(other["pid"]))
    await gateway.until("other", state="ready")
    assert await engine_of(gateway) == engine


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("log_level: loud", "log_level"),
        ("modles: {}", "Did you mean 'models'"),
        ("models: {m: {model_name: no-such-model}}", "no-such-model"),
    ],
)
async def test_settings_that_are_wrong_are_told_and_nothing_changes(
    start_gateway: StartGateway, wrong: str, told: str
) -> None:
    gateway = await start_gateway(fake=SLOW, model={"preload": True})
    engine = await engine_of(gateway)
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    (gateway.home / "settings.yaml").write_text(wrong)
    answer = await gateway.post("/v1/restart")
    assert (answer.status, answer.error["code"]) == (503, "cannot_restart")
    assert "goes on as it was" in answer.error["message"]
    assert told in answer.error["message"]
    assert (await gateway.complete()).status == 200
    assert await engine_of(gateway) == engine
    assert (await stream)[-1] == "data: [DONE]"
    assert (gateway.home / "gateway.lock").read_text() == str(gateway.process.pid)
    assert psutil.Process(gateway.process.pid).status() != psutil.STATUS_ZOMBIE


async def test_a_new_gateway_that_fails_in_the_midst_of_taking_over_leaves_all_to_the_old_one(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake=SLOW, model={"preload": True})
    engine = await engine_of(gateway)
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    (gateway.home / "run").chmod(0o755)
    answer = await gateway.post("/v1/restart")
    assert (answer.status, answer.error["code"]) == (503, "cannot_restart")
    assert "is open to others" in answer.error["message"]
    (gateway.home / "run").chmod(0o700)
    assert (await gateway.complete(max_tokens=1)).status == 200
    assert (await stream)[-1] == "data: [DONE]"
    assert await engine_of(gateway) == engine
    os.kill(engine, signal.SIGKILL)
    await gateway.until(state="ready", starts=2)  # it starts engines again


async def test_the_verb_says_what_it_did_and_why_it_did_not(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})

    async def say(*words: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "gateway.cli", "restart", "-e", gateway.address, *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode()

    code, said = await say("--json")
    assert code == 0, said
    assert json.loads(said)["pid_before"] == gateway.process.pid
    (gateway.home / "settings.yaml").write_text("prot: 1\n")
    code, said = await say()
    assert code == 1
    assert "Unknown key 'prot'" in said


async def test_a_restart_needs_the_key(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, api_keys=["sk-right"])
    assert (await gateway.post("/v1/restart")).status == 401
    headers = {"authorization": "Bearer sk-right"}
    assert (await gateway.post("/v1/restart", headers=headers)).status == 200
    assert (await gateway.complete()).status == 401
    assert (await gateway.get("/v1/models", headers=headers)).status == 200


async def test_a_signal_to_the_old_process_reaches_the_new_one(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake=SLOW, model={"preload": True})
    engine = await engine_of(gateway)
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    after = await restart(gateway)
    os.kill(gateway.process.pid, signal.SIGINT)  # while it drains
    await asyncio.gather(stream, return_exceptions=True)
    assert await gateway.process.wait() == 0
    await until(lambda: not is_running(after) and not is_running(engine))


async def test_a_new_gateway_that_is_killed_ends_the_old_process_in_the_same_way(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    await engine_of(gateway)
    after = await restart(gateway)
    await gateway.session.close()
    await until(lambda: is_stand_in(gateway.process.pid))
    os.kill(after, signal.SIGKILL)
    assert await gateway.process.wait() == -signal.SIGKILL


async def test_the_settings_file_is_read_by_the_gateway_that_is_there(start_gateway: StartGateway) -> None:
    """SIGHUP to the old process while it drains, SIGHUP to what stands in for it, and a saved file."""
    gateway = await start_gateway(fake=SLOW, model={"preload": True}, drain_timeout_s=20)
    await engine_of(gateway)
    file = gateway.home / "settings.yaml"
    settings = yaml.safe_load(file.read_text())

    async def take_up(number: int | None, **fields: Any) -> None:
        file.write_text(yaml.safe_dump(settings | fields))
        if number is not None:
            os.kill(gateway.process.pid, number)
        async with asyncio.timeout(10):
            while (await gateway.get("/v1/config")).json["taken_up"] in seen:
                await asyncio.sleep(0.05)
        seen.append((await gateway.get("/v1/config")).json["taken_up"])
        assert "drain_timeout_s at once" in seen[-1]["steps"]

    file.write_text(yaml.safe_dump(settings | {"watch_settings": False}))
    stream = asyncio.create_task(gateway.stream())
    await gateway.until(in_flight=1)
    await restart(gateway)
    seen: list[Any] = [None]
    await take_up(signal.SIGHUP, watch_settings=False, drain_timeout_s=21)
    assert not stream.done()
    assert (await stream)[-1] == "data: [DONE]"
    await until(lambda: is_stand_in(gateway.process.pid))
    await take_up(signal.SIGHUP, watch_settings=True, drain_timeout_s=22)
    await take_up(None, watch_settings=True, drain_timeout_s=23)


async def test_signals_about_settings_never_end_the_old_process_as_it_becomes_the_stand_in(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake={}, watch_settings=False)
    after = await restart(gateway)

    def hang_up_all_the_time() -> None:
        while is_running(gateway.process.pid) and not is_stand_in(gateway.process.pid):
            for _ in range(20):
                os.kill(gateway.process.pid, signal.SIGHUP)
                time.sleep(0.0005)

    await asyncio.wait_for(asyncio.to_thread(hang_up_all_the_time), 20)
    await asyncio.sleep(0.3)
    assert gateway.process.returncode is None
    assert is_running(after)
    assert (await gateway.complete()).status == 200


async def test_what_a_change_of_the_address_takes_is_told(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    file = gateway.home / "settings.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"host": "127.0.0.2"}))
    step = (await gateway.post("/v1/config/apply", {})).json["settings"][0]
    assert (step["name"], step["takes_effect"]) == ("host", "once the gateway is stopped and started")
    await restart(gateway)
    assert (await gateway.complete()).status == 200
    await until(lambda: "It listens on 127.0.0.1:" in gateway.log.read_text())


@pytest.mark.parametrize("is_killed", [False, True])
async def test_an_engine_that_was_given_other_memory_is_not_gone_on_with(
    start_gateway: StartGateway, is_killed: bool
) -> None:
    """Its command may be the same; what decides its place is not. So it is with `gpu_idx` and `n_gpu`."""
    gateway = await start_gateway(fake={}, model={"preload": True, "memory": "64MiB"})
    engine = await engine_of(gateway)
    if is_killed:
        await gateway.end(signal.SIGKILL)
        gateway = await start_gateway(fake={}, model={"preload": True, "memory": "96MiB"}, home=gateway.home)
    else:
        file = gateway.home / "settings.yaml"
        file.write_text(file.read_text().replace("64MiB", "96MiB"))
        await restart(gateway)
    await until(lambda: not is_running(engine))
    assert await engine_of(gateway) != engine
