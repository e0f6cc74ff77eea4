"""What models exist: registrations of users and families of the catalogue, as Xinference's clients ask for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engines.base import Engine
from engines.environments import asks_for
from gateway.api.body import read_body, read_object
from gateway.api.wire import json_answer, note_on, version_of
from gateway.errors import BadRequest, CannotKeep
from gateway.fleet import Fleet, refresh_registry
from registry import cache
from registry.decode import did_you_mean
from registry.draft import draft
from registry.hubs.choose import TRUE
from registry.registry import RegistrationRefused
from registry.resolve import Artifact, NotResolved, Selection, candidates
from registry.schema import FAMILIES, GGUF, LLMFamily, ModelFamily, ModelSpec, Source, encode_family

logger = logging.getLogger("hostler.registrations")

IN_GGUF_FILES = ("stop_token_ids", "reasoning_start_tag", "reasoning_end_tag", "tool_parser")
ABILITIES_TOLD = ("chat", "generate", "tools", "vision", "reasoning", "audio", "omni", "hybrid")


class RegistrationBody(msgspec.Struct, frozen=True, kw_only=True):
    """What a client sends to register a model: its JSON as text, or as it is."""

    model: str | dict[str, Any]
    persist: bool
    worker_ip: str | None = None


class Registrations:
    """The routes below /v1/model_registrations and /v1/engines, and what is asked of the catalogue."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._registry = fleet.registry
        self._read = msgspec.json.Decoder(RegistrationBody, strict=False).decode

    async def register(self, request: Request) -> Response:
        """Add a model. What was read otherwise than it was written is told in the header x-hostler-notes."""
        content = await read_body(request.scope, request.receive, self._fleet.settings.max_body_bytes)
        try:
            body = self._read(content)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise BadRequest(
                f'The body is {{"model": "<the model\'s JSON>", "persist": true or false}}: {exc}.'
            ) from exc
        try:
            registered = await asyncio.to_thread(
                self._registry.register, request.path_params["model_type"], body.model, persist=body.persist
            )
        except RegistrationRefused as exc:
            raise BadRequest(str(exc)) from exc
        except OSError as exc:
            raise CannotKeep(f"The registration cannot be kept: {exc}. Mend that first.") from exc
        notes = " ".join([*registered.lifted, *_without_effect(registered.family)])
        if notes:
            logger.info("%s was registered. %s", registered.family.model_name, notes)
        answer = json_answer(None)
        if notes:
            note_on(answer, notes)
        return answer

    async def unregister(self, request: Request) -> Response:
        """Forget a registration; a model of it that runs goes on. An unknown name is no error."""
        try:
            await asyncio.to_thread(
                self._registry.unregister, request.path_params["model_type"], request.path_params["model_name"]
            )
        except RegistrationRefused as exc:
            raise BadRequest(str(exc)) from exc
        except OSError as exc:
            raise CannotKeep(f"The registration cannot be deleted: {exc}.") from exc
        return json_answer(None)

    async def list_all(self, request: Request) -> Response:
        """All families of a type, by name; with detailed=true all that is known of each."""
        model_type = self._known_type(request.path_params["model_type"])
        families = sorted(self._registry.list(model_type), key=lambda family: family.model_name.lower())
        if request.query_params.get("detailed", "").lower() in ("true", "1", "yes"):
            here = await asyncio.to_thread(self._here)
            details = []
            for family in families:  # in small steps, so that streams go on meanwhile
                details.append(await asyncio.to_thread(self._detailed, family, here))
            return json_answer(details)
        return json_answer([{"model_name": f.model_name, "is_builtin": self._registry.is_builtin(f)} for f in families])

    async def get(self, request: Request) -> Response:
        """One family, as JSON."""
        return json_answer(self._encoded(self._family(request)))

    async def versions(self, request: Request) -> Response:
        """The specs of a family as versions; none for an unknown name."""
        family = self._registry.find(request.path_params["model_name"], request.path_params["model_type"])
        return json_answer(await asyncio.to_thread(self._versions, family) if family else [])

    async def engines(self, request: Request) -> Response:
        """For each engine what it could run of a family, or why it can not; null for an unknown name."""
        model_type = request.path_params.get("model_type", "LLM")
        family = self._registry.find(request.path_params["model_name"], model_type)
        if family is None:
            return json_answer(None)
        artifacts = await asyncio.to_thread(self._artifacts, family)
        known = [
            engine
            for engine in self._fleet.engines
            if family.model_type in engine.model_types and not engine.by_name_only
        ]
        wish = request.query_params.get("enable_virtual_env")
        is_on = self._fleet.settings.model_environments if wish is None else wish.lower() in TRUE
        packages = family.virtualenv.packages if is_on and family.virtualenv else ()
        return json_answer({engine.name: _offers(engine, artifacts, packages) for engine in known})

    async def families(self, request: Request) -> Response:
        """Ability -> the names of the language models that have it."""
        return json_answer({ability: self._names_with(ability) for ability in ABILITIES_TOLD})

    async def vllm_supported(self, request: Request) -> Response:
        """Language models whose architecture is known and whose weights vLLM can load."""
        loadable = [
            family
            for family in self._registry.list("LLM")
            if isinstance(family, LLMFamily)
            and family.architectures
            and any(spec.model_format not in ("ggufv2", "mlx") for spec in family.specs)
        ]
        return json_answer(
            {
                ability: sorted(family.model_name for family in loadable if ability in family.abilities)
                for ability in ("chat", "generate")
            }
        )

    async def prompts(self, request: Request) -> Response:
        """Family -> how its prompts end and reason. Templates come with the models' files, and are null here."""
        fields = ("chat_template", "stop_token_ids", "stop", "reasoning_start_tag", "reasoning_end_tag", "tool_parser")
        return json_answer(
            {
                family.model_name: {field: getattr(family, field) for field in fields}
                for family in self._registry.list("LLM")
                if "chat" in family.abilities
            }
        )

    async def update_type(self, request: Request) -> Response:
        """Read the site's catalogues again, those behind URLs too."""
        body = await read_object(request, self._fleet.settings.max_body_bytes)
        model_type = self._known_type(str(body.get("model_type", "LLM")))
        n_files = await asyncio.to_thread(refresh_registry, self._registry, self._fleet.settings)
        n_builtin = sum(self._registry.is_builtin(family) for family in self._registry.list(model_type))
        message = f"{n_builtin} {model_type} models come with this version; `catalogue_files` lays others over them."
        if n_files:
            several = "s" * (n_files != 1)
            message = f"{n_files} catalogue{several} of the site read again; it has {n_builtin} {model_type} models."
        return json_answer({"data": {"model_type": model_type, "message": message}})

    async def draft(self, request: Request) -> Response:
        """A registration drafted from a model's folder, to be looked over; nothing is registered."""
        body = await read_object(request, self._fleet.settings.max_body_bytes)
        for field in ("model_path", "model_family"):
            if not isinstance(body.get(field), str) or not body[field]:
                raise BadRequest(f"`{field}` is a text.", param=field)
        try:
            folder = await asyncio.to_thread(self._allowed_folder, body["model_path"])
            return json_answer(await asyncio.to_thread(draft, folder, body["model_family"], self._registry))
        except (OSError, ValueError) as exc:
            raise BadRequest(f"Nothing can be drafted: {exc}", param="model_path") from exc

    def _allowed_folder(self, path: str) -> Path:
        """The folder, links followed, if it lies where models may be read from.

        Raises:
            ValueError: it does not, or it is no folder. Of what lies elsewhere nothing is said.
        """
        settings = self._fleet.settings
        roots = [settings.cache_path, *(Path(root).expanduser() for root in settings.model_roots)]
        folder = Path(path.removeprefix("file://"))
        real = folder.resolve()
        if not folder.is_absolute() or not any(real.is_relative_to(root.resolve()) for root in roots):
            raise ValueError(
                f"{path} lies neither in the cache ({settings.cache_path}) nor in one of `model_roots`. Add its "
                "folder there."
            )
        if not real.is_dir():
            raise ValueError(f"{path} is no folder.")
        return real

    # -- helpers of the routes

    def _known_type(self, model_type: str) -> str:
        if model_type not in FAMILIES:
            raise BadRequest(f"Unsupported model type: {model_type}. {did_you_mean(model_type, FAMILIES)}")
        return model_type

    def _family(self, request: Request) -> ModelFamily:
        model_type = self._known_type(request.path_params["model_type"])
        name = request.path_params["model_name"]
        family = self._registry.find(name, model_type)
        if family is None:
            hint = did_you_mean(name, self._registry.names(model_type))
            raise BadRequest(f"Model {name} not found. {hint}")
        return family

    def _encoded(self, family: ModelFamily) -> dict[str, Any]:
        return encode_family(family) | {"is_builtin": self._registry.is_builtin(family)}

    def _detailed(self, family: ModelFamily, here: set[Source]) -> dict[str, Any]:
        sources = self._sources(family)
        specs = [
            msgspec.to_builtins(spec) | {"cache_status": _source_of(spec, sources) in here} for spec in family.specs
        ]
        hubs = sorted({spec.model_hub for spec in family.specs if spec.model_id})
        return self._encoded(family) | {"model_specs": specs, "download_hubs": hubs}

    def _versions(self, family: ModelFamily) -> list[dict[str, Any]]:
        here, sources = self._here(), self._sources(family)
        return [
            {
                "model_version": version_of(family, spec),
                "model_file_location": None,
                "cache_status": _source_of(spec, sources) in here,
                "quantization": spec.quantization,
                "model_format": spec.model_format,
                "model_size_in_billions": spec.model_size_in_billions,
                "multimodal_projector": None,
            }
            for spec in family.specs
        ]

    def _here(self) -> set[Source]:
        """The sources whose files are in the cache, whole."""
        return {cached.source for cached in cache.list_cached(self._fleet.settings.cache_path)}

    def _sources(self, family: ModelFamily) -> list[tuple[ModelSpec, Source]]:
        return [(artifact.spec, artifact.source) for artifact in self._artifacts(family)]

    def _artifacts(self, family: ModelFamily) -> list[Artifact]:
        wish = Selection(model_name=family.model_name, model_type=family.model_type)
        try:
            return list(candidates(self._registry, wish))
        except NotResolved:
            return []

    def _names_with(self, ability: str) -> list[str]:
        return sorted(f.model_name for f in self._registry.list("LLM") if ability in f.abilities)


