"""Simulated traffic of the API, with bursts of slow and of failed answers; and plain rules on it."""

import numpy as np
from personalization.quality.traffic import WINDOW_MS, Traffic, quantiles
from personalization.schemas import DAY_MS, LATENCY_BOUNDS_S

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
