"""Models that read pictures: whatever transformers knows as image-to-text, with its own processor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from engines.workers.device import torch_device
from engines.workers.image import flattened
from engines.workers.jobs import Job, Jobs
from engines.workers.server import Cancelled, Order, Refused, more_options, number
from engines.workers.wishes import Form

DEFAULT_TOKENS, MOST_TOKENS = 1024, 32768
MAKING = ("generations", "variations", "inpainting", "edits")
PROMPT = "Read all the text in this picture."


class Reader:
    """The route over one model."""

    def __init__(self, order: Order, jobs: Jobs) -> None:
        """Load it. Raises Refused if transformers does not know it."""
        self._jobs, self._uid = jobs, order.uid
        self._device = torch_device(order.options)
        transformers.utils.logging.disable_progress_bar()
        folder = Path(order.model)
        try:
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            dtype = torch.float32 if self._device == "cpu" else "auto"
            model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype)
        except Exception as exc:  # of any library that reads a file
            raise Refused(
                f"{folder} is no model that transformers reads pictures with: {type(exc).__name__}: {exc} Models that "
                "bring code of their own are not run here; take one that transformers knows."
            ) from exc
        self._model: Any = model.to(self._device).eval()
        print(f"{type(model).__name__} on {self._device}", file=sys.stderr, flush=True)

    def routes(self) -> list[BaseRoute]:
        """All paths."""
        others = [Route(f"/v1/images/{name}", self.make, methods=["POST"]) for name in MAKING]
        return [Route("/v1/images/ocr", self.read, methods=["POST"]), *others]

    async def make(self, request: Request) -> Response:
        """What models of another kind do."""
        raise Refused(f"The model {self._uid!r} reads pictures and makes none.", param="model")

    async def read(self, request: Request) -> Response:
        """The text of a picture, as a JSON text."""
        form = await Form.read(request)
        options = more_options(form.fields("image").get("kwargs"))
        picture = flattened((await form.pictures("image"))[0])
        prompt = str(options.pop("prompt", None) or PROMPT)
        tokens = options.pop("max_new_tokens", DEFAULT_TOKENS)
        tokens = number(tokens, "max_new_tokens", int, least=1, most=MOST_TOKENS)
        job = self._jobs.begin(str(options.pop("request_id", "")) or None)
        text = await self._jobs.run(request, job, lambda job: self._text_of(picture, prompt, tokens, job))
        return JSONResponse(text)

    def _text_of(self, picture: Image.Image, prompt: str, tokens: int, job: Job) -> str:
        inputs = self._inputs(picture, prompt).to(self._device)
        length = inputs["input_ids"].shape[-1] if "input_ids" in inputs else 0
        with torch.inference_mode():
            made = self._model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([_UnlessCancelled(job, tokens, length)]),
            )
        if job.cancel.is_set():
            raise Cancelled
        is_continued = not self._model.config.is_encoder_decoder
        answer = made[0][length:] if is_continued else made[0]
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def _inputs(self, picture: Image.Image, prompt: str) -> Any:
        """As a chat where the model has a template for one; models that only see take the picture alone."""
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
            return self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        return self._processor(images=picture, return_tensors="pt")


class _UnlessCancelled(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation that nobody wants, and tells how far it is."""

    def __init__(self, job: Job, tokens: int, length: int) -> None:
        self._job, self._tokens, self._length = job, tokens, length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if not self._job.cancel.is_set():
            self._job.step(input_ids.shape[-1] - self._length, self._tokens)
        return torch.full((input_ids.shape[0],), self._job.cancel.is_set(), device=input_ids.device, dtype=torch.bool)
