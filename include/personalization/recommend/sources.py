"""Sources: what speaks for a campaign, each a formula over a batch of users and all candidate campaigns.

The API (one user), the training of the ranker and offline evaluation use these same formulas: who fills
`CampaignKnowledge` and `UserKnowledge` differs, what is made of them does not.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any, Self, get_args

import numpy as np
from scipy import sparse

from personalization.schemas import DAY_MS, Source

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]
Vector = np.ndarray[tuple[int], np.dtype[np.float32]]
Whole = np.ndarray[tuple[int], np.dtype[np.int64]]

SOURCES: tuple[Source, ...] = get_args(Source)
TEXT_SOURCES: frozenset[Source] = frozenset(
    ("own_intents", "similar_users", "message_similarity", "audience_similarity")
)
LIFTED: tuple[Source, ...] = ("similar_users", "co_engagement", "graph_walk")
"""Sources that favour the popular: what is left of them beside popularity tells more of the user."""
GRAPH_SOURCES: frozenset[Source] = frozenset(("own_engagement", "co_engagement", "graph_walk"))

TREND_HALF_LIVES_DAYS = (1.0, 3.0, 7.0, 30.0)
WALK_CONTINUES = 0.85
"""Probability that the random walk goes on rather than restarts at the user (Page et al. 1999)."""


@dataclass(frozen=True)
class CampaignKnowledge:
    """What is known of the campaigns at a moment, alike for all users.

    C candidates (running, or about to), P campaigns with engagement, I intents, D dimensions.
    """

    at: int
    """Epoch milliseconds of the moment."""
    ids: list[str]
    active_from: Whole
    active_until: Whole
    category: Whole
    """(C,) code of each candidate's category."""
    intent_ids: list[str]
    engaged_ids: list[str]
    engaged_category: Whole
    """(P,) code of each engaged campaign's category, -1 where it left the catalog."""
    targets: Matrix
    """(I, C), 1 where the candidate targets the intent."""
    text: Matrix
    """(C, D) unit vectors of name and description; zero where there is none."""
    audience: Matrix
    """(C, D) unit vectors of what engaged users said just before; zero where that is unknown."""
    trend: Matrix
    """(C, half-lives) sum of the engagement, each signal weighted by 2^(-age / half-life)."""
    users: Vector
    """(C,) engaged users."""
    last_at: Whole
    """(C,) newest engagement in epoch milliseconds, 0 where there is none."""
    co_engagement: Matrix
    """(P, C): for a user who engaged with p, the engagement of all who did, each user of unit length."""
    walk: Matrix
    """(I + P, C) probability that a walk with restarts from the intent or campaign is at the candidate."""

    @cached_property
    def column(self) -> dict[str, int]:
        """Place of each candidate."""
        return {campaign_id: at for at, campaign_id in enumerate(self.ids)}

    @cached_property
    def by_id(self) -> Whole:
        """(C,) places of the candidates, in the order of their ids."""
        return np.asarray(sorted(range(len(self.ids)), key=self.ids.__getitem__), dtype=np.int64)

    @cached_property
    def own_column(self) -> Whole:
        """(C,) place of each candidate in `engaged_ids`, or -1."""
        place = {campaign_id: at for at, campaign_id in enumerate(self.engaged_ids)}
        return np.asarray([place.get(one, -1) for one in self.ids], dtype=np.int64)

    def active(self, now_ms: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """(C,) which candidates may be shown at `now_ms` by their window."""
        return (self.active_from <= now_ms) & (now_ms < self.active_until)

    def only(self, kept: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Self:
        """The same for some of the candidates, chosen by the mask `kept`, shape (C,)."""
        if kept.all():
            return self
        by_row = ("active_from", "active_until", "category", "text", "audience", "trend", "users", "last_at")
        by_column = ("targets", "co_engagement", "walk")
        return replace(
            self,
            ids=list(compress(self.ids, kept)),
            **{name: getattr(self, name)[kept] for name in by_row},
            **{name: getattr(self, name)[:, kept] for name in by_column},
        )


@dataclass(frozen=True)
class UserKnowledge:
    """What is known of B users at a moment."""

    ids: list[str]
    intents: sparse.csr_array
    """(B, I) recency-weighted intents expressed."""
    engaged: sparse.csr_array
    """(B, P) recency-weighted engagement."""
    profile: Matrix
    """(B, D) unit vector of all that a user said lately; zero where that is nothing."""
    interests: np.ndarray[tuple[int, int, int], np.dtype[np.float32]]
    """(B, K, D) unit vectors of what a user talks about, kept apart; zero where there are fewer."""
    neighbours_engaged: Matrix
    """(B, C) engagement of the most similar other users, weighted by similarity."""
    neighbours: Matrix
    """(B, C) how many of them engaged."""
    messages: Vector
    """(B,) messages known."""


Scores = dict[str, Matrix]
"""By name, a (B, C) matrix each."""


def score_sources(campaigns: CampaignKnowledge, users: UserKnowledge) -> dict[Source, Matrix]:
    """Every source's score of every candidate for every user, (B, C) each. Higher speaks more for it.

    O(B · C · (K·D + nonzeros)); no loop over users.
    """
    shape = (len(users.ids), len(campaigns.ids))
    strength = log_strength(users.engaged)
    own = _columns(strength, campaigns.own_column)
    return {
        "own_intents": _dense(log_strength(users.intents) @ campaigns.targets),
        "own_engagement": own,
        "similar_users": users.neighbours_engaged,
        "co_engagement": np.maximum(_dense(unit_rows(strength) @ campaigns.co_engagement) - own, 0),
        "graph_walk": _walk(campaigns, users),
        "message_similarity": _best_interest(users.interests, campaigns.text),
        "audience_similarity": users.profile @ campaigns.audience.T,
        "popularity": np.broadcast_to(np.log1p(campaigns.trend[:, 2]), shape),
        "recency": np.broadcast_to(1 / (1 + hours_since_engagement(campaigns) / 24), shape),
    }


def score_context(campaigns: CampaignKnowledge, users: UserKnowledge, sources: dict[Source, Matrix]) -> Scores:
    """What decides how far a source is to be trusted: activity, age, trends, lift over popularity, (B, C) each."""
    shape = (len(users.ids), len(campaigns.ids))
    context: Scores = {
        f"trend_{days:g}d": np.broadcast_to(np.log1p(campaigns.trend[:, at]), shape)
        for at, days in enumerate(TREND_HALF_LIVES_DAYS)
    }
    context["engaged_users"] = np.broadcast_to(np.log1p(campaigns.users), shape)
    context["age_days"] = np.broadcast_to(_age_days(campaigns), shape)
    context["user_messages"] = np.broadcast_to(np.log1p(users.messages)[:, None], shape)
    engaged = np.asarray(users.engaged.sum(axis=1), dtype=np.float32).reshape(-1, 1)
    context["user_engagement"] = np.broadcast_to(np.log1p(engaged), shape)
    context["profile_similarity"] = users.profile @ campaigns.text.T
    context["audience_interest"] = _best_interest(users.interests, campaigns.audience)
    context["neighbours"] = users.neighbours
    context["category_affinity"] = _category_affinity(campaigns, users)
    for source in LIFTED:
        context[f"{source}_lift"] = np.asarray(sources[source] / (1 + campaigns.trend[:, -1]), dtype=np.float32)
    return context


def log_strength(weights: sparse.csr_array) -> sparse.csr_array:
    """log(1 + weight): the tenth engagement says less than the first."""
    return weights.log1p()


def unit_rows(matrix: sparse.csr_array) -> sparse.csr_array:
    """Rows scaled to length 1; empty rows stay empty."""
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1), dtype=np.float32)).ravel()
    return (sparse.diags_array(1 / np.maximum(lengths, 1e-9), dtype=np.float32) @ matrix).tocsr()


