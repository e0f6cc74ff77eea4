"""What must stay true of the tree: which way imports point, what an import costs, that the examples work."""

from __future__ import annotations

import ast
import configparser
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import engines
from gateway.cli import VERBS, module_of
from gateway.config import Settings, load
from gateway.fleet import available_engines, plan_declared
from registry.decode import schema
from registry.registry import Registry

ROOT = Path(__file__).parents[1]
PACKAGES = ("registry", "engines", "gateway")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# package -> the packages of ours that it may import
PACKAGE_MAY_IMPORT = {
    "registry": {"registry"},
    "engines": {"engines", "registry"},
    "gateway": {"gateway", "engines", "registry"},
}

# Inside the gateway: a part may import those of the lines above its own. A package counts as one part.
GATEWAY_LAYERS = (
    ("amounts", "sentences", "limits", "keeper", "known_head", "pace", "question", "stand_in", "yaml_text"),
    ("connections", "passed_on"),
    ("addresses", "errors", "events", "files", "gpus", "metrics", "near", "queue", "launch"),
    ("upstream",),
    ("calls", "causes", "crowd", "handover", "watchdog"),
    ("client", "async_client", "choice", "placement", "probe", "process", "store"),
    ("history", "lives"),
    ("config", "sdk", "kept", "home"),
    ("apply",),
    ("export",),
    ("footprint",),
    ("devices",),
    ("experience",),
    ("sizing",),
    ("downloads", "environments", "nodes"),
    ("yard",),
    ("tiers",),
    ("plan",),
    ("replica",),
    ("outlook",),
    ("deployment",),
    ("dispatch",),
    ("reload",),
    ("fleet",),
    ("watch",),
    ("room",),
    ("check",),
    ("api",),
    ("app",),
    ("door",),
    ("server",),
    ("cli",),
)

# Leaves: all of the gateway that they may know.
LEAF_MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "gpus": {"question"},
    "metrics": set(),
    "config": {"addresses", "amounts", "calls", "errors", "launch", "yaml_text"},
    "apply": {"config"},
    "export": {"apply", "config", "launch"},
}

HEAVY = ("torch", "transformers", "vllm", "diffusers", "numpy", "xllamacpp", "huggingface_hub", "pynvml", "llama_cpp")

# What a gateway that serves no model yet has no use for: each takes a MiB or more, or ten milliseconds of the start.
LATER = ("aiohttp", "psutil", "yaml", "packaging", "encodings.idna", "pip", "rich", "gateway.client")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """The full names of what a module imports, wherever in it, but for types alone."""
    return set(imported_names(ast.parse(path.read_text()), path))


