"""Files of second repositories: fetched with the model's own, told, kept and removed with them. By a fake engine."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from harness import FAKE_ENGINE, Gateway, StartGateway, until
from hub_servers import ModelScope, Server
from model_files import safetensors

from engines.diffusers import Diffusers
from gateway.cli import hostler
from gateway.launch import LaunchRequest, plan
from registry.registry import Registry

PAINTER, WEIGHTS, NET = "org/painter", "other/painter-gguf", "nets/canny"
LARGE = b"GGUF" + bytes(range(256)) * 4000
PIPELINE = {
    "model_index.json": b"{}",
    "painter.safetensors": b"the same in one file",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"w" * 5000,
    "vae/diffusion_pytorch_model.safetensors": b"v" * 3000,
}
LEAN = {"model_index.json", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors"}
FAMILY = {
    "version": 2,
    "model_name": "painter",
    "model_family": "stable_diffusion",
    "model_id": PAINTER,
    "model_hub": "modelscope",
    "gguf_model_id": WEIGHTS,
    "gguf_quantizations": ["Q4_0", "Q8_0"],
    "gguf_model_file_name_template": "painter-{quantization}.gguf",
    "controlnet": [{"model_name": "canny", "model_hub": "modelscope", "model_id": NET}],
}
WISH = {"model_uid": "p", "model_name": "painter", "model_type": "image", "gguf_quantization": "q8_0"}


@pytest.fixture
def hub() -> Iterator[ModelScope]:
    server = Server()
    hub = ModelScope(server)
    hub.add(PIPELINE, name=PAINTER)
    hub.add({"painter-Q4_0.gguf": b"GGUF4", "painter-Q8_0.gguf": LARGE}, name=WEIGHTS)
    hub.add({"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"net"}, name=NET)
    yield hub
    server.close()


class Start:
    """Starts gateways whose diffusers is a fake that notes what it was told."""

    def __init__(self, start_gateway: StartGateway, hub: ModelScope, folder: Path) -> None:
        self._start, self._hub = start_gateway, hub
        self._told = folder / "told"
        self._python = folder / "python"
        self._python.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$WORKER_OPTIONS" >> {self._told}\n'
            'while [ "$1" != --model ]; do shift; done\n'
            f'exec {FAKE_ENGINE} --model "$2" --host "$6" --port "$8"\n'
        )
        self._python.chmod(0o755)

    async def __call__(self, **settings: Any) -> Gateway:
        gateway = await self._start(
            engines={"diffusers": {"python": str(self._python)}}, env=self._hub.env, restart_limit=1, **settings
        )
        if not (gateway.home / "registrations").exists():
            answer = await gateway.post("/v1/model_registrations/image", {"model": FAMILY, "persist": True})
            assert answer.status == 200, answer.body
        return gateway

    @property
    def told(self) -> dict[str, Any]:
        """The options of the worker that was started last."""
        found: dict[str, Any] = json.loads(self._told.read_text().splitlines()[-1])
        return found


@pytest.fixture
def start(start_gateway: StartGateway, hub: ModelScope, tmp_path: Path) -> Start:
    return Start(start_gateway, hub, tmp_path)


def fetched(hub: ModelScope, name: str, files: dict[str, bytes]) -> set[str]:
    return {path for path in files if hub.downloads(path, name=name)}


async def test_each_repository_is_fetched_and_the_engine_gets_the_paths(start: Start, hub: ModelScope) -> None:
    gateway = await start()
    answer = await gateway.post("/v1/models", WISH | {"controlnet": ["canny"]})
    assert answer.status == 200, answer.body
    assert fetched(hub, PAINTER, PIPELINE) == LEAN
    assert hub.downloads("painter-Q8_0.gguf", name=WEIGHTS) == 1
    assert hub.downloads("painter-Q4_0.gguf", name=WEIGHTS) == 0
    assert Path(start.told["gguf_file"]).read_bytes() == LARGE
    (net,) = start.told["controlnet"]
    assert (Path(net) / "diffusion_pytorch_model.safetensors").read_bytes() == b"net"
    card = (await gateway.get("/v1/models/p")).json
    assert (card["gguf_quantization"], card["controlnet"][0]["model_name"]) == ("Q8_0", "canny")

    # another launch without the wish fetches what is missing, and only that
    plain = await gateway.post("/v1/models", WISH | {"model_uid": "plain", "gguf_quantization": None})
    assert plain.status == 200, plain.body
    assert fetched(hub, PAINTER, PIPELINE) == LEAN | {"transformer/diffusion_pytorch_model.safetensors"}
    assert hub.downloads("model_index.json", name=PAINTER) == 1
    assert "gguf_file" not in start.told


async def test_the_progress_is_that_of_all_repositories(start: Start, hub: ModelScope) -> None:
    gate = hub.answer_of("painter-Q8_0.gguf", name=WEIGHTS).gate = threading.Event()
    gateway = await start()
    await gateway.post("/v1/models?wait_ready=false", WISH)
    lean_bytes = sum(len(PIPELINE[name]) for name in LEAN)
    total_bytes = lean_bytes + len(LARGE)

    async def files() -> list[dict[str, Any]]:
        return list((await gateway.get("/v1/models/p/progress")).json["download_files"])

    async with asyncio.timeout(30):
        while not ((found := await files()) and found[0]["name"] == "painter-Q8_0.gguf" and found[0]["downloaded"]):
            await asyncio.sleep(0.02)
        while found[0]["downloaded"] < total_bytes / 2:  # half of the file has been sent, and waits
            found = await files()
    assert found[0]["total"] == total_bytes
    assert lean_bytes + len(LARGE) / 2 <= found[0]["downloaded"] < total_bytes
    assert (await gateway.until("p"))["state"] == "downloading"
    gate.set()
    await gateway.until("p", state="ready")


async def test_a_kill_in_the_second_fetch_loses_nothing(start: Start, hub: ModelScope) -> None:
    answer = hub.answer_of("painter-Q8_0.gguf", name=WEIGHTS)
    answer.gate = threading.Event()
    gateway = await start()
    await gateway.post("/v1/models?wait_ready=false", WISH)
    await until(lambda: partial_bytes(gateway) >= len(LARGE) / 4)
    children = psutil.Process(gateway.process.pid).children(recursive=True)
    gateway.process.kill()
    assert await gateway.process.wait() == -signal.SIGKILL
    await until(lambda: not any(child.is_running() for child in children))  # else they fetch the rest
    answer.gate.set()
    answer.gate = None
    asked = hub.server.asked.copy()

    gateway = await start(home=gateway.home)
    await gateway.until("p", state="ready")
    assert Path(start.told["gguf_file"]).read_bytes() == LARGE
    url = hub.url_of("painter-Q8_0.gguf", name=WEIGHTS)
    assert int(re.findall(r"\d+", hub.server.headers[url]["Range"])[0]) >= len(LARGE) / 4
    assert not [what for what in hub.server.asked - asked if "org/painter/repo?" in what]  # all of it was here


def partial_bytes(gateway: Gateway) -> int:
    """Of the largest file that is being fetched; its folder may be done and renamed in any moment."""
    try:
        files = [*(gateway.home / "cache" / "modelscope").glob(".partial-*/**/*")]
        return max((path.stat().st_size for path in files if path.is_file()), default=0)
    except FileNotFoundError:
        return 0


async def test_a_second_repository_that_is_not_there_is_told_before_the_first_is_fetched(
    start: Start, hub: ModelScope
) -> None:
    hub.server.answers[f"/api/v1/models/{WEIGHTS}/repo/files?Revision=master&Recursive=True"].status = 404
    gateway = await start()
    answer = await gateway.post("/v1/models", WISH)
    assert answer.status == 503
    assert f"its files cannot be had: There is no repository {WEIGHTS}" in answer.error["message"]
    assert fetched(hub, PAINTER, PIPELINE) == set()


async def test_a_wish_that_cannot_be_met_is_refused_at_the_door(start: Start) -> None:
    gateway = await start()
    answer = await gateway.post("/v1/models", WISH | {"gguf_quantization": "Q2_K"})
    assert answer.status == 400
    assert "has no gguf_quantization 'Q2_K'. It has: Q4_0, Q8_0." in answer.error["message"]


def test_an_engine_that_loads_no_such_thing_refuses() -> None:
    class Other(Diffusers, frozen=True, kw_only=True):
        name = "other"
        additions = ()

    wish = LaunchRequest(model_name="FLUX.1-dev", model_type="image", gguf_quantization="q4_0")
    with pytest.raises(ValueError, match="other: it loads nothing beside a model's own files, such as gguf Q4_0"):
        plan("p", wish, Registry.builtin(), [Other()])


async def test_check_tells_each_repository(start: Start, hub: ModelScope) -> None:
    gateway = await start()
    report = (await gateway.post("/v1/models/check", WISH | {"controlnet": "canny"})).json
    assert set(report["files"]["files"]) == LEAN
    told = {one["what"]: (one["place"], one["files"]) for one in report["additions"]}
    assert told["gguf Q8_0"] == (f"modelscope:{WEIGHTS}", {"painter-Q8_0.gguf": len(LARGE)})
    assert told["controlnet canny"][0] == f"modelscope:{NET}"
    assert report["memory"]["weights_bytes"] == 3000 + len(LARGE) + len(b"{}net")

    def run() -> Any:
        words = ("painter", "-t", "image", "--gguf_quantization", "Q8_0", "--endpoint", gateway.address)
        return CliRunner().invoke(hostler, ["check", *words])

    assert f"Files of gguf Q8_0: to be fetched from modelscope:{WEIGHTS}" in (await asyncio.to_thread(run)).output


def a_pipeline(folder: Path) -> tuple[Path, Path, int]:
    """A folder with more than a GGUF file's transformer needs, that file, and the bytes of what is loaded of both."""
    base, gguf = folder / "base", folder / "mine.gguf"
    for part, rows in (("transformer", 5000), ("vae", 300)):
        (base / part).mkdir(parents=True)
        (base / part / "config.json").write_text("{}")
        (base / part / "diffusion_pytorch_model.safetensors").write_bytes(safetensors({"w": ("F32", [rows], 4)}))
    (base / "model_index.json").write_text("{}")
    gguf.write_bytes(LARGE)
    return base, gguf, 300 * 4 + len(LARGE)


