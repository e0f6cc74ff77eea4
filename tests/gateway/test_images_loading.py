"""How models of diffusers are loaded: with controlnets and LoRAs; and what users read when they cannot be."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from harness import Gateway
from xinference_client import RESTfulClient

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

PROMPT = {"prompt": "a cat", "size": "64x64", "seed": 1, "num_inference_steps": 3, "response_format": "b64_json"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(torch_python: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    settings = {"engines": {"diffusers": {"python": torch_python}}, "restart_limit": 1}
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), settings, {"OMP_NUM_THREADS": "1"})
    yield gateway
    assert await gateway.end() == 0


async def launch(gateway: Gateway, uid: str, path: Path, **options: Any) -> Any:
    body = {"model_uid": uid, "model_type": "image", "model_path": str(path), "n_threads": 1} | options
    timeout = aiohttp.ClientTimeout(total=170)
    return await gateway.post("/v1/models", body, timeout=timeout)


async def picture(gateway: Gateway, uid: str) -> bytes:
    answer = await gateway.post("/v1/images/generations", PROMPT | {"model": uid})
    assert answer.status == 200, answer.body
    return base64.b64decode(answer.json["data"][0]["b64_json"])


async def test_a_lora_changes_pictures_as_much_as_its_scale_says(
    gateway: Gateway, tiny_sd: Path, tiny_lora: Path
) -> None:
    lora = {"lora_list": [{"lora_name": "style", "local_path": str(tiny_lora)}]}
    wishes: dict[str, dict[str, Any]] = {
        "plain": {},
        "styled": {"peft_model_config": lora},
        "hardly": {"peft_model_config": lora | {"image_lora_fuse_kwargs": {"lora_scale": 0.0}}},
    }
    made = {}
    for uid, options in wishes.items():
        answer = await launch(gateway, uid, tiny_sd, **options)
        assert answer.status == 200, answer.body
        made[uid] = await picture(gateway, uid)
        await gateway.request("DELETE", f"/v1/models/{uid}")
    assert made["styled"] != made["plain"]
    assert made["hardly"] == made["plain"]


async def test_a_controlnet_lets_a_picture_steer(gateway: Gateway, tiny_sd: Path, tiny_controlnet: Path) -> None:
    answer = await launch(gateway, "steered", tiny_sd, controlnet=str(tiny_controlnet))
    assert answer.status == 200, answer.body
    answer = await gateway.post("/v1/images/generations", PROMPT | {"model": "steered"})
    assert answer.status == 400
    assert "controlnet needs an `image`" in answer.error["message"]
    source = await steered_by(gateway, PNG, 0.0)
    assert source != await steered_by(gateway, PNG, 1.0)
    await gateway.request("DELETE", "/v1/models/steered")


PNG = base64.b64decode(  # 1x1, white
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg=="
)


async def steered_by(gateway: Gateway, picture: bytes, scale: float) -> bytes:
    form = aiohttp.FormData(default_to_multipart=True)
    form.add_field("image", picture, filename="a.png")
    for name, value in {"model": "steered", "prompt": "x", "size": "64x64", "response_format": "b64_json"}.items():
        form.add_field(name, value)
    kwargs = {"controlnet_conditioning_scale": scale, "num_inference_steps": 3, "seed": 1}
    form.add_field("kwargs", json.dumps(kwargs))
    answer = await gateway.post("/v1/images/variations", data=form)
    assert answer.status == 200, answer.body
    return base64.b64decode(answer.json["data"][0]["b64_json"])


async def test_a_model_that_reads_pictures(gateway: Gateway, tiny_ocr: Path) -> None:
    assert (await launch(gateway, "reader", tiny_ocr)).status == 200
    reader = await asyncio.to_thread(lambda: RESTfulClient(gateway.address).get_model("reader"))
    text = await asyncio.to_thread(reader.ocr, PNG, max_new_tokens=8)
    assert isinstance(text, str)
    assert text
    assert await asyncio.to_thread(reader.ocr, PNG, max_new_tokens=8) == text
    answer = await gateway.post("/v1/images/generations", PROMPT | {"model": "reader"})
    assert "The model 'reader' reads pictures and makes none." in answer.error["message"]
    await gateway.request("DELETE", "/v1/models/reader")


async def test_damaged_weights_are_named(gateway: Gateway, tiny_sd: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    answer = await launch(gateway, "broken", broken)
    assert answer.status == 503
    assert f"{broken} cannot be loaded" in answer.error["message"]
    assert "Are its files whole?" in answer.error["message"]


async def test_a_folder_of_something_else_is_told(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("no model")
    answer = await launch(gateway, "other", tmp_path)
    assert answer.status == 503
    assert "has no model_index.json: this is no pipeline of diffusers" in answer.error["message"]


async def test_a_lora_that_is_not_there_is_told(gateway: Gateway, tiny_sd: Path) -> None:
    lora = {"lora_list": [{"lora_name": "style", "local_path": "/nowhere/style.safetensors"}]}
    answer = await launch(gateway, "without", tiny_sd, peft_model_config=lora)
    assert answer.status == 503
    assert "The LoRA 'style' is not there: /nowhere/style.safetensors." in answer.error["message"]


async def test_a_python_without_the_library_is_told(tiny_sd: Path, tmp_path: Path) -> None:
    settings = {"engines": {"diffusers": {"python": sys.executable}}, "restart_limit": 1}
    gateway = await Gateway.start(tmp_path, settings)
    try:
        answer = await launch(gateway, "sd", tiny_sd)
        assert answer.status == 503
        assert "lacks what the worker 'image' needs: No module named 'PIL'" in answer.error["message"]
    finally:
        await gateway.end()
