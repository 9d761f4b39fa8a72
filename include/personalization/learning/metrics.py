"""Metrics of ranked lists, one value a user, and their intervals. Formulas: Järvelin and Kekäläinen 2002 for NDCG.

Tested against `ir-measures` (trec_eval).
"""

import numpy as np

from personalization.recommend.sources import Matrix, Vector
from personalization.resampling import Interval, around, resample

Mask = np.ndarray[tuple[int, int], np.dtype[np.bool_]]

METRICS = ("ndcg@10", "recall@5", "recall@10", "mrr", "hit_rate@10")
_DEPTH = 10


def top_places(scores: Matrix, allowed: Mask) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """(B, C) places of the allowed candidates, best first, what is not allowed behind."""
    return np.argsort(np.where(allowed, -scores, np.inf), axis=1, kind="stable")


def user_metrics(scores: Matrix, allowed: Mask, truth: Mask) -> dict[str, Vector]:
    """Each metric for each user, (B,) each. Every user must have something true."""
    hits = np.take_along_axis(truth & allowed, top_places(scores, allowed), axis=1)
    top = hits[:, :_DEPTH]
    relevant = truth.sum(axis=1)
    discounts = 1 / np.log2(np.arange(2, _DEPTH + 2))[: top.shape[1]]
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(relevant, top.shape[1])]
    first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, np.inf)
    return {
        "ndcg@10": (top * discounts).sum(axis=1) / ideal,
        "recall@5": hits[:, :5].sum(axis=1) / relevant,
        "recall@10": top.sum(axis=1) / relevant,
        "mrr": 1 / first,
        "hit_rate@10": top.any(axis=1).astype(float),
    }


def novelty(shown: np.ndarray[tuple[int, int], np.dtype[np.int64]], popularity: Vector) -> Vector:
    """(B,) mean self-information in bits of the places shown, (B, k); `popularity`: (C,) share of users who engaged."""
    return np.asarray(-np.log2(np.maximum(popularity, 1e-6))[shown].mean(axis=1))


def interval(values: Vector, owners: np.ndarray[tuple[int], np.dtype[np.int64]], draws: int = 1000) -> Interval:
    """Mean of `values` with a percentile bootstrap over their owners (Efron 1979): a user is drawn whole."""
    _, index = np.unique(owners, return_inverse=True)
    sums = np.stack([np.bincount(index, values), np.bincount(index)], axis=1)
    drawn = resample(sums, draws=draws)
    return around(values.mean(), drawn[:, 0] / drawn[:, 1])


def calibration_error(probabilities: Vector, outcomes: Vector, bins: int = 10) -> float:
    """Expected calibration error over bins of equal size (Naeini et al. 2015)."""
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, bins)
    gaps = [abs(probabilities[part].mean() - outcomes[part].mean()) * len(part) for part in parts if len(part)]
    return float(sum(gaps) / max(len(order), 1))
