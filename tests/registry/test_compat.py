"""Older and foreign forms become today's, and each change is told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import TEMPLATES, template

from registry.compat import LISTS, lift
from registry.schema import LLMFamily, decode_family

VERSION_1 = {
    "version": 1,
    "context_length": 2048,
    "model_name": "custom-llama-2",
    "model_lang": ["en"],
    "model_ability": ["chat"],
    "model_family": "llama-2-chat",
    "model_specs": [
        {
            "model_format": "pytorch",
            "model_size_in_billions": 7,
            "quantizations": ["4-bit", "8-bit", "none"],
            "model_id": "meta-llama/Llama-2-7b",
        },
        {
            "model_format": "ggufv2",
            "model_size_in_billions": "7",
            "quantizations": ["Q4_0", "Q8_0"],
            "model_id": "o/Llama-2-7b-GGUF",
            "model_file_name_template": "llama-2-7b.{quantization}.gguf",
        },
    ],
    "prompt_style": {"style_name": "LLAMA2", "roles": ["USER"], "stop": ["</s>"], "stop_token_ids": [2]},
}


def changed_by(model_type: str, data: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What lifting gives, and all that it says; the argument must stay as it is."""
    before = copy.deepcopy(data)
    lifted, said = lift(model_type, data)
    assert data == before
    assert all(sentence[-1] in ".?" for sentence in said)
    return lifted, "\n".join(said)


def lifted_specs(**spec: Any) -> tuple[list[dict[str, Any]], str]:
    lifted, said = changed_by("LLM", {"version": 2, "model_specs": [{"model_format": "ggufv2"} | spec]})
    return lifted["model_specs"], said


@pytest.mark.parametrize("model_type", TEMPLATES)
def test_todays_form_stays_as_it_is(model_type: str) -> None:
    assert lift(model_type, TEMPLATES[model_type]) == (TEMPLATES[model_type], [])


def test_version_1_of_a_language_model() -> None:
    lifted, said = changed_by("LLM", VERSION_1)
    family = decode_family("LLM", lifted)
    assert isinstance(family, LLMFamily)
    assert [(s.model_format, s.model_size_in_billions, s.quantization) for s in family.specs] == [
        ("pytorch", 7, "none"),
        ("ggufv2", 7, "Q4_0"),
        ("ggufv2", 7, "Q8_0"),
    ]
    assert (family.version, family.stop, family.stop_token_ids) == (2, ("</s>",), (2,))
    assert family.extra == {"prompt_style": VERSION_1["prompt_style"]}
    for words in (
        "version 1 was read as version 2.",
        "quantizations 4-bit, 8-bit, none became quantization 'none'",
        "model_specs[1].quantizations became 2 specs: Q4_0, Q8_0.",
        "stop, stop_token_ids came out of prompt_style",
    ):
        assert words in said


@pytest.mark.parametrize("model_type", ["embedding", "rerank"])
def test_a_flat_source_becomes_a_spec(model_type: str) -> None:
    flat = {key: value for key, value in TEMPLATES[model_type].items() if key not in ("model_specs", "version")}
    flat |= {"model_id": "o/m", "model_hub": "Huggingface", "model_revision": None, "model_uri": None}
    lifted, said = changed_by(model_type, flat)
    (spec,) = decode_family(model_type, lifted).specs
    assert (spec.model_format, spec.quantization, spec.model_id) == ("pytorch", "none", "o/m")
    assert spec.model_hub == "huggingface"
    assert "model_id" not in lifted
    assert "became the one item of model_specs." in said


def test_a_flat_gguf_source_is_one_of_gguf() -> None:
    lifted, _ = changed_by("embedding", {"model_name": "x", "model_uri": "/m/x-Q8_0.gguf"})
    assert lifted["model_specs"] == [{"model_format": "ggufv2", "quantization": "none", "model_uri": "/m/x-Q8_0.gguf"}]


def test_a_flat_form_without_a_source_is_left_for_the_decoder() -> None:
    assert changed_by("embedding", {"version": 2, "model_id": None}) == ({"version": 2, "model_id": None}, "")


@pytest.mark.parametrize(
    ("spec", "quantizations", "words"),
    [
        ({"quantizations": ["q4_0"]}, ["q4_0"], "became quantization 'q4_0'"),
        ({"quantizations": "q4_0"}, ["q4_0"], "became quantization 'q4_0'"),
        ({"quantizations": ["q4_0", "q8_0"]}, ["q4_0", "q8_0"], "became 2 specs"),
        ({"quantizations": ["q4_0", "q8_0"], "quantization": "q8_0"}, ["q8_0"], ""),
        ({"quantizations": ["q4_0", "q8_0"], "model_uri": "/m/x.Q8_0.gguf"}, ["q8_0"], "became quantization"),
        ({"quantizations": ["q4_0", "q8_0"], "model_uri": "/m/x.gguf"}, ["q4_0"], "became quantization"),
        ({"model_uri": "/m/x-Q5_K_M.gguf"}, ["Q5_K_M"], "by the name of its file"),
        ({"model_id": "o/m"}, [None], "'none' was taken"),
        ({"quantizations": []}, [None], "'none' was taken"),
        ({"model_format": "pytorch", "quantizations": ["8-bit"]}, ["none"], "when they are loaded"),
        ({"model_format": "pytorch", "quantizations": ["none"]}, ["none"], ""),
        ({"model_format": "gptq", "quantizations": ["Int4", "Int8"]}, ["Int4", "Int8"], "became 2 specs"),
    ],
)
def test_lists_of_quantizations(spec: dict[str, Any], quantizations: list[str | None], words: str) -> None:
    lifted, said = lifted_specs(**spec)
    assert [one.get("quantization") for one in lifted] == quantizations
    assert not any("quantizations" in one for one in lifted)
    assert words in said if words else not said


