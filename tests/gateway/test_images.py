"""Pictures by diffusers, through the gateway: a tiny Stable Diffusion whose pictures are noise, and all else real."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from harness import Gateway, is_running, until
from openai import AsyncOpenAI
from xinference_client import RESTfulClient

from gateway.api.exchange import EVENT_LIMIT_BYTES
from gateway.files import KEPT_S

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

STEPS = {"num_inference_steps": 3}
LONG = 900  # steps: more than any test waits for
PNG = b"\x89PNG\r\n\x1a\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tiny_sd: Path, torch_python: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    model = {"model_type": "image", "model_path": str(tiny_sd), "options": {"n_threads": 1}}
    settings = {
        "engines": {"diffusers": {"python": torch_python}},
        "models": {
            "sd": model,
            "spare": model | {"options": {"n_threads": 1, "default_generate_config": STEPS, "max_pixels": 4096}},
        },
    }
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), settings, {"OMP_NUM_THREADS": "1"})
    yield gateway
    assert await gateway.end() == 0


@pytest.fixture
def client(gateway: Gateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0, timeout=120)


class Xinference:
    """Its client's methods, in threads, so that the test goes on meanwhile."""

    def __init__(self, address: str, uid: str = "sd") -> None:
        self._client = RESTfulClient(address)
        self._model = self._client.get_model(uid)

    async def __call__(self, method: str, *arguments: Any, **options: Any) -> Any:
        owner = self._model if hasattr(self._model, method) else self._client
        return await asyncio.to_thread(getattr(owner, method), *arguments, **options)


@pytest_asyncio.fixture(loop_scope="module")
async def xinference(gateway: Gateway) -> Xinference:
    return await asyncio.to_thread(Xinference, gateway.address)


def png(width: int, height: int, grey: Callable[[int, int], int]) -> bytes:
    """A grey picture as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(grey(x, y) for x in range(width)) for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return PNG + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG file."""
    assert content.startswith(PNG)
    width, height = struct.unpack(">II", content[16:24])
    return width, height


PICTURE = png(64, 48, lambda x, y: x * 4)
MASK = png(64, 48, lambda x, y: 255 if x < 32 else 0)


async def fetched(gateway: Gateway, url: str) -> bytes:
    async with gateway.session.get(url) as response:
        assert response.status == 200, await response.text()
        assert response.headers["content-type"] == "image/png"
        return await response.read()


async def generated(gateway: Gateway, **fields: Any) -> list[bytes]:
    body = {"model": "sd", "prompt": "a cat", "size": "64x64", "response_format": "b64_json"} | STEPS | fields
    answer = await gateway.post("/v1/images/generations", body)
    assert answer.status == 200, answer.body
    return [base64.b64decode(item["b64_json"]) for item in answer.json["data"]]


async def progress_of(gateway: Gateway, request_id: str) -> float | None:
    answer = await gateway.get(f"/v1/requests/{request_id}/progress")
    return float(answer.json["progress"]) if answer.status == 200 else None


async def until_it_is_under_way(gateway: Gateway, request_id: str) -> float:
    async with asyncio.timeout(60):
        while not (progress := await progress_of(gateway, request_id)):
            await asyncio.sleep(0.02)
    return progress


def long_request(gateway: Gateway, request_id: str, **fields: Any) -> asyncio.Task[Any]:
    body = {"model": "sd", "prompt": "a cat", "size": "256x256", "num_inference_steps": LONG} | fields
    kwargs = json.dumps({"request_id": request_id})
    return asyncio.ensure_future(gateway.post("/v1/images/generations", body | {"kwargs": kwargs}))


@contextlib.asynccontextmanager
async def under_way(gateway: Gateway, request_id: str) -> AsyncIterator[asyncio.Task[Any]]:
    """A request that takes long, and whose client leaves at the block's end."""
    task = long_request(gateway, request_id)
    try:
        await until_it_is_under_way(gateway, request_id)
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- OpenAI's SDK


