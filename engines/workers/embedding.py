"""Embeddings by the sentence-transformers library, in OpenAI's form. Run as `... workers embedding --model FOLDER`.

Vectors come from `SentenceTransformer`, weights of words from a `SparseEncoder` or from BGE-M3's second head.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from engines.workers.batching import Batcher
from engines.workers.encoder import Encoder, Files, Machine, load_model
from engines.workers.server import Order, Refused, flag, number, read_json, serve, unless_client_leaves
from engines.workers.tokens import gauges, token_routes

if TYPE_CHECKING:
    import numpy as np

DECIMALS = 9  # of float32 numbers as text: shorter by half than all that Python would write, and as exact
INSTRUCT = re.compile(r"^Instruct: .*?(\n\s*Query:\s*)$", re.DOTALL)
SPARSE_HEAD = "sparse_linear.pt"
NORM_TOLERANCE = 1e-12

Found = Any  # a vector, or (token ids, weights)


def main() -> None:
    """Serve until SIGTERM."""
    serve(load)


def load(order: Order) -> list[BaseRoute]:
    """The routes of an embedding model. Raises Refused if the folder holds none."""
    files = Files(order.model)
    check_folder(files)
    machine = Machine(order)
    from sentence_transformers import SentenceTransformer, SparseEncoder

    is_sparse = files.kind == "SparseEncoder"
    model = load_model(files, machine, SparseEncoder if is_sparse else SentenceTransformer)
    encoder = Encoder(model, machine, order.options.get("max_tokens"))
    return Embeddings(order, encoder, files, is_sparse).routes()


def check_folder(files: Files) -> None:
    """Raises Refused, with what to do, if the folder holds a model of another kind."""
    architecture = files.architecture
    if files.kind == "CrossEncoder" or (architecture.endswith("ForSequenceClassification") and not files.modules):
        raise Refused(
            f"{files.folder} holds a {files.kind or architecture}, which scores pairs of texts and makes no "
            "embeddings. Launch it with model_type rerank."
        )
    if not files.modules and architecture.endswith(("ForCausalLM", "ForConditionalGeneration")):
        raise Refused(
            f"{files.folder} holds a {architecture}, a language model without the modules.json of an embedding model. "
            "Launch it with model_type LLM, or add the modules.json of sentence-transformers."
        )


class Embeddings:
    """One embedding model and its routes."""

    def __init__(self, order: Order, encoder: Encoder, files: Files, is_sparse: bool) -> None:
        self.uid, self.encoder, self.is_sparse = order.uid, encoder, is_sparse
        model, options = encoder.model, order.options
        self.normalize = options.get("normalize_embeddings", True)
        model.prompts.update(options.get("prompts") or {})
        if name := options.get("default_prompt_name"):
            self.prompt_named(name)
            model.default_prompt_name = name
        self.sparse_head = None if is_sparse else load_sparse_head(files, encoder)
        self.dimensions = int(model.get_embedding_dimension() or 0)
        self.batcher: Batcher[dict[str, Found]] = Batcher(self._run, batch_tokens=encoder.machine.batch_tokens)

    def routes(self) -> list[BaseRoute]:
        """What the worker answers."""
        return [
            Route("/v1/embeddings", self.embed, methods=["POST"]),
            Route("/metrics", self.metrics),
            *token_routes(self.encoder),
        ]

    async def metrics(self, request: Request) -> Response:
        """What waits and what was done, for Prometheus."""
        return PlainTextResponse(gauges(self.batcher))

    # --- a request

    async def embed(self, request: Request) -> Response:
        """OpenAI's embeddings, and what Xinference's clients may add."""
        body = await read_json(request)
        given = inputs_of(body.get("input"))
        inputs = await asyncio.to_thread(lambda: [self._input(one) for one in given])
        prompt = self._prompt(body)
        limit = self._limit(body)
        wants_sparse = flag(body.get("return_sparse"), "return_sparse")
        if wants_sparse and not self.is_sparse and self.sparse_head is None:
            raise Refused(f"The model {self.uid!r} makes vectors only: it has no sparse head.", param="return_sparse")
        dimensions = self._dimensions(body)
        encoding = body.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            raise Refused(f"`encoding_format` is float or base64, not {encoding!r}.", param="encoding_format")
        normalize = flag(body.get("normalize_embeddings"), "normalize_embeddings", default=self.normalize)
        if not flag(body.get("truncate"), "truncate", default=True):
            await asyncio.to_thread(self._check_lengths, inputs, prompt, limit)
        work = self.batcher.map(
            inputs, lambda chunk: self.encoder.pieces([opened(one) for one in chunk], prompt, limit), size_of
        )
        found, n_tokens = await unless_client_leaves(request, work)
        if wants_sparse or self.is_sparse:
            texts = [json.dumps(dict(zip(map(str, ids), weights, strict=True))) for ids, weights in map(_sparse, found)]
        else:
            texts = await asyncio.to_thread(_vectors, found, dimensions, normalize, encoding)
        return Response(self._reply(texts, n_tokens), media_type="application/json")

    def _reply(self, texts: Sequence[str], n_tokens: int) -> str:
        data = ",".join(
            f'{{"object":"embedding","index":{index},"embedding":{text}}}' for index, text in enumerate(texts)
        )
        usage = json.dumps({"prompt_tokens": n_tokens, "total_tokens": n_tokens})
        return f'{{"object":"list","model":{json.dumps(self.uid)},"data":[{data}],"usage":{usage}}}'

    def _input(self, one: Any) -> Any:
        """An input as `opened` takes it: a text, or a dict with a picture and perhaps a text."""
        if isinstance(one, str):
            return self.encoder.cut(one)
        if isinstance(one, list):
            return self.encoder.cut(self._decoded(one))
        unknown = set(one) - {"text", "image"}
        if unknown or not one:
            raise Refused(
                f"An input that is an object has `text`, `image` or both, not {sorted(unknown) or 'nothing'}.",
                param="input",
            )
        text = one.get("text")
        if text is not None and not isinstance(text, str):
            raise Refused("`text` of an input is a text.", param="input")
        if one.get("image") is None:
            return self.encoder.cut(text or "")
        if not self.encoder.model.supports("image" if text is None else ("image", "text")):
            raise Refused(
                f"The model {self.uid!r} embeds {', '.join(map(str, self.encoder.model.modalities))}"
                + (", not an image." if text is None else ", not a text and an image as one."),
                param="input",
            )
        return {"image": one["image"]} | ({} if text is None else {"text": self.encoder.cut(text)})

    def _decoded(self, ids: list[Any]) -> str:
        """The text of token ids, which are the model's own."""
        tokenizer = self.encoder.tokenizer
        if tokenizer is None:
            raise Refused("This model has no tokenizer, so the input is text, not token ids.", param="input")
        size = len(tokenizer)
        if wrong := next((number for number in ids if not 0 <= number < size), None):
            raise Refused(
                f"The token id {wrong} is not one of this model, which has ids from 0 to {size - 1}. Clients that "
                "tokenise for OpenAI's models must send text (in LangChain: check_embedding_ctx_length=False).",
                param="input",
            )
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def _prompt(self, body: dict[str, Any]) -> str | None:
        """What goes before each text: `prompt`, one of the model's by `prompt_name`, or one of `instruction`."""
        for name in ("prompt", "prompt_name", "instruction"):
            if body.get(name) is not None and not isinstance(body[name], str):
                raise Refused(f"`{name}` is a text.", param=name)
        model = self.encoder.model
        if body.get("prompt") is not None:
            return str(body["prompt"])
        if instruction := body.get("instruction"):
            form = next((found for text in model.prompts.values() if (found := INSTRUCT.match(text))), None)
            return f"Instruct: {instruction}{form[1]}" if form else str(instruction)
        if body.get("prompt_name"):
            return self.prompt_named(body["prompt_name"])
        return model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None

    def prompt_named(self, name: str) -> str:
        """One of the model's prompts, or of the launch's."""
        prompts: dict[str, str] = self.encoder.model.prompts
        if name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            raise Refused(f"This model has no prompt {name!r}. It has: {known}.", param="prompt_name")
        return prompts[name]

    def _limit(self, body: dict[str, Any]) -> int | None:
        """`truncate_prompt_tokens`: from 1 on a limit, below 0 the model's."""
        if body.get("truncate_prompt_tokens") is None:
            return None
        most = number(body["truncate_prompt_tokens"], "truncate_prompt_tokens", int, least=-1, most=10**9)
        if most == 0:
            raise Refused("`truncate_prompt_tokens` is 0, which leaves nothing.", param="truncate_prompt_tokens")
        return most if most > 0 else None

    def _dimensions(self, body: dict[str, Any]) -> int | None:
        if body.get("dimensions") is None:
            return None
        wanted = int(number(body["dimensions"], "dimensions", int, least=1, most=10**9))
        if self.is_sparse:
            raise Refused(f"{self.uid!r} gives weights of words, which have no `dimensions`.", param="dimensions")
        if wanted > self.dimensions:
            raise Refused(
                f"`dimensions` is {wanted}, and the vectors of {self.uid!r} have {self.dimensions}.", param="dimensions"
            )
        return wanted

    def _check_lengths(self, inputs: Sequence[Any], prompt: str | None, limit: int | None) -> None:
        """Raises Refused for a text that would be cut."""
        most = min(limit or self.encoder.max_tokens, self.encoder.max_tokens)
        for index, one in enumerate(inputs):
            text = one.get("text") if isinstance(one, dict) else one
            if isinstance(text, str) and (count := len(self.encoder.ids((prompt or "") + text))) > most:
                raise Refused(
                    f"Input {index} has {count} tokens or more; {self.uid!r} reads {most}. Split it, or leave out "
                    "`truncate: false` to have it cut.",
                    param="input",
                )

    # --- in the model's thread

    def _run(self, contents: list[dict[str, Any]]) -> list[dict[str, Found]]:
        outputs = self.encoder.forward(contents)
        embeddings = outputs["sentence_embedding"]
        if self.is_sparse:
            dense = embeddings.to_dense() if embeddings.is_sparse else embeddings
            return [{"sparse": nonzero(row)} for row in dense.float().cpu()]
        vectors = embeddings.float().cpu().numpy()
        found: list[dict[str, Found]] = [{"vector": vector} for vector in vectors]
        if self.sparse_head is not None:
            for one, weights in zip(found, self._head_weights(outputs), strict=True):
                one["sparse"] = weights
        return found

    def _head_weights(self, outputs: dict[str, Any]) -> list[Found]:
        """BGE-M3's weights of words: of each token the largest that it has anywhere in the text."""
        import torch

        assert self.sparse_head is not None
        special = set(self.encoder.tokenizer.all_special_ids) if self.encoder.tokenizer else set()
        with torch.inference_mode():
            weights = torch.relu(self.sparse_head(outputs["token_embeddings"]))[..., 0].float().cpu()
        found = []
        for ids, mask, row in zip(outputs["input_ids"].cpu(), outputs["attention_mask"].cpu(), weights, strict=True):
            largest: dict[int, float] = {}
            for token, weight, is_there in zip(ids.tolist(), row.tolist(), mask.tolist(), strict=True):
                if is_there and weight > 0 and token not in special:
                    largest[token] = max(weight, largest.get(token, 0.0))
            found.append((list(largest), list(largest.values())))
        return found


