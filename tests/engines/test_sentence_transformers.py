"""sentence-transformers: from a launch to the argv and options of its two workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import engines
from engines.base import Endpoint, EngineSettings, Launch, Placement
from engines.environments import worker_argv
from engines.sentence_transformers import SentenceTransformers
from registry.decode import DecodeError, decode
from registry.resolve import Artifact
from registry.schema import EmbeddingFamily, ModelSpec, RerankFamily, Source

FOLDER = Path("/models/minilm")
SOCKET = Endpoint(socket="/run/a.sock", api_key="the-secret-key")
DEFAULTS = {
    "device": None,
    "dtype": "auto",
    "max_tokens": None,
    "batch_tokens": None,
    "n_threads": None,
    "normalize_embeddings": True,
    "trust_remote_code": False,
    "prompts": {},
    "default_prompt_name": None,
}
RANKS = {"type": "unknown", "model_name": "m"}


@pytest.fixture
def engine() -> SentenceTransformers:
    return SentenceTransformers(settings=EngineSettings(python=sys.executable))


def an_artifact(kind: Any = EmbeddingFamily, model_format: str = "pytorch", **fields: Any) -> Artifact:
    spec = ModelSpec(model_format=model_format, model_hub="local", model_id=str(FOLDER))
    family = kind(model_name="m", model_specs=(spec,), **fields)
    return Artifact(family=family, spec=spec, source=Source(model_hub="local", model_id=str(FOLDER)))


def a_launch(artifact: Artifact, options: dict[str, Any] | None = None, **fields: Any) -> Launch:
    return Launch(uid="m", artifact=artifact, engine="sentence-transformers", options=options or {}, **fields)


@pytest.mark.parametrize("name", ["sentence-transformers", "sentence_transformers", "Sentence_Transformers"])
def test_it_is_found_as_its_library_and_as_xinference_spell_it(name: str) -> None:
    assert isinstance(engines.find(name), SentenceTransformers)
    settings = {name: EngineSettings(python="/a/python")}
    (found,) = [one for one in engines.available(settings) if isinstance(one, SentenceTransformers)]
    assert found.settings.python == "/a/python"


@pytest.mark.parametrize(
    ("kind", "options", "fields", "worker", "expected"),
    [
        (EmbeddingFamily, {}, {}, "embedding", {}),
        (RerankFamily, {}, {}, "reranking", RANKS),
        (EmbeddingFamily, {"n_threads": "1"}, {}, "embedding", {"n_threads": 1}),
        (EmbeddingFamily, {"normalize_embeddings": False}, {}, "embedding", {"normalize_embeddings": False}),
        (EmbeddingFamily, {"prompts": {"q": "query: "}}, {}, "embedding", {"prompts": {"q": "query: "}}),
        (EmbeddingFamily, {"device": "cuda:1"}, {}, "embedding", {"device": "cuda:1"}),
        (EmbeddingFamily, {}, {"n_gpu": 0}, "embedding", {"device": "cpu"}),
        (RerankFamily, {"trust_remote_code": True}, {}, "reranking", RANKS | {"trust_remote_code": True}),
    ],
)
def test_a_launch_becomes_a_worker_with_options(
    kind: Any,
    options: dict[str, Any],
    fields: dict[str, Any],
    worker: str,
    expected: dict[str, Any],
    engine: SentenceTransformers,
) -> None:
    command = engine.command(a_launch(an_artifact(kind), options, **fields), FOLDER, Placement(), SOCKET)
    assert command.argv == (
        *worker_argv(worker, sys.executable),
        *("--model", str(FOLDER), "--uid", "m", "--host", "/run/a.sock", "--port", "0"),
    )
    assert json.loads(command.env["WORKER_OPTIONS"]) == DEFAULTS | expected
    assert "the-secret-key" not in " ".join(command.argv)


def test_the_type_of_a_registration_reaches_the_worker(engine: SentenceTransformers) -> None:
    launch = a_launch(an_artifact(RerankFamily, type="LLM-based layerwise"))
    options = json.loads(engine.command(launch, FOLDER, Placement(), SOCKET).env["WORKER_OPTIONS"])
    assert options["type"] == "LLM-based layerwise"


def test_the_gpus_of_a_placement_are_all_that_it_sees(engine: SentenceTransformers) -> None:
    command = engine.command(a_launch(an_artifact()), FOLDER, Placement(gpu_uuids=("GPU-1",)), SOCKET)
    assert command.env["CUDA_VISIBLE_DEVICES"] == "GPU-1"


def test_the_python_of_a_models_own_environment_goes_first(engine: SentenceTransformers) -> None:
    command = engine.command(a_launch(an_artifact()), FOLDER, Placement(), SOCKET, "/env/bin/python")
    assert command.argv[0] == "/env/bin/python"


@pytest.mark.parametrize(
    ("artifact", "reason"),
    [
        (an_artifact(), None),
        (an_artifact(RerankFamily), None),
        (an_artifact(model_ability=("embed_vision",)), None),
        (an_artifact(model_format="ggufv2"), "(model_format pytorch), not ggufv2"),
        (an_artifact(model_ability=("embed_audio",)), "the model is for embed_audio too"),
    ],
)
def test_it_says_what_it_cannot_load(artifact: Artifact, reason: str | None, engine: SentenceTransformers) -> None:
    said = engine.accepts(artifact)
    assert said is None if reason is None else said is not None and said.endswith(reason)


def test_without_its_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.environments.has_package", lambda name: False)
    assert SentenceTransformers().installed() == (
        "its library is not installed: hostler engines install sentence-transformers"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_token": 5}, "max_tokens"), ({"dtype": "int4"}, "dtype"), ({"batch_tokens": 0}, "batch_tokens")],
)
def test_an_option_that_is_wrong_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        decode(options, SentenceTransformers.options, "options", strict=False)
