"""What a model's own files say of it: GGUF headers, safetensors headers, config.json and those beside it.

It reads headers and small JSON files, never weights, and needs no ML library. Files may be damaged or made to harm:
reads are bounded, and whatever cannot be read is a sentence among the `problems`, never an exception.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from registry import gguf, safetensors
from registry.gguf import Damaged
from registry.hubs.base import PICKLES, SAFETENSORS, HubError, what_engines_need
from registry.hubs.local import sizes_in
from registry.memory import Attention
from registry.sources import is_gguf

GGUF_FILES, SAFETENSORS_FILES, PICKLED_FILES = "gguf", "safetensors", "pickle"

MAX_JSON_BYTES = 16 * 2**20
MAX_LAYERS = 10_000
MAX_PROBLEMS = 20
SANE = 2**40

# Architectures that read a whole text at once and keep no cache of it, by `model_type` and by GGUF's name.
ENCODERS = frozenset(
    [
        "albert",
        "bert",
        "camembert",
        "clip",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "jina-bert-v2",
        "modern-bert",
        "modernbert",
        "mpnet",
        "new",
        "nomic-bert",
        "nomic_bert",
        "roberta",
        "siglip",
        "whisper",
        "xlm-roberta",
    ]
)

# Architectures with a sliding window whose files need not say which layers have it: every so manieth is without.
WITHOUT_WINDOW_EVERY = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "cohere2": 4,
    "gpt-oss": 2,
    "gpt_oss": 2,
    "mistral": 0,
    "mixtral": 0,  # 0: none is without
}

_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_VISION_KEYS = ("vision_config", "visual", "vision_tower", "mm_vision_tower")


class Facts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the files say; what they do not say is None, or empty.

    `files` has the bytes of each file of weights. `elements` counts the numbers in them by type. `attention` is what
    a cache keeps of each token; `is_attention_known` tells an encoder, which keeps nothing, from files that do not
    say. `dimensions` is the length of an embedding's vector, `max_tokens` what it reads of a text.
    """

    kind: str | None = None
    files: dict[str, int] = {}
    weight_bytes: int | None = None
    parameters: int | None = None
    elements: dict[str, int] = {}
    name: str | None = None
    architecture: str | None = None
    architectures: tuple[str, ...] = ()
    layers: int | None = None
    layer_bytes: tuple[int, ...] = ()
    width: int | None = None
    attention: tuple[Attention, ...] = ()
    is_attention_known: bool = False
    is_encoder: bool = False
    context_length: int | None = None
    experts: int | None = None
    experts_used: int | None = None
    vocabulary: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    quantization_method: str | None = None
    has_chat_template: bool | None = None
    has_vision: bool | None = None
    dimensions: int | None = None
    max_tokens: int | None = None
    problems: tuple[str, ...] = ()


def read(path: Path) -> Facts:
    """What is known of a model from its GGUF file, its safetensors file, or its folder. Never raises."""
    problems: list[str] = []
    try:
        if path.is_file():
            found = _of_file(path, problems)
        elif path.is_dir():
            found = _of_folder(path, problems)
        else:
            problems.append(f"There is no file or folder {path}.")
            found = {}
    except OSError as exc:
        problems.append(f"{path} cannot be read: {exc.strerror or exc}.")
        found = {}
    return Facts(**found, problems=tuple(problems[:MAX_PROBLEMS]))


def _of_file(path: Path, problems: list[str]) -> dict[str, Any]:
    if is_gguf(path.name):
        return _of_gguf(path, problems)
    if SAFETENSORS.search(path.name):
        return _of_weights(path.parent, {path.name: path.stat().st_size}, problems)
    kind = PICKLED_FILES if PICKLES.search(path.name) else None
    if kind is None:
        problems.append(f"{path.name} is no file of weights that is known here.")
        return {}
    size_bytes = path.stat().st_size
    return {"kind": kind, "files": {path.name: size_bytes}, "weight_bytes": size_bytes}


# -- GGUF


def _of_gguf(path: Path, problems: list[str]) -> dict[str, Any]:
    parts = _parts(path, problems)
    headers = []
    for part in parts:
        try:
            headers.append(gguf.read_header(part))
        except Damaged as exc:
            problems.append(str(exc))
    files = {part.name: part.stat().st_size for part in parts}
    found: dict[str, Any] = {"kind": GGUF_FILES, "files": files}
    if not headers:
        return found | {"weight_bytes": sum(files.values())}
    elements = sum((Counter(header.types) for header in headers), Counter())
    tensor_bytes = [header.tensor_bytes for header in headers]
    is_exact = len(headers) == len(parts) and None not in tensor_bytes
    n_elements = sum(elements.values())
    found |= {
        "weight_bytes": sum(filter(None, tensor_bytes)) if is_exact else sum(files.values()),
        "elements": dict(elements),
        "parameters": (n_elements or None) if len(headers) == len(parts) else None,
    }
    found |= _of_metadata(headers[0].metadata, headers[0].lengths)
    layer_bytes = sum((Counter(header.layers) for header in headers), Counter())
    if is_exact and found["layers"] and sorted(layer_bytes) == list(range(found["layers"])):
        found["layer_bytes"] = tuple(layer_bytes[number] for number in range(found["layers"]))
    return found


