"""Ranking: the sources' scores to one score a campaign, each score split into what the sources gave to it."""

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self

import lightgbm
import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from personalization.recommend.sources import (
    LIFTED,
    SOURCES,
    CampaignKnowledge,
    Matrix,
    Scores,
    UserKnowledge,
    score_context,
    score_sources,
)
from personalization.schemas import Source

Shares = np.ndarray[tuple[int, int, int], np.dtype[np.float32]]
Columns = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""(B, K) places of some candidates, others for each user."""

FUSION_DEPTH = 20
"""Rank at which a source's vote has halved (k of reciprocal rank fusion)."""

_SOURCE_OF_CONTEXT: dict[str, Source] = {
    "trend_1d": "popularity",
    "trend_3d": "popularity",
    "trend_7d": "popularity",
    "trend_30d": "popularity",
    "engaged_users": "popularity",
    "age_days": "recency",
    "user_messages": "popularity",
    "user_engagement": "popularity",
    "profile_similarity": "message_similarity",
    "audience_interest": "audience_similarity",
    "neighbours": "similar_users",
    "category_affinity": "own_engagement",
    **{f"{source}_lift": source for source in LIFTED},
}
_RISING = frozenset((*SOURCES, *(f"{source}_lift" for source in LIFTED)))
"""More of a source, or of its lift, must never lower a score; other context may do either."""


@dataclass(frozen=True)
class Evidence:
    """The scores a ranker works on, (B, C) each."""

    sources: dict[Source, Matrix]
    context: Scores

    @classmethod
    def of(cls, campaigns: CampaignKnowledge, users: UserKnowledge) -> Self:
        """Ask every source."""
        sources = score_sources(campaigns, users)
        return cls(sources, score_context(campaigns, users, sources))

    def rows(self, places: Sequence[int]) -> Self:
        """Of the users at these places, in that order."""
        first, count = places[0], len(places)
        if list(places) == list(range(first, first + count)):
            chosen: slice | list[int] = slice(first, first + count)  # views
        else:
            chosen = list(places)
        return type(self)(
            {name: matrix[chosen] for name, matrix in self.sources.items()},
            {name: matrix[chosen] for name, matrix in self.context.items()},
        )

    @cached_property
    def ranks(self) -> dict[Source, Matrix]:
        """Share of the candidates that each one is ahead of, ties in the middle, (B, C) each in 0..1."""
        return {source: _ahead_of(scores) for source, scores in self.sources.items()}


class Ranker(Protocol):
    """Scores candidates from the evidence."""

    @property
    def version(self) -> str:
        """What tells it from every other ranker."""

    def score(self, evidence: Evidence) -> Matrix:
        """(B, C) scores from 0 to 1, higher is better."""

    def shares(self, evidence: Evidence, columns: Columns | None = None) -> tuple[list[Source], Shares]:
        """What each source gave to each score, (B, C, S), or of each user's own columns; sums over S to the score."""


@dataclass(frozen=True)
class RankFusion:
    """Weighted reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): needs no feedback at all."""

    weights: dict[Source, float]
    version: str = "fusion"

    def score(self, evidence: Evidence) -> Matrix:
        """(B, C) sum of the sources' votes, as a part of the most that is possible."""
        return np.asarray(self.shares(evidence)[1].sum(axis=2), dtype=np.float32)

    def shares(self, evidence: Evidence, columns: Columns | None = None) -> tuple[list[Source], Shares]:
        """The votes: weight · k / (k + rank - 1), none where the source says nothing."""
        names = list(self.weights)
        total = sum(self.weights.values())
        votes = [self.weights[name] / total * _vote(evidence.sources[name], evidence.ranks[name]) for name in names]
        return names, _some(np.stack(votes, axis=2).astype(np.float32), columns)


DEFAULT_FUSION = RankFusion(
    {
        "own_intents": 2.0,
        "own_engagement": 2.0,
        "similar_users": 1.0,
        "co_engagement": 1.0,
        "graph_walk": 1.0,
        "message_similarity": 2.0,
        "audience_similarity": 1.0,
        "popularity": 2.0,
        "recency": 1.0,
    }
)
"""Twice the weight to what is the user's own, and to popularity, which is hard to beat without feedback."""

POPULAR_FUSION = RankFusion({**dict.fromkeys(SOURCES, 1.0), "popularity": 8.0}, version="fusion_popular")
"""For where tastes are much alike, or little is known of each user."""

FUSIONS = (DEFAULT_FUSION, POPULAR_FUSION)
"""What serves without a learned ranker: the one that did best, the first where there is nothing to tell by."""


_PREDICTING = threading.Lock()
"""LightGBM writes to its trees before it makes SHAP values: two threads at once may end the process."""


