"""Environments built for real, offline, from small wheels made here: whole or not at all, once, side by side."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from harness import StartGateway, is_running, until

from engines.base import EngineSettings
from engines.environments import PINS, Environment, find_built, find_python
from gateway import environments
from gateway.environments import (
    CannotBuild,
    EnvironmentInUse,
    Recipe,
    is_offline_build,
    list_environments,
    pip_argv,
    prepare,
    read_pip_config,
    remove,
    remove_for,
    to_install,
    uv_flags,
)

ROOT = Path(__file__).parents[2]
Build = Callable[..., Any]
FRAME = {"python_multipart": "0.0.34", "starlette": "1.10.0", "uvicorn": "0.54.0"}


def make_wheel(
    folder: Path, name: str, version: str, *, requires: tuple[str, ...] = (), text: str | None = None
) -> Path:
    """A pure-Python wheel of one module, by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    needed = "".join(f"Requires-Dist: {one}\n" for one in requires)
    files = {
        f"{name}.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content.encode())}\n"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(path, content)
    return wheel


def make_slow_source(folder: Path, marker: Path) -> Path:
    """A source distribution whose build says that it runs, and then takes a minute."""
    source = folder / "slow-1.0.zip"
    backend = f"""
import pathlib, time
def get_requires_for_build_wheel(config_settings=None): return []
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    pathlib.Path({str(marker)!r}).touch()
    time.sleep(60)
def build_wheel(*_, **__): raise SystemExit
"""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr(
            "slow-1.0/pyproject.toml",
            '[build-system]\nrequires = []\nbuild-backend = "slow_build"\nbackend-path = ["."]\n'
            '[project]\nname = "slow"\nversion = "1.0"\n',
        )
        archive.writestr("slow-1.0/slow_build.py", backend)
        archive.writestr("slow-1.0/PKG-INFO", "Metadata-Version: 2.1\nName: slow\nVersion: 1.0\n")
    return source


def says(python: str, code: str) -> str:
    """What a Python prints, without this test's own import path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    make_wheel(folder, "tinyclay", "1.0")
    make_wheel(folder, "tinyclay", "2.0")
    make_wheel(folder, "tinykiln", "1.0", requires=("tinyclay<2",))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "environments"


@pytest.fixture
def build(tmp_path: Path, folder: Path, wheels: Path) -> Build:
    """`await build("tinyclay==1.0")` gives the Python of such an environment."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()

    async def build(*packages: str, steps: list[str] | None = None, builder: Any = "pip", **fields: Any) -> str:
        environment = Environment(**({"engine": "kiln"} | fields), packages=packages)
        recipe = Recipe(builder=builder, offline=True, wheel_folders=(wheels,))
        report = steps.append if steps is not None else (lambda _: None)
        return await prepare(environment, folder, recipe=recipe, run_folder=run_folder, report=report)

    return build


# --- building


async def test_an_environment_holds_its_packages_and_what_these_need(build: Build) -> None:
    steps: list[str] = []
    python = await build("tinykiln", steps=steps)
    assert says(python, "import tinykiln, tinyclay; print(tinykiln.__version__, tinyclay.__version__)") == "1.0 1.0"
    assert steps[:2] == ["making an environment for kiln", "installing 1 package for kiln"]


async def test_versions_that_exclude_each_other_live_side_by_side(build: Build) -> None:
    pythons = [await build("tinyclay==1.0"), await build("tinyclay==2.0")]
    assert [says(python, "import tinyclay; print(tinyclay.__version__)") for python in pythons] == ["1.0", "2.0"]


async def test_its_modules_are_compiled_though_our_own_environment_says_not_to(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    python = await build("tinyclay")
    assert list(Path(python).parents[1].rglob("tinyclay.*.pyc"))


async def test_without_dependencies_it_holds_exactly_its_packages(build: Build) -> None:
    python = await build("tinykiln", without_dependencies=True)
    assert says(python, "import tinykiln, importlib.util as u; print(u.find_spec('tinyclay'))") == "None"


async def test_it_sees_nothing_of_ours_unless_it_inherits(build: Build) -> None:
    code = "import importlib.util as u; print(u.find_spec('msgspec') is not None)"
    assert says(await build("tinyclay"), code) == "False"
    assert says(await build("tinyclay", inherit_packages=True), code) == "True"


async def test_what_the_base_has_is_not_installed_again_and_its_own_goes_before(build: Build) -> None:
    base = await build("tinyclay==2.0")
    same = await build("tinyclay", python=base, inherit_packages=True)
    other = await build("tinykiln", python=base, inherit_packages=True)
    code = "import tinyclay; print(tinyclay.__version__, tinyclay.__file__)"
    version, file = says(same, code).split()
    assert (version, Path(file).is_relative_to(Path(base).parents[1])) == ("2.0", True)
    version, file = says(other, code).split()
    assert (version, Path(file).is_relative_to(Path(other).parents[1])) == ("1.0", True)


@pytest.mark.parametrize("builder", ["pip", *(["uv"] if environments.find_uv() else [])])
async def test_what_the_base_has_is_installed_again_where_the_site_says_so(build: Build, builder: str) -> None:
    base = await build("tinyclay==2.0")
    python = await build("tinyclay", python=base, inherit_packages=True, skip_installed=False, builder=builder)
    file = says(python, "import tinyclay; print(tinyclay.__file__)")
    assert Path(file).is_relative_to(Path(python).parents[1])


async def test_equal_ones_are_built_once_and_shared(build: Build, folder: Path) -> None:
    first = await build("tinyclay", "tinykiln", engine="one")
    steps: list[str] = []
    assert await build("tinykiln", "tinyclay", engine="two", model="m", steps=steps) == first
    assert steps == []
    [listed] = list_environments(folder)
    assert listed.users == (("one", None), ("two", "m"))


async def test_two_builds_of_one_at_once_become_one(build: Build, folder: Path) -> None:
    steps: list[str] = []
    pythons = await asyncio.gather(*(build("tinykiln", steps=steps) for _ in range(3)))
    assert len(set(pythons)) == 1
    assert steps.count("making an environment for kiln") == 1
    assert len(list(Path(pythons[0]).parents[2].glob("build-*"))) == 1


async def test_a_failure_tells_the_exit_the_last_lines_and_the_log(build: Build, folder: Path) -> None:
    with pytest.raises(CannotBuild) as caught:
        await build("no-such-clay==9")
    said = str(caught.value)
    assert "The environment of kiln cannot be built: the installer ended with exit code 1." in said
    assert "No matching distribution found for no-such-clay==9" in said
    log = Path(said.rpartition("The whole log is ")[2])
    assert "no-such-clay" in log.read_text()
    assert caught.value.permanent
    assert list_environments(folder) == []


async def test_packages_that_exclude_each_other_are_a_lasting_failure(build: Build) -> None:
    with pytest.raises(CannotBuild, match="ResolutionImpossible") as caught:
        await build("tinykiln", "tinyclay==2.0")
    assert caught.value.permanent


async def test_a_network_that_fails_is_a_failure_that_may_pass(tmp_path: Path, folder: Path) -> None:
    environment = Environment(
        engine="kiln", packages=("tinyclay",), index_url="http://127.0.0.1:9/simple", inherit_pip_config=False
    )
    with pytest.raises(CannotBuild) as caught:
        await asyncio.wait_for(
            prepare(environment, folder, recipe=Recipe(builder="pip"), run_folder=tmp_path, report=lambda _: None), 60
        )
    assert not caught.value.permanent


async def test_a_cancel_ends_a_build_at_once_and_leaves_nothing(build: Build, folder: Path, wheels: Path) -> None:
    marker = wheels.parent / "building"
    make_slow_source(wheels, marker)
    building = asyncio.ensure_future(build("slow", no_build_isolation=True))
    await until(marker.exists)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(building, 20)
    assert list_environments(folder) == []
    assert await build("tinyclay")


def test_a_build_that_is_killed_is_not_taken_for_whole_and_the_next_clears_it_away(
    tmp_path: Path, folder: Path, wheels: Path
) -> None:
    marker = tmp_path / "building"
    source = make_slow_source(wheels, marker)
    environment = Environment(engine="kiln", packages=("slow",), no_build_isolation=True)
    code = f"""
import asyncio, msgspec
from pathlib import Path
from engines.environments import Environment
from gateway.environments import Recipe, prepare
from gateway.nodes.local import open_scratch
environment = msgspec.json.decode({msgspec.json.encode(environment).decode()!r}, type=Environment)
async def main():
    async with open_scratch() as scratch:
        recipe = Recipe(builder="pip", offline=True, wheel_folders=(Path({str(wheels)!r}),))
        print(await prepare(
            environment, Path({str(folder)!r}), recipe=recipe, run_folder=scratch, report=lambda _: None
        ))
asyncio.run(main())
"""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    argv, env = [sys.executable, "-P", "-c", code], os.environ | {"PYTHONPATH": path}
    builder = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE)
    try:
        asyncio.run(until(marker.exists))
        [listed] = list_environments(folder)
        assert (listed.is_building, listed.is_whole, listed.users) == (True, False, (("kiln", None),))
        with pytest.raises(EnvironmentInUse, match="being built"):
            remove(listed.fingerprint, folder)
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    [left] = list_environments(folder)
    assert (left.is_building, left.is_whole) == (False, False)
    assert find_built(environment, folder) is None

    source.unlink()
    make_wheel(wheels, "slow", "1.0")
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert says(done.stdout.strip(), "import slow; print(slow.__version__)") == "1.0"
    assert len(list((folder / environment.folder_name).glob("build-*"))) == 1


async def test_an_environment_whose_python_is_gone_is_built_again(build: Build, folder: Path) -> None:
    python = Path(await build("tinyclay"))
    python.unlink()
    assert [listed.is_whole for listed in list_environments(folder)] == [False]
    assert says(await build("tinyclay"), "import tinyclay; print(1)") == "1"


async def test_a_base_that_is_gone_is_told(build: Build, tmp_path: Path) -> None:
    with pytest.raises(CannotBuild, match=r"its base .*/gone/bin/python is gone"):
        await build("tinyclay", python=str(tmp_path / "gone" / "bin" / "python"), inherit_packages=True)


# --- listing, removing


async def test_the_list_tells_who_uses_what(build: Build, folder: Path) -> None:
    await build("tinyclay", engine="kiln")
    python = await build("tinyclay==1.0", engine="kiln", model="m")
    of_engine, of_model = list_environments(folder)
    assert [(one.kind, one.name, one.is_whole) for one in (of_engine, of_model)] == [
        ("engine", "kiln", True),
        ("model", "model m", True),
    ]
    assert of_model.python == python
    assert of_model.packages == ("tinyclay==1.0",)
    assert of_model.python_version == sys.version.split()[0]
    assert of_model.size_bytes > 0


async def test_an_environment_is_removed_for_its_last_user_only(build: Build, folder: Path) -> None:
    python = await build("tinyclay", engine="one")
    await build("tinyclay", engine="two")
    [listed] = list_environments(folder)
    assert remove_for(("one", None), listed.fingerprint, folder) == 0
    assert Path(python).exists()
    assert remove_for(("two", None), listed.fingerprint, folder) > 0
    assert list_environments(folder) == []
    assert remove(listed.fingerprint, folder) == 0


async def test_an_environment_in_use_is_not_removed(build: Build, folder: Path) -> None:
    python = await build("tinyclay")
    [listed] = list_environments(folder)
    with subprocess.Popen([python, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            with pytest.raises(EnvironmentInUse, match=f"in use by process {process.pid}"):
                remove(listed.fingerprint, folder)
        finally:
            process.kill()
    assert remove(listed.fingerprint, folder) > 0


async def test_an_environment_that_another_is_built_on_is_not_removed(build: Build, folder: Path) -> None:
    base = await build("tinyclay")
    await build("tinykiln", python=base, inherit_packages=True, model="m")
    name = Path(base).parents[2].name
    with pytest.raises(EnvironmentInUse, match="of model m is built on"):
        remove(name, folder)


@pytest.mark.parametrize("name", ["..", "locks", "", "0123456789abcdef", "../../etc"])
def test_what_is_no_environment_is_not_removed(name: str, folder: Path) -> None:
    (folder / "locks").mkdir(parents=True)
    assert remove(name, folder) == 0
    assert (folder / "locks").exists()


# --- what the installers are told


A = Environment(
    engine="kiln",
    packages=("a", "b==1"),
    index_url="https://index.example/simple",
    extra_index_url=("https://one.example", "https://two.example"),
    find_links=("/wheels",),
    trusted_host=("one.example",),
    index_strategy="first-index",
    no_build_isolation=True,
)
FLAGS = (
    *("--index-url", "https://index.example/simple"),
    *("--extra-index-url", "https://one.example", "--extra-index-url", "https://two.example"),
    *("--find-links", "/wheels", "--trusted-host", "one.example", "--no-build-isolation"),
)


def test_pip_gets_every_field_and_reads_its_own_configuration() -> None:
    argv, env = pip_argv(A, "/venv/bin/python", Recipe(), {"cert": "/ca"})
    assert argv == (
        *(sys.executable, "-P", "-m", "pip", "--python", "/venv/bin/python", "install"),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "off", *FLAGS, "--", "a", "b==1"),
    )
    assert env == {"PIP_USER": "0"}


def test_pip_that_is_not_to_inherit_its_configuration_keeps_only_the_way_to_the_network() -> None:
    environment = msgspec.structs.replace(A, inherit_pip_config=False)
    argv, env = pip_argv(environment, "/p", Recipe(), {"cert": "/ca"})
    assert "--isolated" in argv
    assert argv[argv.index("--cert") + 1] == "/ca"
    assert env["PIP_CONFIG_FILE"] == os.devnull


def test_uv_gets_every_field_and_pips_configuration() -> None:
    pip = {"extra-index-url": "https://three.example", "constraint": "/c.txt", "cert": "/ca", "timeout": "9"}
    assert uv_flags(A, Recipe(), pip) == [
        *("--no-progress", "--color", "never", "--no-python-downloads", *FLAGS, "--cert", "/ca"),
        *("--extra-index-url", "https://three.example", "--constraints", "/c.txt", "--index-strategy", "first-index"),
    ]


def test_uv_that_is_not_to_inherit_does_not() -> None:
    environment = msgspec.structs.replace(A, inherit_pip_config=False)
    assert "/secret" not in uv_flags(environment, Recipe(), {"find-links": "/secret"})


def test_of_what_uv_resolves_only_what_the_base_has_not_is_installed() -> None:
    resolved = "# a word\n--index-url x\nhas==1.0\nother==2.0\nlocal @ file:///w/local-1-py3-none-any.whl\n"
    installed = {"has": "1.0", "other": "1.0", "local": "1"}
    assert to_install(resolved, installed) == ("other==2.0", "local @ file:///w/local-1-py3-none-any.whl")


def test_offline_no_index_is_asked(tmp_path: Path) -> None:
    recipe = Recipe(offline=True, wheel_folders=(tmp_path, tmp_path / "gone"))
    plain = Environment(engine="kiln", packages=("a",))
    for words in (pip_argv(plain, "/p", recipe, {})[0], uv_flags(plain, recipe, {})):
        assert "--no-index" in words
        assert [words[at + 1] for at, word in enumerate(words) if word == "--find-links"] == [str(tmp_path)]


def test_pips_listing_is_read_with_the_environment_before_the_command_before_the_site() -> None:
    listing = "\n".join(
        [
            ":env:.find-links='/of/env'",
            "global.find-links='/of/global'",
            "global.extra-index-url='https://a.example https://b.example'",
            "install.constraint='/c'",
            "global.constraint='/other'",
            "freeze.all='true'",
            "nonsense",
        ]
    )
    assert read_pip_config(listing) == {
        "find-links": "/of/env",
        "extra-index-url": "https://a.example https://b.example",
        "constraint": "/c",
    }


@pytest.mark.parametrize(
    ("environ", "is_offline"),
    [
        ({}, False),
        ({"HOSTLER_OFFLINE": "1"}, True),
        ({"XINFERENCE_VIRTUAL_ENV_OFFLINE_INSTALL": "1"}, True),
        ({"XINFERENCE_VIRTUAL_ENV_OFFLINE_INSTALL": "0"}, False),
        ({"HF_HUB_OFFLINE": "1"}, False),
    ],
    ids=str,
)
def test_builds_are_offline(environ: dict[str, str], is_offline: bool) -> None:
    assert is_offline_build(environ) is is_offline


async def test_uv_that_is_asked_for_and_not_here_is_told(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "find_uv", lambda: None)
    with pytest.raises(CannotBuild, match="there is no uv on PATH"):
        await build("tinyclay", builder="uv")


@pytest.mark.skipif(environments.find_uv() is None, reason="there is no uv on PATH")
async def test_uv_builds_the_same(build: Build) -> None:
    base = await build("tinyclay==2.0", builder="uv")
    assert says(base, "import tinyclay; print(tinyclay.__version__)") == "2.0"
    python = await build("tinyclay", python=base, inherit_packages=True, builder="uv")
    assert says(python, "import tinyclay; print(tinyclay.__version__)") == "2.0"
    assert not list(Path(python).parents[1].rglob("tinyclay.py"))
    other = await build("tinykiln", python=base, inherit_packages=True, builder="uv")
    assert says(other, "import tinyclay; print(tinyclay.__version__)") == "1.0"
    with pytest.raises(CannotBuild, match="no-such-clay") as caught:
        await build("no-such-clay", python=base, inherit_packages=True, builder="uv")
    assert caught.value.permanent


# --- as users meet them

ENGINE = """
import sys
from engines.base import Command, Engine

SERVER = '''
import json, sys, tinyclay
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, data):
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer({"clay": tinyclay.__version__, "python": sys.executable})
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
'''

class Kiln(Engine, frozen=True, kw_only=True):
    name = "kiln"
    model_types = ("LLM",)
    unix_socket = False
    def installed(self): return None
    def accepts(self, artifact): return None
    def command(self, launch, model_path, placement, endpoint, python=None):
        return Command(argv=(python or sys.executable, "-P", "-c", SERVER, str(endpoint.port)))

ENGINE = Kiln()
"""


@pytest.fixture
def with_kiln(tmp_path: Path) -> dict[str, str]:
    """The environment of a gateway that has one more engine, of another distribution."""
    folder = tmp_path / "other"
    info = folder / "otherkiln-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "otherkiln.py").write_text(ENGINE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: otherkiln\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hostler.engines]\nkiln = otherkiln:ENGINE\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "XINFERENCE_VIRTUAL_ENV_OFFLINE_INSTALL": "1"}


async def test_a_model_is_served_from_its_own_environment_which_can_be_listed_and_removed(
    start_gateway: StartGateway, with_kiln: dict[str, str], wheels: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    gateway = await start_gateway(env=with_kiln, wheel_folders=[str(wheels)], environment_builder="pip")

    async def launch(uid: str, *packages: str) -> None:
        body = {"model_uid": uid, "model_name": uid, "model_path": str(model), "model_engine": "kiln"}
        fields = {"virtual_env_packages": packages, "virtual_env_find_links": [str(wheels)]}
        assert (await gateway.post("/v1/models", body | fields)).status == 200

    async def environments_of(uid: str) -> list[dict[str, Any]]:
        return (await gateway.get("/v1/virtualenvs", params={"model_name": uid})).json["list"]

    await launch("one", "tinyclay==1.0")
    await launch("two", "tinyclay==2.0")
    one, two = (await gateway.complete("one")).json, (await gateway.complete("two")).json
    assert (one["clay"], two["clay"]) == ("1.0", "2.0")

    [listed] = await environments_of("one")
    assert (listed["model_name"], listed["model_engine"]) == ("one", "kiln")
    assert listed["python_version"] == sys.version.split()[0]
    assert Path(one["python"]).is_relative_to(listed["path"])
    assert len((await gateway.get("/v1/virtualenvs")).json["list"]) == 2

    refused = await gateway.request("DELETE", "/v1/virtualenvs", params={"model_name": "one"})
    assert (refused.status, "in use by one" in refused.error["message"]) == (400, True)
    assert (await gateway.request("DELETE", "/v1/models/one")).status == 200
    other = {"model_name": "one", "model_engine": "other"}
    assert (await gateway.request("DELETE", "/v1/virtualenvs", params=other)).json == {"result": False}
    assert (await gateway.request("DELETE", "/v1/virtualenvs", params={"model_name": "one"})).json == {"result": True}
    assert await environments_of("one") == []
    assert (await gateway.complete("two")).json == two


async def test_an_environment_that_cannot_be_built_fails_the_model_and_says_why(
    start_gateway: StartGateway, with_kiln: dict[str, str], wheels: Path, tmp_path: Path
) -> None:
    gateway = await start_gateway(
        env=with_kiln,
        environment_builder="pip",
        models={
            "m": {"model_path": str(tmp_path), "model_engine": "kiln", "virtual_env_packages": ["no-such-clay"]},
        },
    )
    answer = await gateway.complete("m")
    assert answer.status == 503
    assert "No matching distribution found for no-such-clay" in answer.error["message"]
    assert "Correct the model's packages." in answer.error["message"]
    assert (await gateway.replicas())[0]["state"] == "failed"


async def test_a_gateway_that_is_killed_in_a_build_leaves_no_installer(
    start_gateway: StartGateway, with_kiln: dict[str, str], wheels: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "building"
    make_slow_source(wheels, marker)
    registered = {
        "version": 2,
        "model_name": "mine",
        "model_family": "other",
        "model_lang": ["en"],
        "model_ability": ["generate"],
        "model_specs": [
            {
                "model_format": "pytorch",
                "model_size_in_billions": 1,
                "quantization": "none",
                "model_uri": str(wheels),
                "model_id": "org/mine",
            }
        ],
        "virtualenv": {"packages": ["slow"], "no_build_isolation": True, "find_links": str(wheels)},
    }
    gateway = await start_gateway(env=with_kiln, environment_builder="pip", models={})
    body = {"model": json.dumps(registered), "persist": False}
    registration = await gateway.post("/v1/model_registrations/LLM", body)
    assert registration.status == 200, registration.body
    launch = {"model_uid": "mine", "model_name": "mine", "model_engine": "kiln"}
    assert (await gateway.post("/v1/models?wait_ready=false", launch)).status == 200
    await until(marker.exists)
    replica = await gateway.until("mine", state="downloading")
    assert replica["progress"].startswith("installing 1 package for model mine")

    build = str(gateway.home / "environments")
    installers = [pid for pid in psutil.pids() if build in " ".join(command_of(pid))]
    assert installers
    gateway.process.kill()
    await until(lambda: not any(is_running(pid) for pid in installers))
    assert [listed.is_whole for listed in list_environments(gateway.home / "environments")] == [False]


def command_of(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


def hostler(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "gateway.cli", *words]
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=120, env=os.environ | {"HOSTLER_HOME": str(home)}
    )


def test_the_command_line_installs_lists_and_removes_an_engine_offline(tmp_path: Path) -> None:
    home, wheels = tmp_path / "home", tmp_path / "links"
    for requirement in PINS["piper"].packages:
        name = requirement.split("=")[0].split(">")[0].replace("-", "_")
        make_wheel(wheels, name, requirement.split("==")[1] if "==" in requirement else FRAME[name])
    install = ("engines", "install", "piper", "--offline", "--find-links", str(wheels))

    done = hostler(home, *install, "--json")
    assert done.returncode == 0, done.stderr
    assert f"installing {len(PINS['piper'].packages)} packages for piper" in done.stderr
    python = json.loads(done.stdout)["python"]
    assert find_python("piper", ("no_such_module",), EngineSettings(), home / "environments") == python

    assert f"piper is installed: {python}" in hostler(home, *install).stdout
    [listed] = json.loads(hostler(home, "engines", "list", "--json").stdout)
    assert (listed["name"], listed["versions"], listed["state"]) == ("piper", {"piper": "1.8.0"}, "whole")
    table = hostler(home, "engines", "list").stdout
    assert "1.8.0" in table
    assert "Can be installed: vllm" in table
    assert "piper 1.8.0, " in hostler(home, "doctor").stdout

    make_wheel(wheels, "piper_tts", "1.7.0")
    assert hostler(home, *install, "--version", "1.7.0").returncode == 0
    versions = [one["versions"]["piper"] for one in json.loads(hostler(home, "engines", "list", "--json").stdout)]
    assert sorted(versions) == ["1.7.0", "1.8.0"]
    upgraded = hostler(home, "engines", "upgrade", "--offline")
    assert "piper is up to date" in upgraded.stdout, upgraded.stderr
    [listed] = json.loads(hostler(home, "engines", "list", "--json").stdout)
    assert listed["versions"] == {"piper": "1.8.0"}

    [again] = json.loads(hostler(home, "engines", "upgrade", "--offline", "--json").stdout)
    assert (again["name"], again["removed"]) == ("piper", [])

    assert "--check" in hostler(home, "engines", "remove", "piper", "--json").stderr
    [removed] = json.loads(hostler(home, "engines", "remove", "piper", "-y", "--json").stdout)
    assert removed["fingerprint"] == listed["fingerprint"]
    assert removed["freed_bytes"] > 0
    assert json.loads(hostler(home, "engines", "list", "--json").stdout) == []
    assert "No environment here is named 'piper'" in hostler(home, "engines", "remove", "piper", "-y").stderr


def test_the_command_line_says_what_an_installer_said(tmp_path: Path) -> None:
    done = hostler(tmp_path, "engines", "install", "piper", "--offline", "--find-links", str(tmp_path))
    assert done.returncode == 1
    assert "The environment of piper cannot be built: the installer ended with exit code 1" in done.stderr
    assert "There is no environment 'pipe'" in hostler(tmp_path, "engines", "install", "pipe").stderr
