"""A change of a model's options while it is served: its replicas are drained and started anew, one after the other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from engines.base import Engine, Launch
from gateway.apply import starts_alike
from gateway.deployment import Deployment
from gateway.errors import CannotKeep
from gateway.replica import Replica, State

logger = logging.getLogger("hostler.reload")

ROOM_LIMIT_S = 30.0
LOOK_S = 1.0

MakeReplica = Callable[[Deployment, int], Replica]


class Reload(msgspec.Struct, kw_only=True):
    """One such change and how far it is. Times in seconds since the epoch.

    `stage` is draining, loading, ready or error; after an error the model is what it was before, unless it did not
    serve then either, or something newer was wished for meanwhile. `only_stale` leaves copies be that need no new
    start.
    """

    model_uid: str
    operation_id: str
    before: Launch
    engine_before: Engine
    after: Launch
    replicas: int
    drain_timeout_s: float
    only_stale: bool = False
    may_return: bool = True
    is_superseded: bool = False
    replicas_done: int = 0
    stage: str = "draining"
    error: str | None = None
    started_ts: float = msgspec.field(default_factory=time.time)
    finished_ts: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.finished_ts is not None

    async def run(self, deployment: Deployment, make: MakeReplica, take_back: Callable[[], None]) -> None:
        """Replace each replica of a deployment whose launch is the new one already.

        Nothing but cancellation leaves it: an error becomes the reload's.

        Args:
            make: a replica of that number, of the launch as it is then.
            take_back: makes the launch the one of before again, on disk first; may raise CannotKeep.
        """
        try:
            self.error = await self._renew(deployment, make)
            is_forgotten = deployment.is_closed  # a launch that is forgotten must stay so
            if self.error and self.may_return and not (is_forgotten or self.is_superseded):
                take_back()
                for replica in [one for one in deployment.staying if not is_current(one, deployment)]:
                    await self._replace(deployment, replica, make)
                for replica in deployment.staying:
                    replica.launch = deployment.launch
                self.error += " Its options are what they were."
        except CannotKeep as exc:
            self.error = f"{self.error} {exc.message}"
        except Exception as exc:
            logger.exception("%s: a reload failed by a fault of the gateway", self.model_uid)
            self.error = f"The gateway failed: {exc!r}. Its own log has the details."
        self.stage, self.finished_ts = "error" if self.error else "ready", time.time()

    async def _renew(self, deployment: Deployment, make: MakeReplica) -> str | None:
        """Replace one replica after the other; why it was given up, or None."""
        if any(replica.launch.engine != deployment.launch.engine for replica in deployment.staying):
            for new in await self._replace_all(deployment, make):
                if reason := await self._until_there(new, deployment):
                    return reason
        for replica in deployment.staying:
            if replica not in deployment.staying:  # somebody has removed it meanwhile
                continue
            if not (self.only_stale and is_current(replica, deployment)):
                new = await self._replace(deployment, replica, make)
                if reason := await self._until_there(new, deployment):
                    return reason
            self.replicas_done += 1
        return None

    async def _until_there(self, new: Replica, deployment: Deployment) -> str | None:
        """Wait for a copy that was started anew; why it does not come, or None."""
        self.stage = "loading"
        while _is_coming(new, deployment):
            await deployment.changed(limit_s=LOOK_S)
        if deployment.is_closed:
            return f"{self.model_uid} was terminated meanwhile."
        if _is_spare(new, deployment):
            return f"{new.name} has no room: {new.waits_for}. Try again once there is."
        return None if new.failure is None else f"{new.name} does not start: {new.failure}"

    async def _replace_all(self, deployment: Deployment, make: MakeReplica) -> list[Replica]:
        """Copies of different engines answer differently, so none of the new begins before the last of the old ends."""
        self.stage = "draining"
        old = deployment.staying
        await asyncio.gather(*(deployment.remove(replica, self.drain_timeout_s) for replica in old))
        new = [make(deployment, replica.index) for replica in old]
        for replica in new:
            deployment.add(replica)
        return new

    async def _replace(self, deployment: Deployment, replica: Replica, make: MakeReplica) -> Replica:
        self.stage = "draining"
        await deployment.remove(replica, self.drain_timeout_s)
        new = make(deployment, replica.index)
        deployment.add(new)
        return new


def is_current(replica: Replica, deployment: Deployment) -> bool:
    """Whether the copy was started as it would be now."""
    return replica.engine == deployment.engine and starts_alike(replica.launch, deployment.launch)


def _is_coming(replica: Replica, deployment: Deployment) -> bool:
    """Whether it is to be ready, and may yet be; not while the model sleeps, as it starts when somebody asks then."""
    is_wanted = deployment.is_loaded and not deployment.is_resting and replica in deployment.staying
    return (
        is_wanted
        and replica.state is not State.READY
        and replica.failure is None
        and not _is_spare(replica, deployment)
    )


def _is_spare(replica: Replica, deployment: Deployment) -> bool:
    """Whether it waits for room while others serve: nobody makes room for it then, so that may take for ever."""
    waits_s = time.monotonic() - replica.state_since if replica.waits_for else 0.0
    return waits_s > ROOM_LIMIT_S and bool(deployment.ready())
