"""The families that ship with us, and a site's own catalogue files."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from registry.builtin import make
from registry.catalogue import CATALOGUE, expand
from registry.decode import DecodeError
from registry.hubs import HUBS
from registry.registry import Registry
from registry.resolve import Selection, resolve
from registry.schema import FORMATS, LLMFamily, decode_family, encode_family

BUILTIN = Path(make.__file__).parent
FACTS: list[dict[str, Any]] = json.loads((BUILTIN / "facts.json").read_bytes())["models"]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.builtin()


def test_every_fact_is_a_family_and_names_are_unique(registry: Registry) -> None:
    facts = Counter(fact["type"] for fact in FACTS)
    assert facts == {model_type: len(registry.list(model_type)) for model_type in CATALOGUE}
    assert facts["LLM"] > 170
    for model_type in CATALOGUE:
        names = [name.casefold() for name in registry.names(model_type)]
        assert len(set(names)) == len(names)
        assert [f.model_name for f in registry.list(model_type)] == list(registry.names(model_type))
        assert all(registry.is_builtin(family) and family.is_builtin for family in registry.list(model_type))


def test_every_quantization_on_every_hub_is_a_spec(registry: Registry) -> None:
    for fact in FACTS:
        family = registry.find(fact["name"], fact["type"])
        assert family
        sources = {
            json.dumps([spec.get("format"), spec.get("size_in_billions"), spec.get("engine"), hub, of_hub]): of_hub
            for spec in fact["specs"]
            for hub, of_hub in spec["hubs"].items()
        }
        wanted = 0
        for of_hub in sources.values():
            quantizations = of_hub.get("quantizations") or ["none"]
            parts = of_hub.get("quantization_parts")
            wanted += len(parts if parts and quantizations == ["none"] else quantizations)
        assert len(family.specs) == wanted


def test_the_files_are_what_the_facts_make(tmp_path: Path) -> None:
    make.make(BUILTIN / "facts.json", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CATALOGUE.values())
    for name in CATALOGUE.values():
        assert (tmp_path / name).read_bytes() == (BUILTIN / name).read_bytes(), f"run registry/builtin/make.py: {name}"


# Families with specs that differ from an earlier one in nothing but their repository. A model_id reaches those.
SHADOWED = {
    "LLM": {
        "llama-3.1-instruct",
        "MiniCPM-V-2.6",
        "MiniCPM-V-4.5",
        "mistral-large-instruct",
        "mistral-nemo-instruct",
    }
}


@pytest.mark.parametrize("model_type", CATALOGUE)
def test_naming_all_of_any_spec_finds_it(registry: Registry, model_type: str) -> None:
    shadowed = set()
    for family in registry.list(model_type):
        assert family.specs
        for spec in family.specs:
            assert spec.model_id
            assert spec.model_hub in HUBS
            artifact = resolve(
                registry,
                Selection(
                    model_name=family.model_name,
                    model_type=model_type,
                    model_format=spec.model_format,
                    model_size_in_billions=spec.model_size_in_billions,
                    quantization=spec.quantization.swapcase(),
                    model_hub=spec.model_hub,
                ),
            )
            assert artifact.family.model_name == family.model_name
            assert artifact.family.specs == (artifact.spec,)
            if spec.engine is None and artifact.spec.model_id != spec.model_id:
                shadowed.add(family.model_name)
            assert artifact.source.model_hub == spec.model_hub
            assert "{" not in artifact.source.model_id
            assert not any("{" in name for name in artifact.source.files)
            if spec.model_format == "ggufv2":
                assert artifact.source.files
    assert shadowed == SHADOWED.get(model_type, set())


def test_no_two_specs_of_a_family_are_alike(registry: Registry) -> None:
    for model_type in CATALOGUE:
        for family in registry.list(model_type):
            assert len({repr(spec) for spec in family.specs}) == len(family.specs), family.model_name


@pytest.mark.parametrize("model_type", CATALOGUE)
def test_every_family_is_right_by_the_rules_for_registrations(registry: Registry, model_type: str) -> None:
    for family in registry.list(model_type):
        assert decode_family(model_type, encode_family(family)) == family


def test_families_say_what_engines_need(registry: Registry) -> None:
    qwen = registry.find("qwen3")
    assert isinstance(qwen, LLMFamily)
    assert (qwen.reasoning_start_tag, qwen.reasoning_end_tag, qwen.tool_parser) == ("<think>", "</think>", "qwen")
    assert qwen.architectures
    assert qwen.has_chat_template
    assert qwen.stop_token_ids
    assert all(family.architectures for family in registry.list() if isinstance(family, LLMFamily))


def test_finding_one_family_takes_little_time() -> None:
    started = time.perf_counter()
    for model_type in CATALOGUE:
        registry = Registry.builtin()
        registry.find(registry.names(model_type)[0], model_type)
        registry.list(model_type)
    assert time.perf_counter() - started < 0.5  # some 0.02 s on an idle machine


def test_a_name_is_found_exactly_then_whatever_its_case() -> None:
    small, large = (LLMFamily(model_name=name, model_specs=()) for name in ("tiny", "TINY"))
    registry = Registry([small, large])
    assert registry.find("tiny") is small
    assert registry.find("TINY") is large
    assert registry.find("Tiny") is small
    assert registry.find("other") is None
    assert registry.find("tiny", "llm") is small
    assert registry.find("tiny", "no such type") is None
    assert registry.find("tiny", "image") is None


def test_the_catalogue_is_decoded_once() -> None:
    assert Registry.builtin().find("smollm2-instruct") is Registry.builtin().find("smollm2-instruct")


# --- catalogue files of a site


def test_a_sites_catalogue_lies_over_ours(tmp_path: Path) -> None:
    path = tmp_path / "ours.json"
    hubs = {"huggingface": {"model_id": "o/m-{quantization}", "quantizations": ["a", "b"]}}
    specs = [{"model_format": "gptq", "model_size_in_billions": "0_5", "hubs": hubs}]
    mine = {"model_lang": ["en"], "model_ability": ["chat"], "model_specs": specs}
    flat = {"model_name": "painter", "model_family": "stable_diffusion", "model_id": "o/p"}
    data = {"LLM": [mine | {"model_name": "mine", "note": 1}, mine | {"model_name": "qwen3"}], "image": [flat]}
    path.write_text(json.dumps(data))

    registry = Registry.builtin(extra_files=[path])

    family, other = registry.find("mine"), registry.find("qwen3")
    assert isinstance(family, LLMFamily)
    assert [spec.quantization for spec in family.specs] == ["a", "b"]
    assert (family.model_family, family.extra, registry.is_builtin(family)) == ("mine", {"note": 1}, True)
    assert other
    assert len(other.specs) == 2
    assert registry.find("painter", "image")
    assert len(registry.names()) == len(Registry.builtin().names()) + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["cannot be read", "No such file"]),
        ("{", ["damaged", "not JSON", "line 1"]),
        ('{"LLM": [], "LLM": []}', ["damaged", "'LLM' is there twice"]),
        ("[]", ["no object"]),
        ('{"LLN": []}', ["'LLN'", "Did you mean 'LLM'?"]),
        ('{"LLM": {}}', ["LLM: Expected a list"]),
        ('{"LLM": [{}]}', ["model_name", "`[0]`"]),
        ('{"image": [{"model_name": "x", "model_family": 1, "controlnet": 5}]}', ["x: ", "`$.controlnet`"]),
        ('{"LLM": [{"model_name": "x", "model_lang": [], "model_ability": []}]}', ["x: ", "'model_specs' is missing"]),
        ('{"rerank": [{"model_name": "x", "language": [], "model_specs": [{"hubs": {"a": 1}}]}]}', ["hubs.a"]),
    ],
)
def test_a_wrong_catalogue_file_is_told_with_the_place(tmp_path: Path, text: str | None, words: list[str]) -> None:
    path = tmp_path / "ours.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DecodeError) as caught:
        Registry.builtin(extra_files=[path])
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_condensed_spec_keeps_only_the_parts_of_its_quantization() -> None:
    of_hub = {
        "model_id": "o/m",
        "quantizations": ["Q4", "Q8"],
        "model_file_name_template": "m-{quantization}.gguf",
        "model_file_name_split_template": "m-{quantization}-{part}.gguf",
        "quantization_parts": {"Q8": ["1", "2"]},
    }
    small, large = expand([{"model_format": "ggufv2", "hubs": {"huggingface": of_hub}}])
    assert "quantization_parts" not in small
    assert "model_file_name_split_template" not in small
    assert large["quantization_parts"] == {"Q8": ["1", "2"]}


def test_the_tool_writes_nothing_when_a_fact_is_wrong(tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    fact = {"type": "LLM", "name": "x", "abilities": ["fly"], "languages": ["en"], "specs": []}
    facts.write_text(json.dumps({"models": [{"type": "world", "name": "w", "specs": []}, fact]}))
    with pytest.raises(DecodeError, match="'fly'"):
        make.make(facts, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_formats_of_the_catalogue_are_those_that_registrations_may_have(registry: Registry) -> None:
    for model_type, formats in FORMATS.items():
        assert {spec.model_format for family in registry.list(model_type) for spec in family.specs} <= set(formats)
