"""All deployments, by uid: launch, terminate, restore at start. Owns the tasks that drive them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import engines
from engines.base import Engine, EngineSettings, Launch, Placement
from gateway import metrics
from gateway.apply import Difference, Effect, SettingStep, Way, effective, setting_steps, steps
from gateway.choice import engine_answers, why_this_engine
from gateway.config import NOWHERE, Settings, Source
from gateway.deployment import Deployment
from gateway.devices import Held, Observer, limits_of, look_here
from gateway.dispatch import Dispatcher
from gateway.errors import BadRequest, Busy, CannotKeep, ModelNotFound, ModelStopped, SettingsError, ShuttingDown
from gateway.events import EventLog
from gateway.experience import Experience
from gateway.export import Exported, differs, export
from gateway.files import Files
from gateway.gpus import cuda_version
from gateway.handover import Predecessor
from gateway.launch import (
    CODE_VARIABLES,
    REPLICA_LIMIT,
    LaunchRequest,
    Site,
    changed,
    file_name,
    plan,
    request_of,
)
from gateway.lives import ForeignFolder, Found
from gateway.nodes.local import LocalNode, open_node
from gateway.placement import Device
from gateway.reload import Reload, is_current
from gateway.replica import Replica
from gateway.store import Store
from gateway.upstream import Upstream
from registry.decode import did_you_mean
from registry.hubs.choose import TRUE
from registry.registry import Registry
from registry.remote import catalogue_files

logger = logging.getLogger("hostler.fleet")

SKIP_INSTALLED_VARIABLE = "XINFERENCE_VIRTUAL_ENV_SKIP_INSTALLED"
CATALOGUES_FOLDER = "catalogues"
OF_GATEWAY = ""  # the uid of events that are of no model


class Wanted(NamedTuple):
    """What the settings say, read and planned; `catalogues` None: they stay."""

    settings: Settings
    engines: tuple[Engine, ...]
    declared: list[Launch]
    catalogues: list[Path] | None


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
        source: Source = NOWHERE,
    ) -> None:
        self.settings = settings
        self.source = source
        self.taken_up: dict[str, Any] | None = None  # when the source was read again, and what came of it
        self.registry = registry
        self.engines = known_engines
        self.node = node
        self.store = store
        self.is_closing = False
        self.next_door: asyncio.Future[Upstream | None] | None = None  # the gateway that is taking over, once it has
        self.relays = 0  # requests of ours that are answered there
        self.restart: Callable[[], Awaitable[int]] | None = None  # hands over; the pid of the next gateway
        self.events = EventLog()
        self.files = Files(settings.home_path / "files")
        self.reloads: dict[str, Reload] = {}  # the last one of each uid
        self.observer = Observer(partial(look_here, node.list_gpus), tell=self._tell_of_machine)
        self.experience = Experience(settings.home_path / "experience.json")
        self._deployments: dict[str, Deployment] = {}
        self._left_behind: dict[tuple[str, int], Found] = {}  # at the start: engines by the copy that they serve
        self._coming: dict[str, Launch] = {}  # once the one of that uid that is ending has ended
        self._changing: dict[str, asyncio.Task[None]] = {}  # the last reload of each uid
        self._applying = asyncio.Lock()
        self._tasks = tasks
        self.dispatcher = Dispatcher(
            self.deployments,
            lambda: self.settings,
            self.observe,
            self.events.add,
            silence=lambda: self.observer.silence,
        )
        self._dispatching = tasks.create_task(self.dispatcher.run(), name="dispatcher")

    def in_effect(self) -> Settings:
        """The settings as they are now, for those who would else keep old ones."""
        return self.settings

    def find(self, uid: str) -> Deployment:
        """The deployment of that uid.

        Raises:
            ModelNotFound: naming those that look like it.
            ModelStopped: it was removed, is still ending, and is to be there again right after that.
            ShuttingDown: the gateway takes no new requests.
        """
        if self.is_closing:
            raise ShuttingDown("The gateway is shutting down.")
        deployment = self._deployments.get(uid)
        if deployment is None or deployment.is_closed:
            if uid in self._coming:
                raise ModelStopped(f"{uid} ends what it has begun, and is there again after that. Try again.")
            hint = did_you_mean(uid, self._deployments, what="Served here")
            raise ModelNotFound(f"Model not found in the model list, uid: {uid}. {hint}", param="model")
        return deployment

    def deployments(self) -> list[Deployment]:
        """All deployments, in the order in which they came."""
        return list(self._deployments.values())

    def origin_of(self, launch: Launch) -> str:
        """Where a model is from: `settings`, `api`, or `apply` for a file that is not the gateway's own."""
        if launch.uid in self.settings.models:
            return "settings"
        return "apply" if launch.is_applied else "api"

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
            if launch.group is not None and launch.group not in self.settings.groups:
                raise ValueError(f"There is no group {launch.group!r}: the setting `groups` of the gateway says which.")
        except ValueError as exc:
            raise BadRequest(str(exc)) from exc
        path = launch.artifact.local_path
        if path and not path.exists():
            raise BadRequest(
                f"Invalid input. `model_path`: {path} File or directory does not exist.", param="model_path"
            )
        return launch

    def _keep(self, launch: Launch) -> None:
        self._keep_all([launch], [])

    def _keep_all(self, launches: Sequence[Launch], forgotten: Sequence[str]) -> None:
        """Keep and forget launches on disk, all or none."""
        try:
            self.store.change(launches, forgotten)
        except OSError as exc:
            what = "launch" if len(launches) == 1 else "launches"
            raise CannotKeep(
                f"The {what} cannot be kept in {self.store.folder}: {exc.strerror}. Mend that first."
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
        added = [self._add_replica(deployment) for _ in range(count)]
        self.events.add(uid, "INFO", f"Add {', '.join(replica.name for replica in added)}")
        return added

    def _add_replica(self, deployment: Deployment) -> Replica:
        taken = {replica.index for replica in deployment.replicas}
        replica = self._replica(deployment, next(index for index in range(len(taken) + 1) if index not in taken))
        deployment.add(replica)
        return replica

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
        self._keep(after)
        deployment.launch = after
        return self._renew(deployment, before, deployment.engine, drain_timeout_s)

    def _renew(
        self,
        deployment: Deployment,
        before: Launch,
        engine: Engine,
        drain_timeout_s: float,
        *,
        only_stale: bool = False,
        may_return: bool = True,
    ) -> Reload:
        """Start copies anew for the launch that the deployment has now, after whatever reload of it still runs.

        Args:
            before, engine: what is gone back to if a copy does not start and it `may_return`.
        """
        uid = deployment.launch.uid
        last = self.reloads.get(uid)
        if last is not None and not last.is_over:
            last.is_superseded = True
            before, engine, may_return = last.before, last.engine_before, may_return or last.may_return
        reload = Reload(
            model_uid=uid,
            operation_id=secrets.token_hex(8),
            before=before,
            engine_before=engine,
            after=deployment.launch,
            replicas=len(deployment.staying),
            drain_timeout_s=drain_timeout_s,
            only_stale=only_stale,
            may_return=may_return,
        )
        self.reloads[uid] = reload
        self.events.add(uid, "INFO", "Reload model")

        def take_back() -> None:
            self.events.add(uid, "ERROR", f"Reload model: {reload.error}")
            now = deployment.launch
            launch = msgspec.structs.replace(
                before, replica=now.replica, preload=now.preload, is_applied=now.is_applied
            )
            if uid not in self.settings.models:
                self._keep(launch)
            deployment.launch, deployment.engine = launch, engine

        async def run(after: asyncio.Task[None] | None) -> None:
            if after is not None:
                await asyncio.wait([after])
            await reload.run(deployment, self._replica, take_back)
            if reload.error and not reload.may_return:
                self.events.add(uid, "ERROR", f"Reload model: {reload.error}")

        self._changing[uid] = self._tasks.create_task(run(self._changing.get(uid)), name=f"reload {uid}")
        return reload

    def _changeable(self, uid: str, field: str) -> Deployment:
        """The deployment, if its wish is ours to change."""
        deployment = self.find(uid)
        if uid in self.settings.models:
            raise BadRequest(
                f"{uid!r} is declared in the settings, so a change would be undone by the next start. Change {field} "
                "there: it is taken up as the file is saved, or by `hostler apply`."
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
        await self._forget(deployment, force=force)

    async def _forget(self, deployment: Deployment, *, force: bool = False) -> None:
        """End a deployment whose wish is gone, and begin what is wished for under its uid meanwhile."""
        uid = deployment.launch.uid
        await deployment.close(force=force)
        self.reloads.pop(uid, None)
        self._changing.pop(uid, None)
        del self._deployments[uid]  # not before: until then the gateway's end must know of it
        deployment.end()
        metrics.goes(uid)
        if (launch := self._coming.pop(uid, None)) is not None and not self.is_closing:
            self._deploy(launch)

    # --- all at once

    async def reread(self, *, is_trial: bool = False) -> Difference:
        """Read the settings again from where they came at the start, and make what is served be as they say.

        Only models that are other than before are touched; what was launched over the API stays.

        Args:
            is_trial: only say what would be done.
        Raises:
            SettingsError: they are wrong; nothing was changed.
        """
        async with self._applying:
            try:
                wanted = await asyncio.to_thread(self._read_source)
                settings = effective(self.settings, wanted.settings)
                self._check_groups(settings)
                if not is_trial and wanted.catalogues is not None:
                    await asyncio.to_thread(self.registry.replace_catalogue, wanted.catalogues)
            except (SettingsError, ValueError) as exc:
                if not is_trial:
                    self._note(str(exc), "ERROR")
                raise SettingsError(str(exc)) from exc
            self._check_running()
            now = self._wishes()
            wished = {uid: launch for uid, launch in now.items() if uid not in self.settings.models}
            if dropped := self.settings.models.keys() - settings.models.keys():
                wished |= {launch.uid: launch for launch in self.store.read_all() if launch.uid in dropped}
            wished |= {launch.uid: launch for launch in wanted.declared}
            difference = self._difference(now, wished, wanted.settings, wanted.engines)
            if not is_trial:
                self.settings, self.engines = settings, wanted.engines
                logging.getLogger().setLevel(settings.log_level.upper())
                self._carry_out(difference)
                await asyncio.to_thread(self._keep_engines_for, settings.orphan_timeout_s)
                self._note(str(difference), "INFO")
            return difference

    async def apply(self, given: Settings, *, names: Sequence[str], is_trial: bool = False) -> Difference:
        """Serve the models of a settings file that is not the gateway's own, beside those that are.

        They are kept as launches; of those that came with an earlier file, the ones that are not in this one end.
        Settings of the site do not change.

        Args:
            given: what the file says.
            names: of the settings that stand in it.
            is_trial: only say what would be done.
        Raises:
            BadRequest: it is wrong, or says otherwise than the gateway's own settings; nothing was changed.
            CannotKeep: the data folder cannot be written; nothing was changed.
        """
        async with self._applying:
            planned = await asyncio.to_thread(self._plan_applied, given)
            self._check_running()
            now, stored = self._wishes(), {launch.uid: launch for launch in self.store.read_all()}
            ended = [launch.uid for launch in stored.values() if launch.is_applied and launch.uid not in given.models]
            wished = {uid: launch for uid, launch in now.items() if uid not in ended} | planned
            ignored = [name for name in names if getattr(given, name) != getattr(self.settings, name)]
            difference = msgspec.structs.replace(
                self._difference(now, wished, self.settings, self.engines),
                settings=tuple(SettingStep(name=name, effect=Effect.NEVER) for name in ignored if name != "models"),
            )
            if not is_trial:
                self._keep_all([launch for uid, launch in planned.items() if launch != stored.get(uid)], ended)
                self._carry_out(difference)
                logger.info("Applied: %s", difference)
            return difference

    def export(self, *, with_secrets: bool) -> Exported:
        """All that is served as one settings file. Plans every launch anew: not for the event loop."""
        launches = list(self._wishes().values())
        exported = export(self.settings, launches, with_secrets=with_secrets)
        notes = list(exported.notes)
        for launch in launches:
            if launch.uid in self.settings.models:
                continue
            try:
                other = differs(launch, self._plan(launch.uid, request_of(launch)))
            except BadRequest as exc:
                notes.append(f"{launch.uid} could not be launched anew as it is written: {exc.message}")
            else:
                notes += [f"{launch.uid} would be launched with other values of {other}."] if other else []
        return msgspec.structs.replace(exported, notes=tuple(notes))

    def _read_source(self) -> Wanted:
        settings = self.source.read()
        catalogues, registry = None, self.registry
        if settings.catalogue_files != self.settings.catalogue_files:
            catalogues = catalogues_of(settings)
            registry = open_registry(settings)
        known = available_engines(settings)
        return Wanted(settings, known, plan_declared(settings, registry, known), catalogues)

    def _plan_applied(self, given: Settings) -> dict[str, Launch]:
        planned = {}
        for uid, request in given.models.items():
            if (own := self.settings.models.get(uid)) is not None:
                if request == own:
                    continue
                raise BadRequest(
                    f"$.models.{uid}: the gateway's own settings declare {uid!r} otherwise, and they would win at its "
                    f"next start. Change it in {self.source.file or 'them'}, or leave it out here."
                )
            try:
                planned[uid] = msgspec.structs.replace(self._plan(uid, request), is_applied=True)
            except BadRequest as exc:
                raise BadRequest(f"The model {uid!r} of the settings cannot be served: {exc.message}") from exc
        return planned

    def _wishes(self) -> dict[str, Launch]:
        """What is wished for now, by uid."""
        served = [deployment.launch for deployment in self.deployments() if not deployment.is_closed]
        return {launch.uid: launch for launch in served} | self._coming

    def _difference(
        self, now: dict[str, Launch], wished: dict[str, Launch], settings: Settings, known: tuple[Engine, ...]
    ) -> Difference:
        newly_configured = {
            uid
            for uid, deployment in self._deployments.items()
            if uid in wished
            and wished[uid].engine == deployment.launch.engine
            and engines.find(wished[uid].engine, known) != deployment.engine
        }
        return Difference(
            models=tuple(steps(now, wished, newly_configured)),
            settings=tuple(setting_steps(self.settings, settings)),
        )

    def _carry_out(self, difference: Difference) -> None:
        """Begin every step. What takes time goes on by itself: requests in flight end, copies start."""
        for step in difference.models:
            deployment = self._deployments.get(step.uid)
            if step.after is None:
                self._coming.pop(step.uid, None)
                if deployment is not None and not deployment.is_closed:
                    self.events.add(step.uid, "INFO", "Terminate model")
                    deployment.is_closed = True
                    self._tasks.create_task(self._forget(deployment), name=f"end {step.uid}")
            elif deployment is None:
                self._deploy(step.after)
            elif deployment.is_closed:
                self._coming[step.uid] = step.after
            else:
                self._change(deployment, step.after, step.way)

    def _change(self, deployment: Deployment, after: Launch, way: Way) -> None:
        before, engine = deployment.launch, deployment.engine
        was_served = bool(deployment.ready()) or not deployment.is_loaded
        deployment.launch, deployment.engine = after, engines.find(after.engine, self.engines)
        for replica in deployment.staying:
            if is_current(replica, deployment):
                replica.launch = after
        self._scale(deployment, after.replica - before.replica)
        if way in (Way.RENEWED, Way.REPLACED):
            self._renew(
                deployment,
                msgspec.structs.replace(before, replica=after.replica),
                engine,
                self.settings.drain_timeout_s,
                only_stale=True,
                may_return=was_served,
            )
        if after.preload and not before.preload:
            deployment.start()
        if way is not Way.UNTOUCHED:
            deployment.notify()

    def _scale(self, deployment: Deployment, more: int) -> None:
        for _ in range(more):
            self._add_replica(deployment)
        for replica in deployment.staying[more:] if more < 0 else ():
            self.events.add(deployment.launch.uid, "INFO", f"Remove {replica.name}")
            self._tasks.create_task(deployment.remove(replica), name=f"end {replica.name}")

    def _check_groups(self, settings: Settings) -> None:
        """Raises SettingsError if a launch that is not of the settings belongs to a group that they no longer have."""
        for uid, launch in self._wishes().items():
            if launch.group is not None and uid not in settings.models and launch.group not in settings.groups:
                raise SettingsError(f"$.groups: {uid} was launched into the group {launch.group!r}, which is gone.")

    def _keep_engines_for(self, orphan_timeout_s: float) -> None:
        run_folder = self.node.run_folder
        try:
            if orphan_timeout_s != run_folder.orphan_timeout_s:
                run_folder.keep_for(orphan_timeout_s)
        except OSError as exc:
            logger.error("`orphan_timeout_s` holds for new engines only: it cannot be written down: %s", exc)

    def _check_running(self) -> None:
        if self.is_closing:
            raise ShuttingDown("The gateway is shutting down.")

    def _tell_of_machine(self, event_type: str, text: str) -> None:
        logger.log(logging.ERROR if event_type == "ERROR" else logging.INFO, "%s", text)
        self.events.add(OF_GATEWAY, event_type, text)

    def _note(self, text: str, event_type: str) -> None:
        """What came of reading the settings again, for people, logs and programs."""
        is_bad = event_type == "ERROR"
        self.taken_up = {"at": time.time(), "error": text if is_bad else None, "steps": None if is_bad else text}
        sentence = f"The settings stay as they were. {text}" if is_bad else f"The settings are taken up: {text}"
        self._tell_of_machine(event_type, sentence)

    @contextlib.asynccontextmanager
    async def relaying(self) -> AsyncIterator[Upstream | None]:
        """The gateway next door, which is not to be left alone with a request for the length of the block; or None."""
        self.relays += 1
        try:
            yield await asyncio.shield(self.next_door) if self.next_door else None
        finally:
            self.relays -= 1

    async def hand_over(self) -> None:
        """Leave everything to the gateway next door, each replica once its requests in flight have ended."""
        self.is_closing = True
        for deployment in self.deployments():
            deployment.is_handed_over = True
        await asyncio.gather(*(deployment.close(force=False) for deployment in self.deployments()))

    async def close(self) -> None:
        """Stop everything now, or leave engines to the next gateway. Requests in flight end with an error."""
        self.is_closing = True
        await asyncio.gather(*(deployment.close(force=True) for deployment in self.deployments()))

    def placements(self) -> list[Placement]:
        """Of all replicas that have one."""
        replicas = [replica for deployment in self.deployments() for replica in deployment.replicas]
        return [replica.placement for replica in replicas if replica.placement]

    def end(self) -> None:
        """Be driven no longer; for after `close`."""
        self._dispatching.cancel()
        for deployment in self.deployments():
            deployment.end()

    async def observe(self) -> Sequence[Device]:
        """The devices now, and what others than our replicas hold of them."""
        return await self.observer.observe(self._held(), limits_of(self.settings))

    async def has_gpus(self) -> bool:
        """Whether the machine has any."""
        return await self.observer.has_gpus(self._held(), limits_of(self.settings))

    def _held(self) -> list[Held]:
        return [
            Held(name=one.name, pid=one.process.pid if one.process else None, memory=one.placement.memory)
            for deployment in self.deployments()
            for one in deployment.replicas
            if one.placement is not None
        ]

    def restore(self, declared: list[Launch]) -> None:
        """Deploy what the settings declare and what was launched before; engines that run for it are gone on with."""
        running, useless = self.node.survey()
        running.sort(key=lambda found: found.life.started_at)
        self._left_behind = {(found.life.uid, found.life.index): found for found in running}
        self._deploy_all(declared)
        self._left_behind = {}
        replicas = [replica for deployment in self.deployments() for replica in deployment.replicas]
        taken = {replica.left_behind.folder for replica in replicas if replica.left_behind}
        useless |= {
            found.folder: f"{found.life.uid} has no use for it" for found in running if found.folder not in taken
        }
        for folder, why in useless.items():
            logger.info("What an earlier gateway left in %s is ended and removed: %s", folder, why)
        self._tasks.create_task(self.node.end(list(useless), self.settings.drain_timeout_s), name="end leftovers")

    def _deploy_all(self, declared: list[Launch]) -> None:
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
            settings=self.in_effect,
            should_start=launch.preload and is_wanted,
            changed=self.dispatcher.poke,
            tired=self.dispatcher.look,
        )
        deployment.replicas = [self._replica(deployment, index) for index in range(launch.replica)]
        for replica in deployment.replicas:
            if found := self._left_behind.get((launch.uid, replica.index)):
                replica.take_over(found)
        if left_behind := [found for replica in deployment.replicas if (found := replica.left_behind)]:
            deployment.start()
            if all(found.is_asleep for found in left_behind):
                deployment.rest()
        self._deployments[launch.uid] = deployment
        metrics.comes(launch.uid)
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
            log=self.settings.home_path / "logs" / file_name(launch.uid) / f"{index}.log",
            settings=self.in_effect,
            changed=deployment.notify,
            place=partial(self.dispatcher.place, deployment),
            has_gpus=self.has_gpus,
            experience=self.experience,
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


def catalogues_of(settings: Settings) -> list[Path]:
    """The files of the site's catalogues, fetched if need be.

    Raises:
        SettingsError: one of them cannot be had.
    """
    try:
        return list(catalogue_files(settings.catalogue_files, settings.home_path / CATALOGUES_FOLDER))
    except (OSError, ValueError) as exc:
        raise SettingsError(f"$.catalogue_files: {exc}") from exc


def open_registry(settings: Settings) -> Registry:
    """The catalogue, a site's own over it, and the registrations.

    Raises:
        SettingsError: one of the site's catalogues is wrong.
    """
    files = catalogues_of(settings)
    try:
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
async def open_fleet(
    settings: Settings, before: Predecessor | None = None, source: Source = NOWHERE
) -> AsyncIterator[Fleet]:
    """The fleet for the length of the block; no engine of it is left behind, unless its node says so.

    Args:
        source: where the settings came from.
        before: the gateway that hands over to this one, if one does.
    Raises:
        HandoverFailed: it does not.
        SettingsError: the settings declare what cannot be served.
    """
    registry, known_engines = open_registry(settings), available_engines(settings)
    declared = plan_declared(settings, registry, known_engines)
    if before:
        await before.prepared()
    async with contextlib.AsyncExitStack() as stack:
        try:
            store = Store(settings.home_path / "launches")
            node = await stack.enter_async_context(
                open_node(settings.home_path, orphan_timeout_s=settings.orphan_timeout_s)
            )
        except (OSError, ForeignFolder) as exc:
            raise SettingsError(f"The data folder {settings.home_path} cannot be used: {exc}") from exc
        node.leaves_engines = before is not None  # should we fail: they are not ours yet
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        fleet = Fleet(settings, registry, known_engines, store, node, tasks, source)
        learning = tasks.create_task(fleet.experience.run(partial(look_here, node.list_gpus)))
        try:
            fleet.restore(declared)
            yield fleet
        finally:
            await fleet.close()
            learning.cancel()
            fleet.end()
