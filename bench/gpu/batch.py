"""What all parts of a run share: its notes, the folders, the one gateway, and the models that it can launch."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from door import Door
from notes import Notes

# Of our gateway: nothing of other models' comfort counts here.
SETTINGS: dict[str, Any] = {
    "log_level": "info",
    "access_log": False,
    "min_residency_s": 0.5,
    "max_wait_s": 20,
    "orphan_timeout_s": 60,
    "drain_timeout_s": 10,
}


@dataclass
class Bench:
    """One run. `models` has a folder for each model; `on_cpu`: no GPU is asked for, to try the parts without
    one. `is_eager`: vLLM is started without CUDA graphs.
    """

    notes: Notes
    work: Path
    models: Path
    on_cpu: bool = False
    is_eager: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    _door: Door | None = None

    async def door(self, **settings: Any) -> Door:
        """The gateway, started if it is not; other settings than the last start's are told to it while it runs."""
        if self._door is None:
            self.settings = SETTINGS | settings
            self._door = Door(self.work / "home", self.settings)
            self.notes.told("the gateway answers after s", round(await self._door.start(), 2))
        return self._door

    def model(self, name: str) -> str:
        """The path of one. Raises FileNotFoundError."""
        path = self.models / name
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not there: it is made by shapes.py, or carried")
        return str(path)

    def tokenizer(self) -> Path:
        """That of the models of random weights."""
        return self.models / "tok"

    async def made(self, name: str, size: str) -> str:
        """The path of a model of random weights, written if it is not there."""
        if not (self.models / name / "model.safetensors").exists():
            argv = [sys.executable, str(Path(__file__).with_name("shapes.py")), str(self.tokenizer())]
            process = await asyncio.create_subprocess_exec(*argv, str(self.models / name), size)
            if await process.wait():
                raise RuntimeError(f"{name} could not be written")
        return str(self.models / name)

    @property
    def device(self) -> dict[str, Any]:
        """What a launch says so that it is on the CPU, if that is wanted."""
        return {"device": "cpu"} if self.on_cpu else {}

    async def clear(self, *kept: str) -> None:
        """End all models but these, after a part that broke."""
        if self._door:
            listed = await self._door.get("/v1/models", limit_s=10)
            await self._door.terminate(*(one["id"] for one in listed["data"] if one["id"] not in kept))

    async def end(self) -> None:
        """The gateway with its engines, and all logs into one archive."""
        if self._door:
            await self._door.stop()
        await asyncio.to_thread(self._collect)

    def _collect(self) -> None:
        home = self.work / "home"
        with tarfile.open(self.notes.folder / f"{self.notes.file.stem}-logs.tgz", "w:gz") as archive:
            for path in sorted(home.rglob("*")):
                if path.suffix in (".log", ".yaml") and path.is_file() and path.stat().st_size < 2**23:
                    archive.add(path, path.relative_to(home))
        shutil.rmtree(home, ignore_errors=True)
