"""`python -m hostler_echo.server PORT NAME TIMES`: /health, and /v1/completions to who has the key."""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Ready, as soon as it listens."""
        self.reply(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        """A completion that is its prompt."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["authorization"] != f"Bearer {os.environ['ECHO_KEY']}":
            self.reply(401, {"error": {"message": "The key is wrong."}})
            return
        _, _, name, times = sys.argv
        text = " ".join([body["prompt"]] * int(times))
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        self.reply(200, {"id": "1", "object": "text_completion", "created": 0, "model": name, "choices": [choice]})

    def reply(self, status: int, body: object) -> None:
        """An answer in JSON."""
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
