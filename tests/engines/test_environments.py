"""How the program of an engine is found, and what its process inherits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.environments import absolute_program, child_environment, find_binary, has_package, module_argv, worker_argv


def make_program(path: Path, mode: int = 0o755) -> Path:
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(mode)
    return path


def test_a_binary_is_found_on_the_path() -> None:
    assert find_binary("sh", None) is not None


def test_a_configured_binary_goes_before_the_path(tmp_path: Path) -> None:
    program = make_program(tmp_path / "my-shell")
    assert find_binary("sh", str(program)) == str(program)


def test_a_configured_binary_that_is_missing_is_not_replaced_by_one_of_the_path(tmp_path: Path) -> None:
    assert find_binary("sh", str(tmp_path / "nothing")) is None


def test_a_file_that_is_not_executable_is_no_binary(tmp_path: Path) -> None:
    assert find_binary("sh", str(make_program(tmp_path / "plain", mode=0o644))) is None


def test_there_is_no_binary_of_an_unknown_name() -> None:
    assert find_binary("no-such-program-anywhere", None) is None


def test_a_worker_is_a_module_under_our_own_python() -> None:
    assert module_argv("gateway.watchdog") == (sys.executable, "-P", "-m", "gateway.watchdog")


def test_a_path_of_the_settings_is_meant_where_they_are_read_and_a_name_stays(tmp_path: Path) -> None:
    assert absolute_program("./bin/llama-server") == str(Path.cwd() / "bin" / "llama-server")
    assert absolute_program("llama-server") == "llama-server"
    assert absolute_program(None) is None


def test_a_worker_does_not_import_from_its_working_folder(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "__init__.py").write_text("raise SystemExit('the wrong engines')")
    argv = [*worker_argv("llama_cpp"), "--help"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_package_is_known_without_being_imported() -> None:
    code = (
        "import sys; from engines.environments import has_package; "
        "print(has_package('xml'), 'xml' in sys.modules, has_package('no_such_package'))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "False", "False"]
    assert has_package("json")


def test_a_child_inherits_our_environment_and_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_SITE", "kept")
    monkeypatch.setenv("CHANGED", "before")
    env = child_environment({"CHANGED": "after", "ADDED": "1"})
    assert (env["OF_THE_SITE"], env["CHANGED"], env["ADDED"]) == ("kept", "after", "1")
    assert os.environ["CHANGED"] == "before"
    assert env["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    "variable", ["HOSTLER_API_KEYS", "HOSTLER_API_KEY", "HOSTLER_PORT", "HOSTLER_RUN", "PYTHONDONTWRITEBYTECODE"]
)
def test_a_child_does_not_inherit(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert variable not in child_environment({})


def test_what_is_added_for_a_child_is_passed_whatever_its_name() -> None:
    assert child_environment({"HOSTLER_RUN": "/run"})["HOSTLER_RUN"] == "/run"
