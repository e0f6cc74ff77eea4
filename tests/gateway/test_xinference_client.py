"""Xinference's own Python client, unchanged, against a running gateway and a real model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from harness import Gateway
from xinference_client import AsyncRESTfulClient, RESTfulClient

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

SMALL = {"n_threads": 1, "context_length": 1024, "n_parallel": 2}


def custom_llm(gguf: Path, name: str = "custom-smollm2", **changes: Any) -> dict[str, Any]:
    """The template of the documentation, for a GGUF file that is here."""
    return {
        "version": 2,
        "context_length": 2048,
        "model_name": name,
        "model_lang": ["en"],
        "model_ability": ["generate", "chat"],
        "model_description": "This is a custom model description.",
        "model_family": "my-custom-smollm2",
        "model_specs": [
            {
                "model_format": "ggufv2",
                "model_size_in_billions": "0_135",
                "quantization": "Q4_1",
                "model_id": None,
                "model_hub": "huggingface",
                "model_uri": f"file://{gguf}",
                "model_revision": None,
                "model_file_name_template": gguf.name,
            }
        ],
        "chat_template": None,
        "stop_token_ids": None,
        "stop": None,
        "virtualenv": {"packages": [], "inherit_pip_config": True},
        "is_builtin": False,
    } | changes


def custom_embedding(gguf: Path) -> dict[str, Any]:
    spec = custom_llm(gguf)["model_specs"][0]
    return {
        "version": 2,
        "model_name": "my-embedding",
        "dimensions": 576,
        "max_tokens": 512,
        "language": ["en"],
        "model_specs": [{key: value for key, value in spec.items() if key != "model_size_in_billions"}],
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), {"cache": str(model_cache)})
    yield gateway
    assert await gateway.end() == 0


async def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The client blocks, so it gets a thread."""
    return await asyncio.to_thread(function, *arguments, **named)


@pytest_asyncio.fixture(loop_scope="module")
async def client(gateway: Gateway) -> RESTfulClient:
    return await call(RESTfulClient, gateway.address)


async def test_the_way_of_a_custom_model(client: RESTfulClient, smollm2_gguf: Path, gateway: Gateway) -> None:
    model = custom_llm(smollm2_gguf)
    assert await call(client.register_model, model_type="LLM", model=json.dumps(model), persist=True) is None
    registrations = await call(client.list_model_registrations, model_type="LLM")
    assert {"model_name": "custom-smollm2", "is_builtin": False} in registrations
    assert {"model_name": "qwen3", "is_builtin": True} in registrations
    family = await call(client.get_model_registration, "LLM", "custom-smollm2")
    assert family["model_specs"][0]["model_uri"] == f"file://{smollm2_gguf}"
    engines = await call(client.query_engine_by_model_name, "custom-smollm2")
    assert engines["llama.cpp"][0]["quantizations"] == ["Q4_1"]

    uid = await call(client.launch_model, model_name="custom-smollm2", model_format="ggufv2", **SMALL)
    assert uid == "custom-smollm2"
    listed = (await call(client.list_models))[uid]
    assert (listed["model_type"], listed["model_format"], listed["replica"]) == ("LLM", "ggufv2", 1)
    described = await call(client.describe_model, uid)
    assert (described["context_length"], described["model_family"]) == (2048, "my-custom-smollm2")
    assert "chat" in described["model_ability"]
    assert (await call(client.get_launch_model_progress, uid))["progress"] == 1.0
    (instance,) = await call(client.get_instance_info, "custom-smollm2", uid)
    assert (instance["status"], instance["replica_statuses"][0]["replica_model_uid"]) == ("READY", f"{uid}-rep0")

    handle = await call(client.get_model, model_uid=uid)
    config = {"max_tokens": 8, "temperature": 0}
    answer = await call(handle.generate, "The capital of France is", config)
    assert answer["choices"][0]["text"].startswith(" Paris")
    assert answer["usage"]["completion_tokens"] <= 8
    chunks = await call(lambda: list(handle.generate("The capital of France is", config | {"stream": True})))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]).startswith(" Paris")
    chat = await call(handle.chat, [{"role": "user", "content": "Hello"}], generate_config=config)
    assert chat["choices"][0]["message"]["role"] == "assistant"
    chunks = await call(
        lambda: list(handle.chat([{"role": "user", "content": "Hello"}], None, None, config | {"stream": True}))
    )
    assert chunks[0]["object"] == "chat.completion.chunk"

    assert await call(client.unregister_model, model_type="LLM", model_name="custom-smollm2") is None
    registrations = await call(client.list_model_registrations, model_type="LLM")
    assert "custom-smollm2" not in {entry["model_name"] for entry in registrations}
    assert (await call(handle.generate, "The capital of France is", config))["choices"]  # it goes on running
    assert await call(client.terminate_model, uid) is None
    assert uid not in await call(client.list_models)
    events = (await gateway.get(f"/v1/models/{uid}/events")).json
    assert (events[0]["event_content"], events[-1]["event_content"]) == ("Launch model", "Terminate model")


