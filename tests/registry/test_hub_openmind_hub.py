"""The hub `openmind_hub`: its library talks to no server but Modelers' own, so a small stand-in of it answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hub_servers import ROOT, StartFetch

from registry.hubs import find_cached
from registry.schema import Source

SOURCE = Source(model_hub="openmind_hub", model_id="owner/tiny")

# The names, arguments and folders of openmind_hub 1.3.
STAND_IN = """
import os, pathlib, requests
class RepoFile:
    def __init__(self, path, size): self.path, self.size = path, size
class RepoFolder:
    path = "sub"
class Commit:
    oid = "d" * 40
class OmHubHTTPError(requests.HTTPError): pass
class OMValidationError(ValueError): pass
class RepositoryNotFoundError(OmHubHTTPError): pass
class GatedRepoError(OmHubHTTPError): pass
FILES = {"config.json": b"{}", "sub/model.safetensors": b"safe", "a.onnx": b"o"}
TELL = os.environ.get("STAND_IN", "")
class OmApi:
    def __init__(self, *, token=None): assert token == "om-tell-nobody"
    def get_repo_last_commit(self, repo_id, *, revision, token=None):
        if TELL in ("404", "401", "500"):
            response = requests.Response(); response.status_code = int(TELL)
            raise OmHubHTTPError(TELL, response=response)
        if TELL == "name": raise OMValidationError("invalid owner name")
        if TELL == "odd": raise KeyError("data is None")
        if TELL == "down": raise requests.ConnectionError("refused")
        return Commit
    def list_repo_tree(self, repo_id, *, recursive, revision, token=None):
        assert recursive
        return iter([RepoFolder(), *(RepoFile(p, len(c)) for p, c in FILES.items())])
def snapshot_download(repo_id, *, revision, allow_patterns, token):
    if TELL == "late":
        try: raise requests.ConnectionError("cut")
        except requests.ConnectionError as e: raise RuntimeError("Download failed after 10 attempts") from e
    repo = pathlib.Path(os.environ["XDG_CACHE_HOME"], "openmind/hub", "models--" + repo_id.replace("/", "--"))
    (repo / "blobs").mkdir(parents=True, exist_ok=True)
    for path in allow_patterns:
        blob, link = repo / "blobs" / path.replace("/", "_"), repo / "snapshots" / Commit.oid / path
        blob.write_bytes(FILES[path] if TELL != "short" else b"")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return str(repo / "snapshots" / Commit.oid)
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in/openmind_hub.py").write_text(STAND_IN)
    return {
        "PYTHONPATH": f"{tmp_path / 'stand-in'}{os.pathsep}{ROOT}",
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
        "OPENMIND_HUB_TOKEN": "om-tell-nobody",
    }


def test_what_engines_need_is_fetched_by_commit(env: dict[str, str], start_fetch: StartFetch, tmp_path: Path) -> None:
    pytest.importorskip("requests")
    folder = start_fetch(SOURCE, **env).path()
    assert folder == tmp_path / "xdg/openmind/hub/models--owner--tiny/snapshots" / ("d" * 40)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "sub/model.safetensors"}
    assert find_cached(SOURCE, tmp_path / "cache") == folder


@pytest.mark.parametrize(
    ("tell", "permanent", "words"),
    [
        ("404", True, "There is no repository owner/tiny"),
        ("401", True, "OPENMIND_HUB_TOKEN"),
        ("500", False, "HTTP 500"),
        ("name", True, "invalid owner name"),
        ("odd", False, "data is None"),
        ("down", False, "could not be reached: refused"),
        ("late", False, "could not be reached: cut"),
        ("short", False, "did not arrive whole"),
    ],
)
def test_what_goes_wrong_is_told(
    tell: str, permanent: bool, words: str, env: dict[str, str], start_fetch: StartFetch
) -> None:
    pytest.importorskip("requests")
    assert words in start_fetch(SOURCE, STAND_IN=tell, **env).error(permanent=permanent)


def test_without_its_library_it_says_what_to_install(start_fetch: StartFetch) -> None:
    assert "pip install openmind_hub" in start_fetch(SOURCE, without="openmind_hub").error(permanent=True)


def test_files_can_be_listed_without_a_download(env: dict[str, str], start_fetch: StartFetch, tmp_path: Path) -> None:
    pytest.importorskip("requests")
    assert start_fetch(SOURCE, only_list=True, **env).files() == {"config.json": 2, "sub/model.safetensors": 4}
    assert not (tmp_path / "xdg").exists()
