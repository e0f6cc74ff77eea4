"""A worker that completes and chats by the transformers library, all requests in one batch.

Options: see `engines/transformers.py`, which also says how the family writes its thinking and its tool calls.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from engines.workers.answers import Message, Text, message_of
from engines.workers.device import torch_device
from engines.workers.generators import new_batch
from engines.workers.grammars import Grammar, Grammars
from engines.workers.sampling import MOST_LOGPROBS, Line, Wish
from engines.workers.server import (
    Order,
    Refused,
    flag,
    number,
    read_json,
    serve,
    stream_failure,
    unless_client_leaves,
)
from engines.workers.tool_calls import FORMS, MARKS, form_of, tools_of

COMPLETION_TOKENS = 16
MOST_CHOICES = 128
# What cannot be done here and changes the answer, so that it must not pass unnoticed.
NOT_HERE = (
    "guided_grammar",
    "suffix",
    "logits_processors",
)


def main() -> None:
    """Serve the model of the arguments."""
    serve(load)


def load(order: Order) -> list[BaseRoute]:
    """The model and its tokenizer, and the routes that answer with them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = order.options
    device = torch_device(options)
    trust = {"trust_remote_code": bool(options.get("trust_remote_code"))}
    tokenizer = AutoTokenizer.from_pretrained(order.model, **trust)
    how: dict[str, Any] = {"dtype": options.get("dtype") or "auto", **trust}
    for name in ("attn_implementation", "device_map"):
        if options.get(name):
            how[name] = options[name]
    if device == "cuda" and torch.cuda.device_count() > 1:
        how.setdefault("device_map", "auto")
    if quantization := options.get("quantization_config"):
        from transformers import BitsAndBytesConfig

        how["quantization_config"] = BitsAndBytesConfig(**quantization)
    model = AutoModelForCausalLM.from_pretrained(order.model, **how)
    for adapter in options.get("lora_list") or ():
        model = _merged(model, adapter["local_path"])
    model = model.eval()
    if "device_map" not in how and "quantization_config" not in how:
        model = model.to(device)
    return Generation(order, model, tokenizer).routes()


