"""Older and foreign forms of a model's JSON, turned into today's. The only file that knows them.

The forms: version 1 (`quantizations` lists, `prompt_style`), the flat embedding and rerank JSON that had its
source beside its name, other spellings of formats and hubs, and text where a list or an object belongs.
Whatever is not recognized stays as it is, for the decoder to judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

# today's spelling -> others
FORMATS = {
    "ggufv2": ("gguf", "ggufv3", "gguf_v2"),
    "pytorch": ("torch", "safetensors", "hf", "transformers"),
    "gptq": (),
    "awq": (),
    "fp4": (),
    "fp8": (),
    "bnb": ("bitsandbytes",),
    "mlx": (),
}
HUBS = {
    "huggingface": ("hf", "hugging_face", "hugging-face"),
    "modelscope": ("ms",),
    "openmind_hub": ("openmind",),
    "csghub": ("csg",),
    "pypi": (),
}

# What version 1 called quantizations of PyTorch weights was how to load them, not which files.
LOAD_TIME_QUANTIZATIONS = frozenset({"4-bit", "8-bit", "4bit", "8bit", "none"})

# Beside the name in flat forms; today in a spec.
FLAT_SOURCE = (
    *("model_format", "quantization", "quantizations", "model_hub", "model_id", "model_uri", "model_revision"),
    "model_file_name_template",
)

LISTS: dict[str, tuple[str, ...]] = {
    "LLM": ("model_lang", "model_ability", "stop", "stop_token_ids", "architectures"),
    "embedding": ("language", "model_ability"),
    "rerank": ("language", "model_ability"),
    "image": ("model_ability", "controlnet", "gguf_quantizations", "lightning_versions"),
    "audio": ("model_ability", "model_lang"),
    "video": ("model_ability",),
    "flexible": (),
}

Data = dict[str, Any]
Said = list[str]


def lift(model_type: str, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The data in today's form, and a sentence for each thing that was changed. The argument stays as it is."""
    lifted: Data = dict(data)
    said: Said = []
    _lift_lists(lifted, said, LISTS.get(model_type, ()))
    for step in STEPS.get(model_type, ()):
        step(lifted, said)
    _lift_cache_config(lifted, said)
    _lift_virtualenv(lifted, said)
    return lifted, said


# -- versions


def _lift_version(data: Data, said: Said) -> None:
    if data.get("version") is None:
        data["version"] = 2
    elif _is_one(data["version"]):
        data["version"] = 2
        said.append("version 1 was read as version 2.")


def _is_one(version: object) -> bool:
    return version is not True and version in (1, "1")


# -- specs


def _lift_flat_source(data: Data, said: Said) -> None:
    """A source beside the name, and no model_specs, is the one spec."""
    if data.get("model_specs") is not None:
        return
    own = {key: data.pop(key) for key in FLAT_SOURCE if key in data}
    data.pop("model_specs", None)
    if not (own.get("model_id") or own.get("model_uri")):
        data.update(own)
        return
    spec: Data = {"model_format": "pytorch", "quantization": "none"}
    if str(own.get("model_uri") or "").lower().endswith(".gguf"):
        spec["model_format"] = "ggufv2"
    data["model_specs"] = [spec | {key: value for key, value in own.items() if value is not None}]
    said.append(f"{_listing(own)} beside the name became the one item of model_specs.")


def _lift_specs(data: Data, said: Said) -> None:
    specs = data.get("model_specs")
    if isinstance(specs, Mapping):
        specs = [specs]
        said.append("model_specs became a list of one.")
    if not isinstance(specs, list | tuple):
        return
    lifted: list[Any] = []
    for index, spec in enumerate(specs):
        if not isinstance(spec, Mapping):
            lifted.append(spec)
            continue
        path = f"model_specs[{index}]"
        spec = dict(spec)
        _lift_word(spec, "model_format", FORMATS, said, path)
        _lift_word(spec, "model_hub", HUBS, said, path)
        for key in ("model_size_in_billions", "activated_size_in_billions"):
            _lift_size(spec, key, said, path)
        lifted += _lift_quantizations(spec, said, path)
    data["model_specs"] = lifted


def _lift_word(spec: Data, key: str, words: Mapping[str, tuple[str, ...]], said: Said, path: str = "") -> None:
    word = spec.get(key)
    if not isinstance(word, str) or word in words:
        return
    folded = word.strip().casefold()
    for today, others in words.items():
        if folded == today or folded in others:
            spec[key] = today
            said.append(f"{path + '.' if path else ''}{key} {word!r} was read as {today!r}.")
            return


_SIZE = re.compile(r"(\d{1,9})(?:[._](\d{1,9}))?\s*[bB]?")


def _lift_size(spec: Data, key: str, said: Said, path: str) -> None:
    """Sizes are whole numbers, or text with `_` for the point."""
    size = spec.get(key)
    if isinstance(size, bool) or not isinstance(size, int | float | str):
        return
    text = repr(size) if isinstance(size, float) else str(size).strip()
    if not (found := _SIZE.fullmatch(text)):
        return
    fraction = (found[2] or "").rstrip("0") if "_" not in text else (found[2] or "")
    lifted: int | str = f"{int(found[1])}_{fraction}" if fraction else int(found[1])
    if lifted != size:
        spec[key] = lifted
        # "7" for 7 is as usual as 7 itself, and not worth a word.
        if str(lifted) != text:
            said.append(f"{path}.{key} {size!r} was read as {lifted!r}.")