async def test_check_counts_of_a_folder_only_what_a_gguf_file_does_not_replace(start: Start, tmp_path: Path) -> None:
    base, gguf, loaded_bytes = a_pipeline(tmp_path)
    gateway = await start()
    wish = {"model_uid": "p", "model_name": "painter", "model_type": "image", "model_path": str(base)}
    report = (await gateway.post("/v1/models/check", wish | {"gguf_model_path": str(gguf)})).json
    assert set(report["files"]["files"]) == LEAN | {"vae/config.json"}
    header_bytes = (base / "vae/diffusion_pytorch_model.safetensors").stat().st_size - 300 * 4
    assert abs(report["memory"]["weights_bytes"] - loaded_bytes) <= header_bytes
    whole = (await gateway.post("/v1/models/check", wish)).json
    assert "transformer/diffusion_pytorch_model.safetensors" in whole["files"]["files"]
    assert abs(whole["memory"]["weights_bytes"] - 5300 * 4) <= 2 * header_bytes


async def test_check_counts_what_is_in_the_cache_by_its_folders(start: Start) -> None:
    gateway = await start()
    for wish in (WISH, WISH | {"model_uid": "whole", "gguf_quantization": None}):
        assert (await gateway.post("/v1/models", wish)).status == 200
    report = (await gateway.post("/v1/models/check", WISH | {"model_uid": "new"})).json
    assert set(report["files"]["files"]) == LEAN
    assert report["memory"]["weights_bytes"] == 3000 + len(LARGE)


