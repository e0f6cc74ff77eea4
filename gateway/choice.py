"""Why a launch got its engine: what each engine says of it. Pure; `gateway/launch.py` makes the choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from engines.base import Engine, Launch
from gateway.errors import RequestRefused
from gateway.launch import LaunchRequest

Planner = Callable[[LaunchRequest], Launch]


def engine_answers(engines: Sequence[Engine], request: LaunchRequest, plan: Planner) -> dict[str, str | None]:
    """For each engine of the model's type why it could not serve the request if it were named there; None if it could.

    Engines that run only what names them are no answer.

    Args:
        plan: makes a launch of a request, or raises ValueError or RequestRefused with the reason.
    """
    answers: dict[str, str | None] = {}
    for engine in engines:
        if engine.by_name_only or request.model_type not in engine.model_types:
            continue
        try:
            plan(msgspec.structs.replace(request, model_engine=engine.name))
        except (ValueError, RequestRefused) as exc:
            answers[engine.name] = str(exc)
        else:
            answers[engine.name] = None
    return answers


def why_this_engine(chosen: str, answers: Mapping[str, str | None]) -> str:
    """A sentence on why an engine was chosen that the launch did not name."""
    able = [name for name, reason in answers.items() if reason is None]
    if len(answers) == 1:
        return "it is the only engine there is."
    others = [name for name in able if name != chosen]
    if not others:
        return f"of {len(answers)} engines it is the only one that can run this here."
    return f"of those that can run this here it is the first by preference; {', '.join(others)} could too."
