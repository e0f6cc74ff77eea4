"""A model whose engine knows it by another name than clients: the name is changed on the way there and back."""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw
from python_multipart.multipart import parse_options_header

MODEL_FIELD = re.compile(rb'content-disposition:[^\r\n]*;\s*name="?model"?\s*(;|\r|$)', re.IGNORECASE)


def in_json(body: bytes, name: str) -> bytes:
    """A JSON request with that name as its model."""
    fields = msgspec.json.decode(body, type=dict[str, Raw])
    fields["model"] = Raw(msgspec.json.encode(name))
    return msgspec.json.encode(fields)


def in_form(body: bytes, content_type: bytes, name: str) -> bytes:
    """A multipart form with that name as its model."""
    _, parameters = parse_options_header(content_type)
    mark = b"--" + parameters[b"boundary"]
    parts = body.split(mark)
    named = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + name.encode() + b"\r\n"
    kept = [part for part in parts[1:] if not MODEL_FIELD.search(part.partition(b"\r\n\r\n")[0])]
    return mark.join([parts[0], named, *kept])


class Back:
    """Puts the uid in place of the engine's name for a model, in the JSON of replies.

    An engine may write the name with or without a space before it. Quotes in a text are escaped, so that what an answer
    says stays as it is.
    """

    def __init__(self, name: str, uid: str) -> None:
        theirs, ours = msgspec.json.encode(name), msgspec.json.encode(uid)
        self._pairs = [(b'"model":' + space + theirs, b'"model":' + space + ours) for space in (b"", b" ")]

    def put(self, chunk: bytes) -> bytes:
        """The chunk with our name."""
        for theirs, ours in self._pairs:
            chunk = chunk.replace(theirs, ours)
        return chunk
