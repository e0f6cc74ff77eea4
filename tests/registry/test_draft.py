"""A registration drafted from a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.draft import draft
from registry.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.builtin()


def a_model(folder: Path, config: dict[str, Any], *, weights_bytes: int = 0, template: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weights_bytes)  # takes no room
    if template:
        (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder


QWEN = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960}


def test_what_is_drafted_can_be_registered(registry: Registry, tmp_path: Path) -> None:
    folder = a_model(tmp_path / "My Qwen#3", QWEN, weights_bytes=1_400_000_000)
    found = draft(folder, "qwen3", registry)
    assert (found["model_name"], found["context_length"]) == ("My-Qwen-3", 40960)
    assert found["architectures"] == ["Qwen3ForCausalLM"]
    assert "tools" in found["model_ability"]  # the family's
    (spec,) = found["model_specs"]
    assert (spec["model_format"], spec["quantization"], spec["model_size_in_billions"]) == ("pytorch", "none", "0_7")
    mine = Registry.builtin()
    mine.register("LLM", found, persist=False)
    assert mine.find("My-Qwen-3")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("gptq", "Int4", 14)),
        ({"quant_method": "gptq", "bits": 8}, ("gptq", "Int8", 7)),
        ({"quant_method": "awq", "w_bit": 4}, ("awq", "Int4", 14)),
        ({"quant_method": "fp8"}, ("fp8", "fp8", 7)),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ("bnb", "8bit", 7)),
        ({"quant_method": "other"}, ("pytorch", "none", "3_5")),
        (None, ("pytorch", "none", "3_5")),
    ],
)
def test_formats_and_sizes(registry: Registry, tmp_path: Path, how: Any, expected: tuple[str, str, Any]) -> None:
    folder = a_model(tmp_path / "m", QWEN | {"quantization_config": how}, weights_bytes=7_000_000_000, template=True)
    found = draft(folder, "none-such", registry)
    (spec,) = found["model_specs"]
    assert (spec["model_format"], spec["quantization"], spec["model_size_in_billions"]) == expected
    assert found["model_ability"] == ["generate", "chat"]
    registry.register("LLM", found, persist=False)
    registry.unregister("LLM", "m")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("{", "damaged"), ("[]", "no JSON object"), ("{}", "architectures")],
)
def test_what_is_no_model_is_refused(registry: Registry, tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        draft(tmp_path, "x", registry)