# --- what requests hold


def inputs_of(given: Any) -> list[Any]:
    """`input` as a list of texts, lists of token ids, and objects. Raises Refused if it is something else."""
    if given is None:
        raise Refused("The request has no `input`.", param="input")
    if isinstance(given, str | dict):
        return [given]
    if not isinstance(given, list) or not given:
        raise Refused("`input` is a text, a list of texts, or a list of token ids; it may not be empty.", param="input")
    if all(_is_id(one) for one in given):
        return [given]
    for index, one in enumerate(given):
        is_ids = isinstance(one, list) and one and all(_is_id(token) for token in one)
        if not (is_ids or isinstance(one, str | dict)):
            raise Refused(
                f"Input {index} is {_what(one)}; it may be a text, a list of token ids, or an object with `text`, "
                "`image` or both.",
                param="input",
            )
    return given


def opened(one: Any) -> Any:
    """An input as the library takes it, once its turn comes: pictures are much larger open than as files."""
    if isinstance(one, str):
        return one
    picture = picture_of(one["image"])
    return {"text": one["text"], "image": picture} if "text" in one else picture


def picture_of(given: Any) -> Any:
    """A picture out of base64 text or a data address. Raises Refused for addresses of other places."""
    from engines.workers import pictures

    if not isinstance(given, str):
        raise Refused("`image` is a picture as base64 text, or a data: address.", param="input")
    if re.match(r"(https?|file)://|/", given[:8]):
        raise Refused(
            "`image` is an address, and nothing is fetched here. Send the picture itself: data:image/png;base64,...",
            param="input",
        )
    return pictures.picture_of(pictures.from_base64(given, "image"), "image").convert("RGB")


