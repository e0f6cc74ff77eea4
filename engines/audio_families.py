"""Which engine speaks or hears with which family, and what families need that no engine here runs."""

from __future__ import annotations

from collections.abc import Collection

from registry.resolve import Artifact

# model_family, in small letters -> what would run it. Such an engine can be added as an entry point `hostler.engines`.
OWN_PACKAGES = {
    "ace_step_1_5": "ACE-Step's own program",
    "auk": "AuK's own program",
    "breeze-tts-2": "Breeze-TTS's own program",
    "campplus": "the modelscope package (speaker embeddings)",
    "chattts": "the ChatTTS package",
    "confucius4-tts": "Confucius-TTS's own program",
    "cosyvoice": "CosyVoice's own program",
    "f5-tts": "the f5-tts package",
    "fireredtts3": "FireRedTTS's own program",
    "fishaudio": "the fish-speech package",
    "funasr": "the funasr package",
    "indextts2": "IndexTTS's own program",
    "irodori-tts": "Irodori-TTS's own program",
    "megatts": "MegaTTS3's own program",
    "melotts": "the MeloTTS package",
    "ming-3.0-tts": "Ming's own program",
    "minimax_music3": "diffusers with the model's own code",
    "qwen3_asr": "the qwen-asr package (of the repositories whose names end in -hf: model_family of none)",
    "qwen3_tts": "the qwen-tts package",
    "voxcpm": "the voxcpm package",
    "yue2": "YuE's own program",
}


def family_of(artifact: Artifact) -> str:
    """The model_family in small letters; empty where nothing is known of the files."""
    return (getattr(artifact.family, "model_family", None) or "").lower()


def why_elsewhere(artifact: Artifact, served: Collection[str]) -> str | None:
    """Why an engine that serves these families (in small letters) does not serve this one; None if it does.

    A family that is not known is none of anybody's: the files must tell.
    """
    family = family_of(artifact)
    if not family or family in served:
        return None
    if family in OWN_PACKAGES:
        return (
            f"models of the family {artifact.family.model_family} need {OWN_PACKAGES[family]}, for which there is no "  # type: ignore[union-attr]
            "engine here"
        )
    return f"it serves models of the family {' or '.join(sorted(served))}, not {artifact.family.model_family}"  # type: ignore[union-attr]
