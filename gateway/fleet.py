"""All deployments, by uid: launch, terminate, restore at start. Owns the tasks that drive them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

import engines
from engines.base import Engine, EngineSettings, Launch, Placement
from gateway.config import Settings
from gateway.deployment import Deployment
from gateway.environments import Recipe, is_offline_build
from gateway.errors import BadRequest, CannotKeep, ModelNotFound, SettingsError, ShuttingDown
from gateway.files import Files
from gateway.gpus import cuda_version
from gateway.launch import LaunchRequest, Site, file_name, plan
from gateway.nodes.local import LocalNode, open_node
from gateway.replica import Replica
from gateway.store import Store
from registry.decode import did_you_mean
from registry.hubs.choose import TRUE
from registry.registry import Registry

logger = logging.getLogger("hostler.fleet")

SKIP_INSTALLED_VARIABLE = "XINFERENCE_VIRTUAL_ENV_SKIP_INSTALLED"
EVENTS_PER_MODEL = 100
MODELS_WITH_EVENTS = 1000


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a model; `event_ts` in seconds since the epoch."""

    event_type: str
    event_ts: int
    event_content: str


class EventLog:
    """The newest events of each uid, also of those that are gone; bounded in both."""

    def __init__(self) -> None:
        self._events: dict[str, deque[Event]] = {}

    def add(self, uid: str, event_type: str, content: str) -> None:
        """One of INFO, WARNING, ERROR, and what happened."""
        events = self._events.pop(uid, None) or deque(maxlen=EVENTS_PER_MODEL)
        self._events[uid] = events  # the last to be spoken of is the last to be forgotten
        events.append(Event(event_type=event_type, event_ts=int(time.time()), event_content=content))
        if len(self._events) > MODELS_WITH_EVENTS:
            del self._events[next(iter(self._events))]

    def of(self, uid: str) -> list[Event]:
        """Oldest first."""
        return list(self._events.get(uid, ()))