async def test_a_picture_comes_as_a_url_that_can_be_fetched(client: AsyncOpenAI, gateway: Gateway) -> None:
    made = await client.images.generate(model="sd", prompt="a cat", size="64x64", extra_body=STEPS)  # type: ignore[call-overload]
    assert made.created > 0
    url = made.data[0].url
    assert url.startswith(gateway.address + "/v1/files/")
    assert made.data[0].b64_json is None
    assert size_of(await fetched(gateway, url)) == (64, 64)


async def test_a_file_is_gone_once_its_time_is_over(client: AsyncOpenAI, gateway: Gateway) -> None:
    made = await client.images.generate(model="sd", prompt="a cat", size="64x64", extra_body=STEPS)  # type: ignore[call-overload]
    url = made.data[0].url
    file = gateway.home / "files" / url.rpartition("/")[2]
    long_ago = time.time() - KEPT_S - 1
    os.utime(file, (long_ago, long_ago))
    async with gateway.session.get(url) as response:
        assert response.status == 404
        assert "kept for an hour" in (await response.json())["detail"]


async def test_a_picture_comes_as_base64_and_in_other_formats(client: AsyncOpenAI) -> None:
    make = client.images.generate
    made = await make(model="sd", prompt="a cat", size="64x64", response_format="b64_json", extra_body=STEPS)  # type: ignore[call-overload]
    assert made.data[0].url is None
    assert size_of(base64.b64decode(made.data[0].b64_json)) == (64, 64)
    made = await make(  # type: ignore[call-overload]
        model="sd",
        prompt="x",
        size="64x64",
        response_format="b64_json",
        output_format="jpeg",
        quality="high",
        extra_body=STEPS,
    )
    assert base64.b64decode(made.data[0].b64_json).startswith(b"\xff\xd8\xff")


async def test_an_edit_keeps_the_size_of_its_picture(client: AsyncOpenAI, gateway: Gateway) -> None:
    odd = png(61, 45, lambda x, y: 128)  # no model makes such sizes
    made = await client.images.edit(model="sd", image=odd, prompt="snow", extra_body={"num_inference_steps": 4})
    assert made.data
    assert size_of(await fetched(gateway, str(made.data[0].url))) == (61, 45)


async def test_an_edit_with_a_mask_of_another_size_than_asked_for(client: AsyncOpenAI, gateway: Gateway) -> None:
    made = await client.images.edit(
        model="sd",
        image=PICTURE,
        mask=MASK,
        prompt="snow",
        size="32x64",
        extra_body={"num_inference_steps": 4},  # type: ignore[call-overload]
    )
    assert size_of(await fetched(gateway, made.data[0].url)) == (32, 64)


async def test_an_edit_is_streamed_as_events_with_urls(gateway: Gateway) -> None:
    form = aiohttp.FormData()
    form.add_field("image[]", PICTURE, filename="a.png")
    fields = {"model": "sd", "prompt": "snow", "stream": "true", "num_inference_steps": "2"}
    for name, value in (fields | {"size": "1024x512"}).items():  # its event is larger than what is held of others
        form.add_field(name, value)
    async with gateway.session.post(gateway.address + "/v1/images/edits", data=form) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [part for part in (await response.text()).strip().split("\n\n") if not part.startswith(":")]
    names = [event.splitlines()[0] for event in events]
    assert names[0] == "event: start"
    assert names[-1] == "event: complete"
    assert set(names[1:-1]) == {"event: processing"}
    complete = json.loads(events[-1].partition("data: ")[2])
    assert complete["data"][0]["b64_json"] is None
    content = await fetched(gateway, complete["data"][0]["url"])
    assert size_of(content) == (1024, 512)
    assert len(content) > EVENT_LIMIT_BYTES


# --- seeds


