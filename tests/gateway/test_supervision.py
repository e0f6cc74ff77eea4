"""Engines that come late, never, crash or hang: what happens, and what each client reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from harness import Gateway, StartGateway, events_in, fake_model, is_running, until

# --- loading


async def test_two_clients_race_on_a_cold_model_and_one_process_is_started(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake={"ready_after_s": 0.5, "events_file": str(events)})
    answers = await asyncio.gather(*(gateway.complete() for _ in range(12)), gateway.stream())
    assert all(answer.status == 200 for answer in answers[:-1])
    assert answers[-1][-1] == "data: [DONE]"
    assert len(events_in(events, "start")) == 1


async def test_a_waiting_stream_gets_comments_and_then_its_answer(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"ready_after_s": 1.5}, keepalive_interval_s=0.3)
    lines = await gateway.stream()
    comments = [line for line in lines if line.startswith(":")]
    assert len(comments) >= 3
    assert "fake is loading: starting" in comments[-1]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) - len(comments) == 10


async def test_an_engines_refusal_after_comments_is_an_error_event(start_gateway: StartGateway) -> None:
    fake = {"ready_after_s": 1.0, "error_status": 400, "error_body": {"error": {"message": "too long"}}}
    gateway = await start_gateway(fake=fake, keepalive_interval_s=0.2)
    lines = await gateway.stream()
    assert json.loads(lines[-2][6:])["error"]["message"] == "too long"
    assert lines[-1] == "data: [DONE]"


async def test_a_request_that_is_not_streamed_waits_and_then_is_told_to_come_back(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"ready_after_s": 2}, model={"load_timeout_s": 0.5})
    early = await gateway.complete()
    assert (early.status, early.error["code"]) == (503, "model_loading")
    assert int(early.headers["retry-after"]) > 0
    assert "load_timeout_s" in early.error["message"]
    await gateway.until(state="ready")  # the load went on
    assert (await gateway.complete()).status == 200
    assert (await gateway.until())["starts"] == 1


async def test_a_start_that_never_gets_ready_ends_and_says_so(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"never_ready": True}, model={"start_timeout_s": 0.5}, restart_limit=2)
    answer = await gateway.complete()
    assert (answer.status, answer.error["code"]) == (503, "model_failed")
    assert "not ready 0.5 s after its start" in answer.error["message"]
    assert "start_timeout_s" in answer.error["message"]
    assert "hostler start fake" in answer.error["message"]
    replica = await gateway.until(state="failed", starts=2, pid=None)
    assert replica["failure"]["log_tail"]


async def test_a_start_that_exits_gives_its_code_and_last_words(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"exit_at_start": 3}, restart_limit=2, keepalive_interval_s=0.1)
    answer = await gateway.complete()
    assert answer.status == 503
    assert "exit code 3 before it was ready" in answer.error["message"]
    assert "Its last words:" in answer.error["message"]
    replica = (await gateway.replicas())[0]
    assert replica["failure"]["exit_code"] == 3
    assert len(replica["failure"]["log_tail"]) >= 3
    assert (await gateway.complete()).status == 503  # at once, without another start
    assert (await gateway.until())["starts"] == 2


async def test_a_failed_model_is_started_again_when_a_person_says_so(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    fake = {"exit_before_ready_times": 2, "counter_file": str(tmp_path / "starts")}
    gateway = await start_gateway(fake=fake, restart_limit=2)
    assert (await gateway.complete()).status == 503
    assert (await gateway.post("/v1/models/fake/start")).status == 202
    await gateway.until(state="ready")
    assert (await gateway.complete()).status == 200


async def test_a_start_that_fails_at_first_is_tried_again_and_no_request_is_lost(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    fake = {"exit_before_ready_times": 2, "counter_file": str(tmp_path / "starts")}
    gateway = await start_gateway(fake=fake)
    answers = await asyncio.gather(*(gateway.complete() for _ in range(5)))
    assert {answer.status for answer in answers} == {200}
    assert (await gateway.until())["starts"] == 3


async def test_files_that_are_not_there_fail_at_once_with_the_path(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(models={"gone": {"model_path": str(tmp_path / "gone.gguf")}})
    answer = await gateway.complete("gone")
    assert answer.status == 503
    assert str(tmp_path / "gone.gguf") in answer.error["message"]


# --- crashes


async def test_an_engine_killed_while_idle_is_back_by_itself(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    replica = await gateway.until(state="ready")
    os.kill(replica["pid"], signal.SIGKILL)
    back = await gateway.until(state="ready", starts=2)
    assert back["pid"] != replica["pid"]
    assert "signal 9 (SIGKILL)" in back["failure"]["reason"]
    assert (await gateway.complete()).status == 200


async def test_an_engine_that_dies_before_the_first_byte_costs_no_request(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    for stream in (False, True):
        fake = {"die_after_requests": 1, "die_only_first": True, "counter_file": str(tmp_path / f"starts-{stream}")}
        gateway = await start_gateway(fake=fake, home=tmp_path / f"home-{stream}")
        if stream:
            lines = await gateway.stream()
            assert lines[-1] == "data: [DONE]"
            assert not any("error" in line for line in lines)
        else:
            assert (await gateway.complete()).status == 200
        assert (await gateway.until())["starts"] == 2
        assert 'hostler_request_retries_total{model="fake"} 1' in (await gateway.get("/metrics")).body.decode()


async def test_a_request_that_kills_every_engine_is_tried_twice_and_no_more(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"die_after_requests": 1})
    answer = await gateway.complete()
    assert (answer.status, answer.error["code"]) == (502, "engine_died")
    assert "SIGKILL" in answer.error["message"]
    await gateway.until(state="ready", starts=3)


@pytest.mark.parametrize("half_event", [False, True])
async def test_an_engine_that_dies_in_mid_stream_ends_it_with_an_error_event(
    start_gateway: StartGateway, tmp_path: Path, half_event: bool
) -> None:
    fake = {"die_after_tokens": 3, "half_event": half_event, "tokens": 10, "token_delay_s": 0.02}
    gateway = await start_gateway(fake=fake)
    lines = await gateway.stream()
    events = [json.loads(line[6:]) for line in lines[:-1]]  # every event is whole
    assert len(events) == 4
    assert events[-1]["error"]["code"] == "engine_died"
    assert "signal 9" in events[-1]["error"]["message"]
    assert lines[-1] == "data: [DONE]"
    await gateway.until(state="ready", starts=2)


async def test_an_engine_that_dies_in_mid_body_never_gives_a_body_that_looks_whole(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"exit_mid_body": True})
    import aiohttp

    with pytest.raises(aiohttp.ClientPayloadError):
        await gateway.complete()


async def test_requests_move_to_the_replica_that_is_left(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"token_delay_s": 0.01}, model={"replica": 2, "preload": True})
    async with asyncio.timeout(20):
        while [replica["state"] for replica in await gateway.replicas()] != ["ready", "ready"]:
            await asyncio.sleep(0.05)
    first = (await gateway.replicas())[0]
    os.kill(first["pid"], signal.SIGKILL)
    answers = await asyncio.gather(*(gateway.complete() for _ in range(20)))
    assert {answer.status for answer in answers} == {200}


async def test_a_crash_loop_ends_in_failed_with_the_last_words(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"exit_after_s": 0.1, "exit_code": 4}, model={"preload": True}, restart_limit=3)
    replica = await gateway.until(state="failed", starts=3)
    assert "exit code 4" in replica["failure"]["reason"]
    assert replica["failure"]["log_tail"]


# --- unloading


async def test_an_idle_model_is_unloaded_and_comes_back(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 30, "token_delay_s": 0.05}, model={"idle_timeout_s": 0.5})
    lines = await gateway.stream()  # lasts for longer than the idle time
    assert lines[-1] == "data: [DONE]"
    replica = await gateway.until(state="stopped")
    assert replica["pid"] is None
    assert replica["failure"] is None
    assert (await gateway.complete()).status == 200
    assert (await gateway.until())["starts"] == 2


async def test_stop_waits_for_requests_in_flight_and_new_ones_for_the_next_start(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 20, "token_delay_s": 0.05})
    running = asyncio.ensure_future(gateway.stream())
    await gateway.until(in_flight=1)
    stopping = asyncio.ensure_future(gateway.post("/v1/models/fake/stop"))
    await gateway.until(in_flight=1)
    await asyncio.sleep(0.1)
    late = asyncio.ensure_future(gateway.complete())
    assert (await running)[-1] == "data: [DONE]"
    assert (await stopping).status == 200
    assert (await late).status == 200
    assert (await gateway.until())["starts"] == 2


async def test_a_forced_stop_ends_streams_with_an_error_event(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 2000, "token_delay_s": 0.02})
    running = asyncio.ensure_future(gateway.stream())
    await gateway.until(in_flight=1)
    await asyncio.sleep(0.2)
    assert (await gateway.post("/v1/models/fake/stop?force=true")).json["status"] == "stopped"
    lines = await running
    assert "error" in json.loads(lines[-2][6:])
    assert lines[-1] == "data: [DONE]"


# --- no orphans


async def processes_of(gateway: Gateway) -> list[int]:
    return [child.pid for child in psutil.Process(gateway.process.pid).children(recursive=True)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_leaves_nothing_behind(start_gateway: StartGateway, tmp_path: Path, number: int) -> None:
    grandchildren = tmp_path / "grandchildren"
    fake = {"grandchild": True, "grandchild_file": str(grandchildren)}
    gateway = await start_gateway(fake=fake, model={"preload": True})
    await gateway.until(state="ready")
    pids = await processes_of(gateway) + json.loads(grandchildren.read_text())
    assert len(pids) >= 4
    assert await gateway.end(number) == 0
    await until(lambda: not any(is_running(pid) for pid in pids), limit_s=5)


async def test_one_ctrl_c_is_enough_with_a_stream_in_flight_and_an_engine_that_ignores_term(
    start_gateway: StartGateway,
) -> None:
    gateway = await start_gateway(fake={"tokens": 5000, "token_delay_s": 0.02, "ignore_term": True})
    body = {"model": "fake", "prompt": "x", "stream": True}
    async with gateway.session.post(gateway.address + "/v1/completions", json=body) as response:
        await response.content.readline()
        pids = await processes_of(gateway)
        gateway.process.send_signal(signal.SIGINT)
        rest = (await response.content.read()).decode()
    assert "shutting_down" in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert await gateway.end(signal.SIGINT) == 0
    await until(lambda: not any(is_running(pid) for pid in pids), limit_s=5)


async def test_sigterm_lets_requests_in_flight_end_and_takes_no_new_ones(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 20, "token_delay_s": 0.05})
    running = asyncio.ensure_future(gateway.stream())
    await gateway.until(in_flight=1)
    gateway.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    import aiohttp

    with pytest.raises(aiohttp.ClientConnectorError):
        async with aiohttp.ClientSession() as other:
            await other.get(gateway.address + "/health")
    lines = await running
    assert lines[-1] == "data: [DONE]"
    assert not any("error" in line for line in lines)
    assert await gateway.end() == 0


async def test_a_killed_gateway_leaves_no_engine_behind(start_gateway: StartGateway, tmp_path: Path) -> None:
    grandchildren = tmp_path / "grandchildren"
    fake = {"grandchild": True, "grandchild_file": str(grandchildren), "ignore_term": True}
    gateway = await start_gateway(fake=fake, model={"preload": True})
    replica = await gateway.until(state="ready")
    pids = await processes_of(gateway) + json.loads(grandchildren.read_text())
    folder = Path(replica["address"].removeprefix("unix:")).parent
    await gateway.end(signal.SIGKILL)
    await until(lambda: not any(is_running(pid) for pid in pids), limit_s=30)
    await until(lambda: not folder.exists(), limit_s=5)


# --- launches by the API


async def test_a_launched_model_survives_a_killed_gateway(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    (tmp_path / "fake.gguf").write_bytes(b"GGUF")
    launched = await gateway.post(
        "/v1/models", {"model_uid": "mine", "model_name": None} | fake_model(tmp_path / "fake.gguf", {})
    )
    assert (launched.status, launched.json) == (200, {"model_uid": "mine"})
    assert (await gateway.complete("mine")).status == 200
    await gateway.end(signal.SIGKILL)
    (gateway.home / "launches" / "damaged.json").write_text("{")
    again = await start_gateway()
    await again.until("mine", state="ready")
    assert (await again.complete("mine")).status == 200
    assert "damaged.json" in again.log.read_text()
    assert (await again.request("DELETE", "/v1/models/mine")).body == b"null"
    assert (await again.complete("mine")).status == 404
    assert not (gateway.home / "launches" / "mine.json").exists()
    assert (gateway.home / "launches" / "damaged.json").exists()


async def test_launches_that_cannot_be_are_refused_and_not_kept(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={})
    file = str(tmp_path / "fake.gguf")
    for body, said in (
        ({}, "model_name"),
        ({"model_name": "smollm2-instrct"}, "smollm2-instruct"),
        ({"model_path": file, "model_uid": "a b"}, "white space"),
        ({"model_path": file, "model_uid": "fake"}, "already"),
        ({"model_path": file, "model_uid": "x", "n_paralel": 2}, "n_parallel"),
        ({"model_path": file, "model_uid": "x", "replica": 0}, "replica"),
        ({"model_path": file, "model_uid": "x", "model_engine": "vlm"}, "vLLM"),
        ({"model_path": "relative.gguf", "model_uid": "x"}, "absolute"),
        ([], "launch"),
    ):
        answer = await gateway.post("/v1/models", body)
        assert answer.status == 400, (body, answer.body)
        assert said in answer.error["message"], (body, answer.body)
    assert list((gateway.home / "launches").iterdir()) == []
    assert (await gateway.request("DELETE", "/v1/models/fake")).status == 400  # the settings declare it


async def test_a_launch_by_its_files_alone_is_called_as_they_are(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    file = tmp_path / "Some-1B.Q4_0.gguf"
    file.write_bytes(b"GGUF")
    wish = fake_model(file, {})
    checked = await gateway.post("/v1/models/check", wish)
    assert (checked.status, checked.json["model_name"]) == (200, "Some-1B.Q4_0")
    assert (await gateway.post("/v1/models", wish)).json == {"model_uid": "Some-1B.Q4_0"}
    assert (await gateway.complete("Some-1B.Q4_0")).status == 200
    second = (await gateway.post("/v1/models", wish)).json["model_uid"]
    assert second.startswith("Some-1B.Q4_0-")
    nameless = await gateway.post("/v1/models", {"model_format": "ggufv2"})
    assert (nameless.status, "specify the `model_name` field" in nameless.json["detail"]) == (400, True)


async def test_a_launch_that_fails_while_somebody_waits_is_forgotten(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(restart_limit=1)
    (tmp_path / "fake.gguf").write_bytes(b"GGUF")
    body = {"model_uid": "mine"} | fake_model(tmp_path / "fake.gguf", {"exit_at_start": 1})
    started = time.monotonic()
    assert (await gateway.post("/v1/models", body)).status == 503
    assert time.monotonic() - started < 20
    assert (await gateway.get("/v1/models")).json["data"] == []
    assert list((gateway.home / "launches").iterdir()) == []
    body |= fake_model(tmp_path / "fake.gguf", {})
    assert (await gateway.post("/v1/models?wait_ready=false", body)).status == 200
    await gateway.until("mine", state="ready")


# --- what happens at once


async def hold_a_stream(gateway: Gateway, model: str) -> asyncio.Task[list[str]]:
    begun = asyncio.Event()
    stream = asyncio.ensure_future(gateway.stream(model, begun=begun))
    await asyncio.wait_for(begun.wait(), 30)
    return stream


async def test_a_uid_can_be_launched_again_only_when_its_end_is_over(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    (tmp_path / "fake.gguf").write_bytes(b"GGUF")
    body = {"model_uid": "mine"} | fake_model(tmp_path / "fake.gguf", {"tokens": 30, "token_delay_s": 0.05})
    assert (await gateway.post("/v1/models", body)).status == 200
    stream = await hold_a_stream(gateway, "mine")
    ending = asyncio.ensure_future(gateway.request("DELETE", "/v1/models/mine"))
    await gateway.until("mine", state="ready")
    await asyncio.sleep(0.2)
    assert (await gateway.complete("mine")).status == 404
    refused = await gateway.post("/v1/models", body)
    assert (refused.status, "still being stopped" in refused.error["message"]) == (400, True)
    assert (await stream)[-1] == "data: [DONE]"
    assert (await ending).status == 200
    assert (await gateway.post("/v1/models", body)).status == 200
    assert (await gateway.complete("mine")).status == 200
    assert await gateway.end(limit_s=10) == 0


async def test_sigterm_while_a_model_is_being_terminated_cuts_no_stream(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    (tmp_path / "fake.gguf").write_bytes(b"GGUF")
    body = {"model_uid": "mine"} | fake_model(tmp_path / "fake.gguf", {"tokens": 70, "token_delay_s": 0.05})
    await gateway.post("/v1/models", body)
    stream = await hold_a_stream(gateway, "mine")
    ending = asyncio.ensure_future(gateway.request("DELETE", "/v1/models/mine"))
    await asyncio.sleep(0.2)
    gateway.process.send_signal(signal.SIGTERM)
    lines = await stream
    assert lines[-1] == "data: [DONE]"
    assert not any("error" in line for line in lines)
    assert (await ending).status == 200
    assert await gateway.end(limit_s=10) == 0


async def test_a_forced_stop_stays_a_stop_for_requests_without_a_byte(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"first_token_delay_s": 30})
    asking = asyncio.ensure_future(gateway.complete())
    await gateway.until(in_flight=1)
    assert (await gateway.post("/v1/models/fake/stop?force=true")).json["status"] == "stopped"
    answer = await asking
    assert (answer.status, answer.error["code"]) == (503, "model_stopped")
    assert (await gateway.until())["starts"] == 1


async def test_a_stop_of_a_cold_load_tells_those_who_wait(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"never_ready": True})
    asking = [asyncio.ensure_future(gateway.complete()) for _ in range(3)]
    await gateway.until(waiting=3, state="starting")
    assert (await gateway.post("/v1/models/fake/stop")).json["status"] == "stopped"
    assert {(await task).error["code"] for task in asking} == {"model_stopped"}
    assert (await gateway.until(state="stopped"))["starts"] == 1


async def test_a_request_during_a_drain_of_the_gateway_is_refused(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 40, "token_delay_s": 0.05})
    stream = await hold_a_stream(gateway, "fake")
    await gateway.get("/health")  # a connection that is kept
    gateway.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    refused = await gateway.complete()
    assert (refused.status, refused.error["code"]) == (503, "shutting_down")
    assert (await gateway.get("/ready")).status == 503
    assert (await stream)[-1] == "data: [DONE]"


async def test_one_failed_replica_of_two_is_revived_by_a_start(start_gateway: StartGateway, tmp_path: Path) -> None:
    fake = {"exit_before_ready_times": 1, "counter_file": str(tmp_path / "starts")}
    gateway = await start_gateway(fake=fake, model={"replica": 2, "preload": True}, restart_limit=1)

    async def states() -> list[str]:
        return sorted(replica["state"] for replica in await gateway.replicas())

    async with asyncio.timeout(20):
        while await states() != ["failed", "ready"]:
            await asyncio.sleep(0.05)
        assert (await gateway.post("/v1/models/fake/start")).status == 202
        while await states() != ["ready", "ready"]:
            await asyncio.sleep(0.05)


async def test_an_old_failure_is_not_told_as_the_reason_of_a_new_one(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 2000, "token_delay_s": 0.02})
    stream = await hold_a_stream(gateway, "fake")
    os.kill((await gateway.until())["pid"], signal.SIGKILL)
    assert "SIGKILL" in (await stream)[-2]
    await gateway.until(state="ready")
    await asyncio.sleep(0.1)
    stream = await hold_a_stream(gateway, "fake")
    await gateway.post("/v1/models/fake/stop?force=true")
    assert "SIGKILL" not in (await stream)[-2]


async def test_a_request_that_breaks_its_connection_is_sent_twice_at_most_for_each_attempt(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    fake = {"n_slots": 0, "exit_mid_body": False, "events_file": str(events), "keep_alive_s": 30}
    gateway = await start_gateway(fake=fake | {"die_after_requests": 11})
    await asyncio.gather(*(gateway.complete() for _ in range(10)))  # ten warm connections
    answer = await gateway.complete()
    assert answer.status == 200  # from the next life
    assert len(events_in(events, "request")) == 12


async def test_a_watchdog_that_is_killed_is_started_again(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    replica = await gateway.until(state="ready")

    def watchdogs() -> list[psutil.Process]:
        found = []
        for child in psutil.Process(gateway.process.pid).children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                found += [child] if "gateway.watchdog" in child.cmdline() else []
        return found

    (first,) = watchdogs()
    first.kill()
    await until(lambda: (found := watchdogs()) and found[0].pid != first.pid)
    await asyncio.sleep(0.3)
    await gateway.end(signal.SIGKILL)
    await until(lambda: not is_running(replica["pid"]), limit_s=20)


async def test_a_data_folder_that_cannot_be_written_is_told_and_nothing_is_half_done(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(fake={})
    (tmp_path / "fake.gguf").write_bytes(b"GGUF")
    launches = gateway.home / "launches"
    launches.rmdir()
    launches.write_text("not a folder")
    body = {"model_uid": "mine"} | fake_model(tmp_path / "fake.gguf", {})
    refused = await gateway.post("/v1/models", body)
    assert (refused.status, refused.error["code"]) == (503, "cannot_keep")
    assert [model["id"] for model in (await gateway.get("/v1/models")).json["data"]] == ["fake"]


async def test_a_log_that_cannot_be_written_is_tried_again(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    (gateway.home / "logs").write_text("not a folder")
    asking = asyncio.ensure_future(gateway.complete())
    await gateway.until(state="backoff")
    (gateway.home / "logs").unlink()
    assert (await asking).status == 200


async def test_launches_are_for_nobody_else_to_read(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(home=tmp_path / "deep" / "home")
    (tmp_path / "fake.gguf").write_bytes(b"GGUF")
    await gateway.post("/v1/models", {"model_uid": "mine"} | fake_model(tmp_path / "fake.gguf", {}))
    assert (gateway.home / "launches" / "mine.json").stat().st_mode & 0o777 == 0o600


async def test_ctrl_c_ends_a_log_that_is_followed(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    await gateway.complete()
    async with gateway.session.get(gateway.address + "/v1/models/fake/logs?follow=true&lines=1") as response:
        await response.content.readline()
        gateway.process.send_signal(signal.SIGINT)
        await response.content.read()
        async with asyncio.timeout(2):
            assert await gateway.process.wait() == 0
    assert "Traceback" not in gateway.log.read_text()


async def test_a_launch_takes_no_place_of_a_request_and_its_failure_can_be_followed(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(restart_limit=1)
    (tmp_path / "fake.gguf").write_bytes(b"GGUF")
    body = {"model_uid": "none", "request_limits": 0} | fake_model(tmp_path / "fake.gguf", {})
    assert (await gateway.post("/v1/models", body)).status == 200
    assert (await gateway.complete("none")).status == 429
    body = {"model_uid": "bad"} | fake_model(tmp_path / "fake.gguf", {"exit_at_start": 1})
    refused = await gateway.post("/v1/models", body)
    assert "launch again" in refused.error["message"]
    assert "hostler start" not in refused.error["message"]
    for bad in (
        {"gpu_idx": 1.5},
        {"options": [1], "foo": 1},
        {"options": "x"},
        {"model_uid": ["a"]},
        {"model_uid": "a-rep0"},
    ):
        assert (await gateway.post("/v1/models", body | bad)).status == 400, bad


async def test_a_registered_template_and_projector_reach_the_engine(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway()
    for name in ("m.gguf", "mmproj-f16.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    model = {
        "version": 2,
        "model_name": "seer",
        "model_family": "any",
        "model_lang": ["en"],
        "model_ability": ["chat"],
        "chat_template": "{{ messages }}",
        "stop": ["<END>"],
        "stop_token_ids": [2],
        "model_specs": [
            {
                "model_format": "ggufv2",
                "model_size_in_billions": 1,
                "quantization": "q4",
                "model_file_name_template": "m.gguf",
                "model_uri": str(tmp_path),
            }
        ],
    }
    registered = await gateway.post("/v1/model_registrations/LLM", {"model": json.dumps(model), "persist": True})
    assert registered.body == b"null"
    assert registered.headers["x-hostler-notes"].startswith("stop_token_ids: kept; llama.cpp goes by")
    launch = {"model_name": "seer", "multimodal_projector": "mmproj-f16.gguf"}
    launch["envs"] = {"FAKE_ENGINE": json.dumps({"events_file": str(events)})}
    answer = await gateway.post("/v1/models", launch)
    assert answer.status == 200, answer.body
    argv = events_in(events, "start")[0]["argv"]
    assert argv[argv.index("--mmproj") + 1] == str(tmp_path / "mmproj-f16.gguf")
    assert argv[argv.index("--chat-template") + 1] == "{{ messages }}"
    assert (await gateway.get("/v1/models/seer")).json["multimodal_projector"] == "mmproj-f16.gguf"
