"""Text to speech on the CPU: Piper's voices, and Kokoro in the form of kokoro-onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from engines.audio import family_of, local_folder, why_elsewhere
from engines.base import Command, Endpoint, Engine, Launch, Placement, worker_command
from engines.environments import find_python, why_no_python
from registry.resolve import Artifact

ONNX = "onnx"


class VoiceOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to all that speak."""

    n_threads: Annotated[int, Meta(ge=1, description="threads on the CPU")] | None = None
    voice: Annotated[str, Meta(description="of requests that name none; else the first")] | None = None
    voice_aliases: Annotated[
        dict[str, str], Meta(description="further names of voices, such as those that clients of OpenAI send")
    ] = {}
    max_characters: Annotated[int, Meta(ge=1, description="of one request's input")] = 4096


class SpeechOptions(VoiceOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to those that speak by onnxruntime."""

    device: Annotated[Literal["cpu", "cuda"], Meta(description="cuda takes onnxruntime-gpu")] = "cpu"


class KokoroOptions(SpeechOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to Kokoro."""

    language: Annotated[str, Meta(description="of the text, as espeak-ng names it; else that of the voice")] | None = (
        None
    )


class Speaking(Engine, frozen=True, kw_only=True):
    """An engine that speaks, by a worker of ours."""

    model_types = ("audio",)
    worker: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if self._python() else why_no_python(self.name, self.settings)

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """Our worker over the library."""
        options: Any = self.read_options(launch.options)
        said = msgspec.to_builtins(options)
        if launch.n_gpu == 0:
            said["device"] = "cpu"
        return worker_command(
            self.worker, python or self._python() or "", launch, model_path, placement, endpoint, said
        )

    def _python(self) -> str | None:
        return find_python(self.name, (*self.modules, "soundfile"), self.settings, self.environments)


class Piper(Speaking, frozen=True, kw_only=True):
    """Piper's voices."""

    name = "piper"
    options = SpeechOptions
    worker = "piper"
    modules = ("piper",)

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads .onnx files that have a description beside them."""
        if reason := why_elsewhere(artifact, ("piper",)):
            return reason
        if folder := local_folder(artifact):
            if any(folder.glob("*.onnx.json")):
                return None
            return f"{folder} has no voice of Piper: an .onnx file with its .onnx.json beside it"
        if family_of(artifact) or (artifact.spec.model_format == ONNX and not _is_named_kokoro(artifact)):
            return None
        return "it loads Piper's voices: model_format onnx, or a model_family of piper"


class Kokoro(Speaking, frozen=True, kw_only=True):
    """Kokoro in the form of kokoro-onnx."""

    name = "kokoro"
    options = KokoroOptions
    worker = "kokoro"
    modules = ("kokoro_onnx",)

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads folders of an .onnx file and its voices."""
        if reason := why_elsewhere(artifact, ("kokoro", "kokoro-zh")):
            return reason
        wanted = "it loads Kokoro as an .onnx file with a file of voices (voices*.bin or .npz)"
        if folder := local_folder(artifact):
            return None if any(folder.glob("*.onnx")) and any(folder.glob("voices*")) else f"{wanted}, unlike {folder}"
        if artifact.spec.model_format == ONNX and (family_of(artifact) or _is_named_kokoro(artifact)):
            return None
        return f"{wanted}: model_format onnx, from a repository such as a conversion by kokoro-onnx"


def _is_named_kokoro(artifact: Artifact) -> bool:
    return "kokoro" in artifact.source.model_id.lower()
