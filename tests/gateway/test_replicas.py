"""Replicas that come and go while a model runs: by plain HTTP, by both of Xinference's clients, by our verb."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Gateway, StartGateway, events_in, fake_model, is_running
from hostler import AsyncClient, Client
from xinference_client import AsyncRESTfulClient, RESTfulClient


async def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **named)


async def launched(gateway: Gateway, folder: Path, uid: str = "m", **fields: Any) -> str:
    behaviour = fields.pop("fake", {})
    answer = await gateway.post("/v1/models", fake_model(folder / "fake.gguf", behaviour) | {"model_uid": uid} | fields)
    assert answer.status == 200, answer.body
    return uid


async def ids(gateway: Gateway, uid: str = "m") -> list[int]:
    return [one["replica_id"] for one in (await gateway.get(f"/v1/models/{uid}/replicas")).json]


async def pids(gateway: Gateway) -> dict[int, int]:
    return {one["replica"]: one["pid"] for one in await gateway.replicas()}


async def test_a_copy_comes_serves_and_goes_and_ids_stay(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path)
    before = await pids(gateway)
    added = await gateway.post("/v1/models/m/replicas", {})
    assert added.status == 200, added.body
    assert (added.status, added.json["replica_id"], added.json["status"]) == (200, 1, "READY")
    assert added.json["replica_model_uid"] == "m-rep1"
    more = (
        await gateway.post("/v1/models/m/replicas", {"replica": 2, "n_gpu": "auto", "model_engine": "LLAMA.CPP"})
    ).json
    assert (more["replica"], [one["replica_id"] for one in more["replicas"]]) == (2, [2, 3])
    assert (await gateway.get("/v1/models/m")).json["replica"] == 4
    assert await pids(gateway) | before == await pids(gateway)  # nobody was restarted for it

    gone = (await pids(gateway))[1]
    removed = await gateway.request("DELETE", "/v1/models/m/replicas/1")
    assert (removed.status, removed.json) == (200, {"remaining_replicas": 3})
    assert not is_running(gone)
    assert await ids(gateway) == [0, 2, 3]
    answers = [await gateway.complete("m") for _ in range(6)]
    assert {answer.status for answer in answers} == {200}
    assert "1" not in {answer.headers["x-hostler-replica"] for answer in answers}
    assert (await gateway.get("/v1/models/m/logs?replica=3")).status == 200
    refused = await gateway.get("/v1/models/m/logs?replica=1")
    assert (refused.status, refused.error["message"]) == (400, "m has no replica 1; it has 0, 2, 3.")
    assert (await gateway.post("/v1/models/m/replicas")).json["replica_id"] == 1  # the free one


async def test_after_a_restart_there_are_as_many_as_were_wished_for(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path)
    await gateway.post("/v1/models/m/replicas", {"replica": 3})
    await gateway.request("DELETE", "/v1/models/m/replicas/0")
    gateway.process.kill()  # not even the time to write anything down
    await gateway.end()
    again = await start_gateway(home=gateway.home)
    assert await ids(again) == [0, 1, 2]


async def test_a_request_on_a_copy_that_goes_ends_as_it_should(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, fake={"tokens": 20, "token_delay_s": 0.1}, replica=2)
    await asyncio.gather(gateway.until("m", state="ready"), asyncio.sleep(0))
    async with asyncio.timeout(30):
        while {one["state"] for one in await gateway.replicas()} != {"ready"}:
            await asyncio.sleep(0.02)
    streams = [asyncio.create_task(gateway.stream("m")) for _ in range(2)]  # one on each
    async with asyncio.timeout(10):
        while [one["in_flight"] for one in await gateway.replicas()] != [1, 1]:
            await asyncio.sleep(0.02)
    removing = asyncio.create_task(gateway.request("DELETE", "/v1/models/m/replicas/0"))
    async with asyncio.timeout(10):
        while (await gateway.get("/v1/models/m")).json["replica"] != 1:
            await asyncio.sleep(0.02)
    late = await asyncio.gather(*(gateway.stream("m") for _ in range(3)))
    assert all(lines[-1] == "data: [DONE]" and len(lines) > 20 for lines in await asyncio.gather(*streams))
    assert all(lines[-1] == "data: [DONE]" for lines in late)
    assert (await removing).json == {"remaining_replicas": 1}
    assert (await gateway.replicas())[0]["starts"] == 1


async def test_what_the_only_copy_that_stays_has_dropped_is_not_sent_to_it_again(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway, events = await start_gateway(), tmp_path / "events"
    fake = {"tokens": 600, "token_delay_s": 0.1, "drop_after_requests": 2, "events_file": str(events)}
    await launched(gateway, tmp_path, fake=fake, replica=2)
    async with asyncio.timeout(30):
        while {one["state"] for one in await gateway.replicas()} != {"ready"}:
            await asyncio.sleep(0.02)
    streams = [asyncio.create_task(gateway.stream("m")) for _ in range(2)]  # one on each
    async with asyncio.timeout(10):
        while len(events_in(events, "request")) < 2:
            await asyncio.sleep(0.02)
    removing = asyncio.create_task(gateway.request("DELETE", "/v1/models/m/replicas/0"))
    async with asyncio.timeout(10):
        while (await gateway.get("/v1/models/m")).json["replica"] != 1:
            await asyncio.sleep(0.02)
    assert (await gateway.complete("m")).status == 502
    assert len(events_in(events, "request")) <= 4  # an attempt on a warm connection sends it once more
    for task in (*streams, removing):
        task.cancel()
    await asyncio.gather(*streams, removing, return_exceptions=True)


async def test_a_request_that_outlasts_the_drain_is_told(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(drain_timeout_s=0.3)
    await launched(gateway, tmp_path, fake={"tokens": 600, "token_delay_s": 0.1}, replica=2)
    async with asyncio.timeout(30):
        while {one["state"] for one in await gateway.replicas()} != {"ready"}:
            await asyncio.sleep(0.02)
    stream = asyncio.create_task(gateway.stream("m"))
    async with asyncio.timeout(10):
        while not (busy := [one["replica"] for one in await gateway.replicas() if one["in_flight"]]):
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)  # so that it has begun to answer
    assert (await gateway.request("DELETE", f"/v1/models/m/replicas/{busy[0]}")).json == {"remaining_replicas": 1}
    lines = await stream
    assert any('"error"' in line for line in lines[-2:])


async def test_the_last_copy_takes_the_model_with_it(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, replica=2)
    both = await asyncio.gather(*(gateway.request("DELETE", f"/v1/models/m/replicas/{one}") for one in (0, 1)))
    assert sorted(answer.json["remaining_replicas"] for answer in both) in ([0, 0], [0, 1])
    assert (await gateway.get("/v1/models")).json["data"] == []
    assert not list((gateway.home / "launches").iterdir())


async def test_copies_are_added_to_and_taken_from_a_model_that_is_not_loaded(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path)
    await gateway.post("/v1/models/m/stop")
    await gateway.post("/v1/models/m/replicas", {"replica": 2})
    assert {one["state"] for one in await gateway.replicas()} == {"stopped"}
    assert (await gateway.request("DELETE", "/v1/models/m/replicas/0")).json == {"remaining_replicas": 2}
    assert (await gateway.complete("m")).status == 200
    assert await ids(gateway) == [1, 2]


async def test_a_copy_that_does_not_start_is_taken_back(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(restart_limit=2)
    fake = {"exit_before_ready_times": 0, "counter_file": str(tmp_path / "starts")}
    await launched(gateway, tmp_path, fake=fake)
    (tmp_path / "fake.gguf").unlink()  # the next start cannot find its file
    answer = await gateway.post("/v1/models/m/replicas", {})
    assert (answer.status, answer.error["code"]) == (503, "model_failed")
    assert "m-rep1 does not start" in answer.error["message"]
    assert await ids(gateway) == [0]
    assert (await gateway.get("/v1/models/m")).json["replica"] == 1
    assert (await gateway.complete("m")).status == 200


async def test_what_cannot_be_done_is_refused_and_changes_nothing(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={})
    await launched(gateway, tmp_path)
    for body, said in (
        ({"replica": 0}, "`replica`"),
        ({"replica": True}, "`replica`"),
        ({"replica": "two"}, "`replica`"),
        ({"replica": 64}, "64 are the most"),
        ({"replica_config": {"devices": []}}, "replica_config"),
        ({"model_engine": "vLLM"}, "m has model_engine llama.cpp, so none can have vLLM"),
        ({"n_gpu": 2}, "m has n_gpu auto, so none can have 2"),
        ([], "no JSON object"),
        (b"{", "no JSON object"),
    ):
        answer = await gateway.post("/v1/models/m/replicas", body)
        assert (answer.status, said in answer.json["detail"]) == (400, True), answer.body
    gone = await gateway.request("DELETE", "/v1/models/m/replicas/7")
    assert (gone.status, gone.error["message"]) == (400, "m has no replica 7; it has 0.")
    unknown = await gateway.post("/v1/models/nope/replicas", {})
    assert (unknown.status, "uid: nope" in unknown.json["detail"]) == (400, True)
    for method, path in (("POST", "/v1/models/fake/replicas"), ("DELETE", "/v1/models/fake/replicas/0")):
        declared = await gateway.request(method, path)
        assert (declared.status, "declared in the settings" in declared.json["detail"]) == (400, True)
    assert await ids(gateway) == [0]


async def test_an_engine_that_dies_while_its_copy_goes_holds_nobody_up(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, fake={"tokens": 600, "token_delay_s": 0.1}, replica=2)
    async with asyncio.timeout(30):
        while {one["state"] for one in await gateway.replicas()} != {"ready"}:
            await asyncio.sleep(0.02)
    streams = [asyncio.create_task(gateway.stream("m")) for _ in range(2)]
    async with asyncio.timeout(10):
        while [one["in_flight"] for one in await gateway.replicas()] != [1, 1]:
            await asyncio.sleep(0.02)
    removing = asyncio.create_task(gateway.request("DELETE", "/v1/models/m/replicas/0"))
    await asyncio.sleep(0.2)
    os.kill((await pids(gateway))[0], signal.SIGKILL)
    assert (await asyncio.wait_for(removing, 20)).json == {"remaining_replicas": 1}
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)


async def test_xinferences_clients_add_and_end_copies(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path)
    client = await call(RESTfulClient, gateway.address)
    assert (await call(client.add_model_replica, "m"))["replica_id"] == 1
    assert (await call(client.add_model_replica, "m", replica=2, n_gpu="auto"))["replica"] == 2
    assert await call(client.terminate_model_replica, "m", 0) == 3
    with pytest.raises(RuntimeError, match="replica_config"):
        await call(client.add_model_replica, "m", {"devices": [{"worker_ip": "x"}]})
    with pytest.raises(RuntimeError, match="no replica 0"):
        await call(client.terminate_model_replica, "m", 0)
    asynchronous = AsyncRESTfulClient(gateway.address)
    try:
        assert (await asynchronous.add_model_replica("m"))["replica_id"] == 0
        assert await asynchronous.terminate_model_replica("m", 3) == 3
    finally:
        await asynchronous.close()


async def test_our_clients_and_our_verb_do_too(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path)
    client = Client(gateway.address)
    assert [one["replica_id"] for one in await call(client.add_replicas, "m", 2)] == [1, 2]
    assert await call(client.remove_replica, "m", 1) == 2
    async with AsyncClient(gateway.address) as asynchronous:
        assert [one["replica_id"] for one in await asynchronous.add_replicas("m")] == [1]
        assert await asynchronous.remove_replica("m", 0) == 2
        assert [one["replica_id"] for one in await asynchronous.replicas_of("m")] == [1, 2]

    async def scale(*words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "gateway.cli", "scale", *words, "--endpoint", gateway.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return f"{process.returncode} {output.decode()}"

    assert await scale("m", "3") == "0 m has 3 copies: m-rep0, m-rep1, m-rep2.\n"
    assert '"replica": 1' in await scale("m", "1", "--json")
    assert len(await ids(gateway)) == 1
