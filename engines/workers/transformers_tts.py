"""Speaks with VITS models (such as those of MMS) by the transformers library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from engines.workers import speech
from engines.workers.device import torch_device
from engines.workers.server import Order, Refused, serve

TUNING = {"noise_scale": (0.0, 2.0), "noise_scale_duration": (0.0, 2.0)}
ONLY = "default"


class Vits:
    """A speaker; its voices are the numbers of the speakers that it was trained on."""

    speeds = (0.25, 4.0)

    def __init__(self, order: Order) -> None:
        import torch
        from transformers import AutoTokenizer, VitsModel

        folder = Path(order.model)
        _check(folder)
        self._device = torch_device(order.options)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = VitsModel.from_pretrained(folder, dtype=torch.float32).eval().to(self._device)
        config = self._model.config
        self.rate: int = config.sampling_rate
        language = str(getattr(self._tokenizer, "language", None) or "")
        n_speakers = config.num_speakers
        names = [ONLY] if n_speakers == 1 else [str(number) for number in range(n_speakers)]
        self.voices = [speech.Voice(name, language) for name in names]
        self._usual = {name: getattr(self._model, name) for name in (*TUNING, "speaking_rate")}

    def say(self, text: str, voice: str, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """The samples of the text, sentence by sentence."""
        import torch

        tuning = speech.known_only(more, TUNING)
        which = {} if voice == ONLY else {"speaker_id": int(voice)}
        for sentence in speech.sentences(text):
            said = self._tokenizer(sentence, return_tensors="pt").to(self._device)
            if not said.input_ids.shape[1]:
                continue  # no sign that the model knows
            usual = self._usual | {"speaking_rate": self._usual["speaking_rate"] * speed}
            for name, value in (usual | tuning).items():  # the library reads them off the model
                setattr(self._model, name, value)
            with torch.inference_mode():
                yield self._model(**said, **which).waveform[0].float().cpu().numpy()


def _check(folder: Path) -> None:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise Refused(f"{folder} is no model in the form of transformers: its config.json cannot be read.") from exc
    if kind != "vits":
        raise Refused(f"{folder} is of the architecture {kind!r}; this engine speaks with vits alone.")


def _load(order: Order) -> list[BaseRoute]:
    return speech.routes(Vits(order), order)


def main() -> None:
    """Serve until SIGTERM."""
    serve(_load)


if __name__ == "__main__":
    main()
