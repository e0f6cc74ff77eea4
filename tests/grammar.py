"""What is wrong with a sentence that was put together: doubled stops, words that are missing, numbers that disagree."""

from __future__ import annotations

import re

FAULTS = {
    "a doubled stop": re.compile(r"[.,;:] ?[.,;:]"),
    "a sentence that begins small": re.compile(r"[.!?] [`a-z]"),
    "spaces": re.compile(r"  | $|^ | [.,;:)]|\( "),
    "nothing where a word should be": re.compile(r"\(\)|\bNone\b|\bnan\b|[:(] (and|or) |: *$|^\w+\.$"),
    "one of many": re.compile(r"\b1 (GPUs|copies|requests|models|slices|layers)\b"),
    "many of one": re.compile(r"\b[02-9]\d* (GPU|copy|request|model|slice) (?!\d)"),
    "many that do as one": re.compile(r"(?<![\w)] )\b[\w-]+ and [\w-]+ (is|has|was|makes|falls|ends)\b"),
    "a word twice": re.compile(r"\b([a-z]+) \1\b"),
}


def faults(text: str) -> list[str]:
    """Those of a text that is to be read after a colon: a clause, or clauses that end with a stop."""
    found = [name for name, pattern in FAULTS.items() if pattern.search(text)]
    if text.count("(") != text.count(")"):
        found.append("a parenthesis that is open")
    return found


def assert_clause(text: str) -> None:
    """Part of a sentence: whoever tells it sets the stop."""
    assert text, "there is no text"
    assert not text.endswith("."), text
    assert not faults(f"{text}."), (faults(f"{text}."), text)


def assert_sentences(text: str) -> None:
    """Whole, to the last stop."""
    assert text.endswith("."), text
    assert not faults(text), (faults(text), text)
