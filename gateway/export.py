"""All that is served as one settings file. Pure: data in, data out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from engines.base import Launch
from gateway.apply import AT_NEXT_START, AT_RESTART, steps
from gateway.config import Settings, escaped
from gateway.launch import LaunchRequest, request_of

NOT_EXPORTED = (*AT_NEXT_START, *AT_RESTART, "api_keys", "models")
SECRET_OPTIONS = ("api_key", "headers", "env")  # of engines; their values are not shown
# Values of variables that tell nothing, unless the variable's name says otherwise.
HARMLESS = re.compile(r"[-+]?\d{1,9}(\.\d*)?|true|false|on|off|yes|no|auto|debug|info|warning|error|", re.IGNORECASE)
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH|CRED|PIN|PAT\b", re.IGNORECASE)


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """The file's data; `variables` stand in it for secrets, and `notes` tell what it does not say."""

    settings: dict[str, Any]
    variables: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def export(settings: Settings, launches: Iterable[Launch], *, with_secrets: bool) -> Exported:
    """The settings that are not the defaults, and every model: as its settings say, or else as its launch was made."""
    notes: list[str] = []
    data = {
        name: _plain(getattr(settings, name))
        for name in Settings.__struct_fields__
        if name not in NOT_EXPORTED and getattr(settings, name) != getattr(Settings(), name)
    }
    if settings.api_keys:
        notes.append("api_keys are left out: they are for those who hold one, and not for whoever has the file.")
    requests = {launch.uid: settings.models.get(launch.uid) or request_of(launch) for launch in launches}
    data["models"] = {uid: _plain(request) for uid, request in requests.items()}
    data = escaped(data)
    if with_secrets:
        return Exported(settings=data, notes=tuple(notes))
    variables: dict[str, str] = {}
    data["models"] = {uid: _without_secrets(uid, model, variables) for uid, model in data["models"].items()}
    if variables:
        notes.append(
            "Secrets are left out: set " + ", ".join(variables) + " in the environment of whoever uses the file, or "
            "write it with --with-secrets."
        )
    return Exported(settings=data, variables=tuple(variables), notes=tuple(notes))


def differs(launch: Launch, again: Launch) -> str | None:
    """By which fields a launch that was made of the exported request is another; None: it is the same."""
    (step,) = steps({launch.uid: launch}, {launch.uid: again})
    return ", ".join(step.fields) or None


def _plain(value: Any) -> Any:
    """As it is written in a file; what is not said stays unsaid."""
    if isinstance(value, LaunchRequest):  # leaves its defaults out
        return {key: one for key, one in json.loads(msgspec.json.encode(value)).items() if one is not None}
    data = json.loads(msgspec.json.encode(value))
    if isinstance(data, dict):
        return {
            key: {name: one for name, one in inner.items() if one is not None} if isinstance(inner, dict) else inner
            for key, inner in data.items()
        }
    return data


def _without_secrets(uid: str, model: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    """The model with references for what may be secret; `variables` gets their names, and what they stand for."""

    def reference(name: str, value: Any) -> str:
        variable = re.sub(r"[^A-Za-z0-9_]", "_", name)
        variable = f"_{variable}" if variable[:1].isdigit() else variable
        while variables.setdefault(variable, str(value)) != str(value):
            variable = f"{re.sub(r'[^A-Za-z0-9]', '_', uid).upper()}_{variable}"
            variable = f"_{variable}" if variable[:1].isdigit() else variable
        return f"${{{variable}}}"

    def without(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: reference(key, one) for key, one in value.items()}
        return reference(name, value) if isinstance(value, str) else value

    kept = dict(model)
    if "envs" in model:
        kept["envs"] = {
            name: value if HARMLESS.fullmatch(value) and not SECRET_NAME.search(name) else reference(name, value)
            for name, value in model["envs"].items()
        }
    if "options" in model:
        kept["options"] = {
            name: without(name, value) if name in SECRET_OPTIONS else value for name, value in model["options"].items()
        }
    return kept
