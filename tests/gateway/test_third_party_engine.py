"""An engine from a package of somebody else's, installed beside Hostler: nothing of Hostler's is touched."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import StartGateway
from openai import AsyncOpenAI
from xinference_client import RESTfulClient

PACKAGE = Path(__file__).parents[1] / "third_party_engine"

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the package is installed."""
    source, folder = tmp_path_factory.mktemp("source") / "echo", tmp_path_factory.mktemp("installed")
    shutil.copytree(PACKAGE, source)  # building leaves files behind
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(source)]
    subprocess.run(argv, check=True, capture_output=True, timeout=170)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


async def test_it_serves_a_model_of_the_settings_to_the_openai_sdk(
    start_gateway: StartGateway, installed: dict[str, str]
) -> None:
    model = {"model_engine": "echo", "options": {"times": 2}}
    gateway = await start_gateway(models={"parrot": model}, env=installed)
    async with AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0) as client:
        answer = await client.completions.create(model="parrot", prompt="hello")
    assert (answer.choices[0].text, answer.model) == ("hello hello", "parrot")
    assert (await gateway.until("parrot", state="ready"))["engine"] == "echo"


async def test_it_is_launched_and_asked_by_xinferences_client(
    start_gateway: StartGateway, installed: dict[str, str]
) -> None:
    gateway = await start_gateway(env=installed)

    def talk() -> Any:
        client = RESTfulClient(gateway.address)
        uid = client.launch_model(model_name="parrot", model_engine="echo", times=3)
        return client.get_model(uid).generate("hi")

    assert (await asyncio.to_thread(talk))["choices"][0]["text"] == "hi hi hi"


async def test_its_options_are_checked_as_ours_are(start_gateway: StartGateway, installed: dict[str, str]) -> None:
    gateway = await start_gateway(env=installed)
    answer = await gateway.post("/v1/models", {"model_name": "parrot", "model_engine": "echo", "tims": 3})
    assert answer.status == 400
    assert "Unknown key 'tims' - at `options`. Did you mean 'times'?" in answer.error["message"]


async def test_without_its_package_there_is_no_such_engine(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    answer = await gateway.post("/v1/models", {"model_name": "parrot", "model_engine": "echo"})
    assert answer.status == 400
    assert "There is no engine 'echo'" in answer.error["message"]
