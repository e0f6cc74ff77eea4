"""What workers for embedding and ranking share: a model's tokenizer."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from engines.workers.encoder import Encoder


class Tokenizer:
    """As the library's: whether it cuts is set first, and read only then."""

    cuts = False
    convert_ids_to_tokens = None

    def __call__(self, text: str, *, truncation: bool, **more: Any) -> dict[str, list[int]]:
        self.cuts = truncation
        time.sleep(0.01)
        return {"input_ids": list(range(4 if self.cuts else 9))}


def test_texts_are_cut_or_not_whoever_else_uses_the_tokenizer() -> None:
    tokenizer = Tokenizer()
    lengths: list[int] = []

    def preprocess(texts: list[str], prompt: str | None) -> dict[str, Any]:
        lengths.append(len(tokenizer(texts[0], truncation=True)["input_ids"]))
        return {}

    model = SimpleNamespace(config=None, max_seq_length=4, tokenizer=tokenizer, preprocess=preprocess)
    encoder = Encoder(model, SimpleNamespace(), None)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as threads:
        uncut = [threads.submit(lambda: (encoder.pieces(["x"]), encoder.ids("x"))[1]) for _ in range(20)]
    assert lengths == [4] * 20
    assert [len(one.result()) for one in uncut] == [9] * 20
