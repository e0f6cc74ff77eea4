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

from gateway.api.body import read_object
from gateway.api.next_door import until_ready_next_door
from gateway.api.wire import (
    find_version,
    instance_card,
    instance_replica,
    json_answer,
    model_card,
    note_on,
    progress_card,
    read_launch,
    read_more_replicas,
    replica_card,
)
from gateway.deployment import Deployment
from gateway.errors import (
    BadRequest,
    HandedOver,
    HostlerError,
    LaunchCancelled,
    ModelFailed,
    ModelNotFound,
    ModelStopped,
    NotFound,
    ShuttingDown,
)
from gateway.fleet import Fleet
from gateway.launch import REPLICA_LIMIT
from gateway.process import tail
from gateway.replica import Replica, State
from registry.hubs.choose import AUTO, choose_hub
from registry.resolve import name_of

FOLLOW_PAUSE_S = 0.25
START_LOOK_S = 0.2
LOG_LINES_LIMIT = 10_000
REPLICA_INDEX_LIMIT = 2 * REPLICA_LIMIT  # some may still be ending while others begin


class Models:
    """The routes below /v1/models, and /v1/replicas."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def list_models(self, request: Request) -> Response:
        """All that can be named as `model`, loaded or not; with running=true only what is loaded."""
        is_running = request.query_params.get("running", "").lower() in ("true", "1", "yes")
        deployments = [d for d in self._fleet.deployments() if d.is_loaded or not is_running]
        cards = [self._card(deployment) for deployment in deployments]
        return json_answer({"object": "list", "data": cards})

    async def get_model(self, request: Request) -> Response:
        """One of them. An unknown one is a 400, as Xinference's clients expect."""
        return json_answer(self._card(self._known(request)))

    async def launch(self, request: Request) -> Response:
        """Serve a model from now on, over restarts too; answers once it is ready, unless wait_ready=false.

        A launch that fails while somebody waits for it is forgotten.
        """
        return await self._launch(request, await self._body(request, "The launch"))

    async def launch_version(self, request: Request) -> Response:
        """As `launch`, but `model_version` says which spec, in the words of a list of versions."""
        body = await self._body(request, "The launch")
        try:
            version = msgspec.convert(body.pop("model_version", None), str)
            model_type = msgspec.convert(body.get("model_type") or "LLM", str)
            chosen = await asyncio.to_thread(find_version, self._fleet.registry, model_type, version)
        except msgspec.ValidationError as exc:
            raise BadRequest("`model_version` is a text such as /v1/models/{type}/{name}/versions lists.") from exc
        except ValueError as exc:
            raise BadRequest(str(exc), param="model_version") from exc
        return await self._launch(request, body | chosen)

    async def _launch(self, request: Request, body: dict[str, Any]) -> Response:
        try:
            uid, wish = read_launch(body)
        except ValueError as exc:
            raise BadRequest(str(exc)) from exc
        hubs: tuple[str, ...] = ()
        if str(body.get("download_hub")).lower() == AUTO:
            hubs = (await asyncio.to_thread(choose_hub, None, os.environ),)
        deployment = self._fleet.launch(uid or self._free_uid(name_of(wish)), wish, hubs)
        if _is_waiting(request):
            try:
                await self._until_ready(deployment)
            except HandedOver:
                await until_ready_next_door(self._fleet, request.scope, deployment.launch.uid)
        answer = json_answer({"model_uid": deployment.launch.uid})
        if forced := deployment.launch.forced_options:
            note_on(answer, f"Passed on to {deployment.launch.engine} unchecked: {', '.join(forced)}.")
        return answer

    async def _until_ready(self, deployment: Deployment) -> None:
        """A launch that fails while its client waits is forgotten."""
        try:
            await deployment.until_ready()
        except ModelFailed as exc:
            reason = deployment.reason_text()
            await self._fleet.terminate(deployment.launch.uid)
            raise ModelFailed(f"{reason} The launch was taken back: mend the cause and launch again.") from exc
        except (ModelStopped, ShuttingDown) as exc:
            if deployment.is_cancelled:
                raise LaunchCancelled("Launch cancelled") from exc
            raise

    async def cancel(self, request: Request) -> Response:
        """End a launch, wherever it is."""
        uid = request.path_params["uid"]
        if uid not in {deployment.launch.uid for deployment in self._fleet.deployments()}:
            raise HostlerError(f"Model {uid} has not been launched yet")
        deployment = self._fleet.find(uid)
        deployment.is_cancelled = True
        if uid in self._fleet.settings.models:
            deployment.stop(force=True)
        else:
            await self._fleet.terminate(uid, force=True)
        return json_answer(None)

    async def instances(self, request: Request) -> Response:
        """Launches and how far they are, all or of one uid or name."""
        uid, name = request.query_params.get("model_uid"), request.query_params.get("model_name")
        cards = [instance_card(deployment) for deployment in self._fleet.deployments()]
        if uid:
            cards = [card for card in cards if card["model_uid"] == uid]
        elif name:
            cards = [card for card in cards if card["model_name"] == name]
        return json_answer(cards)

    async def progress(self, request: Request) -> Response:
        """How far a launch is; 0 for an unknown uid."""
        uid = request.path_params["uid"]
        return json_answer(progress_card(next((d for d in self._fleet.deployments() if d.launch.uid == uid), None)))

    async def events(self, request: Request) -> Response:
        """What happened to a model, the newest 100, also after its end."""
        return json_answer(self._fleet.events.of(request.path_params["uid"]))

    async def model_replicas(self, request: Request) -> Response:
        """The copies of one model."""
        return json_answer([instance_replica(replica) for replica in self._known(request).replicas])

    async def add_replicas(self, request: Request) -> Response:
        """More copies of a model; answers once they are ready, unless wait_ready=false or the model is not loaded.

        Copies that fail while somebody waits for them are taken back.
        """
        deployment = self._known(request)
        count = read_more_replicas(await self._body(request, "The body"), deployment.launch)
        added = self._fleet.add_replicas(deployment.launch.uid, count)
        if deployment.is_loaded and _is_waiting(request):
            await self._until_replicas_ready(deployment, added)
        cards = [instance_replica(replica) for replica in added]
        if len(cards) == 1:
            return json_answer(cards[0])
        return json_answer({"replica": len(cards), "replicas": cards})

    async def _until_replicas_ready(self, deployment: Deployment, added: list[Replica]) -> None:
        while (
            deployment.is_loaded
            and not deployment.is_resting
            and not all(replica.state is State.READY for replica in added)
        ):
            failed = next((replica for replica in added if replica.state is State.FAILED), None)
            if failed is not None:
                reason = f"{failed.name} does not start: {failed.failure}"
                for replica in {replica.index for replica in deployment.staying if replica in added}:
                    await self._fleet.remove_replica(deployment.launch.uid, replica)
                raise ModelFailed(f"{reason} It was taken back: mend the cause and add it again.")
            if not set(added) <= set(deployment.staying):
                raise ModelStopped(f"A replica of {deployment.launch.uid} was removed before it was ready.")
            await deployment.changed()

    async def remove_replica(self, request: Request) -> Response:
        """End one copy, after its requests in flight."""
        uid = self._known(request).launch.uid
        return json_answer(
            {"remaining_replicas": await self._fleet.remove_replica(uid, request.path_params["replica"])}
        )

    async def _body(self, request: Request, what: str) -> dict[str, Any]:
        return await read_object(request, self._fleet.settings.max_body_bytes, what)

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
        await self._fleet.terminate(self._known(request).launch.uid)
        return json_answer(None)

    async def start(self, request: Request) -> Response:
        """Load now; also gives a failed model another chance. Answers at once."""
        deployment = self._deployment(request)
        deployment.start()
        await deployment.changed(limit_s=START_LOOK_S)  # so that the answer says what came of it
        return json_answer(self._card(deployment), 202)

    async def stop(self, request: Request) -> Response:
        """Unload, after the requests in flight unless force=true. The next request loads again."""
        deployment = self._deployment(request)
        deployment.stop(force=request.query_params.get("force", "").lower() in ("1", "true", "yes"))
        await deployment.stopped()
        return json_answer(self._card(deployment))

    async def sleep(self, request: Request) -> Response:
        """Have it sleep, if it answers nobody; answers once it does. The next request wakes it."""
        deployment = self._deployment(request)
        await deployment.sleep()
        return json_answer(self._card(deployment))

    async def wake(self, request: Request) -> Response:
        """Be ready again, by a load if it does not sleep; answers once it is."""
        deployment = self._deployment(request)
        await deployment.until_ready()
        return json_answer(self._card(deployment))

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
        index = _number(request, "replica", deployment.replicas[0].index, REPLICA_INDEX_LIMIT)
        lines = _number(request, "lines", 100, LOG_LINES_LIMIT)
        log = next((replica.log for replica in deployment.replicas if replica.index == index), None)
        if log is None:
            there = ", ".join(str(replica.index) for replica in deployment.replicas)
            raise BadRequest(f"{deployment.launch.uid} has no replica {index}; it has {there}.", param="replica")
        if not log.exists():
            raise NotFound(
                f"{deployment.launch.uid!r} has no log: replica {index} was never started, or runs elsewhere."
            )
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

    def _card(self, deployment: Deployment) -> dict[str, Any]:
        return model_card(deployment, self._fleet.origin_of(deployment.launch))

    def _known(self, request: Request) -> Deployment:
        """As `_deployment`, with the status that Xinference's clients expect of an unknown uid."""
        try:
            return self._deployment(request)
        except ModelNotFound as exc:
            raise BadRequest(exc.message, param="model") from exc

    def _deployment(self, request: Request) -> Deployment:
        return self._fleet.find(request.path_params["uid"])


def _is_waiting(request: Request) -> bool:
    return request.query_params.get("wait_ready", "true").lower() not in ("false", "0", "no")


def _number(request: Request, name: str, default: int, limit: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or int(text) > limit:
        raise BadRequest(f"`{name}` is a whole number from 0 to {limit}, not {text!r}.", param=name)
    return int(text)
