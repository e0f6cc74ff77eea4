"""POST /v1/models/instance: a launch by the text of a version, as lists of versions have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import Gateway, StartGateway


def family(name: str, folder: Path, *quantizations: str) -> dict[str, Any]:
    specs = []
    for quantization in quantizations:
        (folder / f"{quantization}.gguf").write_bytes(b"GGUF")
        specs.append(
            {
                "model_format": "ggufv2",
                "model_size_in_billions": "0_5",
                "quantization": quantization,
                "model_file_name_template": "{quantization}.gguf",
                "model_uri": str(folder / f"{quantization}.gguf"),
            }
        )
    common = {"version": 2, "model_name": name, "model_family": "other", "model_lang": ["en"]}
    return common | {"model_ability": ["generate"], "model_specs": specs}


async def registered(gateway: Gateway, model: dict[str, Any]) -> list[str]:
    """Its versions."""
    answer = await gateway.post("/v1/model_registrations/LLM", {"model": model, "persist": False})
    assert answer.status == 200, answer.body
    versions = (await gateway.get(f"/v1/models/LLM/{model['model_name']}/versions")).json
    return [version["model_version"] for version in versions]


async def test_every_version_that_is_listed_can_be_launched(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await registered(gateway, family("mine-longer", tmp_path, "q8_0"))
    versions = await registered(gateway, family("mine", tmp_path, "q4_0", "q8_0"))
    assert versions == ["mine--0_5B--ggufv2--q4_0", "mine--0_5B--ggufv2--q8_0"]
    for version in versions:
        uid = version.rpartition("--")[2]
        body = {
            "model_uid": uid,
            "model_engine": "llama.cpp",
            "model_type": "LLM",
            "model_version": version,
            "replica": 1,
            "n_gpu": "auto",
            "replica_config": None,
        }
        answer = await gateway.post("/v1/models/instance", body)
        assert (answer.status, answer.json) == (200, {"model_uid": uid})
        described = (await gateway.get(f"/v1/models/{uid}")).json
        assert (described["model_name"], described["quantization"], described["status"]) == ("mine", uid, "ready")
        (instance,) = (await gateway.get(f"/v1/models/instances?model_uid={uid}")).json
        assert instance["model_version"] == version


@pytest.mark.parametrize("wait_ready", ["False", "false"])
async def test_it_need_not_be_waited_for(start_gateway: StartGateway, tmp_path: Path, wait_ready: str) -> None:
    gateway = await start_gateway()
    (version,) = await registered(gateway, family("mine", tmp_path, "q4_0"))
    body = {
        "model_uid": "m",
        "model_type": "LLM",
        "model_version": version,
        "envs": {"FAKE_ENGINE": '{"never_ready": true}'},
    }
    answer = await gateway.post(f"/v1/models/instance?wait_ready={wait_ready}", body)
    assert (answer.status, answer.json) == (200, {"model_uid": "m"})


async def test_a_version_that_there_is_not_is_refused(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    await registered(gateway, family("mine", tmp_path, "q4_0"))
    for body, said in (
        ({"model_version": "mine--0_5B--ggufv2--q4_1"}, "Did you mean 'mine--0_5B--ggufv2--q4_0'"),
        ({"model_version": "qwen33"}, "qwen3"),
        ({"model_version": "x", "model_type": "poem"}, "Unsupported model type"),
        ({"model_version": 5}, "`model_version` is a text"),
        ({}, "`model_version` is a text"),
        ({"model_version": "mine--0_5B--ggufv2--q4_0", "replica": 0}, "`replica`"),
        ([], "no JSON object"),
    ):
        answer = await gateway.post("/v1/models/instance", body)
        assert (answer.status, said in answer.json["detail"]) == (400, True), answer.body
    assert (await gateway.get("/v1/models")).json["data"] == []
