"""Bad input at every route that writes: a sentence and a 4xx, nothing stored, nothing leaked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from harness import FAKE_ENGINE, Gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOOD: dict[str, Any] = {
    "version": 2,
    "model_name": "fine",
    "model_family": "any",
    "model_lang": ["en"],
    "model_ability": ["generate"],
    "model_specs": [
        {
            "model_format": "ggufv2",
            "model_size_in_billions": 1,
            "quantization": "q4",
            "model_file_name_template": "fine.gguf",
            "model_uri": "/tmp",
        }
    ],
}


def without(gone: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != gone}


DEEP = "[" * 3000 + "]" * 3000
NAMES = ["", " ", "a b", "a/b", "a\\b", "..", ".", "a?b", "a%2Fb", "a#b", "a&b", "a=b", "a+b", "a\tb", "a\nb", "a\0b"]
URIS = ["relative/path", "./x", "../../etc/passwd", "", "file://relative", "/no/such/place", "file:///no/such/place"]

MODELS: list[Any] = [
    *[GOOD | {"model_name": name} for name in NAMES],
    *[GOOD | {"model_specs": [GOOD["model_specs"][0] | {"model_uri": uri}]} for uri in URIS if uri],
    *[GOOD | {"model_name": name} for name in (5, None, [], {}, True, "x" * 5000)],
    *[GOOD | {"model_specs": specs} for specs in ({}, "x", None, [5], [{}], [None])],
    *[GOOD | {"model_ability": abilities} for abilities in (["cook"], "chat", [5], {"chat": 1})],
    *[GOOD | {"context_length": length} for length in ("long", [], {}, -1.5)],
    *[GOOD | {"version": version} for version in (3, "two", [], 99)],
    *[GOOD | {"virtualenv": virtualenv} for virtualenv in (5, "x", {"packages": "x y"}, {"packages": [5]})],
    *[
        {key: value for key, value in GOOD.items() if key != gone}
        for gone in ("model_name", "model_specs", "model_family")
    ],
    {},
    [],
    5,
    "text",
    None,
]
TEXTS = ["", "{", "nonsense", "[]", "5", "null", DEEP, '{"model_name": "a", "model_name": "b"}', "\ud800", '{"a": NaN}']
BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b"\xff\xfe",
    b'{"model": "{}"}',
    b'{"persist": true}',
    b'{"model": 5, "persist": true}',
]
BODIES += [
    b'{"model": "{}", "persist": "maybe"}',
    DEEP.encode(),
    b'{"model": {"a": ' + DEEP.encode() + b'}, "persist": true}',
]
UIDS = [*(name for name in NAMES[1:] if name != "a/b"), "instances", "-x", "a/stop", "x" * 101]
TYPES = ["embedding", "rerank", "image", "audio", "flexible", "video", "llm", "x", "%2e%2e"]
LAUNCHES: list[Any] = [
    *[{"model_name": "smollm2-instruct", "model_uid": uid} for uid in UIDS],
    *[{"model_name": name} for name in ("nope", 5, [], {}, "../x", "/etc/passwd")],
    *[{"model_path": path, "model_uid": "x"} for path in ("relative.gguf", "/no/such.gguf", 5, [], "\0")],
    *[{"model_name": "smollm2-instruct", "replica": number} for number in (0, -1, 1.5, True, "two", [], 1000)],
    *[{"model_name": "smollm2-instruct", "n_gpu": number} for number in (-1, "-1", "many", [], True, 1.5)],
    *[{"model_name": "smollm2-instruct", "gpu_idx": index} for index in ("x", [0, 0], {}, [-1.5])],
    *[{"model_name": "smollm2-instruct", "model_engine": engine} for engine in ("vlm", 5, [])],
    *[
        {"model_name": "smollm2-instruct", "quantization": q, "model_format": f}
        for q, f in (("q9", None), (None, "awq"))
    ],
    *[{"model_name": "smollm2-instruct", "model_size_in_billions": size} for size in (70, "huge", [])],
    *[{"model_name": "smollm2-instruct", key: "x"} for key in ("n_ctxx", "gpu_memory_utilization", "__class__")],
    *[{"model_name": "smollm2-instruct", "n_ctx": value} for value in ("many", 0, -5, [], {})],
    *[{"model_name": "smollm2-instruct", "envs": envs} for envs in (5, [], "A=b", {"A": 5})],
    {"model_name": "smollm2-instruct", "model_type": "world"},
    {"model_name": "smollm2-instruct", "download_hub": "nowhere"},
    {"model_name": "smollm2-instruct", "peft_model_config": {"lora_list": [{"lora_name": "a"}]}},
    {"model_name": "smollm2-instruct", "peft_model_config": "a"},
    [],
    5,
    None,
    "text",
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    engines = {"llama.cpp": {"binary": str(FAKE_ENGINE)}}
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), {"engines": engines})
    yield gateway
    assert await gateway.end() == 0


async def refuse(gateway: Gateway, path: str, body: bytes) -> None:
    answer = await gateway.post(path, body)
    assert 400 <= answer.status < 500, (body[:200], answer.status, answer.body[:500])
    said = answer.error["message"]
    assert said == answer.json["detail"]
    assert 10 < len(said) < 3000
    assert "Traceback" not in said
    assert "object at 0x" not in said


def assert_nothing_is_there(gateway: Gateway) -> None:
    folders = [gateway.home / "registrations", gateway.home / "launches"]
    assert [path for folder in folders if folder.exists() for path in folder.rglob("*") if path.is_file()] == []
    children = [child.cmdline() for child in psutil.Process(gateway.process.pid).children(recursive=True)]
    assert [argv for argv in children if "gateway.watchdog" not in argv] == []
    assert "Traceback" not in gateway.log.read_text()


async def test_bad_models_are_refused_as_objects_and_as_text(gateway: Gateway) -> None:
    for model in MODELS:
        await refuse(gateway, "/v1/model_registrations/LLM", json.dumps({"model": model, "persist": True}).encode())
        text = json.dumps({"model": json.dumps(model), "persist": True}).encode()
        await refuse(gateway, "/v1/model_registrations/LLM", text)
    assert_nothing_is_there(gateway)


@pytest.mark.parametrize("model_type", TYPES)
async def test_bad_models_of_every_type_are_refused(gateway: Gateway, model_type: str) -> None:
    for name in NAMES:
        body = json.dumps({"model": {"model_name": name, "version": 2}, "persist": True}).encode()
        await refuse(gateway, f"/v1/model_registrations/{model_type}", body)
    assert_nothing_is_there(gateway)


async def test_bad_texts_and_bodies_are_refused(gateway: Gateway) -> None:
    for text in TEXTS:
        await refuse(gateway, "/v1/model_registrations/LLM", json.dumps({"model": text, "persist": True}).encode())
    for body in BODIES:
        await refuse(gateway, "/v1/model_registrations/LLM", body)
        await refuse(gateway, "/v1/models", body)
        await refuse(gateway, "/v1/chat/completions", body)
    assert_nothing_is_there(gateway)


async def test_bad_launches_are_refused(gateway: Gateway) -> None:
    for launch in LAUNCHES:
        await refuse(gateway, "/v1/models", json.dumps(launch).encode())
    assert (await gateway.get("/v1/models")).json["data"] == []
    assert_nothing_is_there(gateway)


async def test_bad_launches_are_refused_by_the_other_routes_that_keep_them(gateway: Gateway) -> None:
    version = {"model_version": "smollm2-instruct--0_135B--ggufv2--Q4_1"}
    for launch in LAUNCHES:
        await refuse(gateway, "/v1/autostart/models", json.dumps({"launch": launch}).encode())
        await refuse(gateway, "/v1/autostart/models", json.dumps(launch).encode())
        await refuse(gateway, "/v1/models/instance", json.dumps(launch).encode())
        if (isinstance(launch, dict) and "replica" in launch) or "envs" in str(launch):
            await refuse(gateway, "/v1/models/instance", json.dumps(launch | version).encode())
    assert (await gateway.get("/v1/models")).json["data"] == []
    assert_nothing_is_there(gateway)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/autostart/models",
        "/v1/models/instance",
        "/v1/models/llm/auto-register",
        "/v1/launch_history",
        "/v1/models/nope/replicas",
        "/v1/models/nope/reload",
    ],
)
async def test_bad_bodies_are_refused_by_the_other_routes_that_write(gateway: Gateway, path: str) -> None:
    for body in BODIES:
        await refuse(gateway, path, body)
    for name in NAMES:
        await refuse(gateway, path, json.dumps({"model_path": name, "data": name, "model_uid": name}).encode())
    assert not (gateway.home / "launch_history.json").exists()
    assert_nothing_is_there(gateway)


async def test_the_good_one_is_taken_after_all_that(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "fine.gguf").write_bytes(b"GGUF")
    spec = GOOD["model_specs"][0] | {"model_uri": str(tmp_path / "fine.gguf")}
    body = {"model": GOOD | {"model_specs": [spec]}, "persist": True}
    assert (await gateway.post("/v1/model_registrations/LLM", body)).body == b"null"
    assert (await gateway.post("/v1/models", {"model_name": "fine"})).json == {"model_uid": "fine"}
    assert (await gateway.complete("fine")).status == 200
    assert (await gateway.request("DELETE", "/v1/models/fine")).status == 200
    assert (await gateway.request("DELETE", "/v1/model_registrations/LLM/fine")).status == 200
    assert_nothing_is_there(gateway)
