"""What a figure should have been by its own history: medians, so that what was odd before does not count."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

FEWEST = 10
"""Observations below which nothing is expected."""
RECENT = 3
"""Observations that make a new normal: what two of them showed already is not told again."""

_SEASONAL = 21  # three of each weekday
_TRENDING_DAYS = 14.0
_TAIL = 6.0  # degrees of freedom: errors of runs have heavier tails than a normal distribution
_DECILES_IN_SIGMAS = 2.563  # distance of the outer deciles of a normal distribution

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Expectation:
    """Where a figure was to lie, and how far chance moves it."""

    low: float
    high: float
    """Equal to `low` unless more than one value is usual."""
    scale: float
    """As a standard deviation, from the quartiles and deciles of the history."""
    recent: float
    """How far the last few lay from what was expected of them."""

    def distance(self, value: float) -> float:
        """How far the value lies outside of what was expected; signed."""
        return max(value - self.high, 0.0) + min(value - self.low, 0.0)

    def score(self, value: float) -> float:
        """That distance in scales; 0 where the last few lay there already: that is the new normal, and known."""
        distance = self.distance(value)
        fresh = self.distance(value - self.recent)
        if distance * fresh <= 0:
            return 0.0
        return (distance if abs(distance) < abs(fresh) else fresh) / self.scale

    @property
    def middle(self) -> float:
        """One value for what was expected."""
        return (self.low + self.high) / 2


def probability(score: float) -> float:
    """Of a score as far from 0 as this, by chance (Student's t, for its tails)."""
    return float(2 * stats.t.sf(abs(score), _TAIL))


def threshold(probability: float) -> float:
    """The score that chance exceeds with this probability."""
    return float(stats.t.isf(probability / 2, _TAIL))


def expect_level(days: Floats, values: Floats, day: float, *, floor: float, quiet_days: bool = False) -> Expectation:
    """By the usual level, its trend and the weekday; shapes (observations,), oldest first, at least `FEWEST`.

    The trend is Theil and Sen's slope (scipy), where it is sure which way it goes. `days` count from the epoch, UTC.
    With `quiet_days` the level of the quietest weekday is usual on any day: a holiday is as quiet as a Sunday.
    `floor` is the least scale.
    """
    slope = 0.0
    if days[-1] - days[0] >= _TRENDING_DAYS:
        found = stats.theilslopes(values, days)
        if found.low_slope * found.high_slope > 0:
            slope = float(found.slope)
    residuals = values - slope * (days - day)
    weekdays = np.floor(days).astype(int) % 7
    offsets = np.zeros(7)
    level = float(np.median(residuals))
    if len(values) >= _SEASONAL:
        for weekday in range(7):
            same = residuals[weekdays == weekday] - level
            if len(same) >= RECENT:
                offsets[weekday] = np.median(same) * len(same) / (len(same) + 1)
        level = float(np.median(residuals - offsets[weekdays]))
    residuals = residuals - level - offsets[weekdays]
    expected = level + float(offsets[int(np.floor(day)) % 7])
    low = min(expected, level + float(offsets.min())) if quiet_days else expected
    return Expectation(low, expected, _scale(residuals, floor), _recent(residuals))


def expect_constant(values: Floats, *, floor: float) -> Expectation:
    """By the usual level alone; shape (observations,), at least `FEWEST`."""
    level = float(np.median(values))
    return Expectation(level, level, _scale(values - level, floor), 0.0)


def expect_effort(sizes: Floats, efforts: Floats, size: float, *, floor: float) -> Expectation:
    """By the size of the work, both as logarithms; shapes (observations,), oldest first, at least `FEWEST`.

    Effort grows with size by a power between 0 (all of it is fixed) and 1: Theil and Sen's slope, with its 95 %
    interval as what is usual away from the sizes that were seen; of larger ones as much as in proportion.
    """
    found = stats.theilslopes(efforts, sizes) if np.ptp(sizes) > 0 else None
    slope, low, high = (found.slope, found.low_slope, found.high_slope) if found else (0.0, 0.0, 1.0)
    slope, low, high = (float(np.clip(np.nan_to_num(one), 0, 1)) for one in (slope, low, high))
    middle = float(np.median(sizes))
    residuals = efforts - slope * (sizes - middle)
    level = float(np.median(residuals))
    residuals = residuals - level
    high = 1.0 if size > middle else high  # what is fixed hides the slope of what is large
    ends = (level + low * (size - middle), level + high * (size - middle))
    return Expectation(min(ends), max(ends), _scale(residuals, floor), _recent(residuals))


def _scale(residuals: Floats, floor: float) -> float:
    low, high = np.quantile(residuals, (0.1, 0.9))
    spread = float(stats.median_abs_deviation(residuals, scale="normal"))
    # The fit took some of the residuals' freedom.
    return max(spread, float(high - low) / _DECILES_IN_SIGMAS, floor) * (1 + 4 / len(residuals))


def _recent(residuals: Floats) -> float:
    return float(np.median(residuals[-RECENT:]))
