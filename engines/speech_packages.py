"""Text to speech by torch: with the packages of families that have their own, and with the transformers library.

A model can have its engine's package in its own environment: a launch with `enable_virtual_env` makes that on top of
the environment of transformers, if that is installed, else on top of ours.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from msgspec import Meta

from engines.audio import VITS, architecture_of, family_of, local_folder, why_elsewhere
from engines.tts import Speaking, VoiceOptions
from registry.resolve import Artifact

VITS_NAME = re.compile(r"(?<![a-z0-9])(mms-tts|vits)(?![a-z0-9])", re.IGNORECASE)


class TorchSpeechOptions(VoiceOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to those that speak by torch."""

    device: Annotated[str, Meta(description="auto, cpu, cuda, cuda:1, mps")] = "auto"


class KokoroTorchOptions(TorchSpeechOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to Kokoro by torch."""

    language: Annotated[str, Meta(description="of the text, as espeak-ng names it; else that of the voice")] | None = (
        None
    )


class F5TTSOptions(TorchSpeechOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to F5-TTS."""

    vocoder_path: (
        Annotated[str, Meta(description="the folder of charactr/vocos-mel-24khz; else one in the model's folder")]
        | None
    ) = None


class _OfFamily(Speaking, frozen=True, kw_only=True):
    """An engine for families that have a package; files whose family is not known are told by `mark`."""

    options = TorchSpeechOptions
    families: ClassVar[tuple[str, ...]]
    mark: ClassVar[str]
    """A pattern of files that the model's folder has."""

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads the form in which its families are published."""
        if reason := why_elsewhere(artifact, self.families):
            return reason
        if artifact.spec.model_format != "pytorch":
            return f"it loads the form of the model's own repository (pytorch), not {artifact.spec.model_format}"
        if family_of(artifact):
            return None
        folder = local_folder(artifact)
        if folder and any(folder.glob(self.mark)):
            return None
        return f"it loads models whose model_family is {' or '.join(self.families)}, or a folder with {self.mark}"


class TransformersTTS(_OfFamily, frozen=True, kw_only=True):
    """VITS, such as the voices of MMS, by the transformers library."""

    name = "transformers-tts"
    worker = "transformers_tts"
    modules = ("transformers", "torch", "av")
    families = ("vits",)

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads folders whose config.json says vits."""
        if reason := why_elsewhere(artifact, self.families):
            return reason
        if folder := local_folder(artifact):
            is_vits = architecture_of(folder) == VITS
            return None if is_vits else f"it loads what has the model_type vits in its config.json, unlike {folder}"
        if family_of(artifact) or VITS_NAME.search(artifact.source.model_id):
            return None
        return (
            "it loads VITS models in the form of transformers: model_family vits, or a model_id such as o/mms-tts-eng"
        )


class KokoroTorch(_OfFamily, frozen=True, kw_only=True):
    """Kokoro as it is published, by the kokoro package."""

    name = "kokoro-torch"
    options = KokoroTorchOptions
    worker = "kokoro_torch"
    modules = ("kokoro", "av")
    families = ("kokoro", "kokoro-zh")
    mark = "kokoro*.pth"


class ChatTTS(_OfFamily, frozen=True, kw_only=True):
    """ChatTTS by its package."""

    name = "chattts"
    worker = "chattts"
    modules = ("ChatTTS", "av")
    families = ("chattts",)
    mark = "asset/DVAE.safetensors"


class F5TTS(_OfFamily, frozen=True, kw_only=True):
    """F5-TTS and E2-TTS by the f5-tts package."""

    name = "f5-tts"
    options = F5TTSOptions
    worker = "f5_tts"
    modules = ("f5_tts", "av")
    families = ("f5-tts",)
    mark = "[FE][52]TTS_*"