async def test_the_same_seed_gives_the_same_bytes_and_another_others(gateway: Gateway) -> None:
    first = await generated(gateway, seed=7)
    assert await generated(gateway, seed=7) == first
    assert await generated(gateway, seed=8) != first
    with_other_sampler = await generated(gateway, seed=7, sampler_name="Euler a")
    assert with_other_sampler != first
    assert await generated(gateway, seed=7) == first  # the other sampler is gone
    assert await generated(gateway, seed=7, sampler_name="euler A") == with_other_sampler


async def test_several_pictures_have_the_next_seeds(gateway: Gateway) -> None:
    together = await generated(gateway, seed=7, n=3)
    assert len(set(together)) == 3
    assert together[2:] == await generated(gateway, seed=9)


async def test_a_seed_that_chance_chose_is_told_and_can_be_used_again(gateway: Gateway) -> None:
    body = {"model": "sd", "prompt": ["a cat", "a dog"], "size": "64*64", "response_format": "b64_json"} | STEPS
    data = (await gateway.post("/v1/images/generations", body)).json["data"]
    assert data[1]["seed"] == data[0]["seed"] + 1
    again = await generated(gateway, prompt="a dog", seed=data[1]["seed"])
    assert base64.b64decode(data[1]["b64_json"]) == again[0]


# --- Xinference's client


async def test_xinferences_client_makes_and_changes_pictures(xinference: Xinference, gateway: Gateway) -> None:
    made = await xinference("text_to_image", "a cat", n=2, size="64*32", seed=1, **STEPS)
    assert [item["seed"] for item in made["data"]] == [1, 2]
    assert size_of(await fetched(gateway, made["data"][0]["url"])) == (64, 32)
    varied = await xinference(
        "image_to_image", PICTURE, "snow", negative_prompt="rain", response_format="b64_json", num_inference_steps=4
    )
    assert size_of(base64.b64decode(varied["data"][0]["b64_json"])) == (64, 48)
    painted = await xinference("inpainting", PICTURE, MASK, "snow", n=1, size="64*48", num_inference_steps=4)
    assert size_of(await fetched(gateway, painted["data"][0]["url"])) == (64, 48)
    edited = await xinference("image_edit", PICTURE, "snow", num_inference_steps=4)
    assert size_of(await fetched(gateway, edited["data"][0]["url"])) == (64, 48)


async def test_inpainting_leaves_alone_what_the_mask_does_not_show(gateway: Gateway) -> None:
    """The random weights cannot keep a picture, so both halves are noise; but a mask makes a difference."""

    async def painted(mask: bytes) -> bytes:
        form = aiohttp.FormData()
        form.add_field("image", PICTURE, filename="a.png")
        form.add_field("mask_image", mask, filename="m.png")
        for name, value in {"model": "sd", "prompt": "x", "seed": "3", "response_format": "b64_json"}.items():
            form.add_field(name, value)
        form.add_field("kwargs", json.dumps(STEPS))
        answer = await gateway.post("/v1/images/inpainting", data=form)
        assert answer.status == 200, answer.body
        return base64.b64decode(answer.json["data"][0]["b64_json"])

    all_white = png(64, 48, lambda x, y: 255)
    assert await painted(MASK) == await painted(MASK)
    assert await painted(MASK) != await painted(all_white)


async def test_progress_grows_and_an_aborted_request_gets_409(xinference: Xinference, gateway: Gateway) -> None:
    task = long_request(gateway, "aborted")
    early = await until_it_is_under_way(gateway, "aborted")
    await until_progress_exceeds(gateway, "aborted", early)
    said = await xinference("get_progress", "aborted")
    assert early < said["progress"] < 1

    assert await xinference("abort_request", "sd", "aborted") == {"msg": "DONE"}
    answer = await asyncio.wait_for(task, 20)
    assert answer.status == 409
    assert answer.json["detail"] == "The request was cancelled."
    assert await xinference("abort_request", "sd", "aborted", block_duration=0) == {"msg": "NOT_FOUND"}


