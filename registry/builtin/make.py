"""Writes the catalogue from a file of facts: `python -P -m registry.builtin.make registry/builtin/facts.json`.

Facts are a JSON object with `models`, a list. Each has a type, a name, and keys that FAMILY_KEYS renames to those
of a family; each of its specs has keys that SPEC_KEYS renames, and `hubs`, by name, with keys that HUB_KEYS
renames. Other keys (`engines`: what is known to run it) are left out. So is the type `world`: nothing here serves
it.

Everything is decoded before anything is written.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from registry.catalogue import CATALOGUE, read
from registry.decode import DecodeError

LEFT_OUT = frozenset({"world"})

# The first of a spec's quantizations is taken by default. The smallest, which facts often have first, answer badly.
DEFAULT_QUANTIZATIONS = ("q4_k_m", "ud-q4_k_xl", "q4_k_s", "q4_0", "q4_1", "mxfp4", "q5_k_m", "q8_0")

FAMILY_KEYS = {
    "name": "model_name",
    "description": "model_description",
    "family": "model_family",
    "abilities": "model_ability",
    "context_length": "context_length",
    "dimensions": "dimensions",
    "max_tokens": "max_tokens",
    "rerank_type": "type",
    "multilingual": "multilingual",
    "architectures": "architectures",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "tool_parser": "tool_parser",
    "has_chat_template": "has_chat_template",
}
SPEC_KEYS = {
    "format": "model_format",
    "size_in_billions": "model_size_in_billions",
    "activated_size_in_billions": "activated_size_in_billions",
    "engine": "engine",
}
HUB_KEYS = {
    "model_id": "model_id",
    "revision": "model_revision",
    "quantizations": "quantizations",
    "file_name_template": "model_file_name_template",
    "file_name_split_template": "model_file_name_split_template",
    "quantization_parts": "quantization_parts",
} | {
    key: key
    for key in (
        *("draft_model_id", "draft_quantizations", "draft_model_file_name_template"),
        *("gguf_model_id", "gguf_quantizations", "gguf_model_file_name_template"),
        *("lightning_model_id", "lightning_versions", "lightning_model_file_name_template"),
        "text_encoder_model_id",
    )
}


def make(facts: Path, folder: Path) -> Counter[str]:
    """Write the catalogue's files to `folder`; how many families of each type.

    Raises:
        DecodeError: a fact does not fit; nothing has been written.
    """
    by_type: dict[str, list[dict[str, Any]]] = {model_type: [] for model_type in CATALOGUE}
    for fact in json.loads(facts.read_bytes())["models"]:
        if fact["type"] not in LEFT_OUT:
            by_type[fact["type"]].append(family_of(fact))
    written = []
    try:
        for model_type, families in by_type.items():
            path = folder / f".{CATALOGUE[model_type]}.new"
            written.append((path, folder / CATALOGUE[model_type]))
            lines = [json.dumps(family, ensure_ascii=False, separators=(",", ":")) for family in families]
            path.write_text(f'{{"{model_type}":[\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
            if len(read(path).get(model_type, {})) != len(families):
                raise DecodeError(f"Two {model_type} models have one name.")
        for path, target in written:
            path.replace(target)
    finally:
        for path, _ in written:
            path.unlink(missing_ok=True)
    return Counter({model_type: len(families) for model_type, families in by_type.items()})


def family_of(fact: dict[str, Any]) -> dict[str, Any]:
    """A family of the catalogue from a fact."""
    model_type = fact["type"]
    family = {new: fact[old] for old, new in FAMILY_KEYS.items() if fact.get(old) not in (None, [])}
    languages = fact.get("languages")
    if languages and model_type == "audio" and isinstance(languages, str):
        family["language"] = languages
    elif languages:
        family["language" if model_type in ("embedding", "rerank") else "model_lang"] = languages
    if tags := fact.get("reasoning_tags"):
        family["reasoning_start_tag"], family["reasoning_end_tag"] = tags
    if controlnets := fact.get("controlnet"):  # all of them are at huggingface
        family["controlnet"] = [{"model_name": name, "model_id": model_id} for name, model_id in controlnets.items()]
    family["model_specs"] = without_repeats(spec_of(spec) for spec in fact["specs"])
    return family


def without_repeats(specs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The specs, without what an earlier one says of the same hub."""
    seen: list[dict[str, Any]] = []
    kept = []
    for spec in specs:
        said = {hub: {**spec, "hubs": {hub: of_hub}} for hub, of_hub in spec["hubs"].items()}
        new = {hub: spec["hubs"][hub] for hub in said if said[hub] not in seen}
        seen += said.values()
        if new:
            kept.append({**spec, "hubs": new})
    return kept


def spec_of(fact: dict[str, Any]) -> dict[str, Any]:
    """A condensed spec from a fact."""
    spec = {new: fact[old] for old, new in SPEC_KEYS.items() if fact.get(old) is not None}
    spec["hubs"] = {}
    for hub, of_hub in fact["hubs"].items():
        own = {new: of_hub[old] for old, new in HUB_KEYS.items() if of_hub.get(old) not in (None, [], {})}
        projectors = of_hub.get("multimodal_projectors")
        if isinstance(projectors, str):
            own["multimodal_projector"] = projectors
        elif projectors:
            own["multimodal_projectors"] = projectors
        if own.get("quantizations") == ["none"]:
            del own["quantizations"]
            if parts := own.get("quantization_parts"):  # files in parts alone are named by their quantizations
                own["quantizations"] = list(parts)
        if "quantizations" in own and spec.get("model_format") == "ggufv2":
            own["quantizations"] = with_default_first(own["quantizations"])
        spec["hubs"][hub] = own
    return spec


def with_default_first(quantizations: list[str]) -> list[str]:
    """The quantizations, led by the one to take where none is wished for."""
    by_name = {name.casefold(): name for name in quantizations}
    default = next((by_name[name] for name in DEFAULT_QUANTIZATIONS if name in by_name), quantizations[0])
    return [default, *(name for name in quantizations if name != default)]


def main(argv: list[str]) -> int:
    """The program."""
    if len(argv) != 1:
        print("usage: python -P -m registry.builtin.make FACTS.json", file=sys.stderr)
        return 2
    counts = make(Path(argv[0]), Path(__file__).parent)
    for model_type, count in counts.items():
        print(f"{model_type}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