def hours_since_engagement(campaigns: CampaignKnowledge) -> Vector:
    """(C,) hours since the last engagement, or since the start where there was none yet."""
    newest = np.maximum(campaigns.last_at, np.minimum(campaigns.active_from, campaigns.at))
    return np.asarray(np.maximum(campaigns.at - newest, 0) / (DAY_MS / 24), dtype=np.float32)


def _age_days(campaigns: CampaignKnowledge) -> Vector:
    """(C,) days since the start; a campaign without one is as old as a year."""
    age = np.maximum(campaigns.at - campaigns.active_from, 0) / DAY_MS
    return np.asarray(np.minimum(age, 365), dtype=np.float32)


def _walk(campaigns: CampaignKnowledge, users: UserKnowledge) -> Matrix:
    """Personalised PageRank of the candidates, from the walks of what the user is linked to.

    PageRank is linear in where it restarts (Jeh and Widom 2003): a user's is the mean of their
    neighbours', so it takes no walk of one's own.
    """
    links = sparse.hstack([log_strength(users.intents), log_strength(users.engaged)]).tocsr()
    total = np.asarray(links.sum(axis=1), dtype=np.float32).reshape(-1, 1)
    return np.asarray(WALK_CONTINUES * _dense(links @ campaigns.walk) / np.maximum(total, 1e-9), dtype=np.float32)


def _best_interest(interests: np.ndarray[tuple[int, int, int], np.dtype[np.float32]], vectors: Matrix) -> Matrix:
    """Cosine of the nearest of each user's interests, (B, C); 0 where there is none."""
    cosines = interests @ vectors.T
    known = np.any(interests != 0, axis=2)
    best = np.where(known[:, :, None], cosines, -1.0).max(axis=1, initial=-1.0)
    return np.where(known.any(axis=1)[:, None], best, 0.0).astype(np.float32)


def _category_affinity(campaigns: CampaignKnowledge, users: UserKnowledge) -> Matrix:
    """Share of a user's engagement that is with the candidate's category, (B, C)."""
    known = campaigns.engaged_category >= 0
    width = int(max(campaigns.category.max(initial=-1), campaigns.engaged_category.max(initial=-1))) + 1
    places = np.flatnonzero(known)
    membership = sparse.csr_array(
        (np.ones(len(places), dtype=np.float32), (places, campaigns.engaged_category[places])),
        shape=(len(known), width),
    )
    by_category = _dense(users.engaged @ membership)
    total = by_category.sum(axis=1, keepdims=True)
    return np.asarray(by_category[:, campaigns.category] / np.maximum(total, 1e-9), dtype=np.float32)


def _columns(matrix: sparse.csr_array, columns: Whole) -> Matrix:
    """The given columns as a dense matrix; -1 is a column of zeros."""
    found = np.flatnonzero(columns >= 0)
    chosen = np.zeros((matrix.shape[0], len(columns)), dtype=np.float32)
    chosen[:, found] = _dense(matrix[:, columns[found]])
    return chosen


def _dense(matrix: Any) -> Matrix:
    """The product of a sparse matrix, which SciPy leaves sparse or makes dense, as a dense one."""
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix, dtype=np.float32)
