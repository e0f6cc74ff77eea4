"""Files of second repositories: which are chosen, and what is left out of the first."""

from __future__ import annotations

from typing import Any

import pytest

from registry.additions import TRANSFORMER_WEIGHTS, Addition
from registry.hubs.base import choose_files
from registry.registry import Registry
from registry.resolve import Artifact, NotResolved, Selection, candidates, resolve, without_files
from registry.schema import Source

FAMILY = {
    "version": 2,
    "model_name": "painter",
    "model_family": "stable_diffusion",
    "model_id": "org/painter",
    "model_revision": "v1",
    "model_hub": "modelscope",
    "gguf_model_id": "other/painter-gguf",
    "gguf_quantizations": ["Q4_0", "Q8_0"],
    "gguf_model_file_name_template": "painter-{quantization}.gguf",
    "lightning_model_id": "light/painter",
    "lightning_versions": ["4steps-V1.0", "8steps"],
    "lightning_model_file_name_template": "sub/fast-{lightning_version}.safetensors",
    "controlnet": [
        {"model_name": "canny", "model_id": "nets/canny", "model_revision": "r"},
        {"model_name": "pose", "model_hub": "modelscope", "model_id": "nets/pose"},
        {"model_name": "here", "model_uri": "file:///nets/here"},
        {"model_name": "named"},
    ],
}
GGUF = Source(model_hub="modelscope", model_id="other/painter-gguf", files=("painter-Q8_0.gguf",))
FAST = Source(model_hub="modelscope", model_id="light/painter", files=("sub/fast-8steps.safetensors",))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(folder=tmp_path_factory.mktemp("registry"))
    registry.register("image", FAMILY, persist=True)
    registry.register(
        "image", {"version": 2, "model_name": "plain", "model_family": "x", "model_id": "org/plain"}, persist=True
    )
    return registry


def resolved(registry: Registry, model_name: str | None = "painter", **wishes: Any) -> Artifact:
    return resolve(registry, Selection(model_name=model_name, model_type="image", **wishes))


def local(path: str, *files: str) -> Source:
    return Source(model_hub="local", model_id=path, files=files)


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, ()),
        ({"gguf_quantization": "q8_0"}, (Addition(role="gguf", name="Q8_0", source=GGUF),)),
        ({"lightning_version": "8STEPS"}, (Addition(role="lightning", name="8steps", source=FAST),)),
        ({"gguf_model_path": "/q/a.gguf"}, (Addition(role="gguf", source=local("/q/a.gguf")),)),
        ({"gguf_model_path": "/q"}, (Addition(role="gguf", source=local("/q", "*.gguf")),)),
        (
            {"gguf_model_path": "/q", "gguf_quantization": "Q2_K"},
            (Addition(role="gguf", name="Q2_K", source=local("/q", "painter-Q2_K.gguf")),),
        ),
        (
            {"lightning_model_path": "/l", "lightning_version": "2"},
            (Addition(role="lightning", name="2", source=local("/l", "sub/fast-2.safetensors")),),
        ),
        (
            {"controlnet": "Canny"},
            (
                Addition(
                    role="controlnet",
                    name="canny",
                    source=Source(model_hub="huggingface", model_id="nets/canny", model_revision="r"),
                ),
            ),
        ),
        (
            {"controlnet": ("pose", "here", "/nets/mine")},
            (
                Addition(role="controlnet", name="pose", source=Source(model_hub="modelscope", model_id="nets/pose")),
                Addition(role="controlnet", name="here", source=local("/nets/here")),
                Addition(role="controlnet", name="/nets/mine", source=local("/nets/mine")),
            ),
        ),
    ],
)
def test_wishes_are_met(registry: Registry, wishes: dict[str, Any], expected: tuple[Addition, ...]) -> None:
    artifact = resolved(registry, **wishes)
    assert artifact.additions == expected
    assert artifact.sources == (artifact.source, *(one.source for one in expected))


