"""Fixtures for the tests of the hubs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_servers import ROOT, Fetch, Index, Server, StartFetch

from registry.schema import Source


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def index(server: Server) -> Index:
    return Index(server)


@pytest.fixture
def start_fetch(tmp_path: Path) -> Iterator[StartFetch]:
    """Start the fetch program: `start_fetch(source, **environment)`. Its cache is `tmp_path / "cache"`."""
    started: list[Fetch] = []

    def start(
        source: Source, *, offline: bool = False, only_list: bool = False, without: str = "", **extra: str
    ) -> Fetch:
        theirs = ("PIP_", "HF_", "HOSTLER_", "XINFERENCE_", "MODELSCOPE_", "CSGHUB_", "OPENMIND_", "XDG_")
        theirs += ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
        env = {name: value for name, value in os.environ.items() if not name.upper().startswith(theirs)}
        env |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        if without:  # a Python that does not have that module
            folder = tmp_path / f"without-{without}"
            folder.mkdir(exist_ok=True)
            (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{without!r}] = None\n")
            env["PYTHONPATH"] = f"{folder}{os.pathsep}{ROOT}"
        order = {"offline": offline, "only_list": only_list}
        fetch = Fetch(source, tmp_path / "cache", env | extra, **order)
        started.append(fetch)
        return fetch

    yield start
    for fetch in started:
        fetch.close()
