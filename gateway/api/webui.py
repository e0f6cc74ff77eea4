"""The SD web UI's routes that are about no picture: which models, which one, which samplers, how far."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from engines.workers.samplers import SAMPLERS
from gateway.api.body import read_object
from gateway.api.heads import WebUiHead
from gateway.api.requests import ask_all
from gateway.api.wire import json_answer
from gateway.deployment import Deployment
from gateway.errors import BadRequest
from gateway.fleet import Fleet

CHECKPOINT = "sd_model_checkpoint"


class WebUi:
    """A model is a checkpoint there; one of them is the current one, for requests that name none."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._checkpoint: str | None = None

    def choose(self, head: WebUiHead) -> str:
        """The model of a request: what it names, else the current one."""
        return head.named or self._current()

    def _current(self) -> str:
        models = [deployment.launch.uid for deployment in self._models()]
        if self._checkpoint in models:
            return str(self._checkpoint)
        if not models:
            raise BadRequest("No image model is served here: launch one first.", param="model")
        return models[0]

    def _models(self) -> list[Deployment]:
        return [d for d in self._fleet.deployments() if d.launch.artifact.family.model_type == "image"]

    async def options(self, request: Request) -> Response:
        """What the current model is."""
        return json_answer({CHECKPOINT: self._current()})

    async def set_options(self, request: Request) -> Response:
        """Make another model the current one; other options have no effect here."""
        fields = await read_object(request, self._fleet.settings.max_body_bytes)
        if (name := fields.get(CHECKPOINT)) is not None:
            models = [deployment.launch.uid for deployment in self._models()]
            if name not in models:
                raise BadRequest(
                    f"{name!r} is no image model here. There are: {', '.join(models) or 'none'}.", param=CHECKPOINT
                )
            self._checkpoint = name
        return json_answer(None)

    async def models(self, request: Request) -> Response:
        """The image models."""
        names = [deployment.launch.uid for deployment in self._models()]
        return json_answer([{"title": name, "model_name": name, "filename": name, "config": None} for name in names])

    async def samplers(self, request: Request) -> Response:
        """The names there are; which of them a model has depends on its kind."""
        return json_answer([{"name": name, "aliases": [], "options": {}} for name in SAMPLERS])

    async def progress(self, request: Request) -> Response:
        """Of the request that is furthest, among those of these routes."""
        said = await ask_all(self._models(), "GET", "/sdapi/v1/progress")
        progress = max((one.get("progress", 0.0) for one in said), default=0.0)
        jobs = sum(one.get("job_count", 0) for one in said)
        state = {"job_count": jobs, "interrupted": False, "skipped": False}
        return json_answer(
            {"progress": progress, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
        )

    async def interrupt(self, request: Request) -> Response:
        """End what these routes are making."""
        await ask_all(self._models(), "POST", "/sdapi/v1/interrupt")
        return json_answer(None)
