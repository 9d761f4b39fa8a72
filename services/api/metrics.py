"""What Prometheus is told. A registry an app, and no label that holds anything a client sent."""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from typing import NamedTuple

from personalization.schemas import LATENCY_BOUNDS_S
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"
"""Route of requests for paths that are none."""


class PoolUse(NamedTuple):
    """Connections to a store."""

    store: str
    in_use: int
    idle: int


class Metrics:
    """Counts and times; one an app. Fits `Observer` of recommend/guard.py.

    Children are looked up by plain tuples: `labels()` would cost more than what it counts.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        requests = Histogram(
            "http_request_duration_seconds",
            "Time from the first byte of a request's head to the end of its answer.",
            ("route", "method", "status"),
            buckets=LATENCY_BOUNDS_S,
            registry=self.registry,
        )
        calls = Histogram(
            "store_request_duration_seconds",
            "Time a store was waited for.",
            ("store",),
            buckets=LATENCY_BOUNDS_S,
            registry=self.registry,
        )
        errors = Counter("store_errors", "Calls a store failed, or was spared.", ("store",), registry=self.registry)
        answers = Counter("answers", "Answers by where they came from.", ("outcome",), registry=self.registry)
        degraded = Counter("degraded_answers", "Answers without a store.", ("store",), registry=self.registry)
        self._request = cache(lambda *labels: requests.labels(*labels))
        self._call = cache(calls.labels)
        self._error = cache(errors.labels)
        self._answer = cache(answers.labels)
        self._degraded = cache(degraded.labels)
        self._shed = Counter("shed_requests", "Requests refused as too many were under way.", registry=self.registry)
        self._in_flight = Gauge("in_flight_requests", "Requests under way.", registry=self.registry)
        self._generation = Gauge("serving_generation", "Generation answered from; 0 for none.", registry=self.registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered. `route` is a template, or `UNMATCHED`."""
        self._request(route, method if method in _METHODS else "other", status).observe(seconds)

    def shed(self) -> None:
        """A request was refused, as too many were under way."""
        self._shed.inc()

    def store_call(self, store: str, seconds: float, failed: bool) -> None:
        """A store was asked."""
        self._call(store).observe(seconds)
        if failed:
            self._error(store).inc()

    def answered(self, outcome: str, degraded: Collection[str]) -> None:
        """An answer was given."""
        self._answer(outcome).inc()
        for store in degraded:
            self._degraded(store).inc()

    def watch_in_flight(self, read: Callable[[], int]) -> None:
        """Read the requests under way from there, when Prometheus asks."""
        self._in_flight.set_function(read)

    def watch_generation(self, read: Callable[[], int]) -> None:
        """Read the serving generation from there, when Prometheus asks."""
        self._generation.set_function(read)

    def watch_pools(self, read: Callable[[], Iterable[PoolUse]]) -> None:
        """Read the use of connection pools from there, when Prometheus asks."""
        self.registry.register(_Pools(read))

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Pools(Collector):
    def __init__(self, read: Callable[[], Iterable[PoolUse]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "store_connections", "Connections of this process to a store.", labels=("store", "state")
        )
        for one in self._read():
            family.add_metric((one.store, "in_use"), one.in_use)
            family.add_metric((one.store, "idle"), one.idle)
        yield family

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()  # asked at registration, when there is no pool yet
