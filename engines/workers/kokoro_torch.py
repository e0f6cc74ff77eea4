"""Speaks with Kokoro by the kokoro package: a folder with config.json, a .pth file and voices/*.pt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from engines.workers import speech
from engines.workers.device import torch_device, without_native_torchaudio
from engines.workers.server import Order, Refused, serve

# The package's name of a language, with which voices' names begin -> that of espeak-ng, by which clients may say it.
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
ENGLISH = "ab"
ENGLISH_WORDS = "en_core_web_sm"
BEGUN = "e"  # a language whose signs espeak-ng finds


class Kokoro:
    """A speaker."""

    rate = 24_000
    speeds = (0.5, 2.0)

    def __init__(self, order: Order) -> None:
        without_native_torchaudio()
        import torch
        from kokoro import KModel

        folder, model = _files(Path(order.model))
        self._is_chinese = "zh" in model.stem
        self._repository = "hexgrad/Kokoro-82M-v1.1-zh" if self._is_chinese else "hexgrad/Kokoro-82M"
        loaded: Any = KModel(repo_id=self._repository, config=str(folder / "config.json"), model=str(model))
        self._model = loaded.eval().to(torch_device(order.options))
        self._packs = {
            path.stem: torch.load(path, weights_only=True) for path in sorted((folder / "voices").glob("*.pt"))
        }
        self.voices = [speech.Voice(name, LANGUAGES.get(name[:1], "en-us")) for name in self._packs]
        self._language: str | None = order.options.get("language")
        self._readers: dict[str, Any] = {}

    def say(self, text: str, voice: str, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """The samples of the text, sentence by sentence; `lang` in `more` says what language it is."""
        import numpy as np

        if unknown := set(more) - {"lang"}:
            raise Refused(f"`kwargs` has {sorted(unknown)[0]!r}; known is: lang.", param="kwargs")
        reader = self._reader(more.get("lang") or self._language or voice[:1])
        pack = self._packs[voice]
        for sentence in speech.sentences(text):
            for part in reader(sentence):
                signs = "".join(one for one in part.phonemes if one in self._model.vocab)
                if signs.strip():
                    samples = self._model(signs, pack[len(signs) - 1], speed)
                    yield np.atleast_1d(samples.numpy()).astype(np.float32)

    def _reader(self, language: Any) -> Any:
        """What finds the sounds of a text, in parts that the model takes at once."""
        letter = {name: one for one, name in LANGUAGES.items()}.get(language, language)
        if letter not in LANGUAGES:
            raise Refused(
                f"The language {language!r} is not one of Kokoro's: {', '.join(LANGUAGES.values())}.", param="kwargs"
            )
        if letter not in self._readers:
            self._readers[letter] = self._new_reader(letter)
        return self._readers[letter]

    def _new_reader(self, letter: str) -> Any:
        import spacy.util
        from kokoro import KPipeline
        from misaki.espeak import EspeakG2P

        is_plain = letter in ENGLISH and not spacy.util.is_package(ENGLISH_WORDS)  # it would be downloaded
        try:
            reader = KPipeline(BEGUN if is_plain else letter, repo_id=self._repository, model=False)
        except ImportError as exc:
            name = {"j": "ja", "z": "zh"}.get(letter, "en")
            raise Refused(
                f"The language {LANGUAGES[letter]!r} needs the package misaki[{name}], which this environment lacks "
                f'({exc}). Launch the model with virtual_env_packages: ["misaki[{name}]"].',
                param="kwargs",
            ) from exc
        if is_plain:
            reader.g2p = EspeakG2P(language=LANGUAGES[letter])
        return reader


def _files(path: Path) -> tuple[Path, Path]:
    folder = path.parent if path.is_file() else path
    models = [path] if path.suffix == ".pth" else sorted(folder.glob("*.pth"))
    missing = [
        what
        for what, is_there in (
            ("config.json", (folder / "config.json").is_file()),
            ("a .pth file", models),
            ("voices/*.pt", any((folder / "voices").glob("*.pt"))),
        )
        if not is_there
    ]
    if missing:
        raise Refused(f"{folder} lacks {', '.join(missing)}: Kokoro is launched from a folder as its repository is.")
    return folder, models[0]


def _load(order: Order) -> list[BaseRoute]:
    return speech.routes(Kokoro(order), order)


def main() -> None:
    """Serve until SIGTERM."""
    serve(_load)


if __name__ == "__main__":
    main()
