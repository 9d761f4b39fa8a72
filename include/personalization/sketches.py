"""A run's vectors as a small summary that tells whether they come from where those of other runs came from.

The summary is the mean of random Fourier features (Rahimi and Recht, NeurIPS 2007). The squared distance of two such
means estimates the maximum mean discrepancy of the two sets under a Gaussian kernel (Gretton et al., JMLR 2012): it is
near 0 where both were drawn alike, whatever their form, and at most 2.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

FEATURES = 128
"""Numbers kept of a run: about 1 KB."""
SAMPLE = 2000
"""Vectors looked at; at 1,024 dimensions they cost some 10 ms."""
_SEED = 7
_BANDWIDTH = 1.5  # vectors have the length 1, so that two unlike ones are 1.4 apart

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Sketch:
    """The mean feature of some vectors."""

    mean: Floats
    """Shape (FEATURES,)."""
    vectors: int
    """How many it was taken over."""

    def to_details(self) -> dict[str, Any]:
        """As a stage's details hold it."""
        return {"vectors": self.vectors, "mean": [round(float(one), 4) for one in self.mean]}

    @classmethod
    def from_details(cls, details: Any) -> "Sketch | None":
        """As it was kept; None where nothing was, or by another recipe."""
        if not isinstance(details, dict) or len(details.get("mean", ())) != FEATURES:
            return None
        return cls(np.asarray(details["mean"]), details["vectors"])


def sketch(vectors: Floats) -> Sketch | None:
    """Of at most `SAMPLE` of the vectors, at even distances; `vectors` has the shape (rows, dim). None of none."""
    if not len(vectors):
        return None
    some = vectors[:: -(-len(vectors) // SAMPLE)]
    weights, shifts = _projection(vectors.shape[1])
    features = np.sqrt(2 / FEATURES) * np.cos(some @ weights + shifts)
    return Sketch(features.mean(axis=0), len(some))


def distances(means: Floats, counts: Floats, centre: Floats) -> Floats:
    """Squared discrepancy of each mean from the centre, shapes (runs, FEATURES), (runs,), (FEATURES,).

    Less what chance alone leaves between a mean of so many vectors and the truth; so it may be below 0.
    """
    spread = 1 - (means**2).sum(axis=1)  # the features' squared lengths average 1
    found: Floats = ((means - centre) ** 2).sum(axis=1) - spread / counts
    return found


@lru_cache(maxsize=4)
def _projection(dim: int) -> tuple[Floats, Floats]:
    # The legacy generator's stream never changes: sketches of years ago stay comparable.
    random = np.random.RandomState(_SEED)
    weights = random.standard_normal((dim, FEATURES)) / _BANDWIDTH
    return weights.astype(np.float32), random.uniform(0, 2 * np.pi, FEATURES).astype(np.float32)
