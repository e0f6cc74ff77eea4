"""What all workers that hear have in common: /v1/audio/transcriptions and /translations over a Hearer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from engines.workers.audio import RATE_HEARD, decode
from engines.workers.server import (
    SSE,
    Cancelled,
    Order,
    Refused,
    Turns,
    flag,
    more_options,
    number,
    streamed,
    unless_client_leaves,
)

GRANULARITIES = ("word", "segment")
SHOWN_LANGUAGES = 20


class Word(NamedTuple):
    """One that was heard; seconds from the begin of the sound."""

    word: str
    start: float
    end: float


class Segment(NamedTuple):
    """A stretch of speech; seconds from the begin of the sound. `facts`: what else the model tells of it."""

    start: float
    end: float
    text: str
    words: Sequence[Word] = ()
    facts: Mapping[str, Any] = {}


class Wish(NamedTuple):
    """A request, checked; `more` is what it has in `kwargs`."""

    task: str
    language: str | None
    prompt: str | None
    temperature: float
    has_words: bool
    has_segments: bool
    form: str
    is_streamed: bool
    more: dict[str, Any]


class Hearer(Protocol):
    """A model that hears."""

    can_translate: bool
    """Into English."""
    has_words: bool
    """Whether it can tell when each word was said."""

    @property
    def languages(self) -> Sequence[str]:
        """The codes that may be asked for; empty: it takes none."""

    def hear(self, samples: Any, wish: Wish, cancel: threading.Event) -> tuple[str | None, Iterator[Segment]]:
        """The language, if it is known, and what is said, each segment heard when it is asked for.

        Args:
            samples: 16 kHz.
        Raises:
            Refused: something in `wish.more` means nothing here.
        """


class Heard(NamedTuple):
    """All that was heard."""

    wish: Wish
    language: str | None
    duration_s: float
    segments: list[Segment]

    @property
    def text(self) -> str:
        """In one piece."""
        return "".join(segment.text for segment in self.segments).strip()


def routes(hearer: Hearer, order: Order) -> list[BaseRoute]:
    """The paths of a worker that hears. The option `language` is read here."""
    turns = Turns()
    if language := order.options.get("language"):
        _language(language, hearer)

    async def transcribe(request: Request) -> Response:
        return await answer(request, "transcribe")

    async def translate(request: Request) -> Response:
        return await answer(request, "translate")

    async def answer(request: Request, task: str) -> Response:
        content, wish = await _read(request, task, hearer, order)
        if not wish.is_streamed:
            heard = await unless_client_leaves(request, turns.run(lambda cancel: _hear(hearer, content, wish, cancel)))
            return ANSWERS[wish.form](heard)
        return await streamed(request, turns.stream(_job(hearer, content, wish)), SSE)

    async def mute(request: Request) -> Response:
        raise Refused(
            f"The model {order.uid!r} hears (/v1/audio/transcriptions); {request.url.path} is for others.",
            param="model",
        )

    return [
        Route("/v1/audio/transcriptions", transcribe, methods=["POST"]),
        Route("/v1/audio/translations", translate, methods=["POST"]),
        Route("/v1/audio/voices", mute),
        *[Route(f"/v1/audio/{path}", mute, methods=["POST"]) for path in ("speech", "embeddings")],
    ]


def _hear(hearer: Hearer, content: bytes, wish: Wish, cancel: threading.Event) -> Heard:
    samples = decode(content, cancel)
    language, segments = hearer.hear(samples, wish, cancel)
    return Heard(wish, language, len(samples) / RATE_HEARD, list(_unless(cancel, segments)))


def _unless(cancel: threading.Event, segments: Iterator[Segment]) -> Iterator[Segment]:
    for segment in segments:
        if cancel.is_set():
            raise Cancelled
        yield segment


def _job(hearer: Hearer, content: bytes, wish: Wish) -> Callable[[threading.Event, Callable[[bytes], None]], None]:
    def job(cancel: threading.Event, put: Callable[[bytes], None]) -> None:
        text = ""
        _, segments = hearer.hear(decode(content, cancel), wish, cancel)
        for segment in _unless(cancel, segments):
            delta = segment.text if text else segment.text.lstrip()
            if delta:
                text += delta
                put(_event("transcript.text.delta", delta=delta))
        put(_event("transcript.text.done", text=text.rstrip()))

    return job


def _event(kind: str, **fields: Any) -> bytes:
    return b"data: " + json.dumps({"type": kind, **fields}, ensure_ascii=False).encode() + b"\n\n"


# --- requests


async def _read(request: Request, task: str, hearer: Hearer, order: Order) -> tuple[bytes, Wish]:
    try:
        async with request.form() as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise Refused("The form has no `file`: send the sound as a file of that name.", param="file")
            content = await file.read()
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            wanted = [
                value
                for name in ("timestamp_granularities[]", "timestamp_granularities")
                for value in form.getlist(name)
                if value
            ]
    except ClientDisconnect as exc:
        raise Cancelled from exc
    if not content:
        raise Refused("The `file` is empty.", param="file")
    return content, _wish(fields, wanted, task, hearer, order)


def _wish(fields: Mapping[str, str], wanted: Sequence[Any], task: str, hearer: Hearer, order: Order) -> Wish:
    form = fields.get("response_format") or "json"
    if form not in ANSWERS:
        raise Refused(f"`response_format` is one of {', '.join(ANSWERS)}, not {form!r}.", param="response_format")
    for one in wanted:
        if one not in GRANULARITIES:
            raise Refused(
                f"`timestamp_granularities[]` is word or segment, not {one!r}.", param="timestamp_granularities[]"
            )
    if wanted and form != "verbose_json":
        raise Refused(
            f"`timestamp_granularities[]` goes with the response_format verbose_json, not {form}.",
            param="timestamp_granularities[]",
        )
    if "word" in wanted and not hearer.has_words:
        raise Refused("This model cannot tell when each word was said.", param="timestamp_granularities[]")
    if task == "translate" and not hearer.can_translate:
        raise Refused(
            "This model cannot translate: that takes a whisper model of several languages.",
            param="model",
        )
    return Wish(
        task=task,
        language=_language(fields.get("language") or order.options.get("language"), hearer),
        prompt=fields.get("prompt") or None,
        temperature=number(fields.get("temperature") or 0, "temperature", float, least=0, most=1),
        has_words="word" in wanted,
        has_segments="segment" in wanted or not wanted,
        form=form,
        is_streamed=flag(fields.get("stream"), "stream"),
        more=more_options(fields.get("kwargs")),
    )


def _language(value: str | None, hearer: Hearer) -> str | None:
    """The code of a language without its region, if this model knows it."""
    if not value:
        return None
    code = value.strip().lower().replace("_", "-").split("-")[0]
    if code not in hearer.languages:
        shown = ", ".join(sorted(hearer.languages)[:SHOWN_LANGUAGES])
        more = ", ..." if len(hearer.languages) > SHOWN_LANGUAGES else ""
        known = f"It knows: {shown}{more}" if shown else "It takes none: leave it out"
        raise Refused(f"This model knows no language {value!r} (a code such as en). {known}.", param="language")
    return code


# --- answers


def _as_json(heard: Heard) -> Response:
    return JSONResponse({"text": heard.text, "usage": _usage(heard)})


def _as_text(heard: Heard) -> Response:
    return Response(heard.text + "\n", media_type="text/plain")


def _as_srt(heard: Heard) -> Response:
    cues = [
        f"{index}\n{stamp(one.start, ',')} --> {stamp(one.end, ',')}\n{_cue(one.text)}\n"
        for index, one in enumerate(heard.segments, 1)
    ]
    return Response("\n".join(cues), media_type="application/x-subrip")


def _as_vtt(heard: Heard) -> Response:
    cues = [f"{stamp(one.start, '.')} --> {stamp(one.end, '.')}\n{_cue(one.text)}\n" for one in heard.segments]
    return Response("\n".join(["WEBVTT\n", *cues]), media_type="text/vtt")


def _as_verbose_json(heard: Heard) -> Response:
    said: dict[str, Any] = {
        "task": heard.wish.task,
        "language": heard.language or heard.wish.language or "",
        "duration": round(heard.duration_s, 3),
        "text": heard.text,
        "usage": _usage(heard),
    }
    if heard.wish.has_segments:
        said["segments"] = [
            {"id": index, "start": one.start, "end": one.end, "text": one.text, **one.facts}
            for index, one in enumerate(heard.segments)
        ]
    if heard.wish.has_words:
        said["words"] = [word._asdict() for segment in heard.segments for word in segment.words]
    return JSONResponse(said)


ANSWERS: dict[str, Callable[[Heard], Response]] = {
    "json": _as_json,
    "text": _as_text,
    "srt": _as_srt,
    "vtt": _as_vtt,
    "verbose_json": _as_verbose_json,
}


def _usage(heard: Heard) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(heard.duration_s, 3)}


def _cue(text: str) -> str:
    return text.strip().replace("-->", "->")


def stamp(seconds: float, mark: str) -> str:
    """A time as subtitles write it, with the mark before its milliseconds."""
    whole, milliseconds = divmod(round(max(seconds, 0) * 1000), 1000)
    minutes, second = divmod(whole, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02}{mark}{milliseconds:03}"
