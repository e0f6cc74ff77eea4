"""Hears with Whisper and other models of speech recognition, by the transformers library.

Long sound is cut where it is quiet, into windows that a model hears at once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from engines.workers import transcription
from engines.workers.audio import RATE_HEARD
from engines.workers.device import torch_device
from engines.workers.hearing import long_enough, stops_once, windows
from engines.workers.prompted_asr import PROMPTED, PromptedASR
from engines.workers.server import Cancelled, Order, Refused, number, serve
from engines.workers.transcription import Hearer, Segment, Wish, Word

# Those that hear and write; others of the library's want a chat's prompt.
WRITERS = frozenset(
    ["whisper", "moonshine", "speech_to_text", "speecht5", "speech-encoder-decoder", "seamless_m4t", "seamless_m4t_v2"]
)
KWARGS = {"num_beams": (1, 20), "max_new_tokens": (1, 448), "no_repeat_ngram_size": (0, 50)}


class TransformersASR:
    """A hearer: Whisper, others that hear and write, and those that tell a letter for each moment (CTC)."""

    def __init__(self, folder: str, kind: str, device: str, dtype: Any) -> None:
        from transformers import pipeline

        self._pipe: Any = pipeline("automatic-speech-recognition", model=folder, device=device, dtype=dtype)
        self._is_whisper = kind == "whisper"
        self._is_writer = kind in WRITERS
        config = self._pipe.model.generation_config if self._is_writer else None
        if self._is_writer:
            self.has_words = bool(getattr(config, "alignment_heads", None))
        else:
            self.has_words = hasattr(self._pipe.tokenizer, "_get_word_offsets")
        self._is_multilingual = self._is_whisper and bool(getattr(config, "is_multilingual", True))
        self.can_translate = self._is_multilingual
        codes = getattr(config, "lang_to_id", None) or {}
        self.languages: list[str] = [code.strip("<|>") for code in codes] if self._is_multilingual else ["en"]
        if not self._is_whisper:
            self.languages = []

    def hear(self, samples: Any, wish: Wish, cancel: threading.Event) -> tuple[str | None, Iterator[Segment]]:
        """What is said, window by window, each heard when it is asked for; the language of the first one."""
        for name in wish.more:
            if name not in KWARGS or not self._is_writer:
                known = ", ".join(KWARGS) if self._is_writer else "none"
                raise Refused(f"`kwargs` has {name!r}; known are: {known}.", param="kwargs")
        said = self._said(wish)
        language = wish.language or (None if self._is_multilingual or not self._is_whisper else "en")
        begins = windows(samples)
        if not language and self._is_multilingual:
            language = self._language(samples[slice(*begins[0])])
        if self._is_multilingual and language:
            said["language"] = language

        def segments() -> Iterator[Segment]:
            for begin, end in begins:
                yield from self._window(samples[begin:end], begin / RATE_HEARD, wish, said, cancel)

        return language, segments()

    def _said(self, wish: Wish) -> dict[str, Any]:
        """To the model's `generate`."""
        if not self._is_writer:
            return {}
        said: dict[str, Any] = {
            name: number(value, name, int, least=KWARGS[name][0], most=KWARGS[name][1])
            for name, value in wish.more.items()
        }
        if wish.temperature:
            said |= {"do_sample": True, "temperature": wish.temperature}
        if self._is_multilingual:
            said["task"] = wish.task
        if self._is_whisper and wish.prompt:
            ids = self._pipe.tokenizer.get_prompt_ids(wish.prompt, return_tensors="pt")
            said["prompt_ids"] = ids.to(self._pipe.model.device)
        return said

    def _language(self, samples: Any) -> str | None:
        """What is spoken, as the model's detector hears it."""
        features = self._pipe.feature_extractor(samples, sampling_rate=RATE_HEARD, return_tensors="pt").input_features
        model = self._pipe.model
        found = model.detect_language(features.to(model.device, model.dtype))
        code = str(self._pipe.tokenizer.decode(found[0])).strip("<|>")
        return code if code in self.languages else None

    def _window(
        self, samples: Any, offset_s: float, wish: Wish, said: dict[str, Any], cancel: threading.Event
    ) -> Iterator[Segment]:
        if cancel.is_set():
            raise Cancelled
        more: dict[str, Any] = {}
        if self._is_writer:
            more["generate_kwargs"] = said | {"stopping_criteria": stops_once(cancel)}
        if self._is_whisper:
            more["return_timestamps"] = "word" if wish.has_words else True
        elif not self._is_writer and self.has_words:
            more["return_timestamps"] = "word"
        found = self._pipe({"raw": long_enough(samples), "sampling_rate": RATE_HEARD}, **more)
        if cancel.is_set():
            raise Cancelled
        length_s = len(samples) / RATE_HEARD
        pieces = [_stretch(chunk, offset_s, length_s) for chunk in found.get("chunks") or ()]
        if wish.has_words or not pieces or not self._is_whisper:
            words = [Word(text.strip(), begin, end) for text, begin, end in pieces]
            text = str(found["text"])
            if text.strip():
                begin, end = (words[0].start, words[-1].end) if words else (offset_s, offset_s + length_s)
                yield Segment(begin, end, text if text.startswith(" ") else f" {text}", words)
            return
        for text, begin, end in pieces:
            yield Segment(begin, end, text)


def _stretch(chunk: Any, offset_s: float, length_s: float) -> tuple[str, float, float]:
    """Text, begin and end; a model may leave the end open."""
    begin, end = chunk["timestamp"]
    begin = min(begin or 0.0, length_s)
    end = length_s if end is None else min(end, length_s)
    return chunk["text"], round(offset_s + begin, 3), round(offset_s + max(begin, end), 3)


def _architecture(folder: Path) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise Refused(f"{folder} is no model in the form of transformers: its config.json cannot be read.") from exc
    if kind not in WRITERS and kind not in PROMPTED and kind not in MODEL_FOR_CTC_MAPPING_NAMES:
        raise Refused(
            f"{folder} is of the architecture {kind!r}, which this engine cannot hear with. It can with whisper, "
            f"moonshine, speech_to_text, {', '.join(PROMPTED)}, wav2vec2 and others with a CTC head."
        )
    return kind


def _load(order: Order) -> list[BaseRoute]:
    import torch

    kind = _architecture(Path(order.model))
    device = torch_device(order.options)
    dtype = order.options.get("torch_dtype") or "auto"
    if dtype == "auto" and device == "cpu":
        dtype = "float32"  # halves are slow there
    made = PromptedASR if kind in PROMPTED else TransformersASR
    hearer: Hearer = made(order.model, kind, device, dtype if dtype == "auto" else getattr(torch, dtype))
    return transcription.routes(hearer, order)


def main() -> None:
    """Serve until SIGTERM."""
    serve(_load)


if __name__ == "__main__":
    main()
