"""Language models of random weights, in the shapes of known ones, written without any library but numpy.

    python bench/gpu/shapes.py TOKENIZER_FOLDER OUT 1b|7b|tiny

One block of numbers is used for all layers, begun at another place for each: what is computed takes as long as with
real weights, and what is said means nothing.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

BLOCK = 1 << 26
SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
}


def config_of(shape: dict[str, int], tokenizer: Path) -> dict[str, Any]:
    """As transformers reads it."""
    source = json.loads((tokenizer / "config.json").read_text())
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": source["vocab_size"],
        "bos_token_id": source.get("bos_token_id"),
        "eos_token_id": source.get("eos_token_id"),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the file."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    values = config["head_dim"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{at}.self_attn.k_proj.weight", (values, hidden)
        yield f"{at}.self_attn.v_proj.weight", (values, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def write(tokenizer: Path, out: Path, size: str) -> int:
    """Write the folder; how many parameters it has."""
    config = config_of(SHAPES[size], tokenizer)
    tensors = list(tensors_of(config))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special", "chat_template", "generation_config")):
            shutil.copy(file, out)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors:
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    numbers = numpy.random.default_rng(0).standard_normal(min(BLOCK, at // 2), dtype=numpy.float32) * 0.02
    random = _bfloat16(numbers)
    ones = _bfloat16(numpy.ones(config["hidden_size"], dtype=numpy.float32))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    new = out / "model.new"
    with new.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (_, shape) in enumerate(tensors):
            if len(shape) == 1:
                file.write(ones)
            else:
                for piece in _pieces(random, 2 * math.prod(shape), begin=number * 7919 * 2):
                    file.write(piece)
    new.rename(out / "model.safetensors")
    return sum(math.prod(shape) for _, shape in tensors)


def _bfloat16(numbers: numpy.ndarray) -> memoryview:
    return memoryview((numbers.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes())


def _pieces(block: memoryview, size: int, begin: int) -> Iterator[memoryview]:
    """So many bytes of an endless row of the block."""
    at = begin % len(block)
    while size:
        piece = block[at : at + size]
        yield piece
        size -= len(piece)
        at = 0


def main() -> int:
    """Write one and tell how large it is."""
    tokenizer, out, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    began = time.monotonic()
    parameters = write(tokenizer, out, size)
    print(f"{out}: {parameters / 1e9:.2f} B parameters in {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
