"""The devices as they are now."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from engines.base import RAM
from gateway.config import Settings
from gateway.nodes.local import LocalNode
from gateway.placement import Device


async def observe(node: LocalNode, settings: Settings, replicas: Iterable[Any]) -> Sequence[Device]:
    gpus = await asyncio.to_thread(node.list_gpus)
    return [Device(key=gpu.uuid, total_bytes=gpu.total_bytes, gpu=gpu) for gpu in gpus] + [Device(key=RAM)]
