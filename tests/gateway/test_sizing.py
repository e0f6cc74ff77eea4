"""What a launch needs: as it says, as was seen, as its files' headers say, or as sizes that are told."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llms import a_launch, an_artifact
from model_files import F32, gguf

from engines.base import Launch, Needs, Placement
from engines.llama_cpp import LlamaCpp
from engines.remote import Remote
from engines.transformers import Transformers
from gateway.experience import Experience
from gateway.gpus import Gpu
from gateway.placement import Device, NoRoom, place
from gateway.sizing import needs_now, size_up
from registry.memory import CPU_ENGINE_BYTES, GPU_ENGINE_BYTES, Attention, Cache, kv_cache_bytes
from registry.schema import NO_FILES, ModelSpec, Source
from registry.weights import Facts

GB = 10**9
LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 32,
    "llama.context_length": 8192,
    "llama.attention.head_count": 4,
}
NOTHING = Experience()
TWO_GPUS: dict[str, dict[str, Any]] = {
    f"U{index}": {"index": index, "uuid": f"U{index}", "name": "a", "total_bytes": 8 * GB, "used_bytes": 0}
    for index in range(2)
}


class Known(Experience):
    """Earlier runs that took so much."""

    def __init__(self, peak_bytes: int) -> None:
        super().__init__()
        self._peak_bytes = peak_bytes

    def peak_bytes(self, launch: Launch, *, on_gpu: bool = False) -> int | None:
        return self._peak_bytes


def a_spec(billions: float | str | None, quantization: str = "q4_0", **more: Any) -> ModelSpec:
    return ModelSpec(
        model_format="ggufv2",
        quantization=quantization,
        model_size_in_billions=billions,
        model_hub="local",
        model_id="/m",
        **more,
    )


def of_spec(spec: ModelSpec, **fields: Any) -> Launch:
    return a_launch(artifact=msgspec.structs.replace(an_artifact(), spec=spec), **fields)


MILLION = Facts(
    weight_bytes=16 * GB,
    elements={"bf16": 1},
    attention=(Attention(layers=32, key=1024, value=1024),),
    is_attention_known=True,
    width=4096,
    context_length=2**20,
)


def test_a_context_of_a_million_tokens_that_the_launch_leaves_open_may_be_shorter() -> None:
    launch = a_launch()
    asked = Needs(cache_tokens=16384, can_shorten=True, is_elastic=True)

    def size(needs: Needs = asked, launch: Launch = launch, known: Experience = NOTHING) -> Needs:
        return size_up(launch, needs, None, MILLION, [], known, has_gpus=True).needs

    needs = size()
    assert needs.memory_bytes > 150 * GB
    assert list(needs.shorter) == [2**power for power in range(19, 13, -1)]
    assert needs.memory_bytes - needs.shorter[2**19] == 2**19 * 32 * 2048 * 2
    eighty = [Device(key="U0", total_bytes=80 * GB, gpu=Gpu(**TWO_GPUS["U0"]))]
    found = place(needs, eighty, {})
    assert isinstance(found, Placement)
    assert found.context_tokens == 2**18
    assert isinstance(place(msgspec.structs.replace(needs, shorter={}), eighty, {}), NoRoom)
    # Where the launch says how much memory, how large a cache, or the engine fills no shorter one, it is as ever.
    assert size(launch=a_launch(memory_bytes=GB)).shorter == {}
    assert size(msgspec.structs.replace(asked, cache_bytes=GB)).shorter == {}
    assert size(msgspec.structs.replace(asked, can_shorten=False)).shorter == {}
    # What a shorter one took says nothing of the wish.
    not_elastic = msgspec.structs.replace(asked, is_elastic=False)
    assert size(not_elastic, known=Known(GB)).memory_bytes == needs.memory_bytes


async def test_the_headers_tell_the_bytes_of_each_layer(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = {"token_embd.weight": ([500], F32), "blk.0.a": ([1000], F32), "blk.1.a": ([3000], F32)}
    path.write_bytes(gguf(LLAMA, tensors, data=18_000))
    launch = of_spec(a_spec(None), options={"n_ctx": 100, "n_parallel": 1})
    needs = await needs_now(launch, LlamaCpp(), 0, [path], NOTHING, has_gpus=True)
    cache = 100 * 2 * (32 + 32) * 2
    on_gpu, of_ram = needs.splits[1]  # the last one, of the two
    assert list(needs.splits) == [1]
    assert needs.memory_bytes - on_gpu == 4000 + cache // 2
    assert of_ram == 18_000 - 4000 - 12_000 + 4000 + cache // 2 + CPU_ENGINE_BYTES
    assert (await needs_now(launch, LlamaCpp(), 0, [path], NOTHING, has_gpus=False)).splits == {}


async def test_the_headers_of_files_tell(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(LLAMA, {"a": ([1000], F32)}, data=4000))
    launch = of_spec(a_spec(None), options={"n_ctx": 100, "n_parallel": 1})
    needs = await needs_now(launch, LlamaCpp(), 0, [path], NOTHING, has_gpus=False)
    kv_bytes = 100 * 2 * (32 + 32) * 2
    assert needs.memory_bytes == 4000 + kv_bytes + 100 * 32 * 36 + CPU_ENGINE_BYTES
    assert needs.overhead_bytes == CPU_ENGINE_BYTES
    on_gpu = await needs_now(launch, LlamaCpp(), 0, [path], NOTHING, has_gpus=True)
    assert on_gpu.memory_bytes - needs.memory_bytes == GPU_ENGINE_BYTES - CPU_ENGINE_BYTES
    placement = place(needs, [], {})
    assert not isinstance(placement, NoRoom)
    assert placement.cache_bytes == kv_bytes


def sized(launch: Launch, needs: Needs, experience: Experience = NOTHING, **more: Any) -> tuple[int, str]:
    found = size_up(launch, needs, None, None, [], experience, **{"has_gpus": True} | more)
    return found.needs.memory_bytes, found.basis


def test_the_launchs_word_goes_before_what_was_seen_and_that_before_estimates() -> None:
    launch = of_spec(a_spec(7))
    assert sized(launch, Needs())[1].startswith("weights from 7 billion parameters")
    assert sized(launch, Needs(), Known(4 * GB)) == (round(4 * GB * 1.05), "as was seen in earlier runs")
    said = msgspec.structs.replace(launch, memory_bytes=2 * GB)
    assert sized(said, Needs(), Known(4 * GB)) == (2 * GB, "as the launch says (memory)")


def test_what_an_engine_took_that_fills_what_it_gets_tells_nothing() -> None:
    assert sized(of_spec(a_spec(7)), Needs(is_elastic=True), Known(70 * GB)) == sized(of_spec(a_spec(7)), Needs())


def test_nobody_knows_what_has_neither_files_nor_size() -> None:
    unknown: list[str] = []
    found = size_up(of_spec(a_spec(None)), Needs(), None, None, unknown, NOTHING, has_gpus=False)
    assert (found.needs.memory_bytes, found.estimate) == (0, None)
    assert unknown[0].startswith("How much memory it takes: ")


def test_a_cache_has_room_for_so_many_tokens_at_least_in_whole_units() -> None:
    launch = of_spec(a_spec(7))
    plain = size_up(launch, Needs(cache=Cache(tokens=1000)), None, None, [], NOTHING, has_gpus=True)
    many = size_up(launch, Needs(cache=Cache(tokens=1000), cache_tokens=4096), None, None, [], NOTHING, has_gpus=True)
    whole = size_up(
        launch, Needs(cache=Cache(tokens=1000), cache_unit_bytes=2**30), None, None, [], NOTHING, has_gpus=True
    )
    told = size_up(launch, Needs(cache_bytes=5 * GB), None, None, [], NOTHING, has_gpus=True)
    sizes = [one.estimate.kv_cache for one in (plain, many, whole, told) if one.estimate]
    assert sizes == [sizes[0], 4 * sizes[0], 2**30, 5 * GB]


def test_the_cache_of_transformers_batching_is_in_what_it_is_promised() -> None:
    """As was held by one on an H100: 16 layers of 32 heads, 8 of keys and values, for 16 requests at once."""
    attention = Attention(layers=16, key=512, value=512)
    facts = Facts(weight_bytes=2_349_000_000, attention=(attention,), is_attention_known=True, width=2048)
    launch = a_launch(options={"max_num_seqs": 16}, engine="transformers")
    needs = size_up(launch, Transformers().needs(launch), None, facts, [], NOTHING, has_gpus=True).needs
    held_bytes = 4_357_881_856
    assert held_bytes < needs.memory_bytes < 1.1 * held_bytes


def test_a_cache_of_equal_parts_has_no_windows() -> None:
    attention = (Attention(layers=2, key=100, value=100), Attention(layers=2, key=100, value=100, window=10))
    even = Cache(tokens=1000, sequences=3, is_even=True)
    assert kv_cache_bytes(attention, even) == 4 * 1000 * 200 * 2 * 3


def test_lighter_specs_of_the_family_are_known_for_advice() -> None:
    specs = [a_spec(7, "q4_0"), a_spec("0_5", "q8_0"), a_spec(14, "q8_0")]
    needs = size_up(of_spec(a_spec(7, "q8_0")), Needs(), None, None, [], NOTHING, has_gpus=False, specs=specs).needs
    assert list(needs.lighter) == ["7B q4_0", "0_5B q8_0"]
    found = place(needs, [Device(key="ram", total_bytes=needs.lighter["7B q4_0"])], {})
    assert isinstance(found, NoRoom)
    assert "Take another spec of the family: 7B q4_0 or 0_5B q8_0." in found.remedies


async def test_what_is_served_elsewhere_takes_nothing_here() -> None:
    source = Source(model_hub=NO_FILES, model_id="x")
    artifact = msgspec.structs.replace(an_artifact(), spec=a_spec(72), source=source)
    launch = a_launch({"url": "http://127.0.0.1:1/v1"}, artifact=artifact)
    needs = await needs_now(launch, Remote(), 0, [Path()], NOTHING, has_gpus=True)
    assert (needs.memory_bytes, needs.n_gpu) == (0, 0)


def test_what_picks_its_gpus_by_itself_is_not_held_to_one_by_an_estimate() -> None:
    needs = Needs(chooses=True)
    gpus = [Device(key=name, total_bytes=8 * GB, gpu=Gpu(**gpu)) for name, gpu in TWO_GPUS.items()]

    def asked(launch: Launch) -> Needs:
        return size_up(launch, needs, None, None, [], Known(9 * GB), has_gpus=True).needs

    assert place(asked(of_spec(a_spec(14))), gpus, {}) == Placement()
    said = place(asked(of_spec(a_spec(14), memory_bytes=GB)), gpus, {})
    assert isinstance(said, Placement)
    assert said.memory == {"U0": GB}
    assert size_up(of_spec(a_spec(14)), needs, None, None, [], NOTHING, has_gpus=False).needs.memory_bytes > 7 * GB


async def test_what_is_loaded_beside_the_model_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(LLAMA, {"a": ([1000], F32)}, data=4000))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, size in (("draft.gguf", 500), ("mmproj.gguf", 70), ("adapter/a.safetensors", 9)):
        (tmp_path / name).write_bytes(b"x" * size)
    lora = [{"lora_name": "a", "local_path": str(adapter)}, {"lora_name": "b", "local_path": "/nowhere"}]
    options = {"n_ctx": 100, "n_parallel": 1}
    plain = await needs_now(of_spec(a_spec(None), options=options), LlamaCpp(), 0, [path], NOTHING, has_gpus=False)
    launch = of_spec(a_spec(None), options=options | {"model_draft": str(tmp_path / "draft.gguf"), "lora_list": lora})
    launch = msgspec.structs.replace(
        launch, artifact=msgspec.structs.replace(launch.artifact, projector="sub/mmproj.gguf")
    )
    more = await needs_now(launch, LlamaCpp(), 0, [path], NOTHING, has_gpus=False)
    assert more.memory_bytes - plain.memory_bytes == 579


@pytest.mark.parametrize(
    ("needs", "options", "tokens", "sequences"),
    [
        (Needs(), {}, 4096, 1),  # it grows as it is used
        (Needs(), {"context_length": 6000}, 6000, 1),
        (Needs(cache_tokens=16384), {}, 8192, 2),  # it is set up at the start, for the longest request
        (Needs(cache_tokens=4000), {}, 8192, 1),
        (Needs(cache=Cache(tokens=300, sequences=4)), {}, 300, 4),
    ],
)
def test_a_cache_is_as_long_as_the_engine_has_it(
    needs: Needs, options: dict[str, Any], tokens: int, sequences: int
) -> None:
    facts = Facts(weight_bytes=GB, context_length=8192)
    found = size_up(of_spec(a_spec(1), options=options), needs, None, facts, [], NOTHING, has_gpus=True).needs.cache
    assert found
    assert (found.tokens, found.sequences) == (tokens, sequences)


MAKES_A_POOL = """
import gc, os, sys, types
sys.modules["engines"] = package = types.ModuleType("engines")  # ours as workers have it: without the gateway's needs
package.__path__ = [sys.argv[1]]
from transformers import AutoModelForCausalLM, LlamaConfig
from engines.workers.generators import Together
sizes = dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
config = LlamaConfig(hidden_size=64, intermediate_size=64, vocab_size=100, **sizes)
model = AutoModelForCausalLM.from_config(config, dtype="bfloat16").eval()
Together(model, cache_tokens=4000, batch_tokens=64, most_lines=8)
(cache,) = [one for one in gc.get_objects() if type(one).__name__ == "PagedAttentionCache"]
tensors = [cache.cache_tensor] if hasattr(cache, "cache_tensor") else [*cache.key_cache, *cache.value_cache]
print(sum(one.numel() * one.element_size() for one in tensors), flush=True)

os._exit(0)
"""


@pytest.mark.engine
def test_the_library_makes_its_pool_as_large_as_is_reckoned(torch_python: str) -> None:
    made = subprocess.run(
        [torch_python, "-P", "-c", MAKES_A_POOL, str(Path(__file__).parents[2] / "engines")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    reckoned = kv_cache_bytes((Attention(layers=3, key=32, value=32),), Cache(tokens=1000, sequences=4, is_even=True))
    assert reckoned <= int(made.stdout) < 1.05 * reckoned
