"""What tests share: a running gateway, with fake engines or a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import FAKE_ENGINE, Gateway, StartGateway, fake_model


@pytest.fixture
async def start_gateway(tmp_path: Path) -> AsyncIterator[StartGateway]:
    """Starts gateways; each is ended after the test.

    `await start_gateway(fake={...})` serves one model `fake`, whose engine behaves as FAKE_ENGINE says;
    `models` and other settings are as in a settings file.
    """
    started: list[Gateway] = []

    async def start(
        *,
        fake: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        home: Path | None = None,
        env: dict[str, str] | None = None,
        **settings: Any,
    ) -> Gateway:
        file = tmp_path / "fake.gguf"
        file.write_bytes(b"GGUF")
        models = settings.pop("models", {})
        if fake is not None:
            models["fake"] = fake_model(file, fake) | (model or {})
        engines = {"llama.cpp": {"binary": str(FAKE_ENGINE)}}
        gateway = await Gateway.start(home or tmp_path / "home", {"engines": engines, "models": models} | settings, env)
        started.append(gateway)
        return gateway

    yield start
    for gateway in started:
        try:
            await gateway.end()
        except TimeoutError:
            gateway.process.kill()
            raise
