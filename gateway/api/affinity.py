"""Which requests belong together, so that the same replica gets them and finds what it has read before.

A key is a hash of what the client says, or of how a conversation begins. Which replica it is drawn to is for
`Deployment.pick` to compute; nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec

from gateway.api.heads import ChatHead, PromptHead
from gateway.queue import Key

SESSION_HEADERS = frozenset((b"x-session-id", b"x_session_id", b"x-litellm-session-id", b"x-smg-routing-key"))
WORTH_BYTES = 1024  # a conversation that is shorter is read again in no time
MESSAGES_READ = 4  # of a conversation, until one is the user's
READ_BYTES = 2048  # of each message
PROMPT_BYTES = 512
KEY_BYTES = 8
SESSION_BUSIER_BY = 4  # requests that a replica may have more than another and still get what belongs to it
OPENING_BUSIER_BY = 0  # what was read before is not worth a wait


class _Role(msgspec.Struct, frozen=True):
    role: str = ""


_decode_role = msgspec.json.Decoder(_Role).decode


def key_of(headers: Iterable[tuple[bytes, bytes]], head: object, *, reads_opening: bool) -> Key | None:
    """What a request is found again by: its session, else how its conversation begins; None if there is nothing.

    Args:
        reads_opening: whether the beginning matters, as to an engine that keeps what it has read.
    """
    for name, value in headers:
        if name in SESSION_HEADERS and value:
            return Key(_hash([value]), SESSION_BUSIER_BY)
    if not reads_opening:
        return None
    if isinstance(head, ChatHead) and _is_worth(head.messages):
        return Key(_hash(_opening(head.messages)), OPENING_BUSIER_BY)
    if isinstance(head, PromptHead) and _is_worth([head.prompt]):
        return Key(_hash([bytes(memoryview(head.prompt)[:PROMPT_BYTES])]), OPENING_BUSIER_BY)
    return None


def _is_worth(parts: Sequence[msgspec.Raw]) -> bool:
    """Whether there is so much that it matters who has read it before."""
    size_bytes = 0
    for part in parts:
        size_bytes += memoryview(part).nbytes
        if size_bytes >= WORTH_BYTES:
            return True
    return False


def _opening(messages: Sequence[msgspec.Raw]) -> list[bytes]:
    """Up to the user's first message: what every later turn of the conversation begins with too."""
    opening = []
    for message in messages[:MESSAGES_READ]:
        opening.append(bytes(memoryview(message)[:READ_BYTES]))
        try:
            if _decode_role(message).role == "user":
                break
        except msgspec.MsgspecError:
            break  # what it is to be is for the engine to say
    return opening


def _hash(parts: Sequence[bytes]) -> int:
    digest = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")
