"""What all workers that speak have in common: /v1/audio/speech and /v1/audio/voices over a Speaker."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from engines.workers.audio import FORMATS, decode, encoder
from engines.workers.server import (
    SSE,
    Cancelled,
    Order,
    Refused,
    Turns,
    flag,
    more_options,
    number,
    read_json,
    streamed,
    unless_client_leaves,
)

MAX_CHARACTERS = 4096  # OpenAI's limit
SHOWN_VOICES = 30
STREAM_FORMATS = (None, "", "audio", "sse")
CLONING = ("prompt_speech", "prompt_latent", "prompt_text")
REFERENCE_LIMIT_S = 60
SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*(?=\s)|[。！？\n]+|$)", re.DOTALL)


class Voice(NamedTuple):
    """One that can be asked for."""

    name: str
    language: str = ""


class Speaker(Protocol):
    """A model that speaks."""

    rate: int
    """Samples a second."""
    voices: list[Voice]
    """At least one."""
    speeds: tuple[float, float]
    """The least and the most."""

    def say(self, text: str, voice: str, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """The samples of the text, sentence by sentence, each made when it is asked for.

        Args:
            more: what the request has in `kwargs`.
        Raises:
            Refused: something in `more` means nothing here.
        """


class Reference(NamedTuple):
    """A voice to speak with: a recording of it, at the speaker's rate, and what is said there, if that is known."""

    samples: Any
    text: str


class Copier(Speaker, Protocol):
    """A speaker that can take on a voice of which it is given a recording."""

    needs_reference_text: bool
    """Whether it must be told what is said in the recording."""

    def say_like(self, text: str, reference: Reference, speed: float, more: Mapping[str, Any]) -> Iterator[Any]:
        """As `say`, with the voice of the recording."""


class Stoppable(Speaker, Protocol):
    """A speaker that can look whether it should stop while it makes a piece; others are stopped between two."""

    def until(self, cancel: threading.Event) -> None:
        """What to look at from now on."""


class Wish(NamedTuple):
    """A request, checked. `recording` is a file with a voice to copy, in which `recorded` is said."""

    text: str
    voice: str
    recording: bytes
    recorded: str
    speed: float
    form: str
    is_whole: bool
    is_sse: bool
    more: dict[str, Any]


def routes(speaker: Speaker, order: Order) -> list[BaseRoute]:
    """The paths of a worker that speaks; the options `voice`, `voice_aliases` and `max_characters` are read here."""
    names = [voice.name for voice in speaker.voices]
    default = order.options.get("voice") or names[0]
    aliases = dict(order.options.get("voice_aliases") or {})
    for wanted in (default, *aliases.values()):
        if wanted not in names:
            raise Refused(_unknown_voice(wanted, names))
    turns = Turns()

    async def speech(request: Request) -> Response:
        fields = await _fields(request)
        wish = _wish(fields, speaker, aliases | {"": default, "default": default}, names, order.options)
        media_type = SSE if wish.is_sse else FORMATS[wish.form].media_type
        job = _job(speaker, wish)
        if wish.is_whole and not wish.is_sse:
            parts: list[bytes] = []
            await unless_client_leaves(request, turns.run(lambda cancel: job(cancel, parts.append)))
            return Response(b"".join(parts), media_type=media_type)
        return await streamed(request, turns.stream(job), media_type)

    async def voices(request: Request) -> Response:
        found = [{"id": voice.name, "name": voice.name, "language": voice.language} for voice in speaker.voices]
        return JSONResponse({"object": "list", "model": order.uid, "default": default, "voices": found})

    async def deaf(request: Request) -> Response:
        raise Refused(
            f"The model {order.uid!r} speaks (/v1/audio/speech); {request.url.path} is for models that hear, such as "
            "those of the whisper family.",
            param="model",
        )

    return [
        Route("/v1/audio/speech", speech, methods=["POST"]),
        Route("/v1/audio/voices", voices),
        *[
            Route(f"/v1/audio/{path}", deaf, methods=["POST"])
            for path in ("transcriptions", "translations", "embeddings")
        ],
    ]


def _job(speaker: Speaker, wish: Wish) -> Callable[[threading.Event, Callable[[bytes], Any]], None]:
    def job(cancel: threading.Event, put: Callable[[bytes], Any]) -> None:
        file = encoder(wish.form, speaker.rate, is_whole=wish.is_whole)
        length = 0
        for samples in _said(speaker, wish, cancel):
            if cancel.is_set():
                raise Cancelled
            length += len(samples)
            if piece := file.add(samples):
                put(_event("speech.audio.delta", audio=_text_of(piece)) if wish.is_sse else piece)
        if not length:
            raise Refused("`input` has nothing in it that can be said.", param="input")
        last = file.end()
        if wish.is_sse:
            if last:
                put(_event("speech.audio.delta", audio=_text_of(last)))
            usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}  # such models count none
            put(_event("speech.audio.done", usage=usage))
        elif last:
            put(last)

    return job