@pytest.mark.parametrize(
    ("name", "wishes", "sentence"),
    [
        ("painter", {"gguf_quantization": "Q5_0"}, "has no gguf_quantization 'Q5_0'. It has: Q4_0, Q8_0."),
        ("painter", {"lightning_version": "4"}, "has no lightning_version '4'. It has: 4steps-V1.0, 8steps."),
        ("painter", {"controlnet": "pose2"}, "has no controlnet 'pose2'. Did you mean 'pose'?"),
        ("painter", {"controlnet": "named"}, "knows its controlnet 'named' by name only"),
        ("painter", {"gguf_model_path": "a.gguf"}, "The gguf_model_path 'a.gguf' is not an absolute path."),
        ("painter", {"controlnet": "~nobody-here/x"}, "names an unknown home folder"),
        ("plain", {"gguf_quantization": "Q4_0"}, "it names no repository of such weights. Give their file as gguf_mod"),
        ("plain", {"controlnet": "canny"}, "Model 'plain' has no controlnet 'canny'. It names none."),
    ],
)
def test_a_wish_that_cannot_be_met_says_what_there_is(
    registry: Registry, name: str, wishes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(NotResolved) as caught:
        resolved(registry, name, **wishes)
    assert sentence in str(caught.value)


def test_types_that_know_no_such_wish_refuse_it(registry: Registry) -> None:
    for wishes in ({"gguf_quantization": "Q4_0"}, {"controlnet": "canny"}):
        (wish,) = wishes
        with pytest.raises(NotResolved, match=f"{wish} says nothing of LLM models"):
            resolve(registry, Selection(model_path="/m", **wishes))
        with pytest.raises(NotResolved, match=f"{wish} says nothing of a model that has no files here"):
            without_files(registry, Selection(model_name="x", **wishes), "x")


def test_files_in_place_get_the_second_repository_of_the_family_that_is_named(registry: Registry) -> None:
    artifact = resolved(registry, model_path="/m", gguf_quantization="Q8_0", controlnet="pose")
    assert artifact.source == local("/m")
    assert [one.source.model_id for one in artifact.additions] == ["other/painter-gguf", "nets/pose"]
    with pytest.raises(NotResolved, match="it names no repository"):
        resolved(registry, None, model_path="/m", gguf_quantization="Q8_0")


def test_a_transformer_that_a_gguf_file_replaces_is_not_fetched(registry: Registry) -> None:
    source = resolved(registry, gguf_quantization="Q8_0").source
    assert source.ignore_patterns == TRANSFORMER_WEIGHTS
    assert (source.model_id, source.model_revision) == ("org/painter", "v1")
    assert resolved(registry, lightning_version="8steps").source.ignore_patterns == ()
    sizes = dict.fromkeys(
        [
            "model_index.json",
            "painter.safetensors",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            "vae/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.bin",
        ],
        1,
    )
    assert choose_files(source, sizes) == [
        "model_index.json",
        "transformer/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_the_patterns_of_a_source_narrow_what_is_fetched() -> None:
    names = ["a/model.safetensors", "a/model.fp16.safetensors", "config.json", "b/model.safetensors"]
    source = Source(model_hub="x", model_id="o/m", allow_patterns=("a/*", "*.json"), ignore_patterns=("*.fp16.*",))
    assert choose_files(source, dict.fromkeys(names, 1)) == ["a/model.safetensors", "config.json"]


def test_all_that_could_be_wished_for_is_known_as_the_familys(registry: Registry) -> None:
    artifact = resolved(registry)
    possible = artifact.possible_sources
    for wishes in ({}, {"gguf_quantization": "Q4_0"}, {"lightning_version": "8steps"}, {"controlnet": "pose"}):
        assert set(resolved(registry, **wishes).sources) <= set(possible)
    assert len(possible) == 2 + 2 + 2 + 3


def test_each_wish_of_the_catalogue_can_be_met() -> None:
    registry = Registry.builtin()
    wishes = 0
    for model_type in ("image", "video"):
        for family in registry.list(model_type):
            for artifact in candidates(registry, Selection(model_name=family.model_name, model_type=model_type)):
                choose = {"model_name": family.model_name, "model_type": model_type}
                choose["model_hub"] = artifact.spec.model_hub
                offers = [("gguf_quantization", one) for one in artifact.spec.gguf_quantizations or ()]
                offers += [("lightning_version", one) for one in artifact.spec.lightning_versions or ()]
                offers += [("controlnet", one["model_name"]) for one in getattr(family, "controlnet", None) or ()]
                for wish, value in offers:
                    found = resolve(registry, Selection(**choose, **{wish: value}))
                    (addition,) = found.additions
                    assert addition.name == value
                    assert found.source.model_hub == artifact.spec.model_hub
                    wishes += 1
    assert wishes > 300
