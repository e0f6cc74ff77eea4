"""The machine as Xinference's clients ask for it: one supervisor that is its own worker."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from importlib.metadata import version
from typing import Any

import psutil
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.wire import json_answer
from gateway.errors import NotImplementedYet
from gateway.fleet import Fleet
from gateway.gpus import Gpu


class Cluster:
    """Status routes; none of them touches an engine."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._started = time.monotonic()

    async def status(self, request: Request) -> Response:
        """Up since when, and what the machine's processor, memory and GPUs do."""
        gpus = await asyncio.to_thread(self._fleet.node.known_gpus)
        memory = psutil.virtual_memory()
        facts: dict[str, Any] = {
            "cpu": {
                "usage": psutil.cpu_percent() / 100,
                "total": psutil.cpu_count(),
                "memory_used": memory.used,
                "memory_available": memory.available,
                "memory_total": memory.total,
            }
        }
        facts |= {f"gpu-{gpu.index}": _gpu_facts(gpu) for gpu in gpus}
        worker = {"update_time": time.time(), "failure_remaining_count": 0, "status": facts}
        uptime = int(time.monotonic() - self._started)
        return json_answer({"uptime": uptime, "workers": {self._address(request): worker}})

    async def address(self, request: Request) -> Response:
        """Where this gateway listens."""
        return json_answer(self._address(request))

    async def supervisor(self, request: Request) -> Response:
        """The same, in the words of a cluster."""
        return json_answer({"supervisor_ip": self._address(request)})

    async def info(self, request: Request) -> Response:
        """The machine twice: as supervisor and as worker."""
        gpus = await asyncio.to_thread(self._fleet.node.known_gpus)
        is_detailed = request.query_params.get("detailed", "").lower() in ("true", "1", "yes")
        total_bytes = sum(gpu.total_bytes for gpu in gpus)
        own: dict[str, Any] = {"ip_address": self._address(request), "gpu_count": len(gpus)}
        own["gpu_vram_total"] = total_bytes if is_detailed else f"{total_bytes // 2**20}MiB"
        if is_detailed:
            memory = psutil.virtual_memory()
            count = psutil.cpu_count() or 1
            own |= {
                "gpu_vram_available": total_bytes - sum(gpu.used_bytes for gpu in gpus),
                "cpu_available": count * (1 - psutil.cpu_percent() / 100),
                "cpu_count": count,
                "mem_used": memory.used,
                "mem_available": memory.available,
                "mem_total": memory.total,
                "software_version": version("hostler"),
            }
        return json_answer([{"node_type": node_type} | own for node_type in ("Supervisor", "Worker")])

    async def version(self, request: Request) -> Response:
        """Which release this is."""
        return json_answer({"version": version("hostler"), "full-revisionid": None, "dirty": False, "error": None})

    async def devices(self, request: Request) -> Response:
        """How many GPUs there are."""
        return json_answer(len(await asyncio.to_thread(self._fleet.node.known_gpus)))

    async def workers(self, request: Request) -> Response:
        """This machine and what it serves."""
        models = {deployment.launch.uid: str(deployment.state) for deployment in self._fleet.deployments()}
        return json_answer([{"work-ip": self._address(request), "models": models}])

    async def ui_config(self, request: Request) -> Response:
        """What a console may offer: nothing beyond the gateway itself."""
        return json_answer(
            {"grafana_url": None, "es_enabled": False, "auth_advanced": False, "oidc_enabled": False}
            | {"token_router_enabled": False}
        )

    async def abort(self, request: Request) -> Response:
        """End the gateway, as SIGTERM does."""
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
        return json_answer({"result": True})

    async def login(self, request: Request) -> Response:
        """There are keys here and no users."""
        raise NotImplementedYet("This gateway has API keys and no users: send one as `Authorization: Bearer KEY`.")

    def _address(self, request: Request) -> str:
        return f"{request.url.hostname}:{request.url.port or 80}"


def _gpu_facts(gpu: Gpu) -> dict[str, Any]:
    free_bytes = gpu.total_bytes - gpu.used_bytes
    return {
        "name": gpu.name,
        "mem_total": gpu.total_bytes,
        "mem_free": free_bytes,
        "mem_used": gpu.used_bytes,
        "mem_usage": gpu.used_bytes / gpu.total_bytes if gpu.total_bytes else 0,
        "gpu_util": None,
    }
