"""Options that are not known here: refused with the nearest, or passed on when that is wished for."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import psutil
from harness import StartGateway


async def test_an_unknown_option_is_refused_and_passed_on_when_forced(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway()
    wish = {"model_uid": "m", "model_path": str(tmp_path / "fake.gguf"), "n_thread": 1, "mlock": True, "n_threads": 2}
    refused = await gateway.post("/v1/models", wish)
    assert refused.status == 400
    assert "n_threads" in refused.json["detail"]
    assert "force_options" in refused.json["detail"]

    answer = await gateway.post("/v1/models", wish | {"force_options": True})
    assert (answer.status, answer.json) == (200, {"model_uid": "m"})
    assert answer.headers["x-hostler-notes"] == "Passed on to llama.cpp unchecked: n_thread, mlock."
    argv = psutil.Process((await gateway.until("m"))["pid"]).cmdline()
    assert argv[-3:] == ["--n-thread", "1", "--mlock"]
    assert argv[argv.index("--threads") + 1] == "2"
    assert (await gateway.get("/v1/models/m")).json["forced_options"] == {"n_thread": 1, "mlock": True}
    await gateway.end()

    gateway = await start_gateway(home=gateway.home)  # it is kept
    argv = psutil.Process((await gateway.until("m", state="ready"))["pid"]).cmdline()
    assert argv[-3:] == ["--n-thread", "1", "--mlock"]


async def test_what_the_gateway_says_itself_cannot_be_forced(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    wish = {"model_path": str(tmp_path / "fake.gguf"), "model_uid": "m", "force_options": True}
    for option, said in (("host", "the gateway says it itself"), ("api-key", "the gateway says"), ("a b", "a flag")):
        answer = await gateway.post("/v1/models", wish | {"options": {option: "0.0.0.0"}})
        assert (answer.status, said in answer.json["detail"]) == (400, True), answer.body
    answer = await gateway.post("/v1/models", wish | {"n_threads": "many"})  # what is known is still checked
    assert (answer.status, "n_threads" in answer.json["detail"]) == (400, True)


async def test_the_command_line_forces_and_says_so(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()

    async def launch(*words: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "gateway.cli", "launch", "--endpoint", gateway.address),
            *("--model-path", str(tmp_path / "fake.gguf"), "--model-uid", "m", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode()

    code, said = await launch("--rope-scale", "2")
    assert (code, "rope_scale" in said) == (1, True), said
    code, said = await launch("--rope-scale", "2", "--force-options")
    assert (code, "Passed on to the engine unchecked: rope_scale." in said) == (0, True), said
    argv = psutil.Process((await gateway.until("m"))["pid"]).cmdline()
    assert argv[-2:] == ["--rope-scale", "2"]
