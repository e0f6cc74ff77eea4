"""What the catalogue and registrations say of a model. Key names are those of the JSON files.

Field names and defaults follow Xinference's version-2 model JSON, so that its files decode as they are.
"""

from __future__ import annotations

import msgspec


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a spec's files are on one hub.

    `files` are glob patterns of what is needed there (empty: everything an engine could need). For hub
    `local`, `model_id` is an absolute path.
    """

    model_hub: str
    model_id: str
    model_revision: str | None = None
    files: tuple[str, ...] = ()


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One item of `model_specs`: a format and size, with its source and quantization."""

    model_format: str
    model_size_in_billions: int | float | str | None = None
    quantization: str = "none"
    model_hub: str = "huggingface"
    model_id: str | None = None
    model_uri: str | None = None
    model_revision: str | None = None
    model_file_name_template: str | None = None


class LLMFamily(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A language model: one entry of the catalogue, or one registration."""

    model_name: str
    model_specs: tuple[ModelSpec, ...]
    version: int = 2
    context_length: int = 2048
    model_lang: tuple[str, ...] = ("en",)
    model_ability: tuple[str, ...] = ("generate",)
    model_description: str | None = None
    model_family: str | None = None

    @property
    def model_type(self) -> str:
        """Which group of families this belongs to."""
        return "LLM"


ModelFamily = LLMFamily  # a union, once there are more types
