"""The way of a custom model as its users know it from documentation: by curl, by Python, by the command line.

Each step is what a reader would type, one after the other, against a running gateway and a real model.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from harness import Gateway
from xinference_client import RESTfulClient

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), {"cache": str(model_cache)})
    yield gateway
    assert await gateway.end() == 0


@pytest.fixture
def model_json(smollm2_gguf: Path, tmp_path: Path) -> Path:
    """The LLM template of the page, filled in for a GGUF file."""
    model = {
        "version": 2,
        "context_length": 2048,
        "model_name": "custom-llama-2",
        "model_lang": ["en", "zh"],
        "model_ability": ["generate"],
        "model_description": "This is a custom model description.",
        "model_family": "my-custom-llama-2",
        "model_specs": [
            {
                "model_format": "ggufv2",
                "model_size_in_billions": "0_135",
                "quantization": "Q4_1",
                "model_id": None,
                "model_hub": "huggingface",
                "model_uri": f"file://{smollm2_gguf}",
                "model_revision": None,
                "model_file_name_template": smollm2_gguf.name,
                "activated_size_in_billions": None,
            }
        ],
        "chat_template": None,
        "stop_token_ids": None,
        "stop": None,
        "reasoning_start_tag": None,
        "reasoning_end_tag": None,
        "cache_config": None,
        "virtualenv": {
            "packages": [],
            "inherit_pip_config": True,
            "index_url": None,
            "extra_index_url": None,
            "find_links": None,
            "trusted_host": None,
            "no_build_isolation": None,
        },
        "is_builtin": False,
    }
    file = tmp_path / "model.json"
    file.write_text(json.dumps(model))
    return file


async def hostler(gateway: Gateway, *words: str, said: str = "", code: int = 0) -> str:
    """A command, and all that it printed."""
    env = os.environ | {"HOSTLER_ENDPOINT": gateway.address}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "gateway.cli", *words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=env,
    )
    printed, _ = await asyncio.wait_for(process.communicate(said.encode()), 90)
    assert process.returncode == code, printed.decode()
    return printed.decode()


async def test_by_the_command_line(gateway: Gateway, model_json: Path) -> None:
    await hostler(gateway, "register", "--model-type", "LLM", "--file", str(model_json), "--persist")
    assert "custom-llama-2" in await hostler(gateway, "registrations", "--model-type", "LLM")
    launched = await hostler(
        gateway, "launch", "--model-name", "custom-llama-2", "--model-format", "ggufv2", "--n_threads", "1"
    )
    assert "Model uid: custom-llama-2" in launched
    assert "custom-llama-2" in await hostler(gateway, "list")
    generated = await hostler(
        gateway, "generate", "--model-uid", "custom-llama-2", "--max_tokens", "8", said="The capital of France is\n\n"
    )
    assert "Paris" in generated
    assert "Q4_1" in await hostler(gateway, "engine", "--model-name", "custom-llama-2")
    await hostler(gateway, "terminate", "--model-uid", "custom-llama-2")
    await hostler(gateway, "unregister", "--model-type", "LLM", "--model-name", "custom-llama-2")
    assert "custom-llama-2" not in await hostler(gateway, "registrations", "--model-type", "LLM")
    refused = await hostler(gateway, "launch", "-n", "custom-llama-2", code=1)
    assert "custom-llama-2" in refused


async def test_by_python(gateway: Gateway, model_json: Path) -> None:
    def page() -> dict[str, Any]:
        client = RESTfulClient(gateway.address)
        client.register_model(model_type="LLM", model=model_json.read_text(), persist=False)
        registrations = client.list_model_registrations(model_type="LLM")
        assert "custom-llama-2" in {entry["model_name"] for entry in registrations}
        uid = client.launch_model(model_name="custom-llama-2", model_format="ggufv2", n_threads=1)
        model = client.get_model(model_uid=uid)
        answer = model.generate("The capital of France is", {"max_tokens": 4, "temperature": 0})
        client.terminate_model(uid)
        client.unregister_model(model_type="LLM", model_name="custom-llama-2")
        return answer

    answer = await asyncio.to_thread(page)
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"].startswith(" Paris")
    assert set(answer["usage"]) >= {"prompt_tokens", "completion_tokens", "total_tokens"}


async def test_by_curl(gateway: Gateway, smollm2_gguf: Path) -> None:
    """An existing file under a built-in name, without a registration."""
    body = {"model_engine": "llama.cpp", "model_name": "smollm2-instruct", "model_path": str(smollm2_gguf)}

    def curl(*words: str) -> Any:
        argv = ["curl", "-sS", "-H", "accept: application/json", "-H", "Content-Type: application/json", *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=True)
        return json.loads(done.stdout)

    launched = await asyncio.to_thread(curl, "-X", "POST", f"{gateway.address}/v1/models", "-d", json.dumps(body))
    assert launched == {"model_uid": "smollm2-instruct"}
    asked = {"model": "smollm2-instruct", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    answer = await asyncio.to_thread(curl, f"{gateway.address}/v1/completions", "-d", json.dumps(asked))
    assert answer["choices"][0]["text"].startswith(" Paris")
    assert await asyncio.to_thread(curl, "-X", "DELETE", f"{gateway.address}/v1/models/smollm2-instruct") is None


async def test_the_model_that_is_launched_by_its_path(gateway: Gateway, smollm2_gguf: Path) -> None:
    launched = await hostler(
        gateway, "launch", "--model_path", str(smollm2_gguf), "--model-engine", "llama.cpp", "-n", "smollm2-instruct"
    )
    assert "Model uid: smollm2-instruct" in launched
    await hostler(gateway, "terminate", "--model-uid", "smollm2-instruct")