async def test_a_custom_embedding_answers(client: RESTfulClient, smollm2_gguf: Path) -> None:
    await call(client.register_model, "embedding", json.dumps(custom_embedding(smollm2_gguf)), False)
    uid = await call(client.launch_model, "my-embedding", model_type="embedding", n_threads=1, pooling="mean")
    handle = await call(client.get_model, uid)
    embedded = await call(handle.create_embedding, ["a cat", "a dog"])
    assert [len(item["embedding"]) for item in embedded["data"]] == [576, 576]
    assert (await call(client.describe_model, uid))["dimensions"] == 576
    await call(client.terminate_model, uid)
    await call(client.unregister_model, "embedding", "my-embedding")


async def test_every_other_type_is_registered_listed_and_unregistered(client: RESTfulClient, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}"
    spec = {"model_format": "pytorch", "model_uri": uri, "quantization": "none"}
    for model_type, model in {
        "rerank": {"version": 2, "model_specs": [spec], "language": ["en"], "type": "unknown", "max_tokens": 512},
        "image": {"version": 2, "model_family": "stable_diffusion", "model_uri": uri, "controlnet": []},
        "audio": {"version": 2, "model_family": "ChatTTS", "model_uri": uri, "multilingual": False},
        "flexible": {
            "version": 2,
            "model_uri": uri,
            "launcher": "xinference.model.flexible.launchers.transformers",
            "launcher_args": "{}",
        },
    }.items():
        name = f"my-{model_type}"
        await call(client.register_model, model_type, json.dumps(model | {"model_name": name}), True)
        assert {"model_name": name, "is_builtin": False} in await call(client.list_model_registrations, model_type)
        assert (await call(client.get_model_registration, model_type, name))["model_name"] == name
        with pytest.raises(RuntimeError, match=name):  # no engine here runs it yet, and it is said plainly
            await call(client.launch_model, name, model_type=model_type)
        await call(client.unregister_model, model_type, name)
        assert name not in str(await call(client.list_model_registrations, model_type))


