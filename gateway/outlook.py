"""What those who wait are told: the stage, how far it is, how long it will take. Reads and never changes."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import msgspec

from gateway.replica import COMING, RESTING, Replica, State

if TYPE_CHECKING:
    from gateway.deployment import Deployment

RETRY_FIRST_S, RETRY_LIMIT_S = 1, 300
NEARLY_PERCENT = 99.0  # as far as a clock may go: only the engine says that it is ready
SOON_S = 2.0


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is for those who wait for it. Unknown is None: no guess is told as a fact."""

    state: str
    stage: str
    stage_s: float | None = None  # for how long it has been there
    percent: float | None = None  # of the stage
    left_s: float | None = None  # until it is ready
    after: str | None = None  # why it comes anew

    def __str__(self) -> str:
        said = [self.stage]
        if self.percent is not None and "%" not in self.stage:
            said[0] += f" {self.percent:.0f} %"
        if self.stage_s is not None:
            said.append(f"{self.stage_s:.0f} s")
        if self.left_s is not None and "left" not in self.stage:
            said.append("ready soon" if self.left_s < SOON_S else f"about {self.left_s:.0f} s left")
        return ", ".join(said) + (f", after: {self.after}" if self.after else "")


def outlook(deployment: Deployment) -> Outlook:
    """How the model is, by its best replica."""
    state = deployment.state
    if state in COMING:
        return _coming(next(one for one in deployment.replicas if one.state is state), deployment.load_s())
    if state in RESTING:
        return _resting(next(one for one in deployment.replicas if one.state is state))
    stage = str(state)
    if state is State.READY and (deployment.is_held or deployment.waiting):
        stage = f"busy with {deployment.in_flight} requests" + (", then makes room" if deployment.is_held else "")
    return Outlook(state=str(state), stage=stage, left_s=deployment.load_s() if state is State.STOPPED else None)


def _resting(replica: Replica) -> Outlook:
    """One that sleeps; what is left is what it takes to wake."""
    stage = f"{replica.state} (tier {replica.tier.name})" if replica.tier else str(replica.state)
    left_s = replica.wake_s(replica.tier.name) if replica.tier else None
    if replica.waits_for:
        stage, left_s = f"{stage}, waits for room: {replica.waits_for}", None
    return Outlook(state=str(replica.state), stage=stage, stage_s=time.monotonic() - replica.state_since, left_s=left_s)


def _coming(replica: Replica, load_s: float | None) -> Outlook:
    """One that is to be ready; `load_s` is how long its engine took before."""
    stage, percent, left_s = str(replica.state), None, None
    stage_s = time.monotonic() - replica.state_since
    progress = replica.progress
    if replica.state is State.WAITING:
        stage = f"waits for room: {replica.waits_for}" if replica.waits_for else stage
        left_s = None if replica.waits_for else load_s
    elif progress:
        stage = str(progress)
        if progress.total_bytes:
            percent = 100 * progress.done_bytes / progress.total_bytes
            left_s = None if progress.eta_s is None else progress.eta_s + (load_s or 0)
    elif replica.state in (State.STARTING, State.WAKING):
        takes_s = replica.wake_s(replica.tier.name) if replica.tier else load_s
        percent = min(NEARLY_PERCENT, 100 * stage_s / takes_s) if takes_s else None
        left_s = (
            takes_s - stage_s if takes_s and stage_s < takes_s else None
        )  # it takes longer than before: nobody knows how long
    after = replica.failure.reason if replica.failure and replica.failures_in_row else None
    return Outlook(state=str(replica.state), stage=stage, stage_s=stage_s, percent=percent, left_s=left_s, after=after)


def text(deployment: Deployment, number: int | None = None) -> str:
    """A sentence for who waits, with its number in the queue."""
    told = outlook(deployment)
    verb = "is loading: " if told.state in COMING and told.state != State.WAKING else "is "
    if told.stage.startswith("waits"):
        verb = ""
    place = f"; number {number} of {deployment.waiting} in the queue" if number else ""
    return f"{deployment.launch.uid} {verb}{told}{place}"


def retry_after_s(deployment: Deployment, default_s: float) -> int:
    """When to ask again: once it is ready, as far as that is known; or once who waits now has had the turn.

    With a steady queue, the next one waits about as long as the first has waited.
    """
    left_s = outlook(deployment).left_s
    since = deployment.waiting_since
    if left_s is None and deployment.state is State.READY and since is not None:
        left_s = time.monotonic() - since
    seconds = math.ceil(default_s if left_s is None else left_s)
    return max(RETRY_FIRST_S, min(RETRY_LIMIT_S, seconds))
