"""Flexible models: what a launcher makes answers `POST /v1/flexible/infers`.

Launchers written for Xinference find its classes FlexibleModel and FlexibleModelSpec here, if it is not installed.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import datetime
import importlib
import importlib.util
import inspect
import io
import json
import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from types import ModuleType
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from engines.workers.server import Order, Refused, Turns, read_json, serve, unless_client_leaves

MODULE = "xinference.model.flexible"


class FlexibleModelSpec:
    """A family as launchers read it: its JSON's keys as attributes, `model_uri` being the folder of its files."""

    model_uri: str | None = None
    launcher_args: str | None = None

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def parser_args(self) -> dict[str, Any]:
        """The arguments of its launcher."""
        args: dict[str, Any] = json.loads(self.launcher_args) if self.launcher_args else {}
        return args


class FlexibleModel:
    """What launchers derive their models from."""

    def __init__(
        self,
        model_uid: str,
        model_path: str,
        model_family: FlexibleModelSpec,
        device: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.model_uid, self.model_path, self.model_family = model_uid, model_path, model_family
        self.device, self.config = device, config

    def load(self) -> None:
        """Make ready to infer."""

    def infer(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a request."""
        raise NotImplementedError(f"{type(self).__name__} has no infer")


# --- the launcher under Xinference's name `transformers`


class _Pipeline(FlexibleModel):
    def load(self) -> None:
        pipeline = importlib.import_module("transformers").pipeline
        self._pipeline = pipeline(model=self.model_path, device=self.device, **(self.config or {}))

    def infer(self, *args: Any, **kwargs: Any) -> Any:
        return self._pipeline(*args, **kwargs)


class _Mirror(FlexibleModel):
    def infer(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs


def transformers(
    model_uid: str, model_spec: FlexibleModelSpec, device: str | None = None, **config: Any
) -> FlexibleModel:
    """A pipeline of transformers for `task`, with whatever else a pipeline takes; task `mock` gives back its input."""
    if config.get("task") == "mock":
        return _Mirror(model_uid, model_spec.model_uri or "", model_spec, device, config)
    if not model_spec.model_uri:
        raise Refused("The transformers launcher loads files: register the model with model_uri or model_id.")
    return _Pipeline(model_uid, model_spec.model_uri, model_spec, device, config)


BUILTIN: dict[str, Callable[..., Any]] = {f"{MODULE}.launchers.transformers": transformers}


# --- finding and running one


def load(order: Order) -> list[BaseRoute]:
    """The model that the launcher makes, loaded.

    Raises:
        Refused: there is no such launcher, it may not run, or it cannot load the model.
    """
    launcher, spec = order.options["launcher"], FlexibleModelSpec(**order.options["spec"])
    if launcher not in order.options["allowed"]:
        raise Refused(f"The launcher {launcher!r} is not among `flexible_launchers`.")
    launch = BUILTIN.get(launcher) or _named(launcher)
    try:
        model = launch(model_uid=order.uid, model_spec=spec, **order.options["args"])
        if not callable(getattr(model, "infer", None)):
            raise Refused(f"The launcher {launcher} returned {type(model).__name__}, which has no `infer`.")
        if callable(getattr(model, "load", None)):
            model.load()
    except ImportError as exc:
        where = (
            "Say `hostler engines install transformers`"
            if launcher in BUILTIN
            else "Name it in the model's `virtualenv`"
        )
        raise Refused(
            f"The launcher {launcher} needs what {sys.executable} does not have: {exc}. {where}, or name a Python "
            "that has it as `engines.flexible.python` in the settings."
        ) from exc
    except Refused:
        raise
    except Exception as exc:  # the launcher is a stranger's
        raise Refused(f"The launcher {launcher} cannot load the model: {type(exc).__name__}: {exc}") from exc
    return [Route("/v1/flexible/infers", _Infers(model).answer, methods=["POST"])]


def _named(launcher: str) -> Callable[..., Any]:
    if importlib.util.find_spec("xinference") is None:
        _pose_as_xinference()
    module, _, name = launcher.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or launcher), name if module else "launcher")
    except ImportError as exc:
        raise Refused(
            f"The launcher {launcher} cannot be imported by {sys.executable}: {exc}. Install its package there, or "
            "name another Python as `engines.flexible.python` in the settings."
        ) from exc
    except AttributeError as exc:
        raise Refused(f"There is no launcher {launcher}: {exc}.") from exc
    found = getattr(found, "launcher", found) if isinstance(found, ModuleType) else found
    if not callable(found):
        raise Refused(f"The launcher {launcher} is a {type(found).__name__} and no function.")
    function: Callable[..., Any] = found
    return function


def _pose_as_xinference() -> None:
    """The modules from which launchers import the two classes."""
    for name in ("xinference", "xinference.model", MODULE, f"{MODULE}.core"):
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(FlexibleModel=FlexibleModel, FlexibleModelSpec=FlexibleModelSpec)
        sys.modules[name] = module


class _Infers:
    """Requests, one after the other; those of a coroutine function all at once."""

    def __init__(self, model: Any) -> None:
        self._infer = model.infer
        self._turns = Turns()
        self._is_async = inspect.iscoroutinefunction(model.infer)

    async def answer(self, request: Request) -> Response:
        body = await read_json(request)
        body.pop("model", None)
        args = body.pop("args", None) or []
        if not isinstance(args, list):
            raise Refused("`args` is a list of the positional arguments.", param="args")
        text = await unless_client_leaves(request, self._infer_as_text(args, body))
        return Response(text, media_type="application/json")

    async def _infer_as_text(self, args: list[Any], kwargs: dict[str, Any]) -> str:
        try:
            inspect.signature(self._infer).bind(*args, **kwargs)
        except TypeError as exc:
            raise Refused(f"The model's `infer` takes other arguments: {exc}.") from exc
        if self._is_async:
            return await asyncio.to_thread(_as_text, await self._infer(*args, **kwargs))

        def job(cancel: threading.Event) -> str:
            return _as_text(self._infer(*args, **kwargs))

        return await self._turns.run(job)


# --- results as JSON


def _as_text(result: Any) -> str:
    return json.dumps(as_json(result), ensure_ascii=False, allow_nan=False)


def as_json(value: Any) -> Any:
    """A result as plain data: arrays as lists, bytes and pictures (PNG) in base64, what is no number as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if type(value).__module__.partition(".")[0] == "PIL":
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()
    if callable(getattr(value, "tolist", None)):  # arrays and numbers of numpy, tensors of torch
        return as_json(value.tolist())
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return as_json(value.model_dump())
    if isinstance(value, Iterable):
        return [as_json(one) for one in value]
    raise TypeError(f"The launcher's model returned {type(value).__name__}, which has no form in JSON")


if __name__ == "__main__":
    serve(load)
