"""Hears with language models that are asked in a chat's words to write what is said: Qwen3-ASR, Fun-ASR-Nano."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

from engines.workers.audio import RATE_HEARD
from engines.workers.hearing import long_enough, stops_once, windows
from engines.workers.server import Cancelled, Refused, number
from engines.workers.transcription import Segment, Wish

# architecture -> how its processor is told to leave out all but what was said
PROMPTED: dict[str, dict[str, Any]] = {"qwen3_asr": {"return_format": "parsed"}, "fun_asr_nano": {"strip_prefix": True}}
MOST_TOKENS = 448  # of one window
WITHOUT_SPACES = ("ja", "yue", "zh")


class PromptedASR:
    """A hearer."""

    can_translate = has_words = False

    def __init__(self, folder: str, kind: str, device: str, dtype: Any) -> None:
        from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

        self._processor: Any = AutoProcessor.from_pretrained(folder)
        self._model: Any = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=dtype).eval().to(device)
        self._bare = PROMPTED[kind]
        names: dict[str, str] = getattr(sys.modules[type(self._processor).__module__], "LANGUAGE_CODE_TO_NAME", {})
        self._code_of = {name: code for code, name in names.items() if len(code) <= 3}
        self.languages = list(self._code_of.values())

    def hear(self, samples: Any, wish: Wish, cancel: threading.Event) -> tuple[str | None, Iterator[Segment]]:
        """What is said, window by window, each heard when it is asked for; the language of the first one."""
        for name in wish.more:
            if name != "max_new_tokens":
                raise Refused(f"`kwargs` has {name!r}; known is: max_new_tokens.", param="kwargs")
        begins = windows(samples)
        first, language = self._heard(samples[slice(*begins[0])], wish, wish.language, cancel)

        def segments() -> Iterator[Segment]:
            for begin, end in begins:
                text = first
                if begin:
                    text, _ = self._heard(samples[begin:end], wish, language, cancel)
                if text:
                    space = "" if language in WITHOUT_SPACES else " "
                    yield Segment(round(begin / RATE_HEARD, 3), round(end / RATE_HEARD, 3), space + text)

        return language, segments()

    def _heard(self, samples: Any, wish: Wish, language: str | None, cancel: threading.Event) -> tuple[str, str | None]:
        """The text, and its language if that is known."""
        import torch

        if cancel.is_set():
            raise Cancelled
        tokens = wish.more.get("max_new_tokens", MOST_TOKENS)
        how: dict[str, Any] = {
            "max_new_tokens": number(tokens, "max_new_tokens", int, least=1, most=MOST_TOKENS),
            "do_sample": bool(wish.temperature),
        }
        if wish.temperature:
            how["temperature"] = wish.temperature
        given = self._processor.apply_transcription_request(
            long_enough(samples), language=language, prompt=wish.prompt
        ).to(self._model.device, self._model.dtype)
        with torch.inference_mode():
            ids = self._model.generate(**given, **how, stopping_criteria=stops_once(cancel))
        if cancel.is_set():
            raise Cancelled
        said = self._processor.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True, **self._bare)
        if isinstance(said, dict):
            return str(said["transcription"]).strip(), language or self._code_of.get(said["language"])
        return str(said).strip(), language