def imported_names(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for other in node.orelse:
            yield from imported_names(other, path)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        package = path.relative_to(ROOT).parent.parts
        above = package[: len(package) - node.level + 1] if node.level else ()
        origin = ".".join((*above, *filter(None, [node.module])))
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported_names(child, path)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def of_gateway(names: set[str]) -> set[str]:
    """The parts of the gateway among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("gateway.")}


def in_fresh_interpreter(code: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOSTLER_")}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- which way imports point


def test_the_walk_sees_late_imports_and_passes_over_those_for_types_alone(tmp_path: Path) -> None:
    path = ROOT / "gateway" / "api" / "imaginary.py"  # never written
    text = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    from ..fleet import Fleet\nimport c.d\n"
    assert set(imported_names(ast.parse(text), path)) == {"b", "gateway.fleet.Fleet", "c.d"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_packages_import_only_downwards(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imports_of(path)} & set(PACKAGES)
    assert ours <= PACKAGE_MAY_IMPORT[package]


@pytest.mark.parametrize("path", sorted((ROOT / "engines" / "workers").glob("*.py")), ids=module_name)
def test_workers_import_nothing_of_ours_but_their_own_package(path: Path) -> None:
    ours = {name for name in imports_of(path) if name.split(".")[0] in PACKAGES}
    assert not {name for name in ours if not is_in(name, "engines.workers")}


@pytest.mark.parametrize("path", sorted((ROOT / "gateway").rglob("*.py")), ids=module_name)
def test_the_gateway_imports_only_downwards(path: Path) -> None:
    parts = module_name(path).split(".")
    if len(parts) == 1:
        assert not of_gateway(imports_of(path))  # gateway/__init__.py
        return
    part = parts[1]
    layer_of = {name: layer for layer, names in enumerate(GATEWAY_LAYERS) for name in names}
    assert part in layer_of, f"gateway/{part} is new: give it a line in GATEWAY_LAYERS"
    imported = of_gateway(imports_of(path)) - {part}
    assert not {other for other in imported if layer_of[other] >= layer_of[part]}
    if part in LEAF_MAY_IMPORT:
        assert imported <= LEAF_MAY_IMPORT[part]


def test_only_one_file_imports_nvml() -> None:
    importers = {module_name(path) for path in MODULES if any(is_in(n, "pynvml") for n in imports_of(path))}
    assert importers == {"gateway.gpus"}


# --- what an import costs


def test_importing_the_app_loads_no_engine_and_no_hub() -> None:
    loaded = in_fresh_interpreter("import gateway.app, sys; print(*sys.modules)").split()
    assert "gateway.app" in loaded
    assert not set(HEAVY) & set(loaded)


def test_a_gateway_without_models_loads_nothing_that_only_models_need(tmp_path: Path) -> None:
    """From its start to its first answer."""
    code = f"""
import asyncio, os, signal, sys
from gateway.cli import serve

async def look(fleet, address, prompt):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    writer.write(b"GET /v1/models HTTP/1.1\\r\\nhost: localhost\\r\\n\\r\\n")
    print("LOADED", await asyncio.wait_for(reader.readline(), 20), *sys.modules, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

serve._greet = look
serve.command(["--port", "0", "--home", {str(tmp_path)!r}])
"""
    loaded = in_fresh_interpreter(code).partition("LOADED")[2].split()
    assert "200" in loaded[:3]
    assert {"gateway.server", "gateway.upstream", "uvicorn.server"} <= set(loaded)
    assert {*LATER, *HEAVY} & set(loaded) == set()


def test_help_loads_no_server_and_no_http_client() -> None:
    code = """
import sys
from gateway.cli import main
sys.argv = ["hostler", "--help"]
try:
    main()
finally:
    print("LOADED", *sys.modules)
"""
    loaded = in_fresh_interpreter(code).partition("LOADED")[2].split()
    assert "gateway.cli" in loaded
    assert not {"aiohttp", "starlette", "uvicorn", "gateway.app", *HEAVY} & set(loaded)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_module_with_its_command(verb: str) -> None:
    assert importlib.import_module(module_of(verb)).command.name == verb


# --- what must be there


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def example_configs() -> list[Path]:
    files = sorted(path for path in (ROOT / "configs").iterdir() if path.suffix in (".yaml", ".yml", ".toml", ".json"))
    return [path for path in files if not path.name.endswith(".schema.json")]


def test_there_are_example_configs() -> None:
    assert example_configs()


def test_the_example_of_a_service_leaves_engines_alone_and_waits_for_requests_in_flight() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "configs" / "hostler.service")
    service = unit["Service"]
    assert service["KillMode"] == "process"
    assert int(service["TimeoutStopSec"]) > Settings().drain_timeout_s + 10
    words = service["ExecStart"].split()
    assert words[1] in VERBS


@pytest.mark.parametrize("path", example_configs(), ids=lambda path: path.name)
def test_an_example_config_is_right_and_all_its_models_can_be_planned(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a-key\n")
    text = re.sub(r"\$\{file:[^}]+\}", f"${{file:{secret}}}", path.read_text())
    copy = tmp_path / path.name
    copy.write_text(text)
    environment = {
        name: "/models" if re.search("PATH|DIR|FOLDER|HOME|MODELS", name) else "8080"
        for name in re.findall(r"\$\{(?!file:)([^}:]+)", text)
    }
    if "api_keys_file" in text:
        environment["HOSTLER_API_KEYS_FILE"] = str(secret)

    settings = load(str(copy), {}, environment)
    available_engines(settings)  # the engines' names are right; their programs need not be on this machine
    launches = plan_declared(settings, Registry.builtin(), engines.available())

    assert [launch.uid for launch in launches] == list(settings.models)


def test_the_schema_for_editors_is_that_of_the_settings() -> None:
    path = ROOT / "configs" / "settings.schema.json"
    if not path.exists():
        pytest.skip("there is no configs/settings.schema.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(schema(Settings)))
