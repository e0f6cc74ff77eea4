"""The fake engine really misbehaves as it says: otherwise the tests that lean on it prove nothing."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
CHAT = {"model": "m", "messages": [{"role": "user", "content": "say something"}]}
KEY = {"Authorization": "Bearer secret"}


class Fake:
    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process = process
        self.port = port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def get(self, path: str, headers: dict = KEY) -> tuple[int, bytes]:
        return self.call("GET", path, None, headers)

    def post(self, path: str, body: dict, headers: dict = KEY) -> tuple[int, bytes]:
        return self.call("POST", path, json.dumps(body), headers)

    def call(self, method: str, path: str, body: str | None, headers: dict) -> tuple[int, bytes]:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def spawn(behaviour: dict, *flags: str) -> subprocess.Popen:
    argv = [
        FAKE_ENGINE,
        "--model",
        "m.gguf",
        "--api-key",
        "secret",
        "--alias",
        "m",
        "--parallel",
        "4",
        *flags,
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "FAKE_ENGINE": json.dumps(behaviour)}
    return subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, start_new_session=True)


@contextmanager
def fake(**behaviour: object) -> Iterator[Fake]:
    process = spawn(behaviour, "--host", "127.0.0.1", "--port", "0")
    try:
        line = process.stderr.readline().decode()
        yield Fake(process, int(re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)[1]))
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stderr.close()


def events_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_of(path: Path) -> list[str]:
    return [event["event"] for event in events_of(path)]


def until(is_so: Callable[[], bool], limit_s: float = 5.0) -> None:
    limit = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < limit, "it did not come to pass"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_answers_in_the_shapes_of_openai() -> None:
    with fake(tokens=3) as engine:
        status, body = engine.post("/v1/chat/completions", CHAT)
        choice = json.loads(body)["choices"][0]
        assert (status, choice["message"]["content"], choice["finish_reason"]) == (
            200,
            "tok0 tok1 tok2",
            "stop",
        )
        assert json.loads(body)["usage"]["completion_tokens"] == 3
        status, body = engine.post("/v1/embeddings", {"input": ["a", "b"]})
        vectors = [item["embedding"] for item in json.loads(body)["data"]]
        assert [len(vector) for vector in vectors] == [8, 8]
        assert vectors[0] != vectors[1]
        assert json.loads(engine.get("/v1/models")[1])["data"][0]["id"] == "m"
        assert engine.post("/v1/nothing", CHAT)[0] == 404
        assert engine.post("/v1/completions", {})[0] == 500


def test_streams_words_usage_and_done() -> None:
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    with fake(tokens=3) as engine:
        status, body = engine.post("/v1/chat/completions", asked)
    events = body.decode().split("\n\n")
    assert (status, events[-2:]) == (200, ["data: [DONE]", ""])
    *chunks, used = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    words = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert words == ["tok0", " tok1", " tok2", ""]
    assert used["usage"]["completion_tokens"] == 3


def test_asks_for_the_key_as_llama_server_does() -> None:
    with fake() as engine:
        assert engine.get("/health", {})[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            status, body = engine.get("/v1/models", headers)
            assert (status, json.loads(body)["error"]["type"]) == (401, "authentication_error")


def test_keeps_a_connection_and_takes_a_chunked_body() -> None:
    with fake() as engine:
        connection = engine.connect()
        for _ in range(3):
            body = iter([json.dumps(CHAT).encode()[:20], json.dumps(CHAT).encode()[20:]])
            connection.request("POST", "/v1/chat/completions", body, KEY, encode_chunked=True)
            assert connection.getresponse().read().startswith(b"{")
        connection.request("GET", "/requests", headers=KEY)
        received = json.loads(connection.getresponse().read())
        assert [request["path"] for request in received] == ["/v1/chat/completions"] * 3
        connection.request("GET", "/busy")
        assert json.loads(connection.getresponse().read())["connections"] == 1
        connection.close()


def test_closes_connections_on_request() -> None:
    with fake(close_connections=True) as engine:
        connection = engine.connect()
        connection.request("GET", "/health")
        response = connection.getresponse()
        assert (response.getheader("connection"), response.read()) == ("close", b'{"status":"ok"}')
        connection.close()
    with fake(keep_alive_s=0.1) as engine, socket.create_connection(("127.0.0.1", engine.port), 5) as idle:
        assert idle.recv(1) == b""


def test_listens_on_a_unix_socket_and_replaces_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "e.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    process = spawn({}, "--host", str(path))
    try:
        assert str(path).encode() in process.stderr.readline()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(path))
            client.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    finally:
        end(process)


def test_is_late_or_never_ready() -> None:
    with fake(ready_after_s=0.5) as engine:
        status, body = engine.get("/health", {})
        assert (status, json.loads(body)["error"]["message"]) == (503, "Loading model")
        until(lambda: engine.get("/health")[0] == 200)
    with fake(never_ready=True) as engine:
        assert engine.get("/health")[0] == 503


def test_exits_at_start_with_the_code_and_three_lines() -> None:
    process = spawn({"exit_at_start": 7})
    _, error = process.communicate(timeout=10)
    assert (process.returncode, len(error.splitlines())) == (7, 3)


def test_the_first_starts_fail_and_then_it_works(tmp_path: Path) -> None:
    behaviour = {"exit_before_ready_times": 2, "counter_file": str(tmp_path / "starts")}
    for _ in range(2):
        process = spawn(behaviour)
        process.communicate(timeout=10)
        assert process.returncode == 1
    with fake(**behaviour) as engine:
        assert engine.get("/health")[0] == 200


def test_an_unknown_key_is_refused() -> None:
    process = spawn({"no_such_key": 1})
    _, error = process.communicate(timeout=10)
    assert process.returncode == 1
    assert b"no_such_key" in error


def test_dies_as_a_request_arrives_but_only_the_first_process(tmp_path: Path) -> None:
    behaviour = {"die_after_requests": 2, "die_only_first": True, "counter_file": str(tmp_path / "starts")}
    with fake(**behaviour) as engine:
        assert engine.post("/v1/chat/completions", CHAT)[0] == 200
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            engine.post("/v1/chat/completions", CHAT)
        assert engine.process.wait(5) == -signal.SIGKILL
    with fake(**behaviour) as engine:
        assert [engine.post("/v1/chat/completions", CHAT)[0] for _ in range(3)] == [200] * 3


def test_dies_in_a_stream_with_half_an_event() -> None:
    with fake(die_after_tokens=2, half_event=True) as engine:
        with pytest.raises(http.client.IncompleteRead) as caught:
            engine.post("/v1/chat/completions", {**CHAT, "stream": True})
        whole = [event for event in caught.value.partial.split(b"\n\n") if event.endswith(b"}")]
        assert len(whole) == 2
        assert not caught.value.partial.endswith(b"\n\n")
        assert engine.process.wait(5) == -signal.SIGKILL


def test_dies_in_the_middle_of_a_body() -> None:
    with fake(exit_mid_body=True, huge_body_bytes=1_000_000) as engine:
        with pytest.raises(http.client.IncompleteRead) as caught:
            engine.post("/v1/chat/completions", CHAT)
        assert len(caught.value.partial) > 400_000
        assert engine.process.wait(5) == -signal.SIGKILL


def test_sees_at_once_that_the_client_has_left(tmp_path: Path) -> None:
    log = tmp_path / "events"
    with fake(tokens=1000, token_delay_s=0.05, events_file=str(log)) as engine:
        connection = engine.connect()
        request = json.dumps({**CHAT, "stream": True})
        connection.request("POST", "/v1/chat/completions", request, {**KEY, "X-Request-ID": "r1"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        assert json.loads(engine.get("/busy")[1])["busy"] == 1
        left = time.time()
        response.close()
        connection.close()
        until(lambda: "client_gone" in names_of(log))
        assert json.loads(engine.get("/busy")[1])["busy"] == 0
    assert names_of(log) == ["start", "listening", "request", "client_gone"]
    *_, request, gone = events_of(log)
    assert (request["id"], request["model"], request["path"]) == ("r1", "m", "/v1/chat/completions")
    assert gone["time"] - left < 0.2


def test_more_requests_than_slots_wait_inside() -> None:
    with fake(n_slots=1, first_token_delay_s=0.3) as engine:
        connections = [engine.connect() for _ in range(3)]
        for connection in connections:
            connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), KEY)
        until(lambda: json.loads(engine.get("/busy")[1])["queued"] == 2)
        assert json.loads(engine.get("/busy")[1])["busy"] == 1
        assert [connection.getresponse().status for connection in connections] == [200] * 3


def test_fails_requests_as_asked() -> None:
    with fake(error_status=429, error_body={"error": {"message": "slow down"}}) as engine:
        status, body = engine.post("/v1/chat/completions", CHAT)
        assert (status, json.loads(body)["error"]["message"]) == (429, "slow down")


def test_sleeps_and_answers_garbage_if_it_is_woken_in_the_wrong_order(tmp_path: Path) -> None:
    with fake(can_sleep=True, events_file=str(tmp_path / "events")) as engine:

        def is_sleeping() -> bool:
            return json.loads(engine.get("/is_sleeping", {})[1])["is_sleeping"]

        def says() -> str:
            return json.loads(engine.post("/v1/chat/completions", CHAT)[1])["choices"][0]["message"]["content"]

        for wakes in (["/wake_up"], ["/wake_up?tags=weights", "/wake_up?tags=kv_cache"]):
            assert engine.post("/sleep?level=1", {}, {})[0] == 200
            assert is_sleeping()
            assert engine.get("/health")[0] == 200
            assert [engine.post(path, {}, {})[0] for path in wakes] == [200] * len(wakes)
            assert not is_sleeping()
            assert says().startswith("tok0")
        engine.post("/sleep?level=2", {}, {})
        engine.post("/collective_rpc", {"method": "reload_weights"}, {})  # there is nowhere to put them yet
        engine.post("/wake_up", {}, {})
        assert says().startswith("garbage")
        engine.post("/sleep?level=2", {}, {})
        engine.post("/wake_up?tags=weights", {}, {})
        engine.post("/collective_rpc", {"method": "reload_weights"}, {})
        assert is_sleeping()
        engine.post("/wake_up?tags=kv_cache", {}, {})
        assert says().startswith("tok0")
    assert "asked_asleep" not in names_of(tmp_path / "events")
    with fake() as engine:
        assert engine.post("/sleep", {})[0] == 404


def test_is_slow_to_sleep_for_the_first_time_and_fails_to_as_asked() -> None:
    with fake(can_sleep=True, first_sleep_s=0.5, sleep_fails=1, wake_fails=1) as engine:
        assert engine.post("/sleep?level=1", {}, {})[0] == 500
        took_s = []
        for wakes in ([500, 200], [200]):
            began = time.monotonic()
            assert engine.post("/sleep?level=1", {}, {})[0] == 200
            took_s.append(time.monotonic() - began)
            assert [engine.post("/wake_up", {}, {})[0] for _ in wakes] == wakes
        assert took_s[0] >= 0.5 > took_s[1]


def test_term_ends_it_at_once_when_idle_and_drains_otherwise(tmp_path: Path) -> None:
    with fake() as engine:
        engine.get("/health")
        sent = time.monotonic()
        engine.process.terminate()
        assert engine.process.wait(5) == 0
        assert time.monotonic() - sent < 0.5
    log = tmp_path / "events"
    with fake(first_token_delay_s=0.5, events_file=str(log)) as engine:
        connection = engine.connect()
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), KEY)
        until(lambda: "request" in names_of(log))
        engine.process.terminate()
        assert connection.getresponse().status == 200
        assert engine.process.wait(5) == 0
    assert names_of(log)[-4:] == ["request", "term", "done", "exit"]


def test_can_ignore_term_and_leave_grandchildren(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with fake(ignore_term=True, grandchild=True, grandchild_file=str(pids)) as engine:
        plain, deaf = json.loads(pids.read_text())
        try:
            assert os.getpgid(plain) == os.getpgid(deaf) == engine.process.pid
            os.killpg(engine.process.pid, signal.SIGTERM)
            until(lambda: not is_alive(plain))
            assert engine.get("/health")[0] == 200
            assert is_alive(deaf)
        finally:
            os.killpg(engine.process.pid, signal.SIGKILL)
        until(lambda: not is_alive(deaf))
