"""The launch history of the console's forms."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.body import read_object
from gateway.api.wire import json_answer
from gateway.errors import BadRequest, CannotKeep, NotFound
from gateway.fleet import Fleet
from gateway.history import Entry, LaunchHistory
from registry.decode import decode


class History:
    """The routes below /v1/launch_history."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._history = LaunchHistory(fleet.settings.home_path / "launch_history.json")

    async def list_all(self, request: Request) -> Response:
        """What was launched, the newest first."""
        return json_answer(self._history.entries())

    async def add(self, request: Request) -> Response:
        """Remember a launch: model_name, model_uid, data."""
        body = await read_object(request, self._fleet.settings.max_body_bytes)
        try:
            entry = decode({key: value for key, value in body.items() if value is not None}, Entry)
            if not entry.model_name:
                raise BadRequest("`model_name` is missing.", param="model_name")
            self._history.add(entry)
        except ValueError as exc:
            raise BadRequest(f"The entry cannot be kept: {exc}") from exc
        except OSError as exc:
            raise CannotKeep(f"The launch history cannot be written: {exc.strerror}. Mend that first.") from exc
        return json_answer({"status": "ok"})

    async def remove(self, request: Request) -> Response:
        """Forget the launches of a name, or one of them by its uid."""
        name, uid = request.path_params["model_name"], request.path_params.get("model_uid")
        try:
            if not self._history.remove(name, uid):
                raise NotFound(f"The launch history has nothing of {name}{f' as {uid}' if uid else ''}.")
        except OSError as exc:
            raise CannotKeep(f"The launch history cannot be written: {exc.strerror}. Mend that first.") from exc
        return json_answer({"status": "ok"})
