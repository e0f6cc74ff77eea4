"""Real servers on this machine for the hubs, and the fetch program run as the gateway runs it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import msgspec

import registry
from registry.schema import Source

ROOT = Path(registry.__file__).parent.parent
LIMIT_S = 60


@dataclass
class Answer:
    """What a server gives for a path: held back after the first half until `gate` opens. Knows `Range: bytes=n-`."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    gate: threading.Event | None = None
    half_sent: threading.Event = field(default_factory=threading.Event)


class Server:
    """An HTTP server on 127.0.0.1 that gives `answers` and counts who asked for what.

    A path with a query is looked up as it was asked, then without its query.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._give(with_body=False)

            def do_GET(self) -> None:
                self._give(with_body=True)

            def _give(self, *, with_body: bool) -> None:
                path = self.path if self.path in server.answers else self.path.partition("?")[0]
                server.asked[f"{self.command} {path}"] += 1
                server.headers[path] = dict(self.headers)
                answer = server.answers.get(path, Answer(status=404))
                body, status, headers = answer.body, answer.status, dict(answer.headers)
                begin = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
                if begin and status == 200:
                    status = 206
                    headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
                    body = body[int(begin) :]
                self.send_response(status)
                headers = {"Content-Length": str(len(body))} | headers
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if not with_body:
                    return
                try:
                    half = len(body) // 2
                    self.wfile.write(body[:half])
                    self.wfile.flush()
                    answer.half_sent.set()
                    if answer.gate:
                        answer.gate.wait(LIMIT_S)
                    self.wfile.write(body[half:])
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        for answer in self.answers.values():
            if answer.gate:
                answer.gate.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(LIMIT_S)


class Index:
    """A package index (PEP 503) on `server`."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def add(self, file_name: str, content: bytes, *, sha256: str | None = None) -> Answer:
        """Offer a file, with the hash that the index claims for it; returns what its path answers."""
        name = file_name.split("-")[0].replace("_", "-")
        claimed = sha256 or hashlib.sha256(content).hexdigest()
        page = self.server.answers.setdefault(
            f"/simple/{name}/", Answer(b"<!DOCTYPE html><html><body>", headers={"Content-Type": "text/html"})
        )
        page.body += f'<a href="/files/{file_name}#sha256={claimed}">{file_name}</a>\n'.encode()
        answer = self.server.answers[f"/files/{file_name}"] = Answer(content)
        return answer

    def downloads(self, file_name: str) -> int:
        return self.server.asked[f"GET /files/{file_name}"]

    @property
    def env(self) -> dict[str, str]:
        return {"PIP_INDEX_URL": f"{self.server.url}/simple", "PIP_CONFIG_FILE": os.devnull}


