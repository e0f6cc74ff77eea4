"""A model's options are changed while it is served: replica by replica, nothing lost, and back if it fails."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from harness import Gateway, StartGateway, fake_model
from hostler import AsyncClient, Client
from simulated import GB, Model, World
from virtual_time import virtual_time
from xinference_client import AsyncRESTfulClient, RESTfulClient

from engines.base import RAM
from gateway.config import Settings
from gateway.reload import Reload


async def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **named)


async def launched(gateway: Gateway, folder: Path, fake: dict[str, Any] | None = None, **fields: Any) -> None:
    body = fake_model(folder / "fake.gguf", fake or {}) | {"model_uid": "m"} | fields
    answer = await gateway.post("/v1/models", body)
    assert answer.status == 200, answer.body
    async with asyncio.timeout(30):
        while {one["state"] for one in await gateway.replicas() if one["uid"] == "m"} != {"ready"}:
            await asyncio.sleep(0.02)


async def reloaded(gateway: Gateway, **changes: Any) -> dict[str, Any]:
    """The status of the reload once it is over."""
    answer = await gateway.post("/v1/models/m/reload", {"model_config": changes})
    assert answer.status == 202, answer.body
    return await over(gateway)


async def over(gateway: Gateway) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while (status := (await gateway.get("/v1/models/m/reload")).json)["status"] == "reloading":
            await asyncio.sleep(0.02)
    return status


async def flags(gateway: Gateway, flag: str) -> list[str]:
    """The value of a flag of each replica's engine."""
    argvs = [psutil.Process(one["pid"]).cmdline() for one in await gateway.replicas()]
    return [argv[argv.index(flag) + 1] for argv in argvs]


async def test_no_request_is_lost_while_replicas_are_started_anew(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, {"tokens": 10, "token_delay_s": 0.02}, replica=2, n_threads=1, n_batch=64)
    before = [one["pid"] for one in await gateway.replicas()]
    answers: list[list[str]] = []

    async def ask_on() -> None:
        while (await gateway.get("/v1/models/m/reload")).json.get("status") != "ready":
            answers.append(await gateway.stream("m"))

    asking = [asyncio.create_task(ask_on()) for _ in range(3)]
    await asyncio.sleep(0.3)
    status = await reloaded(gateway, n_threads=2, n_batch=None)
    await asyncio.gather(*asking)
    assert (status["stage"], status["error"], status["replicas"], status["replicas_done"]) == ("ready", None, 2, 2)
    assert answers
    assert all(lines[-1] == "data: [DONE]" and len(lines) > 10 for lines in answers)
    assert await flags(gateway, "--threads") == ["2", "2"]
    assert not set(before) & {one["pid"] for one in await gateway.replicas()}
    assert json.loads((gateway.home / "launches" / "m.json").read_text())["options"] == {"n_threads": 2}


async def test_a_single_replica_is_waited_for(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, {"ready_after_s": 0.7}, n_threads=1)
    assert (await gateway.post("/v1/models/m/reload", {"model_config": {"n_threads": 2}})).status == 202
    assert (await gateway.complete("m")).status == 200
    assert (await over(gateway))["status"] == "ready"
    assert await flags(gateway, "--threads") == ["2"]


async def test_one_at_a_time(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, {"ready_after_s": 0.7})
    assert (await gateway.post("/v1/models/m/reload", {"model_config": {}})).status == 202
    second = await gateway.post("/v1/models/m/reload", {"model_config": {}})
    assert (second.status, second.error["code"]) == (409, "busy")
    assert (await over(gateway))["status"] == "ready"
    assert (await gateway.post("/v1/models/m/reload", {"model_config": {}})).status == 202


async def test_a_change_that_does_not_start_is_taken_back(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, replica=2, n_threads=1)
    envs = {"FAKE_ENGINE": '{"exit_at_start": 3}'}
    status = await reloaded(gateway, envs=envs, n_threads=2)
    assert status["status"] == "error"
    assert "m-rep0 does not start" in status["error"]
    assert "Its options are what they were." in status["error"]
    async with asyncio.timeout(30):
        while {one["state"] for one in await gateway.replicas() if one["uid"] == "m"} != {"ready"}:
            await asyncio.sleep(0.02)
    assert await flags(gateway, "--threads") == ["1", "1"]
    kept = json.loads((gateway.home / "launches" / "m.json").read_text())
    assert (kept["options"], kept["envs"]) == ({"n_threads": 1}, {"FAKE_ENGINE": "{}"})
    assert (await gateway.complete("m")).status == 200


