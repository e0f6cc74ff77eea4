"""What README shows runs as it stands there."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path

from harness import StartGateway

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:9997"


def snippet_with(text: str) -> str:
    (found,) = [code for code in PYTHON.findall((ROOT / "README.md").read_text()) if text in code]
    return str(found)


async def test_the_snippet_of_the_python_client(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = await start_gateway()
    spec = {
        "model_format": "ggufv2",
        "model_size_in_billions": 1,
        "quantization": "q4_0",
        "model_file_name_template": "fake.gguf",
        "model_uri": str(tmp_path / "fake.gguf"),
    }
    model = {"version": 2, "model_name": "my-model", "model_family": "other", "model_lang": ["en"]}
    model |= {"model_ability": ["generate", "chat"], "model_specs": [spec]}
    (tmp_path / "model.json").write_text(json.dumps(model))
    code = snippet_with("from hostler import Client")
    assert ADDRESS in code
    program = code.replace(ADDRESS, gateway.address) + "\nprint(uid)\n"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        stdout=asyncio.subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "gateway" / "sdk")])},
    )
    output, _ = await process.communicate()
    assert (process.returncode, output.decode()) == (0, "my-model\n")
    assert (await gateway.get("/v1/models/my-model")).json["status"] == "ready"
    assert (gateway.home / "registrations").exists()
