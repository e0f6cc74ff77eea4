"""Films by diffusers, through the gateway: a tiny Wan whose films are noise, and all else real."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from harness import Gateway
from xinference_client import RESTfulClient

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

SHORT = {"num_frames": 5, "num_inference_steps": 2}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    tiny_wan: Path, torch_python: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    settings = {
        "engines": {"diffusers": {"python": torch_python}},
        "models": {"wan": {"model_type": "video", "model_path": str(tiny_wan), "options": {"n_threads": 1}}},
    }
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), settings, {"OMP_NUM_THREADS": "1"})
    yield gateway
    assert await gateway.end() == 0


@pytest_asyncio.fixture(loop_scope="module")
async def wan(gateway: Gateway) -> Any:
    return await asyncio.to_thread(lambda: RESTfulClient(gateway.address).get_model("wan"))


def picture() -> bytes:
    """A grey PNG of 32x32."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + bytes(range(0, 256, 8))) * 32)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def is_mp4(content: bytes) -> bool:
    return content[4:8] == b"ftyp"


async def fetched(gateway: Gateway, url: str) -> bytes:
    async with gateway.session.get(url) as response:
        assert response.status == 200, await response.text()
        assert response.headers["content-type"] == "video/mp4"
        return await response.read()


async def test_a_film_of_text_comes_as_a_url(gateway: Gateway, wan: Any) -> None:
    made = await asyncio.to_thread(wan.text_to_video, "a cat", n=1, size="32*32", seed=1, **SHORT)
    assert made["data"][0]["b64_json"] is None
    assert is_mp4(await fetched(gateway, made["data"][0]["url"]))


async def test_the_same_seed_gives_the_same_bytes(gateway: Gateway) -> None:
    async def film(seed: int) -> bytes:
        kwargs = json.dumps({"seed": seed, "size": "32x32", "fps": 8} | SHORT)
        body = {"model": "wan", "prompt": "a cat", "response_format": "b64_json", "kwargs": kwargs}
        answer = await gateway.post("/v1/video/generations", body)
        assert answer.status == 200, answer.body
        return base64.b64decode(answer.json["data"][0]["b64_json"])

    first = await film(1)
    assert is_mp4(first)
    assert await film(1) == first
    assert await film(2) != first


async def test_a_film_of_a_picture_by_the_same_weights(gateway: Gateway, wan: Any) -> None:
    made = await asyncio.to_thread(wan.image_to_video, picture(), "a cat", n=1, **SHORT)
    assert is_mp4(await fetched(gateway, made["data"][0]["url"]))


async def test_a_film_of_two_pictures(gateway: Gateway, wan: Any) -> None:
    made = await asyncio.to_thread(wan.flf_to_video, picture(), picture(), "a cat", n=1, **SHORT)
    assert is_mp4(await fetched(gateway, made["data"][0]["url"]))


async def test_progress_and_abort(gateway: Gateway) -> None:
    client = await asyncio.to_thread(RESTfulClient, gateway.address)
    kwargs = json.dumps({"request_id": "film", "num_inference_steps": 900, "num_frames": 33, "size": "128x128"})
    task = asyncio.ensure_future(
        gateway.post("/v1/video/generations", {"model": "wan", "prompt": "a cat", "kwargs": kwargs})
    )
    async with asyncio.timeout(60):
        while True:
            answer = await gateway.get("/v1/requests/film/progress")
            if answer.status == 200 and answer.json["progress"]:
                break
            await asyncio.sleep(0.02)
    assert 0 < (await asyncio.to_thread(client.get_progress, "film"))["progress"] < 1
    assert await asyncio.to_thread(client.abort_request, "wan", "film") == {"msg": "DONE"}
    assert (await asyncio.wait_for(task, 30)).status == 409


async def test_what_cannot_be_done_is_a_sentence(gateway: Gateway) -> None:
    body = {"model": "wan", "prompt": "a cat", "kwargs": json.dumps({"frames": 3})}
    answer = await gateway.post("/v1/video/generations", body)
    assert answer.status == 400
    assert "WanPipeline does not know `frames`. It takes:" in answer.error["message"]
    assert "num_frames" in answer.error["message"]
    form = aiohttp.FormData(default_to_multipart=True)
    form.add_field("model", "wan")
    form.add_field("prompt", "a cat")
    answer = await gateway.post("/v1/video/generations/image", data=form)
    assert answer.status == 400
    assert answer.error["message"] == "The form has no `image`."
    answer = await gateway.post("/v1/images/generations", {"model": "wan", "prompt": "x"})
    assert "is of type video" in answer.error["message"]
