"""What is loaded at start: listed and changed as Xinference's clients do it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import StartGateway
from xinference_client import AsyncRESTfulClient, RESTfulClient


async def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **named)


def launch(folder: Path, uid: str = "m", **fields: Any) -> dict[str, Any]:
    return {"model_uid": uid, "model_path": str(folder / "fake.gguf"), "envs": {"HF_TOKEN": "hush-hush"}} | fields


async def test_a_model_is_kept_and_loaded_at_the_next_start_and_no_longer(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    client = await call(RESTfulClient, gateway.address)
    assert (await call(client.get_autostart_config))["models"] == []
    config = await call(client.upsert_autostart_model, {"enabled": True, "launch": launch(tmp_path, n_threads=1)})
    (entry,) = config["models"]
    assert (entry["enabled"], entry["priority"], entry["launch"]["n_threads"]) == (True, 100, 1)
    assert entry["launch"]["envs"] == {"HF_TOKEN": "******"}
    assert "hush-hush" not in json.dumps(config)
    assert (await gateway.until("m"))["state"] == "stopped"  # not now
    await gateway.end()

    gateway = await start_gateway(home=gateway.home)
    await gateway.until("m", state="ready")
    client = await call(RESTfulClient, gateway.address)
    summary = await call(client.get_autostart_model_summary)
    assert (summary["total"], summary["enabled"]) == (1, 1)
    assert summary["models"][0] | {"model_uid": "m", "enabled": True, "status": "ready"} == summary["models"][0]
    (entry,) = (await call(client.get_autostart_config))["models"]
    assert (await call(client.upsert_autostart_model, entry | {"enabled": False}))["models"] == []  # as it was read
    assert (await call(client.upsert_autostart_model, entry))["models"] == [entry]
    assert (await call(client.remove_autostart_model, "m"))["models"] == []
    assert (await gateway.until("m"))["state"] == "ready"  # it goes on
    await gateway.end()

    gateway = await start_gateway(home=gateway.home)
    assert (await gateway.until("m"))["state"] == "stopped"
    assert (await gateway.complete("m")).status == 200
    kept = json.loads((gateway.home / "launches" / "m.json").read_text())
    assert kept["envs"] == {"HF_TOKEN": "hush-hush"}


async def test_another_wish_takes_the_place_of_one_that_is_not_loaded(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    client = AsyncRESTfulClient(gateway.address)
    try:
        await client.upsert_autostart_model(launch(tmp_path, replica=1))  # flat
        masked = {"HF_TOKEN": "******", "OTHER": "new"}
        config = await client.upsert_autostart_model(launch(tmp_path, replica=2, envs=masked, enabled=True))
        assert config["models"][0]["launch"]["replica"] == 2
        assert len(await gateway.replicas()) == 2
        kept = json.loads((gateway.home / "launches" / "m.json").read_text())
        assert kept["envs"] == {"HF_TOKEN": "hush-hush", "OTHER": "new"}
        assert (await gateway.complete("m")).status == 200
        with pytest.raises(RuntimeError, match="loaded as something else"):
            await client.upsert_autostart_model(launch(tmp_path, replica=1))
        assert (await client.get_autostart_config())["models"][0]["launch"]["replica"] == 2
        assert (await client.get_autostart_model_summary())["enabled"] == 1
        assert (await client.remove_autostart_model("m"))["models"] == []
    finally:
        await client.close()


async def test_what_cannot_be_kept_is_refused(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway(fake={}, model={"preload": True})
    for body, said in (
        ({"launch": {"model_name": "qwen33"}}, "qwen3"),
        ({"launch": 5}, "launch"),
        ({"enabled": "perhaps", "launch": launch(tmp_path)}, "enabled"),
        ({"launch": launch(tmp_path, n_thread=1)}, "n_threads"),
        ({"launch": launch(tmp_path, model_path="/no/such.gguf")}, "does not exist"),
        ({"launch": {}}, "model_name"),
        ({"enabled": False, "launch": {"model_uid": "fake"}}, "declared in the settings"),
        ({"launch": launch(tmp_path, "fake")}, "declared in the settings"),
        ([], "no JSON object"),
    ):
        answer = await gateway.post("/v1/autostart/models", body)
        assert (answer.status, said in answer.json["detail"]) == (400, True), answer.body
    gone = await gateway.request("DELETE", "/v1/autostart/models/nope")
    assert (gone.status, "nope" in gone.json["detail"]) == (404, True)
    assert (await gateway.request("DELETE", "/v1/autostart/models/fake")).status == 400
    noted = await gateway.post("/v1/autostart/models", {"priority": 1, "launch": launch(tmp_path)})
    assert (noted.status, "priority" in noted.headers["x-hostler-notes"]) == (200, True)
