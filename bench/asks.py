"""What is asked: the requests of the bench, and what has to come back."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from native import Failed

CHAT_IN, CHAT_OUT = 360, 480
LARGE_OUT = 2 * 2**20
UPLOAD_IN = 10 * 2**20
DIGITS = 8  # of each number in an upload
PACE_MS = 20
PROBE_LIMIT_S = 60.0


@dataclass(frozen=True)
class Ask:
    """One kind of request, to one model."""

    path: str
    body: bytes
    needle: str  # within the body of every right reply
    events: int | None = None

    def request(self, host: str, key: str) -> bytes:
        """As it goes over the wire."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nUser-Agent: load\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + self.body


def chat(model: str, out: int = CHAT_OUT) -> Ask:
    """360 B in; every reply has 480 B."""
    wish = f"[[reply_bytes={out}]] "
    body = _chat(model, wish, stream=False)
    body = _chat(model, wish + "y" * (CHAT_IN - len(body)), stream=False)
    return Ask("/v1/chat/completions", body, needle='"content":"aaaa')


def stream(model: str, events: int, pace_ms: float = PACE_MS) -> Ask:
    """So many events."""
    body = _chat(model, f"[[events={events} pace_us={pace_ms * 1000:.0f}]]", stream=True)
    return Ask("/v1/chat/completions", body, needle='"content":"tok ', events=events)


def large(model: str) -> Ask:
    """2 MiB of vectors."""
    body = {"model": model, "input": f"[[reply_bytes={LARGE_OUT}]]"}
    return Ask("/v1/embeddings", _encode(body), needle='"embedding":[0.5,0.')


def upload(model: str) -> Ask:
    """A chat with a picture of 10 MiB; the engine checks each of its bytes."""
    digits = "".join(f"{n:0{DIGITS}d}" for n in range(UPLOAD_IN // DIGITS))
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{digits}"}}
    body = {"model": model, "stream": False, "messages": [{"role": "user", "content": [picture]}]}
    return Ask("/v1/chat/completions", _encode(body), needle=f'"content":"received {UPLOAD_IN}"')


def expectation(ask: Ask, host: str, port: int, key: str, direct: bytes | None) -> bytes:
    """Ask once and look closely: the body that every later reply has to have.

    `direct` is what the engine says: a gateway may add fields to it, and change none.
    """
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_LIMIT_S)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        connection.request("POST", ask.path, ask.body, headers)
        reply = connection.getresponse()
        body = reply.read()
    finally:
        connection.close()
    if reply.status != 200:
        raise Failed(f"status {reply.status}: {body[:500].decode(errors='replace')}")
    if ask.events is not None:
        events = [line for line in body.split(b"\n\n") if b'"content":"tok ' in line]
        if len(events) != ask.events or not body.endswith(b"data: [DONE]\n\n"):
            raise Failed(f"{len(events)} events of {ask.events}, ending in {body[-100:]!r}")
        return body
    if direct is not None:
        said, wanted = json.loads(body), json.loads(direct)
        if any(said.get(name) != value for name, value in wanted.items()):
            raise Failed(f"the reply is not the engine's: {body[:300]!r}")
    return body


def write(path: Path, data: bytes) -> str:
    """A file for the client; its name."""
    path.write_bytes(data)
    return str(path)


def _chat(model: str, content: str, *, stream: bool) -> bytes:
    system = "You are a careful assistant. Answer in one short paragraph, and say so when you do not know."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    return _encode({"model": model, "messages": messages, "temperature": 0.7, "max_tokens": 64, "stream": stream})


def _encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
