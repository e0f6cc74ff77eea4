"""All deployments, by uid: launch, terminate, restore at start. Owns the tasks that drive them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import msgspec

import engines
from engines.base import Engine, EngineSettings, Launch, Placement
from gateway.choice import engine_answers, why_this_engine
from gateway.config import Settings
from gateway.deployment import Deployment
from gateway.environments import Recipe, is_offline_build
from gateway.errors import BadRequest, Busy, CannotKeep, ModelNotFound, SettingsError, ShuttingDown
from gateway.events import EventLog
from gateway.files import Files
from gateway.gpus import cuda_version
from gateway.launch import (
    CODE_VARIABLES,
    OPTION_FIELDS,
    RELOADABLE,
    REPLICA_LIMIT,
    LaunchRequest,
    Site,
    changed,
    file_name,
    plan,
)
from gateway.nodes.local import LocalNode, open_node
from gateway.reload import Reload
from gateway.replica import Replica
from gateway.store import Store
from registry.decode import did_you_mean
from registry.hubs.choose import TRUE
from registry.registry import Registry
from registry.remote import catalogue_files

logger = logging.getLogger("hostler.fleet")

SKIP_INSTALLED_VARIABLE = "XINFERENCE_VIRTUAL_ENV_SKIP_INSTALLED"
CATALOGUES_FOLDER = "catalogues"


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
        self.reloads: dict[str, Reload] = {}  # the last one of each uid
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
            raise ModelNotFound(f"Model not found in the model list, uid: {uid}. {hint}", param="model")
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
        launch = self.try_launch(uid, request, hubs)
        self._keep(launch)
        deployment = self._deploy(launch)
        if request.model_engine is None:
            answers = engine_answers(self.engines, request, lambda wish: self._plan(uid, wish, hubs))
            self.events.add(uid, "INFO", f"{launch.engine} was chosen: {why_this_engine(launch.engine, answers)}")
        return deployment

    def try_launch(self, uid: str, request: LaunchRequest, hubs: Sequence[str] = ()) -> Launch:
        """The launch that `launch` would keep and deploy; nothing is done.

        Raises:
            BadRequest: as `launch`.
        """
        self._check_open(uid)
        if uid in self._deployments:
            raise BadRequest(f"Model is already in the model list, uid: {uid}. Choose another uid.", param="model_uid")
        return self._plan(uid, request, hubs)

    def keep(self, uid: str, request: LaunchRequest) -> Deployment:
        """As `launch`, but nothing is loaded now; a model of that uid that is not loaded becomes this one.

        Raises:
            BadRequest: also if the model is loaded, or the settings file declares it.
        """
        self._check_open(uid)
        known = self._changeable(uid, "it") if uid in self._deployments else None
        launch = self._plan(uid, request)
        if known is None:
            self._keep(launch)
            return self._deploy(launch, is_wanted=False)
        if known.is_loaded:
            raise BadRequest(
                f"{uid} is loaded as something else. Say `hostler stop {uid}` first, or choose another uid.",
                param="model_uid",
            )
        self._keep(launch)
        known.launch, known.engine = launch, engines.find(launch.engine, self.engines)
        known.replicas = [self._replica(known, index) for index in range(launch.replica)]
        return known

    def change_preload(self, uid: str, *, preload: bool) -> None:
        """Whether a launch is loaded at the next start; now nothing changes.

        Raises:
            As `add_replicas`.
        """
        deployment = self.find(uid)
        if deployment.launch.preload != preload:
            self._wish(self._changeable(uid, "`preload`"), preload=preload)

    def _check_open(self, uid: str) -> None:
        if self.is_closing:
            raise ShuttingDown("The gateway is shutting down.")
        if uid in self._deployments and self._deployments[uid].is_closed:
            raise BadRequest(f"{uid} is still being stopped. Try again in a moment.", param="model_uid")

    def _plan(self, uid: str, request: LaunchRequest, hubs: Sequence[str] = ()) -> Launch:
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
        return launch

    def _keep(self, launch: Launch) -> None:
        try:
            self.store.write(launch)
        except OSError as exc:
            raise CannotKeep(
                f"The launch cannot be kept in {self.store.folder}: {exc.strerror}. Mend that first."
            ) from exc

    def add_replicas(self, uid: str, count: int = 1) -> list[Replica]:
        """More copies of a model from now on; they start now if the model is loaded.

        Raises:
            ModelNotFound: there is none of that uid.
            BadRequest: the settings file declares it, or there would be too many.
            CannotKeep: the data folder cannot be written; nothing has changed then.
        """
        deployment = self._changeable(uid, "`replica`")
        wished = deployment.launch.replica + count
        if wished > REPLICA_LIMIT:
            raise BadRequest(f"{uid} would have {wished} replicas; {REPLICA_LIMIT} are the most.", param="replica")
        self._wish(deployment, replica=wished)
        added = []
        for _ in range(count):
            taken = {replica.index for replica in deployment.replicas}
            index = next(index for index in range(len(taken) + 1) if index not in taken)
            added.append(self._replica(deployment, index))
            deployment.add(added[-1])
        self.events.add(uid, "INFO", f"Add {', '.join(replica.name for replica in added)}")
        return added

    async def remove_replica(self, uid: str, index: int) -> int:
        """End one copy of a model after its requests in flight; the last one's end is the model's.

        Returns:
            how many remain.
        Raises:
            ModelNotFound, CannotKeep: as `add_replicas`.
            BadRequest: the settings file declares the model, or it has no such replica.
        """
        deployment = self._changeable(uid, "`replica`")
        staying = {replica.index: replica for replica in deployment.staying}
        if index not in staying:
            there = ", ".join(map(str, sorted(staying)))
            raise BadRequest(f"{uid} has no replica {index}; it has {there}.", param="replica_id")
        wished = deployment.launch.replica - 1  # not those that stay: a reload has one less in between
        if not wished:
            await self.terminate(uid)
            return 0
        self._wish(deployment, replica=wished)
        self.events.add(uid, "INFO", f"Remove {staying[index].name}")
        await deployment.remove(staying[index])
        return wished

    def reload(self, uid: str, changes: dict[str, Any], drain_timeout_s: float) -> Reload:
        """Change options of a model that is served: its replicas are started anew, one after the other.

        Args:
            changes: options of the engine, by name, and some fields of a launch (RELOADABLE); None takes one away.
            drain_timeout_s: how long the requests in flight on a replica may go on.
        Raises:
            Busy: a reload of it runs.
            ModelNotFound, BadRequest, CannotKeep: as `add_replicas`.
        """
        deployment = self._changeable(uid, "its options")
        running = self.reloads.get(uid)
        if running is not None and not running.is_over:
            raise Busy(f"{uid} is being reloaded, {running.stage} since {running.started_ts:.0f}. Wait for its end.")
        try:
            after = changed(deployment.launch, changes, deployment.engine)
            self._check_allowed(after)
        except ValueError as exc:
            raise BadRequest(str(exc), param="model_config") from exc
        before = deployment.launch
        reload = Reload(
            model_uid=uid,
            operation_id=secrets.token_hex(8),
            before=before,
            after=after,
            replicas=len(deployment.staying),
            drain_timeout_s=drain_timeout_s,
        )
        self._keep(after)
        deployment.launch = after
        self.reloads[uid] = reload
        self.events.add(uid, "INFO", "Reload model")

        def take_back() -> None:
            self.events.add(uid, "ERROR", f"Reload model: {reload.error}")
            changed_fields = (*RELOADABLE, *OPTION_FIELDS)
            self._wish(deployment, **{name: getattr(before, name) for name in changed_fields})

        self._tasks.create_task(reload.run(deployment, self._replica, take_back), name=f"reload {uid}")
        return reload

    def _changeable(self, uid: str, field: str) -> Deployment:
        """The deployment, if its wish is ours to change."""
        deployment = self.find(uid)
        if uid in self.settings.models:
            raise BadRequest(
                f"{uid!r} is declared in the settings, so a change would be undone by the next start. Change {field} "
                "there and restart the gateway."
            )
        return deployment

    def _wish(self, deployment: Deployment, **changes: Any) -> None:
        """Change what is wished for, on disk first."""
        launch = msgspec.structs.replace(deployment.launch, **changes)
        self._keep(launch)
        deployment.launch = launch

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
        self.reloads.pop(uid, None)
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
        if self.settings.allow_command_launches:
            return
        if names := sorted(filter(CODE_VARIABLES.fullmatch, launch.envs)):
            raise ValueError(
                f"`envs` has {', '.join(names)}, by which an engine can be made to run any program. Set it in the "
                "settings file, below `models`; or set `allow_command_launches: true` there, if whoever has a key may "
                "do so."
            )
        engine = engines.find(launch.engine, self.engines)
        if engine.runs_given_programs:
            raise ValueError(
                f"A launch on engine {engine.name} runs any program that it names, so it belongs into the settings "
                "file, below `models`; or set `allow_command_launches: true` there, if whoever has a key may do so."
            )

    def _deploy(self, launch: Launch, *, is_wanted: bool = True) -> Deployment:
        engine = engines.find(launch.engine, self.engines)
        deployment = Deployment(
            launch,
            engine,
            drain_timeout_s=self.settings.drain_timeout_s,
            queue_limit=self.settings.queue_limit,
            should_start=launch.preload and is_wanted,
        )
        deployment.replicas = [self._replica(deployment, index) for index in range(launch.replica)]
        self._deployments[launch.uid] = deployment
        self.events.add(launch.uid, "INFO", "Launch model")
        deployment.begin(self._tasks)
        return deployment

    def _replica(self, deployment: Deployment, index: int) -> Replica:
        launch = deployment.launch
        return Replica(
            launch,
            index,
            deployment.engine,
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
            moved=partial(self.events.moved, launch.uid, index),
        )


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
    try:
        files = catalogue_files(settings.catalogue_files, settings.home_path / CATALOGUES_FOLDER)
        return Registry.open(settings.home_path / "registrations", extra_files=files)
    except (OSError, ValueError) as exc:
        raise SettingsError(f"$.catalogue_files: {exc}") from exc


def refresh_registry(registry: Registry, settings: Settings) -> int:
    """Ask for the site's catalogues again; how many there are. Not for the event loop.

    Raises:
        BadRequest: one cannot be had or is wrong; nothing was changed.
    """
    folder = settings.home_path / CATALOGUES_FOLDER
    try:
        files = catalogue_files(settings.catalogue_files, folder, must_fetch=True)
        registry.replace_catalogue(files)
    except (OSError, ValueError) as exc:
        raise BadRequest(f"The catalogues stay as they are. {exc}") from exc
    return len(files)


def available_engines(settings: Settings) -> tuple[Engine, ...]:
    """The engines there are, with the site's settings.

    Raises:
        SettingsError: the settings name an engine that there is not.
    """
    flexible = settings.engines.get("flexible", EngineSettings())
    flexible = msgspec.structs.replace(flexible, launchers=flexible.launchers + settings.flexible_launchers)
    try:
        return engines.available(settings.engines | {"flexible": flexible}, settings.environments_path)
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
