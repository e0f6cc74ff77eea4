"""What a model's own files say, and that no file can make the reader fail."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from model_files import F32, Q8_0, gguf, llama_folder, safetensors

from registry.gguf import MAX_KEYS, Damaged
from registry.gguf import read_header as read_gguf
from registry.memory import Attention, Cache, kv_cache_bytes
from registry.weights import Facts, read

BASE = {
    "general.architecture": "llama",
    "general.file_type": 7,
    "llama.block_count": 3,
    "llama.embedding_length": 32,
    "llama.context_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}


def facts_of(tmp_path: Path, metadata: dict[str, Any], **options: Any) -> Facts:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(metadata, **options))
    return read(path)


# --- GGUF


@pytest.mark.engine
def test_a_real_gguf_file_tells_its_shape(smollm2_gguf: Path) -> None:
    facts = read(smollm2_gguf)
    assert (facts.kind, facts.architecture, facts.quantization) == ("gguf", "llama", "Q4_1")
    assert (facts.layers, facts.width, facts.context_length, facts.vocabulary) == (30, 576, 8192, 49152)
    assert facts.parameters == 134_515_008
    assert facts.has_chat_template is True
    assert facts.problems == ()
    header_bytes = smollm2_gguf.stat().st_size - (facts.weight_bytes or 0)
    assert 0 < header_bytes < 3_000_000  # the vocabulary and the template
    # 3 heads of 64 in 30 layers, keys and values, of 2 bytes; what its engine's memory grows by with each token
    assert kv_cache_bytes(facts.attention, Cache(tokens=1)) == 30 * 3 * 64 * 2 * 2


def test_tensors_are_counted_in_elements_and_bytes(tmp_path: Path) -> None:
    tensors = {"a": ([32, 4], Q8_0), "b": ([7], F32)}
    facts = facts_of(tmp_path, BASE, tensors=tensors, data=4 * 34 + 28)
    assert (facts.parameters, facts.weight_bytes) == (135, 4 * 34 + 28)
    assert facts.elements == {"Q8_0": 128, "F32": 7}
    assert (facts.quantization, facts.problems) == ("Q8_0", ())


def test_a_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, BASE, tensors={"a": ([32, 4], Q8_0)}, data=10)
    (problem,) = facts.problems
    assert problem.startswith("model.gguf is no whole GGUF file: its tensors end at byte")


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({}, (Attention(layers=3, key=16, value=16),)),
        (
            {"llama.attention.key_length": 10, "llama.attention.value_length": 20},
            (Attention(layers=3, key=20, value=40),),
        ),
        ({"llama.attention.head_count_kv": [2, 0, 2]}, (Attention(layers=2, key=16, value=16),)),
        (
            {"llama.attention.kv_lora_rank": 50, "llama.rope.dimension_count": 6},
            (Attention(layers=3, key=56, value=0),),
        ),
        (
            {"llama.attention.sliding_window": 64, "llama.attention.sliding_window_pattern": [True, True, False]},
            (Attention(layers=2, key=16, value=16, window=64), Attention(layers=1, key=16, value=16)),
        ),
        # Nobody says which layers have it: all keep everything, which is the most that it can be.
        ({"llama.attention.sliding_window": 64}, (Attention(layers=3, key=16, value=16),)),
    ],
)
def test_what_each_layer_keeps(changes: dict[str, Any], attention: tuple[Attention, ...], tmp_path: Path) -> None:
    assert facts_of(tmp_path, BASE | changes).attention == attention


def test_an_architecture_whose_windows_are_known(tmp_path: Path) -> None:
    named = {key.replace("llama", "gemma2"): value for key, value in BASE.items()}
    facts = facts_of(tmp_path, named | {"general.architecture": "gemma2", "gemma2.attention.sliding_window": 64})
    assert {(part.layers, part.window) for part in facts.attention} == {(2, 64), (1, None)}


def test_an_encoder_keeps_nothing(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, BASE | {"llama.attention.causal": False})
    assert (facts.attention, facts.is_attention_known, facts.is_encoder) == ((), True, True)


def test_the_parts_of_a_split_model_are_one(tmp_path: Path) -> None:
    for number in (1, 2):
        path = tmp_path / f"m-0000{number}-of-00002.gguf"
        path.write_bytes(gguf(BASE if number == 1 else {}, {"a": ([8], F32)}, data=32))
    facts = read(tmp_path / "m-00001-of-00002.gguf")
    assert (facts.parameters, len(facts.files), facts.layers) == (16, 2, 3)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    assert "1 of the model's 2 parts are missing" in read(tmp_path / "m-00001-of-00002.gguf").problems[0]


def test_files_of_the_other_byte_order_are_read(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    key = b"general.architecture"
    text = struct.pack(">Q", len(key)) + key + struct.pack(">IQ", 8, 5) + b"llama"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + text)
    assert read(path).architecture == "llama"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends within its header"),
        (b"PK\x03\x04" + bytes(100), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<I", 77), "its version is 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, MAX_KEYS + 1), f"it has {MAX_KEYS + 1} keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "a text in it has"),
        (gguf({"a": "b"})[:-20], "ends within its header"),
        (gguf({}, {"a": ([2**40, 2**40], F32)}), "elements"),
    ],
)
def test_a_damaged_header_is_a_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(Damaged, match=words):
        read_gguf(path)
    assert words in read(path).problems[0]


# --- folders


def test_a_folder_of_safetensors_tells_its_shape(tmp_path: Path) -> None:
    facts = read(llama_folder(tmp_path))
    assert (facts.kind, facts.parameters, facts.weight_bytes) == ("safetensors", 6400, 12800)
    assert facts.attention == (Attention(layers=4, key=16, value=16),)
    assert (facts.context_length, facts.dtype, facts.architectures) == (1024, "bfloat16", ("LlamaForCausalLM",))
    assert (facts.has_chat_template, facts.has_vision, facts.problems) == (False, False, ())


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        ({"head_dim": 32}, (Attention(layers=4, key=64, value=64),)),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, (Attention(layers=4, key=576, value=0),)),
        ({"sliding_window": 128, "use_sliding_window": False}, (Attention(layers=4, key=16, value=16),)),
        ({"sliding_window": 128, "model_type": "mistral"}, (Attention(layers=4, key=16, value=16, window=128),)),
        (
            {"sliding_window": 128, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
            (Attention(layers=3, key=16, value=16, window=128), Attention(layers=1, key=16, value=16)),
        ),
        (
            {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
            (Attention(layers=1, key=16, value=16),),
        ),
    ],
)
def test_config_tells_what_each_layer_keeps(
    config: dict[str, Any], attention: tuple[Attention, ...], tmp_path: Path
) -> None:
    assert read(llama_folder(tmp_path, **config)).attention == attention


def test_a_model_for_pictures_has_its_text_part_nested(tmp_path: Path) -> None:
    config = {"model_type": "llava", "architectures": ["Llava"], "vision_config": {"hidden_size": 7}}
    nested = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    folder = llama_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps(config | {"text_config": nested}))
    facts = read(folder)
    assert (facts.has_vision, facts.architecture, facts.width) == (True, "llava", 32)
    assert facts.attention == (Attention(layers=2, key=32, value=32),)


@pytest.mark.parametrize(
    ("config", "method", "quantization"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq", "gptq, 4 bits"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes",
            "bitsandbytes, 4 bits",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8", "fp8"),
        ({"quantization": {"bits": 8, "group_size": 64}}, "mlx", "mlx, 8 bits"),
    ],
)
def test_quantizations_are_told(config: dict[str, Any], method: str, quantization: str, tmp_path: Path) -> None:
    facts = read(llama_folder(tmp_path, **config))
    assert (facts.quantization_method, facts.quantization, facts.parameters) == (method, quantization, None)


def test_an_index_names_the_files_that_are_missing(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    names = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "1 files that model.safetensors.index.json names are missing" in read(folder).problems[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert "which is no file beside it" in read(folder).problems[0]


def test_a_chat_template_is_found_in_each_of_its_places(tmp_path: Path) -> None:
    in_tokenizer, as_file = llama_folder(tmp_path / "a"), llama_folder(tmp_path / "b")
    (in_tokenizer / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (as_file / "chat_template.jinja").write_text("{{ messages }}")
    assert read(in_tokenizer).has_chat_template
    assert read(as_file).has_chat_template


def test_an_embedding_tells_its_vectors(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path, model_type="bert", architectures=["BertModel"])
    (folder / "modules.json").write_text('[{"path": "1_Pooling"}, {"path": "../.."}, {"path": "2_Dense"}, 7]')
    for place, config in (("1_Pooling", {"word_embedding_dimension": 64}), ("2_Dense", {"out_features": 48})):
        (folder / place).mkdir()
        (folder / place / "config.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    facts = read(folder)
    assert (facts.dimensions, facts.max_tokens, facts.is_encoder, facts.attention) == (48, 256, True, ())


def test_a_folder_of_several_ggufs_needs_a_word_on_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        (tmp_path / name).write_bytes(gguf(BASE))
    assert "The folder has 2 GGUF files" in read(tmp_path).problems[0]
    (tmp_path / "b.gguf").unlink()
    assert read(tmp_path).layers == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends within its header"),
        (struct.pack("<Q", 2**63) + b"{}", "ends within its header"),
        (struct.pack("<Q", 5) + b"[[[[[", "cannot be read"),
        (safetensors({"a": ("F32", [4], 4)})[:-1], "its tensors end at byte"),
        (safetensors({"a": ("F32", [-4], -4)}), "no sensible place"),
    ],
)
def test_damaged_safetensors_are_a_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    facts = read(folder)
    assert words in facts.problems[0]
    assert (facts.weight_bytes, facts.layers) == (len(content), 4)  # what is known all the same


# --- nothing makes it fail


def mangled(whole: bytes) -> st.SearchStrategy[bytes]:
    """The file cut, with bytes changed, or with others in its place."""

    def change(positions: list[tuple[int, int]], end: int) -> bytes:
        content = bytearray(whole)
        for position, value in positions:
            content[position % len(content)] = value
        return bytes(content[: end % (len(content) + 1)])

    places = st.tuples(st.integers(0, len(whole)), st.integers(0, 255))
    return st.builds(change, st.lists(places, max_size=6), st.integers(0, 2 * len(whole))) | st.binary(max_size=200)


WHOLE_GGUF = gguf(BASE | {"l": [1, 2], "t": ["a", "b"], "n": [[1], [2]]}, {"a": ([32], Q8_0)}, data=34)
WHOLE_SAFETENSORS = safetensors({"a": ("F32", [4, 2], 4), "b": ("I64", [1], 8)})
quickly = hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quickly
@given(content=mangled(WHOLE_GGUF))
def test_no_bytes_make_the_gguf_reader_fail(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    facts = read(path)
    assert facts.weight_bytes is not None
    msgspec.json.encode(facts)
    kv_cache_bytes(facts.attention, Cache(tokens=2**31))


@quickly
@given(content=mangled(WHOLE_SAFETENSORS))
def test_no_bytes_make_the_safetensors_reader_fail(content: bytes, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    facts = read(folder)
    assert facts.problems or facts.weight_bytes
    msgspec.json.encode(facts)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bits", "x"]), inner, max_size=2),
    max_leaves=5,
)
KEYS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "kv_lora_rank"),
    *("sliding_window", "sliding_window_pattern", "layer_types", "text_config", "architectures", "model_type"),
    *("quantization_config", "quantization", "max_position_embeddings", "full_attention_interval", "chat_template"),
)


@quickly
@given(config=st.dictionaries(st.sampled_from(KEYS), anything, max_size=6), is_raw=st.booleans(), raw=st.binary())
def test_no_config_makes_the_reader_fail(config: dict[str, Any], is_raw: bool, raw: bytes, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    for name in ("config.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json"):
        (folder / name).write_bytes(raw if is_raw else json.dumps(config).encode())
    facts = read(folder)
    msgspec.json.encode(facts)
    kv_cache_bytes(facts.attention, Cache(tokens=1))
