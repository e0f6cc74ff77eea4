#!/usr/bin/env python3
"""Poses as `llama-server`, and answers each request with the very bytes that the request asks for.

A body's `script` is a list of steps: a text is sent as latin-1, a number is a pause in seconds, "close" ends the
connection in order, "reset" without, "die" the process. What it was sent is told by GET /seen.
"""

import asyncio
import json
import os
import socket
import struct
import sys

# Of each gateway, of each request, of how a request was sent; and what stands behind the body and is of no account.
OWN = ("authorization", "connection", "content-length", "transfer-encoding", "x-request-id", "x-trailer")
END = ("close", "reset", "die")


class Engine:
    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.gone = 0  # clients that left before the script's end
        self.connections = 0
        self.at_work = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
                headers = [[name.lower(), value.strip()] for name, _, value in (line.partition(":") for line in lines)]
                body = await self.body(dict(headers), reader)
                method, path, _ = first.split(" ")
                if method == "GET":
                    writer.write(self.tell(path))
                    continue
                kept = sorted(header for header in headers if header[0] not in OWN)
                self.seen.append({"path": path, "headers": kept, "body": body.decode("latin-1")})
                script = json.loads(body).get("script", [])
                self.at_work += 1
                try:
                    if await self.play(script, reader, writer):
                        return
                finally:
                    self.at_work -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def body(self, headers: dict[str, str], reader: asyncio.StreamReader) -> bytes:
        if "transfer-encoding" not in headers:
            return await reader.readexactly(int(headers.get("content-length", 0)))
        parts = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readexactly(2)
        return b"".join(parts)

    def tell(self, path: str) -> bytes:
        said = {"status": "ok"}
        if path == "/seen":
            said = {"seen": self.seen, "gone": self.gone, "connections": self.connections, "at_work": self.at_work}
            self.seen, self.gone = [], 0
        content = json.dumps(said).encode()
        top = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        return top % len(content) + content

    async def play(self, script: list, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is to end."""
        leaving = asyncio.ensure_future(self.until_left(reader))
        try:
            for step in script:
                if step in END:
                    self.end(step, writer)
                    return True
                if isinstance(step, str):
                    writer.write(step.encode("latin-1"))
                    await asyncio.wait((asyncio.ensure_future(writer.drain()), leaving), return_when="FIRST_COMPLETED")
                else:
                    await asyncio.wait((leaving,), timeout=step)
                if leaving.done():
                    self.gone += 1
                    return True
            return False
        finally:
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)

    async def until_left(self, reader: asyncio.StreamReader) -> None:
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.005)

    def end(self, how: str, writer: asyncio.StreamWriter) -> None:
        if how == "die":
            os._exit(3)
        if how == "reset":
            sock = writer.get_extra_info("socket")
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


async def main() -> None:
    if "--version" in sys.argv:
        print("version: 0 (scripted)", file=sys.stderr)
        return
    engine = Engine()
    host = sys.argv[sys.argv.index("--host") + 1]
    if host.endswith(".sock"):
        server = await asyncio.start_unix_server(engine.serve, host, limit=2**24, backlog=2048)
    else:
        port = int(sys.argv[sys.argv.index("--port") + 1])
        server = await asyncio.start_server(engine.serve, host, port, limit=2**24, backlog=2048)
    asyncio.get_running_loop().call_later(900, os._exit, 1)  # nobody leaves one of these behind for longer
    async with server:
        await server.serve_forever()


asyncio.run(main())
