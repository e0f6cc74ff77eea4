"""Every metric, named and created in one place. Scraping reads what is known and never asks an engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from gateway.deployment import Deployment

CONTENT_TYPE = CONTENT_TYPE_LATEST
PAUSES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Times:
    """How long something took, so often as it was: what a histogram is told from."""

    __slots__ = ("bounds", "counts", "total_s")

    def __init__(self, bounds: tuple[float, ...] = DURATIONS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds

    def tell(self, family: HistogramMetricFamily, uid: str) -> None:
        """Put it among the metrics."""
        bounds = (*map(floatToGoString, self.bounds), "+Inf")
        family.add_metric((uid,), list(zip(bounds, accumulate(self.counts), strict=True)), self.total_s)


class Tally:
    """What every request to one model is counted in: plain numbers, since only a scrape needs their long form."""

    __slots__ = (
        *("answered", "durations", "first_bytes", "between_tokens", "prompt_tokens", "completion_tokens", "reasons"),
    )

    def __init__(self) -> None:
        self.answered: dict[tuple[str, int], int] = {}  # by route and status
        self.durations = Times()
        self.first_bytes = Times()
        self.between_tokens = Times(PAUSES)
        self.prompt_tokens = self.completion_tokens = 0
        self.reasons: dict[str, int] = {}  # how often the engine said no more for it

    def count(self, route: str, status: int, seconds: float) -> None:
        """A request has ended; 499 is the status of those whose client left."""
        key = route, status
        self.answered[key] = self.answered.get(key, 0) + 1
        self.durations.add(seconds)


_tallies: dict[str, Tally] = {}


def tally_of(uid: str) -> Tally:
    """The one of a model that is served; others make no series."""
    tally = _tallies.get(uid)
    if tally is None:
        tally = _tallies[uid] = Tally()
    return tally


class TallyCollector(Collector):
    """The tallies in Prometheus' form."""

    def collect(self) -> Iterator[Metric]:
        """What was counted of all models."""
        requests = CounterMetricFamily(
            "hostler_requests",
            "Requests answered, 499 being those whose client left.",
            labels=("model", "route", "status"),
        )
        durations = HistogramMetricFamily(
            "hostler_request_duration_seconds", "From the request to the last byte.", labels=("model",)
        )
        first_bytes = HistogramMetricFamily(
            "hostler_time_to_first_byte_seconds", "From the request to the engine's first byte.", labels=("model",)
        )
        between_tokens = HistogramMetricFamily(
            "hostler_inter_token_seconds", "Of each stream, from token to token on average.", labels=("model",)
        )
        prompt_tokens = CounterMetricFamily(
            "hostler_prompt_tokens", "Tokens of requests, as engines tell.", labels=("model",)
        )
        completion_tokens = CounterMetricFamily(
            "hostler_completion_tokens",
            "Tokens of replies, as engines tell; of streams whose engine does not, those that came.",
            labels=("model",),
        )
        reasons = CounterMetricFamily("hostler_finish_reasons", "Why engines said no more.", labels=("model", "reason"))
        for uid, tally in _tallies.items():
            for (route, status), count in tally.answered.items():
                requests.add_metric((uid, route, str(status)), count)
            tally.durations.tell(durations, uid)
            tally.first_bytes.tell(first_bytes, uid)
            tally.between_tokens.tell(between_tokens, uid)
            prompt_tokens.add_metric((uid,), tally.prompt_tokens)
            completion_tokens.add_metric((uid,), tally.completion_tokens)
            for reason, count in tally.reasons.items():
                reasons.add_metric((uid, reason), count)
        yield from (requests, durations, first_bytes, between_tokens, prompt_tokens, completion_tokens, reasons)


REGISTRY.register(TallyCollector())

