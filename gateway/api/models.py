"""Models as clients list them and operators run them: launch, terminate, start, stop, logs."""

from __future__ import annotations

import asyncio
import os
import secrets
import string
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gateway.api.body import read_body
from gateway.api.wire import ModelList, model_card, read_launch, replica_card
from gateway.deployment import Deployment
from gateway.errors import BadRequest, ModelFailed, NotFound
from gateway.fleet import Fleet
from gateway.process import tail
from registry.decode import DecodeError

FOLLOW_PAUSE_S = 0.25
START_LOOK_S = 0.2
LOG_LINES_LIMIT = 10_000


def json_answer(body: Any, status: int = 200) -> Response:
    """Any of our Structs as an answer."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


class Models:
    """The routes below /v1/models, and /v1/replicas."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._created = int(time.time())

    async def list_models(self, request: Request) -> Response:
        """All that can be named as `model`, loaded or not."""
        return json_answer(
            ModelList([model_card(deployment, self._created) for deployment in self._fleet.deployments()])
        )

    async def get_model(self, request: Request) -> Response:
        """One of them."""
        return json_answer(model_card(self._deployment(request), self._created))

    async def launch(self, request: Request) -> Response:
        """Serve a model from now on, over restarts too; answers once it is ready, unless wait_ready=false.

        A launch that fails while somebody waits for it is forgotten.
        """
        try:
            content = await read_body(request.scope, request.receive, self._fleet.settings.max_body_bytes)
            uid, wish = read_launch(msgspec.json.decode(content, type=dict[str, Any]))
        except (msgspec.MsgspecError, DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise BadRequest(f"The launch cannot be read: {exc}") from exc
        deployment = self._fleet.launch(uid or self._free_uid(wish.model_name), wish)
        if request.query_params.get("wait_ready", "true").lower() not in ("false", "0", "no"):
            try:
                deployment.release(await deployment.acquire(), was_served=False)
            except ModelFailed:
                await self._fleet.terminate(deployment.launch.uid)
                raise
        return json_answer({"model_uid": deployment.launch.uid})

    def _free_uid(self, model_name: str | None) -> str:
        if not model_name:
            raise BadRequest("Invalid input. Please specify the `model_name` field.", param="model_name")
        taken = {deployment.launch.uid for deployment in self._fleet.deployments()}
        if model_name not in taken:
            return model_name
        letters = string.ascii_lowercase + string.digits
        return f"{model_name}-{''.join(secrets.choice(letters) for _ in range(8))}"

    async def terminate(self, request: Request) -> Response:
        """Stop a launched model and forget it."""
        await self._fleet.terminate(request.path_params["uid"])
        return json_answer(None)

    async def start(self, request: Request) -> Response:
        """Load now; also gives a failed model another chance. Answers at once."""
        deployment = self._deployment(request)
        deployment.start()
        await deployment.changed(limit_s=START_LOOK_S)  # so that the answer says what came of it
        return json_answer(model_card(deployment, self._created), 202)

    async def stop(self, request: Request) -> Response:
        """Unload, after the requests in flight unless force=true. The next request loads again."""
        deployment = self._deployment(request)
        deployment.stop(force=request.query_params.get("force", "").lower() in ("1", "true", "yes"))
        await deployment.stopped()
        return json_answer(model_card(deployment, self._created))

    async def list_replicas(self, request: Request) -> Response:
        """Every replica, as operators see it."""
        now = time.monotonic()
        return json_answer(
            [
                replica_card(deployment, replica, now)
                for deployment in self._fleet.deployments()
                for replica in deployment.replicas
            ]
        )

    async def logs(self, request: Request) -> Response:
        """The last `lines` of a replica's log; with follow=true also what comes."""
        deployment = self._deployment(request)
        index = _number(request, "replica", 0, len(deployment.replicas) - 1)
        lines = _number(request, "lines", 100, LOG_LINES_LIMIT)
        log = deployment.replicas[index].log
        if not log.exists():
            raise NotFound(f"{deployment.launch.uid!r} has no log yet: replica {index} was never started.")
        if request.query_params.get("follow", "").lower() in ("1", "true", "yes"):
            return StreamingResponse(self._follow(log, lines), media_type="text/plain")
        return Response("".join(f"{line}\n" for line in tail(log, lines)), media_type="text/plain")

    async def _follow(self, log: Path, lines: int) -> AsyncIterator[bytes]:
        """The last lines and what is added, for as long as somebody listens and the gateway runs."""
        with log.open("rb") as file:
            begin = file.seek(0, os.SEEK_END)
            for line in tail(log, lines, end=begin):
                yield f"{line}\n".encode()
            while not self._fleet.is_closing:
                if new := file.read(65536):
                    yield new
                    continue
                if os.fstat(file.fileno()).st_size < file.tell():  # it was emptied
                    file.seek(0)
                await asyncio.sleep(FOLLOW_PAUSE_S)

    def _deployment(self, request: Request) -> Deployment:
        return self._fleet.find(request.path_params["uid"])


def _number(request: Request, name: str, default: int, limit: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or int(text) > limit:
        raise BadRequest(f"`{name}` is a whole number from 0 to {limit}, not {text!r}.", param=name)
    return int(text)
