"""Servers that a user already has, behind the door by their command lines."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from harness import FAKE_ENGINE, Gateway, StartGateway, until
from openai import AsyncOpenAI
from xinference_client import RESTfulClient

WORKERS = Path(__file__).parents[2] / "engines" / "workers" / "__main__.py"
FAKE = f"{FAKE_ENGINE} --host {{host}} --port {{port}} --alias {{uid}}"


def by_command(command: str | list[str], **options: Any) -> dict[str, Any]:
    return {"model_engine": "command", "options": {"command": command} | options}


# --- a real server: llama.cpp's, started as a stranger's


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    argv = [sys.executable, "-P", str(WORKERS), "llama_cpp", "--model", "{model}", "--threads", "1"]
    argv += ["--host", "{host}", "--port", "{port}", "--alias", "their-name", "--ctx-size", "2048", "--embedding"]
    model = by_command(argv, served_name="their-name", env={"LLAMA_API_KEY": "{api_key}"})
    gateway = await Gateway.start(
        tmp_path_factory.mktemp("home"), {"models": {"mine": model | {"model_path": str(smollm2_gguf)}}}
    )
    yield gateway
    assert await gateway.end() == 0


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_the_openai_sdk_knows_the_model_by_its_uid_and_the_server_by_its_own_name(gateway: Gateway) -> None:
    async with AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        whole = await client.completions.create(
            model="mine", prompt="The capital of France is", max_tokens=3, temperature=0
        )
        assert (whole.choices[0].text[:6], whole.model) == (" Paris", "mine")
        stream = await client.chat.completions.create(
            model="mine", messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
        )
        assert {chunk.model async for chunk in stream} == {"mine"}


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_xinferences_client_talks_to_it(gateway: Gateway) -> None:
    def talk() -> Any:
        client = RESTfulClient(gateway.address)
        described = client.list_models()["mine"]
        assert (described["model_engine"], described["model_type"]) == ("command", "LLM")
        return client.get_model("mine").generate("The capital of France is", {"max_tokens": 3, "temperature": 0})

    assert (await asyncio.to_thread(talk))["choices"][0]["text"].strip().startswith("Paris")


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_it_is_restarted_after_a_kill(gateway: Gateway) -> None:
    assert (await gateway.complete("mine", max_tokens=1)).status == 200
    replica = await gateway.until("mine", state="ready")
    os.kill(replica["pid"], signal.SIGKILL)
    back = await gateway.until("mine", limit_s=60, state="ready", starts=replica["starts"] + 1)
    assert "signal 9" in back["failure"]["reason"]
    assert (await gateway.complete("mine", max_tokens=1)).status == 200


# --- what can go wrong


async def test_a_server_without_files_of_its_own_serves_at_once(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(models={"mine": by_command(FAKE)})
    answer = await gateway.complete("mine")
    assert (answer.status, answer.json["model"]) == (200, "mine")
    assert (await gateway.until("mine"))["address"].startswith("http://127.0.0.1:")


async def test_a_server_that_only_lists_models_is_ready_once_it_does(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").write_text("{}")
    command = f"{sys.executable} -m http.server --bind {{host}} {{port}}"
    gateway = await start_gateway(models={"mine": by_command(command, working_folder=str(tmp_path))})
    answer = await gateway.complete("mine")
    assert answer.status == 501  # which is what that server says to POST
    assert answer.error["source"] == "engine"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (by_command("no-such-program {port}"), "no-such-program cannot be started: No such file or directory"),
        (by_command(FAKE, working_folder="/no/such"), "there is no working folder /no/such"),
        (by_command(["sh", "-c", "echo my words >&2; exit 3 # {port}"]), "exit code 3 before it was ready"),
        (by_command(["sh", "-c", "echo my words >&2; exit 3 # {port}"]), "my words"),
        (by_command("sleep 60 {port}") | {"start_timeout_s": 0.5}, "it was not ready 0.5 s after its start"),
        (by_command(FAKE, ready_path="/nothing") | {"start_timeout_s": 0.5}, "it was not ready 0.5 s after its start"),
    ],
)
async def test_a_server_that_does_not_start_says_why(
    start_gateway: StartGateway, model: dict[str, Any], said: str
) -> None:
    gateway = await start_gateway(models={"mine": model}, restart_limit=1)
    answer = await gateway.complete("mine")
    assert answer.status == 503
    assert said in answer.error["message"]


async def test_the_servers_key_and_environment_reach_it_and_the_gateways_own_do_not(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    server = f"{FAKE_ENGINE} --host $HOST --port $PORT"
    command = ["sh", "-c", f"env > {seen}; exec {server} # {{port}}"]
    env = {"HOST": "{host}", "PORT": "{port}", "LLAMA_API_KEY": "{api_key}"}
    gateway = await start_gateway(models={"mine": by_command(command, env=env)}, env={"HOSTLER_LOG_LEVEL": "info"})
    assert (await gateway.complete("mine")).status == 200
    given = dict(line.partition("=")[::2] for line in seen.read_text().splitlines())
    assert given["LLAMA_API_KEY"]
    assert "HOSTLER_LOG_LEVEL" not in given


@pytest.mark.parametrize("name", ["LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "PATH", "BASH_ENV"])
async def test_variables_that_bring_other_code_are_for_sites_that_say_so(
    start_gateway: StartGateway, tmp_path: Path, name: str
) -> None:
    gateway = await start_gateway()
    (file := tmp_path / "fake.gguf").write_bytes(b"GGUF")
    body = {"model_uid": "mine", "model_path": str(file), "model_engine": "llama.cpp"}
    refused = await gateway.post("/v1/models?wait_ready=false", body | {"envs": {name: "/tmp/x", "A": "b"}})
    assert refused.status == 400
    assert f"`envs` has {name}, by" in refused.error["message"]
    assert "allow_command_launches: true" in refused.error["message"]
    assert not list((gateway.home / "launches").glob("*.json"))
    assert (await gateway.post("/v1/models?wait_ready=false", body | {"envs": {"A": "b"}})).status == 200
    again = await gateway.post("/v1/models/mine/reload", {"model_config": {"envs": {name: "/tmp/x"}}})
    assert again.status == 400
    assert name in again.error["message"]


@pytest.mark.parametrize("envs", [{"LD_PRELOAD=/tmp/x.so:": "y"}, {"": "y"}, {"A": "b\0c"}, {"A\0": "b"}])
async def test_what_no_system_takes_as_a_variable_is_refused(
    start_gateway: StartGateway, tmp_path: Path, envs: dict[str, str]
) -> None:
    gateway = await start_gateway()
    (file := tmp_path / "fake.gguf").write_bytes(b"GGUF")
    refused = await gateway.post("/v1/models", {"model_uid": "mine", "model_path": str(file), "envs": envs})
    assert refused.status == 400
    assert "envs" in refused.error["message"]
    assert not list((gateway.home / "launches").glob("*.json"))


async def test_over_the_api_it_is_for_sites_that_say_so(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    body = {"model_uid": "mine", "model_engine": "command", "command": FAKE}
    refused = await gateway.post("/v1/models", body)
    assert refused.status == 400
    assert "allow_command_launches: true" in refused.error["message"]
    assert not list((gateway.home / "launches").glob("*.json"))
    await gateway.end()

    open_one = await start_gateway(allow_command_launches=True)
    assert (await open_one.post("/v1/models", body)).status == 200
    assert (await open_one.complete("mine")).status == 200
    shown = (await open_one.get("/v1/models/mine/reload/config")).json["model_config"]
    assert shown == {"command": FAKE}
    await open_one.end()

    closed_again = await start_gateway()  # what was launched meanwhile does not run either
    assert (await closed_again.complete("mine")).status == 404
    await until(lambda: "allow_command_launches" in closed_again.log.read_text())
