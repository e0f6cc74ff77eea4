"""The files that were fetched, and the Python environments of models, as Xinference's clients list and remove them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from engines.requirements import same_name
from gateway import environments
from gateway.api.wire import json_answer, version_of
from gateway.environments import EnvironmentInUse, Listed
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
        in_use = {
            source: d.launch.uid
            for d in self._fleet.deployments()
            if d.is_loaded
            for source in d.launch.artifact.sources
        }
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
        """The environments of models; one that several share is told for each."""
        found = await self._environments(request.query_params)
        return json_answer({"list": [_environment_entry(listed, user) for listed, user in found]})

    async def remove_virtualenv(self, request: Request) -> Response:
        """Delete those of a model, unless it is served from them; what others share stays for them."""
        wanted = request.query_params
        if not wanted.get("model_name"):
            raise BadRequest("`model_name` says whose environment is to be removed.", param="model_name")
        found = await self._environments(wanted)
        in_use = {
            d.launch.environment.folder_name: d.launch.uid
            for d in self._fleet.deployments()
            if d.is_loaded and d.launch.environment and d.launch.environment.model == wanted["model_name"]
        }
        for listed, _ in found:
            if uid := in_use.get(listed.fingerprint):
                raise InUse(f"The environment {listed.fingerprint} is in use by {uid}. Say `hostler stop {uid}` first.")
        try:
            for listed, user in found:
                folder = self._fleet.settings.environments_path
                await asyncio.to_thread(environments.remove_for, user, listed.fingerprint, folder)
        except EnvironmentInUse as exc:
            raise InUse(str(exc)) from exc
        return json_answer({"result": bool(found)})

    async def _environments(self, wanted: Mapping[str, str]) -> list[tuple[Listed, tuple[str, str | None]]]:
        """Those of models that fit the query, with the (engine, model) that each is for."""
        known = await asyncio.to_thread(environments.list_environments, self._fleet.settings.environments_path)
        return [
            (listed, (engine, model))
            for listed in known
            for engine, model in listed.users
            if model is not None
            and wanted.get("model_name") in (None, "", model)
            and same_name(wanted.get("model_engine") or engine) == same_name(engine)
            and (wanted.get("python_version") or listed.python_version) == listed.python_version
        ]

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
            for source in artifact.possible_sources:
                versions = known.setdefault(source, {})
                versions.setdefault(version_of(artifact.family, artifact.spec), (artifact.family, artifact.spec))
        return {source: list(versions.values()) for source, versions in known.items()}


def _environment_entry(listed: Listed, user: tuple[str, str | None]) -> dict[str, Any]:
    engine, model = user
    return {
        "model_name": model,
        "model_engine": engine,
        "path": str(listed.path),
        "real_path": str(listed.path),
        "python_version": listed.python_version,
        "actor_ip_address": None,
        "size_bytes": listed.size_bytes,
        "last_used": listed.last_used,
        "packages": listed.packages,
        "is_whole": listed.is_whole,
    }


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