async def test_refusals_say_what_xinference_says(client: RESTfulClient, smollm2_gguf: Path) -> None:
    model = custom_llm(smollm2_gguf, name="refused")

    async def refusal(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
        with pytest.raises(RuntimeError) as refused:
            await call(function, *arguments, **named)
        return str(refused.value)

    assert "already registered" not in str(await call(client.register_model, "LLM", json.dumps(model), False))
    assert "Model refused already registered" in await refusal(client.register_model, "LLM", json.dumps(model), False)
    await call(client.unregister_model, "LLM", "refused")
    await call(client.unregister_model, "LLM", "refused")  # of an unknown name: no error
    for changes, said in (
        ({"model_name": "a b"}, "Invalid model name"),
        ({"model_name": "qwen3"}, "conflicts with existing model qwen3"),
        ({"model_family": None}, "You must specify `model_family`"),
        ({"version": 7}, "version"),
        ({"model_ability": ["cook"]}, "cook"),
    ):
        assert said in await refusal(client.register_model, "LLM", json.dumps(model | changes), True)
    assert "Unsupported model type" in await refusal(client.register_model, "world", json.dumps(model), True)
    assert "JSON" in await refusal(client.register_model, "LLM", "{", True)
    assert "refused" not in str(await call(client.list_model_registrations, "LLM"))

    assert "Model not found in the model list, uid: nope" in await refusal(client.describe_model, "nope")
    assert "Model not found in the model list, uid: nope" in await refusal(client.terminate_model, "nope")
    assert "has not been launched yet" in await refusal(client.cancel_launch_model, "nope")
    assert "qwen3" in await refusal(client.launch_model, "qwen33")
    assert "replica" in await refusal(client.launch_model, "smollm2-instruct", replica=0)
    assert "n_gpu" in await refusal(client.launch_model, "smollm2-instruct", n_gpu=-1)
    assert "multiple of replica" in await refusal(client.launch_model, "smollm2-instruct", replica=2, gpu_idx=[0])
    assert "does not exist" in await refusal(client.launch_model, "smollm2-instruct", model_path="/no/such.gguf")
    assert (await call(client.get_launch_model_progress, "nope"))["progress"] == 0.0
    assert await call(client.query_engine_by_model_name, "nope") is None


async def test_a_model_path_stands_in_for_the_download(client: RESTfulClient, smollm2_gguf: Path) -> None:
    uid = await call(
        client.launch_model, "smollm2-instruct", model_engine="llama.cpp", model_path=str(smollm2_gguf), n_threads=1
    )
    again = await call(
        client.launch_model, "smollm2-instruct", model_engine="LLAMA.CPP", model_path=str(smollm2_gguf), n_threads=1
    )
    assert again.startswith("smollm2-instruct-")
    for one in (uid, again):
        await call(client.terminate_model, one)


async def test_a_launch_that_is_not_waited_for_is_polled_and_cancelled(
    client: RESTfulClient, smollm2_gguf: Path
) -> None:
    options = {"model_path": str(smollm2_gguf), "n_threads": 1, "wait_ready": False}
    uid = await call(client.launch_model, "smollm2-instruct", model_uid="polled", **options)
    async with asyncio.timeout(30):
        while (await call(client.get_launch_model_progress, uid))["progress"] < 1:
            await asyncio.sleep(0.05)
    await call(client.cancel_launch_model, uid)
    assert uid not in await call(client.list_models)


async def test_request_limits_refuse_what_is_too_much(
    client: RESTfulClient, smollm2_gguf: Path, gateway: Gateway
) -> None:
    options = {"model_path": str(smollm2_gguf), "n_threads": 1, "request_limits": 1}
    uid = await call(client.launch_model, "smollm2-instruct", model_uid="limited", **options)
    body = {"model": uid, "prompt": "1, 2, 3,", "max_tokens": 300, "stream": True}
    async with gateway.session.post(gateway.address + "/v1/completions", json=body) as response:
        await response.content.readline()
        refused = await gateway.complete(uid)
        assert refused.status == 429
        assert "Rate limit reached for the model. Request limit 1 for the model: limited-rep0" in refused.json["detail"]
        assert refused.headers["retry-after"]
    await gateway.until(uid, in_flight=0)
    assert (await gateway.complete(uid, max_tokens=1)).status == 200
    await call(client.terminate_model, uid)


async def test_what_is_cached_is_listed_and_removed(client: RESTfulClient, smollm2_gguf: Path) -> None:
    (entry,) = await call(client.list_cached_models, "smollm2-instruct")
    assert entry["model_version"] == "smollm2-instruct--0_135B--ggufv2--Q4_1"
    assert entry["size_bytes"] == smollm2_gguf.stat().st_size
    files = await call(client.list_deletable_models, entry["model_version"])
    assert files["paths"] == [str(smollm2_gguf)]
    assert await call(client.confirm_and_remove_model, "no-such-version") is False


async def test_the_machine_is_described(client: RESTfulClient, gateway: Gateway) -> None:
    (worker,) = await call(client.get_workers_info)
    assert worker["work-ip"] == gateway.address.removeprefix("http://")
    assert (await call(client.get_supervisor_info))["supervisor_ip"] == worker["work-ip"]
    assert set(await call(client.vllm_models)) == {"chat", "generate"}
    status = (await gateway.get("/status")).json
    assert status["workers"][worker["work-ip"]]["status"]["cpu"]["total"] >= 1
    assert "qwen3" in (await gateway.get("/v1/models/families")).json["chat"]
    assert (await gateway.get("/v1/cluster/version")).json["version"]
    assert (await gateway.post("/v1/rerank", {"model": "x"})).error["param"] == "query"
    assert (await gateway.post("/v1/supervisor/relaunch", {})).status == 501
    versions = (await gateway.get("/v1/models/LLM/smollm2-instruct/versions")).json
    assert "smollm2-instruct--0_135B--ggufv2--Q4_1" in {version["model_version"] for version in versions}


async def test_the_async_client_works_too(gateway: Gateway, smollm2_gguf: Path) -> None:
    client = AsyncRESTfulClient(gateway.address)
    try:
        await client.register_model("LLM", json.dumps(custom_llm(smollm2_gguf, name="async-model")), False)
        uid = await client.launch_model("async-model", n_threads=1)
        handle = await client.get_model(uid)
        answer = await handle.generate("The capital of France is", {"max_tokens": 4, "temperature": 0})
        assert answer["choices"][0]["text"].startswith(" Paris")
        await handle.close()
        await client.terminate_model(uid)
        await client.unregister_model("LLM", "async-model")
        assert uid not in await client.list_models()
    finally:
        await client.close()


async def test_a_key_given_to_the_client_is_used(tmp_path: Path) -> None:
    gateway = await Gateway.start(tmp_path / "home", {"api_keys": ["client-key"]})
    try:
        assert await call((await call(RESTfulClient, gateway.address, "client-key")).list_models) == {}
        with pytest.raises(RuntimeError):
            await call((await call(RESTfulClient, gateway.address, "wrong")).list_models)
    finally:
        await gateway.end()


async def test_a_persisted_registration_survives_a_killed_gateway(tmp_path: Path, smollm2_gguf: Path) -> None:
    gateway = await Gateway.start(tmp_path / "home", {})
    for name, persist in (("kept", True), ("lost", False)):
        body = {"model": json.dumps(custom_llm(smollm2_gguf, name=name)), "persist": persist}
        assert (await gateway.post("/v1/model_registrations/LLM", body)).body == b"null"
    await gateway.end(9)
    (gateway.home / "registrations" / "llm" / "damaged.json").write_text("{")
    gateway = await Gateway.start(tmp_path / "home", {})
    try:
        names = {entry["model_name"] for entry in (await gateway.get("/v1/model_registrations/LLM")).json}
        assert {"kept", "lost", "damaged"} & names == {"kept"}
        assert (gateway.home / "registrations" / "llm" / "damaged.json").read_text() == "{"
        assert "damaged.json" in gateway.log.read_text()
    finally:
        await gateway.end()
