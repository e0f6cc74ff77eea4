"""One JSON of each type, as users write them: every key there, what is not used null."""

from __future__ import annotations

import copy
from typing import Any

VIRTUALENV = {
    "packages": [],
    "inherit_pip_config": True,
    "index_url": None,
    "extra_index_url": None,
    "find_links": None,
    "trusted_host": None,
    "no_build_isolation": None,
}
SOURCE = {"model_id": None, "model_revision": None, "model_hub": "huggingface"}

TEMPLATES: dict[str, dict[str, Any]] = {
    "LLM": {
        "version": 2,
        "context_length": 32768,
        "model_name": "custom-qwen-2.5",
        "model_lang": ["en", "zh"],
        "model_ability": ["generate"],
        "model_description": "A custom model.",
        "model_family": "my-custom-qwen-2.5",
        "model_specs": [
            {
                "model_format": "pytorch",
                "model_size_in_billions": "0_5",
                "quantization": "none",
                **SOURCE,
                "model_uri": "file:///path/to/models--Qwen--Qwen2.5-0.5B",
                "activated_size_in_billions": None,
            }
        ],
        "chat_template": None,
        "stop_token_ids": None,
        "stop": None,
        "reasoning_start_tag": None,
        "reasoning_end_tag": None,
        "cache_config": None,
        "virtualenv": VIRTUALENV,
        "is_builtin": False,
    },
    "embedding": {
        "version": 2,
        "model_name": "my-bge-large-zh-v1.5",
        "dimensions": 1024,
        "max_tokens": 512,
        "language": ["zh"],
        "model_specs": [
            {
                "model_format": "pytorch",
                **SOURCE,
                "model_uri": "file:///path/to/my-bge-large-zh-v1.5",
                "quantization": "none",
            }
        ],
        "cache_config": None,
        "virtualenv": VIRTUALENV,
        "is_builtin": False,
    },
    "rerank": {
        "version": 2,
        "model_name": "my-bge-reranker-base",
        "model_specs": [
            {
                "model_format": "pytorch",
                **SOURCE,
                "model_uri": "file:///path/to/my-bge-reranker-base",
                "quantization": "none",
            }
        ],
        "language": ["en", "zh"],
        "type": "unknown",
        "max_tokens": 512,
        "virtualenv": VIRTUALENV,
        "is_builtin": False,
    },
    "image": {
        "model_name": "my-qwen-image",
        **SOURCE,
        "cache_config": None,
        "version": 2,
        "model_family": "stable_diffusion",
        "model_ability": None,
        "controlnet": [],
        "default_model_config": {},
        "default_generate_config": {},
        "gguf_model_id": None,
        "gguf_quantizations": None,
        "gguf_model_file_name_template": None,
        "lightning_model_id": None,
        "lightning_versions": None,
        "lightning_model_file_name_template": None,
        "virtualenv": VIRTUALENV,
        "model_uri": "file:///path/to/my-qwen-image",
        "is_builtin": False,
    },
    "audio": {
        "model_name": "my-ChatTTS",
        **SOURCE,
        "cache_config": None,
        "version": 2,
        "model_family": "ChatTTS",
        "multilingual": False,
        "language": None,
        "model_ability": ["text2audio"],
        "default_model_config": None,
        "default_transcription_config": None,
        "engine": None,
        "virtualenv": VIRTUALENV,
        "model_uri": "file:///path/to/my-ChatTTS",
        "is_builtin": False,
    },
    "flexible": {
        "model_name": "my-flexible-model",
        **SOURCE,
        "cache_config": None,
        "version": 2,
        "model_description": "A model of another kind.",
        "model_uri": "file:///path/to/my-flexible-model",
        "launcher": "xinference.model.flexible.launchers.transformers",
        "launcher_args": "{}",
        "virtualenv": VIRTUALENV,
        "is_builtin": False,
    },
}


def template(model_type: str, uri: str | None = None, **changes: Any) -> dict[str, Any]:
    """The template of a type, with its files at `uri` and these changes."""
    data = copy.deepcopy(TEMPLATES[model_type])
    (data["model_specs"][0] if "model_specs" in data else data)["model_uri"] = uri
    return data | changes


def with_spec(model_type: str, **changes: Any) -> dict[str, Any]:
    """The template of a type, with changes to its one spec."""
    data = template(model_type)
    data["model_specs"][0] |= changes
    return data
