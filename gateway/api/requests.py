"""Requests that have an id: how far they are, and their end. Their replicas know; we ask."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.body import read_object
from gateway.api.wire import json_answer
from gateway.deployment import Deployment
from gateway.errors import BadRequest, ModelNotFound
from gateway.fleet import Fleet

# Types of models whose engines know requests by their ids.
TELLING = ("image", "video")
BODY_LIMIT_BYTES = 64 * 1024


class Requests:
    """The routes about one request."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def progress(self, request: Request) -> Response:
        """From 0 to 1, of a picture or film whose request chose this id."""
        request_id = request.path_params["request_id"]
        path = f"/requests/{quote(request_id, safe='')}/progress"
        for said in await ask_all(self._telling(), "GET", path):
            if "progress" in said:
                return json_answer({"progress": said["progress"]})
        raise BadRequest(
            f"No request of the id {request_id} is known. Requests for pictures and films choose theirs as "
            "`request_id` in `kwargs`, and are known once their model is loaded.",
            param="request_id",
        )

    async def abort(self, request: Request) -> Response:
        """End it: DONE, NOT_FOUND, or NO_OP where requests end only when their client leaves."""
        uid, request_id = request.path_params["uid"], request.path_params["request_id"]
        try:
            deployment = self._fleet.find(uid)
        except ModelNotFound as exc:
            raise BadRequest(exc.message, param="model") from exc
        if not self._tells(deployment):
            return json_answer({"msg": "NO_OP"})
        block_s = _block_duration(await read_object(request, BODY_LIMIT_BYTES))
        path = f"/requests/{quote(request_id, safe='')}/abort"
        answers = [said.get("msg") for said in await ask_all([deployment], "POST", path, block_s)]
        return json_answer({"msg": "DONE" if "DONE" in answers else "NOT_FOUND"})

    def _tells(self, deployment: Deployment) -> bool:
        return deployment.launch.artifact.family.model_type in TELLING

    def _telling(self) -> list[Deployment]:
        return [deployment for deployment in self._fleet.deployments() if self._tells(deployment)]


def _block_duration(body: dict[str, Any]) -> bytes:
    """As the worker reads it; whatever else the body says is left out."""
    try:
        return msgspec.json.encode({"block_duration": float(body.get("block_duration") or 0)})
    except (TypeError, ValueError) as exc:
        raise BadRequest("`block_duration` is a number of seconds.", param="block_duration") from exc


async def ask_all(
    deployments: Iterable[Deployment], method: str, path: str, body: bytes | None = None
) -> list[dict[str, Any]]:
    """What their ready replicas answer; those that refuse or are silent are left out."""
    upstreams = [replica.upstream for one in deployments for replica in one.replicas if replica.upstream]
    answers = await asyncio.gather(*(upstream.ask(method, path, body) for upstream in upstreams))
    return [said for said in answers if isinstance(said, dict)]
