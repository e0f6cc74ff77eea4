"""The JSON of each model type: what is taken, kept, refused and written."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import TEMPLATES, template, with_spec

from engines.base import Launch
from registry.decode import DecodeError, parse
from registry.resolve import Artifact
from registry.schema import (
    ABILITIES,
    FAMILIES,
    FORMATS,
    KEEPS_UNKNOWN,
    REQUIRED,
    EmbeddingFamily,
    ImageFamily,
    LLMFamily,
    ModelFamily,
    ModelSpec,
    RerankFamily,
    Source,
    decode_family,
    encode_family,
    family_schema,
)


def refusal_of(model_type: str, data: Any) -> str:
    with pytest.raises(DecodeError) as caught:
        decode_family(model_type, data)
    return str(caught.value)


def contains(whole: Any, part: Any) -> bool:
    """Whether `whole` has all keys of `part`, with the same values."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contains(whole[key], part[key]) for key in part)
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return bool(whole == part)


@pytest.mark.parametrize("model_type", TEMPLATES)
def test_a_template_comes_out_as_it_went_in(model_type: str) -> None:
    family = decode_family(model_type, TEMPLATES[model_type])
    encoded = encode_family(family)
    assert contains(encoded, TEMPLATES[model_type])
    assert "model_type" not in encoded
    assert "extra" not in encoded
    assert family.extra == {}
    assert decode_family(model_type, encoded) == family
    assert decode_family(model_type, json.loads(json.dumps(encoded))) == family


@pytest.mark.parametrize("model_type", TEMPLATES)
def test_a_family_within_a_launch_keeps_its_type(model_type: str) -> None:
    family = decode_family(model_type, template(model_type, model_id="o/m", note="x"))
    artifact = Artifact(
        family=family, spec=family.specs[0], source=Source(model_hub="huggingface", model_id="o/m"), projector="p"
    )
    launch = Launch(uid="u", artifact=artifact, engine="e")
    again = msgspec.json.decode(msgspec.json.encode(launch), type=Launch)
    assert again == launch
    assert again.artifact.family.model_type == model_type


@pytest.mark.parametrize("model_type", TEMPLATES)
def test_unknown_keys_are_kept_where_the_type_keeps_them(model_type: str) -> None:
    data = template(model_type, prompt_style={"a": [1]}, extra="mine") | {"model_type": model_type}
    family = decode_family(model_type, data)
    kept = {"prompt_style": {"a": [1]}, "extra": "mine"}
    assert family.extra == (kept if model_type in KEEPS_UNKNOWN else {})
    assert contains(encode_family(family), family.extra)
    assert decode_family(model_type, encode_family(family)) == family


@pytest.mark.parametrize(("model_type", "key"), [(t, key) for t in TEMPLATES for key in REQUIRED[t]])
def test_a_required_key_is_named_when_it_is_missing_or_null(model_type: str, key: str) -> None:
    data = template(model_type)
    data[key] = None
    assert f"Required key '{key}' is missing - at `$`" in refusal_of(model_type, data)
    del data[key]
    assert f"Required key '{key}' is missing - at `$`" in refusal_of(model_type, data)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_type_has_a_schema_for_editors(model_type: str) -> None:
    schema = family_schema(model_type)
    assert schema["required"] == list(REQUIRED[model_type])
    assert set(schema["required"]) <= set(schema["properties"])
    assert not {"model_type", "extra"} & set(schema["properties"])
    for definition in (schema, *schema["$defs"].values()):
        assert all(value.get("description") for value in definition["properties"].values())
    if model_type in TEMPLATES:
        assert TEMPLATES[model_type].keys() <= schema["properties"].keys()
    if model_type in FORMATS:
        assert schema["$defs"]["ModelSpec"]["properties"]["model_format"]["enum"] == list(FORMATS[model_type])
    json.dumps(schema)


def test_nulls_stand_for_defaults() -> None:
    family = decode_family("LLM", template("LLM", version=None, context_length=None, virtualenv=None, is_builtin=None))
    assert isinstance(family, LLMFamily)
    assert (family.version, family.context_length, family.virtualenv, family.is_builtin) == (2, 2048, None, False)
    spec = decode_family("LLM", with_spec("LLM", model_hub=None, quantization=None)).specs[0]
    assert (spec.model_hub, spec.quantization) == ("huggingface", "none")


def test_scalars_are_taken_in_another_spelling() -> None:
    family = decode_family("embedding", template("embedding", dimensions="768", max_tokens=512.0, version="2"))
    assert isinstance(family, EmbeddingFamily)
    assert (family.dimensions, family.max_tokens, family.version) == (768, 512, 2)
    audio = decode_family("audio", template("audio", multilingual="True"))
    assert encode_family(audio)["multilingual"] is True
    assert decode_family("LLM", with_spec("LLM", model_revision=12)).specs[0].model_revision == "12"