QUEUE_SECONDS = Histogram(
    "hostler_queue_wait_seconds", "Requests that waited for a model: how long.", ("model",), buckets=DURATIONS
)
REFUSED = Counter(
    "hostler_requests_refused",
    "Requests answered 429: busy (request_limits), or queue_full (queue_limit).",
    ("model", "reason"),
)
LOAD_SECONDS = Histogram(
    "hostler_model_load_seconds", "From the engine's start until it is ready.", ("model",), buckets=DURATIONS
)
CANCELLED = Counter(
    "hostler_requests_cancelled", "Requests whose client left, by what they were doing.", ("model", "phase")
)
RETRIES = Counter(
    "hostler_request_retries", "Requests sent a second time, as the engine died before a byte.", ("model",)
)
EVICTIONS = Counter("hostler_model_evictions", "Replicas that were ended to make room for another model.", ("model",))
SLEEPS = Counter("hostler_model_sleeps", "Replicas that fell asleep, by the tier.", ("model", "tier"))
WAKES = Counter("hostler_model_wakes", "Replicas that were woken, by the tier in which they slept.", ("model", "tier"))
WAKE_SECONDS = Histogram(
    "hostler_model_wake_seconds", "From having room to being ready again.", ("model", "tier"), buckets=DURATIONS
)
TURNED_AWAY = Counter("hostler_clients_turned_away", "Requests refused, as too many clients were connected.")
ADOPTIONS = Counter(
    "hostler_engine_adoptions", "Engines that an earlier gateway started, and that go on without a load.", ("model",)
)
ENGINE_RESTARTS = Counter(
    "hostler_engine_failures", "Lives of an engine that ended otherwise than by our wish, and why.", ("model", "cause")
)

OF_MODELS = (
    *(QUEUE_SECONDS, REFUSED, LOAD_SECONDS, CANCELLED, RETRIES, EVICTIONS, SLEEPS, WAKES, WAKE_SECONDS, ADOPTIONS),
    ENGINE_RESTARTS,
)
GONE_KEPT = 50  # models that are gone and still have their figures, so that the last of them are scraped
_gone: dict[str, None] = {}  # the first to have gone comes first


def comes(model: str) -> None:
    """A model is there, maybe again: its figures stay."""
    _gone.pop(model, None)


def goes(model: str) -> None:
    """A model is there no longer: its figures go once enough others have gone after it."""
    comes(model)
    _gone[model] = None
    if len(_gone) > GONE_KEPT:
        first = next(iter(_gone))
        del _gone[first]
        _tallies.pop(first, None)
        for metric in OF_MODELS:
            metric.remove_by_labels({"model": first})


class FleetCollector(Collector):
    """What is read off the deployments at each scrape."""

    def __init__(self, deployments: Callable[[], list[Deployment]]) -> None:
        self._deployments = deployments

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One gauge a replica and fact."""
        in_flight = GaugeMetricFamily(
            "hostler_requests_in_flight", "Requests that an engine is answering.", labels=("model", "replica")
        )
        waiting = GaugeMetricFamily("hostler_requests_waiting", "Requests that wait for a model.", labels=("model",))
        oldest = GaugeMetricFamily(
            "hostler_queue_oldest_wait_seconds", "How long the first in the queue has waited.", labels=("model",)
        )
        now = time.monotonic()
        state = GaugeMetricFamily(
            "hostler_replica_state", "1 for the state it is in.", labels=("model", "replica", "state")
        )
        for deployment in self._deployments():
            waiting.add_metric((deployment.launch.uid,), deployment.waiting)
            since = deployment.waiting_since
            oldest.add_metric((deployment.launch.uid,), 0 if since is None else now - since)
            for replica in deployment.replicas:
                labels = (deployment.launch.uid, str(replica.index))
                in_flight.add_metric(labels, replica.in_flight)
                state.add_metric((*labels, str(replica.shown_state)), 1)
        tasks = GaugeMetricFamily(
            "hostler_tasks", "Of the gateway's own loop: a number that grows and grows is a leak."
        )
        tasks.add_metric((), len(asyncio.all_tasks()))
        yield from (in_flight, waiting, oldest, state, tasks)


def render() -> bytes:
    """All metrics, in Prometheus' text form."""
    return generate_latest(REGISTRY)


@contextlib.contextmanager
def watching(deployments: Callable[[], list[Deployment]]) -> Iterator[None]:
    """For the length of the block, what the deployments say is among the metrics."""
    collector = FleetCollector(deployments)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)
