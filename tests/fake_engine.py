#!/usr/bin/env python3
"""A stand-in for `llama-server`: a real process that serves, or misbehaves on request.

Knows llama-server's flags, routes, replies and errors as far as a gateway meets them, and one environment
variable of its own: FAKE_ENGINE, a JSON object with any of the keys of BEHAVIOUR. Standard library only.

    FAKE_ENGINE='{"ready_after_s": 1}' tests/fake_engine.py --model m.gguf --host 127.0.0.1 --port 0
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import time
import zlib
from collections import deque
from types import SimpleNamespace
from urllib.parse import parse_qs

BEHAVIOUR = {
    # Starting
    "listen_after_s": 0.0,  # the port opens this late
    "ready_after_s": 0.0,  # /health answers 503 until then, counted from the start of the process
    "never_ready": False,  # /health answers 503 for ever
    "exit_at_start": None,  # exit with this code after three lines on stderr
    "last_words": (),  # lines on stderr before it exits so
    "memory_for_tokens": None,  # with a larger --ctx-size it exits as llama-server does without memory
    "exit_if_full": None,  # exits where this folder has no room
    "exit_before_ready_times": 0,  # the first N starts exit with exit_code; needs counter_file
    "fail_file": None,  # a file with a number: so many starts more do not come to be ready; each takes one off
    # Dying. A 1 means the first one; None means never.
    "exit_after_s": None,  # exit with exit_code, counted from the start of the process
    "exit_code": 1,
    "die_after_requests": None,  # SIGKILL as the Nth inference request arrives, before any byte of a reply
    "die_after_tokens": None,  # SIGKILL in a stream, after N chunks
    "hang_after_requests": None,  # as the Nth inference request arrives, nothing is answered any more, not even /health
    "drop_after_requests": None,  # from the Nth inference request on, their connections are closed without a byte
    "half_event": False,  # ... and half an event first
    "exit_mid_body": False,  # not streamed: the head, half of the body, then SIGKILL
    "die_only_first": False,  # the dying above happens only in the first process; needs counter_file
    "counter_file": None,  # where starts are counted
    "lifetime_s": 900.0,  # nobody leaves one of these behind for longer
    # Stopping
    "ignore_term": False,
    "stop_delay_s": 0.0,  # it obeys so late
    "grandchild": False,  # two children in the same process group; the second one ignores SIGTERM
    "grandchild_file": None,  # a JSON list of their two pids
    # Answering
    "tokens": 8,  # chunks of a stream, words of a reply
    "first_token_delay_s": 0.0,
    "compute_s": 0.0,  # uses the processor for so long before each reply, and answers nobody meanwhile
    "token_delay_s": 0.0,
    "huge_body_bytes": 0,  # replies that are not streamed carry so many bytes of text
    "n_slots": 0,  # more requests than this wait inside; 0 is no limit
    "error_status": None,  # answers every inference request with this
    "error_body": None,  # ... and this, text or JSON
    "keep_alive_s": None,  # closes a connection that was idle for so long
    "close_connections": False,  # `Connection: close` on every reply
    # Holding
    "held_folder": None,  # of the played driver: there a file named by the pid says how much of which GPUs this holds
    "held_bytes": 0,  # evenly of those in CUDA_VISIBLE_DEVICES
    # Sleeping, as vLLM's server does
    "can_sleep": False,  # opens /sleep, /wake_up, /is_sleeping and /collective_rpc
    "first_sleep_s": 0.0,  # the first sleep that keeps the weights takes so much longer
    "sleep_s": 0.0,
    "wake_s": 0.0,
    "sleep_fails": 0,  # so many are answered with 500, and nothing is done
    "sleep_says": "made to fail by FAKE_ENGINE",  # with that
    "wake_fails": 0,
    "reload_garbles": 0,  # after so many, all goes well but for what is answered then
    # Telling
    "events_file": None,  # one JSON line for each event
}

FLAGS = {
    "-m": "model",
    "--model": "model",
    "--host": "host",
    "--port": "port",
    "-a": "alias",
    "--alias": "alias",
    "--ctx-size": "ctx_size",
    "--api-key": "api_key",
    "--api-key-file": "api_key_file",
}

GET = {"/health", "/v1/health", "/models", "/v1/models", "/busy", "/requests"}
OPEN = {"/health", "/v1/health", "/busy"}
SLEEPING = {"/sleep": "POST", "/wake_up": "POST", "/is_sleeping": "GET", "/collective_rpc": "POST"}
INFERENCE = {
    "/chat/completions": "chat",
    "/v1/chat/completions": "chat",
    "/completions": "text",
    "/v1/completions": "text",
    "/embeddings": "embeddings",
    "/v1/embeddings": "embeddings",
}
REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    503: "unavailable_error",
}
HEAD_LIMIT_BYTES = 64 * 1024
DRAIN_LIMIT_S = 5.0
STARTED = time.monotonic()


def main() -> int:
    if "--version" in sys.argv[1:]:
        print("version: 0 (fake)", file=sys.stderr)
        return 0
    behaviour = read_behaviour(os.environ.get("FAKE_ENGINE") or "{}")
    flags = read_flags(sys.argv[1:])
    events = Events(behaviour.events_file)
    if behaviour.held_folder is not None:
        hold(behaviour.held_folder, behaviour.held_bytes)
    start = count_start(behaviour.counter_file)
    events.add("start", start=start, argv=sys.argv[1:])
    for line in behaviour.last_words:
        say(line)
    if behaviour.exit_at_start is not None:
        return fail_to_load(flags.model, behaviour.exit_at_start)
    if behaviour.exit_if_full is not None and not shutil.disk_usage(behaviour.exit_if_full).free:
        return fail_to_load(flags.model, 1)
    if behaviour.memory_for_tokens is not None and int(flags.ctx_size) > behaviour.memory_for_tokens:
        say(f"ggml_aligned_malloc: insufficient memory (attempted to allocate {flags.ctx_size} tokens)")
        return fail_to_load(flags.model, 1)
    if behaviour.fail_file is not None and add_to(behaviour.fail_file, -1) >= 0:
        time.sleep(behaviour.ready_after_s)
        say("main: exiting, as FAKE_ENGINE asked for with fail_file")
        return behaviour.exit_code
    if start <= behaviour.exit_before_ready_times:
        return fail_to_load(flags.model, behaviour.exit_code)
    if behaviour.grandchild:
        spawn_grandchildren(behaviour.grandchild_file)
    engine = Engine(flags, behaviour, events, may_die=start == 1 or not behaviour.die_only_first)
    asyncio.run(engine.run())
    events.add("exit")
    return 0


def read_behaviour(text: str) -> SimpleNamespace:
    given = json.loads(text)
    unknown = sorted(given.keys() - BEHAVIOUR.keys())
    if unknown:
        sys.exit(f"FAKE_ENGINE has no key {', '.join(unknown)}; it knows {', '.join(BEHAVIOUR)}")
    behaviour = SimpleNamespace(**{**BEHAVIOUR, **given})
    if (behaviour.exit_before_ready_times or behaviour.die_only_first) and not behaviour.counter_file:
        sys.exit("FAKE_ENGINE: exit_before_ready_times and die_only_first need counter_file")
    return behaviour


def read_flags(argv: list[str]) -> SimpleNamespace:
    """As lenient as can be: a flag that is not in FLAGS is passed over, with its value."""
    flags = SimpleNamespace(
        model="", host="127.0.0.1", port="8080", alias="", ctx_size="0", api_key="", api_key_file=""
    )
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in FLAGS:
            setattr(flags, FLAGS[name], value if equals else next(words, ""))
    keys = flags.api_key or os.environ.get("LLAMA_API_KEY", "")
    if flags.api_key_file:
        with open(flags.api_key_file) as file:
            keys = ",".join([keys, *file.read().split()])
    flags.keys = {key for key in keys.split(",") if key}
    return flags


def count_start(path: str | None) -> int:
    """The number of this start among all that share the file, from 1."""
    return 1 if path is None else add_to(path, 1)


def add_to(path: str, amount: int) -> int:
    """The number in a file that several processes share, with this added to it; it is kept from 0 up."""
    import fcntl

    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        number = int(file.read() or 0) + amount
        file.truncate(0)
        file.write(str(max(0, number)))
    return number


def hold(folder: str, size_bytes: int) -> None:
    uuids = [uuid for uuid in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if uuid]
    path = os.path.join(folder, str(os.getpid()))
    with open(f"{path}.new", "w") as file:
        json.dump({uuid: size_bytes // len(uuids) for uuid in uuids}, file)
    os.replace(f"{path}.new", path)


def fail_to_load(model: str, code: int) -> int:
    say("build: 0 (fake)")
    say(f"llama_model_load: error loading model: {model}")
    say("main: exiting due to model loading error")
    return code


def spawn_grandchildren(path: str | None) -> None:
    """What a signal ignores here stays ignored in a child that is started meanwhile."""
    plain = os.posix_spawnp("sleep", ["sleep", "600"], os.environ)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf = os.posix_spawnp("sleep", ["sleep", "601"], os.environ)
    signal.signal(signal.SIGTERM, before)
    if path is not None:
        with open(f"{path}.new", "w") as file:
            json.dump([plain, deaf], file)
        os.replace(f"{path}.new", path)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Events:
    """Appends one line with one write, so that several processes can share the file."""

    def __init__(self, path: str | None) -> None:
        self.file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, event: str, **more: object) -> None:
        if self.file is not None:
            line = {"event": event, "pid": os.getpid(), "time": time.time(), **more}
            os.write(self.file, json.dumps(line).encode() + b"\n")


class Request:
    def __init__(self, method: str, path: str, version: str, headers: dict[str, str]) -> None:
        self.method = method
        self.path, _, query = path.partition("?")
        self.query = parse_qs(query)
        self.version = version
        self.headers = headers
        self.body = b""
        self.started = time.monotonic()

    def should_close(self) -> bool:
        connection = self.headers.get("connection", "").lower()
        return connection == "close" or (self.version == "HTTP/1.0" and connection != "keep-alive")


class Refused(Exception):
    """The request gets this error and no more."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        kind = ERROR_TYPES.get(status, "server_error")
        self.body = encode({"error": {"message": message, "type": kind, "code": status}})