async def test_a_copy_that_is_started_anew_counts_while_others_come_and_go(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, {"tokens": 600, "token_delay_s": 0.1}, replica=2)
    stream = asyncio.create_task(gateway.stream("m"))
    async with asyncio.timeout(10):
        while [one["in_flight"] for one in await gateway.replicas()] != [1, 0]:
            await asyncio.sleep(0.02)
    assert (await gateway.post("/v1/models/m/reload", {"model_config": {"n_batch": 64}})).status == 202
    assert (await gateway.get("/v1/models/m/reload")).json["stage"] == "draining"
    assert (await gateway.request("DELETE", "/v1/models/m/replicas/1")).json == {"remaining_replicas": 1}
    assert (await gateway.post("/v1/models/m/replicas?wait_ready=false", {})).status == 200
    assert (await gateway.get("/v1/models/m")).json["replica"] == 2
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    assert (await over(gateway))["stage"] == "ready"
    assert len(await gateway.replicas()) == 2


async def test_a_copy_that_is_removed_while_it_loads_is_waited_for_no_longer(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, replica=2)
    change = {"envs": {"FAKE_ENGINE": json.dumps({"never_ready": True})}}
    assert (await gateway.post("/v1/models/m/reload", {"model_config": change})).status == 202
    async with asyncio.timeout(10):
        while (await gateway.get("/v1/models/m/reload")).json["stage"] != "loading":
            await asyncio.sleep(0.02)
    assert (await gateway.request("DELETE", "/v1/models/m/replicas/0")).status == 200
    async with asyncio.timeout(10):
        while (await gateway.get("/v1/models/m/reload")).json["replicas_done"] != 1:
            await asyncio.sleep(0.02)


async def test_a_model_that_is_terminated_or_not_loaded_meanwhile(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, {"ready_after_s": 5, "lifetime_s": 60}, n_threads=1)
    assert (await gateway.post("/v1/models/m/reload", {"model_config": {"n_threads": 2}})).status == 202
    await gateway.until("m", state="starting")
    assert (await gateway.request("DELETE", "/v1/models/m")).status == 200
    await asyncio.sleep(0.1)  # the reload learns of it too
    assert (await gateway.get("/v1/models")).json["data"] == []
    assert not list((gateway.home / "launches").iterdir())
    await launched(gateway, tmp_path, n_threads=1)
    assert (await gateway.get("/v1/models/m/reload")).status == 404
    await gateway.post("/v1/models/m/stop")
    assert (await reloaded(gateway, n_threads=3))["status"] == "ready"
    assert (await gateway.until("m"))["state"] == "stopped"
    await gateway.complete("m")
    assert await flags(gateway, "--threads") == ["3"]


async def test_the_gateway_ends_in_the_middle_of_a_reload(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, {"ready_after_s": 0.5}, n_threads=1)
    await gateway.post("/v1/models/m/reload", {"model_config": {"n_threads": 2}})
    assert await gateway.end() == 0
    gateway = await start_gateway(home=gateway.home)
    await gateway.until("m", state="ready")
    assert await flags(gateway, "--threads") == ["2"]


async def test_what_cannot_be_changed_is_refused(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={})
    await launched(gateway, tmp_path)
    for body, said in (
        ({}, "model_config"),
        ({"model_config": 5}, "model_config"),
        ({"model_config": {"n_thread": 1}}, "n_threads"),
        ({"model_config": {"n_threads": "many"}}, "n_threads"),
        ({"model_config": {"model_path": "/x"}}, "cannot be changed by a reload"),
        ({"model_config": {"idle_timeout_s": -1}}, "idle_timeout_s"),
        ({"model_config": {}, "drain_timeout": -1}, "drain_timeout"),
        ({"model_config": {}, "python_executable": "/bin/sh"}, "python_executable"),
        ({"model_config": {}, "more": 1}, "more"),
    ):
        answer = await gateway.post("/v1/models/m/reload", body)
        assert (answer.status, said in answer.json["detail"]) == (400, True), answer.body
    declared = await gateway.post("/v1/models/fake/reload", {"model_config": {}})
    assert (declared.status, "declared in the settings" in declared.json["detail"]) == (400, True)
    assert (await gateway.post("/v1/models/nope/reload", {"model_config": {}})).status == 400
    assert (await gateway.get("/v1/models/m/reload")).status == 404


