"""Which token comes next: each sequence of a batch by its own wishes. Works on logits of shape [sequences, vocabulary].

Imports torch when it is called, so that the rest of a worker can be read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_LOGPROBS = 20
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Wish:
    """How a sequence is to go on; names as in requests. `logprobs` is how many of the likeliest to tell, None: none."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def is_plain(self) -> bool:
        """Whether the logits stay as they are."""
        return (
            not self.logit_bias
            and not self.presence_penalty
            and not self.frequency_penalty
            and self.repetition_penalty == 1.0
        )


@dataclass(eq=False)
class Line:
    """One sequence that grows: its prompt, its wish, its tokens so far, and where each token goes.

    `put` gets the tokens that have come, and whether they are the last; or an error. It is called in any thread.
    """

    prompt: list[int]
    wish: Wish
    put: Callable[[list[int], bool, BaseException | None], None]
    chances: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """For each token its log-probability, and the likeliest with theirs."""
    picked: list[int] = field(default_factory=list)
    generator: Any = None
    grammar: Any = None
    """A `Grammar` that binds it."""


def pick(logits: Any, lines: Sequence[Line]) -> Any:
    """The next token of each line, shape [lines]; logits are float, shape [lines, vocabulary]."""
    import torch

    told = [row for row, line in enumerate(lines) if line.wish.logprobs is not None]
    raw = logits[told].log_softmax(-1) if told else None
    for row, line in enumerate(lines):
        if not line.wish.is_plain:
            _weigh(logits[row], line)
        if line.grammar is not None:
            line.grammar.bind(logits[row])
    tokens = logits.argmax(-1)
    drawn = [row for row, line in enumerate(lines) if not line.wish.is_greedy]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [lines[row] for row in drawn])
    chosen = tokens.tolist()
    for line, token in zip(lines, chosen, strict=True):
        line.picked.append(token)
        if line.grammar is not None and (wrong := line.grammar.take(token)):
            line.put([], True, RuntimeError(f"the answer cannot go on by its schema: {wrong}"))
    if raw is not None:
        for row, chances in zip(told, raw, strict=True):
            most = lines[row].wish.logprobs or 0
            values, ids = torch.topk(chances, most) if most else (chances[:0], chances[:0])
            best = list(zip(map(int, ids.tolist()), values.tolist(), strict=True))
            lines[row].chances.append((float(chances[chosen[row]]), best))
    return tokens


def _weigh(logits: Any, line: Line) -> None:
    """Penalties and biases, in place; logits of shape [vocabulary]."""
    import torch

    wish, device = line.wish, logits.device
    if wish.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*line.prompt, *line.picked}), device=device)
        old = logits[seen]
        logits[seen] = torch.where(old > 0, old / wish.repetition_penalty, old * wish.repetition_penalty)
    if line.picked and (wish.presence_penalty or wish.frequency_penalty):
        ids, counts = torch.tensor(line.picked, device=device).unique(return_counts=True)
        logits[ids] -= wish.presence_penalty + wish.frequency_penalty * counts.to(logits.dtype)
    for token, bias in wish.logit_bias.items():
        logits[token] += bias


def _draw(logits: Any, lines: Sequence[Line]) -> Any:
    """A token of each line by chance, within its top_k, top_p and min_p."""
    import torch

    device, vocabulary = logits.device, logits.shape[-1]

    def column(values: list[float]) -> Any:
        return torch.tensor(values, device=device, dtype=logits.dtype).unsqueeze(-1)

    chances = (logits / column([line.wish.temperature for line in lines])).softmax(-1)
    if any(0 < line.wish.top_k < vocabulary or line.wish.top_p < 1.0 for line in lines):
        ordered, ids = chances.sort(-1, descending=True)
        rank = torch.arange(vocabulary, device=device)
        top_k = column([line.wish.top_k or vocabulary for line in lines])
        top_p = column([line.wish.top_p for line in lines])
        before = ordered.cumsum(-1) - ordered  # the likeliest has nothing before it, and so always stays
        ordered = ordered.masked_fill((rank >= top_k) | (before >= top_p), 0.0)
        chances = torch.zeros_like(chances).scatter(-1, ids, ordered)
    if any(line.wish.min_p for line in lines):
        least = column([line.wish.min_p for line in lines]) * chances.max(-1, keepdim=True).values
        chances = chances.masked_fill(chances < least, 0.0)
    noise = torch.empty_like(chances).exponential_()
    for row, line in enumerate(lines):
        if line.wish.seed is not None:
            if line.generator is None:
                line.generator = torch.Generator(device=device).manual_seed(line.wish.seed)
            noise[row].exponential_(generator=line.generator)
    return (chances / noise).argmax(-1)
