"""A picture in a chat, by the real llama.cpp with a projector: what it says is nonsense, that it sees is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from harness import Answer, Gateway

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

SMALL = {"n_threads": 1, "context_length": 512, "n_parallel": 1, "model_engine": "llama.cpp"}
PATCHES = 16  # of a picture, as the tower takes it: each a token
RED, BLUE = (  # of one pixel each
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
    for png in (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC",
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYPgPAAEDAQAIicLsAAAAAElFTkSuQmCC",
    )
)
TEXT = {"type": "text", "text": "What is this?"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), {})
    yield gateway
    assert await gateway.end() == 0


@pytest.fixture
def model(tmp_path: Path, smollm2_gguf: Path, mmproj_gguf: Path) -> Path:
    """The model with the projector beside it."""
    for file in (smollm2_gguf, mmproj_gguf):
        (tmp_path / file.name).symlink_to(file)
    return tmp_path / smollm2_gguf.name


async def ask(gateway: Gateway, uid: str, *parts: dict[str, Any]) -> Answer:
    body = {"model": uid, "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 8, "temperature": 0}
    return await gateway.post("/v1/chat/completions", body)


async def test_a_picture_is_seen(gateway: Gateway, model: Path, mmproj_gguf: Path) -> None:
    wish = {"model_uid": "seer", "model_path": str(model), "multimodal_projector": mmproj_gguf.name} | SMALL
    answer = await gateway.post("/v1/models", wish)
    assert answer.status == 200, answer.body
    answers = [await ask(gateway, "seer", *parts) for parts in ([TEXT], [TEXT, RED], [TEXT, BLUE])]
    assert [answer.status for answer in answers] == [200, 200, 200], [answer.body for answer in answers]
    text, red, blue = (answer.json["usage"]["prompt_tokens"] for answer in answers)
    assert red == blue
    assert text + PATCHES <= red < text + 2 * PATCHES


async def test_without_a_projector_a_picture_is_refused(gateway: Gateway, model: Path) -> None:
    answer = await gateway.post("/v1/models", {"model_uid": "blind", "model_path": str(model)} | SMALL)
    assert answer.status == 200, answer.body
    answer = await ask(gateway, "blind", TEXT, RED)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert "'blind' takes no image: it was launched without a projector" in answer.error["message"]
    assert "`multimodal_projector`" in answer.error["message"]
    stream = {"model": "blind", "messages": [{"role": "user", "content": [TEXT, RED]}], "stream": True}
    answer = await gateway.post("/v1/chat/completions", stream)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