def _merged(model: Any, folder: str) -> Any:
    """The model with the adapter's weights in its own."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise Refused(f"The LoRA adapter in {folder} does not go into this model: {exc}") from exc


class Generation:
    """The routes of one model."""

    def __init__(self, order: Order, model: Any, tokenizer: Any) -> None:
        options = order.options
        self._uid = order.uid
        self._tokenizer = tokenizer
        self._template: str | None = options.get("chat_template")
        self._template_values = options.get("template_values") or {}
        self._tags = tuple(options["reasoning_tags"]) if options.get("reasoning_tags") else None
        context, cache_tokens = options["context_length"], options["kv_cache_tokens"]
        of_model = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context
        self._context = min(context, of_model, cache_tokens)  # one that needs more would end all others
        self._vocabulary = model.config.get_text_config().vocab_size
        self._defaults = model.generation_config
        self._end_ids = _end_ids(model.generation_config, tokenizer)
        self._grammars = Grammars(tokenizer, self._vocabulary, self._end_ids, self._tags)
        template = self._template or tokenizer.chat_template
        self._form = FORMS[options["tool_form"]] if options.get("tool_form") else form_of(str(template))
        special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        self._unmarked = {token for token, text in special.items() if text not in MARKS}
        most_lines = options.get("max_num_seqs") or 8
        self._batch = new_batch(
            model,
            together=options.get("continuous_batching", True) and len(getattr(model, "hf_device_map", None) or [0]) < 2,
            cache_tokens=min(cache_tokens, self._context * most_lines),
            batch_tokens=options.get("max_num_batched_tokens") or 512,
            most_lines=most_lines,
        )

    def routes(self) -> list[BaseRoute]:
        """What there is to ask."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/load", self.server_load),
        ]

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [{"id": self._uid, "object": "model", "owned_by": "hostler"}]})

    async def server_load(self, request: Request) -> Response:
        """How many sequences are being written."""
        return JSONResponse({"server_load": self._batch.running})

    async def tokenize(self, request: Request) -> Response:
        """Text, or a chat, as token ids."""
        body = await read_json(request)
        if "messages" in body:
            ids = (await asyncio.to_thread(self._encode_chat, body))[0]
        else:
            (ids,) = await asyncio.to_thread(self._encode, body.get("prompt"))
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self._context})

    async def detokenize(self, request: Request) -> Response:
        """Token ids as text."""
        tokens = (await read_json(request)).get("tokens")
        if not _are_ids(tokens, self._vocabulary):
            raise Refused("`tokens` is a list of token ids.", param="tokens")
        return JSONResponse({"prompt": self._tokenizer.decode(tokens)})

    # --- completions

    async def complete(self, request: Request) -> Response:
        """OpenAI's completion."""
        body = await read_json(request)
        prompts = await asyncio.to_thread(self._encode, body.get("prompt"))
        echo = flag(body.get("echo"), "echo")
        n = number(body.get("n") or 1, "n", int, least=1, most=MOST_CHOICES)
        answers = []
        for prompt in prompts:
            wish = self._wish(body, len(prompt), COMPLETION_TOKENS, _completion_logprobs(body))
            grammars = await asyncio.to_thread(self._grammars.asked, body)
            answers += [Answer(self, prompt, wish, copy, grammars=grammars) for copy in range(n)]
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"} | self._head()
        heads = [self._decode(answer.prompt) if echo else "" for answer in answers]

        def choice(index: int, text: str, answer: Answer, piece: Piece | None) -> dict[str, Any]:
            told = {
                "index": index,
                "text": text,
                "finish_reason": answer.finish if piece is None or piece.is_last else None,
            }
            chances = answer.take_chances()
            return told | {"logprobs": self._told_for_completion(chances)}

        if flag(body.get("stream"), "stream"):
            streams = [stream_of(i, answer) for i, answer in enumerate(answers)]

            async def events() -> AsyncIterator[dict[str, Any]]:
                async for index, piece in merged(streams, answers):
                    text, heads[index] = heads[index] + piece.text, ""
                    yield head | {"choices": [choice(index, text, answers[index], piece)]}

            return self._stream(events(), head, answers, body)
        texts = await unless_client_leaves(request, whole(answers))
        choices = [choice(i, heads[i] + text, answers[i], None) for i, text in enumerate(texts)]
        return JSONResponse(head | {"choices": choices, "usage": _usage(prompts, answers)})

    # --- chats

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat."""
        body = await read_json(request)
        prompt, text, tools = await asyncio.to_thread(self._encode_chat, body)
        n = number(body.get("n") or 1, "n", int, least=1, most=MOST_CHOICES)
        wish = self._wish(body, len(prompt), None, _chat_logprobs(body))
        # The template may have opened the thinking.
        is_thinking = bool(self._tags and self._tags[0]) and text.rstrip().endswith((self._tags or ("",))[0])
        grammars = await asyncio.to_thread(self._grammars.asked, body, is_thinking=is_thinking)
        decode = self._decode_marks if tools else self._decode
        answers = [Answer(self, prompt, wish, copy, decode, grammars) for copy in range(n)]
        messages = [self._message(tools, is_thinking=is_thinking) for _ in answers]
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"} | self._head()

        def end(answer: Answer, message: Message) -> str | None:
            return "tool_calls" if message.calls and answer.finish == "stop" else answer.finish

        if flag(body.get("stream"), "stream"):
            head["object"] += ".chunk"
            streams = [stream_of(i, answer) for i, answer in enumerate(answers)]

            async def events() -> AsyncIterator[dict[str, Any]]:
                for index in range(n):
                    yield head | {"choices": [_delta(index, {"role": "assistant", "content": ""})]}
                async for index, piece in merged(streams, answers):
                    answer, message = answers[index], messages[index]
                    deltas = message.add(piece.text, is_last=piece.is_last)
                    chances = self._told_for_chat(answer.take_chances())
                    for delta in deltas or ([{}] if piece.is_last or chances else []):
                        is_end = piece.is_last and (not deltas or delta is deltas[-1])
                        told = _delta(index, delta, end(answer, message) if is_end else None, chances)
                        chances = None
                        yield head | {"choices": [told]}

            return self._stream(events(), head, answers, body)
        texts = await unless_client_leaves(request, whole(answers))
        choices = []
        for index, (answer, message, written) in enumerate(zip(answers, messages, texts, strict=True)):
            deltas = message.add(written, is_last=True)
            choices.append(
                {
                    "index": index,
                    "message": message_of(deltas),
                    "logprobs": self._told_for_chat(answer.take_chances()),
                    "finish_reason": end(answer, message),
                }
            )
        return JSONResponse(head | {"choices": choices, "usage": _usage([prompt], answers)})

    def _message(self, tools: list[Any], *, is_thinking: bool) -> Message:
        return Message(
            tags=(self._tags[0], self._tags[1]) if self._tags and self._tags[0] else None,
            is_thinking=is_thinking,
            form=self._form if tools else None,
            types=tools_of(tools),
        )

    def _stream(
        self, events: AsyncIterator[dict[str, Any]], head: dict[str, Any], answers: list[Answer], body: dict[str, Any]
    ) -> Response:
        options = body.get("stream_options")
        has_usage = isinstance(options, dict) and flag(options.get("include_usage"), "stream_options.include_usage")

        async def lines() -> AsyncIterator[str]:
            try:
                for answer in answers:
                    answer.start()
                async for event in events:
                    yield _event(event)
                if has_usage:
                    prompts = list({id(answer.prompt): answer.prompt for answer in answers}.values())
                    yield _event(head | {"choices": [], "usage": _usage(prompts, answers)})
            except Exception as exc:
                yield _event(json.loads(bytes(stream_failure(exc).body)))
            finally:
                for answer in answers:
                    answer.cancel()
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    # --- reading requests

    def _head(self) -> dict[str, Any]:
        return {"created": int(time.time()), "model": self._uid}

    def _encode(self, prompt: Any) -> list[list[int]]:
        """A text, some texts, token ids or lists of such."""
        if _are_ids(prompt, self._vocabulary):
            return [prompt]
        several = prompt if isinstance(prompt, list) else [prompt]
        found = [self._tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in several]
        if not found or not all(_are_ids(one, self._vocabulary) for one in found):
            raise Refused(
                "`prompt` is a text, a list of token ids, or a list of either, and not empty.", param="prompt"
            )
        return found

    def _encode_chat(self, body: dict[str, Any]) -> tuple[list[int], str, list[Any]]:
        """The chat as the model reads it: tokens, text; and the tools that it may call."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused("`messages` is a list of messages, and not empty.", param="messages")
        tools = _tools(body)
        values = dict(self._template_values)
        given = body.get("chat_template_kwargs") or {}
        if not isinstance(given, dict):
            raise Refused("`chat_template_kwargs` is an object.", param="chat_template_kwargs")
        goes_on = flag(body.get("continue_final_message"), "continue_final_message")
        is_open = flag(body.get("add_generation_prompt"), "add_generation_prompt", default=not goes_on)
        try:
            text = self._tokenizer.apply_chat_template(
                [_plain(message) for message in messages],
                tools=tools or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=is_open,
                continue_final_message=goes_on,
                **(values | given),
            )
        except Refused:
            raise
        except Exception as exc:  # a template is a program of the model's makers, and may fail as it likes
            raise Refused(f"The model's chat template refuses these messages: {exc}.", param="messages") from exc
        return self._tokenizer(text, add_special_tokens=False)["input_ids"], text, tools

    def _wish(self, body: dict[str, Any], prompt_tokens: int, default: int | None, logprobs: int | None) -> Wish:
        for name in NOT_HERE:
            if body.get(name):
                raise Refused(f"The transformers engine has no `{name}`; vLLM and llama.cpp have more.", param=name)
        room = self._context - prompt_tokens
        larger = "launch the model with a larger context_length (and kv_cache_tokens, if it says so)"
        if room < 1:
            raise Refused(
                f"The prompt has {prompt_tokens} tokens, and the model's context is {self._context}. Shorten it, or "
                f"{larger}.",
                code="context_length_exceeded",
            )
        wished = body.get("max_completion_tokens") or body.get("max_tokens")
        tokens = number(wished, "max_tokens", int, least=1, most=10**9) if wished else min(default or room, room)
        if tokens > room:
            raise Refused(
                f"max_tokens={tokens} and a prompt of {prompt_tokens} tokens are more than the model's context of "
                f"{self._context}. Ask for fewer, or {larger}.",
                param="max_tokens",
                code="context_length_exceeded",
            )

        def real(name: str, default: float, least: float, most: float) -> float:
            found = body.get(name)
            found = getattr(self._defaults, name, None) if found is None else found
            return float(number(default if found is None else found, name, float, least=least, most=most))

        ends = _ids(body.get("stop_token_ids"), "stop_token_ids")
        if not flag(body.get("ignore_eos"), "ignore_eos"):
            ends |= self._end_ids
        seed = body.get("seed")
        return Wish(
            max_tokens=tokens,
            temperature=real("temperature", 1.0, 0.0, 100.0),
            top_p=real("top_p", 1.0, 0.0, 1.0),
            top_k=max(0, int(real("top_k", 0, -1, 2**31))),
            min_p=real("min_p", 0.0, 0.0, 1.0),
            seed=None if seed is None else number(seed, "seed", int, least=-(2**63), most=2**64 - 1),
            presence_penalty=real("presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=real("frequency_penalty", 0.0, -2.0, 2.0),
            repetition_penalty=real("repetition_penalty", 1.0, 0.01, 100.0),
            logit_bias=_biases(body.get("logit_bias"), self._vocabulary),
            logprobs=logprobs,
            end_ids=frozenset(ends),
            stop=_texts(body.get("stop"), "stop"),
        )

    # --- telling probabilities

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _decode_marks(self, tokens: list[int]) -> str:
        """With the marks of tool calls, also where these are special tokens."""
        text: str = self._tokenizer.decode(
            [token for token in tokens if token not in self._unmarked], skip_special_tokens=False
        )
        return text

    def _told_for_chat(self, chances: list[Chance]) -> dict[str, Any] | None:
        def one(token: int, value: float) -> dict[str, Any]:
            text = self._tokenizer.decode([token])
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        if not chances:
            return None
        told = [one(token, value) | {"top_logprobs": [one(*pair) for pair in most]} for token, (value, most) in chances]
        return {"content": told}

    def _told_for_completion(self, chances: list[Chance]) -> dict[str, Any] | None:
        if not chances:
            return None
        texts = [self._tokenizer.decode([token]) for token, _ in chances]
        return {
            "tokens": texts,
            "token_logprobs": [value for _, (value, _) in chances],
            "top_logprobs": [
                {self._tokenizer.decode([token]): value for token, value in most} for _, (_, most) in chances
            ],
        }


Chance = tuple[int, tuple[float, list[tuple[int, float]]]]


class Piece:
    """Text that has come, and whether it is the last."""

    def __init__(self, text: str, is_last: bool) -> None:
        self.text, self.is_last = text, is_last


class Answer:
    """One choice of an answer while it is written."""

    def __init__(
        self,
        generation: Generation,
        prompt: list[int],
        wish: Wish,
        copy: int,
        decode: Callable[[list[int]], str] | None = None,
        grammars: Sequence[Grammar] = (),
    ) -> None:
        if wish.seed is not None and copy:
            wish = replace(wish, seed=wish.seed + copy)
        self.prompt = prompt
        self.finish: str | None = None
        self.n_tokens = 0
        self._batch = generation._batch
        self._text = Text(decode or generation._decode, wish.stop)
        self._wish = wish
        self._came: asyncio.Queue[tuple[list[int], bool, BaseException | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(tokens: list[int], is_last: bool, exc: BaseException | None) -> None:
            loop.call_soon_threadsafe(self._came.put_nowait, (tokens, is_last, exc))

        self._line = Line(prompt, wish, put, grammar=next((one.copy() for one in grammars), None))
        self._tokens: list[int] = []
        self._told = 0

    def start(self) -> None:
        """Begin to write; whoever calls it sees to `cancel`."""
        self._batch.start(self._line)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes; the last piece may be empty."""
        while self.finish is None:
            tokens, is_last, exc = await self._came.get()
            if exc is not None:
                raise exc
            ended = bool(tokens) and tokens[-1] in self._wish.end_ids
            self.n_tokens += len(tokens)
            self._tokens += tokens
            is_last = is_last or ended
            text = self._text.add(tokens[:-1] if ended else tokens, is_last=is_last)
            if self._text.is_stopped:
                self.cancel()
                is_last = ended = True
            if is_last:
                self.finish = "stop" if ended else "length"
            if text or is_last:
                yield Piece(text, is_last)

    def take_chances(self) -> list[Chance]:
        """The probabilities of the tokens since the last call, if they are wished for."""
        if self._wish.logprobs is None:
            return []
        begin, self._told = self._told, len(self._tokens)
        return list(zip(self._tokens[begin:], self._line.chances[begin : len(self._tokens)], strict=False))

    def cancel(self) -> None:
        """Write no further."""
        self._batch.cancel(self._line)


async def stream_of(index: int, answer: Answer) -> AsyncIterator[tuple[int, Piece]]:
    """An answer's pieces with its number."""
    async for piece in answer.pieces():
        yield index, piece


async def merged(
    streams: Sequence[AsyncIterator[tuple[int, Piece]]], answers: Sequence[Answer]
) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of several answers as they come."""
    if len(streams) == 1:
        async for one in streams[0]:
            yield one
        return
    pieces: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncIterator[tuple[int, Piece]]) -> None:
        try:
            async for one in stream:
                await pieces.put(one)
            await pieces.put(None)
        except Exception as exc:  # told to whoever reads
            await pieces.put(exc)

    pumps = [asyncio.ensure_future(pump(stream)) for stream in streams]
    try:
        left = len(pumps)
        while left:
            came = await pieces.get()
            if isinstance(came, BaseException):
                raise came
            if came is None:
                left -= 1
            else:
                yield came
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def whole(answers: Sequence[Answer]) -> list[str]:
    """The texts of all answers; none goes on once this is left."""

    async def one(answer: Answer) -> str:
        return "".join([piece.text async for piece in answer.pieces()])

    try:
        for answer in answers:
            answer.start()
        return list(await asyncio.gather(*(one(answer) for answer in answers)))
    finally:
        for answer in answers:
            answer.cancel()


# --- reading the fields of requests


def _usage(prompts: Sequence[list[int]], answers: Sequence[Answer]) -> dict[str, int]:
    asked, written = sum(map(len, prompts)), sum(answer.n_tokens for answer in answers)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _delta(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _end_ids(of_model: Any, tokenizer: Any) -> set[int]:
    ends = of_model.eos_token_id
    found = set(ends) if isinstance(ends, list | tuple) else {ends}
    return {end for end in (*found, tokenizer.eos_token_id) if end is not None}


def _are_ids(value: Any, vocabulary: int) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 <= one < vocabulary for one in value)


def _ids(value: Any, name: str) -> set[int]:
    if value is None:
        return set()
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise Refused(f"`{name}` is a list of token ids.", param=name)
    return set(value)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(one, str) for one in several):
        raise Refused(f"`{name}` is a text, or a list of texts.", param=name)
    return tuple(several)


def _biases(value: Any, vocabulary: int) -> dict[int, float]:
    try:
        found = {int(token): float(bias) for token, bias in (value or {}).items()}
    except (AttributeError, TypeError, ValueError) as exc:
        raise Refused("`logit_bias` is an object of token ids and numbers.", param="logit_bias") from exc
    if not all(0 <= token < vocabulary for token in found):
        raise Refused("`logit_bias` names a token that the model does not have.", param="logit_bias")
    return found


def _completion_logprobs(body: dict[str, Any]) -> int | None:
    wished = body.get("logprobs")
    if wished is None or wished is False:
        return None
    return int(number(1 if wished is True else wished, "logprobs", int, least=0, most=MOST_LOGPROBS))


def _chat_logprobs(body: dict[str, Any]) -> int | None:
    if not flag(body.get("logprobs"), "logprobs"):
        return None
    return int(number(body.get("top_logprobs") or 0, "top_logprobs", int, least=0, most=MOST_LOGPROBS))


def _tools(body: dict[str, Any]) -> list[Any]:
    """The tools that the model may call; it cannot be made to."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if not isinstance(tools, list):
        raise Refused("`tools` is a list of tools.", param="tools")
    if choice == "none":
        return []
    if choice not in (None, "auto"):
        raise Refused(
            "The transformers engine cannot make the model call a tool: `tool_choice` is auto or none. vLLM can.",
            param="tool_choice",
        )
    return tools


def _plain(message: Any) -> dict[str, Any]:
    """A message as templates read it: content as one text, arguments of tool calls as objects."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused("Each of `messages` is an object with a `role`.", param="messages")
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Refused(
                "The transformers engine reads text only; vLLM and llama.cpp read pictures.", param="messages"
            )
        plain["content"] = "".join(str(part.get("text", "")) for part in content)
    elif content is None:
        plain["content"] = ""
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_with_arguments(call) for call in plain["tool_calls"]]
    return plain


def _with_arguments(call: Any) -> Any:
    try:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"])
        return {**call, "function": function}
    except (KeyError, TypeError, ValueError):
        return call


if __name__ == "__main__":
    main()
    sys.exit(0)
