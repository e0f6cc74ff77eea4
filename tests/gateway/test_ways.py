"""What is read of requests, and what little is changed on their way and back: pure functions of bytes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import rerank, ways
from gateway.api.heads import ChatHead, PromptHead, RerankHead, read_form_head, read_head, read_query_head
from gateway.errors import BadRequest

STOPS = {"stop": ["<|im_end|>"], "stop_token_ids": [2, 7]}


def adapted(body: dict[str, Any] | bytes, defaults: dict[str, Any]) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = read_head(msgspec.json.Decoder(ChatHead), content, "/v1/chat/completions")
    changed = ways.with_defaults(content, head, defaults)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({name for name, _ in pairs}) == len(pairs), f"a key stands twice: {changed!r}"
        return dict(pairs)

    found: dict[str, Any] = json.loads(changed, object_pairs_hook=once)
    return found


CHAT = {"model": "m", "messages": [{"role": "user", "content": 'say "stop": now'}]}


# --- defaults of the family


def test_without_defaults_the_very_same_bytes_go_on() -> None:
    body = b' {"model": "m", "messages": [], "stop" : "x"}'
    head = read_head(msgspec.json.Decoder(ChatHead), body, "/")
    assert ways.with_defaults(body, head, {}) is body


def test_a_request_that_says_nothing_gets_the_familys_stops() -> None:
    assert adapted(CHAT, STOPS) == CHAT | STOPS
    assert adapted(b"\n " + json.dumps(CHAT).encode(), STOPS) == CHAT | STOPS


@pytest.mark.parametrize(
    ("own", "stop"),
    [
        ("a", ["a", "<|im_end|>"]),
        (["a", "b"], ["a", "b", "<|im_end|>"]),
        (["<|im_end|>"], ["<|im_end|>"]),
        (None, ["<|im_end|>"]),
    ],
)
def test_they_are_added_to_its_own(own: Any, stop: list[str]) -> None:
    assert adapted(CHAT | {"stop": own}, STOPS)["stop"] == stop


def test_enable_thinking_goes_where_templates_look_and_beside_what_is_there() -> None:
    thinking = {"enable_thinking": False, "thinking": False}
    assert adapted(CHAT | {"enable_thinking": False}, {}) == CHAT | {"chat_template_kwargs": thinking}
    for kwargs in ({"x": 1}, '{"x": 1}'):
        body = CHAT | {"enable_thinking": False, "chat_template_kwargs": kwargs}
        assert adapted(body, STOPS)["chat_template_kwargs"] == thinking | {"x": 1}


@given(
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers(-5, 5) | st.text() | st.lists(st.text())),
    st.sampled_from([{}, STOPS]),
)
def test_nothing_else_of_a_request_is_changed(extra: dict[str, Any], defaults: dict[str, Any]) -> None:
    touched = {"stop", "stop_token_ids", "enable_thinking", "chat_template_kwargs"}
    body = {name: value for name, value in extra.items() if name not in (*touched, "stream", "response_format")} | CHAT
    found = adapted(body, defaults)
    assert {name: value for name, value in found.items() if name not in touched} == body


@pytest.mark.parametrize("kwargs", ["oops", [1], 3, "[1]"])
def test_template_kwargs_that_are_no_object_are_a_sentence(kwargs: Any) -> None:
    with pytest.raises(BadRequest, match="`chat_template_kwargs` is"):
        adapted(CHAT | {"enable_thinking": False, "chat_template_kwargs": kwargs}, {})


def test_an_empty_delta_gets_the_content_that_clients_read() -> None:
    last = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    assert ways.with_content_in_deltas(last).count(b'"delta":{"content":""}') == 1
    assert ways.with_content_in_deltas(b'data: {"delta":{"content":"a"}}\n\n') == b'data: {"delta":{"content":"a"}}\n\n'


# --- every path


def test_no_path_stands_twice() -> None:
    paths = [way.path for way in ways.WAYS]
    assert len(set(paths)) == len(paths)


def test_a_model_of_another_type_is_refused_with_both_types() -> None:
    chat = next(way for way in ways.WAYS if way.path == "/v1/chat/completions")
    ways.check_served(chat, "m", "LLM")
    with pytest.raises(BadRequest, match=r"'m' is of type embedding, and /v1/chat/completions is for LLM models"):
        ways.check_served(chat, "m", "embedding")


# --- forms


def form(*parts: tuple[str, bytes], boundary: str = "xyz") -> bytes:
    lines = [
        b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (boundary.encode(), header.encode(), content)
        for header, content in parts
    ]
    return b"".join(lines) + b"--%s--\r\n" % boundary.encode()


KIND = b"multipart/form-data; boundary=xyz"


def test_the_head_of_a_form_is_read_between_its_files() -> None:
    body = form(
        ('name="file"; filename="model"', b"\x00\r\n--xy" * 1000),
        ('name="model"', "modèle".encode()),
        ('name="stream"', b"true"),
        ('name="response_format"', b"b64_json"),
        ('name="other"', b"x" * 10**6),
    )
    head = read_form_head(KIND, body)
    assert (head.model, head.stream, head.response_format) == ("modèle", True, "b64_json")


def test_a_file_that_is_called_model_is_not_the_model() -> None:
    assert read_form_head(KIND, form(('name="model"; filename="a.png"', b"evil"))).model == ""


@pytest.mark.parametrize(
    ("kind", "body", "sentence"),
    [
        (b"multipart/form-data", form(('name="model"', b"m")), "names no boundary"),
        (KIND, b"no form at all", "cannot be read"),
        (KIND, form(('name="stream"', b"perhaps")), "field `stream`"),
        (KIND, form(('name="model"', b"m" * 201)), "field `model`"),
        (KIND, form(('name="model"', b"m" * 70000)), "too long"),
    ],
)
def test_a_bad_form_is_a_sentence(kind: bytes, body: bytes, sentence: str) -> None:
    with pytest.raises(BadRequest, match=sentence):
        read_form_head(kind, body)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_form_or_a_sentence(body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        read_form_head(KIND, body)


# --- rerank


def asked(**fields: Any) -> tuple[bytes, RerankHead]:
    body = json.dumps({"model": "m", "query": "q", "documents": ["a", "b", "c"]} | fields).encode()
    return body, read_head(msgspec.json.Decoder(RerankHead), body, "/v1/rerank")


def sent(**fields: Any) -> dict[str, Any]:
    body, head = asked(**fields)
    found: dict[str, Any] = json.loads(rerank.as_engines_take_it(body, head, {}))
    return found


class Answered:
    """What `as_clients_read_it` reads of an exchange."""

    class deployment:
        class launch:
            uid = "m"

    def __init__(self, head: RerankHead) -> None:
        self.head = head


def read(results: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    reply = json.dumps({"results": results, "usage": {"total_tokens": 9}}).encode()
    found: dict[str, Any] = json.loads(rerank.as_clients_read_it(reply, Answered(asked(**fields)[1])))  # type: ignore[arg-type]
    return found


def test_engines_get_no_nulls_and_the_kwargs_beside_the_rest() -> None:
    assert sent(top_n=None, max_chunks_per_doc=None, return_documents="true", kwargs='{"foo": 1}', foo=1) == {
        "model": "m",
        "query": "q",
        "documents": ["a", "b", "c"],
        "foo": 1,
    }


def test_coheres_documents_become_texts_and_pictures_stay() -> None:
    picture = {"text": "a", "image": "data:"}
    assert sent(documents=[{"text": "a"}, picture, "b"])["documents"] == ["a", picture, "b"]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_n": 0},
        {"top_n": "many"},
        {"return_documents": "perhaps"},
        {"return_len": 7},
        {"kwargs": "{"},
        {"kwargs": "[1]"},
        {"documents": []},
    ],
)
def test_bad_fields_are_sentences(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as refused:
        sent(**fields)
    assert refused.value.param in fields


def test_clients_get_sorted_scores_and_what_they_asked_for() -> None:
    results = [{"index": 0, "relevance_score": 1}, {"index": 1, "score": 3}, {"index": 2, "relevance_score": 2.5}]
    plain = read(results)
    assert [(one["index"], one["relevance_score"], one["document"]) for one in plain["results"]] == [
        (1, 3.0, None),
        (2, 2.5, None),
        (0, 1.0, None),
    ]
    assert all(isinstance(one["relevance_score"], float) for one in plain["results"])
    assert plain["meta"]["tokens"] is None
    rich = read(results, top_n="2", return_documents="true", return_len=True)
    assert [one["document"] for one in rich["results"]] == [{"text": "b"}, {"text": "c"}]
    assert rich["meta"]["tokens"] == {"input_tokens": 9, "output_tokens": 9}


def test_the_schema_of_a_chats_answer_is_not_read() -> None:
    content = json.dumps(CHAT | {"response_format": {"type": "json_schema", "json_schema": {}}}).encode()
    head = read_head(msgspec.json.Decoder(ChatHead), content, "/v1/chat/completions")
    assert not hasattr(head, "response_format")


def test_a_prompt_that_is_missing_is_named() -> None:
    with pytest.raises(BadRequest, match="has no `prompt`"):
        read_head(msgspec.json.Decoder(PromptHead), b'{"model": "m"}', "/v1/completions")


@pytest.mark.parametrize(
    ("query", "model"), [(b"model=a%2Fb&x=1", "a/b"), (b"model=%C3%A9", "é"), (b"x=1", ""), (b"", ""), (b"model", "")]
)
def test_the_model_that_a_query_names(query: bytes, model: str) -> None:
    assert read_query_head(query).model == model
