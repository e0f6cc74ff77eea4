"""Speaks with ChatTTS by its package: a folder with asset/, as the model's repository has it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from engines.workers import speech
from engines.workers.device import torch_device, without_native_torchaudio
from engines.workers.server import Order, Refused, flag, serve

TUNING = {
    "temperature": (0.01, 2.0),
    "top_P": (0.01, 1.0),
    "top_K": (1, 625),
    "repetition_penalty": (1.0, 2.0),
    "max_new_token": (1, 2048),
}
WHOLE = ("top_K", "max_new_token")
PACES = 5  # [speed_5] is the usual one of [speed_0] to [speed_9]
N_VOICES = 10


class ChatTTS:
    """A speaker. It has no voices of its own but makes one of any number; some are listed."""

    rate = 24_000
    speeds = (0.25, 1.8)
    needs_reference_text = True

    def __init__(self, order: Order) -> None:
        without_native_torchaudio()
        import ChatTTS as package
        import torch

        self._package: Any = package
        self._chat: Any = package.Chat()
        folder = Path(order.model)
        files = {name: folder / part for name, part in asdict(self._chat.config.path).items()}
        if missing := [str(path.relative_to(folder)) for path in files.values() if not path.exists()]:
            raise Refused(f"{folder} lacks {', '.join(missing)}: ChatTTS is launched from a folder as its repository.")
        # Not `load`: it takes no files but those whose digests it knows, and downloads these.
        paths = {name: str(path) for name, path in files.items()}
        if not self._chat._load(device=torch.device(torch_device(order.options)), **paths):
            raise Refused(f"{folder} cannot be loaded as ChatTTS: its log says why.")
        self._seeds = {f"seed-{number}": number for number in range(N_VOICES)}
        self.voices = [speech.Voice(name) for name in self._seeds]

    def until(self, cancel: threading.Event) -> None:
        """Stop before the next token once the event is set."""
        self._chat.context.get = cancel.is_set

    def say(self, text: str, voice: str, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """The samples of the text, in parts of sentences."""
        return self._say(text, speed, more, spk_emb=self._voice(self._seeds[voice]))

    def say_like(self, text: str, reference: speech.Reference, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """The same with the voice of a recording."""
        sample = self._chat.sample_audio_speaker(reference.samples)
        return self._say(text, speed, more, spk_smp=sample, txt_smp=reference.text)

    def _say(self, text: str, speed: float, more: Mapping[str, Any], **voice: Any) -> Iterator[Any]:
        left = dict(more)
        is_plain = flag(left.pop("skip_refine_text", None), "skip_refine_text")
        tuning = speech.known_only(left, TUNING)
        said: dict[str, Any] = {name: int(value) if name in WHOLE else value for name, value in tuning.items()}
        limit = {"max_new_token": said["max_new_token"]} if "max_new_token" in said else {}
        refining = self._package.Chat.RefineTextParams(show_tqdm=False, **limit)
        for sentence in speech.sentences(text):
            speaking = self._package.Chat.InferCodeParams(
                prompt=f"[speed_{round(PACES * speed)}]", show_tqdm=False, **said, **voice
            )
            for found in self._chat.infer(
                [sentence],
                stream=True,
                skip_refine_text=is_plain,
                split_text=False,
                params_refine_text=refining,
                params_infer_code=speaking,
            ):
                if found.size:
                    yield found[0]

    def _voice(self, seed: int) -> str:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return str(self._chat.sample_random_speaker())


def _load(order: Order) -> list[BaseRoute]:
    return speech.routes(ChatTTS(order), order)


def main() -> None:
    """Serve until SIGTERM."""
    serve(_load)


if __name__ == "__main__":
    main()