@pytest.mark.parametrize(
    ("model_type", "data", "words"),
    [
        ("LLM", template("LLM", model_ability=["chatt"]), ["'chatt'", "`$.model_ability[0]`", "Did you mean 'chat'?"]),
        ("LLM", template("LLM", model_ability=["zzz"]), ["Allowed: embed, generate, chat, tools, vision"]),
        ("LLM", template("LLM", version=3), ["Expected version 2, got 3", "`$.version`"]),
        ("LLM", template("LLM", model_lang="en"), ["`$.model_lang`"]),
        ("LLM", template("LLM", stop_token_ids=["a"]), ["`int`", "`$.stop_token_ids[0]`"]),
        ("LLM", template("LLM", virtualenv={"packages": [1, {}]}), ["`$.virtualenv.packages[1]`"]),
        ("LLM", template("LLM", model_specs=[[]]), ["`$.model_specs[0]`"]),
        ("LLM", template("LLM", model_specs=[{}]), ["'model_format' is missing", "`$.model_specs[0]`"]),
        ("LLM", with_spec("LLM", model_size_in_billions=None), ["'model_size_in_billions' is missing"]),
        ("LLM", with_spec("LLM", model_size_in_billions="big"), ["'big'", "`$.model_specs[0].model_size_in_billions`"]),
        ("LLM", with_spec("LLM", model_size_in_billions=-1), ["'-1'", "such as 7"]),
        (
            "LLM",
            with_spec("LLM", model_format="pytorhc"),
            ["Did you mean 'pytorch'?", "`$.model_specs[0].model_format`"],
        ),
        ("LLM", with_spec("LLM", model_format=5), ["'5'"]),
        ("LLM", with_spec("LLM", quantization_parts={"q": ["a", []]}), ["quantization_parts.q[1]"]),
        ("embedding", with_spec("embedding", model_format="awq"), ["'awq'", "Allowed: pytorch, ggufv2."]),
        ("embedding", template("embedding", dimensions="many"), ["`$.dimensions`"]),
        ("rerank", template("rerank", type="normale"), ["Did you mean 'normal'?", "`$.type`"]),
        ("image", template("image", controlnet=[1]), ["`$.controlnet[0]`"]),
        ("image", template("image", default_model_config=[]), ["`$.default_model_config`"]),
        ("audio", template("audio", multilingual="maybe"), ["`bool`", "`$.multilingual`"]),
        ("flexible", template("flexible", launcher_args="{"), ["JSON", "`$.launcher_args`"]),
        ("flexible", template("flexible", launcher_args="[]"), ["object", "`$.launcher_args`"]),
        ("image", template("LLM") | {"model_type": "LLM"}, ["type 'LLM', not 'image'"]),
        ("LLM", [], ["Expected `object`, got `list`"]),
        ("LLM", {1: 2}, ["Expected keys of `str`"]),
        ("LLM", template("LLM", note=float("nan")), ["nan", "not of JSON"]),
        ("LLM", template("LLM", note=2**64), ["64 bits"]),
        ("LLM", template("LLM", note="\ud800"), ["surrogate"]),
        ("LLM", template("LLM", note=object()), ["`object`"]),
        ("LLN", {}, ["Unsupported model type: LLN", "Did you mean 'LLM'?"]),
    ],
)
def test_what_is_wrong_is_named_with_its_place(model_type: str, data: Any, words: list[str]) -> None:
    said = refusal_of(model_type, data)
    for word in words:
        assert word in said


def test_an_error_does_not_repeat_a_huge_value() -> None:
    assert len(refusal_of("LLM", template("LLM", model_ability=["x" * 10**6]))) < 500


@pytest.mark.parametrize(("model_type", "always"), [("embedding", "embed"), ("rerank", "rerank")])
def test_some_types_have_an_ability_in_any_case(model_type: str, always: str) -> None:
    assert decode_family(model_type, template(model_type)).abilities == (always,)
    more = decode_family(model_type, template(model_type, model_ability=[f"{always}_vision", always]))
    assert more.abilities == (always, f"{always}_vision")


def test_a_flat_family_is_its_own_spec() -> None:
    family = decode_family("image", template("image", "/m", model_id="o/m", model_revision="r", gguf_model_id="o/g"))
    (spec,) = family.specs
    assert (spec.model_uri, spec.model_id, spec.model_revision, spec.model_hub) == ("/m", "o/m", "r", "huggingface")
    assert (spec.model_format, spec.quantization, spec.gguf_model_id) == ("pytorch", "none", "o/g")
    assert decode_family("flexible", template("flexible", "/m/a.gguf")).specs[0].model_format == "ggufv2"


