"""Speech through the gateway, by the real engines: what piper says, whisper hears.

By the official OpenAI SDK, by Xinference's own client, and by plain HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import wave
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest
import pytest_asyncio
from harness import Answer, Gateway
from openai import AsyncOpenAI
from sound import TEXT, hear, n_wrong, repeated
from xinference_client import RESTfulClient

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

LONG_TEXT = (
    "In the spring the farmer walks to the river and counts his sheep. A letter from the king arrives on Monday. "
    "Two old ships lie in the harbour and wait for better weather. My sister paints the kitchen door yellow. "
    "Every evening the baker gives the last loaf to the poor. The train to the mountains was full of children. "
    "At last the musicians played a song about elephants."
)
VOICE = "en_US-joe-medium"
OPTIONS = {"n_threads": 1}
STAMP = r"(\d\d):(\d\d):(\d\d)[,.](\d\d\d)"
CUE = re.compile(rf"{STAMP} --> {STAMP}\n(.+)\n")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    whisper_python: str,
    piper_python: str,
    torch_python: str,
    whisper_base: Path,
    whisper_hf: Path,
    piper_voice: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Gateway]:
    joe = {"model_path": str(piper_voice), "options": OPTIONS | {"voice_aliases": {"alloy": VOICE}}}
    settings = {
        "engines": {
            "faster-whisper": {"python": whisper_python},
            "piper": {"python": piper_python},
            "transformers-asr": {"python": torch_python},
        },
        "models": {
            "ear": {"model_type": "audio", "model_path": str(whisper_base), "options": OPTIONS},
            "ear-hf": {"model_type": "audio", "model_path": str(whisper_hf), "options": OPTIONS},
            "joe": {"model_type": "audio"} | joe,
        },
    }
    gateway = await Gateway.start(tmp_path_factory.mktemp("home"), settings, {"OMP_NUM_THREADS": "1"})
    yield gateway
    assert await gateway.end() == 0


@pytest.fixture
def client(gateway: Gateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=gateway.address + "/v1", api_key="none", max_retries=0, timeout=120)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def spoken(gateway: Gateway) -> bytes:
    """TEXT, as a wav."""
    said = await speak(gateway, response_format="wav")
    assert said.status == 200, said.body
    return said.body


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def long_sound(gateway: Gateway) -> bytes:
    """LONG_TEXT, as a wav of more than 30 seconds, which is what Whisper hears at once."""
    return (await speak(gateway, LONG_TEXT, response_format="wav", speed=0.7)).body


async def speak(gateway: Gateway, text: Any = TEXT, **more: Any) -> Answer:
    return await gateway.post("/v1/audio/speech", {"model": "joe", "input": text} | more)


async def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Xinference's client blocks, so it gets a thread."""
    return await asyncio.to_thread(function, *arguments, **named)


# --- what is said is heard


async def test_what_piper_says_the_openai_sdk_streams_and_whisper_hears(client: AsyncOpenAI) -> None:
    sound = b""
    async with client.audio.speech.with_streaming_response.create(model="joe", voice="alloy", input=TEXT) as said:
        assert said.headers["content-type"] == "audio/mpeg"
        async for piece in said.iter_bytes():
            sound += piece
    heard = await client.audio.transcriptions.create(model="ear", file=("speech.mp3", sound))
    assert n_wrong(heard.text) <= 1
    assert heard.usage.seconds == pytest.approx(6.2, abs=0.6)


