"""Probes, metrics, and what clients ask about the gateway itself."""

from __future__ import annotations

import os
from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from gateway import metrics
from gateway.api.wire import json_answer
from gateway.errors import CannotRestart, NotFound
from gateway.files import MEDIA_TYPES
from gateway.fleet import Fleet


class System:
    """The routes that are about no single model."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def root(self, request: Request) -> Response:
        """What this is, for those who open the address in a browser."""
        return json_answer({"name": "hostler", "version": version("hostler"), "api": "/v1"})

    async def health(self, request: Request) -> Response:
        """Live: the process answers."""
        return json_answer({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Ready: every model that is loaded at start has been loaded. Names no model, as it needs no key."""
        deployments = [deployment for deployment in self._fleet.deployments() if deployment.launch.preload]
        ready = sum(deployment.is_settled for deployment in deployments)
        is_ready = ready == len(deployments) and not self._fleet.is_closing
        body = {
            "status": "ready" if is_ready else "not ready",
            "models_ready": ready,
            "models_preloaded": len(deployments),
        }
        return json_answer(body, 200 if is_ready else 503)

    async def restart(self, request: Request) -> Response:
        """Another gateway, with the settings that are there now, takes over the door and the engines."""
        if self._fleet.restart is None:
            raise CannotRestart("This gateway was not started by `hostler serve`, so it cannot be restarted from here.")
        return json_answer({"pid": await self._fleet.restart(), "pid_before": os.getpid()})

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text; reading it wakes no model."""
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)

    async def file(self, request: Request) -> Response:
        """A picture or film that a reply pointed to."""
        path = self._fleet.files.find(request.path_params["name"])
        if path is None:
            raise NotFound("There is no such file here. Files of replies are kept for an hour.")
        return FileResponse(path, media_type=MEDIA_TYPES.get(path.suffix[1:]))

    async def auth(self, request: Request) -> Response:
        """Whether a key is needed; Xinference's clients ask this first."""
        return json_answer({"auth": bool(self._fleet.settings.api_keys)})
