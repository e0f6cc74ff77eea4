"""The routes of the SD web UI over one model."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from engines.workers.jobs import Jobs
from engines.workers.pictures import mask_of, read_picture
from engines.workers.server import Refused, more_options, number, read_json

KIND = "webui"
DEFAULTS = {"steps": 20, "cfg_scale": 7.0, "denoising_strength": 0.75}


class WebUi:
    """txt2img, img2img, and how far they are."""

    def __init__(self, pictures: Any, jobs: Jobs) -> None:
        self._pictures, self._jobs = pictures, jobs

    def routes(self) -> list[BaseRoute]:
        """All paths."""
        return [
            Route("/sdapi/v1/txt2img", self.txt2img, methods=["POST"]),
            Route("/sdapi/v1/img2img", self.img2img, methods=["POST"]),
            Route("/sdapi/v1/progress", self.progress),
            Route("/sdapi/v1/interrupt", self.interrupt, methods=["POST"]),
        ]

    async def txt2img(self, request: Request) -> Response:
        """Out of text."""
        return await self._answer(request, await read_json(request), needs_picture=False)

    async def img2img(self, request: Request) -> Response:
        """Out of a picture, or a part of one."""
        return await self._answer(request, await read_json(request), needs_picture=True)

    async def _answer(self, request: Request, fields: dict[str, Any], *, needs_picture: bool) -> Response:
        said = DEFAULTS | {name: value for name, value in fields.items() if value is not None}
        batch = number(said.get("batch_size", 1), "batch_size", int, least=1, most=10)
        times = number(said.get("n_iter", 1), "n_iter", int, least=1, most=10)
        wanted = {
            "prompt": said.get("prompt"),
            "negative_prompt": said.get("negative_prompt"),
            "n": batch * times,
            "seed": said.get("seed"),
            "sampler_name": _sampler(said),
            "request_id": said.get("force_task_id") or said.get("request_id"),
            "num_inference_steps": said["steps"],
            "guidance_scale": said["cfg_scale"],
        }
        if not needs_picture or {"width", "height"} & said.keys():
            wanted |= {"width": said.get("width", 512), "height": said.get("height", 512)}
        if needs_picture:
            wanted["strength"] = said["denoising_strength"]
        wish = self._pictures.wish(
            {name: value for name, value in wanted.items() if value is not None}
            | {"kwargs": more_options(said.get("kwargs"))},
            needs_prompt=False,
        )
        wish.optional |= {"guidance_scale", "num_inference_steps", "strength", "negative_prompt"}
        if needs_picture:
            pictures = said.get("init_images")
            if not isinstance(pictures, list) or not pictures:
                raise Refused("`init_images` is a list of pictures as base64.", param="init_images")
            wish.pictures = [await read_picture(one, "init_images") for one in pictures]
            if said.get("mask"):
                wish.mask = mask_of(await read_picture(said["mask"], "mask"))
        work = self._pictures.work(wish)
        made = await self._jobs.run(request, self._jobs.begin(wish.request_id, KIND), work)
        seeds = [one["seed"] for one in made]
        info = {"prompt": wish.prompts[0], "seed": seeds[0], "all_seeds": seeds, "sd_model_name": said.get("model")}
        told = {name: value for name, value in fields.items() if name not in ("init_images", "mask")}
        return JSONResponse({"images": [one["b64_json"] for one in made], "parameters": told, "info": json.dumps(info)})

    async def progress(self, request: Request) -> Response:
        """How far the oldest request of these routes is; 0 if there is none."""
        under_way = self._jobs.under_way(KIND)
        return JSONResponse({"progress": under_way[0].progress if under_way else 0.0, "job_count": len(under_way)})

    async def interrupt(self, request: Request) -> Response:
        """End it at its next step."""
        for job in self._jobs.under_way(KIND)[:1]:
            self._jobs.abort(job)
        return JSONResponse(None)


def _sampler(said: dict[str, Any]) -> str | None:
    """Newer clients name the schedule of the noise apart from the sampler."""
    name = said.get("sampler_name") or said.get("sampler_index")
    is_karras = str(said.get("scheduler")).lower() == "karras"
    return f"{name} Karras" if name and is_karras and "karras" not in str(name).lower() else name