async def until_progress_exceeds(gateway: Gateway, request_id: str, least: float) -> None:
    async with asyncio.timeout(30):
        while (await progress_of(gateway, request_id) or 0) <= least:
            await asyncio.sleep(0.02)


async def test_an_ended_request_is_at_1_and_an_unknown_one_is_told(xinference: Xinference, gateway: Gateway) -> None:
    await generated(gateway, kwargs=json.dumps({"request_id": "ended"}))
    assert await xinference("get_progress", "ended") == {"progress": 1.0}
    with pytest.raises(RuntimeError, match="No request of the id never is known"):
        await xinference("get_progress", "never")
    assert (await gateway.get("/v1/requests/never/progress")).status == 400
    assert (await gateway.post("/v1/models/nobody/requests/never/abort")).status == 400


async def test_a_request_that_is_aborted_before_it_comes_is_not_begun(gateway: Gateway, xinference: Xinference) -> None:
    assert await xinference("abort_request", "sd", "early", block_duration=30) == {"msg": "NOT_FOUND"}
    assert (await long_request(gateway, "early")).status == 409


async def test_an_id_can_be_used_by_one_request_at_a_time(gateway: Gateway) -> None:
    async with under_way(gateway, "twice"):
        answer = await long_request(gateway, "twice")
        assert answer.status == 400
        assert "under way" in answer.error["message"]


# --- queue, clients that leave, failures


async def test_when_the_client_leaves_the_work_stops_at_its_next_step(gateway: Gateway) -> None:
    async with under_way(gateway, "left"):
        pass
    await generated(gateway)  # its turn comes only when the other has stopped
    stopped_at = await progress_of(gateway, "left")
    assert stopped_at
    assert stopped_at < 1
    await asyncio.sleep(0.3)
    assert await progress_of(gateway, "left") == stopped_at


async def test_requests_are_done_in_the_order_in_which_they_come(gateway: Gateway) -> None:
    ended: list[int] = []

    async def one(number: int) -> None:
        await generated(gateway, kwargs=json.dumps({"request_id": f"queued-{number}"}))
        ended.append(number)

    async with asyncio.TaskGroup() as tasks, under_way(gateway, "first"):
        for number in range(4):
            tasks.create_task(one(number))
            async with asyncio.timeout(20):
                while await progress_of(gateway, f"queued-{number}") is None:
                    await asyncio.sleep(0.02)
        assert await progress_of(gateway, "queued-0") == 0  # it waits
    assert ended == [0, 1, 2, 3]


async def test_a_request_that_waits_for_its_turn_is_aborted_at_once(gateway: Gateway, xinference: Xinference) -> None:
    async with under_way(gateway, "long"):
        waiting = long_request(gateway, "waiting")
        async with asyncio.timeout(20):
            while await progress_of(gateway, "waiting") is None:
                await asyncio.sleep(0.02)
        assert await xinference("abort_request", "sd", "waiting") == {"msg": "DONE"}
        assert (await asyncio.wait_for(waiting, 20)).status == 409
        before = await progress_of(gateway, "long")
        assert before is not None
        await until_progress_exceeds(gateway, "long", before)  # the other goes on


async def test_when_the_engine_is_killed_its_client_is_told_and_the_next_is_served(gateway: Gateway) -> None:
    task = long_request(gateway, "killed", model="spare", size="64x64")
    await until_it_is_under_way(gateway, "killed")
    replica = await gateway.until("spare", state="ready")
    os.kill(replica["pid"], signal.SIGKILL)
    await until(lambda: not is_running(replica["pid"]))
    # Nothing of its answer had been sent, so it is sent again, to the next life of the engine.
    await until_it_is_under_way(gateway, "killed")
    task.cancel()
    assert (await generated(gateway, model="spare"))[0].startswith(PNG)
    assert (await gateway.until("spare", state="ready"))["starts"] == 2


