"""Changes of a model's options while it is served, and how far they are."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.body import read_object
from gateway.api.wire import json_answer, shown_options, unmasked
from gateway.calls import DRAIN_TIMEOUT_S
from gateway.deployment import Deployment
from gateway.errors import BadRequest, ModelNotFound, NotFound
from gateway.fleet import Fleet
from gateway.launch import RELOADABLE, LaunchRequest
from gateway.reload import Reload
from registry.decode import decode, schema


class ReloadBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be changed; `drain_timeout` in seconds."""

    model_config: dict[str, Any]
    drain_timeout: Annotated[float, Meta(ge=0, le=86400)] = DRAIN_TIMEOUT_S
    python_executable: str | None = None


class Reloads:
    """The routes below /v1/models/{uid}/reload."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def start(self, request: Request) -> Response:
        """Change options; answers at once, and the replicas are started anew one after the other."""
        launch = self._deployment(request).launch
        body = await read_object(request, self._fleet.settings.max_body_bytes)
        try:
            wish = decode(body, ReloadBody, strict=False)
        except ValueError as exc:
            raise BadRequest(f"The reload cannot be read: {exc}") from exc
        if wish.python_executable is not None:
            raise BadRequest("`python_executable` cannot be chosen by a request.", param="python_executable")
        return json_answer(
            _card(self._fleet.reload(launch.uid, unmasked(wish.model_config, launch), wish.drain_timeout)), 202
        )

    async def status(self, request: Request) -> Response:
        """How far the last reload is."""
        uid = self._deployment(request).launch.uid
        reload = self._fleet.reloads.get(uid)
        if reload is None:
            raise NotFound(f"{uid} has not been reloaded.")
        return json_answer(_card(reload))

    async def config(self, request: Request) -> Response:
        """What can be changed: name, type, default, and the value that the launch gives."""
        deployment = self._deployment(request)
        launch = deployment.launch
        given = shown_options(launch)
        parameters = _parameters(deployment.engine.options, given)
        fields = {name: getattr(launch, name) for name in RELOADABLE if name != "envs"}
        parameters += [one for one in _parameters(LaunchRequest, fields) if one["name"] in fields]
        return json_answer(
            {
                "model_uid": launch.uid,
                "model_engine": launch.engine,
                "model_config": given,
                "parameters": parameters,
            }
        )

    def _deployment(self, request: Request) -> Deployment:
        try:
            return self._fleet.find(request.path_params["uid"])
        except ModelNotFound as exc:
            raise BadRequest(exc.message, param="model") from exc


def _card(reload: Reload) -> dict[str, Any]:
    status = reload.stage if reload.is_over else "reloading"
    hidden = ("before", "engine_before", "after", "drain_timeout_s", "only_stale", "may_return", "is_superseded")
    facts = {name: value for name, value in msgspec.structs.asdict(reload).items() if name not in hidden}
    return facts | {"status": status, "model_config": shown_options(reload.after)}


def _parameters(kind: type[msgspec.Struct], given: dict[str, Any]) -> list[dict[str, Any]]:
    described = schema(kind)
    properties = described["$defs"][kind.__name__]["properties"]
    return [
        {
            "name": name,
            "type": facts.get("type") or [one.get("type", "enum") for one in facts.get("anyOf", ())] or "enum",
            "enum": facts.get("enum"),
            "default": facts.get("default"),
            "description": facts.get("description"),
            "value": given.get(name),
        }
        for name, facts in properties.items()
    ]
