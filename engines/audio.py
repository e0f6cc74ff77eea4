"""What the engines that hear or speak have in common: which families are whose, and what is needed for the others."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from registry.resolve import Artifact

VITS = "vits"  # the architecture of the transformers library that speaks
# model_family, in small letters -> what would run it. Such an engine can be added as an entry point `hostler.engines`.
OWN_PACKAGES = {
    "ace_step_1_5": "ACE-Step's own program",
    "auk": "AuK's own program",
    "breeze-tts-2": "Breeze-TTS's own program",
    "campplus": "the modelscope package (speaker embeddings)",
    "confucius4-tts": "Confucius-TTS's own program",
    "cosyvoice": "CosyVoice's own program from its git repository (what PyPI has as cosyvoice lacks the model's code)",
    "fireredtts3": "FireRedTTS's own program",
    "fishaudio": "the fish-speech package (PyPI's 0.1.0 wants numpy below 2 and pydantic 2.9.2, which clash with ours)",
    "funasr": "the funasr package",
    "indextts2": "the indextts2-inference package, or IndexTTS's own program from its git repository",
    "irodori-tts": "Irodori-TTS's own program",
    "megatts": "the megatts package (it works with torch 2.3.0 alone)",
    "melotts": "MeloTTS from its git repository (PyPI's melotts 0.1.1 cannot be built, and wants torch below 2)",
    "ming-3.0-tts": "Ming's own program",
    "minimax_music3": "diffusers with the model's own code",
    "qwen3_asr": "the qwen-asr package",
    "qwen3_tts": "the qwen-tts package (it works with transformers 4.57.3 alone)",
    "voxcpm": "the voxcpm package",
    "yue2": "YuE's own program",
}

ELSEWHERE = (
    "Start its own server by model_engine command, with options such as "
    """{"command": "/opt/tts/bin/python server.py --port {port} --model {model}"}; or name one that runs, with the """
    "engine remote; or load it by a launcher of the engine flexible"
)


def family_of(artifact: Artifact) -> str:
    """The model_family; empty where nothing is known but the files."""
    return getattr(artifact.family, "model_family", None) or ""


def why_elsewhere(artifact: Artifact, served: Collection[str]) -> str | None:
    """Why an engine that serves these families (in small letters) does not serve this one.

    None if it does, or if no family is known: then the files must tell.
    """
    family = family_of(artifact)
    if not family or family.lower() in served:
        return None
    if package := OWN_PACKAGES.get(family.lower()):
        return f"models of the family {family} need {package}, for which there is no engine here. {ELSEWHERE}"
    return f"it serves models of the family {' or '.join(sorted(served))}, not {family}"


def local_folder(artifact: Artifact) -> Path | None:
    """The folder of files on this machine; None if a hub has them."""
    path = artifact.local_path
    return path.parent if path and path.is_file() else path


def architecture_of(folder: Path) -> str | None:
    """What a model in the form of transformers says that it is; None if it is none."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
