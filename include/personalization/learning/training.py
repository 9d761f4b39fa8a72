"""Training: the ranker fitted to what users engaged with after moments of the past."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import lightgbm
import numpy as np
import structlog
from scipy import sparse

from personalization.learning.history import History, take_snapshot
from personalization.learning.metrics import Mask, user_metrics
from personalization.recommend.ranking import (
    DEFAULT_FUSION,
    FUSIONS,
    Evidence,
    LearnedRanker,
    Ranker,
    RankFusion,
    all_features,
    feature_scores,
    monotone,
)
from personalization.recommend.sources import Matrix, Vector, Whole

Task = Literal["new", "any"]
"""`new`: campaigns the user has not engaged with yet; `any`: all."""

MOMENTS = 12
"""Past moments that are learned from."""
MOMENTS_HALF_LIFE = 4.0
LEAST_MOMENTS = 6
"""A horizon is cut so that so many lie in the history."""
USERS_AT_ONCE = 1000
_PAIRS_AT_ONCE = 1_000_000  # users x candidates: some 150 bytes each
MIN_ANSWERS = 30
"""Fewest users who engaged to choose a rank fusion by."""
MIN_POSITIVES = 200
"""Fewest engagements to learn from."""
_NEGATIVES = 60
_MARGIN = 0.5  # standard errors: keeps out luck on few answers, lets in a true gain
_TREES = 150
_PARAMETERS = {
    "objective": "binary",
    "num_leaves": 15,
    "learning_rate": 0.05,
    "min_data_in_leaf": 40,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "max_bin": 127,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 0,
    "verbose": -1,
    "num_threads": 1,
}

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Example:
    """A moment of the past: what was known, and what its users did then."""

    moment: int
    users: Whole
    """(B,) places of the users who engaged with a candidate within the horizon."""
    columns: Whole
    """(C,) places of the candidates in the catalog."""
    evidence: Evidence
    allowed: Mask
    """(B, C) what may be recommended."""
    truth: Mask
    """(B, C) what was engaged with."""
    of_users: int
    """All users of the moment who engaged; B may be some of them."""


def take_examples(history: History, moment: int, horizon_ms: int, task: Task) -> Iterator[Example]:
    """Draw the evidence of `moment` for the users who engaged within `horizon_ms` behind it.

    Yields up to `USERS_AT_ONCE` users at a time, fewer where candidates are many, in a random order: the first part is
    a fair sample. Nothing where nobody engaged. Memory: users at once x candidates x features.
    """
    snapshot = take_snapshot(history, moment)
    signals = history.signals
    column = np.full(len(history.catalog.ids), -1, dtype=np.int64)
    column[snapshot.columns] = np.arange(len(snapshot.columns))
    candidate = signals.is_event & (column[signals.campaign] >= 0)
    before = np.flatnonzero(candidate & (signals.at < moment))
    within = np.flatnonzero(candidate & (signals.at >= moment) & (signals.at < moment + horizon_ms))
    shape = (len(history.user_ids), len(snapshot.columns))
    seen = _pairs(signals.user[before], column[signals.campaign[before]], shape)
    then = _pairs(signals.user[within], column[signals.campaign[within]], shape)
    if task == "new":
        then = then - then.multiply(seen)
    users = np.flatnonzero(then.sum(axis=1))
    users = np.random.default_rng(0).permutation(users)
    at_once = max(min(USERS_AT_ONCE, _PAIRS_AT_ONCE // max(shape[1], 1)), 1)
    for start in range(0, len(users), at_once):
        part = np.sort(users[start : start + at_once])
        known = seen[part].toarray() > 0
        allowed = ~known if task == "new" else np.ones_like(known)
        evidence = Evidence.of(snapshot.campaigns, snapshot.users(part))
        yield Example(moment, part, snapshot.columns, evidence, allowed, then[part].toarray() > 0, len(users))


def _pairs(rows: Whole, columns: Whole, shape: tuple[int, int]) -> sparse.csr_array:
    """1 for each pair, however often it comes."""
    matrix = sparse.csr_array((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)
    matrix.data[:] = 1
    return matrix


def past_moments(history: History, moment: int, horizon_ms: int) -> tuple[list[int], int]:
    """Moments to learn from at `moment`, oldest first, at most `MOMENTS`, and the horizon behind each.

    The horizons lie side by side and end by `moment`; one that is long beside the history is cut, so that there
    are several.
    """
    oldest = int(history.signals.at[0]) if len(history.signals.at) else moment
    horizon_ms = max(min(horizon_ms, (moment - oldest) // LEAST_MOMENTS), 1)
    moments = (moment - back * horizon_ms for back in range(MOMENTS, 0, -1))
    return [one for one in moments if one > oldest], horizon_ms


def past_examples(history: History, moment: int, horizon_ms: int, task: Task) -> list[Example]:
    """The examples to learn from at `moment`, of at most `USERS_AT_ONCE` users each."""
    moments, horizon_ms = past_moments(history, moment, horizon_ms)
    drawn = (next(take_examples(history, one, horizon_ms, task), None) for one in moments)
    return [one for one in drawn if one is not None]


def fit_ranker(examples: Sequence[Example], features: tuple[str, ...] | None = None) -> LearnedRanker | None:
    """Fit trees to the examples; None where there is too little to learn from.

    Cost: rows x trees; rows are a user's engagements and up to 60 others for each example.
    """
    features = features or all_features()
    examples = [one for one in examples if len(one.users)]
    if len(examples) < 2 or sum(int(one.truth.sum()) for one in examples) < MIN_POSITIVES:
        return None
    rng = np.random.default_rng(0)
    # The newest count most: tastes change, and early moments knew little.
    fading = [0.5 ** (age / MOMENTS_HALF_LIFE) for age in reversed(range(len(examples)))]
    parts = [_rows(one, features, rng, weight) for one, weight in zip(examples, fading, strict=True)]
    matrix, labels, weights = (np.concatenate([part[at] for part in parts]) for at in range(3))
    booster = lightgbm.train(
        {**_PARAMETERS, "monotone_constraints": monotone(features)},
        lightgbm.Dataset(matrix, labels, weight=weights),
        _TREES,
    )
    model = booster.model_to_string()
    version = "learned-" + hashlib.blake2b(model.encode(), digest_size=6).hexdigest()
    return LearnedRanker(model, features, version)


def _rows(
    example: Example, features: tuple[str, ...], rng: np.random.Generator, weight: float
) -> tuple[Matrix, Matrix, Matrix]:
    """All a user engaged with and a draw of what they did not, weighted so that it stands for all of it."""
    draw = rng.random(example.truth.shape)
    draw[~example.allowed | example.truth] = np.inf
    others = example.allowed & ~example.truth
    kept = np.zeros_like(example.truth)
    count = min(_NEGATIVES, draw.shape[1])
    chosen = np.argpartition(draw, count - 1, axis=1)[:, :count]
    np.put_along_axis(kept, chosen, True, axis=1)
    kept &= others
    stands_for = others.sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
    take = kept | example.truth
    weights = weight * np.where(example.truth, 1.0, stands_for[:, None])
    matrix = np.stack([feature_scores(example.evidence, one)[take] for one in features], axis=1)
    return matrix, example.truth[take].astype(np.float32), weights[take].astype(np.float32)


@dataclass(frozen=True)
class Choice:
    """The ranker that may serve, and why."""

    ranker: LearnedRanker | RankFusion
    reason: str
    fusion: RankFusion = DEFAULT_FUSION
    """The rank fusion that did best."""
    gain: float | None = None
    """Mean NDCG@10 by which the learned ranker beat it on the newest examples, which it had not seen."""


def choose_ranker(examples: Sequence[Example]) -> Choice:
    """The learned ranker if it clearly beats rank fusion on examples it was not fitted to, else the better rank fusion.

    Fits twice: without the newest quarter of the examples, to judge; then with all, to serve.
    """
    examples = [one for one in examples if len(one.users)]
    fusion = _best_fusion(examples)
    held_out = max(1, len(examples) // 4)
    judged = fit_ranker(examples[:-held_out])
    if judged is None:
        return Choice(fusion, "too little feedback to learn from", fusion)
    newest = examples[-held_out:]
    gains = _ndcg(judged, newest) - _ndcg(fusion, newest)
    gain = float(gains.mean())
    is_ahead = gain > _MARGIN * float(gains.std()) / np.sqrt(len(gains))
    ranker = fit_ranker(examples) if is_ahead else None
    if ranker is None:
        return Choice(fusion, "the learned ranker is not clearly ahead of rank fusion", fusion, gain)
    return Choice(ranker, "the learned ranker is ahead of rank fusion", fusion, gain)


def _best_fusion(examples: Sequence[Example]) -> RankFusion:
    """By NDCG@10 on all examples, as none is fitted to them; the first where too few can tell."""
    if sum(len(one.users) for one in examples) < MIN_ANSWERS:
        return FUSIONS[0]
    return max(FUSIONS, key=lambda one: float(_ndcg(one, examples).mean()))


def _ndcg(ranker: Ranker, examples: Sequence[Example]) -> Vector:
    """(users of all examples,)."""
    return np.concatenate(
        [user_metrics(ranker.score(one.evidence), one.allowed, one.truth)["ndcg@10"] for one in examples]
    )
