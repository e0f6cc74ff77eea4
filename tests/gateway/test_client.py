"""hostler.Client: against a running gateway, and against the documented answers where it runs no model."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hostler
import pytest
from harness import StartGateway
from hostler import Client, ClientError
from stand_in import LAUNCHED, LOADING, READY, Raw, Refusal, StandIn, Turns

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    async with StandIn() as server:
        yield server


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOSTLER_ENDPOINT", "XINFERENCE_ENDPOINT", "HOSTLER_API_KEY"):
        monkeypatch.delenv(name, raising=False)


# --- the package


def test_the_package_has_what_it_says() -> None:
    assert hostler.__all__ == ["AsyncClient", "Client", "ClientError", "Step"]
    assert all(hasattr(hostler, name) for name in hostler.__all__)


def test_importing_it_loads_no_http_library() -> None:
    code = "import sys, hostler; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    ).stdout.split()
    assert not {"aiohttp", "requests", "httpx", "msgspec", "starlette", "rich"} & set(loaded)


# --- where it asks


def test_the_endpoint_is_the_given_one_then_ours_then_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Client().endpoint == "http://127.0.0.1:9997"
    monkeypatch.setenv("XINFERENCE_ENDPOINT", "http://other:1/")
    assert Client().endpoint == "http://other:1"
    monkeypatch.setenv("HOSTLER_ENDPOINT", "http://ours:1")
    assert Client().endpoint == "http://ours:1"
    assert Client("https://given").endpoint == "https://given"


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://a", "http://"])
def test_an_endpoint_that_is_none_is_told(endpoint: str) -> None:
    with pytest.raises(ClientError, match="no address of a gateway"):
        Client(endpoint)


def test_nobody_there_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ClientError, match="There is no gateway at") as caught:
            Client(f"http://127.0.0.1:{taken.getsockname()[1]}").health()
    assert caught.value.status is None


# --- against a running gateway


async def test_the_life_of_a_model(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    file = tmp_path / "tiny-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")

    def use() -> None:
        client = Client(gateway.address)
        assert client.health()
        assert not client.needs_key()
        assert client.list_models() == []
        assert client.launch(model_path=str(file), model_uid="org/tiny", model_engine="llama.cpp") == "org/tiny"
        assert client.get_model("org/tiny")["status"] == "ready"
        assert [one["uid"] for one in client.replicas()] == ["org/tiny"]
        assert client.complete("org/tiny", "x", max_tokens=4)["choices"]
        assert client.chat("org/tiny", MESSAGES, temperature=None)["choices"][0]["message"]["content"]
        chunks = list(client.chat_stream("org/tiny", MESSAGES))
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
        assert list(client.complete_stream("org/tiny", "x"))
        assert client.stop("org/tiny")["status"] == "stopped"
        assert client.start("org/tiny")["id"] == "org/tiny"
        assert all(isinstance(line, str) for line in client.logs("org/tiny", lines=5))
        client.terminate("org/tiny")
        assert client.list_models() == []

    await asyncio.to_thread(use)


async def test_a_refusal_has_its_status_and_its_text(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(api_keys=["secret"])

    def use() -> None:
        with pytest.raises(ClientError, match="API key") as caught:
            Client(gateway.address).list_models()
        assert caught.value.status == 401
        client = Client(gateway.address, "secret")
        with pytest.raises(ClientError) as caught:
            client.get_model("a b/c?d#e")
        assert caught.value.status in (400, 404)
        assert "a b/c?d#e" in caught.value.message

    await asyncio.to_thread(use)


async def test_lines_are_followed(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={})
    await gateway.complete()

    def first() -> str:
        lines = Client(gateway.address).logs("fake", follow=True)
        line = next(lines)
        lines.close()  # type: ignore[attr-defined]
        return line

    assert await asyncio.wait_for(asyncio.to_thread(first), 20)


async def test_a_stream_that_breaks_off_is_told(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={"die_after_tokens": 2})
    with pytest.raises(ClientError):
        await asyncio.to_thread(lambda: list(Client(gateway.address).complete_stream("fake", "x")))


# --- against the documented answers


async def test_a_launch_is_sent_and_followed(stand_in: StandIn) -> None:
    stand_in.answers["GET", "/v1/models/instances"] = Turns([LOADING, LOADING, READY])
    stand_in.answers["GET", "/v1/models/m/progress"] = Turns(
        [{"progress": 0.25, "stage": "downloading", "download_files": [{}]}, {"progress": 0.5}, {"progress": 1.0}]
    )

    def use() -> list[hostler.Step]:
        client = Client(stand_in.address, "key")
        uid = client.launch("m", wait=False, model_size_in_billions="0_5", n_gpu=None, quantization=None, n_ctx=64)
        return list(client.launch_progress(uid, pause_s=0))

    steps = await asyncio.to_thread(use)
    assert [(step.progress, step.stage, step.is_ready) for step in steps] == [
        (0.25, "downloading", False),
        (0.5, "loading", False),
        (1.0, "completed", True),
    ]
    assert steps[0].download_files == [{}]
    (asked,) = stand_in.requests("POST", "/v1/models")
    assert asked["query"] == {"wait_ready": "false"}
    assert asked["key"] == "Bearer key"
    assert asked["body"] == {"model_name": "m", "model_size_in_billions": "0_5", "n_gpu": None, "n_ctx": 64}
    assert stand_in.requests("GET", "/v1/models/instances")[0]["query"] == {"model_uid": "m"}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "m is gone"),
        ([{**LAUNCHED, "status": "ERROR"}], "ERROR"),
        ([{**LAUNCHED, "status": "ERROR", "replica_statuses": [{"error_message": "No room."}]}], "No room."),
    ],
)
async def test_a_launch_that_fails_is_told(found: list[Any], words: str, stand_in: StandIn) -> None:
    stand_in.answers["GET", "/v1/models/instances"] = found
    with pytest.raises(ClientError, match=words):
        await asyncio.to_thread(lambda: list(Client(stand_in.address).launch_progress("m")))


async def test_registrations_engines_and_cache(stand_in: StandIn) -> None:
    def use() -> None:
        client = Client(stand_in.address)
        assert client.register({"model_name": "mine"}, persist=True) == ""
        client.register('{"model_name": "mine", "x": 1}')
        assert [one["model_name"] for one in client.registrations(detailed=True)] == ["mine", "qwen3"]
        assert client.get_registration("mine")["model_name"] == "mine"
        client.unregister("mine")
        engines = client.engines("qwen3")
        assert engines is not None
        assert engines["vLLM"] == "vLLM is not installed"
        assert client.engines("nothing") is None
        assert client.cached_models("qwen3")[0]["model_version"] == "qwen3--8b--ggufv2--Q4_K_M"
        assert client.cached_files("v") == ["/cache/qwen3/a.gguf"]
        assert client.remove_cached("v") is True
        assert client.vllm_models()["chat"] == ["qwen3"]
        assert client.needs_key() is True
        assert client.login("u", "p") == "a-token"
        client.cancel("m")

    await asyncio.to_thread(use)
    bodies = [one["body"] for one in stand_in.requests("POST", "/v1/model_registrations/LLM")]
    assert [json.loads(body["model"]) for body in bodies] == [{"model_name": "mine"}, {"model_name": "mine", "x": 1}]
    assert [body["persist"] for body in bodies] == [True, False]
    assert stand_in.requests("GET", "/v1/model_registrations/LLM")[0]["query"] == {"detailed": "true"}
    assert stand_in.requests("GET", "/v1/cache/models")[0]["query"] == {"model_name": "qwen3"}
    assert stand_in.requests("DELETE", "/v1/cache/models")[0]["query"] == {"model_version": "v"}
    assert stand_in.requests("POST", "/v1/models/m/cancel")[0]["body"] is None


async def test_rerank_and_embed(stand_in: StandIn) -> None:
    def use() -> None:
        client = Client(stand_in.address)
        assert client.rerank("r", "q", ["a", "b"], top_n=None)["results"][0]["index"] == 1
        assert len(client.embed("e", "text")["data"][0]["embedding"]) == 5

    await asyncio.to_thread(use)
    assert stand_in.body("POST", "/v1/rerank") == {"model": "r", "query": "q", "documents": ["a", "b"]}


async def test_names_are_quoted(stand_in: StandIn) -> None:
    def use() -> None:
        client = Client(stand_in.address)
        for ask in (lambda: client.get_model("a b/ü?#%"), lambda: client.get_registration("a/../b", "LLM")):
            with pytest.raises(ClientError):
                ask()

    await asyncio.to_thread(use)
    paths = [one["path"] for one in stand_in.asked]
    assert paths == ["/v1/models/a%20b/%C3%BC%3F%23%25", "/v1/model_registrations/LLM/a%2F..%2Fb"]


async def test_the_text_of_a_refusal_is_that_of_either_form(stand_in: StandIn) -> None:
    stand_in.answers["GET", "/v1/models/m"] = Refusal(400, "Model not found in the model list, uid: m")
    with pytest.raises(ClientError) as caught:
        await asyncio.to_thread(Client(stand_in.address).get_model, "m")
    assert (caught.value.status, caught.value.message) == (400, "Model not found in the model list, uid: m")


async def test_an_answer_of_something_else_is_told(stand_in: StandIn) -> None:
    stand_in.answers["GET", "/v1/models"] = {"hello": "world"}
    stand_in.answers["GET", "/health"] = Raw(b"<html>", content_type="text/html")
    client = Client(stand_in.address)
    for ask in (client.list_models, client.health):
        with pytest.raises(ClientError, match="Is this the address"):
            await asyncio.to_thread(ask)


async def test_errors_within_a_stream_are_raised(stand_in: StandIn) -> None:
    stand_in.answers["POST", "/v1/completions"] = Raw(
        b': loading\r\n\r\ndata: {"choices": []}\r\n\r\n', b'data: {"error": "It broke."}\r\n\r\n'
    )
    seen = []

    def use() -> None:
        for chunk in Client(stand_in.address).complete_stream("m", "x"):
            seen.append(chunk)

    with pytest.raises(ClientError, match="It broke"):
        await asyncio.to_thread(use)
    assert seen == [{"choices": []}]
