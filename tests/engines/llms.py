"""Launches of language models for the tables of engines, and packages laid out as a Python has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.base import Launch
from registry.resolve import Artifact
from registry.schema import EmbeddingFamily, LLMFamily, ModelFamily, ModelSpec, Source

FOLDER = Path("/models/qwen")


def a_family(**fields: Any) -> LLMFamily:
    return LLMFamily(**{"model_name": "my-model", "model_specs": (), "model_ability": ("chat",)} | fields)


def an_embedding(name: str = "bge-m3") -> EmbeddingFamily:
    return EmbeddingFamily(model_name=name, model_specs=())


def an_artifact(family: ModelFamily | None = None, model_format: str = "pytorch") -> Artifact:
    spec = ModelSpec(model_format=model_format, quantization="none", model_hub="local", model_id=str(FOLDER))
    return Artifact(family=family or a_family(), spec=spec, source=Source(model_hub="local", model_id=str(FOLDER)))


def a_launch(options: dict[str, Any] | None = None, family: ModelFamily | None = None, **fields: Any) -> Launch:
    return Launch(**{"uid": "mine", "artifact": an_artifact(family), "engine": "x", "options": options or {}} | fields)


def a_python(folder: Path) -> Path:
    """A Python by its looks, with an empty site-packages beside it."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    (folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    return python


def a_package(python: Path, name: str, distribution: str, files: dict[str, str]) -> None:
    """A package as it lies in that Python's site-packages."""
    site = python.parent.parent / "lib" / "python3.11" / "site-packages"
    (site / f"{distribution}.dist-info").mkdir()
    for file, text in files.items():
        path = site / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def flags_of(argv: tuple[str, ...]) -> dict[str, Any]:
    """flag -> its value, True for a switch, a list for several."""
    flags: dict[str, Any] = {}
    last = ""
    for word in argv:
        if word.startswith("--"):
            last, equals, value = word.partition("=")
            flags[last] = value if equals else True
        elif last:
            flags[last] = word if flags[last] is True else [*_listed(flags[last]), word]
    return flags


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