def test_plan_counts_what_check_counts(tmp_path: Path) -> None:
    base, gguf, loaded_bytes = a_pipeline(tmp_path)
    models = {
        uid: {"model_path": str(base), "model_type": "image", "model_engine": "diffusers"} | more
        for uid, more in (("lean", {"gguf_model_path": str(gguf)}), ("whole", {}))
    }
    (file := tmp_path / "models.yaml").write_text(json.dumps({"models": models, "home": str(tmp_path / "home")}))
    done = CliRunner().invoke(hostler, ["plan", str(file), "--gpus", "1x80GiB", "--json"])
    taken = {row["model"]: row["memory_bytes"] for row in json.loads(done.output)["models"]}
    assert taken["lean"] - taken["whole"] == pytest.approx(loaded_bytes - 5300 * 4, abs=1000)


async def test_the_cache_knows_them_as_the_models(start: Start, hub: ModelScope) -> None:
    gateway = await start()
    assert (await gateway.post("/v1/models", WISH)).status == 200
    listed = (await gateway.get("/v1/cache/models")).json["list"]
    assert {one["model_name"] for one in listed} == {"painter"}
    assert len(listed) == 2
    refused = await gateway.request("DELETE", "/v1/cache/models?model_version=painter")
    assert (refused.status, "in use by p" in refused.json["detail"]) == (400, True)
    await gateway.request("DELETE", "/v1/models/p")  # what was fetched is still known as the family's
    listed = (await gateway.get("/v1/cache/models")).json["list"]
    assert {one["model_name"] for one in listed} == {"painter"}
    removed = await gateway.request("DELETE", "/v1/cache/models?model_version=painter")
    assert removed.json == {"result": True}
    assert (await gateway.get("/v1/cache/models")).json["list"] == []
    assert not list((gateway.home / "cache" / "modelscope").rglob("*.gguf"))


async def test_a_launch_is_written_back_as_it_was_wished_for(start: Start, tmp_path: Path) -> None:
    gateway = await start()
    (file := tmp_path / "mine.gguf").write_bytes(b"GGUF")
    wish = {"model_uid": "p", "model_name": "painter", "model_type": "image", "gguf_model_path": str(file)}
    assert (await gateway.post("/v1/models", wish | {"controlnet": "canny"})).status == 200
    assert start.told["gguf_file"] == str(file)
    answer = await gateway.post("/v1/models/p/reload", {"model_config": {"controlnet": None}})
    assert answer.status == 400
    assert "'controlnet' cannot be changed by a reload" in answer.error["message"]


def test_validate_tells_what_launches_can_wish_for(tmp_path: Path) -> None:
    (file := tmp_path / "painter.json").write_text(json.dumps(FAMILY | {"lightning_versions": ["4steps"]}))
    output = CliRunner().invoke(hostler, ["validate", str(file)]).output
    assert f"gguf_quantization (one of Q4_0, Q8_0) is fetched from modelscope:{WEIGHTS}." in output
    assert f"controlnet canny is modelscope:{NET}." in output
    assert "lightning_versions without lightning_model_id: lightning_version cannot be wished for." in output
