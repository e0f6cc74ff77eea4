"""A running gateway, as its users run it, and helpers to look at what fake engines saw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from gateway.home import only_one_in
from gateway.nodes.local import LocalNode, open_node

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


StartGateway = Callable[..., Awaitable["Gateway"]]


class Answer:
    """A whole answer."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


# Engines end with their gateway, and soon after one that was killed; tests of the opposite say so.
ENDINGS = {"HOSTLER_ON_EXIT": "stop", "HOSTLER_ORPHAN_TIMEOUT_S": "1"}

# Where a test does not say it: the short way for easy requests. HOSTLER_DOOR=plain has all take the plain one.
DOOR = os.environ.get("HOSTLER_DOOR", "auto")


class Gateway:
    """`hostler serve` as a process of its own, on a free port."""

    def __init__(self, process: asyncio.subprocess.Process, home: Path, log: Path) -> None:
        self.process, self.home, self.log = process, home, log
        self.address = ""
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))

    @classmethod
    async def start(
        cls,
        home: Path,
        settings: dict[str, Any],
        env: dict[str, str] | None = None,
        stdin: int | None = None,
        limits: dict[int, int] | None = None,
    ) -> Gateway:
        """`limits` are of the system (`resource.RLIMIT_...`), soft and hard."""
        home.mkdir(parents=True, exist_ok=True)
        file = home / "settings.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        log = home / "gateway.log"
        log.touch()
        begin = log.stat().st_size
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HOSTLER_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"  # fake engines ask `env` for Python
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "gateway.cli", "serve", "-c", str(file), "--port", "0"),
                *("--home", str(home)),
                stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
                stdout=output,
                stderr=output,
                env=clean | ENDINGS | {"PATH": path, "HOSTLER_DOOR": DOOR} | (env or {}),
                preexec_fn=lambda: [resource.setrlimit(kind, (value, value)) for kind, value in (limits or {}).items()],
            )
        gateway = cls(process, home, log)
        async with asyncio.timeout(30):
            while not (found := ADDRESS.search(log.read_text()[begin:])):
                assert process.returncode is None, f"the gateway ended: {log.read_text()}"
                await asyncio.sleep(0.02)
        gateway.address = found[0]
        return gateway

    async def request(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        if body is not None:
            options |= {"data": body} if isinstance(body, bytes) else {"json": body}
        async with self.session.request(method, self.address + path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return await self.request("POST", path, body, **options)

    async def complete(self, model: str = "fake", **options: Any) -> Answer:
        return await self.post("/v1/completions", {"model": model, "prompt": "x"} | options)

    async def stream(self, model: str = "fake", *, begun: asyncio.Event | None = None, **options: Any) -> list[str]:
        """The lines of a streamed completion, without blank ones; ends with the body, whole or broken.

        Args:
            begun: is set once there is a token.
        """
        body = {"model": model, "prompt": "x", "stream": True} | options
        lines = []
        async with self.session.post(self.address + "/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.strip():
                    lines.append(line.decode().rstrip())
                if begun and line.startswith(b"data:"):
                    begun.set()
        return lines

    async def replicas(self) -> list[dict[str, Any]]:
        return (await self.get("/v1/replicas")).json

    async def until(self, uid: str = "fake", limit_s: float = 30, **facts: Any) -> dict[str, Any]:
        """The first replica of the uid, once it shows these facts."""
        async with asyncio.timeout(limit_s):
            while True:
                replica = next(replica for replica in await self.replicas() if replica["uid"] == uid)
                if all(replica[name] == value for name, value in facts.items()):
                    return replica
                await asyncio.sleep(0.02)

    async def end(self, number: int = signal.SIGINT, limit_s: float = 20) -> int:
        """Signal the gateway and wait for its end; the exit code."""
        await self.session.close()
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(limit_s):
            return await self.process.wait()


def fake_model(file: Path, behaviour: dict[str, Any]) -> dict[str, Any]:
    """A model whose engine is the fake one."""
    return {"model_path": str(file), "envs": {"FAKE_ENGINE": json.dumps(behaviour)}}


def events_in(file: Path, name: str | None = None) -> list[dict[str, Any]]:
    """What fake engines wrote down so far, all or of one name."""
    if not file.exists():
        return []
    events = [json.loads(line) for line in file.read_text().splitlines()]
    return [event for event in events if name in (None, event["event"])]


async def until(condition: Callable[[], Any], limit_s: float = 20) -> Any:
    """What the condition gives, once it is true."""
    async with asyncio.timeout(limit_s):
        while not (value := condition()):
            await asyncio.sleep(0.02)
        return value


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.asynccontextmanager
async def a_node(home: Path, orphan_timeout_s: float = 1) -> AsyncIterator[LocalNode]:
    """This machine, as a gateway with that data folder has it."""
    with only_one_in(home):
        async with open_node(home, orphan_timeout_s=orphan_timeout_s) as node:
            yield node
