"""How the API has answered, from what was read of its counters; and when it was slow or failed beyond what is usual.

Sums are the database's; quantiles come out of the sums of the buckets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import numpy as np
from scipy import stats
from sqlalchemy import Engine, Select, func, inspect, select

from personalization.quality.anomaly import Anomaly
from personalization.quality.baselines import Floats, expect_constant, probability
from personalization.schemas import DAY_MS, LATENCY_BOUNDS_S
from personalization.stores.analytics import AnalyticsStore, analytics_errors
from personalization.stores.tables import AnomalyRecord, ApiCount, ApiLatency

BUDGET = 0.5
"""False alarms a month that are put up with, over all routes."""
WINDOW_MS = 300_000

_MONTH_MS = 30 * DAY_MS
_BASELINE_MS = 7 * DAY_MS
_FEWEST_WINDOWS = 100
_FEWEST_REQUESTS = 20
_SLOWER = 2.0
_SLOWER_S = 0.02
_FEWEST_ERRORS = 8
_ERROR_RATE = 0.02
_SERIOUS_RATE = 0.2
_USUAL_TIMES = 3
_UNTOLD = 1e-4  # an error rate that is never told from none
_QUANTILE = 0.95
_NEIGHBOURLY = 0.6  # 0.5 where the two had nothing to do with each other
_TABLE = ApiLatency.__table__
_BUCKETS = [column for column in _TABLE.c if column.name.startswith("bucket_")]


@dataclass(frozen=True)
class Traffic:
    """Requests of some time, of one route or of all."""

    moment_ms: int
    route: str
    requests: int
    errors: int
    """Answers 5xx."""
    buckets: tuple[int, ...]

    def quantile(self, share: float) -> float | None:
        """Seconds that this share of the requests took at most."""
        return quantile(self.buckets, share)


@dataclass(frozen=True)
class Counted:
    """How often something was counted in some time."""

    moment_ms: int
    name: str
    count: int


def quantile(buckets: Sequence[float], share: float) -> float | None:
    """As `quantiles`, of one row; None where nothing was counted."""
    found = float(quantiles(np.array([buckets], dtype=float), share)[0])
    return None if np.isnan(found) else found


def quantiles(buckets: Floats, share: float) -> Floats:
    """As Prometheus' `histogram_quantile`: linear within a bucket; beyond the last bound, that bound. NaN of none.

    `buckets` are counts, not cumulative, of `LATENCY_BOUNDS_S` and of what is beyond, shape (rows, buckets).
    """
    bounds = np.array([0.0, *LATENCY_BOUNDS_S, LATENCY_BOUNDS_S[-1]])
    cumulative = buckets.cumsum(axis=1)
    ranks = share * cumulative[:, -1]
    at = (cumulative < ranks[:, None]).sum(axis=1)
    rows = np.arange(len(buckets))
    inside = buckets[rows, at]
    below = cumulative[rows, at] - inside
    with np.errstate(invalid="ignore"):
        found: Floats = bounds[at] + (bounds[at + 1] - bounds[at]) * (ranks - below) / inside
    return found


def has_traffic(engine: Engine) -> bool:
    """Whether the API was ever read."""
    with analytics_errors(), engine.connect() as connection:
        if not inspect(connection).has_table(_TABLE.name):
            return False
        return connection.execute(select(_TABLE.c.moment).limit(1)).first() is not None


def routes(engine: Engine, since_ms: int) -> list[str]:
    """The routes that were asked since, most asked first."""
    query = (
        select(_TABLE.c.route)
        .where(_TABLE.c.moment >= since_ms)
        .group_by(_TABLE.c.route)
        .order_by(func.sum(_TABLE.c.requests).desc(), _TABLE.c.route)
    )
    with analytics_errors(), engine.connect() as connection:
        return list(connection.scalars(query))


def traffic_over_time(engine: Engine, since_ms: int, step_ms: int, route: str | None = None) -> list[Traffic]:
    """Steps since then, oldest first, of a route, or of all together where none is named. One row a step."""
    query = _summed(since_ms, step_ms)
    if route is not None:
        query = query.where(_TABLE.c.route == route)
    with analytics_errors(), engine.connect() as connection:
        return [_traffic(row, route or "") for row in connection.execute(query)]


def counts_over_time(engine: Engine, since_ms: int, step_ms: int) -> list[Counted]:
    """Steps since then, oldest first: answers by where they came from, and degraded ones by store."""
    step = (ApiCount.moment - ApiCount.moment % step_ms).label("step")
    query = (
        select(step, ApiCount.name, func.sum(ApiCount.count))
        .where(ApiCount.moment >= since_ms)
        .group_by(step, ApiCount.name)
        .order_by(step, ApiCount.name)
    )
    with analytics_errors(), engine.connect() as connection:
        return [Counted(int(moment), name, int(count)) for moment, name, count in connection.execute(query)]


def record_bursts(analytics: AnalyticsStore, now: datetime) -> list[Anomaly]:
    """Set the anomalies of the API of the day that was an hour ago; return them. Safe to repeat.

    Reads a week of windows: with ten busy routes 20,000 rows, in some tenths of a second.
    """
    day_ms = int(now.timestamp() * 1000) - 3_600_000
    day_ms -= day_ms % DAY_MS
    query = _summed(day_ms - _BASELINE_MS, WINDOW_MS, _TABLE.c.route)
    with analytics_errors(), analytics.engine.connect() as connection:
        windows = [_traffic(row, row.route) for row in connection.execute(query)]
    found = bursts(windows, day_ms)
    analytics.set_anomalies([{"anomaly_id": one.anomaly_id, **vars(one)} for one in found], [])
    return found


def record_silence(analytics: AnalyticsStore, now: datetime, problem: str) -> bool:
    """Set the anomaly of an API that does not answer, one a day, as of the last time; whether it is the day's first."""
    found = Anomaly(
        severity="error",
        run_id=None,
        run_started_at=now,
        stage="api",
        title="The API did not answer",
        evidence=f"At {now:%H:%M} UTC: {problem}",
        advice="Start it, or correct API_URL and API_KEY, by which the pipeline reads its counters.",
    )
    analytics.ensure_schema()
    known = select(AnomalyRecord.anomaly_id).where(AnomalyRecord.anomaly_id == found.anomaly_id)
    with analytics_errors(), analytics.engine.connect() as connection:
        is_first = connection.execute(known).first() is None
    analytics.set_anomalies([{"anomaly_id": found.anomaly_id, **vars(found)}], [])
    return is_first


