"""Language models that judge whether a document answers a query, by the likelihood of their next word.

Three forms of the question are known: that of Qwen3-Reranker (yes or no), that of BGE's rerankers on language models
("LLM-based"), and that of those which may answer from an earlier layer ("LLM-based layerwise").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.workers.batching import Piece
from engines.workers.encoder import Encoder, Files, Machine, after_failure, load_model, pad
from engines.workers.server import Refused

DEFAULT_LENGTH = 8192  # of a judge whose files and launch say nothing
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
YES_NO_BEGIN = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
YES_NO_END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
LLM_BASED_END = (
    "\nGiven a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
LAYER = 28  # of those that can answer early: as their authors recommend


class LanguageModelJudge:
    """A causal language model that scores pairs.

    Args:
        form: `yes or no`, `LLM-based` or `LLM-based layerwise`.
    """

    def __init__(self, files: Files, machine: Machine, form: str, max_tokens: int | None) -> None:
        self.machine, self.form = machine, form
        self.takes_instruction = form == "yes or no"
        self.model = load_model(files, machine, _make)
        self.encoder = Encoder(self.model, machine, max_tokens or min(self.model.max_seq_length, DEFAULT_LENGTH))
        self.tokenizer = self.model.tokenizer
        if self.takes_instruction:
            self.begin, self.end = self._ids(YES_NO_BEGIN), self._ids(YES_NO_END)
            self.words = [self._word(files, "yes"), self._word(files, "no")]
        else:
            first = self.tokenizer.bos_token_id
            self.begin, self.end = ([] if first is None else [first]), self._ids(LLM_BASED_END)
            self.words = [self._ids("Yes")[0]]
        self.room = self.encoder.max_tokens - len(self.begin) - len(self.end)
        if self.room < 8:
            raise Refused(f"max_tokens {self.encoder.max_tokens} leaves no room for a query and a document.")

    def _ids(self, text: str) -> list[int]:
        return self.encoder.ids(text, add_special_tokens=False)

    def _word(self, files: Files, word: str) -> int:
        ids = self._ids(word)
        if len(ids) != 1:
            raise Refused(f"The tokenizer of {files.folder} has no single token for {word!r}, so it cannot judge.")
        return ids[0]

    def pieces(self, pairs: Sequence[tuple[str, str]], instruction: str | None) -> list[Piece]:
        """The question for each pair, cut where the pair is too long."""
        import torch

        pieces = []
        for query, document in pairs:
            ids = torch.tensor([*self.begin, *self._question(query, document, instruction), *self.end])
            pieces.append(Piece({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, len(ids)))
        return pieces

    def _question(self, query: str, document: str, instruction: str | None) -> list[int]:
        query, document = self.encoder.cut(query), self.encoder.cut(document)
        if self.takes_instruction:
            text = f"<Instruct>: {instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
            return self._ids(text)[: self.room]
        asked = self._ids(f"A: {query}")[: self.room * 3 // 4]
        return (asked + self._ids(f"\nB: {document}"))[: self.room]

    def run(self, contents: list[dict[str, Any]]) -> list[float]:
        """From 0 to 1: how likely the model's answer is yes."""
        import torch

        batch = pad(contents, self.tokenizer.pad_token_id or 0, "left")
        batch = {name: value.to(self.machine.device) for name, value in batch.items()}
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        try:
            with torch.inference_mode():
                scores = self._logits(batch)
        except RuntimeError as exc:
            after_failure(exc)
            raise
        found: list[float] = torch.sigmoid(scores.float()).cpu().tolist()
        return found

    def _logits(self, batch: dict[str, Any]) -> Any:
        """The log-odds of yes, (inputs)."""
        network = self.model.network
        if self.form == "LLM-based layerwise":
            del batch["position_ids"]
            return network(**batch, cutoff_layers=[LAYER]).logits[0][:, -1]
        logits = network(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]
        if len(self.words) == 1:
            return logits[:, self.words[0]]
        return logits[:, self.words[0]] - logits[:, self.words[1]]


class _LanguageModel:
    """A causal language model under the names by which `Encoder` knows the library's models."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network, self.tokenizer, self.config = network, tokenizer, network.config
        self.max_seq_length = int(getattr(network.config, "max_position_embeddings", None) or DEFAULT_LENGTH)

    def eval(self) -> _LanguageModel:
        self.network.eval()
        return self


def _make(
    folder: str, *, device: str, trust_remote_code: bool, local_files_only: bool, model_kwargs: dict[str, Any]
) -> _LanguageModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(folder, **more, **model_kwargs)
    return _LanguageModel(network.to(device), tokenizer)
