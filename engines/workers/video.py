"""Films: made of text, of a picture, or of the first picture and the last."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from typing import Any

import diffusers
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from engines.workers.diffusion import Pipelines
from engines.workers.image import flattened
from engines.workers.jobs import Job, Jobs
from engines.workers.pictures import rounded
from engines.workers.server import Order, Refused, read_json, serve
from engines.workers.wishes import Form, Wish, wish_of

# Pictures a second that models were trained for, by how their pipelines' names begin.
FPS = {"CogVideoX": 8, "LTX": 24, "HunyuanVideo": 24, "AnimateDiff": 8}
OTHER_FPS = 16


class Films:
    """The routes over one model's pipelines."""

    def __init__(self, pipelines: Pipelines, jobs: Jobs, options: dict[str, Any]) -> None:
        self._pipelines, self._jobs = pipelines, jobs
        self._defaults: dict[str, Any] = options.get("generate_config") or {}
        self._most_pixels = int(options["max_pixels"])
        self._derived: dict[str, Any] = {}

    def routes(self) -> list[BaseRoute]:
        """All paths."""
        paths = {
            "/v1/video/generations": self.generate,
            "/v1/video/generations/image": self.animate,
            "/v1/video/generations/flf": self.join,
        }
        return [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]

    async def generate(self, request: Request) -> Response:
        """Out of text."""
        wish = wish_of(await read_json(request), self._defaults, self._most_pixels)
        return await self._answer(request, wish)

    async def animate(self, request: Request) -> Response:
        """Out of a picture, and text."""
        form = await Form.read(request)
        if "video" in form.names():
            raise Refused("This model takes no `video`; send the `image` alone.", param="video")
        wish = wish_of(form.fields("image"), self._defaults, self._most_pixels, needs_prompt=False)
        wish.pictures = await form.pictures("image")
        return await self._answer(request, wish)

    async def join(self, request: Request) -> Response:
        """Out of the first picture, the last, and text."""
        form = await Form.read(request)
        wish = wish_of(form.fields("first_frame", "last_frame"), self._defaults, self._most_pixels, needs_prompt=False)
        wish.pictures = await form.pictures("first_frame")
        wish.last_frame = (await form.pictures("last_frame"))[0]
        return await self._answer(request, wish)

    async def _answer(self, request: Request, wish: Wish) -> Response:
        work = self._work(wish)
        job = self._jobs.begin(wish.request_id)
        data = await self._jobs.run(request, job, work)
        return JSONResponse({"created": int(time.time()), "data": data})

    def _work(self, wish: Wish) -> Callable[[Job], list[dict[str, Any]]]:
        pipeline = self._pipeline("image2video" if wish.pictures else "text2video")
        known = Pipelines.parameters(pipeline)
        self._pipelines.arguments(pipeline, wish)
        inputs: dict[str, Any] = {}
        wanted = wish.size or (wish.pictures[0].size if wish.pictures else None)
        made = rounded(wanted, self._pipelines.multiple()) if wanted else None
        if made and "height" in known:
            inputs |= {"width": made[0], "height": made[1]}
        if wish.pictures and made:
            inputs["image"] = flattened(wish.pictures[0]).resize(made, Image.Resampling.LANCZOS)
        if wish.last_frame and made:
            if "last_image" not in known:
                raise Refused(f"The model {self._pipelines.uid!r} takes no last frame.", param="last_frame")
            inputs["last_image"] = flattened(wish.last_frame).resize(made, Image.Resampling.LANCZOS)
        fps = wish.fps or next((n for name, n in FPS.items() if type(pipeline).__name__.startswith(name)), OTHER_FPS)

        def run(job: Job) -> list[dict[str, Any]]:
            return [
                {"url": None, "b64_json": base64.b64encode(film_of(_frames(result), fps)).decode(), "seed": seed}
                for seed, result in self._pipelines.run(pipeline, wish, job, inputs)
            ]

        return run

    def _pipeline(self, task: str) -> Any:
        """The model's own, or its sister for the other task, which shares the weights."""
        if task not in self._derived:
            self._derived[task] = self._derive(task)
        return self._derived[task]

    def _derive(self, task: str) -> Any:
        base = self._pipelines.base
        known = Pipelines.parameters(base)
        takes = "image" in known
        needs = takes and known["image"].default is known["image"].empty
        if takes if task == "image2video" else not needs:
            return base
        name = type(base).__name__
        if _shares_weights(base):
            stem = name.removesuffix("Pipeline").removesuffix("ImageToVideo")
            kind = getattr(diffusers, stem + ("Pipeline" if task == "text2video" else "ImageToVideoPipeline"), None)
            if kind not in (None, type(base)):
                modules, values = kind._get_signature_keys(kind)  # its from_pipe would make the weights float32
                derived = kind(
                    **{one: base.components[one] for one in modules if one in base.components},
                    **{one: base.config[one] for one in values if one in base.config},
                )
                derived.set_progress_bar_config(disable=True)
                return derived
        what = "text alone" if task == "text2video" else "pictures"
        raise Refused(f"The model {self._pipelines.uid!r} ({name}) makes no films of {what}.", param="model")


def _shares_weights(pipeline: Any) -> bool:
    """Whether the same weights make films of text and of pictures: elsewhere the two have other inputs."""
    return type(pipeline).__name__.startswith("LTX") or bool(pipeline.config.get("expand_timesteps"))


def _frames(result: Any) -> list[Image.Image]:
    frames = result.frames[0]
    if len(frames) and not isinstance(frames[0], Image.Image):
        return [Image.fromarray((frame * 255).round().astype("uint8")) for frame in frames]
    return list(frames)


def film_of(frames: list[Image.Image], fps: int) -> bytes:
    """An MP4 file where PyAV is installed to write it, else an animated GIF."""
    try:
        import av
    except ImportError:
        return _gif_of(frames, fps)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=fps, options={"threads": "1"})  # the same film, the same bytes
        stream.width, stream.height = (length - length % 2 for length in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    return file.getvalue()


def _gif_of(frames: list[Image.Image], fps: int) -> bytes:
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return file.getvalue()


def load(order: Order) -> list[BaseRoute]:
    """The model's pipeline."""
    jobs = Jobs()
    return [*Films(Pipelines(order), jobs, order.options).routes(), *jobs.routes()]


def main() -> None:
    """Serve until SIGTERM."""
    serve(load)


if __name__ == "__main__":
    main()
