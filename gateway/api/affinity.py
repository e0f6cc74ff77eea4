"""Which requests belong together, so that the same replica gets them and finds what it has read before.

A key is a hash of what the client says, or of how a conversation begins. Which replica it is drawn to is for
`Deployment.pick` to compute; nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec

from gateway.api.heads import ChatHead, PromptHead

SESSION_HEADERS = frozenset((b"x-session-id", b"x_session_id", b"x-litellm-session-id", b"x-smg-routing-key"))
WORTH_BYTES = 1024  # a conversation that is shorter is read again in no time
MESSAGES_READ = 4  # of a conversation, until one is the user's
READ_BYTES = 2048  # of each message
PROMPT_BYTES = 512
KEY_BYTES = 8


class _Role(msgspec.Struct, frozen=True):
    role: str = ""


_decode_role = msgspec.json.Decoder(_Role).decode


def key_of(headers: Iterable[tuple[bytes, bytes]], head: object, *, reads_opening: bool) -> int:
    """What a request is found again by: its session, else how its conversation begins; 0 if there is nothing.

    Args:
        reads_opening: whether the beginning matters, as to an engine that keeps what it has read.
    """
    for name, value in headers:
        if name in SESSION_HEADERS and value:
            return _hash([value])
    if not reads_opening:
        return 0
    if isinstance(head, ChatHead) and _is_worth(head.messages):
        return _hash(_opening(head.messages))
    if isinstance(head, PromptHead) and _is_worth([head.prompt]):
        return _hash([bytes(memoryview(head.prompt)[:PROMPT_BYTES])])
    return 0


def _is_worth(parts: Sequence[msgspec.Raw]) -> bool:
    """Whether there is so much that reading it again would cost more than waiting for a busier replica."""
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
    return int.from_bytes(digest.digest(), "little") or 1