async def test_xinferences_clients_reload(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, n_threads=1)
    client = await call(RESTfulClient, gateway.address)
    config = await call(client.get_model_reload_config, "m")
    parameters = {one["name"]: one for one in config["parameters"]}
    assert (parameters["n_threads"]["value"], parameters["n_parallel"]["value"]) == (1, None)
    assert (parameters["n_parallel"]["type"], parameters["n_parallel"]["default"]) == ("integer", 4)
    assert parameters["idle_timeout_s"]["value"] is None
    assert (await call(client.reload_model, "m", {"n_threads": 2}, 5))["status"] == "reloading"
    await over(gateway)
    assert (await call(client.get_model_reload_status, "m"))["status"] == "ready"
    asynchronous = AsyncRESTfulClient(gateway.address)
    try:
        await asynchronous.reload_model("m", {"idle_timeout_s": 60})
        await over(gateway)
        assert (await asynchronous.get_model_reload_status("m"))["replicas_done"] == 1
        config = await asynchronous.get_model_reload_config("m")
        assert config["model_config"] == {"n_threads": 2}
    finally:
        await asynchronous.close()
    for method in ("relaunch_api", "list_api_relaunches", "relaunch_supervisor", "list_worker_relaunches"):
        with pytest.raises(RuntimeError, match="one process"):
            await call(getattr(client, method))
    with pytest.raises(RuntimeError, match="one process"):
        await call(client.relaunch_worker, "127.0.0.1:1")
    with pytest.raises(RuntimeError, match="one process"):
        await call(client.get_api_relaunch, "x")


async def test_our_clients_and_our_verb_reload(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await launched(gateway, tmp_path, n_threads=1, n_batch=8)
    client = Client(gateway.address)
    assert (await call(client.reload, "m", n_threads=2))["status"] == "reloading"
    await over(gateway)
    assert (await call(client.reload_status, "m"))["status"] == "ready"
    async with AsyncClient(gateway.address) as asynchronous:
        assert (await asynchronous.reload("m", drain_timeout_s=1, n_threads=3))["status"] == "reloading"
        await over(gateway)
        assert (await asynchronous.reload_status("m"))["model_config"] == {"n_threads": 3, "n_batch": 8}

    async def reload(*words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "gateway.cli", "reload", *words, "--endpoint", gateway.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return f"{process.returncode} {output.decode()}"

    assert await reload("--model-uid", "m", "--n-threads", "4", "--n_batch", "none") == "0 m is reloaded.\n"
    assert await flags(gateway, "--threads") == ["4"]
    assert "n_threads" in await reload("-u", "m", "--n-thread", "4")
    kept = json.loads((gateway.home / "launches" / "m.json").read_text())
    assert kept["options"] == {"n_threads": 4}


def test_a_copy_whose_room_went_to_another_model_ends_the_reload_with_a_sentence() -> None:
    with virtual_time() as loop:
        world = World(Settings(min_residency_s=600, max_wait_s=3600), {RAM: 2 * GB})

        async def scenario() -> Reload:
            world.begin()
            deployment = world.deploy(Model(uid="a", replica=2))
            world.deploy(Model(uid="b"))
            deployment.start()
            await asyncio.sleep(10)
            assert len(deployment.ready()) == 2
            other = world.ask("b", 1)  # has to wait, as both copies were loaded a moment ago
            await asyncio.sleep(1)
            before = deployment.launch
            deployment.launch = after = msgspec.structs.replace(before, options={"n": 1})
            reload = Reload(
                model_uid="a",
                operation_id="1",
                before=before,
                engine_before=deployment.engine,
                after=after,
                replicas=2,
                drain_timeout_s=1,
            )

            def take_back() -> None:
                deployment.launch = before

            await reload.run(deployment, world.replica, take_back)
            assert await other == "answered"
            assert [one.index for one in deployment.ready()] == [1]  # it serves as before
            return reload

        reload = loop.run_until_complete(asyncio.wait_for(scenario(), 300))
        world.raise_faults()
        loop.run_until_complete(world.end())
    assert reload.stage == "error"
    assert reload.error is not None
    assert reload.error.startswith("a-rep0 has no room: there is no room for another copy")
    assert reload.error.endswith("Its options are what they were.")
