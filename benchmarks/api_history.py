"""Simulated traffic of the API, with bursts of slow and of failed answers; and plain rules on it."""

from datetime import datetime

import numpy as np
from personalization.quality.traffic import WINDOW_MS, Traffic, quantiles
from personalization.schemas import DAY_MS, LATENCY_BOUNDS_S
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.tables import ApiCount, ApiLatency
from sqlalchemy import insert

START_MS = 1_767_571_200_000 // DAY_MS * DAY_MS
ROUTES = {
    "/v1/recommendations/{user_id}": (900, 0.006),
    "/v1/events": (250, 0.012),
    "/v1/recommendations:batch": (40, 0.03),
}
"""Requests of a window at noon, and the median of seconds."""
FAULTY = "/v1/recommendations/{user_id}"
PLAN = ("latency", None, "errors", None, "latency", None, "errors", None)
"""What goes wrong on the days behind the first week."""

_WINDOWS = DAY_MS // WINDOW_MS
_FEWEST = 20
_HOUR_MS = 3_600_000
_RECENT_DAYS = 8


def windows(seed: int, days: int, faults: bool) -> list[Traffic]:
    """Every window of every route. Load follows the hour; latency wanders, has heavy tails and single spikes."""
    draw = np.random.default_rng(seed)
    found = []
    bounds = np.array(LATENCY_BOUNDS_S)
    for route, (busy, median) in ROUTES.items():
        wander = 0.0
        hours = np.arange(days * _WINDOWS) % _WINDOWS / 12
        load = busy * (0.25 + 0.75 * np.clip(np.sin((hours - 6) / 24 * 2 * np.pi), 0, 1))
        bad = _bad_windows(draw, days) if faults and route == FAULTY else {}
        for at in range(days * _WINDOWS):
            wander = 0.9 * wander + draw.standard_t(4) * 0.03
            level = np.log(median) + wander + 0.15 * load[at] / busy + draw.standard_t(4) * 0.05
            if draw.random() < 1 / 600:  # a pause of the machine, over before the window is
                level += draw.uniform(0.5, 1.2)
            rate = 0.0005
            kind, strength = bad.get(at, (None, 0.0))
            if kind == "latency":
                level += np.log(strength)
            elif kind == "errors":
                rate = strength
            elif draw.random() < 1 / 400:
                rate = 0.005
            requests = int(draw.poisson(load[at]))
            seconds = np.exp(level + 0.5 * draw.standard_t(5, requests))
            counts = np.bincount(np.searchsorted(bounds, seconds), minlength=len(bounds) + 1)
            errors = int(draw.binomial(requests, rate))
            found.append(Traffic(START_MS + at * WINDOW_MS, route, requests, errors, tuple(int(one) for one in counts)))
    return found


def fill(store: AnalyticsStore, until: datetime, days: int) -> None:
    """Write so many days as the DAG `api_health` leaves them: windows of 8 days, before that hours, then days.

    A fifth of the answers is made anew; on the second last day Neo4j is missing for an hour.
    """
    until_ms = int(until.timestamp() * 1000) // WINDOW_MS * WINDOW_MS
    recent = min(days, _RECENT_DAYS)
    found = [
        (one.moment_ms - START_MS - recent * DAY_MS + until_ms, WINDOW_MS, one) for one in windows(7, recent, False)
    ]
    by_route = {route: [one for *_, one in found if one.route == route and one.requests] for route in ROUTES}
    for first, last, width in ((recent, 95, _HOUR_MS), (95, days, DAY_MS)):
        for moment in range((until_ms - last * DAY_MS) // width * width, until_ms - first * DAY_MS, width):
            of_day = moment // width % _WINDOWS
            found += [
                (moment, width, _times(some[of_day * len(some) // _WINDOWS], width // WINDOW_MS))
                for some in (by_route.values() if moment >= until_ms - days * DAY_MS else ())
            ]
    latency, counts = [], []
    for moment, width, one in found:
        window = {"moment": moment, "window_ms": width}
        buckets = {f"bucket_{at:02}": count for at, count in enumerate(one.buckets)}
        row = {"route": one.route, "requests": one.requests, "errors": one.errors, "seconds": one.requests * 0.01}
        latency.append({**window, **row, **buckets})
        if one.route == FAULTY:
            missed, old = one.requests // 5, one.requests // 50
            named = {"hit": one.requests - missed - old, "stale": old, "miss": missed}
            if 24 <= (until_ms - moment) // _HOUR_MS < 25:
                named["degraded:neo4j"] = missed
            counts += [{**window, "name": name, "count": count} for name, count in named.items()]
    with store.engine.begin() as connection:
        connection.execute(insert(ApiLatency.__table__), latency)
        connection.execute(insert(ApiCount), counts)


def _times(one: Traffic, factor: int) -> Traffic:
    buckets = tuple(count * factor for count in one.buckets)
    return Traffic(one.moment_ms, one.route, one.requests * factor, one.errors * factor, buckets)


def _bad_windows(draw: np.random.Generator, days: int) -> dict[int, tuple[str, float]]:
    bad = {}
    for day, kind in zip(range(7, days), PLAN, strict=True):
        if kind is not None:
            begin = day * _WINDOWS + int(draw.integers(0, _WINDOWS - 10))
            strength = float(draw.uniform(4, 10) if kind == "latency" else draw.uniform(0.05, 0.4))
            for at in range(begin, begin + int(draw.integers(3, 9))):
                bad[at] = (kind, strength)
    return bad


def fixed(seen: list[Traffic], day_ms: int) -> set[str]:
    """The 95th percentile over 0.1 s, or more than 1 % failed: lines as somebody draws them."""
    today = [one for one in seen if one.moment_ms >= day_ms and one.requests >= _FEWEST]
    slow = {f"latency {one.route}" for one in today if (one.quantile(0.95) or 0) > 0.1}
    return slow | {f"errors {one.route}" for one in today if one.errors / one.requests > 0.01}


def sigma(seen: list[Traffic], day_ms: int) -> set[str]:
    """Three standard deviations over the mean of the week before."""
    alarms = set()
    for route in ROUTES:
        some = [one for one in seen if one.route == route and one.requests >= _FEWEST]
        is_today = np.array([one.moment_ms >= day_ms for one in some])
        p95 = quantiles(np.array([one.buckets for one in some], dtype=float), 0.95)
        rates = np.array([one.errors / one.requests for one in some])
        for kind, values in (("latency", p95), ("errors", rates)):
            before = values[~is_today]
            if is_today.any() and values[is_today].max() > before.mean() + 3 * before.std():
                alarms.add(f"{kind} {route}")
    return alarms
