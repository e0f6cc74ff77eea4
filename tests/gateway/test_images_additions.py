"""Pictures by models whose files are in several repositories, fetched from a hub on this machine."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from harness import Gateway
from hub_servers import HuggingFace, Server

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

QWEN = {
    "version": 2,
    "model_name": "tiny-qwen",
    "model_family": "stable_diffusion",
    "model_id": "tiny/qwen",
    "gguf_model_id": "tiny/qwen-gguf",
    "gguf_quantizations": ["Q4_0", "Q8_0"],
    "gguf_model_file_name_template": "tiny-{quantization}.gguf",
    "lightning_model_id": "tiny/qwen-fast",
    "lightning_versions": ["4steps"],
    "lightning_model_file_name_template": "fast-{lightning_version}.safetensors",
}
SD = {
    "version": 2,
    "model_name": "tiny-sd",
    "model_family": "stable_diffusion",
    "model_id": "tiny/sd",
    "controlnet": [{"model_name": "canny", "model_id": "tiny/canny"}],
}
PROMPT = {"prompt": "a cat", "size": "64x64", "seed": 1, "num_inference_steps": 2, "response_format": "b64_json"}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hub(
    tiny_qwen_image: Path, tiny_qwen_gguf: Path, tiny_qwen_lightning: Path, tiny_sd: Path, tiny_controlnet: Path
) -> Iterator[HuggingFace]:
    server = Server()
    hub = HuggingFace(server)
    hub.add(files_in(tiny_qwen_image), name="tiny/qwen")
    hub.add({tiny_qwen_gguf.name: tiny_qwen_gguf.read_bytes()}, name="tiny/qwen-gguf")
    hub.add({tiny_qwen_lightning.name: tiny_qwen_lightning.read_bytes()}, name="tiny/qwen-fast")
    hub.add(files_in(tiny_sd), name="tiny/sd")
    hub.add(files_in(tiny_controlnet), name="tiny/canny")
    yield hub
    server.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    hub: HuggingFace, torch_python: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    home = tmp_path_factory.mktemp("home")
    settings = {"engines": {"diffusers": {"python": torch_python}}, "restart_limit": 1}
    env = {"OMP_NUM_THREADS": "1", "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    gateway = await Gateway.start(home, settings, env | hub.env)
    for family in (QWEN, SD):
        answer = await gateway.post("/v1/model_registrations/image", {"model": family, "persist": True})
        assert answer.status == 200, answer.body
    yield gateway
    assert await gateway.end() == 0


async def launch(gateway: Gateway, model_name: str, **wishes: Any) -> None:
    body = {"model_uid": "m", "model_name": model_name, "model_type": "image", "n_threads": 1} | wishes
    answer = await gateway.post("/v1/models", body, timeout=aiohttp.ClientTimeout(total=170))
    assert answer.status == 200, answer.body


async def picture(gateway: Gateway, **wishes: Any) -> bytes:
    """By the tiny Qwen-Image, launched so."""
    await launch(gateway, "tiny-qwen", **wishes)
    answer = await gateway.post("/v1/images/generations", PROMPT | {"model": "m"})
    assert answer.status == 200, answer.body
    await gateway.request("DELETE", "/v1/models/m")
    return base64.b64decode(answer.json["data"][0]["b64_json"])


async def test_gguf_and_lightning_weights_of_a_hub_make_other_pictures(gateway: Gateway, hub: HuggingFace) -> None:
    by_gguf = await picture(gateway, gguf_quantization="q8_0")
    assert hub.downloads("tiny-Q8_0.gguf", name="tiny/qwen-gguf") == 1
    assert hub.downloads(WEIGHTS, name="tiny/qwen") == 0  # which the file stands for
    plain = await picture(gateway)
    assert hub.downloads(WEIGHTS, name="tiny/qwen") == 1
    fast = await picture(gateway, lightning_version="4steps")
    both = await picture(gateway, gguf_quantization="Q8_0", lightning_version="4steps")
    assert len({by_gguf, plain, fast, both}) == 4


async def test_a_gguf_file_that_is_none_is_told(gateway: Gateway, tmp_path: Path) -> None:
    (file := tmp_path / "bad.gguf").write_bytes(b"GGUF is the magic word, and this is all")
    body = {"model_uid": "bad", "model_name": "tiny-qwen", "model_type": "image", "gguf_model_path": str(file)}
    answer = await gateway.post("/v1/models", body, timeout=aiohttp.ClientTimeout(total=170))
    assert answer.status == 503
    assert "bad.gguf" in answer.error["message"]
    await gateway.request("DELETE", "/v1/models/bad")


PNG = base64.b64decode(  # 1x1, white
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg=="
)


async def test_a_controlnet_of_a_hub_steers(gateway: Gateway) -> None:
    await launch(gateway, "tiny-sd", controlnet="canny")
    made = set()
    for scale in (0.0, 1.0):
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("image", PNG, filename="a.png")
        form.add_field("kwargs", json.dumps({"controlnet_conditioning_scale": scale} | dict(list(PROMPT.items())[2:4])))
        for name, value in {"model": "m", "prompt": "x", "size": "64x64", "response_format": "b64_json"}.items():
            form.add_field(name, value)
        async with gateway.session.post(f"{gateway.address}/v1/images/variations", data=form) as response:
            assert response.status == 200, await response.text()
            made.add((await response.json())["data"][0]["b64_json"])
    assert len(made) == 2
    await gateway.request("DELETE", "/v1/models/m")
