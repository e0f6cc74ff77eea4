"""Headers that end at the gateway, and those that go on, by both ways, from the client's bytes to the engine's."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from harness import StartGateway

ENGINE = Path(__file__).parents[1] / "scripted_engine.py"
SAID = (
    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\nconnection: X-Hop\r\n"
    "x-hop: 1\r\nx-stays: caf\xe9\r\n\r\n2\r\n{}\r\n0\r\nx-hidden: 1\r\n\r\n"
)


@pytest.mark.both_doors
async def test_what_is_for_the_next_server_alone_ends_here_and_texts_go_on(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(fake={}, engines={"llama.cpp": {"binary": str(ENGINE)}})
    await gateway.post("/v1/models/fake/start")
    engine = (await gateway.until(state="ready"))["address"].removeprefix("unix:")
    body = json.dumps({"model": "fake", "prompt": "x", "script": [SAID]}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: x-hop, close\r\nconnection: X-Too\r\n"
        b"x-hop: 1\r\nx-too: 1\r\nx-one: caf\xe9\r\nx-two: caf\xc3\xa9\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    for heads in (head, re.sub(rb"connection: .*\r\n|x-(hop|too).*\r\n", b"", head)):  # the second may go the short way
        reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.address.rpartition(":")[2]))
        writer.write(heads + b"%x\r\n%b\r\n0\r\nx-hidden: 1\r\nx-one: other\r\n\r\n" % (len(body), body))
        told = await reader.readuntil(b"{}")
        writer.close()
        assert told.startswith(b"HTTP/1.1 200")
        assert b"x-stays: caf\xe9\r\n" in told
        assert b"x-hop" not in told
        assert b"x-hidden" not in told

    reader, writer = await asyncio.open_unix_connection(engine)
    writer.write(b"GET /seen HTTP/1.1\r\nhost: x\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", await reader.readuntil(b"\r\n\r\n"))
    assert length
    said = json.loads(await reader.readexactly(int(length[1])))
    seen = [dict(one["headers"]) for one in said["seen"]]
    writer.close()
    for headers in seen:
        assert (headers["x-one"], headers["x-two"]) == ("caf\xc3\xa9", "caf\xc3\xa9")
        assert not {"x-hop", "x-too", "x-hidden"} & headers.keys()
    assert len(seen) == 2
