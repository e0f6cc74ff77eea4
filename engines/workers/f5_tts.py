"""Speaks with F5-TTS and E2-TTS by the f5-tts package: a checkpoint, and the vocoder vocos.

The architecture is that of the file `config.yaml` beside the checkpoint, or else the package's own for a folder of
that name (F5TTS_v1_Base, F5TTS_Base, E2TTS_Base), as the model's repository has them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from engines.workers import speech
from engines.workers.audio import decode
from engines.workers.device import torch_device, without_native_torchaudio
from engines.workers.server import Order, Refused, number, serve

TUNING = {"nfe_step": (1, 128), "cfg_strength": (0.0, 10.0), "sway_sampling_coef": (-1.0, 2.0), "seed": (0, 2**32 - 1)}
CHECKPOINTS = ("*.safetensors", "*.pt")
PREFERRED = ("F5TTS_v1_Base", "F5TTS_Base", "E2TTS_Base")
# What is said in the recordings that the package has.
EXAMPLES = {
    "en": ("basic_ref_en.wav", "Some call me nature, others call me mother nature."),
    "zh": ("basic_ref_zh.wav", "对，这就是我，万人敬仰的太乙真人。"),
}
USED_S = 12  # of a recording: the model was trained on little more


class F5TTS:
    """A speaker; its voices are those of recordings."""

    rate = 24_000
    speeds = (0.3, 2.0)
    needs_reference_text = True

    def __init__(self, order: Order) -> None:
        without_native_torchaudio()
        from f5_tts.infer import utils_infer
        from hydra.utils import get_class
        from omegaconf import OmegaConf

        self._package: Any = utils_infer
        self._device = torch_device(order.options)
        package = Path(utils_infer.__file__).parents[1]
        checkpoint = _checkpoint(Path(order.model))
        about = _architecture(checkpoint, package)
        config: Any = OmegaConf.load(about)
        if config.model.mel_spec.mel_spec_type != "vocos":
            raise Refused(
                f"{about} wants the vocoder {config.model.mel_spec.mel_spec_type}; only vocos is in the package."
            )
        vocoder = _vocoder(order)
        words = checkpoint.with_name("vocab.txt")
        self._model: Any = utils_infer.load_model(
            get_class(f"f5_tts.model.{config.model.backbone}"),
            config.model.arch,
            str(checkpoint),
            vocab_file=str(words) if words.is_file() else "",
            device=self._device,
        )
        self._vocoder: Any = utils_infer.load_vocoder("vocos", True, str(vocoder), self._device)
        folder = package / "infer" / "examples" / "basic"
        self._examples = {
            name: speech.Reference(decode((folder / file).read_bytes(), threading.Event(), self.rate), text)
            for name, (file, text) in EXAMPLES.items()
        }
        self.voices = [speech.Voice(name, name) for name in self._examples]

    def say(self, text: str, voice: str, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """The samples of the text, sentence by sentence."""
        return self.say_like(text, self._examples[voice], speed, more)

    def say_like(self, text: str, reference: speech.Reference, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """The same with the voice of a recording."""
        import torch

        said: dict[str, Any] = dict(speech.known_only(more, TUNING))
        if "nfe_step" in said:
            said["nfe_step"] = number(said["nfe_step"], "nfe_step", int, least=1, most=128)
        if (seed := said.pop("seed", None)) is not None:
            torch.manual_seed(int(seed))
        samples = torch.from_numpy(reference.samples[: USED_S * self.rate])[None]
        recorded = reference.text if reference.text[-1] in ".。!?！？" else f"{reference.text}."
        for found in self._package.infer_batch_process(
            (samples, self.rate),
            f"{recorded} ",
            speech.sentences(text),
            self._model,
            self._vocoder,
            progress=None,
            speed=speed,
            device=self._device,
            streaming=True,
            chunk_size=self.rate,
            **said,
        ):
            yield found[0]


def _checkpoint(path: Path) -> Path:
    if path.is_file():
        return path
    found = [one for pattern in CHECKPOINTS for one in sorted(path.rglob(pattern)) if "vocos" not in str(one)]
    if not found:
        raise Refused(f"{path} has no checkpoint of F5-TTS: a .safetensors or .pt file.")
    ranks = {name: rank for rank, name in enumerate(PREFERRED)}
    return min(found, key=lambda one: ranks.get(one.parent.name, len(ranks)))


def _architecture(checkpoint: Path, package: Path) -> Path:
    own, known = checkpoint.with_name("config.yaml"), package / "configs" / f"{checkpoint.parent.name}.yaml"
    for one in (own, known):
        if one.is_file():
            return one
    raise Refused(
        f"The architecture of {checkpoint} is not known: put its config.yaml beside it, or it into a folder "
        f"that is called {' or '.join(PREFERRED)}."
    )


def _vocoder(order: Order) -> Path:
    """The folder of charactr/vocos-mel-24khz, which is a repository of its own."""
    said = order.options.get("vocoder_path")
    root = Path(order.model) if Path(order.model).is_dir() else Path(order.model).parent
    for folder in [Path(said)] if said else sorted(one for one in root.rglob("*vocos*") if one.is_dir()):
        if (folder / "config.yaml").is_file() and (folder / "pytorch_model.bin").is_file():
            return folder
    raise Refused(
        "The vocoder of F5-TTS is missing: download charactr/vocos-mel-24khz (config.yaml and pytorch_model.bin) and "
        "name its folder by the option vocoder_path, or put it into the model's folder as vocos-mel-24khz."
    )


def _load(order: Order) -> list[BaseRoute]:
    return speech.routes(F5TTS(order), order)


def main() -> None:
    """Serve until SIGTERM."""
    serve(_load)


if __name__ == "__main__":
    main()
