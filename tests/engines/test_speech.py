"""The engines that hear and speak: what they accept, and what a launch becomes. And small parts of their workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.base import Endpoint, Engine, EngineSettings, Launch, Placement
from engines.speech_packages import F5TTS, ChatTTS, KokoroTorch, TransformersTTS
from engines.tts import Kokoro, Piper
from engines.whisper import FasterWhisper, TransformersASR
from engines.workers.speech import sentences
from engines.workers.transcription import stamp
from registry.catalogue import Catalogue
from registry.decode import DecodeError
from registry.registry import Registry
from registry.resolve import Artifact, Selection, resolve

SOCKET = Endpoint(socket="/run/a.sock", api_key="the-secret-key")
REGISTRY = Registry(catalogue=Catalogue(builtin=True))
PACKAGES: tuple[Engine, ...] = (TransformersTTS(), KokoroTorch(), ChatTTS(), F5TTS())
ENGINES: tuple[Engine, ...] = (FasterWhisper(), TransformersASR(), Piper(), Kokoro(), *PACKAGES)


def an_artifact(**wishes: Any) -> Artifact:
    return resolve(REGISTRY, Selection(model_type="audio", **wishes))


def acceptors(artifact: Artifact) -> list[str]:
    return [engine.name for engine in ENGINES if engine.accepts(artifact) is None]


def options_of(engine: Engine, options: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What the worker is told."""
    artifact = an_artifact(model_name="whisper-tiny")
    launch = Launch(uid="m", artifact=artifact, engine=engine.name, options=options, **fields)
    configured = engine.configured(EngineSettings(python=sys.executable))
    command = configured.command(launch, Path("/models/m"), Placement(), SOCKET)
    assert command.argv[0] == sys.executable
    assert command.argv[-8:] == ("--model", "/models/m", "--uid", "m", "--host", "/run/a.sock", "--port", "0")
    assert "the-secret-key" not in " ".join(command.argv)
    said: dict[str, Any] = json.loads(command.env["WORKER_OPTIONS"])
    return said


# --- which files are whose


@pytest.mark.parametrize(
    ("wishes", "names"),
    [
        ({"model_name": "whisper-base"}, ["transformers-asr"]),
        ({"model_name": "Belle-whisper-large-v3-zh"}, ["transformers-asr"]),
        ({"model_id": "Systran/faster-whisper-small"}, ["faster-whisper"]),
        ({"model_name": "whisper-base", "model_id": "Systran/faster-whisper-base"}, ["faster-whisper"]),
        ({"model_id": "o/m", "model_format": "ctranslate2"}, ["faster-whisper"]),
        ({"model_id": "openai/whisper-tiny"}, ["transformers-asr"]),
        ({"model_name": "Qwen3-ASR-1.7B"}, []),
        ({"model_name": "Qwen3-ASR-1.7B", "model_id": "Qwen/Qwen3-ASR-1.7B-hf"}, ["transformers-asr"]),
        ({"model_id": "rhasspy/voice", "model_format": "onnx"}, ["piper"]),
        ({"model_id": "o/Kokoro-82M-onnx", "model_format": "onnx"}, ["kokoro"]),
        ({"model_name": "Kokoro-82M", "model_id": "o/k", "model_format": "onnx"}, ["kokoro"]),
        ({"model_name": "Kokoro-82M"}, ["kokoro-torch"]),
        ({"model_name": "Kokoro-82M-v1.1-zh"}, ["kokoro-torch"]),
        ({"model_name": "ChatTTS"}, ["chattts"]),
        ({"model_name": "F5-TTS"}, ["f5-tts"]),
        ({"model_id": "facebook/mms-tts-eng"}, ["transformers-asr", "transformers-tts"]),
        ({"model_name": "CosyVoice2-0.5B"}, []),
    ],
)
def test_models_of_hubs_go_to_the_engine_that_reads_their_form(wishes: dict[str, Any], names: list[str]) -> None:
    assert acceptors(an_artifact(**wishes)) == names


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("config.json", "model.bin", "tokenizer.json"), ["faster-whisper"]),
        (("config.json", "model.safetensors"), ["transformers-asr"]),
        (("v.onnx", "v.onnx.json"), ["piper"]),
        (("k.onnx", "voices.bin"), ["kokoro"]),
        (("config.json", "kokoro-v1_0.pth", "voices/af_heart.pt"), ["transformers-asr", "kokoro-torch"]),
        (("asset/DVAE.safetensors",), ["chattts"]),
        (("F5TTS_v1_Base/model_1250000.safetensors",), ["f5-tts"]),
        (("README.md",), []),
    ],
)
def test_files_in_place_are_looked_at(tmp_path: Path, files: tuple[str, ...], names: list[str]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert acceptors(an_artifact(model_path=str(tmp_path))) == names


def test_a_folder_of_vits_is_no_hearers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vits"}')
    assert acceptors(an_artifact(model_path=str(tmp_path))) == ["transformers-tts"]


def test_a_voice_is_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "v.onnx").touch()
    (tmp_path / "v.onnx.json").touch()
    assert acceptors(an_artifact(model_path=str(tmp_path / "v.onnx"))) == ["piper"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CosyVoice2-0.5B", "need CosyVoice's own program from its git repository"),
        ("MeloTTS-English", "PyPI's melotts 0.1.1 cannot be built"),
        ("MegaTTS3", "by model_engine command"),
        ("Qwen3-ASR-0.6B", "qwen-asr package"),
    ],
)
def test_families_of_other_packages_say_which(name: str, words: str) -> None:
    for engine in ENGINES:
        assert words in str(engine.accepts(an_artifact(model_name=name)))


