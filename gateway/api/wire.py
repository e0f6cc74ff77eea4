"""What travels on the wire, in and out, and the lenient reading of launch bodies."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.deployment import Deployment
from gateway.launch import LaunchRequest
from gateway.process import memory_bytes
from gateway.replica import Failure, Replica
from registry.decode import decode
from registry.schema import LLMFamily


class ChatHead(msgspec.Struct, frozen=True):
    """What we read of a chat request; the rest of the body passes through unread."""

    model: str
    messages: list[msgspec.Raw]
    stream: bool | None = None


class CompletionHead(msgspec.Struct, frozen=True):
    """What we read of a completion request."""

    model: str
    prompt: msgspec.Raw
    stream: bool | None = None


class EmbeddingHead(msgspec.Struct, frozen=True):
    """What we read of an embedding request."""

    model: str
    input: msgspec.Raw
    stream: bool | None = None


Head = ChatHead | CompletionHead | EmbeddingHead


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model as OpenAI's clients list it, with its state."""

    id: str
    created: int
    status: str
    model_name: str
    model_type: str
    model_format: str
    model_engine: str
    model_ability: tuple[str, ...]
    context_length: int | None
    quantization: str
    replica: int
    object: str = "model"
    owned_by: str = "hostler"


class ModelList(msgspec.Struct, frozen=True):
    """OpenAI's list of models."""

    data: list[ModelCard]
    object: str = "list"


class ReplicaCard(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as operators see it. Times in seconds, memory in bytes."""

    uid: str
    replica: int
    state: str
    state_s: float
    engine: str
    pid: int | None
    address: str | None
    memory_bytes: int | None
    in_flight: int
    waiting: int
    idle_s: float | None
    starts: int
    progress: str | None
    log: str
    failure: Failure | None


def model_card(deployment: Deployment, created: int) -> ModelCard:
    """A deployment for the list of models."""
    launch = deployment.launch
    family, spec = launch.artifact.family, launch.artifact.spec
    return ModelCard(
        id=launch.uid,
        created=created,
        status=deployment.state,
        model_name=family.model_name,
        model_type=family.model_type,
        model_format=spec.model_format,
        model_engine=launch.engine,
        model_ability=family.abilities,
        context_length=family.context_length if isinstance(family, LLMFamily) else None,
        quantization=spec.quantization,
        replica=launch.replica,
    )


def replica_card(deployment: Deployment, replica: Replica, now: float) -> ReplicaCard:
    """A replica for `hostler ps`; `now` is of time.monotonic."""
    pid = replica.process.pid if replica.process else None
    return ReplicaCard(
        uid=deployment.launch.uid,
        replica=replica.index,
        state=replica.state,
        state_s=now - replica.state_since,
        engine=deployment.launch.engine,
        pid=pid,
        address=replica.address,
        memory_bytes=memory_bytes(pid) if pid else None,
        in_flight=replica.in_flight,
        waiting=deployment.waiting,
        idle_s=now - replica.last_used if replica.upstream and not replica.in_flight else None,
        starts=replica.starts,
        progress=str(replica.progress) if replica.progress else None,
        log=str(replica.log),
        failure=replica.failure,
    )


def read_launch(body: dict[str, Any]) -> tuple[str | None, LaunchRequest]:
    """A launch body as users write it: nulls count as absent, unknown keys are options of the engine.

    Returns:
        the uid wished for, if any, and the request.
    Raises:
        DecodeError: naming the key and what is allowed.
    """
    given: dict[str, Any] = {"preload": True}  # launched means running, after a restart too
    given |= {key: value for key, value in body.items() if value is not None}
    uid = given.pop("model_uid", None)
    if "download_hub" in given:
        given["model_hub"] = given.pop("download_hub")
    known = set(LaunchRequest.__struct_encode_fields__)
    options = {key: given.pop(key) for key in list(given) if key not in known}
    if options:
        given["options"] = options | given.get("options", {})
    return uid if uid is None else str(uid), decode(given, LaunchRequest, "$", strict=False)