def test_a_gguf_spec_shows_its_templates_and_others_do_not() -> None:
    gguf = encode_family(decode_family("LLM", with_spec("LLM", model_format="ggufv2")))["model_specs"][0]
    assert gguf["model_file_name_template"] is None
    assert gguf["multimodal_projectors"] is None
    pytorch = encode_family(decode_family("LLM", template("LLM")))["model_specs"][0]
    assert "model_file_name_template" not in pytorch
    assert "model_size_in_billions" not in encode_family(decode_family("rerank", template("rerank")))["model_specs"][0]


# --- JSON text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', ["Key 'c' is there twice"]),
        ("{", ["not JSON", "line 1, column 2"]),
        ("", ["not JSON"]),
        ("[" * 1000 + "]" * 1000, ["deeper than 64"]),
        ("[" * 10**5, ["deeper than 64"]),
        ('{"a":' * 100 + "1" + "}" * 100, ["deeper than 64"]),
        ("[NaN]", ["NaN"]),
        ("[1e999]", ["inf"]),
        ("9" * 5000, ["not JSON that we take"]),
        ('"\\ud800"', ["surrogate"]),
        (b"\xff\xfe\xfd", ["UTF-8"]),
        ("\ufeff{}", ["not JSON"]),
    ],
)
def test_text_that_could_not_be_kept_is_refused(text: str | bytes, words: list[str]) -> None:
    with pytest.raises(DecodeError) as caught:
        parse(text)
    for word in words:
        assert word in str(caught.value)


def test_long_text_is_refused() -> None:
    with pytest.raises(DecodeError, match="longer than 1 MiB"):
        parse(" " * (2**20 + 1), 2**20)


# --- any family


texts = st.text(max_size=8)
maybe_text = st.none() | texts
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, plain, max_size=3)


def specs(model_type: str) -> st.SearchStrategy[tuple[ModelSpec, ...]]:
    sizes = st.integers(0, 999) | st.sampled_from(["0_5", "1_8"])
    spec = st.builds(
        ModelSpec,
        model_format=st.sampled_from(FORMATS.get(model_type, ("pytorch", "mlx"))),
        model_size_in_billions=sizes,
        quantization=texts,
        model_hub=texts,
        model_id=maybe_text,
        model_uri=maybe_text,
        model_revision=maybe_text,
        activated_size_in_billions=st.none() | sizes,
        model_file_name_template=maybe_text,
        quantization_parts=st.none() | st.dictionaries(texts, st.lists(texts, max_size=2).map(tuple), max_size=2),
        multimodal_projectors=st.none() | st.lists(texts, max_size=2).map(tuple),
    )
    return st.lists(spec, max_size=3).map(tuple)


def families(model_type: str) -> st.SearchStrategy[ModelFamily]:
    kind = FAMILIES[model_type]
    known = set(kind.__struct_fields__) | {"model_type"}
    extras = st.dictionaries(texts.filter(lambda key: key not in known), plain, max_size=3)
    fields: dict[str, Any] = {
        "version": st.just(2),
        "cache_config": st.none() | objects,
        "extra": extras if model_type in KEEPS_UNKNOWN else st.just({}),
        "model_specs": specs(model_type),
        "controlnet": st.none() | st.lists(objects, max_size=2).map(tuple),
        "default_model_config": st.none() | objects,
        "default_generate_config": st.none() | objects,
        "default_transcription_config": st.none() | objects,
        "launcher_args": st.none() | objects.map(json.dumps),
        "type": st.sampled_from(["unknown", "normal"]),
        "model_family": texts,
        "dimensions": st.integers(0, 9999),
        "max_tokens": st.integers(0, 9999),
    }
    if model_type in ABILITIES:
        fields["model_ability"] = st.lists(st.sampled_from(ABILITIES[model_type]), max_size=3).map(tuple)
    return st.builds(kind, **{name: value for name, value in fields.items() if name in known})


@given(st.sampled_from(list(FAMILIES)).flatmap(families))
def test_any_family_comes_out_as_it_went_in(family: ModelFamily) -> None:
    text = msgspec.json.encode(encode_family(family))
    assert decode_family(family.model_type, parse(text)) == family
    assert msgspec.json.decode(msgspec.json.encode(family), type=ModelFamily) == family


@given(
    st.sampled_from(list(TEMPLATES)).flatmap(
        lambda t: st.tuples(st.just(t), st.sampled_from(sorted(TEMPLATES[t])), plain)
    )
)
def test_any_value_anywhere_is_taken_or_refused_with_a_sentence(case: tuple[str, str, Any]) -> None:
    model_type, key, value = case
    try:
        said, family = "", decode_family(model_type, template(model_type) | {key: value})
    except DecodeError as exc:
        said, family = str(exc), None
    if family:
        assert decode_family(model_type, encode_family(family)) == family
    else:
        assert "`$" in said


def test_classes_are_exported_by_their_tags() -> None:
    assert {kind.__struct_config__.tag for kind in FAMILIES.values()} == set(FAMILIES)
    assert ImageFamily(model_name="x").model_type == "image"
    assert RerankFamily(model_name="x", model_specs=()).abilities == ("rerank",)
