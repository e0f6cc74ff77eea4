"""Pictures: made of text, changed, painted in, read; in the routes of OpenAI, Xinference and the SD web UI."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from engines.workers.jobs import Job, Jobs
from engines.workers.pictures import Size, encoded, mask_of, rounded
from engines.workers.server import Order, Refused, flag, read_json, serve, stream_failure
from engines.workers.wishes import Form, Wish, wish_of

TELL_EVERY_S = 0.5
# Parts of the names of pipelines that look at several pictures at once.
SEVERAL = ("EditPlus", "Flux2", "Omni")


class Pictures:
    """The routes over one model's pipelines."""

    def __init__(self, pipelines: Any, jobs: Jobs, options: dict[str, Any]) -> None:
        self._pipelines, self._jobs = pipelines, jobs
        self._defaults: dict[str, Any] = options.get("generate_config") or {}
        self._most_pixels = int(options["max_pixels"])

    def routes(self) -> list[BaseRoute]:
        """All paths."""
        paths = {
            "/v1/images/generations": self.generate,
            "/v1/images/variations": self.vary,
            "/v1/images/inpainting": self.inpaint,
            "/v1/images/edits": self.edit,
            "/v1/images/ocr": self.read,
        }
        return [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]

    async def generate(self, request: Request) -> Response:
        """Out of text."""
        fields = await read_json(request)
        wish = self.wish(fields)
        return await self._answer(request, wish, is_stream=flag(fields.get("stream"), "stream"))

    async def vary(self, request: Request) -> Response:
        """Out of a picture, and text."""
        form = await Form.read(request)
        wish = self.wish(form.fields("image", "image[]"), needs_prompt=False)
        wish.pictures = await form.pictures("image", "image[]")
        return await self._answer(request, wish)

    async def inpaint(self, request: Request) -> Response:
        """The white part of a mask."""
        form = await Form.read(request)
        wish = self.wish(form.fields("image", "mask_image"))
        wish.pictures = await form.pictures("image")
        wish.mask = mask_of((await form.pictures("mask_image"))[0])
        return await self._answer(request, wish)

    async def edit(self, request: Request) -> Response:
        """As OpenAI's: with a mask only the part that it shows, else the whole."""
        form = await Form.read(request)
        names = ("image", "image[]", "images", "images[]")
        fields = form.fields(*names, "mask")
        wish = self.wish(fields)
        wish.pictures = await form.pictures(*names)
        masks = await form.pictures("mask", needed=False)
        wish.mask = mask_of(masks[0]) if masks else None
        return await self._answer(request, wish, is_stream=flag(fields.get("stream"), "stream"))

    async def read(self, request: Request) -> Response:
        """What models of another kind do."""
        raise Refused(f"The model {self._pipelines.uid!r} makes pictures and reads none.", param="model")

    def wish(self, fields: dict[str, Any], *, needs_prompt: bool = True) -> Wish:
        """What a request's fields ask of this model."""
        return wish_of(fields, self._defaults, self._most_pixels, needs_prompt=needs_prompt)

    async def _answer(self, request: Request, wish: Wish, *, is_stream: bool = False) -> Response:
        work = self.work(wish)
        job = self._jobs.begin(wish.request_id)
        if is_stream:
            return StreamingResponse(self._events(request, job, work), media_type="text/event-stream")
        return JSONResponse(_reply(await self._jobs.run(request, job, work)))

    async def _events(
        self, request: Request, job: Job, work: Callable[[Job], list[dict[str, Any]]]
    ) -> AsyncIterator[bytes]:
        """In Xinference's words: start, processing, complete, error."""
        task = asyncio.ensure_future(self._jobs.run(request, job, work))
        try:
            yield _event("start", {"type": "start", "request_id": job.id})
            told = -1.0
            while not task.done():
                if job.progress != told:
                    told = job.progress
                    yield _event("processing", {"type": "processing", "progress": told})
                await asyncio.wait((task,), timeout=TELL_EVERY_S)
            yield _event("complete", {"type": "complete"} | _reply(task.result()))
        except Exception as exc:
            failed = stream_failure(exc)
            message = json.loads(bytes(failed.body))["error"]["message"]
            yield _event("error", {"type": "error", "error": {"message": message, "code": failed.status_code}})
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def work(self, wish: Wish) -> Callable[[Job], list[dict[str, Any]]]:
        """The work on a wish, for a thread. What can be refused is refused here, before its turn."""
        task = "inpainting" if wish.mask else "image2image" if wish.pictures else "text2image"
        steers = self._pipelines.is_steered and task == "image2image"
        pipeline = self._pipelines.for_task("text2image" if steers else task)
        if self._pipelines.is_steered and not wish.pictures:
            raise Refused("This model's controlnet needs an `image`: send it to /v1/images/variations.", param="image")
        self._pipelines.arguments(pipeline, wish)
        inputs, wanted = self._inputs(pipeline, wish, task)

        def run(job: Job) -> list[dict[str, Any]]:
            results = self._pipelines.run(pipeline, wish, job, inputs)
            return [
                {"url": None, "b64_json": encoded(_sized(result.images[0], wanted), wish.output_format), "seed": seed}
                for seed, result in results
            ]

        return run

    def _inputs(self, pipeline: Any, wish: Wish, task: str) -> tuple[dict[str, Any], Size | None]:
        """The pipeline's pictures and sizes, and the size that the client wants of the result."""
        wanted = wish.size or (wish.pictures[0].size if wish.pictures else None)
        inputs: dict[str, Any] = {}
        made = rounded(wanted, self._pipelines.multiple()) if wanted else None
        if wish.pictures:
            several = any(part in type(pipeline).__name__ for part in SEVERAL)
            if len(wish.pictures) > 1 and not several:
                raise Refused(
                    f"{type(pipeline).__name__} looks at one picture, not {len(wish.pictures)}.", param="image"
                )
            flat = [flattened(one) for one in wish.pictures]
            assert made is not None
            inputs["image"] = flat if several else flat[0].resize(made, Image.Resampling.LANCZOS)
        if wish.mask and made:
            inputs["mask_image"] = wish.mask.resize(made, Image.Resampling.NEAREST)
        known = self._pipelines.parameters(pipeline)
        if self._pipelines.is_steered and "control_image" in known:
            inputs["control_image"] = inputs["image"]
        if made and "height" in known:
            inputs |= {"width": made[0], "height": made[1]}
        return inputs, wanted


def flattened(picture: Image.Image) -> Image.Image:
    """Without transparency, on white."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def _sized(picture: Image.Image, wanted: Size | None) -> Image.Image:
    return picture if wanted in (None, picture.size) else picture.resize(wanted, Image.Resampling.LANCZOS)


def _reply(data: list[dict[str, Any]]) -> dict[str, Any]:
    return {"created": int(time.time()), "data": data}


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def load(order: Order) -> list[BaseRoute]:
    """Pictures by diffusers, or what reads pictures by transformers, as the model's files say."""
    jobs = Jobs()
    if not (Path(order.model) / "model_index.json").exists() and (Path(order.model) / "config.json").exists():
        from engines.workers.ocr import Reader

        return [*Reader(order, jobs).routes(), *jobs.routes()]
    from engines.workers.diffusion import Pipelines
    from engines.workers.webui import WebUi

    pictures = Pictures(Pipelines(order), jobs, order.options)
    return [*pictures.routes(), *WebUi(pictures, jobs).routes(), *jobs.routes()]


def main() -> None:
    """Serve until SIGTERM."""
    serve(load)


if __name__ == "__main__":
    main()
