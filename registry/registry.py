"""All families that can be named: the catalogue that ships with us. Read-only, decoded once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources

import msgspec

from registry.decode import decode
from registry.schema import LLMFamily, ModelFamily

# model type -> the catalogue's file and what each entry of it decodes to
CATALOGUE: dict[str, tuple[str, type[ModelFamily]]] = {
    "LLM": ("llm.json", LLMFamily),
}


class Registry:
    """Families by type and name. A name is unique within its type."""

    def __init__(self, families: Iterable[ModelFamily] = ()) -> None:
        self._families: dict[str, dict[str, ModelFamily]] = {model_type: {} for model_type in CATALOGUE}
        for family in families:
            self._families[family.model_type][family.model_name] = family

    @classmethod
    def builtin(cls) -> Registry:
        """A registry of the catalogue.

        Raises:
            DecodeError: a packaged file is damaged; the text names the place.
        """
        return cls(_catalogue())

    @property
    def types(self) -> tuple[str, ...]:
        """The model types that a family can have."""
        return tuple(self._families)

    def find(self, model_name: str, model_type: str = "LLM") -> ModelFamily | None:
        """The family of that name: spelt exactly so, or else so but for case."""
        families = self._of_type(model_type)
        if family := families.get(model_name):
            return family
        wanted = model_name.casefold()
        return next((family for name, family in families.items() if name.casefold() == wanted), None)

    def names(self, model_type: str = "LLM") -> tuple[str, ...]:
        """The names of all families of a type, in catalogue order; none for an unknown type."""
        return tuple(self._of_type(model_type))

    def list(self, model_type: str = "LLM") -> tuple[ModelFamily, ...]:
        """All families of a type, in catalogue order; none for an unknown type."""
        return tuple(self._of_type(model_type).values())

    def _of_type(self, model_type: str) -> dict[str, ModelFamily]:
        wanted = model_type.casefold()
        return next((group for name, group in self._families.items() if name.casefold() == wanted), {})


@cache
def _catalogue() -> tuple[ModelFamily, ...]:
    families: tuple[ModelFamily, ...] = ()
    for file_name, kind in CATALOGUE.values():
        text = resources.files("registry").joinpath("builtin", file_name).read_bytes()
        families += decode(msgspec.json.decode(text), tuple[kind, ...], f"builtin/{file_name}")  # type: ignore[valid-type]
    return families