async def test_whisper_in_the_form_of_transformers_hears_the_same(client: AsyncOpenAI, spoken: bytes) -> None:
    heard = await client.audio.transcriptions.create(
        model="ear-hf", file=("a.wav", spoken), response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert n_wrong(heard.text) <= 1
    assert heard.language == "en"
    assert n_wrong(" ".join(word.word for word in heard.words)) <= 1
    assert heard.words == sorted(heard.words, key=lambda word: word.start)


async def test_transformers_cut_long_sound_and_stream_it(gateway: Gateway, long_sound: bytes) -> None:
    heard = await hear(gateway, long_sound, model="ear-hf", stream="true")
    events = [json.loads(line[6:]) for line in heard.body.splitlines() if line.startswith(b"data: ")]
    assert [event["type"] for event in events[-2:]] == ["transcript.text.delta", "transcript.text.done"]
    assert n_wrong(events[-1]["text"], LONG_TEXT) <= 12


async def test_a_translation_into_english(client: AsyncOpenAI, spoken: bytes) -> None:
    for model in ("ear", "ear-hf"):
        assert n_wrong((await client.audio.translations.create(model=model, file=("a.wav", spoken))).text) <= 1


async def test_xinferences_client_speaks_and_hears(gateway: Gateway) -> None:
    xinference = await call(RESTfulClient, gateway.address)
    joe, ear = [await call(xinference.get_model, uid) for uid in ("joe", "ear")]
    whole = await call(joe.speech, TEXT)
    streamed = b"".join(await call(lambda: list(joe.speech(TEXT, stream=True, response_format="pcm"))))
    assert 5.5 < len(streamed) / 48_000 < 7
    assert n_wrong((await call(ear.transcriptions, whole))["text"]) <= 1
    verbose = await call(
        ear.transcriptions, whole, "en", response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert n_wrong(" ".join(word["word"] for word in verbose["words"])) <= 1
    assert n_wrong((await call(ear.translations, whole))["text"]) <= 1
    with pytest.raises(RuntimeError, match="cannot copy another"):
        await call(joe.speech, TEXT, prompt_speech=whole)
    with pytest.raises(RuntimeError, match="/v1/audio/transcriptions"):
        await call(ear.create_embedding, whole)


# --- forms of answers


async def test_each_form_of_a_transcription(gateway: Gateway, spoken: bytes) -> None:
    answers = {name: await hear(gateway, spoken, response_format=name) for name in ("json", "text", "srt", "vtt")}
    kinds = {name: answer.headers["content-type"].split(";")[0] for name, answer in answers.items()}
    assert kinds == {"json": "application/json", "text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
    assert n_wrong(answers["json"].json["text"]) <= 1
    assert n_wrong(answers["text"].body.decode()) <= 1
    srt, vtt = answers["srt"].body.decode(), answers["vtt"].body.decode()
    assert srt.startswith("1\n00:00:00,")
    assert vtt.startswith("WEBVTT\n\n00:00:00.")
    for text in (srt, vtt):
        cues = CUE.findall(text)
        assert n_wrong(" ".join(cue[8] for cue in cues)) <= 1
        times = [float(f"{int(h) * 3600 + int(m) * 60 + int(s)}.{ms}") for c in cues for h, m, s, ms in (c[:4], c[4:8])]
        assert times == sorted(times)
        assert 5 < times[-1] < 7


async def test_verbose_json_has_words_where_they_are_asked_for(gateway: Gateway, spoken: bytes) -> None:
    wish = {"response_format": "verbose_json"}
    plain = (await hear(gateway, spoken, **wish)).json
    both = (await hear(gateway, spoken, **wish, **{"timestamp_granularities[]": ["word", "segment"]})).json
    words = (await hear(gateway, spoken, **wish, **{"timestamp_granularities[]": "word"})).json
    assert plain["duration"] == pytest.approx(6.2, abs=0.6)
    assert plain["language"] == "en"
    assert "segments" in plain
    assert "words" not in plain
    assert n_wrong("".join(segment["text"] for segment in plain["segments"])) <= 1
    assert "segments" in both
    assert n_wrong(" ".join(word["word"] for word in both["words"])) <= 1
    assert "segments" not in words
    assert all(0 <= word["start"] <= word["end"] <= plain["duration"] + 0.1 for word in words["words"])


async def test_a_transcription_is_streamed_as_openais_is(client: AsyncOpenAI, spoken: bytes) -> None:
    stream = await client.audio.transcriptions.create(model="ear", file=("a.wav", spoken), stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert len(events) > 2  # one for each sentence
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "".join(event.delta for event in events[:-1])
    assert n_wrong(events[-1].text) <= 1


READ = """
import io, json, sys
import av
with av.open(sys.stdin.buffer) as container:
    frames = list(container.decode(audio=0))
print(json.dumps([sum(frame.samples for frame in frames) / frames[0].sample_rate, container.format.name]))
"""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("form", "kind", "media_type"),
    [
        ("mp3", "mp3", "audio/mpeg"),
        ("wav", "wav", "audio/wav"),
        ("flac", "flac", "audio/flac"),
        ("opus", "ogg", "audio/ogg"),
        ("aac", "aac", "audio/aac"),
    ],
)
async def test_each_form_of_speech_can_be_played(
    gateway: Gateway, piper_python: str, form: str, kind: str, media_type: str, stream: bool
) -> None:
    said = await speak(gateway, response_format=form, stream=stream)
    assert said.headers["content-type"] == media_type
    assert ("content-length" in said.headers) != stream
    done = subprocess.run([piper_python, "-c", READ], input=said.body, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    seconds, found = json.loads(done.stdout)
    assert found == kind
    assert seconds == pytest.approx(6.2, abs=0.7)


async def test_pcm_is_openais_16_bits_at_24_khz(gateway: Gateway) -> None:
    said = await speak(gateway, response_format="pcm")
    assert said.headers["content-type"] == "audio/pcm"
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
        file.writeframes(said.body)
    assert n_wrong((await hear(gateway, content.getvalue())).json["text"]) <= 1


async def test_a_wav_says_how_long_it_is(spoken: bytes) -> None:
    with wave.open(io.BytesIO(spoken)) as file:
        assert file.getnframes() * 2 == len(spoken) - 44


async def test_speech_as_events(gateway: Gateway) -> None:
    said = await speak(gateway, stream_format="sse")
    assert said.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in said.body.splitlines() if line]
    assert [event["type"] for event in events] == ["speech.audio.delta"] * (len(events) - 1) + ["speech.audio.done"]
    assert len(events) > 2  # one for each sentence


async def test_speed_makes_it_shorter(gateway: Gateway) -> None:
    slow, fast = [len((await speak(gateway, response_format="pcm", speed=speed)).body) for speed in (0.5, 2)]
    assert slow > 2 * fast


async def test_the_voices_are_listed(gateway: Gateway) -> None:
    found = (await gateway.get("/v1/audio/voices?model=joe")).json
    assert found["voices"] == [{"id": VOICE, "name": VOICE, "language": "en-us"}]
    assert found["default"] == VOICE
    assert (await gateway.get("/v1/audio/voices?model=ear")).status == 400
    assert (await gateway.get("/v1/audio/voices")).error["param"] == "model"
    assert (await gateway.get("/v1/audio/voices?model=nobody")).status == 404


# --- refusals


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": ""}, "input", "missing or empty"),
        ({"input": " \n "}, "input", "missing or empty"),
        ({"input": ["a"]}, "input", "missing or empty"),
        ({"input": "\u200b", "stream": False}, "input", "can be said"),
        ({"input": "x" * 4097}, "input", "at most 4096"),
        ({"input": "x", "voice": "bob"}, "voice", f"There is: {VOICE}"),
        ({"input": "x", "response_format": "wma"}, "response_format", "mp3, wav"),
        ({"input": "x", "speed": 9}, "speed", "from 0.25 to 4"),
        ({"input": "x", "speed": "fast"}, "speed", "a number"),
        ({"input": "x", "stream_format": "smoke"}, "stream_format", "audio or sse"),
        ({"input": "x", "kwargs": '{"pitch": 1}'}, "kwargs", "noise_scale"),
        ({"input": "x", "model": "ear"}, "model", "hears"),
    ],
)
async def test_speech_that_is_refused(gateway: Gateway, body: dict[str, Any], param: str, words: str) -> None:
    said = await gateway.post("/v1/audio/speech", {"model": "joe"} | body)
    assert said.status == 400, said.body[:100]
    assert said.error["param"] == param
    assert words in said.error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "docx"}, "response_format", "verbose_json"),
        ({"language": "xx"}, "language", "It knows: af"),
        ({"temperature": "7"}, "temperature", "from 0 to 1"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities[]", "verbose_json"),
        ({"response_format": "verbose_json", "timestamp_granularities[]": "day"}, "timestamp_granularities[]", "word"),
        ({"kwargs": "{"}, "kwargs", "JSON"),
        ({"kwargs": '{"beams": 2}'}, "kwargs", "beam_size"),
        ({"stream": "perhaps"}, "stream", "bool"),
        ({"model": "joe"}, "model", "speaks"),
    ],
)
async def test_a_transcription_that_is_refused(
    gateway: Gateway, spoken: bytes, fields: dict[str, Any], param: str, words: str
) -> None:
    for model in ("ear", "ear-hf"):
        heard = await hear(gateway, spoken, **{"model": model} | fields)
        assert heard.status == 400, heard.body
        assert heard.error["param"] == param
        if model == "ear":
            assert words in heard.error["message"]


