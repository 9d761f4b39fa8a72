"""Bootstrap over users: a user is drawn whole, with everything they did."""

from typing import Any, NamedTuple

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Numbers = np.ndarray[Any, np.dtype[Any]]
Whole = np.ndarray[tuple[int], np.dtype[np.int64]]

_CELLS = 8_000_000
"""Counts held at once: 64 MB."""


class Interval(NamedTuple):
    """A figure with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def resample(sums: Numbers, alike: Whole | None = None, *, draws: int = 1000, seed: int = 0) -> Floats:
    """(draws, K) totals of as many users as there are, drawn with replacement (Efron 1979).

    `sums`: (U, K) what each user adds; `alike`: (U,) how many users each row stands for, one where it is not given.
    O(draws · U), in chunks of bounded memory.
    """
    counts = np.ones(len(sums), dtype=np.int64) if alike is None else alike
    users = int(counts.sum())
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS // max(len(sums), 1))
    return np.concatenate(
        [
            rng.multinomial(users, counts / users, size=min(at_once, draws - start)) @ sums
            for start in range(0, draws, at_once)
        ]
    )


def around(figure: float, drawn: Floats) -> Interval:
    """The figure with the percentiles of what was drawn."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(figure), float(low), float(high))