def _without_effect(family: ModelFamily) -> list[str]:
    """What is kept of a registration and changes nothing: llama.cpp goes by the model's file."""
    if any(spec.model_format != GGUF for spec in family.specs):
        return []
    fields = [name for name in IN_GGUF_FILES if getattr(family, name, None)]
    return [f"{', '.join(fields)}: kept; llama.cpp goes by what the model's file says."] if fields else []


def _source_of(spec: ModelSpec, sources: list[tuple[ModelSpec, Source]]) -> Source | None:
    return next((source for known, source in sources if known == spec), None)


def _offers(engine: Engine, artifacts: list[Artifact], packages: Sequence[str]) -> list[dict[str, Any]] | str:
    """What the engine could run, grouped as clients show it; else its reason.

    Args:
        packages: of the model's own environment, which may bring the engine.
    """
    if not asks_for(engine.name, packages) and (reason := engine.installed()):
        return reason
    refusals = [engine.accepts(artifact) for artifact in artifacts]
    specs = [artifact.spec for artifact, refusal in zip(artifacts, refusals, strict=True) if refusal is None]
    if not specs:
        return next((refusal for refusal in refusals if refusal), "no source of it can be used here")
    name = artifacts[0].family.model_name
    grouped: dict[tuple[str, Any], list[str]] = {}
    for spec in specs:
        quantizations = grouped.setdefault((spec.model_format, spec.model_size_in_billions), [])
        if spec.quantization not in quantizations:
            quantizations.append(spec.quantization)
    return [
        {
            "model_name": name,
            "model_format": model_format,
            "model_size_in_billions": size,
            "quantizations": quantizations,
            "quantization": quantizations[0],
        }
        for (model_format, size), quantizations in grouped.items()
    ]