@pytest.mark.parametrize(
    ("sound", "words"),
    [(b"this is no sound" * 100, "cannot be read as sound"), (b"", "empty"), (None, "no `file`")],
)
async def test_what_is_no_sound_is_refused(gateway: Gateway, sound: bytes | None, words: str) -> None:
    for more in ({}, {"stream": "true"}, {"model": "ear-hf"}):
        heard = await hear(gateway, sound, **more)
        assert heard.status == 400
        assert heard.error["param"] == "file"
        assert words in heard.error["message"]


async def test_a_broken_file_is_heard_up_to_the_break(gateway: Gateway) -> None:
    mp3 = (await speak(gateway)).body
    heard = (await hear(gateway, mp3[: len(mp3) // 2])).json["text"]
    assert "quick brown fox" in heard
    assert "noon" not in heard


async def test_the_options_of_a_request_reach_whisper(gateway: Gateway, spoken: bytes) -> None:
    heard = await hear(
        gateway,
        spoken,
        language="en-US",
        prompt="Numbers are written as words: one, two, seven.",
        temperature="0",
        kwargs='{"beam_size": 2}',
    )
    assert "seven apples" in heard.json["text"]


# --- clients that leave, engines that die


async def test_whoever_leaves_stops_the_hearing(gateway: Gateway, long_sound: bytes) -> None:
    async def cpu_s() -> float:
        times = psutil.Process((await gateway.until("ear", state="ready"))["pid"]).cpu_times()
        return times.user + times.system

    await hear(gateway, b"none")  # the model is loaded now
    sound, wish = repeated(long_sound, 6), {"model": "ear", "stream": "true", "kwargs": '{"beam_size": 1}'}
    begin = await cpu_s()
    await hear(gateway, sound, **wish)
    whole = await cpu_s() - begin
    form = aiohttp.FormData(wish)
    form.add_field("file", sound, filename="a.wav")
    begin = await cpu_s()
    async with gateway.session.post(gateway.address + "/v1/audio/transcriptions", data=form) as response:
        assert (await response.content.readline()).startswith(b'data: {"type": "transcript.text.delta"')
    assert (await hear(gateway, b"none")).status == 400  # its turn comes once the first has ended
    spent = await cpu_s() - begin
    assert spent < whole * 0.7


async def test_speech_whose_client_has_left_the_queue_is_never_made(gateway: Gateway) -> None:
    await speak(gateway, "Hello.")
    pid = (await gateway.until("joe", state="ready"))["pid"]

    def cpu_s() -> float:
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system

    begin = cpu_s()
    await speak(gateway, TEXT * 4)
    one = cpu_s() - begin
    begin = cpu_s()
    first = asyncio.create_task(speak(gateway, TEXT * 4))
    await gateway.until("joe", in_flight=1)
    rest = [asyncio.create_task(speak(gateway, TEXT * 4)) for _ in range(5)]
    await gateway.until("joe", in_flight=6)
    for asking in rest:
        asking.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    assert (await first).status == 200
    await gateway.until("joe", in_flight=0)
    await speak(gateway, "Hello.")  # its turn comes after whatever is left
    assert cpu_s() - begin < one * 3


async def test_speech_comes_sentence_by_sentence_and_an_engine_killed_meanwhile_breaks_it_off(gateway: Gateway) -> None:
    text = TEXT * 30
    whole_s = 6 * 30
    await speak(gateway, "Hello.")
    pid = (await gateway.until("joe", state="ready"))["pid"]
    body = {"model": "joe", "input": text, "stream": True, "response_format": "pcm"}
    content = b""
    async with gateway.session.post(gateway.address + "/v1/audio/speech", json=body) as response:
        assert response.status == 200
        content += await response.content.readany()
        os.kill(pid, signal.SIGKILL)  # long before the last sentence is made
        broken = False
        try:
            while piece := await response.content.readany():
                content += piece
        except aiohttp.ClientPayloadError:
            broken = True
    assert broken
    assert 0 < len(content) / 48_000 < whole_s / 2
    assert (await speak(gateway)).status == 200  # it is back


async def test_an_engine_killed_while_it_hears_ends_the_stream_with_an_error(
    gateway: Gateway, client: AsyncOpenAI, spoken: bytes, long_sound: bytes
) -> None:
    await hear(gateway, b"none")
    pid = (await gateway.until("ear", state="ready"))["pid"]
    sound = repeated(long_sound, 12)  # minutes of it: no machine hears that before the first words have come back
    stream = await client.audio.transcriptions.create(model="ear", file=("a.wav", sound), stream=True)

    async def listen() -> None:
        async for _ in stream:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(openai.APIError, match="went away while it answered"):
        await listen()
    assert n_wrong((await client.audio.transcriptions.create(model="ear", file=("a.wav", spoken))).text) <= 1
