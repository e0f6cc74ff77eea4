"""What the workers that hear by the transformers library have in common: windows of sound, and an end on demand."""

from __future__ import annotations

import threading
from typing import Any

from engines.workers.audio import RATE_HEARD

WINDOW_S = 30  # what Whisper was trained on
CUT_S = 8  # how far back from the end of a window a quiet place is looked for
QUIET_S = 0.1
LEAST_S = 0.125  # convolutions cannot take less


def windows(samples: Any) -> list[tuple[int, int]]:
    """Where to cut: from one sample to before another, each at most WINDOW_S long and cut where it is quietest."""
    import numpy as np

    size, back, quiet = WINDOW_S * RATE_HEARD, CUT_S * RATE_HEARD, int(QUIET_S * RATE_HEARD)
    found, begin = [], 0
    while len(samples) - begin > size:
        tail = samples[begin + size - back : begin + size]
        loudness = np.square(tail[: len(tail) // quiet * quiet].reshape(-1, quiet)).mean(axis=1)
        end = begin + size - back + int(loudness.argmin()) * quiet + quiet // 2
        found.append((begin, end))
        begin = end
    return [*found, (begin, len(samples))]


def long_enough(samples: Any) -> Any:
    """The samples, with silence after them if there are too few for a model."""
    import numpy as np

    lacking = int(LEAST_S * RATE_HEARD) - len(samples)
    return np.pad(samples, (0, lacking)) if lacking > 0 else samples


def stops_once(cancel: threading.Event) -> Any:
    """The library's criteria by which `generate` ends: once the event is set."""
    import torch
    from transformers import StoppingCriteriaList

    def should_stop(input_ids: Any, scores: Any, **more: Any) -> Any:
        return torch.full((input_ids.shape[0],), cancel.is_set(), device=input_ids.device, dtype=torch.bool)

    return StoppingCriteriaList([should_stop])
