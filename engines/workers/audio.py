"""Sound as bytes: what clients send is decoded, what models say is encoded. Samples are float32, mono, from -1 to 1."""

from __future__ import annotations

import io
import math
import struct
import threading
from typing import Any, NamedTuple, Protocol

from engines.workers.server import Cancelled, Refused

RATE_HEARD = 16_000  # what models of speech recognition are trained on
RATE_PCM = 24_000  # OpenAI's, whose clients expect it of `pcm`, which has no header to say so
LIMIT_S = 6 * 3600
EDGE_S = 0.02
UNKNOWN = 0xFFFFFFFF  # the length in the header of a stream


class Format(NamedTuple):
    """How sound is sent.

    `rate`: the one that it must have, None for the model's own. `is_counted`: its header says how long it is, so that
    a stream of it suits only those who ask for one.
    """

    media_type: str
    container: str | None = None
    subtype: str | None = None
    rate: int | None = None
    is_counted: bool = False


FORMATS = {
    "mp3": Format("audio/mpeg", "MP3", "MPEG_LAYER_III"),
    "wav": Format("audio/wav", "WAV", "PCM_16", is_counted=True),
    "flac": Format("audio/flac", "FLAC", "PCM_16", is_counted=True),
    "opus": Format("audio/ogg", "OGG", "OPUS", rate=RATE_PCM),
    "aac": Format("audio/aac"),
    "pcm": Format("audio/pcm", rate=RATE_PCM),
}


# --- in


def decode(content: bytes, cancel: threading.Event, rate: int = RATE_HEARD, *, param: str = "file") -> Any:
    """The sound of a file of any common kind, as an array. What lies behind a damaged place is not heard.

    Raises:
        Refused: it is no sound, or too long.
    """
    import av
    import numpy as np

    parts: list[Any] = []
    length = 0
    try:
        with av.open(io.BytesIO(content), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise Refused("The file has no sound in it.", param=param)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            for frame in _frames(container, av.FFmpegError):
                if cancel.is_set():
                    raise Cancelled
                for piece in resampler.resample(frame):
                    parts.append(piece.to_ndarray()[0])
                    length += piece.samples
                if length > LIMIT_S * rate:
                    raise Refused(f"The sound is longer than {LIMIT_S // 3600} hours: send it in parts.", param=param)
    except av.FFmpegError as exc:
        raise Refused(
            "The file cannot be read as sound. Send wav, mp3, m4a, ogg, opus, flac, webm or another common kind.",
            param=param,
        ) from exc
    if not length:
        raise Refused("The file holds no sound that can be read.", param=param)
    return np.concatenate(parts)


def _frames(container: Any, error: type[Exception]) -> Any:
    """The frames up to the first damaged one, then None, which empties a resampler."""
    try:
        for frame in container.decode(audio=0):
            frame.pts = None  # damaged stamps are no reason to stop
            yield frame
    except error:
        pass
    yield None


# --- out


class Encoder(Protocol):
    """Takes samples, gives the bytes of a file as they come."""

    def add(self, samples: Any) -> bytes:
        """The bytes that are certain by now."""

    def end(self) -> bytes:
        """The last bytes."""


def encoder(name: str, rate: int, *, is_whole: bool) -> Encoder:
    """What encodes samples of that rate into one of FORMATS.

    Args:
        is_whole: nothing comes before the end, and headers say how long it is.
    Raises:
        Refused: a library is not there.
    """
    form = FORMATS[name]
    if name == "aac":
        return _Aac(rate)
    if name == "pcm" or (name == "wav" and not is_whole):
        header = b"" if name == "pcm" else _open_wav(rate)
        return _Raw(rate, form.rate or rate, header)
    return _File(form, rate, is_whole=is_whole)


class _Raw:
    """16-bit samples, little-endian, behind a header."""

    def __init__(self, rate: int, wanted: int, header: bytes) -> None:
        self._rate, self._wanted, self._header = rate, wanted, header

    def add(self, samples: Any) -> bytes:
        import numpy as np

        found = resampled(samples, self._rate, self._wanted)
        header, self._header = self._header, b""
        content: bytes = (np.clip(found, -1, 1) * 32767).astype("<i2").tobytes()
        return header + content

    def end(self) -> bytes:
        return b""


class _File:
    """By libsndfile, which may come back to a header at the end: a stream goes without that."""

    def __init__(self, form: Format, rate: int, *, is_whole: bool) -> None:
        import soundfile

        self._rate, self._wanted, self._is_whole = rate, form.rate or rate, is_whole
        # An mp3's first frame tells the length of all, once that is known; of a stream it would be believed to be 0.
        self._is_without_first = form.container == "MP3" and not is_whole
        self._buffer = _Buffer()
        self._sent = 0
        constant = {"compression_level": 0.5, "bitrate_mode": "CONSTANT"}  # players count bytes to tell the time
        self._file = soundfile.SoundFile(
            self._buffer,
            "w",
            self._wanted,
            1,
            subtype=form.subtype,
            format=form.container,
            **constant if form.container == "MP3" else {},
        )

    def add(self, samples: Any) -> bytes:
        self._file.write(resampled(samples, self._rate, self._wanted))
        return b"" if self._is_whole else self._new()

    def end(self) -> bytes:
        self._file.close()
        return self._new()

    def _new(self) -> bytes:
        begin = max(self._sent, self._buffer.n_first if self._is_without_first else 0)
        with self._buffer.getbuffer() as content:
            self._sent = len(content)
            return bytes(content[begin:])


class _Buffer(io.BytesIO):
    """Knows the length of what was written first."""

    n_first = 0

    def write(self, data: Any, /) -> int:
        self.n_first = self.n_first or len(data)
        return super().write(data)


class _Aac:
    """In ADTS frames, by PyAV."""

    def __init__(self, rate: int) -> None:
        try:
            import av
        except ImportError as exc:
            raise Refused(
                "aac needs the av package (PyAV), which this engine's environment lacks. Ask for mp3, opus, flac, "
                "wav or pcm, or install av there.",
                param="response_format",
            ) from exc

        self._av, self._rate, self._sent = av, rate, 0
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="adts")
        self._stream: Any = self._container.add_stream("aac", rate=rate, layout="mono")

    def add(self, samples: Any) -> bytes:
        frame = self._av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="fltp", layout="mono")
        frame.sample_rate = self._rate
        self._container.mux(self._stream.encode(frame))
        return self._new()

    def end(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._new()

    def _new(self) -> bytes:
        new = self._buffer.getvalue()[self._sent :]
        self._sent += len(new)
        return new


def _open_wav(rate: int) -> bytes:
    """The header of a wav whose end is not known."""
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", UNKNOWN, b"WAVE", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16, b"data", UNKNOWN),
    )


def resampled(samples: Any, rate: int, wanted: int) -> Any:
    """The same sound at another rate, by way of its spectrum."""
    import numpy as np

    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    step, stride = rate // divisor, wanted // divisor  # as many samples of the one last as long as of the other
    edge = math.ceil(EDGE_S * divisor) * step  # silence, so that the end does not ring into the begin
    n_steps = math.ceil((len(samples) + 2 * edge) / step)
    padded = np.zeros(n_steps * step)
    padded[edge : edge + len(samples)] = samples
    found = np.fft.irfft(np.fft.rfft(padded), n_steps * stride) * (stride / step)
    begin = edge // step * stride
    return found[begin : begin + round(len(samples) * stride / step)].astype(np.float32)
