"""The files that were fetched, and the Python environments of models, as Xinference's clients list and remove them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.wire import json_answer, version_of
from gateway.errors import BadRequest, InUse
from gateway.fleet import Fleet
from registry import cache
from registry.cache import Cached
from registry.hubs.base import HubError
from registry.resolve import NotResolved, Selection, candidates
from registry.schema import ModelFamily, ModelSpec, Source

OfVersion = tuple[ModelFamily, ModelSpec]


class CachedFiles:
    """The routes below /v1/cache and /v1/virtualenvs."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def list_all(self, request: Request) -> Response:
        """What is here, whole."""
        wanted = request.query_params.get("model_name")
        entries = await asyncio.to_thread(self._entries)
        return json_answer({"list": [entry for entry in entries if wanted in (None, entry["model_name"])]})

    async def files(self, request: Request) -> Response:
        """The files of a version, which a removal would delete."""
        version = request.query_params.get("model_version", "")
        found = await asyncio.to_thread(self._find, version)
        paths = [str(path) for cached in found for path in cached.files]
        return json_answer({"model_version": version, "worker_ip": None, "paths": paths})

    async def remove(self, request: Request) -> Response:
        """Delete a version's files, unless a model of it is served."""
        version = request.query_params.get("model_version", "")
        found = await asyncio.to_thread(self._find, version)
        in_use = {d.launch.artifact.source: d.launch.uid for d in self._fleet.deployments() if d.is_loaded}
        for cached in found:
            if uid := in_use.get(cached.source):
                raise InUse(f"{version} is in use by {uid}. Say `hostler stop {uid}` first.")
        try:
            for cached in found:
                await asyncio.to_thread(cache.remove, self._fleet.settings.cache_path, cached.digest)
        except HubError as exc:
            raise InUse(str(exc)) from exc
        return json_answer({"result": bool(found)})

    async def remove_leftovers(self, request: Request) -> Response:
        """Delete what fetches that are no more have left half-done."""
        freed = await asyncio.to_thread(cache.remove_leftovers, self._fleet.settings.cache_path)
        return json_answer({"freed_bytes": freed})

    async def list_virtualenvs(self, request: Request) -> Response:
        """None: no engine here has an environment of a model's own yet."""
        return json_answer({"list": []})

    async def remove_virtualenv(self, request: Request) -> Response:
        """There is none to remove."""
        if not request.query_params.get("model_name"):
            raise BadRequest("`model_name` says whose environment is to be removed.", param="model_name")
        return json_answer({"result": False})

    def _entries(self) -> list[dict[str, Any]]:
        """Every source that is here, once for each version that is made of it."""
        known = self._known_sources()
        return [
            _entry(cached, of_version)
            for cached in cache.list_cached(self._fleet.settings.cache_path)
            for of_version in known.get(cached.source) or (None,)
        ]

    def _find(self, version: str) -> list[Cached]:
        known = self._known_sources()
        return [
            cached
            for cached in cache.list_cached(self._fleet.settings.cache_path)
            if version in {_entry(cached, one)["model_version"] for one in known.get(cached.source) or (None,)}
        ]

    def _known_sources(self) -> dict[Source, list[OfVersion]]:
        """The versions that are made of each source, of those that are served and those of the registry."""
        known: dict[Source, dict[str, OfVersion]] = {}
        registry = self._fleet.registry
        artifacts = [deployment.launch.artifact for deployment in self._fleet.deployments()]
        for model_type in registry.types:
            for family in registry.list(model_type):
                with contextlib.suppress(NotResolved):
                    artifacts += candidates(registry, Selection(model_name=family.model_name, model_type=model_type))
        for artifact in artifacts:
            versions = known.setdefault(artifact.source, {})
            versions.setdefault(version_of(artifact.family, artifact.spec), (artifact.family, artifact.spec))
        return {source: list(versions.values()) for source, versions in known.items()}


def _entry(cached: Cached, known: OfVersion | None) -> dict[str, Any]:
    family, spec = known or (None, None)
    return {
        "model_name": family.model_name if family else cached.source.model_id,
        "model_type": family.model_type if family else None,
        "model_engine": None,
        "model_size_in_billions": spec.model_size_in_billions if spec else None,
        "model_format": spec.model_format if spec else None,
        "quantization": spec.quantization if spec else None,
        "model_version": version_of(family, spec) if family and spec else cached.digest,
        "path": str(cached.path),
        "real_path": str(cached.path),
        "actor_ip_address": None,
        "size_bytes": cached.size_bytes,
        "last_used": cached.last_used,
        "model_hub": cached.source.model_hub,
    }
