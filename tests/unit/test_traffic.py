"""How the API's counters become a history: differences, windows, quantiles, bursts."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dashboard_data import open_store
from personalization.quality.anomalies import anomalies_since
from personalization.quality.scrape import Reading, keep, parse
from personalization.quality.traffic import (
    WINDOW_MS,
    Traffic,
    bursts,
    counts_over_time,
    has_traffic,
    quantile,
    record_bursts,
    record_silence,
    routes,
    traffic_over_time,
)
from personalization.schemas import DAY_MS, LATENCY_BOUNDS_S
from personalization.stores.analytics import AnalyticsStore
from sqlalchemy import text

from services.api.metrics import Metrics

NOON = datetime(2026, 5, 20, 12, 1, tzinfo=UTC)
ROUTE = "/v1/recommendations/{user_id}"


@pytest.fixture
def store(tmp_path: Path) -> AnalyticsStore:
    return open_store(tmp_path / "analytics.db")


def buckets(**counts: int) -> tuple[int, ...]:
    """By the number of the bucket, as `b7=3`."""
    return tuple(counts.get(f"b{number}", 0) for number in range(len(LATENCY_BOUNDS_S) + 1))


def read(metrics: Metrics, began: float) -> Reading:
    found = parse(metrics.page().decode())
    return Reading(began, found.counters)


def rows(store: AnalyticsStore, query: str) -> list[Mapping[str, Any]]:
    with store.engine.connect() as connection:
        return list(connection.execute(text(query)).mappings())


# --- quantiles, computed by hand


@pytest.mark.parametrize(
    ("counts", "share", "seconds"),
    [
        ({"b0": 10}, 0.5, 0.00025),  # half-way from 0 to the first bound
        ({"b7": 100}, 0.95, 0.05 + 0.05 * 0.95),  # 0.05 … 0.1
        ({"b4": 50, "b7": 50}, 0.5, 0.01),  # the whole of the first bucket, to its bound
        ({"b4": 50, "b7": 50}, 0.75, 0.05 + 0.05 * 0.5),
        ({"b4": 90, "b13": 10}, 0.95, 5.0),  # beyond the last bound
        ({"b4": 1, "b9": 3}, 1.0, 0.5),
    ],
)
def test_a_quantile_lies_where_prometheus_puts_it(counts: dict[str, int], share: float, seconds: float):
    assert quantile(buckets(**counts), share) == pytest.approx(seconds)


def test_nothing_has_no_quantile():
    assert quantile(buckets(), 0.5) is None


# --- from counters to windows


def test_what_came_between_two_readings_is_kept_by_route(store: AnalyticsStore):
    metrics = Metrics()
    metrics.request(ROUTE, "GET", 200, 0.004)
    assert keep(store, read(metrics, 1000.0), NOON) == 0  # there before anybody read

    for seconds, status in ((0.004, 200), (0.004, 304), (0.3, 500), (9.0, 503)):
        metrics.request(ROUTE, "GET", status, seconds)
    metrics.request("/v1/events", "POST", 202, 0.02)
    metrics.answered("hit", ())
    metrics.answered("miss", ["neo4j"])
    assert keep(store, read(metrics, 1000.0), NOON + timedelta(minutes=5)) == 5

    assert routes(store.engine, 0) == [ROUTE, "/v1/events"]
    [whole] = traffic_over_time(store.engine, 0, WINDOW_MS)
    assert (whole.requests, whole.errors, sum(whole.buckets)) == (5, 2, 5)
    [one] = traffic_over_time(store.engine, 0, WINDOW_MS, ROUTE)
    assert one.buckets == buckets(b3=2, b9=1, b13=1)
    assert one.moment_ms == int(NOON.replace(minute=5).timestamp() * 1000)
    counted = {each.name: each.count for each in counts_over_time(store.engine, 0, WINDOW_MS)}
    assert counted == {"hit": 1, "miss": 1, "degraded:neo4j": 1}
    [row] = rows(store, f"SELECT seconds FROM api_latency WHERE route = '{ROUTE}'")
    assert row["seconds"] == pytest.approx(9.308)


def test_a_reading_kept_twice_counts_once_and_two_in_a_window_add_up(store: AnalyticsStore):
    metrics = Metrics()
    metrics.request(ROUTE, "GET", 200, 0.01)
    keep(store, read(metrics, 1000.0), NOON)
    for _ in range(3):
        metrics.request(ROUTE, "GET", 200, 0.01)
        keep(store, read(metrics, 1000.0), NOON)
        keep(store, read(metrics, 1000.0), NOON)

    [one] = traffic_over_time(store.engine, 0, WINDOW_MS)
    assert one.requests == 3


def test_a_process_that_began_since_is_counted_from_its_start(store: AnalyticsStore):
    old, new = Metrics(), Metrics()
    for _ in range(7):
        old.request(ROUTE, "GET", 200, 0.01)
    keep(store, read(old, NOON.timestamp() - 900), NOON)
    for _ in range(2):
        new.request(ROUTE, "GET", 200, 0.01)

    assert keep(store, read(new, NOON.timestamp() + 60), NOON + timedelta(minutes=5)) == 2


def test_a_process_of_before_that_is_met_late_counts_from_then_on(store: AnalyticsStore):
    """Two workers behind one address: each reading meets one of them."""
    one, other = Metrics(), Metrics()
    keep(store, read(one, 500.0), NOON)
    other.request(ROUTE, "GET", 200, 0.01)
    assert keep(store, read(other, 501.0), NOON) == 0

    one.request(ROUTE, "GET", 200, 0.01)
    other.request(ROUTE, "GET", 200, 0.01)
    assert [keep(store, read(each, began), NOON) for each, began in ((one, 500.0), (other, 501.0))] == [1, 1]


def test_a_counter_that_fell_started_anew(store: AnalyticsStore):
    keep(store, Reading(1.0, {f"{ROUTE}|requests|": 50.0}), NOON)

    assert keep(store, Reading(1.0, {f"{ROUTE}|requests|": 4.0}), NOON) == 4


def test_bounds_of_another_version_fall_into_the_next_known_bucket():
    page = (
        'http_request_duration_seconds_bucket{route="/x",method="GET",status="200",le="0.03"} 5\n'
        'http_request_duration_seconds_bucket{route="/x",method="GET",status="200",le="+Inf"} 6\n'
    )

    counters = parse(f"# TYPE http_request_duration_seconds histogram\n{page}").counters

    assert counters == {"/x|bucket|06": 5.0, "/x|bucket|13": 6.0}


def test_old_windows_are_joined_and_the_oldest_forgotten(store: AnalyticsStore):
    began = NOON - timedelta(days=500)
    keep(store, Reading(1.0, {f"{ROUTE}|requests|": 0.0}), began)
    total = 0.0
    days = (0, 200, 200.001, 200.3, 450, 450.005, 450.01, 450.05, 499.9)
    for day in days:
        total += 10
        keep(store, Reading(1.0, {f"{ROUTE}|requests|": total, "|count|hit": total}), began + timedelta(days=day))
    keep(store, Reading(1.0, {f"{ROUTE}|requests|": total}), NOON)

    kept = rows(store, "SELECT window_ms, requests FROM api_latency ORDER BY moment")
    assert [(row["window_ms"], row["requests"]) for row in kept] == [
        (DAY_MS, 30),
        (3_600_000, 30),
        (3_600_000, 10),
        (WINDOW_MS, 10),
    ]
    assert sum(row["count"] for row in rows(store, "SELECT count FROM api_counts")) == 80


def test_a_database_that_was_never_read_into_has_no_traffic(store: AnalyticsStore):
    assert not has_traffic(store.engine)
    assert traffic_over_time(store.engine, 0, WINDOW_MS) == []


# --- bursts

TODAY_MS = int(NOON.timestamp() * 1000) // DAY_MS * DAY_MS


def week(today: Mapping[int, Traffic] | None = None, seed: int = 1) -> list[Traffic]:
    """A week and a day of windows: around 20 ms, no error; `today` replaces windows of the last day by number."""
    random = np.random.default_rng(seed)
    windows = []
    for at in range(8 * 288):
        seconds = 0.02 * np.exp(random.normal(0, 0.4, 200) + random.normal(0, 0.08))
        counts = np.bincount(np.searchsorted(LATENCY_BOUNDS_S, seconds), minlength=len(LATENCY_BOUNDS_S) + 1)
        moment = TODAY_MS - 7 * DAY_MS + at * WINDOW_MS
        windows.append(Traffic(moment, ROUTE, 200, int(random.random() < 0.02), tuple(map(int, counts))))
    for number, one in (today or {}).items():
        windows[7 * 288 + number] = one
    return windows


def slow(number: int) -> Traffic:
    return Traffic(TODAY_MS + number * WINDOW_MS, ROUTE, 200, 0, buckets(b8=150, b9=50))


def failing(number: int, errors: int) -> Traffic:
    return Traffic(TODAY_MS + number * WINDOW_MS, ROUTE, 200, errors, buckets(b5=200))


def test_quiet_days_have_no_burst():
    assert [bursts(week(seed=seed), TODAY_MS) for seed in range(10)] == [[]] * 10


def test_slow_answers_for_a_quarter_of_an_hour_are_told_once():
    [found] = bursts(week({number: slow(number) for number in (120, 121, 122)}), TODAY_MS)

    assert (found.title, found.stage, found.severity) == ("The API answered slower than usual", ROUTE, "warning")
    assert found.run_id is None
    assert found.run_started_at == datetime(2026, 5, 20, 10, 0, tzinfo=UTC)
    assert found.observed == pytest.approx(0.25 + 0.25 * 0.8)
    assert found.expected == pytest.approx(0.045, abs=0.01)
    assert "was 450 ms, usually" in found.evidence
    assert "15 minutes between 10:00 and 10:15 UTC" in found.evidence


@pytest.mark.parametrize(("errors", "severity"), [(12, "warning"), (80, "error")])
def test_a_burst_of_errors_is_told_with_its_rate(errors: int, severity: str):
    [found] = bursts(week({100: failing(100, errors), 101: failing(101, errors)}), TODAY_MS)

    assert (found.title, found.severity) == ("The API failed more often than usual", severity)
    assert f"{errors / 200:.1%} of the requests failed with 5xx" in found.evidence
    assert f"{2 * errors} of 400 requests" in found.evidence


def test_two_failed_requests_are_no_burst():
    assert bursts(week({100: failing(100, 2)}), TODAY_MS) == []


def test_a_route_without_a_history_is_not_judged():
    assert bursts([one for one in week({100: slow(100)}) if one.moment_ms >= TODAY_MS], TODAY_MS) == []


def test_bursts_are_recorded_once_however_often_they_are_looked_for(store: AnalyticsStore):
    insert_windows(store, week({number: slow(number) for number in (120, 121, 122)}))

    for _ in range(2):
        assert len(record_bursts(store, NOON + timedelta(hours=2))) == 1

    [found] = anomalies_since(store.engine, NOON - timedelta(days=1), 10)
    assert found.title == "The API answered slower than usual"


def insert_windows(store: AnalyticsStore, windows: list[Traffic]) -> None:
    columns = ", ".join(f"bucket_{number:02}" for number in range(14))
    values = ", ".join(f":b{number}" for number in range(14))
    with store.engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO api_latency (moment, route, window_ms, requests, errors, seconds, {columns}) "
                f"VALUES (:moment, :route, {WINDOW_MS}, :requests, :errors, 0, {values})"
            ),
            [
                {"moment": one.moment_ms, "route": one.route, "requests": one.requests, "errors": one.errors}
                | {f"b{number}": count for number, count in enumerate(one.buckets)}
                for one in windows
            ],
        )


def test_an_api_that_does_not_answer_is_one_error_a_day(store: AnalyticsStore):
    moments = [NOON + timedelta(minutes=minutes) for minutes in (0, 5, 10)]
    assert [record_silence(store, one, "api: does not answer") for one in moments] == [True, False, False]

    [found] = anomalies_since(store.engine, NOON - timedelta(days=1), 10)
    assert (found.severity, found.title) == ("error", "The API did not answer")
    assert found.evidence == "At 12:11 UTC: api: does not answer"
