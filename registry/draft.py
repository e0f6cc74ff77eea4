"""A registration drafted from a model's folder: what its config.json and the sizes of its files say. Loads nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from registry.decode import DecodeError, parse
from registry.registry import Registry
from registry.schema import LLMFamily

CONFIG_LIMIT_BYTES = 4 * 2**20
# Where configurations say how long a context may be; the first that is there.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
# How a configuration names a way of quantizing -> our model_format, and bytes a parameter takes.
FORMATS = {"gptq": ("gptq", 0.5), "awq": ("awq", 0.5), "fp8": ("fp8", 1.0), "bitsandbytes": ("bnb", 0.5)}
UNQUANTIZED = ("pytorch", 2.0)
ABILITIES = ("generate", "chat")


def draft(folder: Path, model_family: str, registry: Registry) -> dict[str, Any]:
    """A language model's registration, for somebody to look over and register.

    Args:
        folder: has config.json and the weights.
        model_family: a family of the catalogue, which lends abilities and languages; or any text.
    Raises:
        ValueError: there is no config.json, or it is not one of a language model.
    """
    config = _config(folder)
    text = config.get("text_config")
    of_text = {**config, **text} if isinstance(text, Mapping) else config
    architectures = [one for one in config.get("architectures") or () if isinstance(one, str)]
    if not architectures:
        raise ValueError(f"{folder}/config.json names no architectures, so it is not that of a model.")
    family = registry.find(model_family, "LLM")
    known = family if isinstance(family, LLMFamily) else None
    model_format, quantization, parameter_bytes = _format(config)
    weights_bytes = sum(file.stat().st_size for file in _weights(folder))
    return {
        "version": 2,
        "model_name": re.sub(r"[+\\/?%#&=\s]+", "-", folder.name).strip("-.") or "model",
        "model_lang": list(known.model_lang) if known else ["en"],
        "model_ability": list(known.abilities) if known else _abilities(folder),
        "model_description": "",
        "model_family": model_family,
        "context_length": next((of_text[f] for f in CONTEXT_FIELDS if isinstance(of_text.get(f), int)), 2048),
        "architectures": architectures,
        "model_specs": [
            {
                "model_format": model_format,
                "model_size_in_billions": _size_text(weights_bytes / parameter_bytes / 1e9),
                "quantization": quantization,
                "model_hub": "huggingface",
                "model_uri": str(folder),
            }
        ],
    }


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_LIMIT_BYTES + 1)
    except OSError as exc:
        raise ValueError(f"{path} cannot be read: {exc.strerror or exc}.") from exc
    try:
        config = parse(content, CONFIG_LIMIT_BYTES)
    except DecodeError as exc:
        raise ValueError(f"{path} is damaged: {exc}") from exc
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object.")
    return config


def _format(config: Mapping[str, Any]) -> tuple[str, str, float]:
    """model_format, quantization, and the bytes that a parameter takes."""
    how = config.get("quantization_config")
    if not isinstance(how, Mapping) or str(how.get("quant_method")).lower() not in FORMATS:
        return UNQUANTIZED[0], "none", UNQUANTIZED[1]
    model_format, parameter_bytes = FORMATS[str(how["quant_method"]).lower()]
    bits = how.get("bits") or how.get("w_bit") or (8 if how.get("load_in_8bit") or model_format == "fp8" else 4)
    quantization = "fp8" if model_format == "fp8" else f"{bits}bit" if model_format == "bnb" else f"Int{bits}"
    return model_format, quantization, bits / 8 if isinstance(bits, int) else parameter_bytes


def _weights(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]


def _abilities(folder: Path) -> list[str]:
    """Chat if a chat template comes with the files."""
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return [*ABILITIES]
    try:
        text = (folder / "tokenizer_config.json").read_text(errors="replace")[:CONFIG_LIMIT_BYTES]
    except OSError:
        text = ""
    return [*ABILITIES] if '"chat_template"' in text else ["generate"]


def _size_text(billions: float) -> int | str:
    """As registrations write sizes: whole numbers from 1 on, else such as 0_5."""
    rounded = round(billions, 1)
    if rounded >= 10 or rounded == int(rounded) >= 1:
        return round(billions)
    return f"{rounded if rounded else round(billions, 3)}".replace(".", "_") if billions else 1
