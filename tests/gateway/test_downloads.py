"""What the child that fetches files says, as the gateway reads it."""

from __future__ import annotations

from pathlib import Path

from gateway.downloads import list_files
from registry.schema import Source


async def test_a_model_of_very_many_files_is_listed(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text("{}")
    for number in range(1200):
        (folder / f"{'part' * 15}-{number:05}.safetensors").write_bytes(b"x")
    source = Source(model_hub="local", model_id=str(folder))
    assert len(await list_files(source, tmp_path, folder=tmp_path, limit_s=20)) == 1201
