"""The name of a model on its way to an engine that knows it by another, and back."""

from __future__ import annotations

import json

import pytest

from gateway.api import alias


def test_a_json_request_gets_the_engines_name_and_keeps_the_rest() -> None:
    body = b'{"model": "mine", "n": 1.0, "messages": [{"content": "my \\"model\\": \\"mine\\""}]}'
    sent = json.loads(alias.in_json(body, "theirs"))
    assert sent == json.loads(body) | {"model": "theirs"}


@pytest.mark.parametrize(
    "parts",
    [
        [b'Content-Disposition: form-data; name="model"\r\n\r\nmine'],
        [b'content-disposition: form-data; name="model"\r\nContent-Type: text/plain\r\n\r\nmine'],
        [],
    ],
    ids=["named", "typed", "not-named"],
)
def test_a_form_gets_the_engines_name_once_and_keeps_the_rest(parts: list[bytes]) -> None:
    file = b'Content-Disposition: form-data; name="file"; filename="model"\r\n\r\nRIFF\r\nname="model"\r\n'
    body = b"".join(b"--xyz\r\n" + part + b"\r\n" for part in [*parts, file]) + b"--xyz--\r\n"
    sent = alias.in_form(body, b"multipart/form-data; boundary=xyz", "theirs")
    assert sent == (
        b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\ntheirs\r\n--xyz\r\n' + file + b"\r\n--xyz--\r\n"
    )


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b'{"model":"theirs","a":1}', b'{"model":"mine","a":1}'),
        (b'{"model": "theirs"}', b'{"model": "mine"}'),
        (b'data: {"id":1,"model":"theirs"}\n\n', b'data: {"id":1,"model":"mine"}\n\n'),
        (b'{"model":"another"}', b'{"model":"another"}'),
        (b'{"text":"say \\"model\\":\\"theirs\\""}', b'{"text":"say \\"model\\":\\"theirs\\""}'),
    ],
)
def test_a_reply_gets_our_name_and_its_texts_stay(reply: bytes, expected: bytes) -> None:
    assert alias.Back("theirs", "mine").put(reply) == expected
