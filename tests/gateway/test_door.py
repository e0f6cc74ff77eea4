"""The door with a fake engine behind it: bytes through, errors, keys, ids, disconnects."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import pytest
from harness import StartGateway, events_in, fake_model, until

pytestmark = pytest.mark.both_doors


async def test_probes_and_lists_answer(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    assert (await gateway.get("/health")).json == {"status": "ok"}
    assert (await gateway.get("/ready")).status == 200  # nothing is to be loaded at start
    assert [model["id"] for model in (await gateway.get("/v1/models")).json["data"]] == ["fake"]
    assert (await gateway.get("/v1/models/fake")).json["object"] == "model"
    assert (await gateway.get("/v1/cluster/auth")).json == {"auth": False}
    assert (await gateway.get("/nowhere")).error["code"] == "not_found"
    assert (await gateway.get("/v1/completions")).status == 405


async def test_ready_waits_for_the_models_that_are_loaded_at_start(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"ready_after_s": 1.0}, model={"preload": True})
    assert (await gateway.get("/ready")).status == 503
    await gateway.until(state="ready")
    assert (await gateway.get("/ready")).json["models_ready"] == 1


async def test_each_route_answers_streamed_and_not(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"tokens": 3})
    chat = await gateway.post("/v1/chat/completions", {"model": "fake", "messages": [{"role": "user", "content": "x"}]})
    assert chat.json["choices"][0]["message"]["content"]
    assert chat.json["model"] == "fake"
    assert chat.headers["x-hostler-replica"] == "0"
    assert (await gateway.complete()).json["object"] == "text_completion"
    embedded = await gateway.post("/v1/embeddings", {"model": "fake", "input": ["a", "b"]})
    assert len(embedded.json["data"]) == 2
    lines = await gateway.stream(stream_options={"include_usage": True})
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["usage"]["completion_tokens"] == 3


async def test_the_body_reaches_the_engine_byte_for_byte(start_gateway: StartGateway, tmp_path: Path) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake={"events_file": str(events)})
    body = b'{ "model":"fake",\n"prompt": "\\u00e9 \xc3\xa9", "future_option": {"a": [1, 2.50]} }'
    answer = await gateway.post("/v1/completions", body, headers={"content-type": "application/json"})
    assert answer.status == 200
    assert [event["bytes"] for event in events_in(events, "request")] == [len(body)]


async def test_large_bodies_pass_both_ways(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"huge_body_bytes": 3_000_000})
    answer = await gateway.complete(prompt="y" * 5_000_000)
    assert answer.status == 200
    assert len(answer.body) > 3_000_000


async def test_a_body_over_the_limit_is_refused_before_it_is_read(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, max_body_bytes=2000)
    announced = await gateway.complete(prompt="y" * 5000)

    async def chunks():
        for _ in range(10):
            yield b"y" * 500

    unannounced = await gateway.session.post(gateway.address + "/v1/completions", data=chunks())
    assert announced.status == unannounced.status == 413
    assert "max_body_bytes" in announced.error["message"]


async def test_an_unknown_model_is_named_with_its_neighbours(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    answer = await gateway.complete("fakee")
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert answer.json["detail"] == answer.error["message"]
    assert answer.json["detail"] == "Model not found in the model list, uid: fakee. Did you mean 'fake'?"
    assert answer.headers["x-hostler-error-source"] == answer.error["source"] == "gateway"


async def test_bad_bodies_are_refused_with_the_place(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    for body, param in (
        (b"", None),
        (b"{", None),
        (b"\xff\xfe", None),
        (b"[]", None),
        (b'{"model": "fake"}', "prompt"),
        (b'{"prompt": "x"}', "model"),
        (b'{"model": 5, "prompt": "x"}', "model"),
        (b'{"model": "fake", "prompt": "x", "stream": "yes"}', "stream"),
    ):
        answer = await gateway.post("/v1/completions", body)
        assert (answer.status, answer.error["param"]) == (400, param), body
    assert (await gateway.replicas())[0]["state"] == "stopped"  # none of them loaded the model


async def test_nobody_slows_the_gateway_by_a_body_of_his_own_making(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    deep = b'{"model": "fake", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    assert (await gateway.post("/v1/completions", deep)).status == 400
    assert (await gateway.post("/v1/models", b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}")).status == 400
    long = await gateway.complete("m" * 5_000_000)
    assert (long.status, long.error["param"]) == (400, "model")
    assert len(long.body) < 2000
    packed = await gateway.post("/v1/completions", b"x", headers={"content-encoding": "gzip"})
    assert (packed.status, packed.error["code"]) == (415, "unsupported_body")


async def test_a_launch_body_over_the_limit_is_refused(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(max_body_bytes=2000)
    assert (await gateway.post("/v1/models", {"model_name": "x" * 5000})).status == 413


async def test_embeddings_are_never_streamed(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"ready_after_s": 1.0}, keepalive_interval_s=0.2)
    embedded = await gateway.post("/v1/embeddings", {"model": "fake", "input": "x", "stream": True})
    assert embedded.json["object"] == "list"


async def test_a_page_of_this_machine_may_call_across_ports(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    asked = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    preflight = await gateway.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert preflight.headers["access-control-allow-origin"] == "http://localhost:3000"


async def test_an_engines_error_keeps_its_status_and_gets_our_envelope(start_gateway: StartGateway) -> None:
    for said, message in (
        ({"error": {"message": "too long", "type": "exceed_context_size_error", "code": 400}}, "too long"),
        ({"detail": "no such adapter"}, "no such adapter"),
        ("plain words", "plain words"),
    ):
        gateway = await start_gateway(fake={"error_status": 422, "error_body": said})
        answer = await gateway.complete()
        assert (answer.status, answer.error["message"]) == (422, message)
        assert answer.headers["x-hostler-error-source"] == answer.error["source"] == "engine"
        assert answer.json["detail"] == message
        await gateway.end()


async def test_a_request_id_is_echoed_forwarded_and_logged(start_gateway: StartGateway, tmp_path: Path) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake={"events_file": str(events)})
    mine = await gateway.post("/v1/completions", {"model": "fake", "prompt": "x"}, headers={"x-request-id": "mine-7"})
    made = await gateway.complete()
    refused = await gateway.complete("nope")
    unfit = await gateway.get("/health", headers={"x-request-id": "with blank"})
    assert mine.headers.getall("x-request-id") == ["mine-7"]
    assert [event["id"] for event in events_in(events, "request")] == ["mine-7", made.headers["x-request-id"]]
    assert "id=mine-7" in gateway.log.read_text()
    assert refused.headers["x-request-id"]
    assert unfit.headers["x-request-id"] != "with blank"


async def test_without_a_key_nobody_gets_in_and_keys_are_in_no_log(start_gateway: StartGateway, tmp_path: Path) -> None:
    secret = tmp_path / "keys"
    secret.write_text("key-of-a-file\n")
    gateway = await start_gateway(
        fake={}, api_keys=["${KEY_OF_ENV}"], api_keys_file=str(secret), env={"KEY_OF_ENV": "key-of-env"}
    )
    body = {"model": "fake", "prompt": "x"}
    for path in ("/v1/models", "/metrics", "/v1/replicas", "/v1/models/fake/logs"):
        assert (await gateway.get(path)).status == 401, path
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic a"}, {"x-api-key": ""}):
        refused = await gateway.post("/v1/completions", body, headers=headers)
        assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    for headers in ({"authorization": "Bearer key-of-env"}, {"x-api-key": "key-of-a-file"}):
        assert (await gateway.post("/v1/completions", body, headers=headers)).status == 200
    assert (await gateway.get("/v1/cluster/auth")).json == {"auth": True}
    assert (await gateway.get("/health")).status == 200
    written = gateway.log.read_text() + "".join(log.read_text() for log in gateway.home.glob("logs/**/*.log"))
    assert "key-of-" not in written


async def test_the_engine_has_a_key_of_its_own_and_never_sees_the_clients(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(fake={}, api_keys=["client-key"])
    headers = {"authorization": "Bearer client-key", "cookie": "session=1", "x-custom": "kept"}
    await gateway.post("/v1/completions", {"model": "fake", "prompt": "x"}, headers=headers)
    replica = (await gateway.get("/v1/replicas", headers=headers)).json[0]
    socket = replica["address"].removeprefix("unix:")
    import aiohttp
    import psutil

    assert "LLAMA_API_KEY" not in " ".join(psutil.Process(replica["pid"]).cmdline())
    key = psutil.Process(replica["pid"]).environ()["LLAMA_API_KEY"]
    assert key not in " ".join(psutil.Process(replica["pid"]).cmdline())
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as around:
        assert (await around.post("http://x/v1/completions", json={"prompt": "x"})).status == 401
        seen = await (await around.get("http://x/requests", headers={"authorization": f"Bearer {key}"})).json()
    sent = next(entry["headers"] for entry in seen if entry["path"] == "/v1/completions")
    assert sent["authorization"] == f"Bearer {key}"
    assert sent["x-custom"] == "kept"
    assert "cookie" not in sent
    assert Path(socket).parent.stat().st_mode & 0o777 == 0o700


async def test_a_page_of_another_site_cannot_call_a_gateway_without_keys(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    foreign = await gateway.get("/v1/models", headers={"origin": "https://evil.example"})
    local = await gateway.get("/v1/models", headers={"origin": "http://localhost:3000"})
    assert (foreign.status, local.status) == (403, 200)


async def test_a_client_that_leaves_in_mid_stream_stops_the_engine(start_gateway: StartGateway, tmp_path: Path) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake={"tokens": 2000, "token_delay_s": 0.02, "events_file": str(events)})
    body = {"model": "fake", "prompt": "x", "stream": True}
    async with gateway.session.post(gateway.address + "/v1/completions", json=body) as response:
        await response.content.readline()
        left = time.time()
    gone = (await until(lambda: events_in(events, "client_gone")))[0]
    assert gone["time"] - left < 1.0
    await gateway.until(in_flight=0, limit_s=2)
    assert 'requests_cancelled_total{model="fake",phase="answering"} 1' in (await gateway.get("/metrics")).body.decode()


async def test_a_client_that_leaves_before_the_answer_stops_the_engine(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake={"first_token_delay_s": 60, "events_file": str(events)})
    for number, stream in enumerate((False, True)):
        asking = asyncio.ensure_future(gateway.complete(stream=stream))
        await until(lambda: events_in(events, "request")[number:])  # noqa: B023
        asking.cancel()
        await gateway.until(in_flight=0, limit_s=2)
    assert len(await until(lambda: len(found := events_in(events, "client_gone")) == 2 and found)) == 2
    assert 'phase="waiting"} 2' in (await gateway.get("/metrics")).body.decode()


async def test_a_client_that_leaves_is_noticed_though_its_next_request_waits(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake={"first_token_delay_s": 60, "events_file": str(events)})
    await gateway.post("/v1/models/fake/start")
    await gateway.until(state="ready")
    body = b'{"model":"fake","prompt":"x","pad":"%b"}'
    port = int(gateway.address.rpartition(":")[2])
    for number, size in enumerate((10, 10, 100_000), 1):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        for content in (body % b"", body % (b"y" * size)):
            head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(content)
            writer.write(head + content)
        await writer.drain()
        await until(lambda: events_in(events, "request")[number - 1 :])  # noqa: B023
        await asyncio.sleep(0.1)
        left = time.time()
        if number == 2:
            writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()
        gone = (await until(lambda: events_in(events, "client_gone")[number - 1 :]))[0]  # noqa: B023
        assert gone["time"] - left < 0.3 + 0.2  # how often the engine looks
        await gateway.until(in_flight=0, limit_s=1)
    assert f'phase="waiting"}} {number}' in (await gateway.get("/metrics")).body.decode()


async def test_a_client_that_leaves_while_the_model_loads_is_never_sent_to_the_engine(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    events = tmp_path / "events"
    gateway = await start_gateway(fake={"ready_after_s": 1.5, "events_file": str(events)})
    asking = [asyncio.ensure_future(gateway.complete(stream=stream)) for stream in (False, True)]
    await gateway.until(state="starting", waiting=2)
    for task in asking:
        task.cancel()
    await gateway.until(waiting=0, limit_s=2)
    await gateway.until(state="ready")  # the load goes on for the next one
    assert events_in(events, "request") == []
    assert (await gateway.complete()).status == 200


async def test_sixty_four_streams_at_once_all_complete_on_four_slots(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"n_slots": 4, "tokens": 5, "token_delay_s": 0.01})
    streams = await asyncio.gather(*(gateway.stream() for _ in range(64)))
    assert {(len(lines), lines[-1]) for lines in streams} == {(7, "data: [DONE]")}
    await gateway.until(in_flight=0, waiting=0, starts=1)


async def test_connections_to_the_engine_are_used_again(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    for _ in range(20):
        assert (await gateway.complete()).status == 200
    import aiohttp

    socket = (await gateway.replicas())[0]["address"].removeprefix("unix:")
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as around:
        busy = await (await around.get("http://x/busy")).json()
    assert busy["connections"] < 10  # the probes of its start, one for all requests, and ours


async def test_an_engine_that_closes_its_connections_loses_no_request(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"keep_alive_s": 0.1})
    for _ in range(10):
        assert (await gateway.complete()).status == 200
        await asyncio.sleep(0.1)  # just when the engine gives the connection up
    assert (await gateway.until())["starts"] == 1


async def test_metrics_count_by_model_and_scraping_loads_nothing(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={}, models={"other": fake_model(tmp_path / "fake.gguf", {})})
    await gateway.complete()
    await gateway.complete("unknown")
    text = (await gateway.get("/metrics")).body.decode()
    assert 'hostler_requests_total{model="fake",route="/v1/completions",status="200"} 1.0' in text
    assert 'hostler_replica_state{model="other",replica="0",state="stopped"} 1.0' in text
    assert "unknown" not in text  # strangers' words make no series


async def test_logs_are_read_and_followed(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    assert (await gateway.get("/v1/models/fake/logs")).status == 404  # not started yet
    await gateway.complete()
    assert "listening" in (await gateway.get("/v1/models/fake/logs?lines=50")).body.decode()
    assert (await gateway.get("/v1/models/fake/logs?lines=x")).status == 400
    assert (await gateway.get("/v1/models/fake/logs?replica=9")).status == 400
    async with gateway.session.get(gateway.address + "/v1/models/fake/logs?follow=true&lines=0") as response:
        log = Path((await gateway.replicas())[0]["log"])
        with log.open("a") as file:
            file.write("a new line\n")
        async with asyncio.timeout(5):
            assert await response.content.readline() == b"a new line\n"


async def test_a_uid_with_a_slash_works_everywhere(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(models={"org/model-7b": fake_model(tmp_path / "fake.gguf", {})})
    assert (await gateway.complete("org/model-7b")).status == 200
    assert (await gateway.get("/v1/models/org/model-7b")).json["id"] == "org/model-7b"
    assert (await gateway.get("/v1/models/org/model-7b/logs")).status == 200
    assert (await gateway.post("/v1/models/org/model-7b/stop")).json["status"] == "stopped"


async def test_a_page_whose_name_is_made_to_point_here_gets_nothing(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    for path in ("/v1/models", "/v1/models/fake/logs", "/metrics"):
        refused = await gateway.get(path, headers={"Host": "evil.example"})
        assert (refused.status, refused.error["code"]) == (403, "host_not_allowed")
    assert (await gateway.get("/v1/models")).status == 200


@pytest.mark.parametrize("said", [{"detail": "Not Found"}, "<!doctype html><h1>Not Found</h1>", "404 page not found"])
async def test_a_path_that_the_engine_lacks_is_named(start_gateway: StartGateway, said: Any) -> None:
    gateway = await start_gateway(fake={"error_status": 404, "error_body": said})
    answer = await gateway.complete()
    assert (answer.status, answer.error["source"]) == (404, "engine")
    assert "'fake', llama.cpp, has no /v1/completions" in answer.error["message"]
    other = await gateway.post("/v1/convert_ids_to_tokens", {"model": "fake", "input": [1]})  # llama-server's words
    assert "'fake', llama.cpp, has no /v1/convert_ids_to_tokens" in other.error["message"]


async def test_another_404_of_an_engine_is_told_in_its_words(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"error_status": 404, "error_body": {"detail": "The model x does not exist."}})
    assert (await gateway.complete()).error["message"] == "The model x does not exist."
