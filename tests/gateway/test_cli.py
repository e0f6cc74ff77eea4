"""The command line: quick help, answers that say what to do, and exit codes that programs can read."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway.cli import VERBS, hostler
from gateway.config import Settings
from gateway.launch import LaunchRequest
from registry.decode import schema

FAKE_ENGINE = Path(__file__).parents[1] / "fake_engine.py"
LIMIT_S = 60

SETTINGS = f"""
engines:
  llama.cpp: {{binary: {FAKE_ENGINE}}}
models:
  small: {{model_path: /models/a-Q4_K_M.gguf}}
"""


def run_here(*arguments: str) -> Result:
    """A verb in this process."""
    return CliRunner().invoke(hostler, arguments, prog_name="hostler")


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOSTLER_")}
    return kept | {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A verb as its users run it."""
    argv = [sys.executable, "-P", "-m", "gateway.cli", *arguments]
    return subprocess.run(argv, env=environment(home), cwd=home, capture_output=True, text=True, timeout=LIMIT_S)


def a_file(folder: Path, text: str = SETTINGS) -> str:
    (folder / "settings.yaml").write_text(text)
    return str(folder / "settings.yaml")


@contextmanager
def serving(home: Path, *arguments: str) -> Iterator[str]:
    """`hostler serve` on a free port; its address."""
    log = home / "serve.log"
    argv = [sys.executable, "-P", "-m", "gateway.cli", "serve", "--port", "0", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, env=environment(home), cwd=home, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (address := re.search(r"Hostler is at (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield address[1]
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            process.kill()
            process.wait(timeout=20)


@pytest.fixture
def no_gateway() -> Iterator[str]:
    """An address that nothing listens on, and that nobody else gets meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


# --- help


def test_help_shows_every_verb_in_order() -> None:
    result = run_here("--help")
    assert result.exit_code == 0
    assert re.findall(r"^  ([\w-]+)  ", result.output.partition("Verbs:")[2], re.MULTILINE) == list(VERBS)


def test_help_is_there_at_once(tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        started = time.monotonic()
        assert run(tmp_path, "--help").returncode == 0
        times.append(time.monotonic() - started)
    assert min(times) < 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = run_here(verb, "--help")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: hostler {verb} ")


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"hostler, version \d+\.\d+\.\d+\S*\n", run_here("--version").output)


@pytest.mark.parametrize(
    ("typed", "meant"), [("sevre", "serve"), ("lst", "list"), ("LOGS", "logs"), ("docter", "doctor")]
)
def test_a_misspelt_verb_gets_the_nearest(typed: str, meant: str) -> None:
    result = run_here(typed)
    assert result.exit_code == 2
    assert f"There is no verb {typed!r}. Did you mean {meant!r}" in result.output


def test_a_verb_like_no_other_is_told_where_they_are() -> None:
    result = run_here("zzzzzzzz")
    assert result.exit_code == 2
    assert "There is no verb 'zzzzzzzz'. `hostler --help` shows them all." in result.output


# --- config


def test_settings_that_are_right_are_told_with_their_models(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    done = run(tmp_path, "config", "check", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "small: a-Q4_K_M (ggufv2) by llama.cpp, from local:/models/a-Q4_K_M.gguf",
        f"{file} is right: 1 model.",
    ]


def test_checking_settings_writes_nothing(tmp_path: Path) -> None:
    run(tmp_path, "config", "check", a_file(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", ["'prot'", "Did you mean 'port'"]),
        ("models: {m: {model_name: qwen33}}", ["'m'", "'qwen33'", "Did you mean 'qwen3'"]),
        ("models: {m: {model_name: qwen3, model_engine: lama.cpp}}", ["'m'", "'lama.cpp'", "'llama.cpp'"]),
        ("models: {'a b': {model_name: qwen3}}", ["'a b' cannot name a model"]),
        ("models: {m: {}}", ["'m'", "No model was named"]),
        ("engines: {lama.cpp: {}}", ["$.engines", "'lama.cpp'", "Did you mean 'llama.cpp'"]),
        (
            "engines: {llama.cpp: {binary: /nowhere}}\nmodels: {m: {model_name: qwen3, model_format: ggufv2}}",
            ["'/nowhere'", "executable"],
        ),
    ],
)
def test_settings_that_are_wrong_are_told_in_a_sentence(text: str, words: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, "config", "check", a_file(tmp_path, text))
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == []


def test_a_settings_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, "config", "check", "nothing.yaml")
    assert done.returncode == 1
    assert "The settings file nothing.yaml cannot be read" in done.stderr


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    if isinstance(node, list):
        for value in node:
            yield from references(value)


def test_the_schema_is_one_that_editors_can_follow() -> None:
    result = run_here("config", "schema")
    printed = json.loads(result.output)
    kinds = printed["$defs"]
    settings = kinds["Settings"]["properties"]
    assert result.exit_code == 0
    assert printed == json.loads(json.dumps(schema(Settings)))
    assert printed["$ref"] == "#/$defs/Settings"
    assert {ref.removeprefix("#/$defs/") for ref in references(printed)} <= set(kinds)
    assert set(settings) == set(Settings.__struct_encode_fields__)
    assert set(kinds["LaunchRequest"]["properties"]) == set(LaunchRequest.__struct_encode_fields__)
    assert settings["models"]["additionalProperties"] == {"$ref": "#/$defs/LaunchRequest"}
    assert settings["engines"]["additionalProperties"] == {"$ref": "#/$defs/EngineSettings"}
    assert (settings["models"]["type"], settings["engines"]["type"]) == ("object", "object")
    assert settings["models"]["description"]
    assert settings["engines"]["description"]
    for name in ("Settings", "LaunchRequest", "EngineSettings"):
        assert (kinds[name]["type"], kinds[name]["additionalProperties"]) == ("object", False)


# --- doctor


def test_the_doctors_report_for_programs(tmp_path: Path) -> None:
    done = run(tmp_path, "doctor", "--json", "-c", a_file(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report) == ["Hostler", "Packages", "Engines", "Environments", "GPUs", "Machine"]
    assert set(report["Hostler"]) == {"version", "python", "data folder"}
    assert report["Hostler"]["data folder"] == f"{tmp_path}/.hostler"
    assert report["Engines"]["llama.cpp"] == "can run"
    assert {"msgspec", "starlette", "aiohttp", "xllamacpp"} <= set(report["Packages"])
    assert list(report["Environments"]) == ["none"]
    assert report["GPUs"]
    assert set(report["Machine"]) == {"CPUs", "memory", "disk"}


def test_the_doctor_says_why_an_engine_cannot_run(tmp_path: Path) -> None:
    done = run(tmp_path, "doctor", "-c", a_file(tmp_path, "engines: {llama.cpp: {binary: /nowhere}}"))
    assert done.returncode == 0
    assert re.search(r"llama\.cpp +cannot run: `engines\.llama\.cpp\.binary` names '/nowhere'", done.stdout)


def test_the_doctor_makes_no_folder(tmp_path: Path) -> None:
    assert run(tmp_path, "doctor").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_of_wrong_settings_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "doctor", "-c", a_file(tmp_path, "prot: 1"))
    assert done.returncode == 1
    assert "'prot'" in done.stderr
    assert "Traceback" not in done.stderr


# --- verbs that talk to a gateway


@pytest.mark.parametrize(
    "verb",
    [["list"], ["ps"], ["start", "m"], ["stop", "m"], ["sleep", "m"], ["wake", "m"], ["logs", "m"]],
    ids=" ".join,
)
def test_without_a_gateway_a_verb_says_what_to_do(verb: list[str], no_gateway: str, tmp_path: Path) -> None:
    done = run(tmp_path, *verb, "--endpoint", no_gateway)
    assert (done.returncode, done.stdout) == (1, "")
    words = [no_gateway, "Connection refused", "`hostler serve`", "--endpoint", "HOSTLER_ENDPOINT"]
    assert done.stderr.startswith(f"hostler: There is no gateway at {no_gateway} ")
    assert [word for word in words if word not in done.stderr] == []


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://127.0.0.1", "http://[::1", "http://a b"])
def test_an_endpoint_that_is_no_address_is_told(endpoint: str, tmp_path: Path) -> None:
    done = run(tmp_path, "list", "--endpoint", endpoint)
    assert done.returncode == 1
    assert endpoint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gateway_is_asked_and_a_second_one_on_its_folder_refused(tmp_path: Path) -> None:
    home = tmp_path / "data"
    with serving(tmp_path, "-c", a_file(tmp_path), "--home", str(home)) as address:
        listed = run(tmp_path, "list", "--json", "--endpoint", address)
        assert [model["id"] for model in json.loads(listed.stdout)] == ["small"]
        table = run(tmp_path, "list", "--endpoint", address).stdout.splitlines()
        assert table[0].split()[:3] == ["UID", "STATE", "TYPE"]
        assert table[1].split()[:2] == ["small", "stopped"]
        assert "small" in run(tmp_path, "ps", "--endpoint", address).stdout

        unknown = run(tmp_path, "start", "smal", "--endpoint", address)
        assert unknown.returncode == 1
        assert "uid: smal. Did you mean 'small'?" in unknown.stderr

        second = run(tmp_path, "serve", "--port", "0", "--home", str(home))
        assert (second.returncode, second.stdout) == (2, "")
        assert re.search(rf"Another gateway \(pid \d+\) uses the data folder {home}\. Stop it", second.stderr)


# --- serve that does not start


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", ["'prot'", "Did you mean 'port'"]),
        ("models: {m: {model_name: qwen33}}", ["'m'", "'qwen33'", "Did you mean 'qwen3'"]),
        ("engines: {lama.cpp: {}}", ["$.engines", "'lama.cpp'"]),
        ("api_keys: ['']", ["$.api_keys", "empty key"]),
        ("log_level: loud", ["$.log_level"]),
    ],
)
def test_serve_with_wrong_settings_exits_with_2_and_a_sentence(text: str, words: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "--port", "0", "-c", a_file(tmp_path, text))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert [word for word in ["hostler: ", *words] if word not in done.stderr] == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_serve_beyond_loopback_without_a_key_is_refused(host: str, tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "--host", host, "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Listening on {host} lets other machines in, and there is no API key" in done.stderr
    assert not (tmp_path / ".hostler").exists()


def test_serve_on_a_port_that_is_in_use_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, "serve", "--port", str(port))
    assert (done.returncode, done.stdout) == (2, "")
    words = [f"Cannot listen on 127.0.0.1:{port}: another program has it", "--port"]
    assert [word for word in words if word not in done.stderr] == []


def test_serve_at_a_host_that_there_is_not_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "--host", "no-such-host.invalid", "--insecure", "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Cannot listen on no-such-host.invalid:0" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_in_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(tmp_path, "serve", "--port", "0", "--home", str(tmp_path / "file" / "data"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"The data folder {tmp_path}/file/data cannot be used: Not a directory" in done.stderr