# --- refusals


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"shininess": 3}, "StableDiffusionPipeline does not know `shininess`. It takes: clip_skip,"),
        ({"kwargs": '{"shininess": 3}'}, "guidance_scale, num_inference_steps"),
        ({"kwargs": "{"}, "`kwargs` is not valid JSON"),
        ({"size": "wide"}, "`size` is width and height in pixels, such as 512x512, not 'wide'."),
        ({"size": "2049x2048"}, "more than the 4194304 pixels"),
        ({"size": "8x4"}, "too small"),
        ({"n": 11}, "`n` is 11; it may be from 1 to 10."),
        ({"prompt": " "}, "`prompt` is empty."),
        ({"prompt": 3}, "`prompt` is a text, or a list of texts."),
        ({"num_inference_steps": "many"}, "`num_inference_steps` is a whole number, not 'many'."),
        ({"seed": -7}, "`seed` is -7"),
        ({"sampler_name": "Magic"}, "This model has no sampler 'Magic'. It has: Euler, Euler a,"),
        ({"response_format": "svg"}, "`response_format` is url or b64_json."),
        ({"output_format": "svg"}, "`output_format` is one of png,"),
        ({"guidance_rescale": "x"}, ""),
    ],
)
async def test_what_cannot_be_done_is_a_sentence(gateway: Gateway, fields: dict[str, Any], sentence: str) -> None:
    body = {"model": "sd", "prompt": "a cat", "size": "64x64"} | STEPS | fields
    answer = await gateway.post("/v1/images/generations", body)
    assert answer.status == 400, answer.body
    assert sentence in answer.error["message"]
    assert answer.error["source"] == "engine"


@pytest.mark.parametrize(
    ("path", "files", "fields", "sentence"),
    [
        ("edits", {}, {"prompt": "x"}, "The form has no `image`."),
        ("edits", {"image": PICTURE}, {}, "`prompt` is a text"),
        ("edits", {"image": b"no picture"}, {"prompt": "x"}, "`image` is not a picture that can be read"),
        ("variations", {"image": b""}, {}, "`image` is empty."),
        ("inpainting", {"image": PICTURE}, {"prompt": "x"}, "The form has no `mask_image`."),
        ("edits", {"image[]": PICTURE, "image": PICTURE}, {"prompt": "x"}, "looks at one picture, not 2."),
        (
            "variations",
            {"image": PICTURE},
            {"kwargs": '{"strength": 0.1, "num_inference_steps": 5}'},
            "`strength` 0.1 of 5 steps is not one step.",
        ),
        ("ocr", {"image": PICTURE}, {}, "The model 'sd' makes pictures and reads none."),
    ],
)
async def test_a_form_that_cannot_be_done_is_a_sentence(
    gateway: Gateway, path: str, files: dict[str, bytes], fields: dict[str, str], sentence: str
) -> None:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in ({"model": "sd"} | fields).items():
        form.add_field(name, value)
    for name, content in files.items():
        form.add_field(name, content, filename="a.png")
    answer = await gateway.post(f"/v1/images/{path}", data=form)
    assert answer.status == 400, answer.body
    assert sentence in answer.error["message"]


async def test_a_familys_defaults_go_below_the_requests_own(gateway: Gateway) -> None:
    body = {"prompt": "a cat", "size": "64x64", "response_format": "b64_json", "seed": 7}
    by_default = await gateway.post("/v1/images/generations", body | {"model": "spare"})
    assert base64.b64decode(by_default.json["data"][0]["b64_json"]) == (await generated(gateway, seed=7))[0]
    own = await generated(gateway, model="spare", seed=7, num_inference_steps=4)
    assert own == await generated(gateway, seed=7, num_inference_steps=4)
    answer = await gateway.post("/v1/images/generations", body | {"model": "spare", "size": "72x72"})
    assert "more than the 4096 pixels" in answer.error["message"]


