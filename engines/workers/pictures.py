"""Pictures in and out: from what clients send to PIL's images, and from those to base64; sizes."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from starlette.datastructures import UploadFile

from engines.workers.server import Refused

SIZE = re.compile(r"\s*(\d{1,5})\s*[*x×X]\s*(\d{1,5})\s*")
FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}
DATA_URI = re.compile(r"data:[\w/+.-]*;base64,")
PIXELS_LIMIT = 64 * 2**20

Size = tuple[int, int]


async def read_picture(value: Any, name: str) -> Image.Image:
    """A picture out of a form's file, or of base64 or a data URI, upright, with its transparency if it has some.

    Raises:
        Refused: it is no picture, or too large.
    """
    if isinstance(value, UploadFile):
        return await asyncio.to_thread(picture_of, await value.read(), name)
    return await asyncio.to_thread(lambda: picture_of(from_base64(value, name), name))


def from_base64(value: Any, name: str) -> bytes:
    """The bytes of base64 text or of a data URI. Raises Refused if it is neither."""
    try:
        return base64.b64decode(DATA_URI.sub("", str(value), count=1), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise Refused(f"`{name}` is a file, or base64 of one; this is neither.", param=name) from exc


def picture_of(content: bytes, name: str) -> Image.Image:
    """The picture of a file's bytes. Raises Refused if it is none, or too large."""
    if not content:
        raise Refused(f"`{name}` is empty.", param=name)
    try:
        picture = Image.open(io.BytesIO(content))
        if picture.width * picture.height > PIXELS_LIMIT:
            raise Refused(f"`{name}` has {picture.width}x{picture.height} pixels; make it smaller.", param=name)
        picture = ImageOps.exif_transpose(picture)
        has_alpha = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
        return picture.convert("RGBA" if has_alpha else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as exc:
        raise Refused(f"`{name}` is not a picture that can be read: {exc}.", param=name) from exc


def mask_of(picture: Image.Image) -> Image.Image:
    """A mask, white where the picture may change: where it is transparent, else where it is white."""
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema()[0] < 255:
        return ImageOps.invert(picture.getchannel("A"))
    return picture.convert("L")


def encoded(picture: Image.Image, output_format: str = "png") -> str:
    """The picture's file as base64. The same picture gives the same bytes."""
    file = io.BytesIO()
    kind = FORMATS[output_format]
    (picture.convert("RGB") if kind == "JPEG" else picture).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def read_size(value: Any, most_pixels: int) -> Size | None:
    """Width and height out of a text such as 512x512 or 512*512; None for original, auto, or nothing.

    Raises:
        Refused: it is no size, or one that is not allowed.
    """
    if value in (None, "", "original", "auto"):
        return None
    found = SIZE.fullmatch(str(value))
    if not found:
        raise Refused(f"`size` is width and height in pixels, such as 512x512, not {value!r}.", param="size")
    return checked_size((int(found[1]), int(found[2])), most_pixels)


def checked_size(size: Size, most_pixels: int) -> Size:
    """The size, if pictures may have it. Raises Refused otherwise."""
    if min(size) < 8:
        raise Refused(f"`size` {size[0]}x{size[1]} is too small: 8 pixels at least.", param="size")
    if size[0] * size[1] > most_pixels:
        raise Refused(
            f"`size` {size[0]}x{size[1]} is more than the {most_pixels} pixels that this model was launched with "
            "(option max_pixels).",
            param="size",
        )
    return size


def rounded(size: Size, multiple: int) -> Size:
    """The nearest size that a model can make."""
    width, height = (max(multiple, round(length / multiple) * multiple) for length in size)
    return width, height
