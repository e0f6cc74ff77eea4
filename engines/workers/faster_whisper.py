"""Hears with Whisper models in CTranslate2's form."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from engines.workers import transcription
from engines.workers.server import Order, Refused, serve
from engines.workers.transcription import Segment, Wish, Word

NEEDED = ("config.json", "model.bin", "tokenizer.json")
# What `kwargs` may not say: the request and the launch do.
OURS = frozenset(
    [
        "self",
        "audio",
        "language",
        "task",
        "log_progress",
        "temperature",
        "initial_prompt",
        "without_timestamps",
        "word_timestamps",
    ]
)
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # 0 asks for these, one after the other until it goes well


class FasterWhisper:
    """A hearer."""

    has_words = True

    def __init__(self, order: Order) -> None:
        import ctranslate2
        from faster_whisper import WhisperModel

        folder = _checked(Path(order.model))
        options = order.options
        device = options.get("device") or "auto"
        if device == "auto":
            device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
        try:
            self._model = WhisperModel(
                str(folder),
                device=device,
                compute_type=options.get("compute_type") or ("int8" if device == "cpu" else "default"),
                cpu_threads=options.get("n_threads") or 0,
                local_files_only=True,
            )
        except RuntimeError as exc:
            raise Refused(f"{folder / 'model.bin'} cannot be loaded, it may be damaged: {exc}.") from exc
        self.languages: list[str] = self._model.supported_languages
        self.can_translate: bool = self._model.model.is_multilingual
        self._defaults = {name: options[name] for name in ("beam_size", "vad_filter") if options.get(name) is not None}
        self._known = frozenset(inspect.signature(WhisperModel.transcribe).parameters) - OURS

    def hear(self, samples: Any, wish: Wish, cancel: threading.Event) -> tuple[str | None, Iterator[Segment]]:
        """The language and the segments, each heard when it is asked for."""
        for name in wish.more:
            if name not in self._known:
                raise Refused(f"`kwargs` has {name!r}; known are: {', '.join(sorted(self._known))}.", param="kwargs")
        try:
            segments, info = self._model.transcribe(
                samples,
                language=wish.language,
                task=wish.task,
                temperature=wish.temperature or TEMPERATURES,
                initial_prompt=wish.prompt,
                word_timestamps=wish.has_words,
                **self._defaults | wish.more,
            )
        except TypeError as exc:
            if wish.more:
                raise Refused(f"`kwargs` has a value of the wrong kind: {exc}.", param="kwargs") from exc
            raise
        return info.language, map(_segment, segments)


def _segment(found: Any) -> Segment:
    facts = {
        name: getattr(found, name)
        for name in ("seek", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob")
    }
    words = [Word(word.word.strip(), round(word.start, 3), round(word.end, 3)) for word in found.words or ()]
    return Segment(round(found.start, 3), round(found.end, 3), found.text, words, facts)


def _checked(path: Path) -> Path:
    folder = path.parent if path.is_file() else path
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if "model.bin" in missing and any(folder.glob("*.safetensors")):
        raise Refused(
            f"{folder} holds the model in the form of transformers: launch it with model_engine transformers-asr, or "
            "convert it: ct2-transformers-converter --model FOLDER --output_dir OTHER --copy_files tokenizer.json "
            "preprocessor_config.json."
        )
    if missing:
        raise Refused(f"{folder} is no Whisper model in CTranslate2's form: it lacks {', '.join(missing)}.")
    return folder


def _load(order: Order) -> list[BaseRoute]:
    return transcription.routes(FasterWhisper(order), order)


def main() -> None:
    """Serve until SIGTERM."""
    serve(_load)


if __name__ == "__main__":
    main()
