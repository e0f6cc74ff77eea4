"""What the transformers library hears with besides Whisper: each kind by a small model that hears tones (`tones`)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import pytest_asyncio
from harness import Gateway
from openai import AsyncOpenAI
from sound import hear, repeated
from tones import GAP_S, TONE_S, WORDS, silence, spelled, tone, wav

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

KINDS = ("ctc", "moonshine", "qwen3-asr")
HELLO, WORLD = (tone(WORDS[word], 2) for word in ("hello", "world"))
# Two windows: the cut is where it is quiet, between the two tones.
LONG = tone(WORDS["world"], 25) + silence(2) + tone(WORDS["hello"], 5)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    torch_python: str,
    tone_ctc: Path,
    tone_moonshine: Path,
    tone_qwen3_asr: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Gateway]:
    places = dict(zip(KINDS, (tone_ctc, tone_moonshine, tone_qwen3_asr), strict=True))
    model = {"model_type": "audio", "options": {"n_threads": 1}}
    settings = {
        "engines": {"transformers-asr": {"python": torch_python}},
        "models": {kind: model | {"model_path": str(place)} for kind, place in places.items()},
    }
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), settings, {"OMP_NUM_THREADS": "1"})
    yield gateway
    assert await gateway.end() == 0


async def heard(gateway: Gateway, sound: list[float], model: str, **fields: Any) -> Any:
    answer = await hear(gateway, wav(sound), model=model, **fields)
    assert answer.status == 200, answer.body
    return answer.json if fields.get("response_format", "json").endswith("json") else answer.body.decode()


async def test_a_ctc_model_writes_what_the_tones_spell(gateway: Gateway) -> None:
    sound = spelled("hello world")
    assert await heard(gateway, sound, "ctc", response_format="text") == "hello world\n"
    told = await heard(
        gateway,
        sound,
        "ctc",
        response_format="verbose_json",
        **{"timestamp_granularities[]": ["word", "segment"]},
    )
    length_s = len("hello world") * (TONE_S + GAP_S) + GAP_S
    assert (told["text"], told["duration"]) == ("hello world", pytest.approx(length_s, abs=0.01))
    first, second = told["words"]
    assert (first["word"], second["word"]) == ("hello", "world")
    assert (first["start"], first["end"]) == pytest.approx((GAP_S, 5 * (TONE_S + GAP_S)), abs=0.05)
    assert (second["start"], second["end"]) == pytest.approx((6 * (TONE_S + GAP_S) + GAP_S, length_s - GAP_S), abs=0.05)
    assert [(one["start"], one["end"]) for one in told["segments"]] == [(first["start"], second["end"])]


@pytest.mark.parametrize("model", ["moonshine", "qwen3-asr"])
async def test_a_model_that_writes_hears_which_word_it_is(gateway: Gateway, model: str) -> None:
    assert (await heard(gateway, HELLO, model))["text"] == "hello"
    assert (await heard(gateway, WORLD, model))["text"] == "world"


async def test_a_prompted_model_tells_the_language_unless_it_is_told(gateway: Gateway) -> None:
    told = [await heard(gateway, sound, "qwen3-asr", response_format="verbose_json") for sound in (HELLO, WORLD)]
    assert [(one["language"], one["text"]) for one in told] == [("en", "hello"), ("de", "world")]
    told = await heard(gateway, WORLD, "qwen3-asr", response_format="verbose_json", language="en", prompt="hello")
    assert (told["language"], told["text"]) == ("en", "world")


@pytest.mark.parametrize("model", ["moonshine", "qwen3-asr"])
async def test_long_sound_is_cut_where_it_is_quiet(gateway: Gateway, model: str) -> None:
    told = await heard(gateway, LONG, model, response_format="verbose_json")
    assert (told["text"], told["duration"]) == ("world hello", pytest.approx(32, abs=0.01))
    first, second = told["segments"]
    assert 25 <= first["end"] == second["start"] <= 27
    assert second["end"] == pytest.approx(32, abs=0.01)
    srt = await heard(gateway, LONG, model, response_format="srt")
    assert srt.startswith("1\n00:00:00,000 --> 00:00:2")
    assert srt.endswith("--> 00:00:32,000\nhello\n")
    vtt = await heard(gateway, LONG, model, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:2")


async def test_words_of_long_sound_are_where_they_were_said(gateway: Gateway) -> None:
    sound = spelled("hello") + silence(28) + spelled("world")
    about = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
    told = await heard(gateway, sound, "ctc", **about)
    assert told["text"] == "hello world"
    assert told["words"][1]["start"] == pytest.approx(1.6 + 28 + GAP_S, abs=0.05)


@pytest.mark.parametrize("model", KINDS)
async def test_what_is_heard_is_streamed(gateway: Gateway, model: str) -> None:
    sound = spelled("hello") + silence(28) + spelled("world") if model == "ctc" else LONG
    answer = await hear(gateway, wav(sound), model=model, stream="true")
    events = [json.loads(line[6:]) for line in answer.body.splitlines() if line.startswith(b"data: ")]
    deltas = [event["delta"] for event in events if event["type"] == "transcript.text.delta"]
    assert events[-1] == {"type": "transcript.text.done", "text": "hello world" if model == "ctc" else "world hello"}
    assert deltas == (["hello", " world"] if model == "ctc" else ["world", " hello"])


@pytest.mark.parametrize("model", KINDS)
async def test_a_click_is_no_error(gateway: Gateway, model: str) -> None:
    assert (await heard(gateway, tone(400, 0.005), model))["usage"]["seconds"] == 0.005


@pytest.mark.parametrize(
    ("model", "fields", "param", "words"),
    [
        ("ctc", {"language": "en"}, "language", "It takes none: leave it out"),
        ("qwen3-asr", {"language": "tlh"}, "language", "It knows: ar, cs"),
        ("moonshine", {"timestamp_granularities[]": "word"}, "timestamp_granularities[]", "cannot tell when each word"),
        ("ctc", {"kwargs": '{"num_beams": 2}'}, "kwargs", "known are: none"),
        ("qwen3-asr", {"kwargs": '{"num_beams": 2}'}, "kwargs", "known is: max_new_tokens"),
        ("qwen3-asr", {"kwargs": '{"max_new_tokens": 0}'}, "max_new_tokens", "max_new_tokens"),
    ],
)
async def test_what_a_kind_cannot_do_is_refused(
    gateway: Gateway, model: str, fields: dict[str, str], param: str, words: str
) -> None:
    answer = await hear(gateway, wav(HELLO), model=model, response_format="verbose_json", **fields)
    assert (answer.status, answer.error["param"]) == (400, param), answer.body
    assert words in answer.error["message"]
    translated = await hear(gateway, wav(HELLO), "translations", model=model)
    assert "cannot translate" in translated.error["message"]


async def test_the_openai_sdk_transcribes_by_a_ctc_model(gateway: Gateway) -> None:
    client = AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0)
    told = await client.audio.transcriptions.create(model="ctc", file=("a.wav", wav(spelled("bad head"))))
    assert told.text == "bad head"


@pytest.mark.parametrize("model", KINDS)
async def test_whoever_leaves_stops_the_hearing(gateway: Gateway, model: str) -> None:
    assert (await heard(gateway, HELLO, model))["text"] or model == "ctc"
    process = psutil.Process((await gateway.until(model, state="ready"))["pid"])

    def cpu_s() -> float:
        times = process.cpu_times()
        return times.user + times.system

    sound = repeated(wav(spelled("hello") + tone(WORDS["hello"], 24) + silence(1)), 40)
    begin = cpu_s()
    await hear(gateway, sound, model=model)
    whole = cpu_s() - begin
    form = aiohttp.FormData({"model": model, "stream": "true"})
    form.add_field("file", sound, filename="a.wav")
    begin = cpu_s()
    async with gateway.session.post(gateway.address + "/v1/audio/transcriptions", data=form) as response:
        assert (await response.content.readline()).startswith(b'data: {"type": "transcript.text.delta"')
    await heard(gateway, HELLO, model)  # its turn comes once the first has ended
    assert cpu_s() - begin < whole * 0.7