def bursts(windows: Iterable[Traffic], day_ms: int) -> list[Anomaly]:
    """When a route was slow or failed on that day, beside the windows of before: at most one of each a route."""
    by_route = {}
    for route, some in groupby(sorted(windows, key=lambda one: (one.route, one.moment_ms)), lambda one: one.route):
        parts = [one for one in some if one.requests >= _FEWEST_REQUESTS]
        before = [one for one in parts if one.moment_ms < day_ms]
        today = [one for one in parts if one.moment_ms >= day_ms]
        if today and len(before) >= _FEWEST_WINDOWS:
            by_route[route] = (before, today)
    found = []
    for before, today in by_route.values():
        rare = BUDGET / (2 * len(by_route) * _MONTH_MS / WINDOW_MS)
        found += [*_slow(before, today, rare), *_failing(before, today, rare)]
    return found


def _slow(before: Sequence[Traffic], today: Sequence[Traffic], rare: float) -> list[Anomaly]:
    """Whether the 95th percentile was far above its usual one."""
    expected = expect_constant(_log_quantiles(before), floor=0.15)
    values = _log_quantiles(today)
    usual = float(np.exp(expected.middle))
    scores = np.array([expected.distance(float(one)) / expected.scale for one in values])
    chances = np.array([probability(one) for one in scores])
    worth = (np.exp(values) > _SLOWER * usual) & (np.exp(values) - usual > _SLOWER_S)
    flagged = _sustained(today, worth, chances, rare)
    if not flagged:
        return []
    worst = max(flagged, key=lambda at: values[at])
    seconds = float(np.exp(values[worst]))
    evidence = (
        f"The 95th percentile was {seconds * 1000:,.0f} ms, usually {usual * 1000:,.0f} ms "
        f"({seconds / usual:.1f} ×; {scores[worst]:.1f} robust standard deviations), {_when(today, flagged)}."
    )
    advice = (
        "See on the page Latency which store was slow or left out at that time, and whether a run of the pipeline or "
        "a burst of requests fell into it."
    )
    return [
        Anomaly(
            severity="warning",
            run_id=None,
            run_started_at=_begin(today[flagged[0]]),
            stage=today[0].route,
            title="The API answered slower than usual",
            evidence=evidence,
            advice=advice,
            observed=seconds,
            expected=usual,
            score=float(scores[worst]),
        )
    ]


