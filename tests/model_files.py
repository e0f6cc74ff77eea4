"""Small real files of models, as the tests write them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

F32, Q8_0 = 0, 8


def gguf(
    metadata: dict[str, Any],
    tensors: dict[str, tuple[list[int], int]] | None = None,
    *,
    version: int = 3,
    data: int = 0,
) -> bytes:
    """A GGUF file; texts, whole numbers, truths, and lists of those as values; `data` bytes of weights."""
    tensors = tensors or {}
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += _text(key) + _value(value)
    for name, (shape, kind) in tensors.items():
        out += _text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
        out += struct.pack("<IQ", kind, 0)
    return out + bytes(-len(out) % 32) + bytes(data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    kind, packed = _packed(value)
    return struct.pack("<I", kind) + packed


def _packed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, str):
        return 8, _text(value)
    items = [_packed(item) for item in value]
    kind = items[0][0] if items else 4
    return 9, struct.pack("<IQ", kind, len(items)) + b"".join(packed for _, packed in items)


def safetensors(shapes: dict[str, tuple[str, list[int], int]]) -> bytes:
    """A safetensors file: name -> type, shape, bytes of one number."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, width) in shapes.items():
        size = width
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
    "vocab_size": 100,
}


def llama_folder(folder: Path, **config: Any) -> Path:
    """A folder of a language model of 6400 parameters in bfloat16; `config` changes config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | config))
    (folder / "model.safetensors").write_bytes(safetensors({"embed": ("BF16", [100, 64], 2)}))
    return folder
