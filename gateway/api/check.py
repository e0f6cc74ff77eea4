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
from registry.resolve import name_of


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
        if not (name := uid or name_of(wish)):
            raise BadRequest("Invalid input. Please specify the `model_name` field.", param="model_name")
        return json_answer(await check.check(self._fleet, uid or self._free_uid(name), wish, hubs))

    def _free_uid(self, model_name: str) -> str:
        taken = {deployment.launch.uid for deployment in self._fleet.deployments()}
        return check.ANY_UID if model_name in taken else model_name