def _parts(path: Path, problems: list[str]) -> list[Path]:
    """All parts of a model that is split, the first first; else the file alone."""
    part = _PART.search(path.name)
    if part is None:
        return [path]
    names = [_PART.sub(f"-{number:05}-of-{part[2]}", path.name) for number in range(1, min(int(part[2]), 9999) + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        problems.append(f"{len(missing)} of the model's {len(names)} parts are missing, such as {missing[0]}.")
    return [path.parent / name for name in names if name not in missing]


def _of_metadata(metadata: Mapping[str, Any], lengths: Mapping[str, int]) -> dict[str, Any]:
    architecture = _text(metadata.get("general.architecture"))

    def own(key: str) -> Any:
        return metadata.get(f"{architecture}.{key}")

    layers = _number(own("block_count"), MAX_LAYERS)
    attention = _gguf_attention(own, architecture, layers)
    is_encoder = own("attention.causal") is False or architecture in ENCODERS
    file_type = _number(metadata.get("general.file_type"))
    return {
        "name": _text(metadata.get("general.name")),
        "architecture": architecture,
        "architectures": (architecture,) if architecture else (),
        "layers": layers,
        "width": _number(own("embedding_length")),
        "attention": () if is_encoder else attention,
        "is_attention_known": is_encoder or bool(attention),
        "is_encoder": is_encoder,
        "context_length": _number(own("context_length")),
        "experts": _number(own("expert_count")),
        "experts_used": _number(own("expert_used_count")),
        "vocabulary": lengths.get("tokenizer.ggml.tokens") or _number(own("vocab_size")),
        "quantization": gguf.FILE_TYPES.get(file_type) if file_type is not None else None,
        "has_chat_template": bool(_text(metadata.get("tokenizer.chat_template"))),
        "dimensions": _number(own("embedding_length_out")) or _number(own("embedding_length")),
    }


def _gguf_attention(own: Any, architecture: str | None, layers: int | None) -> tuple[Attention, ...]:
    if layers is None:
        return ()
    rank = _number(own("attention.kv_lora_rank"))
    if rank:
        rope = _number(own("rope.dimension_count")) or 0
        return (Attention(layers=layers, key=rank + rope, value=0),)
    heads = _per_layer(own("attention.head_count"), layers)
    kv_heads = _per_layer(own("attention.head_count_kv"), layers) or heads
    width = _number(own("embedding_length"))
    most_heads = max(heads or (0,))
    by_heads = width // most_heads if width and most_heads else None
    key = _number(own("attention.key_length")) or by_heads
    value = _number(own("attention.value_length")) or by_heads
    if kv_heads is None or key is None or value is None:
        return ()
    window = _number(own("attention.sliding_window"))
    pattern = own("attention.sliding_window_pattern")
    every = _number(own("full_attention_interval"))
    if every:  # the others are recurrent: what they keep does not grow
        kv_heads = tuple(n if (layer + 1) % every == 0 else 0 for layer, n in enumerate(kv_heads))
    is_windowed = _windowed(window, pattern, architecture, layers)
    return _grouped(
        (n * key, n * value, window if slides else None) for n, slides in zip(kv_heads, is_windowed, strict=True)
    )


# -- folders


def _of_folder(path: Path, problems: list[str]) -> dict[str, Any]:
    sizes = sizes_in(path)
    try:
        needed = what_engines_need(sizes, str(path))
    except HubError:
        needed = []
    weights = {name: sizes[name] for name in needed if SAFETENSORS.search(name) or PICKLES.search(name)}
    weights = {name: size for name, size in weights.items() if not name.lower().endswith(".index.json")}
    ggufs = [name for name in sorted(sizes) if is_gguf(name) and "mmproj" not in name.lower()]
    if not weights and ggufs:
        if len({_PART.sub("", name) for name in ggufs}) == 1:
            return _of_gguf(path / ggufs[0], problems)
        files = {name: sizes[name] for name in ggufs}
        problems.append(
            f"The folder has {len(ggufs)} GGUF files; which is meant is not known: {', '.join(ggufs[:10])}."
        )
        return {"kind": GGUF_FILES, "files": files}
    if not weights:
        problems.append(f"No file of weights is in {path}.")
    return _of_weights(path, weights, problems)


def _of_weights(folder: Path, weights: dict[str, int], problems: list[str]) -> dict[str, Any]:
    config = _json(folder / "config.json", problems)
    found = _of_config(config)
    found |= _of_tensors(folder, weights, problems, has_packed_weights=bool(found.get("quantization_method")))
    found["has_chat_template"] = _has_chat_template(folder, problems) if config or weights else None
    return found | _of_sentence_transformer(folder, found.get("width"), problems)


def _of_tensors(
    folder: Path, weights: dict[str, int], problems: list[str], *, has_packed_weights: bool
) -> dict[str, Any]:
    _check_index(folder, weights, problems)
    headers, n_bytes = [], 0
    for name, size_bytes in weights.items():
        n_bytes += size_bytes
        if not SAFETENSORS.search(name):
            continue
        try:
            header = safetensors.read_header(folder / name)
        except Damaged as exc:
            problems.append(str(exc))
        except OSError as exc:
            problems.append(f"{name} cannot be read: {exc.strerror or exc}.")
        else:
            headers.append(header)
            n_bytes += header.tensor_bytes - size_bytes
    elements = sum((Counter(header.types) for header in headers), Counter())
    is_whole = bool(headers) and len(headers) == len(weights)
    kind = SAFETENSORS_FILES if any(map(SAFETENSORS.search, weights)) else PICKLED_FILES if weights else None
    return {
        "kind": kind,
        "files": weights,
        "weight_bytes": n_bytes if weights else None,
        "elements": dict(elements),
        "parameters": (_parameters(elements) or None) if is_whole and not has_packed_weights else None,
    }


def _parameters(elements: Mapping[str, int]) -> int:
    """The numbers that were learnt: without positions and masks, which are whole."""
    return sum(n for name, n in elements.items() if "F" in name)


def _check_index(folder: Path, weights: Mapping[str, int], problems: list[str]) -> None:
    """What an index names and is not there."""
    for index in sorted(folder.glob("*.safetensors.index.json"))[:3]:
        try:
            missing = [name for name in safetensors.read_index(index) if name not in weights]
        except Damaged as exc:
            problems.append(str(exc))
            continue
        if missing and not any(name for name in weights if PICKLES.search(name)):
            problems.append(f"{len(missing)} files that {index.name} names are missing, such as {missing[0]}.")


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config:
        return {}
    text = next((part for key in _TEXT_PARTS if isinstance(part := config.get(key), dict)), {})
    text = next((part for key in _TEXT_PARTS if isinstance(part := text.get(key), dict)), text)

    def own(*keys: str) -> Any:
        return next((one[key] for one in (text, config) for key in keys if one.get(key) is not None), None)

    architecture = _text(own("model_type"))
    layers = _number(own("num_hidden_layers", "n_layer", "n_layers", "num_layers"), MAX_LAYERS)
    is_encoder = architecture in ENCODERS or _text(config.get("model_type")) in ENCODERS
    attention = () if is_encoder else _config_attention(own, architecture, layers)
    method, quantization = _config_quantization(config, text)
    return {
        "architecture": _text(config.get("model_type")) or architecture,
        "architectures": _texts(config.get("architectures")),
        "layers": layers,
        "width": _number(own("hidden_size", "n_embd", "d_model", "dim")),
        "attention": attention,
        "is_attention_known": is_encoder or bool(attention),
        "is_encoder": is_encoder,
        "context_length": _context_length(own, architecture),
        "experts": _number(own("num_local_experts", "num_experts", "n_routed_experts")),
        "experts_used": _number(own("num_experts_per_tok", "num_experts_per_token")),
        "vocabulary": _number(own("vocab_size")),
        "dtype": _text(own("torch_dtype", "dtype")),
        "quantization": quantization,
        "quantization_method": method,
        "has_vision": any(key in config for key in _VISION_KEYS),
    }


def _config_attention(own: Any, architecture: str | None, layers: int | None) -> tuple[Attention, ...]:
    if layers is None:
        return ()
    rank = _number(own("kv_lora_rank"))
    if rank:
        return (Attention(layers=layers, key=rank + (_number(own("qk_rope_head_dim")) or 0), value=0),)
    heads = _number(own("num_attention_heads", "n_head", "n_heads"))
    kv_heads = _per_layer(own("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), layers)
    kv_heads = kv_heads or _per_layer(heads, layers)
    width = _number(own("hidden_size", "n_embd", "d_model"))
    head_dim = _number(own("head_dim", "kv_channels")) or (width // heads if width and heads else None)
    if kv_heads is None or head_dim is None:
        return ()
    window = _number(own("sliding_window")) if own("use_sliding_window") is not False else None
    types = own("layer_types")
    every = _number(own("full_attention_interval"))
    keeps = [True] * layers
    if isinstance(types, list) and len(types) == layers:
        pattern: Any = [kind in ("sliding_attention", "chunked_attention") for kind in types]
        keeps = [kind not in ("linear_attention", "conv", "mamba") for kind in types]
    else:
        pattern = own("sliding_window_pattern")
        if every:
            keeps = [(layer + 1) % every == 0 for layer in range(layers)]
    is_windowed = _windowed(window, pattern, architecture, layers)
    sizes = [n * head_dim if kept else 0 for n, kept in zip(kv_heads, keeps, strict=True)]
    return _grouped((size, size, window if slides else None) for size, slides in zip(sizes, is_windowed, strict=True))


def _context_length(own: Any, architecture: str | None) -> int | None:
    length = _number(own("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"))
    if length and architecture in ("roberta", "xlm-roberta", "camembert"):
        return length - 2  # two positions stand for padding
    return length


def _config_quantization(config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The method and how to name the quantization: of `quantization_config`, or of MLX's `quantization`."""
    for part in (config, text):
        said = part.get("quantization_config")
        if isinstance(said, dict):
            method = _text(said.get("quant_method")) or "unknown"
            bits = _number(said.get("bits")) or _number(said.get("w_bit"))
            if method == "bitsandbytes":
                bits = 4 if said.get("load_in_4bit") or said.get("_load_in_4bit") else 8
            return method, f"{method}, {bits} bits" if bits else method
        said = part.get("quantization")
        if isinstance(said, dict) and _number(said.get("bits")):
            return "mlx", f"mlx, {_number(said.get('bits'))} bits"
    return None, None


def _has_chat_template(folder: Path, problems: list[str]) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool(_json(folder / "tokenizer_config.json", problems).get("chat_template"))


def _of_sentence_transformer(folder: Path, width: int | None, problems: list[str]) -> dict[str, Any]:
    """Vectors and texts, of a folder that sentence-transformers wrote; else an encoder's own width."""
    found: dict[str, Any] = {"dimensions": width}
    modules = _json(folder / "modules.json", problems, kind=list)
    for module in modules if isinstance(modules, list) else ():
        place = module.get("path") if isinstance(module, dict) else None
        if not isinstance(place, str) or not re.fullmatch(r"[\w.-]+", place) or place in (".", ".."):
            continue
        config = _json(folder / place / "config.json", problems)
        said = _number(config.get("word_embedding_dimension")) or _number(config.get("out_features"))
        found["dimensions"] = said or found["dimensions"]
    max_tokens = _number(_json(folder / "sentence_bert_config.json", problems).get("max_seq_length"))
    return found | ({"max_tokens": max_tokens} if max_tokens else {})


# -- small parts


def _windowed(window: int | None, pattern: Any, architecture: str | None, layers: int) -> list[bool]:
    """For each layer whether it keeps no more than the window; where nobody says, none does: an upper bound."""
    if not window:
        return [False] * layers
    if isinstance(pattern, list) and len(pattern) == layers:
        return [bool(one) for one in pattern]
    every = _number(pattern) if pattern is not None else WITHOUT_WINDOW_EVERY.get(architecture or "")
    if every is None:
        return [False] * layers
    return [every == 0 or (layer + 1) % every != 0 for layer in range(layers)]


def _grouped(layers: Iterable[tuple[int, int, int | None]]) -> tuple[Attention, ...]:
    """Layers that are alike, together; without those that keep nothing."""
    counted = Counter(layers)
    return tuple(
        Attention(layers=n, key=key, value=value, window=window)
        for (key, value, window), n in counted.items()
        if key or value
    )


def _per_layer(value: Any, layers: int) -> tuple[int, ...] | None:
    """A number for each layer, given as one or as a list of as many."""
    if isinstance(value, list) and len(value) == layers:
        numbers = [_number(one) for one in value]
        return tuple(n or 0 for n in numbers)
    number = _number(value)
    return (number,) * layers if number is not None else None


def _number(value: Any, limit: int = SANE) -> int | None:
    """A whole number from 0 to the limit, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit else None


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) and value and "\0" not in value and len(value) < 2**20 else None


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text for one in value[:20] if (text := _text(one))) if isinstance(value, list) else ()


def _json(path: Path, problems: list[str], kind: type = dict) -> Any:
    """What the file says; empty if it is not there, or cannot be read, which is told."""
    try:
        if not path.is_file():
            return kind()
        if path.stat().st_size > MAX_JSON_BYTES:
            problems.append(f"{path.name} is longer than {MAX_JSON_BYTES // 2**20} MiB and was not read.")
            return kind()
        data = msgspec.json.decode(path.read_bytes())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        problems.append(f"{path.name} is no JSON: {exc}.")
        return kind()
    except OSError as exc:
        problems.append(f"{path.name} cannot be read: {exc.strerror or exc}.")
        return kind()
    if not isinstance(data, kind):
        problems.append(f"{path.name} does not hold what is expected of it.")
        return kind()
    return data