def size_of(one: Any) -> int:
    """Characters of an input, for preparing few long ones at once."""
    return len(one) if isinstance(one, str) else 10_000


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _what(value: Any) -> str:
    return "an empty list" if value == [] else f"{json.dumps(value)[:40]}"


# --- what replies hold


def load_sparse_head(files: Files, encoder: Encoder) -> Any:
    """BGE-M3's layer that gives each token a weight, or None."""
    file = files.folder / SPARSE_HEAD
    if not file.exists():
        return None
    import torch

    weights = torch.load(file, map_location="cpu", weights_only=True)
    head = torch.nn.Linear(weights["weight"].shape[1], 1)
    head.load_state_dict(weights)
    return head.to(encoder.machine.device, encoder.machine.dtype).eval()


def nonzero(row: Any) -> Found:
    """A row over the vocabulary as (ids, weights)."""
    ids = row.nonzero()[:, 0]
    return ids.tolist(), row[ids].tolist()


def _sparse(one: dict[str, Found]) -> Found:
    return one["sparse"]


def _vectors(found: Sequence[dict[str, Found]], dimensions: int | None, normalize: bool, encoding: str) -> list[str]:
    """Each vector as JSON: a list of numbers, or base64 of little-endian float32."""
    import numpy as np

    vectors = np.stack([one["vector"] for one in found])
    vectors = shaped(vectors, dimensions, normalize)
    if encoding == "base64":
        return [f'"{base64.b64encode(vector.tobytes()).decode()}"' for vector in vectors.astype("<f4")]
    return [json.dumps(row, separators=(",", ":")) for row in np.round(vectors.astype("f8"), DECIMALS).tolist()]


def shaped(vectors: np.ndarray, dimensions: int | None, normalize: bool) -> np.ndarray:
    """The first `dimensions` of each vector, of length 1 if `normalize`.

    Args:
        vectors: float32, (inputs, dimensions of the model).
    """
    import numpy as np

    if dimensions:
        vectors = vectors[:, :dimensions]
    if normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), NORM_TOLERANCE)
    return vectors


if __name__ == "__main__":
    main()
