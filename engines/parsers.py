"""How a family writes its tool calls and its thinking, in the words of the engines that read them."""

from __future__ import annotations

from typing import Literal

import msgspec

from registry.schema import LLMFamily, ModelFamily

Reader = Literal["vllm", "sglang"]


class Parsers(msgspec.Struct, frozen=True):
    """The names of one parser in vLLM and in SGLang; empty where an engine has none."""

    vllm: str
    sglang: str


# By the beginning of the family's name; the longest that fits counts. Names as in the catalogue, in lower case.
TOOLS_BY_NAME = {
    "deepseek-v3.2-exp": Parsers("deepseek_v31", "deepseekv31"),
    "glm-4.5": Parsers("glm45", "glm45"),
    "glm-4.6": Parsers("glm45", "glm45"),
    "glm4-0414": Parsers("", ""),
    "gpt-oss": Parsers("openai", "gpt-oss"),
    "internlm3": Parsers("internlm", ""),
    "ling-3": Parsers("ling3", "ling3"),
    "qwen3-coder": Parsers("qwen3_coder", "qwen3_coder"),
    "qwen3.5": Parsers("qwen3_coder", "qwen3_coder"),
    "qwen3.6": Parsers("qwen3_coder", "qwen3_coder"),
    "qwen3.8": Parsers("qwen3_coder", "qwen3_coder"),
    "seed-oss": Parsers("seed_oss", ""),
    "spark-x2.5": Parsers("", "spark25"),
}
# By Xinference's name of the parser, as families give it.
TOOLS = {
    "deepseek-r1": Parsers("deepseek_v3", "deepseekv3"),
    "deepseek-v3": Parsers("deepseek_v3", "deepseekv3"),
    "deepseek-v3.1": Parsers("deepseek_v31", "deepseekv31"),
    "deepseek-v3.2": Parsers("deepseek_v32", "deepseekv32"),
    "deepseek-v4": Parsers("deepseek_v4", "deepseekv4"),
    "deepseek-v4.1": Parsers("deepseek_v41", "deepseekv41"),
    "gemma": Parsers("gemma4", "gemma4"),
    "glm4": Parsers("", ""),  # of GLM-4 of 2024, which neither engine reads
    "glm5": Parsers("glm47", "glm47"),
    "kimi-k3": Parsers("kimi_k3", "kimi_k3"),
    "llama3": Parsers("llama3_json", "llama3"),
    "minicpm5": Parsers("minicpm5", "minicpm5"),
    "minimax": Parsers("minimax_m2", "minimax-m2"),
    "minimax-m3": Parsers("minimax_m3", "minimax-m3"),
    "qwen": Parsers("hermes", "qwen25"),
}
THINKING_BY_NAME = {
    "deepseek-v3": Parsers("deepseek_v3", "deepseek-v3"),
    "deepseek-v4": Parsers("deepseek_v4", "deepseek-v4"),
    "deepseek-v4.1": Parsers("deepseek_v41", "deepseek-v41"),
    "gemma-4": Parsers("gemma4", "gemma4"),
    "glm-4.5": Parsers("glm45", "glm45"),
    "glm-4.6": Parsers("glm45", "glm45"),
    "glm-4.7": Parsers("glm47", "glm45"),
    "glm-5": Parsers("glm47", "glm45"),
    "gpt-oss": Parsers("openai_gptoss", "gpt-oss"),
    "kimi-k3": Parsers("kimi_k3", "kimi_k3"),
    "ling-3": Parsers("ling3", "ling3"),
    "minicpm-v": Parsers("minicpmv", "qwen3"),
    "minimax-m2": Parsers("minimax_m2", "minimax"),
    "minimax-m3": Parsers("minimax_m3", "minimax-m3"),
    "qwen3": Parsers("qwen3", "qwen3"),
    "seed-oss": Parsers("seed_oss", "deepseek-r1"),
}
# Of families that think between <think> and </think>: those that can be told not to, and those that always do.
HYBRID = Parsers("qwen3", "qwen3")
ALWAYS = Parsers("deepseek_r1", "deepseek-r1")


def tool_parser(family: ModelFamily, reader: Reader) -> str | None:
    """The engine's name for what reads the family's tool calls; None if it has none, or the family calls none."""
    if not isinstance(family, LLMFamily) or not (family.tool_parser or "tools" in family.model_ability):
        return None
    by_parser = TOOLS.get((family.tool_parser or "").lower().replace("_", "-"))
    found = _by_name(TOOLS_BY_NAME, family) or by_parser
    name = getattr(found, reader) if found else ""
    return name or None


def reasoning_parser(family: ModelFamily, reader: Reader) -> str | None:
    """The engine's name for what splits the family's thinking off; None if it has none, or the family thinks not."""
    if not isinstance(family, LLMFamily) or not thinks(family):
        return None
    found = _by_name(THINKING_BY_NAME, family)
    if found is None and family.reasoning_start_tag in (None, "<think>"):
        found = HYBRID if "hybrid" in family.model_ability else ALWAYS
    name = getattr(found, reader) if found else ""
    return name or None


def thinks(family: LLMFamily) -> bool:
    """Whether its answers have a part between reasoning tags."""
    return bool(family.reasoning_start_tag or {"reasoning", "hybrid"} & set(family.model_ability))


def _by_name(table: dict[str, Parsers], family: LLMFamily) -> Parsers | None:
    """By the built-in model that the family derives from, else by its own name."""
    for name in (family.model_family, family.model_name):
        fitting = [begin for begin in table if (name or "").lower().startswith(begin)]
        if fitting:
            return table[max(fitting, key=len)]
    return None