def _failing(before: Sequence[Traffic], today: Sequence[Traffic], rare: float) -> list[Anomaly]:
    """Whether more requests failed than three times the usual rate would explain (binomial test)."""
    usual = _usual_rate(before)
    requests = np.array([one.requests for one in today])
    errors = np.array([one.errors for one in today])
    rates = errors / requests
    chances = stats.binom.sf(errors - 1, requests, min(_USUAL_TIMES * max(usual, _UNTOLD), 1.0))
    worth = (errors >= _FEWEST_ERRORS) & (rates > _ERROR_RATE)
    flagged = _sustained(today, worth, chances, rare)
    if not flagged:
        return []
    worst = max(flagged, key=lambda at: rates[at])
    rate, failed = float(rates[worst]), int(errors[flagged].sum())
    evidence = (
        f"{rate:.1%} of the requests failed with 5xx, usually {usual:.2%}: {failed:,} of "
        f"{int(requests[flagged].sum()):,} requests, {_when(today, flagged)}."
    )
    advice = "Ask the API's `/v1/ready` which store does not answer, and look for its errors in the API's log."
    return [
        Anomaly(
            severity="error" if rate >= _SERIOUS_RATE else "warning",
            run_id=None,
            run_started_at=_begin(today[flagged[0]]),
            stage=today[0].route,
            title="The API failed more often than usual",
            evidence=evidence,
            advice=advice,
            observed=rate,
            expected=usual,
            score=float(stats.norm.isf(max(float(chances[worst]), 1e-300))),
        )
    ]


def _sustained(today: Sequence[Traffic], worth: Any, chances: Any, rare: float) -> list[int]:
    """The windows that chance alone does not explain, or two neighbours together do not, which are no strangers."""
    half = worth & (chances <= rare**_NEIGHBOURLY)
    moments = {one.moment_ms for one, chosen in zip(today, half, strict=True) if chosen}
    beside = [bool(moments & {one.moment_ms - WINDOW_MS, one.moment_ms + WINDOW_MS}) for one in today]
    alone = worth & (chances <= rare)
    return [at for at in range(len(today)) if alone[at] or (half[at] and beside[at])]


def _usual_rate(before: Sequence[Traffic]) -> float:
    """Of all but the tenth of the windows in which most failed: an incident is not usual."""
    calm = sorted(before, key=lambda one: one.errors / one.requests)[: -(len(before) // 10) or None]
    return sum(one.errors for one in calm) / sum(one.requests for one in calm)


def _log_quantiles(windows: Sequence[Traffic]) -> Floats:
    logs: Floats = np.log(quantiles(np.array([one.buckets for one in windows], dtype=float), _QUANTILE))
    return logs


def _when(today: Sequence[Traffic], flagged: Sequence[int]) -> str:
    first, last = _begin(today[flagged[0]]), today[flagged[-1]].moment_ms + WINDOW_MS
    minutes = len(flagged) * WINDOW_MS // 60_000
    return f"{minutes} minutes between {first:%H:%M} and {datetime.fromtimestamp(last / 1000, UTC):%H:%M} UTC"


def _begin(window: Traffic) -> datetime:
    return datetime.fromtimestamp(window.moment_ms / 1000, UTC)


def _summed(since_ms: int, step_ms: int, *by: Any) -> Select[Any]:
    step = (_TABLE.c.moment - _TABLE.c.moment % step_ms).label("step")
    return (
        select(
            step,
            *by,
            func.sum(_TABLE.c.requests).label("requests"),
            func.sum(_TABLE.c.errors).label("errors"),
            *(func.sum(column).label(column.name) for column in _BUCKETS),
        )
        .where(_TABLE.c.moment >= since_ms)
        .group_by(step, *by)
        .order_by(step, *by)
    )


def _traffic(row: Any, route: str) -> Traffic:
    counts = row._mapping  # the columns by name; a row has no other way to them
    buckets = tuple(int(counts[column.name]) for column in _BUCKETS)
    return Traffic(int(row.step), route, int(row.requests), int(row.errors), buckets)
