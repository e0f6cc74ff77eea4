"""The settings of the running gateway: which they are, another file's models over them, and all of it as one file."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engines.base import Launch
from gateway.api.body import read_object
from gateway.api.wire import MASK, json_answer, shown_options
from gateway.apply import ENGINE_SETTINGS, Difference, Step
from gateway.config import Settings
from gateway.errors import BadRequest, Forbidden, SettingsError
from gateway.fleet import Fleet
from registry.decode import decode


class ApplyBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`settings` as in a settings file, with nothing left in it to refer to; None: read the gateway's own again."""

    settings: dict[str, Any] | None = None
    dry_run: bool = False


class Config:
    """The routes below /v1/config."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def get(self, request: Request) -> Response:
        """Which file the gateway was started with, its digest, and what came of reading it again."""
        source = self._fleet.source
        return json_answer(
            {
                "file": None if source.file is None else str(source.file),
                "sha256": await asyncio.to_thread(source.digest),
                "watch_settings": self._fleet.settings.watch_settings,
                "taken_up": self._fleet.taken_up,
            }
        )

    async def apply(self, request: Request) -> Response:
        """Take up settings, or say what that would do. What takes time goes on after the answer."""
        body = await read_object(request, self._fleet.settings.max_body_bytes)
        try:
            wish = decode(body, ApplyBody, strict=False)
            if wish.settings is None:
                difference = await self._fleet.reread(is_trial=wish.dry_run)
            else:
                # Groups are of the site: a file need not repeat those that its models belong to.
                given = {"groups": self._fleet.settings.groups} | wish.settings
                settings = decode(msgspec.to_builtins(given), Settings, strict=False)
                difference = await self._fleet.apply(settings, names=list(wish.settings), is_trial=wish.dry_run)
        except ValueError as exc:
            raise BadRequest(f"Nothing was changed. {exc}") from exc
        except (SettingsError, BadRequest) as exc:
            raise BadRequest(f"Nothing was changed. {exc.message}") from exc
        return json_answer(_told(difference) | {"dry_run": wish.dry_run})

    async def export(self, request: Request) -> Response:
        """All that is served as one settings file."""
        with_secrets = request.query_params.get("with_secrets", "").lower() in ("1", "true", "yes")
        if with_secrets and not self._fleet.settings.api_keys:
            raise Forbidden(
                "Without `api_keys` whoever reaches this gateway could read its secrets. Set some, or fill in the "
                "references of an export without secrets."
            )
        return json_answer(await asyncio.to_thread(self._fleet.export, with_secrets=with_secrets))


def _told(difference: Difference) -> dict[str, Any]:
    return {
        "models": [
            {"uid": step.uid, "step": step.way, "fields": [_field(step, name) for name in step.fields]}
            for step in difference.models
        ],
        "settings": [{"name": step.name, "takes_effect": step.effect} for step in difference.settings],
    }


def _field(step: Step, name: str) -> dict[str, Any]:
    if name == ENGINE_SETTINGS:
        return {"name": name}
    return {"name": name, "before": _shown(step.before, name), "after": _shown(step.after, name)}


def _shown(launch: Launch | None, field: str) -> Any:
    """A value of a launch, for people; secrets are masked."""
    assert launch is not None  # a field differs between two
    name, _, key = field.partition(".")
    match name:
        case "options" | "forced_options":
            return shown_options(launch).get(key)
        case "envs":
            return MASK if key in launch.envs else None
        case "artifact":
            artifact = launch.artifact
            size = artifact.spec.model_size_in_billions
            parts = (artifact.family.model_name, size, artifact.spec.model_format, artifact.spec.quantization)
            place = f"{artifact.source.model_hub}:{artifact.source.model_id}"
            return f"{' '.join(str(part) for part in parts if part)} of {place}"
        case "environment":
            return None if launch.environment is None else list(launch.environment.packages)
    return getattr(launch, name)
