"""Scores of documents for a query, by cross-encoders and by language models that judge. `... workers reranking`.

Answers `{"results": [{"index", "relevance_score"}], "usage"}`, in the order of the documents; the gateway sorts them
and makes the forms that clients know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from engines.workers.batching import Batcher, Piece
from engines.workers.encoder import Encoder, Files, Machine, load_model
from engines.workers.llm_reranker import LanguageModelJudge
from engines.workers.server import Order, Refused, read_json, serve, unless_client_leaves
from engines.workers.tokens import gauges, token_routes

YES_NO, LLM_BASED, LAYERWISE = "yes or no", "LLM-based", "LLM-based layerwise"
CAUSAL = ("ForCausalLM", "ForConditionalGeneration")


class Judge(Protocol):
    """What scores pairs."""

    takes_instruction: bool

    def pieces(self, pairs: Sequence[tuple[str, str]], instruction: str | None) -> list[Piece]:
        """Queries and documents, prepared."""

    def run(self, contents: list[dict[str, Any]]) -> list[float]:
        """A score for each; more is more relevant."""


def main() -> None:
    """Serve until SIGTERM."""
    serve(load)


def load(order: Order) -> list[BaseRoute]:
    """The routes of a reranker. Raises Refused if the folder holds none."""
    files = Files(order.model)
    form = form_of(files, order.options)
    machine = Machine(order)
    max_tokens = order.options.get("max_tokens")
    judge: CrossEncoderJudge | LanguageModelJudge
    if form is None:
        judge = CrossEncoderJudge(files, machine, max_tokens)
    else:
        judge = LanguageModelJudge(files, machine, form, max_tokens)
    return Reranker(order.uid, judge, judge.encoder, machine).routes()


def form_of(files: Files, options: dict[str, Any]) -> str | None:
    """How a language model is asked; None for a cross-encoder.

    Args:
        options: `type` is the family's, `model_name` its name.
    Raises:
        Refused: the folder holds no reranker; the text says what to do.
    """
    architecture = files.architecture
    has_own_modules = files.kind == "CrossEncoder" and any("LogitScore" in module for module in files.modules)
    if has_own_modules or architecture.endswith("ForSequenceClassification"):
        return None
    kind = options.get("type") or "unknown"
    if kind in (LLM_BASED, LAYERWISE):
        return str(kind)
    if architecture.endswith(CAUSAL):
        names = f"{options.get('model_name', '')} {files.folder.name} {files.config.get('_name_or_path', '')}".lower()
        if "rerank" in names:
            return YES_NO
        raise Refused(
            f"{files.folder} holds a {architecture}, a language model, and nothing says that it was trained to rank: "
            "its scores would mean nothing. Launch it with model_type LLM; or, if it is a reranker, register it with "
            f'"type": "{LLM_BASED}", or with "rerank" in its name if it answers yes or no as Qwen3-Reranker does.'
        )
    if files.brings_code and "AutoModelForSequenceClassification" in (files.config.get("auto_map") or {}):
        return None
    raise Refused(
        f"{files.folder} holds a {architecture or 'model of unknown kind'}, which has no head that scores pairs"
        + (": it is an embedding model. Launch it with model_type embedding." if files.modules else ".")
    )


class CrossEncoderJudge:
    """A classifier of pairs with one output."""

    takes_instruction = True

    def __init__(self, files: Files, machine: Machine, max_tokens: int | None) -> None:
        from sentence_transformers import CrossEncoder

        model = load_model(files, machine, CrossEncoder)
        if model.num_labels != 1:
            raise Refused(f"{files.folder} tells {model.num_labels} classes apart; a reranker has one output, a score.")
        self.encoder = Encoder(model, machine, max_tokens)

    def pieces(self, pairs: Sequence[tuple[str, str]], instruction: str | None) -> list[Piece]:
        """As the library prepares pairs; an instruction is its prompt."""
        prompts = self.encoder.model.prompts
        default = self.encoder.model.default_prompt_name
        prompt = instruction or (prompts.get(default) if default else None)
        cut = [(self.encoder.cut(query), self.encoder.cut(document)) for query, document in pairs]
        return self.encoder.pieces(cut, prompt)

    def run(self, contents: list[dict[str, Any]]) -> list[float]:
        """Scores as the model's own activation gives them: from 0 to 1 unless it says otherwise."""
        scores = self.encoder.forward(contents)["scores"].float()
        found: list[float] = self.encoder.model.activation_fn(scores).reshape(len(contents)).cpu().tolist()
        return found


class Reranker:
    """One reranker and its routes."""

    def __init__(self, uid: str, judge: Judge, encoder: Encoder, machine: Machine) -> None:
        self.uid, self.judge, self.encoder = uid, judge, encoder
        self.batcher: Batcher[float] = Batcher(judge.run, batch_tokens=machine.batch_tokens)

    def routes(self) -> list[BaseRoute]:
        """What the worker answers."""
        return [
            Route("/v1/rerank", self.rerank, methods=["POST"]),
            Route("/v1/score", self.score, methods=["POST"]),
            Route("/metrics", self.metrics),
            *token_routes(self.encoder),
        ]

    async def metrics(self, request: Request) -> Response:
        """What waits and what was done, for Prometheus."""
        return PlainTextResponse(gauges(self.batcher))

    async def rerank(self, request: Request) -> Response:
        """A score for each document."""
        body = await read_json(request)
        query = _text(body.get("query"), "query")
        documents = body.get("documents")
        if not isinstance(documents, list) or not documents:
            raise Refused("`documents` is a list of texts; it may not be empty.", param="documents")
        texts = [_text(document, f"documents[{index}]") for index, document in enumerate(documents)]
        scores, n_tokens = await self._scores(request, [(query, text) for text in texts], body)
        results = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return JSONResponse({"model": self.uid, "results": results, "usage": usage})

    async def score(self, request: Request) -> Response:
        """vLLM's form: `text_1` with each of `text_2`, or both lists pair by pair."""
        body = await read_json(request)
        left, right = (_texts(body.get(name), name) for name in ("text_1", "text_2"))
        left = left * len(right) if len(left) == 1 else left
        if len(left) != len(right):
            raise Refused(f"`text_1` has {len(left)} texts and `text_2` {len(right)}.", param="text_2")
        scores, n_tokens = await self._scores(request, list(zip(left, right, strict=True)), body)
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return JSONResponse({"object": "list", "model": self.uid, "data": data, "usage": usage})

    async def _scores(
        self, request: Request, pairs: list[tuple[str, str]], body: dict[str, Any]
    ) -> tuple[list[float], int]:
        instruction = body.get("instruction")
        if instruction is not None and not isinstance(instruction, str):
            raise Refused("`instruction` is a text.", param="instruction")
        if instruction and not self.judge.takes_instruction:
            raise Refused(f"The model {self.uid!r} takes no instruction.", param="instruction")
        work = self.batcher.map(
            pairs, lambda chunk: self.judge.pieces(chunk, instruction), lambda pair: sum(map(len, pair))
        )
        return await unless_client_leaves(request, work)


def _text(value: Any, name: str) -> str:
    """A text, also as an object that holds nothing else."""
    if isinstance(value, dict) and set(value) == {"text"}:
        value = value["text"]
    if not isinstance(value, str):
        raise Refused(f"`{name}` is a text; this model ranks nothing else.", param=name)
    return value


def _texts(value: Any, name: str) -> list[str]:
    if isinstance(value, list) and value:
        return [_text(one, f"{name}[{index}]") for index, one in enumerate(value)]
    return [_text(value, name)]


if __name__ == "__main__":
    main()
