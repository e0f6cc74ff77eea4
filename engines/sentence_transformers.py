"""sentence-transformers: embedding models and rerankers in the format of transformers, by our workers.

Which of the two workers runs is told by the family's type; what a folder holds is looked at when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engines.base import TORCH_BYTES, Command, Endpoint, Engine, Launch, Placement, with_safer_options, worker_command
from engines.environments import find_python, why_no_python
from registry.resolve import Artifact
from registry.schema import RerankFamily

MODULES = ("sentence_transformers", "torch")
SAFER_BATCH_TOKENS = 512  # an input that is longer goes alone
WORKERS = {"embedding": "embedding", "rerank": "reranking"}

Positive = Annotated[int, Meta(ge=1)]


class SentenceTransformersOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launch may say to the workers for embedding and ranking."""

    device: Annotated[str, Meta(description="cpu, cuda, cuda:1; the first GPU if there is one")] | None = None
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], Meta(description="auto: half on a GPU, float32 on a CPU")
    ] = "auto"
    max_tokens: Annotated[int, Meta(ge=1, description="of one input; the model's own limit if not given")] | None = None
    batch_tokens: (
        Annotated[int, Meta(ge=1, description="inputs of a batch times the longest's tokens; bounds the memory")] | None
    ) = None
    n_threads: Annotated[int, Meta(ge=1, description="cores but one if not given")] | None = None
    normalize_embeddings: Annotated[bool, Meta(description="vectors of length 1, unless a request says")] = True
    trust_remote_code: Annotated[bool, Meta(description="run the Python code that a model brings")] = False
    prompts: Annotated[dict[str, str], Meta(description="texts to put before inputs, by name")] = {}
    default_prompt_name: Annotated[str, Meta(description="the one for requests that name none")] | None = None


class SentenceTransformers(Engine, frozen=True, kw_only=True):
    """Folders of transformers that embed or rank."""

    name = "sentence-transformers"
    aliases = ("transformers", "flag")
    model_types = ("embedding", "rerank")
    overhead_bytes = TORCH_BYTES
    takes_chunks = True
    options = SentenceTransformersOptions
    less_memory = "Lower batch_tokens or max_tokens, or say dtype: bfloat16."

    def safer(self, launch: Launch, said: Sequence[str]) -> tuple[Launch, str] | None:
        """Smaller batches."""
        return with_safer_options(
            launch, {"batch_tokens": (SAFER_BATCH_TOKENS, f"batches of {SAFER_BATCH_TOKENS} tokens")}
        )

    def installed(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if self._python() else why_no_python(self.name, self.settings)

    def accepts(self, artifact: Artifact) -> str | None:
        """It loads folders of transformers and nothing else."""
        if artifact.spec.model_format != "pytorch":
            return f"{self.name} loads folders of transformers (model_format pytorch), not {artifact.spec.model_format}"
        family = artifact.family
        if unknown := set(family.abilities) & {"embed_video", "embed_audio", "rerank_video", "rerank_audio"}:
            return f"{self.name} takes texts and images here; the model is for {', '.join(sorted(unknown))} too"
        return None

    def command(
        self, launch: Launch, model_path: Path, placement: Placement, endpoint: Endpoint, python: str | None = None
    ) -> Command:
        """The worker for the family's type."""
        options: SentenceTransformersOptions = self.read_options(launch.options)
        said: dict[str, Any] = msgspec.to_builtins(options)
        if launch.n_gpu == 0:
            said["device"] = "cpu"
        family = launch.artifact.family
        if isinstance(family, RerankFamily):
            said |= {"type": family.type, "model_name": family.model_name}
        program = python or self._python()
        assert program is not None, self.installed()
        return worker_command(WORKERS[family.model_type], program, launch, model_path, placement, endpoint, said)

    def _python(self) -> str | None:
        return find_python(self.name, MODULES, self.settings, self.environments)
