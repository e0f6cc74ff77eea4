"""A change of a model's options while it is served: its replicas are drained and started anew, one after the other."""

from __future__ import annotations

import time

import msgspec

from engines.base import Launch


class Reload(msgspec.Struct, kw_only=True):
    """One such change and how far it is. Times in seconds since the epoch.

    `stage` is draining, loading, ready or error; after an error the model is what it was before.
    """

    model_uid: str
    operation_id: str
    before: Launch
    after: Launch
    replicas: int
    replicas_done: int = 0
    stage: str = "draining"
    error: str | None = None
    started_ts: float = msgspec.field(default_factory=time.time)
    finished_ts: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.finished_ts is not None

    def end(self, error: str | None = None) -> None:
        """It has ended."""
        self.stage, self.error, self.finished_ts = "error" if error else "ready", error, time.time()
