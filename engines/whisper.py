"""Speech to text: Whisper models by faster-whisper, and what the transformers library can hear with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engines.audio import VITS, architecture_of, family_of, local_folder, why_elsewhere
from engines.base import TORCH_BYTES, Command, Endpoint, Engine, Launch, Placement, worker_command
from engines.environments import find_python, why_no_python
from registry.resolve import Artifact

CT2 = "ctranslate2"
CT2_NAME = re.compile(r"faster.?whisper|ctranslate2|(?<![a-z0-9])ct2(?![a-z0-9])", re.IGNORECASE)
# Families whose files the transformers library reads; their architecture says the rest.
TRANSFORMERS_FAMILIES = frozenset(
    [
        "whisper",
        "wav2vec2",
        "wav2vec2-bert",
        "wav2vec2-conformer",
        "hubert",
        "wavlm",
        "unispeech",
        "data2vec-audio",
        "parakeet",
        "qwen3_asr",
        "moonshine",
        "speech_to_text",
        "speecht5",
        "seamless_m4t",
        "seamless_m4t_v2",
    ]
)

Threads = Annotated[int, Meta(ge=1, description="threads on the CPU")]


class FasterWhisperOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to faster-whisper; names are its own."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: a GPU if there is one")] = "auto"
    compute_type: (
        Annotated[str, Meta(description="int8, float16, ...; int8 on the CPU, else as the files are")] | None
    ) = None
    n_threads: Threads | None = None
    beam_size: Annotated[int, Meta(ge=1, le=20)] | None = None
    vad_filter: Annotated[bool, Meta(description="pass over what is no speech")] | None = None
    language: Annotated[str, Meta(description="spoken, unless a request says: en, zh, ...")] | None = None


class FasterWhisper(Engine, frozen=True, kw_only=True):
    """Whisper models in CTranslate2's form."""

    name = "faster-whisper"
    model_types = ("audio",)
    options = FasterWhisperOptions

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if self._python() else why_no_python(self.name, self.settings)

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads the folders that CTranslate2's converter makes, of the whisper family."""
        if reason := why_elsewhere(artifact, ("whisper",)):
            return reason
        if artifact.spec.model_format == CT2 or _is_ct2(artifact):
            return None
        return (
            "it loads Whisper models in CTranslate2's form (a folder with model.bin; a model_id such as "
            "Systran/faster-whisper-small), not those of transformers"
        )

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """Our worker over faster-whisper."""
        options: FasterWhisperOptions = self.read_options(launch.options)
        if launch.n_gpu == 0:
            options = msgspec.structs.replace(options, device="cpu")
        said = msgspec.to_builtins(options)
        return worker_command(
            "faster_whisper", python or self._python() or "", launch, model_path, placement, endpoint, said
        )

    def _python(self) -> str | None:
        return find_python(self.name, ("faster_whisper",), self.settings, self.environments)


class TransformersASROptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to the transformers library for speech."""

    device: Annotated[str, Meta(description="auto, cpu, cuda, cuda:1, mps")] = "auto"
    torch_dtype: Annotated[Literal["auto", "float32", "float16", "bfloat16"], Meta(description="of the weights")] = (
        "auto"
    )
    n_threads: Threads | None = None
    language: Annotated[str, Meta(description="spoken, unless a request says: en, zh, ...")] | None = None


class TransformersASR(Engine, frozen=True, kw_only=True):
    """Whisper and other models of speech recognition in the form of the transformers library."""

    name = "transformers-asr"
    aliases = ("transformers",)
    model_types = ("audio",)
    overhead_bytes = TORCH_BYTES
    options = TransformersASROptions

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if self._python() else why_no_python(self.name, self.settings)

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads what has an architecture of the library for speech; a family that is not known may be one."""
        if reason := why_elsewhere(artifact, TRANSFORMERS_FAMILIES):
            return reason
        if artifact.spec.model_format != "pytorch":
            return f"it loads models in the form of transformers (pytorch), not {artifact.spec.model_format}"
        if _is_ct2(artifact):
            return "these files are in CTranslate2's form, which faster-whisper loads"
        if family_of(artifact).lower() == "qwen3_asr" and not _is_qwen_of_transformers(artifact):
            return (
                "these files are in the form of the qwen-asr package, for which there is no engine here. Launch those "
                "in the form of transformers: a model_id that ends in -hf, such as Qwen/Qwen3-ASR-1.7B-hf"
            )
        folder = local_folder(artifact)
        if folder and architecture_of(folder) == VITS:
            return "this is a VITS model, which transformers-tts speaks with"
        if not family_of(artifact) and folder and not (folder / "config.json").is_file():
            return f"{folder} has no config.json, as models in the form of transformers have"
        return None

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """Our worker over the transformers library."""
        options: TransformersASROptions = self.read_options(launch.options)
        if launch.n_gpu == 0:
            options = msgspec.structs.replace(options, device="cpu")
        said = msgspec.to_builtins(options)
        return worker_command(
            "transformers_asr", python or self._python() or "", launch, model_path, placement, endpoint, said
        )

    def _python(self) -> str | None:
        return find_python(self.name, ("transformers", "torch", "av"), self.settings, self.environments)


def _is_ct2(artifact: Artifact) -> bool:
    if folder := local_folder(artifact):
        return (folder / "model.bin").is_file() and not any(folder.glob("*.safetensors"))
    return CT2_NAME.search(artifact.source.model_id) is not None


def _is_qwen_of_transformers(artifact: Artifact) -> bool:
    """Qwen3-ASR is there in two forms; the other one's configuration is inside a `thinker_config`."""
    if folder := local_folder(artifact):
        try:
            return "thinker_config" not in msgspec.json.decode((folder / "config.json").read_bytes())
        except (OSError, msgspec.DecodeError):
            return True  # the worker tells what is wrong
    return artifact.source.model_id.lower().endswith("-hf")
