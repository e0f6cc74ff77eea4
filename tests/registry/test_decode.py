"""Errors of decoding name the place and the nearest right word, and show no secret."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest

from registry.decode import DecodeError, Secret, decode, did_you_mean, nearest, schema


class Limits(msgspec.Struct, forbid_unknown_fields=True):
    memory_bytes: int
    timeout_s: float = 1.0


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    key: Secret = Secret("")
    limits: dict[str, Limits] = {}
    numbers: list[int] = []


def test_data_that_fits_is_decoded() -> None:
    data = {"name": "a", "key": "k", "limits": {"x": {"memory_bytes": 3}}, "numbers": [1]}
    settings = decode(data, Settings)
    assert settings == Settings("a", Secret("k"), {"x": Limits(3)}, [1])
    assert isinstance(settings.key, Secret)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"nam": "a"}, ["'nam'", "`$`", "Did you mean 'name'?"]),
        ({"name": "a", "zzzz": 1}, ["'zzzz'", "Known keys: key, limits, name, numbers."]),
        ({}, ["Required key 'name' is missing", "`$`"]),
        ({"name": 1}, ["Expected `str`, got `int`", "`$.name`"]),
        ({"name": "a", "limits": {"x": {}}}, ["'memory_bytes'", "`$.limits.x`"]),
        ({"name": "a", "limits": {"x": {"memory_bytes": "no"}}}, ["`$.limits.x.memory_bytes`"]),
        (
            {"name": "a", "limits": {"x": {"memory_bytes": 1, "timeout": 2}}},
            ["`$.limits.x`", "Did you mean 'timeout_s'?"],
        ),
        ({"name": "a", "numbers": [1, "2"]}, ["`$.numbers[1]`"]),
        ([], ["Expected `object`", "`$`"]),
    ],
)
def test_an_error_names_the_place_and_helps(data: Any, words: list[str]) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(data, Settings)
    for word in words:
        assert word in str(caught.value)


def test_the_path_begins_where_the_caller_says() -> None:
    with pytest.raises(DecodeError, match=r"`settings.yaml.limits.x`"):
        decode({"name": "a", "limits": {"x": {}}}, Settings, "settings.yaml")


def test_numbers_as_text_are_taken_only_when_not_strict() -> None:
    data = {"memory_bytes": "3"}
    assert decode(data, Limits, strict=False).memory_bytes == 3
    with pytest.raises(DecodeError):
        decode(data, Limits)


def test_a_secret_is_never_shown() -> None:
    settings = decode({"name": "a", "key": "hunter2"}, Settings)
    assert settings.key == "hunter2"
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in repr([settings.key])


@pytest.mark.parametrize("bad", [["hunter2"], {"a": "hunter2"}])
def test_an_error_about_a_secret_does_not_show_it(bad: Any) -> None:
    with pytest.raises(DecodeError) as caught:
        decode({"name": "a", "key": bad}, Settings)
    assert "hunter2" not in str(caught.value)
    assert "`$.key" in str(caught.value)


def test_near_words_come_best_first_whatever_their_case() -> None:
    words = ["Q4_K_M", "Q8_0", "Q4_K_S"]
    assert nearest("q4_k_m", words)[0] == "Q4_K_M"
    assert nearest("zzz", words) == []
    assert did_you_mean("zzz", [], what="Models") == "Models: none."


def test_the_schema_shows_a_secret_as_text() -> None:
    class Door(msgspec.Struct):
        keys: tuple[Secret, ...] = ()

    properties = schema(Door)["$defs"]["Door"]["properties"]
    assert properties["keys"]["items"] == {"type": "string"}


def test_a_word_that_is_none_of_those_allowed_is_refused_with_them() -> None:
    with pytest.raises(DecodeError, match=r"^Invalid enum value 'x', expected `int` or 'auto' or 'none' - at `\$`$"):
        decode("x", Annotated[int, msgspec.Meta(ge=0)] | Literal["auto", "none"] | None)