class Engine:
    """What is true of the whole process; a Connection asks it for each request."""

    def __init__(self, flags: SimpleNamespace, behaviour: SimpleNamespace, events: Events, may_die: bool) -> None:
        self.flags = flags
        self.behaviour = behaviour
        self.events = events
        self.may_die = may_die
        self.open: set[Connection] = set()
        self.connections = 0
        self.received = 0
        self.busy = 0
        self.queued = 0
        self.requests: deque[dict[str, object]] = deque(maxlen=10_000)
        self.stopping = asyncio.Event()
        self.slots = asyncio.Semaphore(behaviour.n_slots or 1_000_000)
        self.sleeping_tags: set[str] = set()
        self.has_weights = True
        self.keeps_weights = False
        self.sleeps = 0
        self.awake = asyncio.Event()
        self.awake.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.term)
        loop.call_later(self.behaviour.lifetime_s, os._exit, 1)
        if self.behaviour.exit_after_s is not None and self.may_die:
            loop.call_later(self.behaviour.exit_after_s - age_s(), self.exit_early)
        if not await self.waits_for_stop(self.behaviour.listen_after_s):
            server = await self.listen()
            await self.stopping.wait()
            server.close()
            await self.drain()

    async def waits_for_stop(self, limit_s: float) -> bool:
        try:
            return await asyncio.wait_for(self.stopping.wait(), limit_s) if limit_s else False
        except TimeoutError:
            return False

    async def listen(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        host = self.flags.host
        if host.endswith(".sock"):
            if os.path.exists(host):
                os.unlink(host)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(host)
            server = await loop.create_unix_server(lambda: Connection(self), sock=sock, backlog=2048)
            address = f"unix:{host}"
        else:
            server = await loop.create_server(lambda: Connection(self), host, int(self.flags.port), backlog=2048)
            address = f"http://{host}:{server.sockets[0].getsockname()[1]}"
        say(f"main: server is listening on {address} - starting the main loop")
        self.events.add("listening", address=address)
        return server

    def term(self) -> None:
        self.events.add("term")
        if not self.behaviour.ignore_term:
            asyncio.get_running_loop().call_later(self.behaviour.stop_delay_s, self.stopping.set)

    async def drain(self) -> None:
        limit = time.monotonic() + DRAIN_LIMIT_S
        for connection in list(self.open):
            if not connection.is_at_work():
                connection.transport.close()
        while any(connection.is_at_work() for connection in self.open) and time.monotonic() < limit:
            await asyncio.sleep(0.01)

    def exit_early(self) -> None:
        say("main: exiting, as FAKE_ENGINE asked for with exit_after_s")
        self.events.add("exit")
        os._exit(self.behaviour.exit_code)

    def is_ready(self) -> bool:
        return not self.behaviour.never_ready and age_s() >= self.behaviour.ready_after_s

    async def answer(self, request: Request, connection: "Connection") -> None:
        try:
            self.check(request)
            if request.path in INFERENCE:
                await self.infer(request, connection)
            elif request.path in SLEEPING:
                await connection.reply(200, encode(await self.sleep_or_wake(request)))
            else:
                await connection.reply(200, encode(self.look_up(request.path)))
        except Refused as refused:
            await connection.reply(refused.status, refused.body)

    def check(self, request: Request) -> None:
        if request.path not in ("/health", "/v1/health", "/busy", "/requests"):
            self.requests.append({"method": request.method, "path": request.path, "headers": request.headers})
        is_open = request.path in OPEN or request.path in SLEEPING
        if not is_open and not self.has_key(request):
            raise Refused(401, "Invalid API Key")
        if not self.is_ready() and request.path not in ("/busy", "/requests"):
            raise Refused(503, "Loading model")
        if self.behaviour.can_sleep and SLEEPING.get(request.path) == request.method:
            return
        if not (request.path in GET if request.method == "GET" else request.path in INFERENCE):
            raise Refused(404, "File Not Found")

    def has_key(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return not self.flags.keys or (scheme == "Bearer" and key in self.flags.keys)

    async def sleep_or_wake(self, request: Request) -> object:
        """As vLLM: what makes no sense is answered with 200, and changes nothing."""
        behaviour = self.behaviour
        if request.path == "/is_sleeping":
            return {"is_sleeping": bool(self.sleeping_tags)}
        method = decode(request.body).get("method") if request.path == "/collective_rpc" else None
        level, tags = int(request.query.get("level", ["1"])[0]), request.query.get("tags")
        self.events.add(request.path, level=level, tags=tags, method=method, busy=self.busy)
        if request.path == "/sleep":
            if behaviour.sleep_fails:
                behaviour.sleep_fails -= 1
                raise Refused(500, behaviour.sleep_says)
            is_first, self.sleeps = not self.sleeps and level == 1, self.sleeps + 1
            await self.pause(behaviour.sleep_s + is_first * behaviour.first_sleep_s)
            self.sleeping_tags = {"weights", "kv_cache"}
            self.keeps_weights, self.has_weights = level == 1, False
            self.awake.clear()
        elif request.path == "/wake_up":
            if behaviour.wake_fails:
                behaviour.wake_fails -= 1
                raise Refused(500, "made to fail by FAKE_ENGINE")
            await self.pause(behaviour.wake_s)
            self.sleeping_tags -= set(tags or self.sleeping_tags)
            self.has_weights |= self.keeps_weights
            if not self.sleeping_tags:
                self.awake.set()
        elif method == "reload_weights":
            await self.pause(behaviour.wake_s)
            self.has_weights |= "weights" not in self.sleeping_tags and not behaviour.reload_garbles
            behaviour.reload_garbles = max(0, behaviour.reload_garbles - 1)
        self.events.add("slept" if self.sleeping_tags else "awake")
        return {}

    def look_up(self, path: str) -> object:
        if path.endswith("/health"):
            return {"status": "ok"}
        if path.endswith("/models"):
            model = {"id": self.flags.alias or self.flags.model, "object": "model", "created": 0}
            length = {"max_model_len": int(self.flags.ctx_size) or 4096}  # as vLLM's server
            return {"object": "list", "data": [{**model, "owned_by": "llamacpp", **length}]}
        if path == "/busy":
            return {"busy": self.busy, "queued": self.queued, "connections": self.connections}
        return list(self.requests)

    async def infer(self, request: Request, connection: "Connection") -> None:
        body = decode(request.body)
        model = body.get("model")
        request_id = request.headers.get("x-request-id")
        self.events.add("request", path=request.path, id=request_id, model=model, bytes=len(request.body))
        self.received += 1
        if not self.awake.is_set():
            self.events.add("asked_asleep", id=request_id)
            await self.awake.wait()
        limit = self.behaviour.die_after_requests
        if limit is not None and self.may_die and self.received >= limit:
            die()
        limit = self.behaviour.drop_after_requests
        if limit is not None and self.received >= limit:
            connection.transport.close()
            return
        limit = self.behaviour.hang_after_requests
        if limit is not None and self.may_die and self.received >= limit:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            time.sleep(self.behaviour.lifetime_s)
        try:
            await self.take_slot()
            try:
                await self.generate(body, INFERENCE[request.path], connection)
            finally:
                self.slots.release()
                self.busy -= 1
        except asyncio.CancelledError:
            if connection.is_gone:
                seconds = round(time.monotonic() - request.started, 4)
                self.events.add("client_gone", path=request.path, id=request_id, seconds=seconds)
            raise
        self.events.add("done", path=request.path, id=request_id)

    async def take_slot(self) -> None:
        self.queued += 1
        try:
            await self.slots.acquire()
        finally:
            self.queued -= 1
        self.busy += 1

    async def generate(self, body: dict, kind: str, connection: "Connection") -> None:
        behaviour = self.behaviour
        compute_until = time.monotonic() + behaviour.compute_s
        while time.monotonic() < compute_until:
            pass
        if behaviour.error_status is not None:
            await connection.reply(behaviour.error_status, error_body(behaviour))
        elif kind == "embeddings":
            await self.pause(behaviour.first_token_delay_s)
            await self.finish(connection, embeddings(body, self.model_name(body)))
        elif body.get("stream"):
            await self.stream(body, kind, connection)
        else:
            count, finish = self.length(body)
            used = usage(body, count)
            await self.pause(behaviour.first_token_delay_s + behaviour.token_delay_s * count)
            text = " ".join(f"tok{i}" if self.has_weights else "garbage" for i in range(count))
            if behaviour.huge_body_bytes:
                text = ("tok " * (behaviour.huge_body_bytes // 4 + 1))[: behaviour.huge_body_bytes]
            await self.finish(connection, completion(kind, self.model_name(body), text, finish, used))

    async def finish(self, connection: "Connection", answer: dict) -> None:
        content = encode(answer)
        if not self.behaviour.exit_mid_body or not self.may_die:
            return await connection.reply(200, content)
        connection.send_head(200, "application/json; charset=utf-8", len(content))
        await connection.send(content[: len(content) // 2])
        return die()

    async def stream(self, body: dict, kind: str, connection: "Connection") -> None:
        """The head goes out with the first token, as llama-server's does."""
        behaviour = self.behaviour
        count, finish = self.length(body)
        used = usage(body, count)
        last = behaviour.die_after_tokens if self.may_die else None
        model = self.model_name(body)
        await self.pause(behaviour.first_token_delay_s)
        connection.send_head(200, "text/event-stream", None)
        for i in range(count):
            token = f"tok{i}" if self.has_weights else "garbage"
            event = sse(chunk(kind, model, f" {token}" if i else token, is_first=i == 0))
            if last is not None and i >= last:
                break
            await connection.send_chunk(event)
            await self.pause(behaviour.token_delay_s)
        if last is not None:
            if behaviour.half_event:
                await connection.send_chunk(event[: len(event) // 2])
            die()
        await connection.send_chunk(sse(chunk(kind, model, "", finish=finish)))
        if (body.get("stream_options") or {}).get("include_usage"):
            await connection.send_chunk(sse({**chunk(kind, model), "choices": [], "usage": used}))
        await connection.send_chunk(b"data: [DONE]\n\n")
        await connection.end_chunks()

    def length(self, body: dict) -> tuple[int, str]:
        asked = body.get("max_tokens") or body.get("max_completion_tokens") or self.behaviour.tokens
        return min(asked, self.behaviour.tokens), "length" if asked < self.behaviour.tokens else "stop"

    def model_name(self, body: dict) -> str:
        return self.flags.alias or body.get("model") or self.flags.model

    async def pause(self, seconds: float) -> None:
        """Also without a delay, so that others get their turn and a client that left is seen."""
        await asyncio.sleep(seconds)


class Connection(asyncio.Protocol):
    """HTTP/1.1 without pipelining. The end of the client's side cancels the answer that is being made."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.buffer = bytearray()
        self.arrived = asyncio.Event()
        self.can_write = asyncio.Event()
        self.can_write.set()
        self.is_gone = False
        self.is_answering = False
        self.should_close = False
        self.is_chunked = True

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=0)  # so that to drain is to have handed all to the kernel
        self.engine.open.add(self)
        self.engine.connections += 1
        self.task = asyncio.get_running_loop().create_task(self.serve())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.arrived.set()

    def eof_received(self) -> None:
        self.leave()

    def connection_lost(self, error: Exception | None) -> None:
        self.engine.open.discard(self)
        self.leave()

    def pause_writing(self) -> None:
        self.can_write.clear()

    def resume_writing(self) -> None:
        self.can_write.set()

    def leave(self) -> None:
        if not self.is_gone:
            self.is_gone = True
            self.arrived.set()
            self.can_write.set()
            if self.is_answering:
                self.task.cancel()

    def is_at_work(self) -> bool:
        return self.is_answering or bool(self.buffer)

    async def serve(self) -> None:
        try:
            while not self.should_close:
                request = await self.next_request()
                self.should_close = self.engine.behaviour.close_connections or request.should_close()
                self.is_chunked = request.version != "HTTP/1.0"
                self.is_answering = True
                try:
                    await self.engine.answer(request, self)
                finally:
                    self.is_answering = False
                self.should_close |= self.engine.stopping.is_set()
        except (ConnectionError, TimeoutError):
            pass
        except ValueError as error:
            self.should_close = True
            await self.reply(400, Refused(400, str(error)).body)
        finally:
            self.transport.close()

    async def next_request(self) -> Request:
        if not self.buffer:
            async with asyncio.timeout(self.engine.behaviour.keep_alive_s):
                await self.more()
        head = await self.until(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, version = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        request = Request(method, path, version, {name.lower(): value.strip() for name, _, value in pairs})
        if request.headers.get("expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.headers.get("transfer-encoding", "").lower() == "chunked":
            request.body = await self.chunks()
        else:
            request.body = await self.exactly(int(request.headers.get("content-length", 0)))
        return request

    async def chunks(self) -> bytes:
        parts = []
        while size := int((await self.until(b"\r\n")).partition(b";")[0], 16):
            parts.append(await self.exactly(size))
            await self.until(b"\r\n")
        while await self.until(b"\r\n"):
            pass
        return b"".join(parts)

    async def until(self, mark: bytes) -> bytes:
        while (end := self.buffer.find(mark)) < 0:
            if len(self.buffer) > HEAD_LIMIT_BYTES:
                raise ValueError("the head is too large")
            await self.more()
        text = bytes(self.buffer[:end])
        del self.buffer[: end + len(mark)]
        return text

    async def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            await self.more()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    async def more(self) -> None:
        self.arrived.clear()
        if not self.is_gone:
            await self.arrived.wait()
        if self.is_gone:
            raise ConnectionResetError("the client has left")

    async def reply(self, status: int, content: bytes) -> None:
        self.send_head(status, "application/json; charset=utf-8", len(content))
        await self.send(content)

    def send_head(self, status: int, content_type: str, size: int | None) -> None:
        """size None: the length is not known, so chunks, or for an old client the end of the connection."""
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}", "Server: llama.cpp"]
        lines.append(f"Content-Type: {content_type}")
        if size is not None:
            lines.append(f"Content-Length: {size}")
        elif self.is_chunked:
            lines.append("Transfer-Encoding: chunked")
        else:
            self.should_close = True
        if self.should_close:
            lines.append("Connection: close")
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def send(self, data: bytes) -> None:
        self.transport.write(data)
        await self.can_write.wait()

    async def send_chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data)

    async def end_chunks(self) -> None:
        if self.is_chunked:
            await self.send(b"0\r\n\r\n")


def age_s() -> float:
    return time.monotonic() - STARTED


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def decode(body: bytes) -> dict:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise Refused(400, f"parse error: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "parse error: not an object")
    return value


def sse(value: object) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def error_body(behaviour: SimpleNamespace) -> bytes:
    if behaviour.error_body is None:
        return Refused(behaviour.error_status, "made to fail by FAKE_ENGINE").body
    return behaviour.error_body.encode() if isinstance(behaviour.error_body, str) else encode(behaviour.error_body)


def prompt_text(body: dict) -> str:
    if isinstance(body.get("messages"), list):
        return " ".join(str(m.get("content")) for m in body["messages"] if isinstance(m, dict))
    if "prompt" in body:
        return str(body["prompt"])
    raise Refused(500, "key 'messages' or 'prompt' not found")


def usage(body: dict, count: int) -> dict:
    prompt = len(prompt_text(body).split())
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def completion(kind: str, model: str, text: str, finish: str, used: dict) -> dict:
    if kind == "chat":
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        head = {"id": "chatcmpl-fake", "object": "chat.completion"}
    else:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        head = {"id": "cmpl-fake", "object": "text_completion"}
    return {**head, "created": int(time.time()), "model": model, "choices": [choice], "usage": used}


def chunk(kind: str, model: str, text: str = "", finish: str | None = None, is_first: bool = False) -> dict:
    if kind == "chat":
        delta = {"role": "assistant"} if is_first else {}
        choice = {"index": 0, "delta": {**delta, "content": text} if text else delta, "finish_reason": finish}
        head = {"id": "chatcmpl-fake", "object": "chat.completion.chunk"}
    else:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        head = {"id": "cmpl-fake", "object": "text_completion"}
    return {**head, "created": int(time.time()), "model": model, "choices": [choice]}


def embeddings(body: dict, model: str) -> dict:
    given = body.get("input", body.get("content"))
    if given is None:
        raise Refused(400, '"input" or "content" must be provided')
    is_many = isinstance(given, list) and not (given and isinstance(given[0], int))
    texts = [text if isinstance(text, str) else json.dumps(text) for text in (given if is_many else [given])]
    as_base64 = body.get("encoding_format") == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": pack(vector(text)) if as_base64 else vector(text),
        }
        for index, text in enumerate(texts)
    ]
    count = sum(len(text.split()) for text in texts)
    used = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "model": model, "data": data, "usage": used}


def vector(text: str) -> list[float]:
    return [zlib.crc32(f"{i} {text}".encode()) / 2**32 for i in range(8)]


def pack(numbers: list[float]) -> str:
    import base64
    import struct

    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


if __name__ == "__main__":
    sys.exit(main())
