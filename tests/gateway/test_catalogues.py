"""Catalogues behind URLs and drafts of registrations, over the API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import StartGateway
from hub_servers import Answer, Server
from test_remote import a_catalogue


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


async def test_a_catalogue_behind_a_url_is_read_at_start_and_again_on_request(
    start_gateway: StartGateway, server: Server
) -> None:
    server.answers["/c.json"] = Answer(a_catalogue("first"))
    url = f"{server.url}/c.json".replace("127.0.0.1", "localhost")  # the harness takes the other for the gateway's
    gateway = await start_gateway(catalogue_files=[url])
    first = (await gateway.get("/v1/model_registrations/LLM/first")).json
    assert first["is_builtin"] is True
    server.answers["/c.json"] = Answer(a_catalogue("first", "second"))
    updated = await gateway.post("/v1/models/update_type", {"model_type": "LLM"})
    assert (updated.status, updated.json["data"]["model_type"]) == (200, "LLM")
    assert "1 catalogue of the site read again" in updated.json["data"]["message"]
    assert (await gateway.get("/v1/model_registrations/LLM/second")).status == 200

    server.answers["/c.json"] = Answer(status=500)
    refused = await gateway.post("/v1/models/update_type", {"model_type": "LLM"})
    assert (refused.status, "500" in refused.json["detail"]) == (400, True)
    assert (await gateway.get("/v1/model_registrations/LLM/second")).status == 200
    await gateway.end()

    server.close()
    gateway = await start_gateway(home=gateway.home, catalogue_files=[url])
    assert (await gateway.get("/v1/model_registrations/LLM/second")).status == 200
    assert (await gateway.post("/v1/models/update_type", {"model_type": "poem"})).status == 400


async def test_a_site_without_catalogues_is_told_so(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    assert (
        "catalogue_files"
        in (await gateway.post("/v1/models/update_type", {"model_type": "LLM"})).json["data"]["message"]
    )


async def test_a_registration_is_drafted_only_from_where_models_may_be(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    for place in ("roots/mine", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text(json.dumps({"architectures": ["X"], "n_ctx": 77}))
    (tmp_path / "roots" / "link").symlink_to(tmp_path / "elsewhere")
    gateway = await start_gateway(model_roots=[str(tmp_path / "roots")])

    async def draft(path: object, family: object = "qwen3") -> tuple[int, str]:
        answer = await gateway.post("/v1/models/llm/auto-register", {"model_path": path, "model_family": family})
        return answer.status, json.dumps(answer.json)

    status, found = await draft(str(tmp_path / "roots" / "mine"))
    assert (status, json.loads(found)["context_length"], json.loads(found)["model_name"]) == (200, 77, "mine")
    assert (await gateway.post("/v1/model_registrations/LLM", {"model": found, "persist": False})).status == 200
    for path, said in (
        (str(tmp_path / "elsewhere"), "model_roots"),
        (str(tmp_path / "roots" / "link"), "model_roots"),
        (str(tmp_path / "roots" / ".." / "elsewhere"), "model_roots"),
        ("/etc/no-such-thing", "model_roots"),
        ("mine", "model_roots"),
        ("a\0b", "Nothing can be drafted"),
        (str(tmp_path / "roots" / "none"), "no folder"),
        (str(tmp_path / "roots"), "config.json"),
        (5, "model_path"),
        ("", "model_path"),
    ):
        status, answer = await draft(path)
        assert (status, said in answer) == (400, True), answer
    assert (await draft(str(tmp_path / "roots" / "mine"), None))[0] == 400
