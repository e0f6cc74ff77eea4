"""The families that ship with us."""

from __future__ import annotations

import pytest

from registry.hubs import HUBS
from registry.registry import CATALOGUE, Registry
from registry.schema import ModelFamily


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.builtin()


def test_every_family_decodes_and_its_name_is_unique(registry: Registry) -> None:
    for model_type in CATALOGUE:
        names = [name.casefold() for name in registry.names(model_type)]
        assert names
        assert len(set(names)) == len(names)
        assert [f.model_name for f in registry.list(model_type)] == list(registry.names(model_type))


def test_every_spec_can_be_fetched_from_a_known_hub(registry: Registry) -> None:
    for family in registry.list():
        assert family.model_specs
        for spec in family.model_specs:
            assert spec.model_hub in HUBS
            assert spec.model_id
            if spec.model_format == "ggufv2":
                assert spec.model_file_name_template
                assert spec.model_file_name_template.endswith(".gguf")


def test_no_two_specs_of_a_family_are_alike(registry: Registry) -> None:
    for family in registry.list():
        assert len(set(family.model_specs)) == len(family.model_specs)


def test_a_name_is_found_exactly_then_whatever_its_case() -> None:
    small, large = (ModelFamily(model_name=name, model_specs=()) for name in ("tiny", "TINY"))
    registry = Registry([small, large])
    assert registry.find("tiny") is small
    assert registry.find("TINY") is large
    assert registry.find("Tiny") is small
    assert registry.find("other") is None
    assert registry.find("tiny", "llm") is small
    assert registry.find("tiny", "no such type") is None


def test_the_catalogue_is_decoded_once() -> None:
    assert Registry.builtin().find("smollm2-instruct") is Registry.builtin().find("smollm2-instruct")
