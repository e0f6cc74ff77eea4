"""A gateway of this checkout as a process of its own, and the engines behind it, which can be asked directly too."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml

from gateway.keeper import STARTED
from gateway.lives import Life, Started

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
START_LIMIT_S = 60.0
LOOK_S = 0.05


class Engine(msgspec.Struct, frozen=True):
    """One engine that runs: the socket or URL to ask it directly, its key, its pid, and what was promised to it."""

    socket: str | None
    url: str
    key: str
    pid: int
    memory: dict[str, int]
    gpus: tuple[str, ...]
    started_at: float
    log: str


class Refused(Exception):
    """What was asked for was answered otherwise than with 200; the text is the whole answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:1500]}")
        self.status, self.text = status, text


class Door:
    """`hostler serve` with a data folder and settings of its own. Killed or stopped, it can be started again."""

    def __init__(self, home: Path, settings: dict[str, Any]) -> None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.home, self.settings = home, settings
        self.log = home / "gateway.log"
        self.log.touch()
        self.address = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> float:
        """Seconds until it answers."""
        file = self.home / "settings.yaml"
        file.write_text(yaml.safe_dump(self.settings, sort_keys=False))
        begin, began = self.log.stat().st_size, time.monotonic()
        path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "gateway/sdk"), os.environ.get("PYTHONPATH"))))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HOSTLER_")}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "gateway.cli", "serve", "-c", str(file), "--port", "0"),
                    "--home",
                    str(self.home),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=clean | {"PYTHONPATH": path, "HOSTLER_ON_EXIT": "stop"},
            )
        while not (found := ADDRESS.search(self.log.read_text(errors="replace")[begin:])):
            if self.process.poll() is not None or time.monotonic() - began > START_LIMIT_S:
                raise RuntimeError(f"the gateway did not start: {self.log.read_text(errors='replace')[begin:][-2000:]}")
            await asyncio.sleep(0.01)
        self.address = found[0]
        await self.close_session()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=400)
        )
        return time.monotonic() - began

    async def close_session(self) -> None:
        """Of our client, not of the gateway."""
        if self._session:
            await self._session.close()
        self._session = None

    async def kill(self) -> None:
        """kill -9 of the gateway alone."""
        assert self.process
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    async def stop(self, limit_s: float = 60) -> None:
        """With its engines."""
        await self.close_session()
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self.process.wait, limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    async def ask(self, method: str, path: str, body: Any = None, limit_s: float = 400) -> tuple[int, str]:
        """Status and text."""
        assert self._session
        async with self._session.request(
            method, self.address + path, json=body, timeout=aiohttp.ClientTimeout(total=limit_s)
        ) as reply:
            return reply.status, await reply.text()

    async def get(self, path: str, method: str = "GET", body: Any = None, limit_s: float = 400) -> Any:
        """The answer, decoded. Raises Refused."""
        status, text = await self.ask(method, path, body, limit_s)
        if status >= 400:
            raise Refused(status, text)
        return json.loads(text) if text else None

    async def launch(self, uid: str, limit_s: float = 400, **body: Any) -> float:
        """Seconds until it is ready. Raises Refused."""
        began = time.monotonic()
        await self.get("/v1/models", "POST", {"model_uid": uid} | body, limit_s)
        return time.monotonic() - began

    async def terminate(self, *uids: str) -> None:
        """Those of them that there are."""
        for uid in uids:
            with contextlib.suppress(Refused):
                await self.get(f"/v1/models/{uid}", "DELETE", limit_s=60)

    async def card(self, uid: str) -> dict[str, Any]:
        """The model as it is listed."""
        return await self.get(f"/v1/models/{uid}")

    async def replica(self, uid: str, index: int = 0) -> dict[str, Any]:
        """One copy, as operators see it; {} if it is not there."""
        replicas = await self.get("/v1/replicas")
        return next((one for one in replicas if (one["uid"], one["replica"]) == (uid, index)), {})

    async def until_state(self, uid: str, *states: str, limit_s: float, index: int = 0) -> dict[str, Any]:
        """The copy once it is in one of the states; as it is then, if that takes too long."""
        limit = time.monotonic() + limit_s
        while True:
            found = await self.replica(uid, index)
            if found.get("state") in states or time.monotonic() > limit:
                return found
            await asyncio.sleep(LOOK_S)

    async def happenings(self, uid: str) -> list[dict[str, Any]]:
        """What happened to a model, with times of the epoch."""
        return await self.get(f"/v1/events?follow=false&model_uid={uid}")

    async def first_token_s(self, uid: str, tokens: int = 4) -> float:
        """Of a streamed chat: seconds until the first event with data. Raises Refused."""
        assert self._session
        body = chat_body(uid, tokens)
        began, first = time.monotonic(), None
        async with self._session.post(f"{self.address}/v1/chat/completions", json=body) as reply:
            if reply.status != 200:
                raise Refused(reply.status, await reply.text())
            async for line in reply.content:
                if line.startswith(b"data: {") and first is None:
                    first = time.monotonic() - began
                    if b'"error"' in line:
                        raise Refused(200, line.decode())
        if first is None:
            raise Refused(200, "a stream without events")
        return first

    async def text(self, uid: str, tokens: int = 12) -> str:
        """A greedy completion."""
        body = {"model": uid, "prompt": "The capital of France", "max_tokens": tokens, "temperature": 0}
        return str((await self.get("/v1/completions", "POST", body))["choices"][0]["text"])

    def running(self, uid: str, index: int = 0) -> Engine:
        """As `engine`. Raises RuntimeError if there is none."""
        found = self.engine(uid, index)
        if found is None:
            raise RuntimeError(f"{uid} does not run: an earlier part has to launch it")
        return found

    @property
    def port(self) -> int:
        """Of the gateway."""
        return int(self.address.rpartition(":")[2])

    @property
    def pid(self) -> int:
        """Of the gateway."""
        assert self.process
        return self.process.pid

    def engine(self, uid: str, index: int = 0) -> Engine | None:
        """The newest life of that copy, as its run folder tells; None if there is none."""
        found: list[Engine] = []
        for folder in (self.home / "run").glob("*/"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                life = msgspec.json.decode((folder / "life.json").read_bytes(), type=Life)
                started = msgspec.json.decode((folder / STARTED).read_bytes(), type=Started)
                if (life.uid, life.index) == (uid, index):
                    end, place = life.endpoint, life.placement
                    url = f"http://{end.host}:{end.port}" if not end.socket else "http://engine"
                    found.append(
                        Engine(
                            socket=end.socket,
                            url=url,
                            key=end.api_key,
                            pid=started.engine[0],
                            memory=dict(place.memory),
                            gpus=place.gpu_uuids or (),
                            started_at=life.started_at,
                            log=life.log,
                        )
                    )
        return max(found, key=lambda one: one.started_at, default=None)


def chat_body(uid: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A streamed chat of so many tokens."""
    messages = [{"role": "user", "content": "Which side of the roundhouse do the locomotives leave from?"}]
    return {"model": uid, "messages": messages, "max_tokens": tokens, "stream": True, "ignore_eos": True} | more


@contextlib.asynccontextmanager
async def direct(engine: Engine) -> Any:
    """A client of the engine itself, over its own socket and with its key; its paths go after `http://engine`."""
    connector = aiohttp.UnixConnector(engine.socket, limit=0) if engine.socket else aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        base_url=engine.url,
        connector=connector,
        headers={"authorization": f"Bearer {engine.key}"},
        timeout=aiohttp.ClientTimeout(total=200),
    ) as session:
        yield session