@pytest.mark.parametrize(
    ("config", "is_read"), [({"model_type": "qwen3_asr"}, True), ({"thinker_config": {}}, False), (None, True)]
)
def test_qwen3_asr_is_read_in_the_form_of_transformers(
    tmp_path: Path, config: dict[str, Any] | None, is_read: bool
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    reason = TransformersASR().accepts(an_artifact(model_name="Qwen3-ASR-0.6B", model_path=str(tmp_path)))
    assert (reason is None) is is_read
    assert is_read or "Qwen/Qwen3-ASR-1.7B-hf" in str(reason)


def test_every_audio_family_of_the_catalogue_has_an_engine_or_a_sentence() -> None:
    for name in REGISTRY.names("audio"):
        artifact = an_artifact(model_name=name)
        reasons = [engine.accepts(artifact) for engine in ENGINES]
        assert None in reasons or any("need" in str(reason) or "onnx" in str(reason) for reason in reasons), name


# --- a launch


@pytest.mark.parametrize(
    ("engine", "options", "said"),
    [
        (FasterWhisper(), {}, {"device": "auto"}),
        (
            FasterWhisper(),
            {"device": "cuda", "compute_type": "float16", "n_threads": "2", "beam_size": 1, "vad_filter": True}
            | {"language": "de"},
            {"device": "cuda", "compute_type": "float16", "n_threads": 2, "beam_size": 1, "vad_filter": True}
            | {"language": "de"},
        ),
        (TransformersASR(), {"torch_dtype": "float16"}, {"torch_dtype": "float16", "device": "auto"}),
        (Piper(), {}, {"device": "cpu", "max_characters": 4096}),
        (Piper(), {"voice": "a", "voice_aliases": {"alloy": "a"}}, {"voice": "a", "voice_aliases": {"alloy": "a"}}),
        (Kokoro(), {"language": "en-us"}, {"language": "en-us"}),
        (KokoroTorch(), {"language": "en-us"}, {"language": "en-us", "device": "auto"}),
        (ChatTTS(), {"voice": "seed-2"}, {"voice": "seed-2", "device": "auto"}),
        (F5TTS(), {"vocoder_path": "/m/vocos"}, {"vocoder_path": "/m/vocos"}),
    ],
)
def test_the_options_reach_the_worker(engine: Engine, options: dict[str, Any], said: dict[str, Any]) -> None:
    found = options_of(engine, options)
    assert {name: found[name] for name in said} == said


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_a_launch_on_the_cpu_says_so(engine: Engine) -> None:
    assert options_of(engine, {}, n_gpu=0)["device"] == "cpu"


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_an_unknown_option_is_refused(engine: Engine) -> None:
    with pytest.raises(DecodeError):
        options_of(engine, {"n_thread": 1})


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_what_is_not_installed_says_what_to_do(engine: Engine, tmp_path: Path) -> None:
    wrong = engine.configured(EngineSettings(python=str(tmp_path / "python")))
    assert "is not an executable file" in str(wrong.installed())
    assert f"hostler engines install {engine.name}" in str(engine.configured(EngineSettings(), tmp_path).installed())


# --- small parts of the workers


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00,000"), (59.9996, "00:01:00,000"), (3661.25, "01:01:01,250"), (-0.01, "00:00:00,000")],
)
def test_a_stamp(seconds: float, text: str) -> None:
    assert stamp(seconds, ",") == text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("It costs 3.50 in all", ["It costs 3.50 in all"]),
        ("你好。再见！", ["你好。", "再见！"]),
        ('He said "no." Then left.', ['He said "no."', "Then left."]),
        ("a\nb", ["a", "b"]),
        ("  ", []),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts
