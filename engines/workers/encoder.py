"""A model of the sentence-transformers library as the batcher needs it: inputs to pieces, pieces to batches.

Tokenising, prompts and pooling are the library's; so is what a folder holds. Ours is that inputs are prepared once,
without padding, and padded as they come together.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engines.workers.batching import Piece
from engines.workers.device import torch_device
from engines.workers.server import Order, Refused

BATCH_TOKENS_THREAD = 512  # on a CPU, which gains nothing by more; a small request waits for the batch that runs
BATCH_TOKENS_GPU = 16384
CHARACTERS_OF_TOKEN = 64  # more in one token is white space; the rest of a text is cut off before it is tokenised
SEQUENCES = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
# Weights that many models are saved without, and that nothing depends on.
NOT_MISSED = re.compile(r"pooler|position_ids|lm_head|embeddings\.word_embeddings|embed_tokens")
MISSING = re.compile(r"^(\S+)\s*\|\s*MISSING", re.MULTILINE)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Machine:
    """Where the model runs, in which type of number, and how much of it at once.

    Options: `device`, `dtype`, `n_threads`, `batch_tokens`. Raises Refused if the device is not there.
    """

    def __init__(self, order: Order) -> None:
        import torch

        options = order.options
        if options.get("n_threads") is None and "OMP_NUM_THREADS" not in os.environ:
            options = options | {"n_threads": max(1, (os.cpu_count() or 2) - 1)}
        self.device = torch_device(options)
        is_gpu = self.device.startswith("cuda")
        dtype = options.get("dtype") or "auto"
        if dtype == "auto":
            dtype = "float32" if not is_gpu else "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
        self.dtype = getattr(torch, dtype)
        on_cpu = min(BATCH_TOKENS_THREAD * torch.get_num_threads(), BATCH_TOKENS_GPU)
        self.batch_tokens = options.get("batch_tokens") or (BATCH_TOKENS_GPU if is_gpu else on_cpu)
        self.trust_remote_code = bool(options.get("trust_remote_code"))


class Files:
    """What a model's folder says of it, before anything is loaded. Raises Refused if it says nothing."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise Refused(f"{folder} is not a folder. sentence-transformers loads folders with a config.json.")
        self.config = self._read("config.json")
        self.modules = [str(module.get("type", "")) for module in self._read("modules.json", default=[])]
        self.kind = str(self._read("config_sentence_transformers.json").get("model_type") or "")
        if not self.config and not self.modules:
            raise Refused(f"{folder} has neither config.json nor modules.json: it is no model of transformers.")

    def _read(self, name: str, default: Any = {}) -> Any:  # noqa: B006
        try:
            return json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return default
        except ValueError as exc:
            raise Refused(f"{self.folder / name} is damaged: {exc}. Fetch it again.") from exc

    @property
    def architecture(self) -> str:
        """Such as BertModel; empty if it is not told."""
        return str(next(iter(self.config.get("architectures") or ()), ""))

    @property
    def brings_code(self) -> bool:
        """Whether the model is Python code that comes with the weights."""
        library = ("sentence_transformers.", "torch.")
        return bool(self.config.get("auto_map")) or not all(module.startswith(library) for module in self.modules)


def load_model(files: Files, machine: Machine, make: Callable[..., Any]) -> Any:
    """The model of a folder, by a class of the library. Raises Refused with what is wrong with the folder."""
    missing: list[str] = []

    class Reports(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            missing.extend(MISSING.findall(COLOURS.sub("", record.getMessage())))

    handler = Reports(logging.WARNING)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(handler)
    kwargs = {"dtype": machine.dtype}
    try:
        model = make(
            str(files.folder),
            device=machine.device,
            trust_remote_code=machine.trust_remote_code,
            local_files_only=True,
            model_kwargs=kwargs,
        )
    except Exception as exc:  # of many libraries, each with errors of its own
        raise Refused(why_not_loaded(files, machine, exc)) from exc
    finally:
        transformers_logger.removeHandler(handler)
    check_weights(files, missing)
    return model.eval()


def why_not_loaded(files: Files, machine: Machine, exc: Exception) -> str:
    """The sentence for a folder that the library has refused."""
    text = f"{type(exc).__name__}: {exc}"
    if files.brings_code and not machine.trust_remote_code:
        return (
            f"{files.folder} brings Python code of its own, which is run only if the launch says "
            f"`trust_remote_code: true`. Read it first. ({text})"
        )
    if "safetensors" in text.lower() or "header" in text.lower():
        text += ". The weights are damaged or not whole: fetch them again"
    return f"{files.folder} cannot be loaded: {text}."


def check_weights(files: Files, missing: Sequence[str]) -> None:
    """Raises Refused if the library has made up weights that the folder lacks."""
    if lacking := [name for name in missing if not NOT_MISSED.search(name)]:
        raise Refused(
            f"The weights in {files.folder} are not those of a {files.architecture}: {len(lacking)} are missing, such "
            f"as {lacking[0]}. They would be random numbers."
        )


class Encoder:
    """A loaded model of the library: `SentenceTransformer`, `SparseEncoder` or `CrossEncoder`."""

    def __init__(self, model: Any, machine: Machine, max_tokens: int | None) -> None:
        self.model, self.machine = model, machine
        self._tokenizing = threading.Lock()  # how a tokenizer cuts is its own state, set anew by each call
        self.max_tokens = self._limit(max_tokens)
        tokenizer = model.tokenizer
        self.tokenizer = tokenizer if callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens") else None

    def _limit(self, wanted: int | None) -> int:
        """The most tokens of an input: the model's own limit, or less if the launch says so."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        own = self.model.max_seq_length or positions
        if wanted and positions and wanted > positions:
            raise Refused(f"The launch says max_tokens {wanted}, but the model has {positions} positions.")
        if wanted:
            self.model.max_seq_length = wanted
        return min(wanted or own or 512, 10**6)

    def cut(self, text: str) -> str:
        """As much of a text as can matter."""
        return text[: self.max_tokens * CHARACTERS_OF_TOKEN]

    def ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Its tokens, uncut."""
        assert self.tokenizer is not None
        with self._tokenizing:
            found: list[int] = self.tokenizer(
                text, add_special_tokens=add_special_tokens, truncation=False, verbose=False
            )["input_ids"]
        return found

    def pieces(self, inputs: Sequence[Any], prompt: str | None = None, limit: int | None = None) -> list[Piece]:
        """Inputs as the library's `preprocess` takes them, prepared.

        Args:
            limit: the most tokens of each, if less than the model's.
        """
        if len(inputs) > 1 and not all(isinstance(one, str | tuple) for one in inputs):
            return [piece for one in inputs for piece in self.pieces([one], prompt, limit)]  # pictures and texts
        more: dict[str, Any] = {}
        if limit and limit < self.max_tokens:
            more["processing_kwargs"] = {"text": {"max_length": limit, "truncation": True}}
        with self._tokenizing:
            features = self.model.preprocess(list(inputs), prompt=prompt, **more)
        if _can_be_split(features):
            return _split(features)
        if len(inputs) > 1:
            return [piece for one in inputs for piece in self.pieces([one], prompt, limit)]
        ids = features.get("input_ids")
        return [Piece(dict(features), 1 if ids is None else ids.numel(), object())]  # it goes alone

    def forward(self, contents: list[dict[str, Any]]) -> dict[str, Any]:
        """The library's outputs for the contents of pieces of one group."""
        import torch

        features = self._padded(contents) if _is_row(contents[0]) else contents[0]
        features = {
            name: value.to(self.machine.device) if _is_tensor(value) else value for name, value in features.items()
        }
        try:
            with torch.inference_mode():
                found: dict[str, Any] = self.model(features)
                return found
        except RuntimeError as exc:
            after_failure(exc)
            raise

    def _padded(self, contents: list[dict[str, Any]]) -> dict[str, Any]:
        return pad(contents, getattr(self.tokenizer, "pad_token_id", None) or 0, self._side)

    @property
    def _side(self) -> str:
        return getattr(self.tokenizer, "padding_side", "right")


def pad(contents: list[dict[str, Any]], pad_id: int, side: str) -> dict[str, Any]:
    """Rows of several inputs as one batch, (inputs, longest)."""
    from torch.nn.utils.rnn import pad_sequence

    batch = dict(contents[0])
    for name in SEQUENCES & batch.keys():
        rows = [content[name] for content in contents]
        value = pad_id if name == "input_ids" else 0
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
    return batch


def after_failure(exc: RuntimeError) -> None:
    """Free what a failed batch holds."""
    import torch

    if torch.cuda.is_available() and isinstance(exc, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "to") and hasattr(value, "shape")


def _is_row(features: dict[str, Any]) -> bool:
    ids = features.get("input_ids")
    return ids is not None and ids.ndim == 1 and "attention_mask" in features


def _can_be_split(features: Any) -> bool:
    tensors = {name: value for name, value in features.items() if _is_tensor(value)}
    return {"input_ids", "attention_mask"} <= tensors.keys() <= SEQUENCES and all(
        value.shape == tensors["input_ids"].shape for value in tensors.values()
    )


def _split(features: Any) -> list[Piece]:
    """The rows of a batch, each without its padding."""
    tensors = {name: value for name, value in features.items() if _is_tensor(value)}
    rest = {name: value for name, value in features.items() if name not in tensors}
    group = (tuple(sorted(tensors)), tuple(sorted((name, str(value)) for name, value in rest.items())))
    pieces = []
    for row, mask in enumerate(tensors["attention_mask"].bool()):
        content = {name: value[row][mask].clone() for name, value in tensors.items()}
        pieces.append(Piece(content | rest, len(content["input_ids"]), group))
    return pieces
