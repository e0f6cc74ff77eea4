"""The difference between what is in effect and what is wished for, as steps. Pure: nothing is done here."""

from __future__ import annotations

import enum
from collections.abc import Container, Iterator, Mapping
from typing import Any

import msgspec

from engines.base import Launch
from gateway.config import Settings

# Fields of a launch by what a change of them takes; of those that are not here the copies have to be started anew.
AT_ONCE = (
    "request_limits",
    "queue_limit",
    "pinned",
    "priority",
    "group",
    "cpu_fallback",
    "preload",
    "sleep_after_s",
    "idle_timeout_s",
    "start_timeout_s",
    "load_timeout_s",
)
TOLD = ("selection", "enable_virtual_env", "virtual_env_packages", "virtual_env_find_links", "is_applied")
COPIES = ("replica",)
BY_KEY = ("options", "forced_options", "envs")
DECIDING = tuple(name for name in Launch.__struct_fields__ if name not in ("uid", *AT_ONCE, *TOLD, *COPIES))
ENGINE_SETTINGS = "settings of the engine"

# Settings by when a change of them takes effect; the others do at once.
AT_NEXT_START = ("host", "port", "home")  # `hostler restart` keeps the door and the data folder
AT_RESTART = ("cache",)
AT_ENGINE_START = ("wheel_folders", "environment_builder", "probe_interval_s", "probe_failures")
OF_MODELS = ("models", "engines")  # shown as changes of the models


class Way(enum.StrEnum):
    """What a step does to a model; from the least to the most."""

    UNTOUCHED = "untouched"
    AT_ONCE = "changed at once"
    SCALED = "copies added or removed"
    RENEWED = "copies started anew, one after the other"
    REPLACED = "all copies started anew, by another engine"
    ADDED = "added"
    REMOVED = "removed"


class Effect(enum.StrEnum):
    """When a change of a setting takes effect."""

    AT_ONCE = "at once"
    AT_ENGINE_START = "at the next start of each engine"
    AT_RESTART = "at the next `hostler restart`"
    AT_NEXT_START = "once the gateway is stopped and started"
    NEVER = "never by this file: it is a setting of the site"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One model: what is served (None: nothing) and what is to be, and by what fields they differ."""

    uid: str
    way: Way
    fields: tuple[str, ...] = ()
    before: Launch | None = None
    after: Launch | None = None


class SettingStep(msgspec.Struct, frozen=True, kw_only=True):
    """One setting of the site that is to change."""

    name: str
    effect: Effect


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """All steps; untouched models too."""

    models: tuple[Step, ...] = ()
    settings: tuple[SettingStep, ...] = ()

    def __str__(self) -> str:
        """What is told in a log."""
        steps = [f"{step.uid} {step.way}" for step in self.models if step.way is not Way.UNTOUCHED]
        steps += [f"{step.name} {step.effect}" for step in self.settings]
        return "; ".join(steps) or "nothing is other than it was"


def starts_alike(one: Launch, other: Launch) -> bool:
    """Whether a copy of either is started in the same way."""
    return all(getattr(one, name) == getattr(other, name) for name in DECIDING)


def steps(now: Mapping[str, Launch], wished: Mapping[str, Launch], newly_configured: Container[str] = ()) -> list[Step]:
    """What makes the wished of what is there now: removals, then changes, then additions, then what stays.

    Args:
        newly_configured: models whose engine has other settings now.
    """
    found = [Step(uid=uid, way=Way.REMOVED, before=launch) for uid, launch in now.items() if uid not in wished]
    for uid, after in wished.items():
        if (before := now.get(uid)) is None:
            found.append(Step(uid=uid, way=Way.ADDED, after=after))
            continue
        fields = tuple(_changed_fields(before, after)) + (ENGINE_SETTINGS,) * (uid in newly_configured)
        found.append(Step(uid=uid, way=_way(fields), fields=fields, before=before, after=after))
    order = (Way.REMOVED, Way.AT_ONCE, Way.SCALED, Way.RENEWED, Way.REPLACED, Way.ADDED, Way.UNTOUCHED)
    return sorted(found, key=lambda step: order.index(step.way))


def setting_steps(now: Settings, wished: Settings) -> list[SettingStep]:
    """What changes of the site's settings, and when that takes effect."""
    return [
        SettingStep(name=name, effect=_effect(name))
        for name in Settings.__struct_fields__
        if name not in OF_MODELS and getattr(now, name) != getattr(wished, name)
    ]


def effective(now: Settings, wished: Settings) -> Settings:
    """The wished settings, but for those that need a restart of the gateway."""
    return msgspec.structs.replace(wished, **{name: getattr(now, name) for name in (*AT_NEXT_START, *AT_RESTART)})


def _effect(name: str) -> Effect:
    if name in AT_NEXT_START:
        return Effect.AT_NEXT_START
    if name in AT_RESTART:
        return Effect.AT_RESTART
    return Effect.AT_ENGINE_START if name in AT_ENGINE_START else Effect.AT_ONCE


def _changed_fields(before: Launch, after: Launch) -> Iterator[str]:
    """Names of fields, or of keys within them, that have other values."""
    for name in (*AT_ONCE, *COPIES, *DECIDING):
        old, new = getattr(before, name), getattr(after, name)
        if name in BY_KEY:
            yield from (f"{name}.{key}" for key in sorted({*old, *new}) if _at(old, key) != _at(new, key))
        elif old != new:
            yield name


def _at(values: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    return key in values, values.get(key)


def _way(fields: tuple[str, ...]) -> Way:
    names = {field.partition(".")[0] for field in fields}
    if not names:
        return Way.UNTOUCHED
    if "engine" in names:
        return Way.REPLACED
    if names - {*AT_ONCE, *COPIES}:
        return Way.RENEWED
    return Way.SCALED if names & {*COPIES} else Way.AT_ONCE