def _lift_quantizations(spec: Data, said: Said, path: str) -> list[Data]:
    """One spec for each of `quantizations`."""
    listed = spec.pop("quantizations", None)
    if spec.get("quantization") is not None:
        return [spec]
    spec.pop("quantization", None)
    if isinstance(listed, str):
        listed = [listed]
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(one, str) for one in listed):
        chosen = _quantization_of_file(spec)
        if chosen is not None:
            spec["quantization"] = chosen
            said.append(f"{path} has no quantization: it is {chosen!r} by the name of its file.")
        elif spec.get("model_format") is not None:
            said.append(f"{path} has no quantization: 'none' was taken.")
        return [spec]
    if spec.get("model_format") == "pytorch" and {one.casefold() for one in listed} <= LOAD_TIME_QUANTIZATIONS:
        if list(listed) != ["none"]:
            said.append(
                f"{path}.quantizations {_listing(listed)} became quantization 'none': PyTorch weights are "
                "quantized when they are loaded, by an option of the engine."
            )
        return [spec | {"quantization": "none"}]
    chosen = _quantization_of_file(spec)
    if chosen is not None:
        listed = [one for one in listed if one.casefold() == chosen.casefold()] or listed[:1]
    if len(listed) == 1:
        said.append(f"{path}.quantizations became quantization {listed[0]!r}.")
    else:
        said.append(f"{path}.quantizations became {len(listed)} specs: {_listing(listed)}.")
    return [spec | {"quantization": one} for one in listed]


_QUANTIZATION = re.compile(r"(?:^|[-._])(I?Q[1-9](?:_[A-Z0-9]+)*|BF16|FP?16|FP?32)(?=[-.])", re.IGNORECASE)


def _quantization_of_file(spec: Data) -> str | None:
    """That of the one file that model_uri names, if it is a GGUF file."""
    uri = spec.get("model_uri")
    if not isinstance(uri, str) or not uri.lower().endswith(".gguf"):
        return None
    found = _QUANTIZATION.findall(uri.rpartition("/")[2])
    return str(found[-1]) if found else "none"


# -- language models


def _lift_prompt_style(data: Data, said: Said) -> None:
    """Stops were part of `prompt_style`; the rest of it means nothing today, and is kept as it is."""
    style = data.get("prompt_style")
    if not isinstance(style, Mapping):
        return
    taken = [key for key in ("stop", "stop_token_ids") if style.get(key) and data.get(key) is None]
    for key in taken:
        data[key] = style[key] if isinstance(style[key], list | tuple) else [style[key]]
    if taken:
        said.append(f"{_listing(taken)} came out of prompt_style; the rest of it is kept but not used.")
    else:
        said.append("prompt_style is kept but not used: chats follow chat_template or the model's own template.")


def _lift_chat_template(data: Data, said: Said) -> None:
    """Where a family had no template, its name was stored in place of one."""
    template = data.get("chat_template")
    if isinstance(template, str) and (template == data.get("model_family") or not template.strip()):
        data["chat_template"] = None
        said.append("chat_template held no template: that of model_family or of the model's files is used.")


# -- embedding, rerank


def _lift_short_abilities(prefix: str) -> Callable[[Data, Said], None]:
    def step(data: Data, said: Said) -> None:
        abilities = data.get("model_ability")
        if not isinstance(abilities, list | tuple):
            return
        lifted = [f"{prefix}_{one}" if one in ("vision", "video", "audio") else one for one in abilities]
        if lifted != list(abilities):
            data["model_ability"] = lifted
            said.append(f"model_ability {_listing(abilities)} was read as {_listing(lifted)}.")

    return step


# -- audio, flexible


def _lift_audio_language(data: Data, said: Said) -> None:
    if isinstance(data.get("language"), list | tuple):
        languages = data.pop("language")
        if data.get("model_lang") is None:
            data["model_lang"] = languages
        said.append("language, a list, became model_lang.")


def _lift_launcher_args(data: Data, said: Said) -> None:
    if isinstance(data.get("launcher_args"), Mapping):
        data["launcher_args"] = json.dumps(data["launcher_args"], ensure_ascii=False)
        said.append("launcher_args, an object, became its JSON text.")


def _lift_flat_hub(data: Data, said: Said) -> None:
    _lift_word(data, "model_hub", HUBS, said)


# -- all types


def _lift_lists(data: Data, said: Said, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = data.get(key)
        if isinstance(value, str | Mapping) or (isinstance(value, int) and not isinstance(value, bool)):
            data[key] = [value]
            said.append(f"{key} became a list of one.")


def _lift_cache_config(data: Data, said: Said) -> None:
    text = data.get("cache_config")
    if not isinstance(text, str):
        return
    if not text.strip():
        data["cache_config"] = None
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict):
        data["cache_config"] = value
        said.append("cache_config, a text, was read as the object that it holds.")


def _lift_virtualenv(data: Data, said: Said) -> None:
    value = data.get("virtualenv")
    if isinstance(value, list | tuple):
        data["virtualenv"] = {"packages": list(value)}
        said.append("virtualenv, a list, was read as its packages.")


def _listing(words: Any) -> str:
    words = [str(word)[:100] for word in words]
    return ", ".join(words[:10]) + (", ..." if len(words) > 10 else "")


STEPS: dict[str, tuple[Callable[[Data, Said], None], ...]] = {
    "LLM": (_lift_version, _lift_specs, _lift_prompt_style, _lift_chat_template),
    "embedding": (_lift_version, _lift_flat_source, _lift_specs, _lift_short_abilities("embed")),
    "rerank": (_lift_version, _lift_flat_source, _lift_specs, _lift_short_abilities("rerank")),
    "image": (_lift_version, _lift_flat_hub),
    "audio": (_lift_version, _lift_flat_hub, _lift_audio_language),
    "video": (_lift_version, _lift_flat_hub),
    "flexible": (_lift_flat_hub, _lift_launcher_args),
}
