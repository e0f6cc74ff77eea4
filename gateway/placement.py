"""Which GPUs a replica gets, or the sentence why none. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from engines.base import Launch, Needs, Placement
from gateway.gpus import Gpu


def needs_of(launch: Launch, needs: Needs, index: int) -> Needs:
    """What that replica asks for, of what the engine asks for each."""
    return needs if needs.gpu_idx is None else msgspec.structs.replace(needs, gpu_idx=launch.gpus_of(index))


def place(needs: Needs, gpus: Sequence[Gpu], taken: Sequence[Placement] = ()) -> Placement | str:
    """The placement, or why there is none.

    GPUs that were named are given to the letter. A number of them goes to those that hold the fewest replicas
    of ours (`taken` has their placements), and of these to the ones with the most free memory. Where the
    launch says nothing, the engine uses what it sees.
    """
    by_index = {gpu.index: gpu for gpu in gpus}
    there = f"this machine has {len(gpus)} ({', '.join(str(i) for i in by_index)})" if gpus else "this machine has none"
    if needs.gpu_idx is not None:
        missing = [index for index in needs.gpu_idx if index not in by_index]
        if missing:
            return f"it asks for GPU {', '.join(map(str, missing))}, and {there}"
        return Placement(gpu_uuids=tuple(by_index[index].uuid for index in needs.gpu_idx))
    if needs.n_gpu is None:
        return Placement()
    if needs.n_gpu > len(gpus):
        return f"it asks for {needs.n_gpu} GPUs, and {there}"
    held = Counter(uuid for placement in taken for uuid in placement.gpu_uuids or ())
    freest = sorted(gpus, key=lambda gpu: (held[gpu.uuid], gpu.used_bytes - gpu.total_bytes))
    return Placement(gpu_uuids=tuple(gpu.uuid for gpu in freest[: needs.n_gpu]))
