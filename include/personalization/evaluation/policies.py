"""Policies: what ranks campaigns at a moment. The shipped one, its parts, and the baselines it must beat."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from personalization.errors import InputError
from personalization.learning.history import History
from personalization.learning.training import Example
from personalization.recommend.ranking import FUSIONS, RankFusion
from personalization.recommend.sources import GRAPH_SOURCES, SOURCES, TEXT_SOURCES, Matrix, log_strength
from personalization.schemas import Source

_FACTORS = 32


@dataclass(frozen=True)
class Moment:
    """What a policy may look at: the evidence and the history before the moment."""

    example: Example
    past: History


Baseline = Callable[[Moment], Matrix]


def _random(moment: Moment) -> Matrix:
    rng = np.random.default_rng(moment.example.moment % 2**32)
    return rng.random(moment.example.truth.shape, dtype=np.float32)


def _popularity(moment: Moment) -> Matrix:
    """Engaged users of all time."""
    return moment.example.evidence.context["engaged_users"]


def _popularity_recent(moment: Moment) -> Matrix:
    """Engagement that halves every week."""
    return moment.example.evidence.context["trend_7d"]


def _recency(moment: Moment) -> Matrix:
    """Most recently engaged with."""
    return moment.example.evidence.sources["recency"]


def _popularity_recency(moment: Moment) -> Matrix:
    """Rank fusion of popularity, its trend and recency: the best that is not personal."""
    ranker = RankFusion({"popularity": 1.0, "recency": 1.0})
    return ranker.score(moment.example.evidence)


def _own_history(moment: Moment) -> Matrix:
    """What the user engaged with before, then the popular."""
    return _first_by(moment.example.evidence.sources["own_engagement"], _popularity_recent(moment))


def _item_knn(moment: Moment) -> Matrix:
    """Item-kNN by cosine over the engaged users (Sarwar et al. 2001), of `implicit`."""
    from implicit.nearest_neighbours import CosineRecommender
    from implicit.utils import ParameterWarning

    engaged = _engaged(moment)
    model = CosineRecommender(K=100, num_threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParameterWarning)  # of a format that it converts to by itself
        model.fit(engaged, show_progress=False)
    columns = moment.example.columns
    return _first_by(
        (engaged[moment.example.users] @ model.similarity.tocsr()[:, columns]).toarray(), _popularity(moment)
    )


def _als(moment: Moment) -> Matrix:
    """Matrix factorisation of implicit feedback (Hu, Koren and Volinsky 2008), of `implicit`."""
    from implicit.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    engaged = _engaged(moment)
    # The others would only take numbers from the generator that the factors start from.
    known = np.flatnonzero(np.diff(engaged.indptr))
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(factors=_FACTORS, iterations=15, random_state=0, num_threads=1, use_gpu=False)
        model.fit(engaged[known], show_progress=False)
    factors = np.zeros((engaged.shape[0], model.item_factors.shape[1]), dtype=np.float32)
    factors[known] = model.user_factors
    scores = factors[moment.example.users] @ model.item_factors[moment.example.columns].T
    return _first_by(scores, _popularity(moment))


def _similar_users(moment: Moment) -> Matrix:
    """The seed recipe: similar users by vector, their campaigns, by count."""
    return _first_by(moment.example.evidence.context["neighbours"], _popularity(moment))


def _graph_walk(moment: Moment) -> Matrix:
    """Personalised PageRank alone."""
    return _first_by(moment.example.evidence.sources["graph_walk"], _popularity(moment))


def _message_similarity(moment: Moment) -> Matrix:
    """The user's words against the campaign's."""
    return _first_by(moment.example.evidence.sources["message_similarity"], _popularity(moment))


BASELINES: dict[str, Baseline] = {
    "random": _random,
    "popularity": _popularity,
    "popularity_recent": _popularity_recent,
    "recency": _recency,
    "popularity_recency": _popularity_recency,
    "own_history": _own_history,
    "item_knn": _item_knn,
    "als": _als,
    "similar_users": _similar_users,
    "graph_walk": _graph_walk,
    "message_similarity": _message_similarity,
}


@dataclass(frozen=True)
class Trained:
    """A policy that learns: without some sources, gated or not."""

    without: frozenset[Source] = frozenset()
    gated: bool = False


FUSED: dict[str, RankFusion] = {one.version: one for one in FUSIONS}
TRAINED: dict[str, Trained] = {
    "shipped": Trained(gated=True),
    "learned": Trained(),
    "learned_without_text": Trained(TEXT_SOURCES),
    "learned_without_graph": Trained(GRAPH_SOURCES),
}
ABLATIONS: dict[str, Trained] = {f"learned_without_{source}": Trained(frozenset({source})) for source in SOURCES}
STANDARD: tuple[str, ...] = (
    "shipped",
    *FUSED,
    "learned",
    "learned_without_text",
    "learned_without_graph",
    *BASELINES,
)
"""What is evaluated where nothing is named."""
ALL: tuple[str, ...] = (*STANDARD, *ABLATIONS)


def check_policies(names: Iterable[str]) -> list[str]:
    """The names, each once and known.

    Raises:
        InputError: a name is not one of a policy.
    """
    chosen = list(dict.fromkeys(names))
    if unknown := sorted(set(chosen) - set(ALL)):
        raise InputError(f"no such policy: {', '.join(unknown)}; there are: {', '.join(ALL)}")
    return chosen


def _first_by(scores: Matrix, then: Matrix) -> Matrix:
    """`scores`, ties broken by `then`: what says nothing of a user falls back on it."""
    span = float(then.max(initial=0) - then.min(initial=0)) or 1.0
    tie = (then - then.min(initial=0)) / span
    rows = np.sort(scores, axis=1)
    gaps = np.diff(rows, axis=1)
    least = np.where(gaps > 0, gaps, np.inf).min(axis=1, initial=np.inf)
    step = np.where(np.isfinite(least), least, 1.0)[:, None]
    return np.asarray(scores.astype(np.float64) + 0.5 * step * tie)


def _engaged(moment: Moment) -> sparse.csr_matrix:
    """(U, C of the catalog) engagement before the moment, as `implicit` takes it."""
    return sparse.csr_matrix(log_strength(moment.past.engaged(moment.example.moment)))
