"""VITS by the transformers library, through the gateway: a small model with random weights, which says noise."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import pytest
from harness import Answer, Gateway, StartGateway

pytestmark = pytest.mark.engine

TEXT = "Good evening. What do you wish? There is bread, and there is tea."


def length_s(answer: Answer, rate: int) -> float:
    assert answer.status == 200, answer.body
    with wave.open(io.BytesIO(answer.body)) as sound:
        assert (sound.getnchannels(), sound.getframerate()) == (1, rate)
        assert len(set(sound.readframes(1000))) > 10  # it is not silent
        return sound.getnframes() / rate


async def launched(start_gateway: StartGateway, torch_python: str, path: Path, **options: object) -> Gateway:
    model = {"model_type": "audio", "model_path": str(path), "options": {"n_threads": 1, **options}}
    return await start_gateway(engines={"transformers-tts": {"python": torch_python}}, models={"vits": model})


async def test_vits_speaks_with_each_of_its_voices(
    start_gateway: StartGateway, torch_python: str, tiny_vits: Path
) -> None:
    gateway = await launched(start_gateway, torch_python, tiny_vits, voice_aliases={"alloy": "1"})
    assert (await gateway.get("/v1/models/vits")).json["model_engine"] == "transformers-tts"
    voices = (await gateway.get("/v1/audio/voices?model=vits")).json
    assert (voices["default"], [one["id"] for one in voices["voices"]]) == ("0", ["0", "1"])

    async def say(**more: object) -> Answer:
        return await gateway.post("/v1/audio/speech", {"model": "vits", "input": TEXT, "response_format": "wav"} | more)

    usual = length_s(await say(voice="alloy", kwargs='{"noise_scale_duration": 0}'), 16_000)
    fast = length_s(await say(voice="1", speed=2, kwargs='{"noise_scale_duration": 0}'), 16_000)
    assert usual / fast == pytest.approx(2, rel=0.25)
    as_before = length_s(await say(voice="1", kwargs='{"noise_scale_duration": 0}'), 16_000)
    assert as_before == usual
    assert "There is no voice '2'" in (await say(voice="2")).error["message"]
    assert "known are: noise_scale" in (await say(kwargs='{"pitch": 1}')).error["message"]
    assert "nothing in it that can be said" in (await say(input="---")).error["message"]
    streamed = await say(response_format="mp3")
    assert (streamed.status, streamed.headers["content-type"]) == (200, "audio/mpeg")


async def test_another_architecture_is_refused(
    start_gateway: StartGateway, torch_python: str, smollm2_hf: Path
) -> None:
    gateway = await start_gateway(engines={"transformers-tts": {"python": torch_python}})
    body = {"model_uid": "m", "model_type": "audio", "model_path": str(smollm2_hf), "model_engine": "transformers-tts"}
    answer = await gateway.post("/v1/models", body)
    assert answer.status == 400
    assert "it loads what has the model_type vits in its config.json" in answer.error["message"]