@pytest.mark.parametrize(
    ("size", "lifted", "is_told"),
    [
        (7, 7, False),
        ("7", 7, False),
        (7.0, 7, False),
        ("0_5", "0_5", False),
        (0.5, "0_5", True),
        ("0.5", "0_5", True),
        ("1.8B", "1_8", True),
        ("7b", 7, True),
        ("big", "big", False),
        (True, True, False),
        (-1, -1, False),
    ],
)
def test_sizes_have_one_spelling(size: object, lifted: object, is_told: bool) -> None:
    (spec,), said = lifted_specs(model_size_in_billions=size, quantization="q")
    assert spec["model_size_in_billions"] == lifted
    assert bool(said) == is_told


def test_other_spellings_of_formats_and_hubs() -> None:
    (spec,), said = lifted_specs(model_format="GGUF", model_hub="ModelScope", quantization="q")
    assert (spec["model_format"], spec["model_hub"]) == ("ggufv2", "modelscope")
    assert "model_specs[0].model_format 'GGUF' was read as 'ggufv2'." in said
    assert lifted_specs(model_format="ggmlv3", quantization="q") == (
        [{"model_format": "ggmlv3", "quantization": "q"}],
        "",
    )


@pytest.mark.parametrize(
    ("model_type", "data", "lifted", "words"),
    [
        ("LLM", {"chat_template": "my-family", "model_family": "my-family"}, {"chat_template": None}, "no template"),
        ("LLM", {"chat_template": " "}, {"chat_template": None}, "no template"),
        ("LLM", {"chat_template": "{{ x }}"}, {"chat_template": "{{ x }}"}, ""),
        ("LLM", {"prompt_style": {"stop": "</s>"}}, {"stop": ["</s>"]}, "came out of prompt_style"),
        ("LLM", {"model_ability": "chat"}, {"model_ability": ["chat"]}, "a list of one"),
        ("LLM", {"stop_token_ids": 2}, {"stop_token_ids": [2]}, "a list of one"),
        ("LLM", {"model_specs": {"quantization": "q"}}, {"model_specs": [{"quantization": "q"}]}, "a list of one"),
        ("LLM", {"cache_config": '{"allow_patterns": ["*"]}'}, {"cache_config": {"allow_patterns": ["*"]}}, "a text"),
        ("LLM", {"cache_config": ""}, {"cache_config": None}, ""),
        ("LLM", {"cache_config": "nonsense"}, {"cache_config": "nonsense"}, ""),
        ("LLM", {"virtualenv": ["a==1"]}, {"virtualenv": {"packages": ["a==1"]}}, "its packages"),
        ("embedding", {"model_ability": "vision"}, {"model_ability": ["embed_vision"]}, "read as embed_vision"),
        ("rerank", {"model_ability": ["vision"]}, {"model_ability": ["rerank_vision"]}, "read as rerank_vision"),
        ("image", {"model_hub": "Modelscope"}, {"model_hub": "modelscope"}, "read as 'modelscope'"),
        ("image", {"version": 1}, {"version": 2}, "version 1"),
        ("audio", {"language": ["zh"]}, {"model_lang": ["zh"]}, "became model_lang"),
        ("flexible", {"launcher_args": {"a": "é"}}, {"launcher_args": '{"a": "é"}'}, "its JSON text"),
        ("flexible", {"version": 1}, {"version": 1}, ""),
        ("LLM", {"version": None}, {"version": 2}, ""),
    ],
)
def test_small_changes(model_type: str, data: dict[str, Any], lifted: dict[str, Any], words: str) -> None:
    changed, said = changed_by(model_type, data)
    assert {key: changed[key] for key in lifted} == lifted
    assert words in said if words else not said


def test_what_is_said_stays_short() -> None:
    _, said = lifted_specs(quantizations=[f"q{n}" * 100 for n in range(1000)])
    assert len(said) < 2000


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["1", "none", "q4_0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["quantizations", "model_format", "stop", "model_uri", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
KEYS = sorted({key for one in TEMPLATES.values() for key in one} | {"prompt_style", "quantizations"})


@given(st.sampled_from(list(LISTS)), st.dictionaries(st.sampled_from(KEYS), values, max_size=6))
def test_anything_can_be_lifted_and_lifting_again_changes_nothing(model_type: str, data: dict[str, Any]) -> None:
    before = repr(data)
    lifted, _ = lift(model_type, data)
    assert repr(data) == before
    again, _ = lift(model_type, lifted)
    assert repr(again) == repr(lifted)


def test_an_image_with_nulls_in_place_of_defaults() -> None:
    nulls = {"default_model_config": None, "default_generate_config": None, "controlnet": None, "model_hub": None}
    lifted, said = changed_by("image", template("image") | nulls)
    assert not said
    assert decode_family("image", lifted).specs[0].model_hub == "huggingface"
