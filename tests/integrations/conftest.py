"""A running gateway for the integrations, with its models launched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from harness import Gateway
from launched import launch_both


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    model_cache: Path, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), {"cache": str(model_cache)})
    try:
        await asyncio.to_thread(launch_both, gateway.address, smollm2_gguf)
        yield gateway
    finally:
        code = await gateway.end()
    assert code == 0
