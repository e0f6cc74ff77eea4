"""Speaks with Kokoro by kokoro-onnx: a folder with an .onnx file and a file of voices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from engines.workers import speech
from engines.workers.device import onnx_session
from engines.workers.server import Order, Refused, serve

# The first letter of a voice's name -> its language as espeak-ng names it.
LANGUAGES = {
    "a": "en-us",
    "b": "en-gb",
    "e": "es",
    "f": "fr-fr",
    "h": "hi",
    "i": "it",
    "j": "ja",
    "p": "pt-br",
    "z": "cmn",
}
PAUSE_S = 0.2


class Kokoro:
    """A speaker."""

    rate = 24_000
    speeds = (0.5, 2.0)

    def __init__(self, order: Order) -> None:
        from kokoro_onnx import Kokoro as Model

        model, voices = _files(Path(order.model))
        session = onnx_session(str(model), order.options)
        self._model = Model.from_session(session, str(voices))
        self._language: str | None = order.options.get("language")
        self.voices = [speech.Voice(name, LANGUAGES.get(name[:1], "en-us")) for name in self._model.voices]
        self._languages = dict(self.voices)

    def say(self, text: str, voice: str, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """The samples of the text, sentence by sentence; `lang` in `more` says what language it is."""
        import numpy as np

        if unknown := set(more) - {"lang"}:
            raise Refused(f"`kwargs` has {sorted(unknown)[0]!r}; known is: lang.", param="kwargs")
        language = more.get("lang") or self._language or self._languages[voice]
        pause = np.zeros(int(PAUSE_S * self.rate), np.float32)
        for sentence in speech.sentences(text):
            try:
                phonemes = self._model.tokenizer.phonemize(sentence, language)
            except RuntimeError as exc:
                raise Refused(f"The language {language!r} is not known to espeak-ng: {exc}.", param="kwargs") from exc
            if not self._model.tokenizer.tokenize(phonemes[:1000]):
                continue  # nothing but signs
            samples, _ = self._model.create(phonemes, voice=voice, speed=speed, is_phonemes=True)
            yield np.concatenate([samples, pause]).astype(np.float32)


def _files(path: Path) -> tuple[Path, Path]:
    folder = path.parent if path.is_file() else path
    models = [path] if path.suffix == ".onnx" else sorted(folder.glob("**/*.onnx"))
    voices = sorted(one for one in folder.glob("**/voices*") if one.suffix in (".bin", ".npz"))
    if not models or not voices:
        what = "an .onnx file" if not models else "its voices (voices*.bin or voices*.npz)"
        raise Refused(f"{folder} lacks {what}: Kokoro is launched from a folder that holds both.")
    return models[0], voices[0]


def _load(order: Order) -> list[BaseRoute]:
    return speech.routes(Kokoro(order), order)


def main() -> None:
    """Serve until SIGTERM."""
    serve(_load)


if __name__ == "__main__":
    main()
