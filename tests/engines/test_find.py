"""Finding an engine by what users call it."""

from __future__ import annotations

import pytest

import engines


@pytest.mark.parametrize(
    ("name", "model_type", "found"),
    [
        ("vLLM", "LLM", "vLLM"),
        ("vllm", "embedding", "vLLM"),
        ("sentence_transformers", "rerank", "sentence-transformers"),
        ("transformers", "LLM", "transformers"),
        ("transformers", None, "transformers"),
        ("transformers", "image", "transformers"),
        ("transformers", "embedding", "sentence-transformers"),
        ("flag", "embedding", "sentence-transformers"),
        ("transformers", "audio", "transformers-asr"),
        ("llama-cpp", None, "llama.cpp"),
    ],
)
def test_names_are_found_as_xinference_and_people_spell_them(name: str, model_type: str | None, found: str) -> None:
    assert engines.find(name, engines.ENGINES, model_type).name == found


def test_each_name_stands_for_one_engine_of_a_type() -> None:
    claimed = [
        (name, model_type)
        for engine in engines.ENGINES
        for name in (engine.name, *engine.aliases)
        for model_type in engine.model_types
        if not engine.by_name_only
    ]
    assert len(set(claimed)) == len(claimed)