async def test_openais_sdk_raises_its_errors(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not know `shininess`"):
        await client.images.generate(model="sd", prompt="x", extra_body={"shininess": 3})
    with pytest.raises(openai.NotFoundError):
        await client.images.generate(model="nobody", prompt="x")


# --- the SD web UI


async def test_the_web_ui_makes_pictures(gateway: Gateway) -> None:
    body = {
        "prompt": "a cat",
        "steps": 3,
        "width": 64,
        "height": 32,
        "seed": 5,
        "batch_size": 2,
        "restore_faces": False,
    }
    answer = await gateway.post("/sdapi/v1/txt2img", body)
    assert answer.status == 200, answer.body
    pictures = [base64.b64decode(one) for one in answer.json["images"]]
    assert [size_of(one) for one in pictures] == [(64, 32)] * 2
    assert json.loads(answer.json["info"])["all_seeds"] == [5, 6]
    same = await generated(gateway, size="64x32", seed=5, guidance_scale=7)
    assert same == pictures[:1]


async def test_the_web_ui_changes_pictures(gateway: Gateway) -> None:
    picture = base64.b64encode(PICTURE).decode()
    body = {"prompt": "snow", "steps": 4, "init_images": [f"data:image/png;base64,{picture}"], "seed": -1}
    answer = await gateway.post("/sdapi/v1/img2img", body | {"sampler_name": "DPM++ 2M", "scheduler": "Karras"})
    assert answer.status == 200, answer.body
    assert size_of(base64.b64decode(answer.json["images"][0])) == (64, 48)
    masked = await gateway.post("/sdapi/v1/img2img", body | {"mask": base64.b64encode(MASK).decode()})
    assert masked.status == 200, masked.body
    refused = await gateway.post("/sdapi/v1/img2img", {"prompt": "snow"})
    assert refused.status == 400
    assert "init_images" in refused.json["detail"]


async def test_the_web_ui_lists_and_chooses_models(gateway: Gateway) -> None:
    listed = (await gateway.get("/sdapi/v1/sd-models")).json
    assert [(one["model_name"], one["config"]) for one in listed] == [("sd", None), ("spare", None)]
    samplers = (await gateway.get("/sdapi/v1/samplers")).json
    assert "DPM++ 2M Karras" in [one["name"] for one in samplers]
    large = {"prompt": "x", "steps": 1, "width": 72, "height": 72}  # only `sd` makes such

    async def status(**fields: Any) -> int:
        return (await gateway.post("/sdapi/v1/txt2img", large | fields)).status

    assert await status() == 200
    assert await status(model="spare") == 400
    assert await status(override_settings={"sd_model_checkpoint": "spare"}) == 400
    assert (await gateway.post("/sdapi/v1/options", {"sd_model_checkpoint": "spare"})).status == 200
    try:
        assert (await gateway.get("/sdapi/v1/options")).json == {"sd_model_checkpoint": "spare"}
        assert await status() == 400
    finally:
        await gateway.post("/sdapi/v1/options", {"sd_model_checkpoint": "sd"})
    refused = await gateway.post("/sdapi/v1/options", {"sd_model_checkpoint": "nobody"})
    assert "There are: sd, spare." in refused.error["message"]


async def test_the_web_ui_tells_progress_and_interrupts(gateway: Gateway) -> None:
    body = {"prompt": "x", "steps": LONG, "width": 256, "height": 256}
    task = asyncio.ensure_future(gateway.post("/sdapi/v1/txt2img", body))
    async with asyncio.timeout(60):
        while not (said := (await gateway.get("/sdapi/v1/progress")).json)["progress"]:
            await asyncio.sleep(0.02)
    assert 0 < said["progress"] < 1
    assert said["state"]["job_count"] == 1
    await gateway.post("/sdapi/v1/interrupt")
    assert (await asyncio.wait_for(task, 20)).status == 409
    assert (await gateway.get("/sdapi/v1/progress")).json["progress"] == 0