def make_wheel(
    members: dict[str, bytes],
    *,
    name: str = "tiny_model",
    version: str = "1.0",
    record: dict[str, str] | None = None,
) -> bytes:
    """A wheel of these members. `record` replaces what RECORD says of some of them ("" leaves one out)."""
    info = f"{name}-{version}.dist-info"
    members = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, content in members.items():
        value = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        line = (record or {}).get(path, f"{path},sha256={value},{len(content)}")
        lines += [line] if line else []
    members[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,\n"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in members.items():
            archive.writestr(path, content)
    return buffer.getvalue()


WHEEL = "tiny_model-1.0-py3-none-any.whl"


COMMIT = "b" * 40


class HuggingFace:
    """Repositories on `server`, as huggingface_hub asks for them."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def add(
        self, files: dict[str, bytes], *, name: str = "owner/tiny", commit: str = COMMIT, revision: str = "main"
    ) -> None:
        api, answers = f"/api/models/{name}", self.server.answers
        info = {
            "id": name,
            "sha": commit,
            "siblings": [{"rfilename": path, "size": len(content)} for path, content in files.items()],
        }
        tree = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        as_json = {"Content-Type": "application/json"}
        for path in {f"{api}/revision/{revision}", f"{api}/revision/{commit}"} | (
            {api} if revision == "main" else set()
        ):
            answers[path] = Answer(json.dumps(info).encode(), headers=as_json)
        answers[f"{api}/tree/{commit}"] = Answer(json.dumps(tree).encode(), headers=as_json)
        for path, content in files.items():
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
            answers[f"/{name}/resolve/{commit}/{path}"] = Answer(content, headers=headers)

    def refuse(self, name: str, status: int, code: str) -> None:
        self.server.answers[f"/api/models/{name}"] = Answer(status=status, headers={"X-Error-Code": code})

    def answer_of(self, path: str, *, name: str = "owner/tiny", commit: str = COMMIT) -> Answer:
        return self.server.answers[f"/{name}/resolve/{commit}/{path}"]

    def downloads(self, path: str, *, name: str = "owner/tiny", commit: str = COMMIT) -> int:
        return self.server.asked[f"GET /{name}/resolve/{commit}/{path}"]

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.server.url}


class ModelScope:
    """Repositories on `server`, as modelscope_hub asks for them."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def add(self, files: dict[str, bytes], *, revision: str = "master", name: str = "owner/tiny") -> None:
        listed = [
            {"Path": path, "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest(), "Type": "blob"}
            for path, content in files.items()
        ]
        api = f"/api/v1/models/{name}/repo"
        body = json.dumps({"Code": 200, "Data": {"Files": listed}}).encode()
        self.server.answers[f"{api}/files?Revision={revision}&Recursive=True"] = Answer(body)
        for path, content in files.items():
            self.server.answers[self.url_of(path, revision=revision, name=name)] = Answer(content)

    def url_of(self, path: str, *, revision: str = "master", name: str = "owner/tiny") -> str:
        return f"/api/v1/models/{name}/repo?Revision={revision}&FilePath={quote_plus(path)}"

    def answer_of(self, path: str, *, name: str = "owner/tiny") -> Answer:
        return self.server.answers[self.url_of(path, name=name)]

    def downloads(self, path: str, *, name: str = "owner/tiny") -> int:
        return self.server.asked[f"GET {self.url_of(path, name=name)}"]

    def refuse(self, status: int) -> None:
        self.server.answers["/api/v1/models/owner/tiny/repo/files"] = Answer(b"{}", status=status)

    @property
    def env(self) -> dict[str, str]:
        return {
            "MODELSCOPE_ENDPOINT": self.server.url,
            "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
        }


class Fetch:
    """One run of the fetch program in a process group of its own."""

    def __init__(self, source: Source, cache: Path, env: dict[str, str], **order: bool) -> None:
        request = msgspec.json.encode({"source": source, "cache": str(cache)} | order).decode()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "registry.hubs.fetch", request],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,
        )
        self.lines: list[dict[str, Any]] = []
        self.stderr = ""
        self._readers = [
            threading.Thread(target=self._read_stdout, daemon=True),
            threading.Thread(target=self._read_stderr, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_stdout(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def _read_stderr(self) -> None:
        assert self.process.stderr
        self.stderr = self.process.stderr.read()

    def wait_for_stage(self, stage: str) -> None:
        wait_until(lambda: any(line.get("stage") == stage for line in self.lines), f"stage {stage}")

    def end(self) -> dict[str, Any]:
        """Wait for the end; the last line."""
        code = self.process.wait(LIMIT_S)
        for reader in self._readers:
            reader.join(LIMIT_S)
        assert self.lines, self.stderr
        assert code == (0 if {"path", "files"} & set(self.lines[-1]) else 1), (self.lines, self.stderr)
        return self.lines[-1]

    def path(self) -> Path:
        last = self.end()
        assert "path" in last, (last, self.stderr)
        return Path(last["path"])

    def files(self) -> dict[str, int]:
        last = self.end()
        assert "files" in last, (last, self.stderr)
        return dict(last["files"])

    def lines_at_end(self) -> list[dict[str, Any]]:
        self.end()
        return self.lines

    def error(self, *, permanent: bool) -> str:
        last = self.end()
        assert last.get("permanent") is permanent, (last, self.stderr)
        return str(last["error"])

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, signal_number)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LIMIT_S)
        for reader in self._readers:
            reader.join(LIMIT_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()


StartFetch = Callable[..., Fetch]


def wait_until(is_so: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    ends_at = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < ends_at, f"{what}: not within {limit_s} s"
        time.sleep(0.02)