@dataclass(frozen=True)
class LearnedRanker:
    """Gradient-boosted trees (LightGBM) over the sources' scores and ranks, fitted to feedback."""

    model: str = field(repr=False)
    """LightGBM's text format."""
    features: tuple[str, ...]
    version: str

    @cached_property
    def booster(self) -> lightgbm.Booster:
        """The model, parsed once."""
        return lightgbm.Booster(model_str=self.model)

    def score(self, evidence: Evidence) -> Matrix:
        """(B, C) probability that a user who engages with anything soon engages with this one."""
        matrix = feature_matrix(evidence, self.features)
        return self._predict(matrix).reshape(matrix.shape[:2]).astype(np.float32)

    def shares(self, evidence: Evidence, columns: Columns | None = None) -> tuple[list[Source], Shares]:
        """The score, split by what speaks for it: the positive SHAP values (Lundberg and Lee 2017) of the sources."""
        matrix = feature_matrix(evidence, self.features, columns)
        flat = self._predict(matrix, pred_contrib=True)
        names = list(dict.fromkeys(source_of(feature) for feature in self.features))
        given = np.stack(
            [
                flat[:, [at for at, feature in enumerate(self.features) if source_of(feature) == name]].sum(axis=1)
                for name in names
            ],
            axis=1,
        )
        positive = np.maximum(given, 0) + 1e-9
        parts = (positive / positive.sum(axis=1, keepdims=True)).reshape(*matrix.shape[:2], len(names))
        # With the expected value, SHAP values add up to the log odds.
        scores = expit(flat.sum(axis=1)).reshape(*matrix.shape[:2], 1)
        return names, (parts * scores).astype(np.float32)

    def _predict(self, matrix: Shares, **options: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
        """For each row of features; LightGBM itself takes no matrix without rows."""
        rows = matrix.reshape(-1, matrix.shape[2])
        if not len(rows):
            return np.zeros((0, matrix.shape[2] + 1) if options else 0)
        with _PREDICTING:
            return np.asarray(self.booster.predict(rows, num_threads=1, **options))

    def to_json(self) -> str:
        """All of it as text, for the store."""
        return json.dumps(
            {
                "model": self.model,
                "features": self.features,
                "version": self.version,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Back from the store."""
        stored = json.loads(text)
        return cls(stored["model"], tuple(stored["features"]), stored["version"])


def all_features(without: Iterable[Source] = ()) -> tuple[str, ...]:
    """Names of the features of all sources but some."""
    dropped = set(without)
    names = [f"{kind}:{source}" for source in SOURCES for kind in ("score", "rank")]
    names += [f"context:{name}" for name in _SOURCE_OF_CONTEXT]
    return tuple(name for name in names if source_of(name) not in dropped)


def source_of(feature: str) -> Source:
    """The source that a feature belongs to."""
    kind, _, name = feature.partition(":")
    return _SOURCE_OF_CONTEXT[name] if kind == "context" else name  # type: ignore[return-value]


def monotone(features: Sequence[str]) -> list[int]:
    """LightGBM's constraints: 1 where more may only raise the score."""
    return [int(feature.partition(":")[2] in _RISING) for feature in features]


def feature_matrix(evidence: Evidence, features: Sequence[str], columns: Columns | None = None) -> Shares:
    """(B, C, F), or (B, K, F) of each user's own columns."""
    scores = [feature_scores(evidence, feature) for feature in features]
    if columns is not None:
        scores = [np.take_along_axis(one, columns, axis=1) for one in scores]
    return np.stack(scores, axis=2, dtype=np.float32, casting="same_kind")


def feature_scores(evidence: Evidence, feature: str) -> Matrix:
    """(B, C) of one feature."""
    kind, _, name = feature.partition(":")
    if kind == "context":
        return evidence.context[name]
    return (evidence.sources if kind == "score" else evidence.ranks)[name]  # type: ignore[index]


def _some(shares: Shares, columns: Columns | None) -> Shares:
    return shares if columns is None else np.take_along_axis(shares, columns[:, :, None], axis=1)


def _ahead_of(scores: Matrix) -> Matrix:
    count = scores.shape[1]
    if count < 2:
        return np.zeros_like(scores)
    if scores.shape[0] > 1 and scores.strides[0] == 0:  # broadcast: alike for all users
        return np.broadcast_to(_ahead_of(scores[:1]), scores.shape)
    return np.asarray((rankdata(scores, axis=1) - 1) / (count - 1), dtype=np.float32)


def _vote(scores: Matrix, ranks: Matrix) -> Matrix:
    """(B, C) votes from 0 to 1; none for a score of 0, nor where all of several scores are alike."""
    count = scores.shape[1]
    place = (1 - ranks) * max(count - 1, 0)
    lowest = scores.min(axis=1, keepdims=True, initial=np.inf)
    differ = (scores.max(axis=1, keepdims=True, initial=0) > lowest) | (count == 1)
    return np.where((scores > 0) & differ, FUSION_DEPTH / (FUSION_DEPTH + place), 0).astype(np.float32)


@dataclass(frozen=True)
class SimilarUsers:
    """The seed recipe: similar users, their campaigns, by how many of them engaged; ties to the popular."""

    version: str = "similar_users"

    def score(self, evidence: Evidence) -> Matrix:
        """(B, C) share of the similar users, and a little for popularity."""
        return np.asarray(self.shares(evidence)[1].sum(axis=2), dtype=np.float32)

    def shares(self, evidence: Evidence, columns: Columns | None = None) -> tuple[list[Source], Shares]:
        """The count, scaled by the largest; what is left below one user goes to popularity."""
        counts = evidence.context["neighbours"]
        popular = evidence.context["engaged_users"]
        most = counts.max(axis=1, keepdims=True, initial=0) + 1
        tie = popular / (popular.max(axis=1, keepdims=True, initial=0) + 1)
        shares = np.stack([counts / most, tie / most], axis=2).astype(np.float32)
        return ["similar_users", "popularity"], _some(shares, columns)


NAMED_RANKERS: dict[str, Ranker] = {one.version: one for one in (*FUSIONS, SimilarUsers())}
"""Rankers that need no training, by the name that selects them."""
