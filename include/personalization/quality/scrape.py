"""Reads the API's counters and keeps what they rose by: a history of latency where no Prometheus is.

Counters belong to a process, which says when it began; one that began after the last reading starts from 0, as
Prometheus takes a reset. So several processes behind one address are each counted whole.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Connection, and_, delete, func, insert, select, update

from personalization.errors import StoreError
from personalization.quality.traffic import WINDOW_MS
from personalization.schemas import DAY_MS, LATENCY_BOUNDS_S
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore, analytics_errors
from personalization.stores.tables import ApiCount, ApiLatency, ApiScrape

_HOUR_MS = 3_600_000
_ROLLED_UP = ((8 * DAY_MS, _HOUR_MS), (95 * DAY_MS, DAY_MS))
"""From what age on windows are joined, and to what width."""
_KEPT_MS = 400 * DAY_MS
_PROCESSES = 32
"""Whose counters are remembered; the longest unseen is forgotten first."""
_FAILED = 500
_PART = "|"

Counters = dict[str, float]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Reading:
    """The counters of one process of the API."""

    began: float
    """Of the process, in seconds since the epoch."""
    counters: Counters
    """`route|what|name` → value. `what` is one of requests, errors, seconds, and bucket by its number (cumulative);
    without a route: count.
    """


def read_api(settings: Settings) -> Reading:
    """One request to the API's `/v1/metrics`.

    Raises:
        StoreError: it does not answer in time, or refuses the key.
    """
    key = settings.api_key.get_secret_value()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{settings.api_url.rstrip('/')}/v1/metrics"
    try:
        response = httpx.get(url, headers=headers, timeout=settings.store_timeout_s, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StoreError("api", f"does not answer ({type(error).__name__}); check API_URL") from error
    if response.status_code in (401, 403):
        raise StoreError("api", "refused the key; API_KEY needs one with the scope `read`")
    if not response.is_success:
        raise StoreError("api", f"answered {response.status_code} for its metrics")
    return parse(response.text)


def parse(page: str) -> Reading:
    """What a page of metrics counts, in Prometheus' text format. Methods and statuses are added up."""
    counters: Counters = defaultdict(float)
    began = 0.0
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "process_start_time_seconds":
                began = sample.value
            for key in _keys(sample.name, sample.labels):
                counters[_PART.join(key)] += sample.value
    return Reading(began, dict(counters))


def _keys(name: str, labels: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    route = labels.get("route", "")
    if name == "http_request_duration_seconds_count":
        yield route, "requests", ""
        if int(labels["status"]) >= _FAILED:
            yield route, "errors", ""
    elif name == "http_request_duration_seconds_sum":
        yield route, "seconds", ""
    elif name == "http_request_duration_seconds_bucket":
        yield route, "bucket", f"{bisect_left(LATENCY_BOUNDS_S, float(labels['le'])):02}"
    elif name == "answers_total":
        yield "", "count", labels["outcome"]
    elif name == "degraded_answers_total":
        yield "", "count", f"degraded:{labels['store']}"
    elif name == "shed_requests_total":
        yield "", "count", "shed"


def keep(analytics: AnalyticsStore, reading: Reading, now: datetime) -> int:
    """Add what the counters rose by to the window of `now`; return the requests. One transaction.

    Read twice, it adds nothing. Of a process that was there before the first reading of all, only what comes is kept.
    """
    analytics.ensure_schema()
    now_ms = int(now.timestamp() * 1000)
    with analytics_errors(), analytics.engine.begin() as connection:
        risen = _risen(connection, reading, now_ms)
        window = {"moment": now_ms - now_ms % WINDOW_MS, "window_ms": WINDOW_MS}
        requests = _add(connection, risen, window)
        _forget(connection, now_ms)
    return requests


def _risen(connection: Connection, reading: Reading, now_ms: int) -> Counters:
    process = f"{reading.began:.2f}"
    known = connection.execute(select(ApiScrape.counters).where(ApiScrape.process == process)).scalar_one_or_none()
    last = connection.execute(select(func.max(ApiScrape.moment))).scalar_one()
    if known is None:
        is_new = last is not None and reading.began * 1000 > last
        known = {} if is_new else reading.counters
    connection.execute(delete(ApiScrape).where(ApiScrape.process == process))
    connection.execute(insert(ApiScrape).values(process=process, moment=now_ms, counters=reading.counters))
    risen = {}
    for name, value in reading.counters.items():
        before = known.get(name, 0.0)
        risen[name] = value - before if value >= before else value
    return risen


def _add(connection: Connection, risen: Counters, window: Mapping[str, int]) -> int:
    routes: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[str, float] = {}
    for name, value in risen.items():
        route, what, which = name.split(_PART)
        if what == "count":
            counts[which] = value
        else:
            routes[route][f"{what}_{which}" if which else what] += value
    asked = {route: columns for route, columns in routes.items() if columns["requests"]}
    for route, columns in asked.items():
        buckets = [columns[f"bucket_{number:02}"] for number in range(len(LATENCY_BOUNDS_S) + 1)]
        row = {name: columns[name] for name in ("requests", "errors", "seconds")}
        below = 0.0
        for number, cumulative in enumerate(buckets):
            row[f"bucket_{number:02}"] = max(cumulative - below, 0.0)
            below = max(cumulative, below)
        _add_row(connection, ApiLatency.__table__, {"route": route}, row, window)
    for name, count in counts.items():
        if count:
            _add_row(connection, ApiCount.__table__, {"name": name}, {"count": count}, window)
    return int(sum(columns["requests"] for columns in asked.values()))


def _add_row(
    connection: Connection, table: Any, key: Mapping[str, str], values: Mapping[str, float], window: Mapping[str, int]
) -> None:
    """Add to the row of the window, which is made if need be."""
    whole = {name: value if name == "seconds" else round(value) for name, value in values.items()}
    where = and_(table.c.moment == window["moment"], *(table.c[name] == value for name, value in key.items()))
    risen = {table.c[name]: table.c[name] + value for name, value in whole.items()}
    if not connection.execute(update(table).where(where).values(risen)).rowcount:
        connection.execute(insert(table).values(**window, **key, **whole))


def _forget(connection: Connection, now_ms: int) -> None:
    """Join old windows to hours and days, and drop those beyond 400 days."""
    for table, key in ((ApiLatency.__table__, "route"), (ApiCount.__table__, "name")):
        for age, width in _ROLLED_UP:
            _roll_up(connection, table, key, (now_ms - age) // width * width, width)
        connection.execute(delete(table).where(table.c.moment < now_ms - _KEPT_MS))  # type: ignore[arg-type]
    newest = select(ApiScrape.process).order_by(ApiScrape.moment.desc()).limit(_PROCESSES)
    connection.execute(delete(ApiScrape).where(ApiScrape.process.not_in(newest)))


def _roll_up(connection: Connection, table: Any, key: str, until_ms: int, width: int) -> None:
    old = and_(table.c.moment < until_ms, table.c.window_ms < width)
    names = [column.name for column in table.c if column.name not in ("moment", key, "window_ms")]
    moment = (table.c.moment - table.c.moment % width).label("moment")
    sums = select(moment, table.c[key], *(func.sum(table.c[name]).label(name) for name in names))
    rows = [dict(row) for row in connection.execute(sums.where(old).group_by(moment, table.c[key])).mappings()]
    if rows:
        connection.execute(delete(table).where(old))
        connection.execute(insert(table), [{**row, "window_ms": width} for row in rows])