class Fleet:
    """What is served. Made by `open_fleet`, which also ends it."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        known_engines: tuple[Engine, ...],
        store: Store,
        node: LocalNode,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.engines = known_engines
        self.node = node
        self.store = store
        self.is_closing = False
        self.events = EventLog()
        self.files = Files(settings.home_path / "files")
        self._deployments: dict[str, Deployment] = {}
        self._tasks = tasks

    def find(self, uid: str) -> Deployment:
        """The deployment of that uid.

        Raises:
            ModelNotFound: naming those that look like it.
            ShuttingDown: the gateway takes no new requests.
        """
        if self.is_closing:
            raise ShuttingDown("The gateway is shutting down.")
        deployment = self._deployments.get(uid)
        if deployment is None or deployment.is_closed:
            hint = did_you_mean(uid, self._deployments, what="Served here")
            raise ModelNotFound(f"The model {uid!r} is not served here. {hint}", param="model")
        return deployment

    def deployments(self) -> list[Deployment]:
        """All deployments, in the order in which they came."""
        return list(self._deployments.values())

    def launch(self, uid: str, request: LaunchRequest, hubs: Sequence[str] = ()) -> Deployment:
        """Plan, keep on disk, and deploy a model that a user asks for.

        Args:
            hubs: those to prefer, best first; else those of the settings.
        Raises:
            BadRequest: it cannot be done, or the uid is taken; nothing is kept then.
            CannotKeep: the data folder cannot be written.
        """
        if self.is_closing:
            raise ShuttingDown("The gateway is shutting down.")
        if uid in self._deployments and self._deployments[uid].is_closed:
            raise BadRequest(f"{uid} is still being stopped. Try again in a moment.", param="model_uid")
        if uid in self._deployments:
            raise BadRequest(f"Model is already in the model list, uid: {uid}. Choose another uid.", param="model_uid")
        try:
            hubs = hubs or self.settings.preferred_hubs
            launch = plan(uid, request, self.registry, self.engines, hubs, site_of(self.settings))
            self._check_allowed(launch)
        except ValueError as exc:
            raise BadRequest(str(exc)) from exc
        path = launch.artifact.local_path
        if path and not path.exists():
            raise BadRequest(
                f"Invalid input. `model_path`: {path} File or directory does not exist.", param="model_path"
            )
        try:
            self.store.write(launch)
        except OSError as exc:
            raise CannotKeep(
                f"The launch cannot be kept in {self.store.folder}: {exc.strerror}. Mend that first."
            ) from exc
        return self._deploy(launch)

    async def terminate(self, uid: str, *, force: bool = False) -> None:
        """Stop a launched model and forget it.

        Raises:
            ModelNotFound: there is none of that uid.
            BadRequest: the settings file declares it.
        """
        deployment = self.find(uid)
        if uid in self.settings.models:
            raise BadRequest(
                f"{uid!r} is declared in the settings, so it would be back at the next start. Remove it there, or "
                f"say `hostler stop {uid}` to unload it."
            )
        try:
            self.store.delete(uid)
        except OSError as exc:
            raise CannotKeep(f"The launch cannot be deleted in {self.store.folder}: {exc.strerror}.") from exc
        self.events.add(uid, "INFO", "Terminate model")
        await deployment.close(force=force)
        del self._deployments[uid]  # not before: until then the gateway's end must know of it
        deployment.end()

    async def close(self) -> None:
        """Stop everything now. Requests that are still in flight end with an error."""
        self.is_closing = True
        await asyncio.gather(*(deployment.close(force=True) for deployment in self.deployments()))

    def _placements(self) -> list[Placement]:
        replicas = [replica for deployment in self.deployments() for replica in deployment.replicas]
        return [replica.placement for replica in replicas if replica.placement]

    def restore(self, declared: list[Launch]) -> None:
        """Deploy what the settings declare and what was launched before."""
        for launch in declared:
            self._deploy(launch)
        for launch in self.store.read_all():
            if launch.uid in self._deployments:
                logger.warning("%s was launched before and is now declared in the settings, which win.", launch.uid)
                continue
            try:
                self._check_allowed(launch)
                self._deploy(launch)
            except ValueError as exc:
                logger.error("%s was launched before and cannot be served now: %s", launch.uid, exc)

    def _check_allowed(self, launch: Launch) -> None:
        """Raises ValueError if such a launch is for the settings file alone."""
        engine = engines.find(launch.engine, self.engines)
        if engine.runs_given_programs and not self.settings.allow_command_launches:
            raise ValueError(
                f"A launch on engine {engine.name} runs any program that it names, so it belongs into the settings "
                "file, below `models`; or set `allow_command_launches: true` there, if whoever has a key may do so."
            )

    def _deploy(self, launch: Launch) -> Deployment:
        engine = engines.find(launch.engine, self.engines)
        deployment = Deployment(launch, engine, drain_timeout_s=self.settings.drain_timeout_s)
        deployment.replicas = tuple(
            Replica(
                launch,
                index,
                engine,
                self.node,
                cache=self.settings.cache_path,
                log=self.settings.home_path / "logs" / file_name(launch.uid) / f"{index}.log",
                restart_limit=self.settings.restart_limit,
                download_stall_s=self.settings.download_stall_s,
                probe_interval_s=self.settings.probe_interval_s,
                probe_failures=self.settings.probe_failures,
                environments=self.settings.environments_path,
                recipe=recipe_of(self.settings),
                changed=deployment.notify,
                placements=self._placements,
                tell=partial(self.events.add, launch.uid),
            )
            for index in range(launch.replica)
        )
        self._deployments[launch.uid] = deployment
        self.events.add(launch.uid, "INFO", "Launch model")
        deployment.begin(self._tasks)
        return deployment


def plan_declared(settings: Settings, registry: Registry, known_engines: tuple[Engine, ...]) -> list[Launch]:
    """A Launch for each model of the settings.

    Raises:
        SettingsError: naming the first that cannot be planned, and why.
    """
    launches = []
    for uid, request in settings.models.items():
        try:
            launches.append(plan(uid, request, registry, known_engines, settings.preferred_hubs, site_of(settings)))
        except ValueError as exc:
            raise SettingsError(f"The model {uid!r} of the settings cannot be served: {exc}") from exc
    return launches


def site_of(settings: Settings) -> Site:
    """What the settings and the machine say of Python environments."""
    return Site(
        model_environments=settings.model_environments,
        skip_installed=os.environ.get(SKIP_INSTALLED_VARIABLE, "1").lower() in TRUE,
        environments_folder=settings.environments_path,
        wheel_folders=settings.wheel_paths,
        engines=settings.engines,
        cuda_version=cuda_version(),
    )


def recipe_of(settings: Settings) -> Recipe:
    """How the site builds environments."""
    return Recipe(
        builder=settings.environment_builder,
        offline=is_offline_build(os.environ),
        wheel_folders=settings.wheel_paths,
    )


def open_registry(settings: Settings) -> Registry:
    """The catalogue, a site's own over it, and the registrations.

    Raises:
        SettingsError: one of the site's catalogues is wrong.
    """
    files = [Path(file).expanduser().absolute() for file in settings.catalogue_files]
    try:
        return Registry.open(settings.home_path / "registrations", extra_files=files)
    except (OSError, ValueError) as exc:
        raise SettingsError(f"$.catalogue_files: {exc}") from exc


def available_engines(settings: Settings) -> tuple[Engine, ...]:
    """The engines there are, with the site's settings.

    Raises:
        SettingsError: the settings name an engine that there is not.
    """
    flexible = settings.engines.get("flexible", EngineSettings())
    flexible = msgspec.structs.replace(flexible, launchers=flexible.launchers + settings.flexible_launchers)
    try:
        return engines.available(settings.engines | {"flexible": flexible}, settings.home_path / "environments")
    except ValueError as exc:
        raise SettingsError(f"$.engines: {exc}") from exc


@contextlib.asynccontextmanager
async def open_fleet(settings: Settings) -> AsyncIterator[Fleet]:
    """The fleet for the length of the block; no engine of it is left behind.

    Raises:
        SettingsError: the settings declare what cannot be served.
    """
    registry, known_engines = open_registry(settings), available_engines(settings)
    declared = plan_declared(settings, registry, known_engines)
    try:
        store = Store(settings.home_path / "launches")
    except OSError as exc:
        raise SettingsError(f"The data folder {settings.home_path} cannot be used: {exc}") from exc
    async with open_node() as node, asyncio.TaskGroup() as tasks:
        fleet = Fleet(settings, registry, known_engines, store, node, tasks)
        try:
            fleet.restore(declared)
            yield fleet
        finally:
            await fleet.close()
            for deployment in fleet.deployments():
                deployment.end()
