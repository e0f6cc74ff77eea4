"""What is launched for the integrations: a real language model and a real embedding model."""

from __future__ import annotations

import json
from pathlib import Path

from xinference_client import RESTfulClient

LLM = "smollm2"
EMBEDDING = "smollm2-embedding"


def launch_both(address: str, gguf: Path) -> None:
    """By Xinference's own client: a model of the catalogue, and one that is registered first."""
    client = RESTfulClient(address)
    client.launch_model(
        "smollm2-instruct", model_uid=LLM, model_path=str(gguf), n_threads=1, context_length=1024, n_parallel=2
    )
    spec = {"model_format": "ggufv2", "quantization": "Q4_1", "model_uri": f"file://{gguf}"}
    family = {"version": 2, "model_name": EMBEDDING, "dimensions": 576, "max_tokens": 512, "language": ["en"]}
    family["model_specs"] = [spec | {"model_file_name_template": gguf.name}]
    client.register_model("embedding", json.dumps(family), persist=False)
    client.launch_model(EMBEDDING, model_type="embedding", model_uid=EMBEDDING, n_threads=1, pooling="mean")
