"""Answers that keep to a JSON schema, a regular expression or a choice, by the llguidance library."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from engines.workers.server import Refused

# Blanks that an answer in JSON may have in one place: without a limit, small models write nothing else.
BLANKS = r"[ \n]{1,12}"
FIELDS = ("guided_json", "guided_regex", "guided_choice")


class Grammars:
    """Those of one model. `tags`: the texts around its thinking, which no grammar binds."""

    def __init__(
        self, tokenizer: Any, vocabulary: int, end_ids: Collection[int], tags: tuple[str, ...] | None = None
    ) -> None:
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, vocabulary, sorted(end_ids)
        self._tags = [_only(tokenizer(tag, add_special_tokens=False)["input_ids"]) for tag in tags or ()]
        self._inner: Any = None

    def asked(self, body: Mapping[str, Any], *, is_thinking: bool = False) -> list[Grammar]:
        """The grammar that a request wants, if it wants one.

        Raises:
            Refused: it cannot be kept to, or wants two.
        """
        wanted = _wanted(body)
        if not wanted:
            return []
        if len(wanted) > 1:
            raise Refused(f"A request has one of {' and '.join(wanted)}, not both.", param=next(iter(wanted)))
        ((param, (kind, value)),) = wanted.items()
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError as exc:
            raise Refused(
                f"Answers by a schema need llguidance, which the engine's Python lacks ({exc}). Install it there, or "
                "make the engine's environment anew: hostler engines install transformers.",
                param=param,
            ) from exc
        if self._inner is None:
            try:
                self._inner = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._end_ids)
            except ValueError as exc:
                raise Refused(f"This model's tokenizer does not go with a schema: {exc}.", param=param) from exc
        try:
            grammar = _grammar(LLMatcher, kind, value)
        except (ValueError, TypeError) as exc:
            raise Refused(f"`{param}` cannot be kept to: {exc}.", param=param) from exc
        if error := LLMatcher.validate_grammar(grammar, self._inner):
            raise Refused(f"`{param}` cannot be kept to: {error}.", param=param)
        return [Grammar(LLMatcher(self._inner, grammar), self._tags, is_thinking)]


class Grammar:
    """What one sequence may go on with."""

    def __init__(self, matcher: Any, tags: list[int | None], is_thinking: bool) -> None:
        self._matcher = matcher
        self._think, self._think_end = (tags[0], tags[1]) if len(tags) == 2 else (None, None)
        self._is_thinking = is_thinking and self._think_end is not None
        self._at_begin = not is_thinking

    def copy(self) -> Grammar:
        """For another sequence, from the begin."""
        tags = [self._think, self._think_end]
        return Grammar(self._matcher.deep_copy(), tags, self._is_thinking)

    def bind(self, logits: Any) -> None:
        """Leave, in place, only the tokens that may be next; logits of shape [vocabulary]."""
        import numpy as np
        import torch

        if self._is_thinking:
            return
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        may = torch.zeros(len(logits), dtype=torch.bool)
        size = min(len(bits), len(logits))
        may[:size] = torch.from_numpy(bits[:size].astype(bool))
        if self._at_begin and self._think is not None:
            may[self._think] = True
        logits[~may.to(logits.device)] = float("-inf")

    def take(self, token: int) -> str | None:
        """The sequence goes on with it. What is wrong, if the grammar can be followed no further."""
        is_first, self._at_begin = self._at_begin, False
        if self._is_thinking:
            self._is_thinking = token != self._think_end
        elif is_first and token == self._think and self._think_end is not None:
            self._is_thinking = True
        elif not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            return str(self._matcher.get_error()) or "the grammar does not take the token"
        return None


def _wanted(body: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """The field's name -> json, regex or choice, and its value."""
    found: dict[str, tuple[str, Any]] = {
        name: (name.removeprefix("guided_"), body[name]) for name in FIELDS if body.get(name) is not None
    }
    form = body.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_object":
        found["response_format"] = ("json", {"type": "object"})
    elif kind == "json_schema":
        named = form.get("json_schema") if isinstance(form, dict) else None
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            raise Refused("`response_format.json_schema.schema` is a JSON schema.", param="response_format")
        found["response_format"] = ("json", schema)
    elif form is not None and kind != "text":
        raise Refused("`response_format.type` is text, json_object or json_schema.", param="response_format")
    if (outputs := body.get("structured_outputs")) is not None:
        if not isinstance(outputs, dict) or len(outputs) != 1 or next(iter(outputs)) not in ("json", "regex", "choice"):
            raise Refused("`structured_outputs` has one of json, regex and choice.", param="structured_outputs")
        found["structured_outputs"] = next(iter(outputs.items()))
    return found


def _grammar(matcher: Any, kind: str, value: Any) -> str:
    if kind == "json":
        return str(matcher.grammar_from_json_schema(value, defaults={"whitespace_pattern": BLANKS}))
    if kind == "regex":
        if not isinstance(value, str):
            raise TypeError("a regular expression is a text")
        return str(matcher.grammar_from_regex(value))
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise TypeError("a choice is a list of texts")
    texts = " | ".join(json.dumps(one, ensure_ascii=False) for one in value)
    return str(matcher.grammar_from_lark(f"start: {texts}"))


def _only(ids: list[int]) -> int | None:
    return ids[0] if len(ids) == 1 else None
