"""Whether a launch would work, and what it would take."""

from __future__ import annotations

import asyncio
import os

from starlette.requests import Request
from starlette.responses import Response

from gateway import check
from gateway.api.body import read_object
from gateway.api.wire import json_answer, read_launch
from gateway.errors import BadRequest
from gateway.fleet import Fleet
from registry.hubs.choose import AUTO, choose_hub


class Check:
    """The route /v1/models/check."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def check(self, request: Request) -> Response:
        """A report on the launch that the body describes. Nothing is launched, downloaded or kept."""
        body = await read_object(request, self._fleet.settings.max_body_bytes)
        try:
            uid, wish = read_launch(body)
        except ValueError as exc:
            raise BadRequest(str(exc)) from exc
        hubs: tuple[str, ...] = ()
        if str(body.get("download_hub")).lower() == AUTO:
            hubs = (await asyncio.to_thread(choose_hub, None, os.environ),)
        if not (uid or wish.model_name):
            raise BadRequest("Invalid input. Please specify the `model_name` field.", param="model_name")
        return json_answer(await check.check(self._fleet, uid or self._free_uid(wish.model_name), wish, hubs))

    def _free_uid(self, model_name: str | None) -> str:
        taken = {deployment.launch.uid for deployment in self._fleet.deployments()}
        return check.ANY_UID if model_name is None or model_name in taken else model_name