def _said(speaker: Speaker, wish: Wish, cancel: threading.Event) -> Iterator[Any]:
    if hasattr(speaker, "until"):
        speaker.until(cancel)
    if not wish.recording:
        return speaker.say(wish.text, wish.voice, wish.speed, wish.more)
    samples = decode(wish.recording, cancel, speaker.rate, param="prompt_speech")
    if len(samples) > REFERENCE_LIMIT_S * speaker.rate:
        raise Refused(
            f"`prompt_speech` is longer than {REFERENCE_LIMIT_S} s: 3 to 12 s of one voice are enough.",
            param="prompt_speech",
        )
    copier: Copier = speaker  # type: ignore[assignment]
    return copier.say_like(wish.text, Reference(samples, wish.recorded), wish.speed, wish.more)


def _text_of(piece: bytes) -> str:
    return base64.b64encode(piece).decode()


def _event(kind: str, **fields: Any) -> bytes:
    return b"data: " + json.dumps({"type": kind, **fields}).encode() + b"\n\n"


# --- requests


async def _fields(request: Request) -> dict[str, Any]:
    """Of a JSON body or of a form; files of a form by what they hold."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await read_json(request)
    try:
        form = await request.form()
    except ClientDisconnect as exc:
        raise Cancelled from exc
    return {name: value if isinstance(value, str) else await value.read() for name, value in form.multi_items()}


def _wish(
    fields: Mapping[str, Any],
    speaker: Speaker,
    aliases: Mapping[str, str],
    names: list[str],
    options: Mapping[str, Any],
) -> Wish:
    more = more_options(fields.get("kwargs"))
    recording, recorded = _reference(fields, more, speaker)
    form = fields.get("response_format") or "mp3"
    if not isinstance(form, str) or form not in FORMATS:
        raise Refused(f"`response_format` is one of {', '.join(FORMATS)}, not {form!r}.", param="response_format")
    stream_format = fields.get("stream_format")
    if stream_format not in STREAM_FORMATS:
        raise Refused(f"`stream_format` is audio or sse, not {stream_format!r}.", param="stream_format")
    least, most = speaker.speeds
    stream = fields.get("stream")
    is_streamed = flag(stream, "stream", default=bool(stream_format) or not FORMATS[form].is_counted)
    speed = fields.get("speed")
    return Wish(
        text=_text(fields.get("input"), int(options.get("max_characters") or MAX_CHARACTERS)),
        voice=_voice(fields.get("voice"), aliases, names),
        recording=recording,
        recorded=recorded,
        speed=1.0 if speed in (None, "") else number(speed, "speed", float, least=least, most=most),
        form=form,
        is_whole=not is_streamed,
        is_sse=stream_format == "sse",
        more=more,
    )


def _reference(fields: Mapping[str, Any], more: dict[str, Any], speaker: Speaker) -> tuple[bytes, str]:
    """The recording of a voice to copy, and what is said there, which Xinference's clients send among `kwargs`."""
    given = {name: more.pop(name, None) or fields.get(name) for name in CLONING}
    can_copy = hasattr(speaker, "say_like")
    for name, value in given.items():
        if value and (not can_copy or name == "prompt_latent"):
            reason = (
                "copies voices from recordings (prompt_speech) alone"
                if can_copy
                else "has its own voices and cannot copy another"
            )
            raise Refused(f"`{name}`: this model {reason}. Leave it out.", param=name)
    recording, recorded = given["prompt_speech"] or b"", given["prompt_text"] or ""
    if not isinstance(recording, bytes):
        raise Refused(
            "`prompt_speech` is a sound file: send the request as multipart/form-data.", param="prompt_speech"
        )
    if not isinstance(recorded, str):
        raise Refused("`prompt_text` is what is said in `prompt_speech`, as text.", param="prompt_text")
    if recorded and not recording:
        raise Refused("`prompt_text` is what is said in `prompt_speech`, which is missing.", param="prompt_speech")
    if recording and not recorded.strip() and speaker.needs_reference_text:  # type: ignore[attr-defined]
        raise Refused(
            "`prompt_text` is missing: this model must be told what is said in `prompt_speech`.", param="prompt_text"
        )
    return recording, recorded.strip()


def _text(value: Any, limit: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Refused("`input` is the text to say; it is missing or empty.", param="input")
    if len(value) > limit:
        raise Refused(
            f"`input` has {len(value)} characters; at most {limit} can be said at once (option max_characters). "
            "Send it in parts.",
            param="input",
        )
    return value.replace("\0", " ").strip()


def _voice(value: Any, aliases: Mapping[str, str], names: list[str]) -> str:
    if isinstance(value, dict):  # OpenAI's form for voices that somebody made
        value = value.get("id")
    wanted = value if isinstance(value, str) else "" if value is None else str(value)
    found = wanted if wanted in names else aliases.get(wanted)
    if found is None:
        raise Refused(_unknown_voice(wanted, names), param="voice")
    return found


def _unknown_voice(wanted: str, names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN_VOICES]) + (", ..." if len(names) > SHOWN_VOICES else "")
    return f"There is no voice {wanted!r}. There is: {shown}; or leave `voice` out."


def known_only(more: Mapping[str, Any], known: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The numbers of `kwargs`, each within its bounds. Raises Refused for others."""
    for name in more:
        if name not in known:
            raise Refused(f"`kwargs` has {name!r}; known are: {', '.join(known)}.", param="kwargs")
    return {name: number(value, name, float, least=known[name][0], most=known[name][1]) for name, value in more.items()}


def sentences(text: str) -> list[str]:
    """The text cut behind the marks that end sentences."""
    return [found for part in SENTENCE.findall(text) if (found := part.strip())]
