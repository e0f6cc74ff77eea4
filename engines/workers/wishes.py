"""Requests for pictures or films, read out of JSON or a form, in the words of OpenAI and of Xinference."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from starlette.datastructures import FormData
from starlette.requests import ClientDisconnect, Request

from engines.workers.pictures import FORMATS, Size, checked_size, read_picture, read_size
from engines.workers.server import Cancelled, Refused, more_options, number

SEED_LIMIT = 2**63 - 1
MOST_AT_ONCE = 10
# Fields of OpenAI's requests that no pipeline knows, and that harm nobody.
_WITHOUT_EFFECT = """
background input_fidelity model moderation output_compression partial_images quality response_format stream style user
"""
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())
FILES_LIMIT = 16


@dataclass(kw_only=True)
class Wish:
    """One request. `arguments` are those of the pipeline; `optional` ones are left out where it does not know them."""

    prompts: list[str]
    negative_prompt: str | None = None
    n: int = 1
    size: Size | None = None
    seed: int = 0
    request_id: str | None = None
    scheduler: str | None = None
    output_format: str = "png"
    fps: int | None = None
    pictures: list[Image.Image] = field(default_factory=list)
    mask: Image.Image | None = None
    last_frame: Image.Image | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()


class Form:
    """A multipart form: its fields as texts, and its pictures."""

    def __init__(self, form: FormData) -> None:
        self._form = form

    @classmethod
    async def read(cls, request: Request) -> Form:
        """Raises Refused if it cannot be read, Cancelled if the client has left."""
        try:
            return cls(await request.form(max_files=FILES_LIMIT, max_fields=200, max_part_size=64 * 2**20))
        except ClientDisconnect as exc:
            raise Cancelled from exc

    def fields(self, *files: str) -> dict[str, Any]:
        """All but the `files`."""
        return {name: value for name, value in self._form.items() if name not in files and isinstance(value, str)}

    def names(self) -> set[str]:
        """Of all fields and files that hold something."""
        return {name for name, value in self._form.multi_items() if value}

    async def pictures(self, *names: str, needed: bool = True) -> list[Image.Image]:
        """Those under any of the names, in the order of the form. Raises Refused if one is needed and there is none."""
        found = [await read_picture(value, name) for name, value in self._form.multi_items() if name in names and value]
        if needed and not found:
            raise Refused(f"The form has no `{names[0]}`.", param=names[0])
        return found


def wish_of(
    fields: Mapping[str, Any], defaults: Mapping[str, Any], most_pixels: int, *, needs_prompt: bool = True
) -> Wish:
    """The wish of a request's fields: what it says itself goes before the family's defaults.

    Raises:
        Refused: naming the field that is wrong.
    """
    own = {name: value for name, value in fields.items() if name not in WITHOUT_EFFECT and value not in (None, "")}
    if fields.get("response_format") not in (None, "", "url", "b64_json"):
        raise Refused("`response_format` is url or b64_json.", param="response_format")
    given = more_options(own.pop("kwargs", None))
    of_fields = {name: typed(value) if name != "prompt" else value for name, value in own.items()}
    said: dict[str, Any] = {**defaults, **of_fields, **{k: v for k, v in given.items() if v is not None}}
    size = read_size(said.pop("size", None), most_pixels)
    if "width" in said or "height" in said:
        width, height = (number(said.pop(name, 0), name, int, least=8, most=99999) for name in ("width", "height"))
        size = checked_size((width, height), most_pixels)
    output_format = str(said.pop("output_format", "png")).lower()
    if output_format not in FORMATS:
        raise Refused(f"`output_format` is one of {', '.join(FORMATS)}, not {output_format!r}.", param="output_format")
    prompts = _prompts(said.pop("prompt", None), needs_prompt=needs_prompt)
    negative = said.pop("negative_prompt", None)
    request_id = said.pop("request_id", None)
    scheduler = said.pop("sampler_name", None) or said.pop("scheduler", None)
    said.pop("scheduler", None)
    wish = Wish(
        prompts=prompts,
        negative_prompt=None if negative is None else str(negative),
        n=number(said.pop("n", 1), "n", int, least=1, most=MOST_AT_ONCE),
        size=size,
        seed=_seed(said.pop("seed", None)),
        request_id=None if request_id is None else str(request_id),
        scheduler=None if scheduler is None else str(scheduler),
        output_format=output_format,
        fps=number(said.pop("fps"), "fps", int, least=1, most=120) if "fps" in said else None,
        arguments=said,
        optional=frozenset(defaults) - of_fields.keys() - given.keys(),
    )
    for name, kind, least, most in (
        ("num_inference_steps", int, 1, 1000),
        ("guidance_scale", float, 0, 1000),
        ("strength", float, 0, 1),
        ("num_frames", int, 1, 10_000),
    ):
        if name in said:
            said[name] = number(said[name], name, kind, least=least, most=most)
    if wish.n * len(prompts) > MOST_AT_ONCE:
        raise Refused(f"{len(prompts)} prompts with `n` {wish.n}: {MOST_AT_ONCE} at once at most.", param="n")
    return wish


def typed(value: Any) -> Any:
    """A form's text as the number or truth that it is, if it is one."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return value
    return found if isinstance(found, int | float) else value


def _prompts(value: Any, *, needs_prompt: bool) -> list[str]:
    prompts = value if isinstance(value, list) else [value]
    if not needs_prompt:
        prompts = ["" if one is None else one for one in prompts]
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise Refused("`prompt` is a text, or a list of texts.", param="prompt")
    if needs_prompt and not all(one.strip() for one in prompts):
        raise Refused("`prompt` is empty.", param="prompt")
    return prompts


def _seed(value: Any) -> int:
    """-1 and nothing are for chance to choose."""
    if value in (None, -1, "-1"):
        return secrets.randbelow(2**32)
    return int(number(value, "seed", int, least=0, most=SEED_LIMIT))
