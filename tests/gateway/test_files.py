"""Files that replies point to: named by nobody's guess, typed by their content, gone after a while."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from gateway import files
from gateway.files import MEDIA_TYPES, Files

CONTENTS = {
    "png": b"\x89PNG\r\n\x1a\n...",
    "jpg": b"\xff\xd8\xff\xe0...",
    "webp": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    "gif": b"GIF89a...",
    "mp4": b"\x00\x00\x00\x20ftypisom...",
    "bin": b"whatever",
}


@pytest.mark.parametrize("ending", CONTENTS)
def test_a_file_is_named_by_what_it_is(tmp_path: Path, ending: str) -> None:
    kept = Files(tmp_path / "files")
    name = kept.keep(CONTENTS[ending])
    assert name.endswith(f".{ending}")
    assert ending in MEDIA_TYPES
    found = kept.find(name)
    assert found
    assert found.read_bytes() == CONTENTS[ending]


def test_names_differ_and_only_the_owner_can_list_them(tmp_path: Path) -> None:
    kept = Files(tmp_path / "files")
    assert kept.keep(b"a") != kept.keep(b"a")
    assert (tmp_path / "files").stat().st_mode & 0o077 == 0


def test_a_file_expires_and_is_deleted_when_the_next_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SWEEP_S", 0.0)
    kept = Files(tmp_path, kept_s=60)
    old, young = kept.keep(b"old"), kept.keep(b"young")
    long_ago = time.time() - 61
    os.utime(tmp_path / old, (long_ago, long_ago))

    assert kept.find(old) is None
    assert kept.find(young)
    assert (tmp_path / old).exists()
    kept.keep(b"another")
    assert not (tmp_path / old).exists()
    assert (tmp_path / young).exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../secret.txt", "a.png", "/etc/passwd", "x" * 24, "%2e%2e/x.png"])
def test_no_other_file_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.txt").write_text("x")
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"x")
    assert Files(folder).find(name) is None
