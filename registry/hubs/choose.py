"""Which hub to take a model from when a launch does not say: pure but for one question to the network."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from registry.decode import did_you_mean
from registry.hubs import HUBS
from registry.hubs.base import HubError

AUTO = "auto"
TRUE = ("1", "on", "yes", "true")
DEFAULT_ENDPOINT = "https://huggingface.co"
REACH_LIMIT_S = 3.0
KEEP_S = 600.0


def choose_hub(wish: str | None, environment: Mapping[str, str]) -> str:
    """The hub to use: the wish, else XINFERENCE_MODEL_SRC, else huggingface if it can be reached, else modelscope.

    `auto` is no wish. May wait for the network up to 3 s, once in 10 minutes: call it in a thread.

    Raises:
        HubError: the hub named by the wish or by XINFERENCE_MODEL_SRC does not exist.
    """
    for said, where in ((wish, "download_hub"), (environment.get("XINFERENCE_MODEL_SRC"), "XINFERENCE_MODEL_SRC")):
        if not said or said == AUTO:
            continue
        if said not in HUBS:
            hint = did_you_mean(said, [*HUBS, AUTO], what="Known hubs")
            raise HubError(f"There is no hub {said!r}, which {where} names. {hint}", permanent=True)
        return said
    if is_offline(environment):
        return "huggingface"
    return "huggingface" if is_reachable(environment) else "modelscope"


def is_offline(environment: Mapping[str, str]) -> bool:
    """Whether the environment forbids to ask any hub."""
    return any(environment.get(name, "").lower() in TRUE for name in ("HOSTLER_OFFLINE", "HF_HUB_OFFLINE"))


def is_reachable(environment: Mapping[str, str]) -> bool:
    """Whether the Hugging Face Hub, or HF_ENDPOINT, answers within 3 s; what was found is kept for 10 minutes."""
    endpoint = (environment.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    proxies = _proxies(environment)
    key = (endpoint, *sorted(proxies.items()))
    with _asking:
        known = _answers.get(key)
        if known is None or time.monotonic() - known[1] > KEEP_S:
            known = _answers[key] = (_ask(endpoint, proxies), time.monotonic())
    return known[0]


def forget() -> None:
    """Ask anew next time."""
    with _asking:
        _answers.clear()


_asking = threading.Lock()
_answers: dict[tuple[object, ...], tuple[bool, float]] = {}


def _ask(endpoint: str, proxies: dict[str, str]) -> bool:
    # A thread, as looking up a name cannot be given a limit.
    answers: list[bool] = []
    thread = threading.Thread(
        target=lambda: answers.append(_answers_at_all(endpoint, proxies)), name="reach", daemon=True
    )
    thread.start()
    thread.join(REACH_LIMIT_S)
    return bool(answers and answers[0])


def _answers_at_all(endpoint: str, proxies: dict[str, str]) -> bool:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.parse import urlsplit
    from urllib.request import ProxyHandler, Request, build_opener
    from urllib.request import proxy_bypass_environment as is_bypassed  # type: ignore[attr-defined]

    try:
        is_direct = is_bypassed(urlsplit(endpoint).netloc, proxies)
        opener = build_opener(ProxyHandler({} if is_direct else proxies))
        with opener.open(Request(endpoint, method="HEAD"), timeout=REACH_LIMIT_S):  # noqa: S310 - a person set it
            return True
    except HTTPError as exc:
        return exc.code < 500 and exc.code != 407  # else a proxy speaks, not the hub
    except (OSError, HTTPException, ValueError):
        return False


def _proxies(environment: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for scheme in ("http", "https"):
        name = f"{scheme}_proxy"
        if proxy := environment.get(name) or environment.get(name.upper()):
            found[scheme] = proxy
    if found and (bypassed := environment.get("no_proxy") or environment.get("NO_PROXY")):
        found["no"] = bypassed
    return found
