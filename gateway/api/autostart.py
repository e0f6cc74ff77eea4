"""Which models are loaded when the gateway starts, as Xinference's clients list and change it.

That is the launches that are kept with `preload`; there is no second list of them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engines.base import Launch
from gateway.api.body import read_object
from gateway.api.wire import MASK, json_answer, launch_body, note_on, read_launch, unmasked
from gateway.deployment import Deployment
from gateway.errors import BadRequest, ModelNotFound, NotFound
from gateway.fleet import Fleet
from registry.decode import decode
from registry.resolve import name_of

WITHOUT_EFFECT = ("priority", "max_retries", "retry_interval_seconds")


class AutostartEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A model to be loaded at start; times in seconds."""

    launch: dict[str, Any]
    enabled: bool = True
    priority: int = 100
    max_retries: int = 3
    retry_interval_seconds: float = 30


class Autostart:
    """The routes below /v1/autostart."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def get(self, request: Request) -> Response:
        """What is loaded at start."""
        return json_answer(self._config())

    async def summary(self, request: Request) -> Response:
        """Every model, whether it is loaded at start, and how it is now."""
        models = [
            {
                "model_uid": deployment.launch.uid,
                "model_name": deployment.launch.artifact.family.model_name,
                "model_type": deployment.launch.artifact.family.model_type,
                "enabled": deployment.launch.preload,
                "status": str(deployment.shown_state),
            }
            for deployment in self._fleet.deployments()
        ]
        return json_answer({"total": len(models), "enabled": sum(m["enabled"] for m in models), "models": models})

    async def upsert(self, request: Request) -> Response:
        """Keep a launch that is loaded at start, or no longer; nothing is loaded or unloaded now."""
        entry = _read_entry(await read_object(request, self._fleet.settings.max_body_bytes))
        given = {key: value for key, value in entry.launch.items() if value is not None}
        known = self._known(given)
        if known is not None and _says_nothing_new(given, known.launch):
            self._fleet.change_preload(known.launch.uid, preload=entry.enabled)
        else:
            self._keep(given, known, entry)
        answer = json_answer(self._config())
        if ignored := [name for name in WITHOUT_EFFECT if getattr(entry, name) != getattr(DEFAULTS, name)]:
            note_on(
                answer, f"{', '.join(ignored)}: no effect; all are loaded at once, and tried `restart_limit` times."
            )
        return answer

    def _keep(self, given: dict[str, Any], known: Deployment | None, entry: AutostartEntry) -> None:
        if known is not None:
            given = unmasked(given, known.launch)
        envs = given.get("envs")
        if known is not None and isinstance(envs, dict):
            kept = known.launch.envs
            given["envs"] = {name: kept.get(name, "") if value == MASK else value for name, value in envs.items()}
        try:
            uid, wish = read_launch(given | {"preload": entry.enabled})
        except ValueError as exc:
            raise BadRequest(str(exc)) from exc
        uid = uid or name_of(wish)
        if not uid:
            raise BadRequest("Invalid input. Please specify the `model_name` field.", param="model_name")
        self._fleet.keep(uid, wish)

    async def remove(self, request: Request) -> Response:
        """A model is no longer loaded at start; it stays as it is now, and loads for its next request."""
        uid = request.path_params["uid"]
        try:
            deployment = self._fleet.find(uid)
        except ModelNotFound as exc:
            raise NotFound(f"{uid!r} is not loaded at start: {exc.message}", param="model_uid") from exc
        if not deployment.launch.preload:
            raise NotFound(f"{uid!r} is not loaded at start.", param="model_uid")
        self._fleet.change_preload(uid, preload=False)
        return json_answer(self._config())

    def _config(self) -> dict[str, Any]:
        preloaded = [d.launch for d in self._fleet.deployments() if d.launch.preload]
        entries = [AutostartEntry(launch=launch_body(launch)) for launch in preloaded]
        return {"version": 1, "enabled": True, "models": entries}

    def _known(self, given: dict[str, Any]) -> Deployment | None:
        uid = given.get("model_uid", given.get("model_name"))
        return next((d for d in self._fleet.deployments() if d.launch.uid == uid), None)


DEFAULTS = AutostartEntry(launch={})


def _read_entry(body: dict[str, Any]) -> AutostartEntry:
    """An entry, or a launch as it is with the entry's fields among its own.

    Raises:
        BadRequest: naming the field and what is allowed.
    """
    entry = {key: value for key, value in body.items() if value is not None}
    if "launch" not in entry:
        own = {key: entry.pop(key) for key in list(entry) if key in AutostartEntry.__struct_encode_fields__}
        entry = own | {"launch": entry}
    try:
        return decode(entry, AutostartEntry, "$", strict=False)
    except ValueError as exc:
        raise BadRequest(f"An entry is {{launch: {{...}}, enabled: true}}: {exc}.") from exc


def _says_nothing_new(given: dict[str, Any], launch: Launch) -> bool:
    """Whether a body names nothing that the launch is not, so that only its start is meant."""
    there = launch_body(launch)
    return all(key == "preload" or there.get(key) == value for key, value in given.items())
