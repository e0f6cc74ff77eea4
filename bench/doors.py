"""What stands in the middle: nothing, nginx, Hostler, and on demand gateways of others in environments of their own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from native import BENCH, START_LIMIT_S, Failed, Tools, child, descendants, pin, tail

ROOT = BENCH.parent
KEY = secrets.token_hex(16)
HOST = "127.0.0.1"
INSTALL_LIMIT_S = 900

NGINX = """\
daemon off;
master_process off;
worker_processes 1;
error_log {folder}/error.log;
pid {folder}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    upstream engine {{
        server {upstream};
        keepalive 1024;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        client_max_body_size 0;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Setting:
    """What doors are started with."""

    tools: Tools
    engine_port: int
    engine_socket: str
    engine_core: int | None
    door_core: int | None
    folder: Path


@dataclass(frozen=True)
class Running:
    """A door that serves."""

    port: int
    pid: int | None  # None: there is nothing in the middle
    engines: dict[str, tuple[int | None, str | None]]  # by model: port or socket of who answers for it
    start_s: float = 0.0  # from exec to its first 200

    def processes(self) -> list[psutil.Process]:
        """All of the door, without engines."""
        if self.pid is None:
            return []
        return [psutil.Process(self.pid), *(one for one in descendants(self.pid) if not is_engine(one))]


Start = Callable[[Setting], AbstractContextManager[Running]]


@dataclass(frozen=True)
class Target:
    """A door, and what is asked of it."""

    name: str
    start: Start
    model: str = "mock"
    shares: str = ""  # targets of one such name are asked of one running door
    rebuilds: bool = False  # it writes replies anew, so that their bytes differ
    cells: tuple[str, ...] = ()  # what it can be measured in; empty: everything
    is_ours: bool = False
    rests: bool = False  # it is stopped while others are measured, since it looks after its engine all the time


def is_engine(process: psutil.Process) -> bool:
    """Whether it is a mock engine."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "mock_engine"
    return False


def free_port() -> int:
    """Free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def ask(port: int, path: str, key: str = "", unix: str | None = None) -> tuple[int, bytes]:
    """One GET."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    if unix:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(5)
        connection.sock.connect(unix)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def counted(running: Running, model: str) -> dict[str, int]:
    """What the engine behind a door has counted."""
    port, unix = running.engines[model]
    status, body = ask(port or 80, "/stats", unix=unix)
    if status != 200:
        raise Failed(f"the engine answers /stats with {status}")
    found: dict[str, int] = json.loads(body)
    return found


def until_200(process: subprocess.Popen[bytes], log: Path, port: int, path: str, since: float) -> float:
    """Seconds from `since` to the first 200."""
    said = "nothing"
    while time.monotonic() < since + START_LIMIT_S and process.poll() is None:
        try:
            status, body = ask(port, path, KEY)
            if status == 200:
                return time.monotonic() - since
            said = f"{status} {body[:300].decode(errors='replace')}"
        except (OSError, http.client.HTTPException) as exc:
            said = str(exc)
        time.sleep(0.002)
    raise Failed(f"{path} gave no 200 but {said}; the last lines of the log:\n{tail(log)}")


# Nothing, and nginx


@contextlib.contextmanager
def direct(setting: Setting) -> Iterator[Running]:
    """The engine itself."""
    yield Running(setting.engine_port, None, {"mock": (setting.engine_port, None)})


def nginx(*, unix: bool) -> Start:
    """One process, nothing buffered, connections to the engine kept."""

    @contextlib.contextmanager
    def start(setting: Setting) -> Iterator[Running]:
        folder = fresh_folder(setting, "nginx")
        port, log, settings = free_port(), folder / "log", folder / "nginx.conf"
        upstream = f"unix:{setting.engine_socket}" if unix else f"{HOST}:{setting.engine_port}"
        settings.write_text(NGINX.format(folder=folder, port=port, upstream=upstream))
        since = time.monotonic()
        with child(["nginx", "-p", folder, "-c", settings], log, core=setting.door_core) as process:
            start_s = until_200(process, log, port, "/health", since)
            yield Running(port, process.pid, {"mock": (setting.engine_port, None)}, start_s)

    return start


# Hostler


def hostler(root: Path = ROOT, **more: Any) -> Start:
    """As users run it, with a key, metrics and two models, one over a Unix socket and one over TCP."""

    @contextlib.contextmanager
    def start(setting: Setting) -> Iterator[Running]:
        folder = fresh_folder(setting, "hostler")
        port, log, settings = free_port(), folder / "log", folder / "settings.json"
        settings.write_text(json.dumps(hostler_settings(setting.tools, folder) | {"port": port} | more))
        env = {name: value for name, value in os.environ.items() if not name.startswith("HOSTLER_")}
        env["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'gateway' / 'sdk'}"
        argv = [sys.executable, "-P", "-m", "gateway.cli", "serve", "-c", settings]
        since = time.monotonic()
        with child(argv, log, env, setting.door_core) as process:
            start_s = until_200(process, log, port, "/health", since)
            until_200(process, log, port, "/ready", since)
            replicas = json.loads(ask(port, "/v1/replicas", KEY)[1])
            for one in descendants(process.pid):
                if is_engine(one):
                    pin(one.pid, setting.engine_core)
            yield Running(port, process.pid, {one["uid"]: engine_at(one["address"]) for one in replicas}, start_s)

    return start


def hostler_settings(tools: Tools, folder: Path) -> dict[str, Any]:
    """Both ways to an engine; with a key; no line per request, as with nginx."""
    env = {"API_KEY": "{api_key}"}

    def model(*words: str) -> dict[str, Any]:
        options = {"command": [str(tools.engine), *words], "env": env}
        return {"model_engine": "command", "options": options, "preload": True, "memory": "64MiB"}

    return {
        "home": str(folder / "home"),
        "api_keys": [KEY],
        "access_log": False,
        "on_exit": "stop",
        "models": {"mock-tcp": model("--tcp", "{port}"), "mock-unix": model("--unix", "{socket}")},
    }


def engine_at(address: str) -> tuple[int | None, str | None]:
    """Port or socket, from what /v1/replicas says."""
    if address.startswith("unix:"):
        return None, address.removeprefix("unix:")
    return int(address.rpartition(":")[2]), None


def doors_of(root: Path) -> list[str]:
    """The values that the setting `door` has in a checkout; none where there is no such setting."""
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'gateway' / 'sdk'}"}
    argv = [sys.executable, "-P", "-m", "gateway.cli", "config", "schema"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=START_LIMIT_S)
    if done.returncode:
        raise Failed(f"`hostler config schema` in {root}: {done.stderr.strip()}")
    schema = json.loads(done.stdout)
    properties = schema.get("properties") or schema["$defs"]["Settings"]["properties"]
    values: list[str] = properties.get("door", {}).get("enum", [])
    return values


# Those of others


def peer(name: str, folder: Path) -> Target:
    """Installed at first use into an environment of its own below `folder`."""
    known = PEERS[name]

    @contextlib.contextmanager
    def start(setting: Setting) -> Iterator[Running]:
        binary = installed(known.package, folder) / "bin"
        port = free_port()
        place = fresh_folder(setting, name)
        log = place / "log"
        argv = known.argv(binary, place, port, f"http://{HOST}:{setting.engine_port}")
        since = time.monotonic()
        with child(argv, log, os.environ | known.env, setting.door_core) as process:
            start_s = until_200(process, log, port, known.ready, since)
            time.sleep(known.settle_s)
            yield Running(port, process.pid, {"mock": (setting.engine_port, None)}, start_s)

    return Target(name, start, rebuilds=known.rebuilds, cells=known.cells, rests=True)


def installed(package: str, folder: Path) -> Path:
    """The environment that has it."""
    place = folder / package.replace("[", "-").replace("]", "")
    done = place / ".installed"
    if not done.exists():
        print(f"installing {package} into {place}", file=sys.stderr)
        venv.create(place, with_pip=True, clear=True)
        argv = [str(place / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", package]
        result = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
        if result.returncode:
            raise Failed(f"{package} cannot be installed: {result.stderr[-1000:]}")
        done.touch()
    return place


@dataclass(frozen=True)
class Peer:
    """How one is installed and started."""

    package: str
    argv: Callable[[Path, Path, int, str], list[str]]  # of its programs, a folder for files, its port, the engine's URL
    ready: str
    env: dict[str, str] = field(default_factory=dict)
    settle_s: float = 1.0
    rebuilds: bool = False
    cells: tuple[str, ...] = ()


def _vllm_router(binary: Path, folder: Path, port: int, engine: str) -> list[str]:
    argv = [str(binary / "vllm-router"), "--host", HOST, "--port", str(port), "--worker-urls", engine]
    return [*argv, "--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())]


def _sglang_router(binary: Path, folder: Path, port: int, engine: str) -> list[str]:
    argv = [str(binary / "python"), "-m", "sglang_router.launch_router", "--host", HOST, "--port", str(port)]
    argv += ["--worker-urls", engine, "--policy", "round_robin", "--log-level", "error"]
    return [*argv, "--prometheus-port", str(free_port())]


def _litellm(binary: Path, folder: Path, port: int, engine: str) -> list[str]:
    params = {"model": "openai/mock", "api_base": f"{engine}/v1", "api_key": "none"}
    settings = folder / "litellm.json"
    settings.write_text(json.dumps({"model_list": [{"model_name": "mock", "litellm_params": params}]}))
    argv = [str(binary / "litellm"), "--config", str(settings), "--host", HOST, "--port", str(port)]
    return [*argv, "--num_workers", "1", "--telemetry", "False"]


PEERS = {
    "vllm-router": Peer("vllm-router==0.1.17", _vllm_router, "/v1/models"),
    "sglang-router": Peer("sglang-router==0.3.2", _sglang_router, "/v1/models"),
    "litellm": Peer(
        "litellm[proxy]==1.74.9",
        _litellm,
        "/health/liveliness",
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"},
        rebuilds=True,
        cells=("c1", "c16", "c64"),
    ),
}


def fresh_folder(setting: Setting, name: str) -> Path:
    """Empty, and not used by another start."""
    folder = setting.folder / f"{name}-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def both(name: str, start: Start) -> list[Target]:
    """One gateway, asked for the model over TCP and for the one over a Unix socket."""
    tcp = Target(name, start, "mock-tcp", shares=name, is_ours=True)
    return [tcp, replace(tcp, name=f"{name}, Unix socket", model="mock-unix")]


def all_targets(peers: list[str], peer_folder: Path, trees: list[Path], settings: list[dict[str, Any]]) -> list[Target]:
    """In the order of the tables. `trees` are further checkouts; `settings`, with what ours is started once more."""
    targets = [Target("direct", direct)]
    if not shutil.which("nginx"):
        raise Failed("nginx is the reference, and not on PATH: install it (Debian: nginx-light).")
    targets += [Target("nginx", nginx(unix=False)), Target("nginx, Unix socket", nginx(unix=True))]
    for tree in [ROOT, *trees]:
        name = "hostler" if tree == ROOT else f"hostler in {tree.name}"
        ways_in = doors_of(tree)
        targets += both(name, hostler(tree, **({"door": "auto"} if "auto" in ways_in else {})))
        if "plain" in ways_in:
            targets += both(f"{name}, plain door", hostler(tree, door="plain"))
    for more in settings:
        targets += both(f"hostler with {', '.join(f'{key}={value}' for key, value in more.items())}", hostler(**more))
    return [*targets, *(peer(name, peer_folder) for name in peers)]
