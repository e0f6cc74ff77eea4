"""Speaks with Piper's voices: one .onnx file with its .onnx.json beside it, or a folder of such."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from engines.workers import speech
from engines.workers.device import onnx_session
from engines.workers.server import Order, Refused, serve

TUNING = {"noise_scale": (0.0, 2.0), "noise_w_scale": (0.0, 2.0), "volume": (0.0, 10.0)}


class Piper:
    """A speaker; its voices are those of its files, and the speakers in them."""

    speeds = (0.25, 4.0)

    def __init__(self, order: Order) -> None:
        self._voices: dict[str, tuple[Any, int | None]] = {}
        self.voices: list[speech.Voice] = []
        paths = _files(Path(order.model))
        loaded = [(path, _load(path, order.options)) for path in paths]
        self.rate: int = loaded[0][1].config.sample_rate
        for path, voice in loaded:
            if voice.config.sample_rate != self.rate:
                raise Refused(f"{path} has another sample rate than {paths[0]}: launch them as two models.")
            speakers: Mapping[str, int] = voice.config.speaker_id_map or {}
            prefix = f"{path.stem}/" if len(paths) > 1 else ""
            named: dict[str, int | None] = {prefix + name: number for name, number in speakers.items()}
            for name, number in (named or {path.stem: None}).items():
                self._voices[name] = (voice, number)
                self.voices.append(speech.Voice(name, voice.config.espeak_voice))

    def say(self, text: str, voice: str, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """The samples of the text, sentence by sentence."""
        from piper import SynthesisConfig

        model, speaker = self._voices[voice]
        tuning = speech.known_only(more, TUNING)
        config = SynthesisConfig(speaker_id=speaker, length_scale=model.config.length_scale / speed, **tuning)
        for chunk in model.synthesize(text, config):
            yield chunk.audio_float_array


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(path.glob("**/*.onnx"))
    if not found:
        raise Refused(f"There is no voice in {path}: a Piper voice is an .onnx file with its .onnx.json beside it.")
    for one in found:
        if not Path(f"{one}.json").is_file():
            raise Refused(f"The voice {one} lacks its description: put {one.name}.json beside it.")
    return found


def _load(path: Path, options: Mapping[str, Any]) -> Any:
    import json

    from piper import PiperConfig, PiperVoice

    about = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    try:
        config = PiperConfig.from_dict(about)
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise Refused(f"{path}.json does not describe a Piper voice: {type(exc).__name__}: {exc}.") from exc
    session = onnx_session(str(path), options)
    return PiperVoice(session=session, config=config)


def _load_routes(order: Order) -> list[BaseRoute]:
    return speech.routes(Piper(order), order)


def main() -> None:
    """Serve until SIGTERM."""
    serve(_load_routes)


if __name__ == "__main__":
    main()
