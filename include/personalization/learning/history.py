"""History: all that happened, as arrays, from which the knowledge of any moment can be drawn.

Nothing at or after a moment enters the knowledge of that moment.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from personalization.recommend.sources import (
    TREND_HALF_LIVES_DAYS,
    WALK_CONTINUES,
    CampaignKnowledge,
    Matrix,
    UserKnowledge,
    Vector,
    Whole,
    log_strength,
    unit_rows,
)
from personalization.schemas import DAY_MS, ENGAGEMENT_STRENGTH, INTERESTS_PER_USER, Campaign

HALF_LIFE_DAYS = 30.0
INTEREST_COSINE = 0.5
"""Least cosine of a message to an interest to be of it."""
RECENT_MESSAGES = 50
"""Newest messages of a user that interests are drawn from."""
NEIGHBOURS = 20
PROFILE_MESSAGES = 200
MIN_SIMILARITY = 0.5
"""Least cosine between two users' vectors for one to speak for the other."""
SAID_BEFORE_MS = 7 * DAY_MS
"""How long before an engagement a message may lie to count as what it was about."""
_LATEST = 2**62
_WALK_STEPS = 12
_USERS_AT_ONCE = 1024
_COLUMNS_AT_ONCE = 256


@dataclass(frozen=True)
class Messages:
    """What was said, by time."""

    user: Whole
    at: Whole
    """Epoch milliseconds."""
    vectors: Matrix
    """(M, D) unit vectors."""


@dataclass(frozen=True)
class Intents:
    """What messages expressed, by time: a row for each message and intent."""

    user: Whole
    at: Whole
    intent: Whole
    confidence: Vector
    message: Whole
    """A number that the rows of one message share, and no others."""


@dataclass(frozen=True)
class Signals:
    """Engagement, by time: a row for each message that speaks to a campaign, click and conversion."""

    user: Whole
    campaign: Whole
    at: Whole
    strength: Vector
    is_event: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """False for what is only inferred from a message."""


@dataclass(frozen=True)
class CatalogArrays:
    """The campaigns of the catalog, in its order."""

    ids: list[str]
    active_from: Whole
    active_until: Whole
    category: Whole
    intent_ids: list[str]
    targets: Matrix
    """(I, C)."""
    text: Matrix
    """(C, D) unit vectors."""

    @classmethod
    def of(cls, campaigns: Sequence[Campaign], intent_ids: Sequence[str], text: Matrix) -> "CatalogArrays":
        """Take the campaigns with the vectors of their texts, shape (C, D)."""
        categories = {name: at for at, name in enumerate(sorted({one.category for one in campaigns}))}
        place = {intent_id: at for at, intent_id in enumerate(intent_ids)}
        targets = np.zeros((len(intent_ids), len(campaigns)), dtype=np.float32)
        for at, one in enumerate(campaigns):
            targets[[place[intent_id] for intent_id in one.intents], at] = 1
        return cls(
            ids=[one.id for one in campaigns],
            active_from=np.asarray([one.active_from_ms for one in campaigns], dtype=np.int64),
            active_until=np.asarray([one.active_until_ms for one in campaigns], dtype=np.int64),
            category=np.asarray([categories[one.category] for one in campaigns], dtype=np.int64),
            intent_ids=list(intent_ids),
            targets=targets,
            text=text,
        )


@dataclass(frozen=True)
class History:
    """Everything that happened. Users and campaigns are places in `user_ids` and `catalog`."""

    user_ids: list[str]
    catalog: CatalogArrays
    messages: Messages
    intents: Intents
    signals: Signals
    half_life_days: float = HALF_LIFE_DAYS
    neighbours: int = NEIGHBOURS
    """Similar users that are asked, as many as the API asks."""
    profile_messages: int = PROFILE_MESSAGES
    """Newest messages of a user that make their vector."""

    def before(self, moment: int) -> "History":
        """Only what happened before `moment` (epoch milliseconds). Views, no copies."""
        messages, intents, signals = (
            type(part)(**{name: column[: np.searchsorted(part.at, moment)] for name, column in vars(part).items()})
            for part in (self.messages, self.intents, self.signals)
        )
        return replace(self, messages=messages, intents=intents, signals=signals)  # type: ignore[arg-type]

    @cached_property
    def said_before(self) -> Whole:
        """(S,) the user's latest message at or before each signal, at most a week old; -1 where there is none."""
        order = np.lexsort((self.messages.at, self.messages.user))
        users, times = self.messages.user[order], self.messages.at[order]
        start = int(min(times.min(initial=_LATEST), self.signals.at.min(initial=_LATEST)))
        span = int(max(times.max(initial=0), self.signals.at.max(initial=0))) - start + 1
        asked = self.signals.user * span + self.signals.at - start
        place = np.searchsorted(users * span + times - start, asked, side="right") - 1
        found = np.maximum(place, 0)
        if not len(order):
            return np.full(len(self.signals.at), -1, dtype=np.int64)
        fits = (place >= 0) & (users[found] == self.signals.user)
        fits &= self.signals.at - times[found] <= SAID_BEFORE_MS
        return np.where(fits, order[found], -1)

    def engaged(self, moment: int) -> sparse.csr_array:
        """(U, C of the catalog) recency-weighted engagement."""
        shape = (len(self.user_ids), len(self.catalog.ids))
        return _sparse(self._signal_weights(moment), self.signals.user, self.signals.campaign, shape)

    def expressed(self, moment: int) -> sparse.csr_array:
        """(U, I) recency-weighted intents."""
        weights = self.intents.confidence * _decay(moment - self.intents.at, self.half_life_days)
        shape = (len(self.user_ids), len(self.catalog.intent_ids))
        return _sparse(weights, self.intents.user, self.intents.intent, shape)

    def profiles(self, moment: int) -> Matrix:
        """(U, D) unit vectors: recency-weighted sums of each user's newest messages; zero without any."""
        count = len(self.messages.at)
        order = np.lexsort((self.messages.at, self.messages.user))
        users = self.messages.user[order]
        newer = np.searchsorted(users, users, side="right") - 1 - np.arange(count)
        newest = order[newer < self.profile_messages]
        weights = _decay(moment - self.messages.at[newest], self.half_life_days)
        shape = (len(self.user_ids), count)
        return unit(_sparse(weights, self.messages.user[newest], newest, shape) @ self.messages.vectors)

    def _signal_weights(self, moment: int) -> Vector:
        fading = _decay(moment - self.signals.at, self.half_life_days)
        return (self.signals.strength * fading).astype(np.float32)


@dataclass(frozen=True)
class Snapshot:
    """What was known at a moment: of all campaigns, and of any users asked for."""

    moment: int
    campaigns: CampaignKnowledge
    columns: Whole
    """(C,) places of the candidates in the catalog."""
    _past: History
    _engaged: sparse.csr_array
    _expressed: sparse.csr_array
    _profiles: Matrix

    def users(self, places: Whole) -> UserKnowledge:
        """Knowledge of the users at these places of `History.user_ids`."""
        return _know_users(self, places)


def take_snapshot(history: History, moment: int, *, upcoming_ms: int = 0) -> Snapshot:
    """Draw the knowledge of `moment` from what lies before it.

    Candidates are the campaigns whose window holds the moment, or begins within `upcoming_ms`.
    O(signals + messages · D + walk steps · edges · C).
    """
    past = history.before(moment)
    catalog = past.catalog
    running = (catalog.active_from <= moment + upcoming_ms) & (moment < catalog.active_until)
    columns = np.flatnonzero(running)
    engaged, expressed = past.engaged(moment), past.expressed(moment)
    campaigns = _know_campaigns(past, moment, columns, engaged, expressed)
    return Snapshot(moment, campaigns, columns, past, engaged, expressed, past.profiles(moment))


def _know_campaigns(
    past: History, moment: int, columns: Whole, engaged: sparse.csr_array, expressed: sparse.csr_array
) -> CampaignKnowledge:
    catalog, signals = past.catalog, past.signals
    weights = past._signal_weights(moment)
    trend = np.stack(
        [
            np.bincount(
                signals.campaign,
                signals.strength * _decay(moment - signals.at, half_life),
                minlength=len(catalog.ids),
            )
            for half_life in TREND_HALF_LIVES_DAYS
        ],
        axis=1,
    )
    last_at = np.zeros(len(catalog.ids), dtype=np.int64)
    np.maximum.at(last_at, signals.campaign, signals.at)
    known = past.said_before >= 0
    shape = (len(catalog.ids), len(past.messages.at))
    said = _sparse(weights[known], signals.campaign[known], past.said_before[known], shape)
    strength = log_strength(engaged)
    hubs = np.flatnonzero(last_at > 0)
    return CampaignKnowledge(
        at=moment,
        ids=[catalog.ids[at] for at in columns],
        active_from=catalog.active_from[columns],
        active_until=catalog.active_until[columns],
        category=catalog.category[columns],
        intent_ids=catalog.intent_ids,
        engaged_ids=[catalog.ids[at] for at in hubs],
        engaged_category=catalog.category[hubs],
        targets=catalog.targets[:, columns],
        text=catalog.text[columns],
        audience=unit((said @ past.messages.vectors)[columns]),
        trend=trend[columns].astype(np.float32),
        users=np.diff(engaged.tocsc().indptr)[columns].astype(np.float32),
        last_at=last_at[columns],
        co_engagement=(unit_rows(strength)[:, hubs].T @ strength[:, columns]).toarray(),
        walk=_walks(expressed, engaged, catalog.targets, columns)[
            np.concatenate([np.arange(len(catalog.intent_ids)), len(catalog.intent_ids) + hubs])
        ],
    )


def _walks(expressed: sparse.csr_array, engaged: sparse.csr_array, targets: Matrix, columns: Whole) -> Matrix:
    """(I + all campaigns, C) personalised PageRank of the candidates from every intent and campaign.

    Solved for all starts at once, backwards from the candidates: x = (1 - a) e + a P x, by iteration.
    """
    strength = [log_strength(expressed), log_strength(engaged)]
    # Targets are facts of the catalog, as strong as the mean user's link.
    aimed = sparse.csr_array(targets)
    graph = sparse.block_array(
        [
            [None, strength[0], strength[1]],
            [strength[0].T, None, aimed],
            [strength[1].T, aimed.T, None],
        ],
        format="csr",
        dtype=np.float32,
    )
    out = np.asarray(graph.sum(axis=1), dtype=np.float32).ravel()
    steps = (sparse.diags_array(1 / np.maximum(out, 1e-12), dtype=np.float32) @ graph).tocsr()
    users = expressed.shape[0]
    walks = np.empty((graph.shape[0] - users, len(columns)), dtype=np.float32)
    for start in range(0, len(columns), _COLUMNS_AT_ONCE):  # independent of each other: bounds the memory
        some = columns[start : start + _COLUMNS_AT_ONCE]
        ends = np.zeros((graph.shape[0], len(some)), dtype=np.float32)
        ends[users + expressed.shape[1] + some, np.arange(len(some))] = 1 - WALK_CONTINUES
        walk = ends / (1 - WALK_CONTINUES)
        for _ in range(_WALK_STEPS):
            walk = ends + WALK_CONTINUES * (steps @ walk)
        walks[:, start : start + len(some)] = walk[users:]
    return walks


def _know_users(snapshot: Snapshot, places: Whole) -> UserKnowledge:
    past, columns = snapshot._past, snapshot.columns
    hubs_of = {campaign_id: at for at, campaign_id in enumerate(past.catalog.ids)}
    hubs = np.asarray([hubs_of[one] for one in snapshot.campaigns.engaged_ids], dtype=np.int64)
    engaged_columns = log_strength(snapshot._engaged[:, columns])
    profile = snapshot._profiles[places]
    scores, counts = [], []
    for start in range(0, len(places), _USERS_AT_ONCE):
        near = _nearest(profile[start : start + _USERS_AT_ONCE], places[start : start + _USERS_AT_ONCE], snapshot)
        scores.append((near @ engaged_columns).toarray())
        counts.append(((near > 0).astype(np.float32) @ (engaged_columns > 0).astype(np.float32)).toarray())
    empty = np.zeros((0, len(columns)), dtype=np.float32)
    return UserKnowledge(
        ids=[past.user_ids[at] for at in places],
        intents=snapshot._expressed[places],
        engaged=snapshot._engaged[places][:, hubs],
        profile=profile,
        interests=_interests(past, places, snapshot.moment),
        neighbours_engaged=np.concatenate([empty, *scores]).astype(np.float32),
        neighbours=np.concatenate([empty, *counts]).astype(np.float32),
        messages=np.bincount(past.messages.user, minlength=len(past.user_ids))[places].astype(np.float32),
    )


def _nearest(profiles: Matrix, places: Whole, snapshot: Snapshot) -> sparse.csr_array:
    """(B, U) cosine of the nearest other users, as many as the API asks for."""
    everyone = snapshot._profiles
    cosines = profiles @ everyone.T
    cosines[np.arange(len(places)), places] = -1  # never the user
    count = min(snapshot._past.neighbours, cosines.shape[1])
    nearest = np.argpartition(-cosines, max(count - 1, 0), axis=1)[:, :count]
    cosine = np.take_along_axis(cosines, nearest, axis=1)
    keep = cosine >= MIN_SIMILARITY
    rows = np.broadcast_to(np.arange(len(places))[:, None], nearest.shape)
    return _sparse(cosine[keep], rows[keep], nearest[keep], cosines.shape)


def _interests(past: History, places: Whole, moment: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(B, K, D) what each user talks about, from their newest messages."""
    messages = past.messages
    order = np.lexsort((messages.at, messages.user))
    users = messages.user[order]
    starts, ends = np.searchsorted(users, places), np.searchsorted(users, places, side="right")
    count = min(RECENT_MESSAGES, past.profile_messages)  # those that the pipeline has at hand
    found = np.zeros((len(places), INTERESTS_PER_USER, messages.vectors.shape[1]), dtype=np.float32)
    for at, (start, end) in enumerate(zip(starts, ends, strict=True)):
        newest = order[max(start, end - count) : end]
        kept = interests_of(messages.vectors[newest], _decay(moment - messages.at[newest], past.half_life_days))
        found[at, : len(kept)] = kept
    return found


def interests_of(vectors: Matrix, weights: Vector) -> Matrix:
    """Up to `INTERESTS_PER_USER` unit vectors, shape (k, D), of the topics of `vectors`, shape (n, D), heaviest first.

    Leader clustering (Hartigan 1975): a message joins the topic of the nearest earlier leader, or leads
    a new one. O(n · topics · D).
    """
    leaders: list[Vector] = []
    sums: list[Vector] = []
    mass: list[float] = []
    for vector, weight in zip(vectors, weights, strict=True):
        cosines = np.asarray(leaders) @ vector if leaders else np.zeros(0)
        nearest = int(cosines.argmax()) if leaders else -1
        if nearest >= 0 and cosines[nearest] >= INTEREST_COSINE:
            sums[nearest] = sums[nearest] + weight * vector
            mass[nearest] += float(weight)
        else:
            leaders.append(vector)
            sums.append(weight * vector)
            mass.append(float(weight))
    heaviest = sorted(range(len(mass)), key=lambda at: -mass[at])[:INTERESTS_PER_USER]
    return unit(np.asarray([sums[at] for at in heaviest], dtype=np.float32).reshape(-1, vectors.shape[1]))


def unit(vectors: Matrix) -> Matrix:
    """Rows scaled to length 1; rows of zeros stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-9), dtype=np.float32)


def signals_of_events(events: Iterable[tuple[int, int, str, int]]) -> Signals:
    """The clicks and conversions of events (user, campaign, kind, epoch milliseconds), which come by time. One pass."""
    users, campaigns, times = (array("q") for _ in range(3))
    strength = array("f")
    for user, campaign, kind, at in events:
        if kind in ENGAGEMENT_STRENGTH:
            users.append(user)
            campaigns.append(campaign)
            times.append(at)
            strength.append(ENGAGEMENT_STRENGTH[kind])
    return Signals(
        user=np.array(users, dtype=np.int64),
        campaign=np.array(campaigns, dtype=np.int64),
        at=np.array(times, dtype=np.int64),
        strength=np.array(strength, dtype=np.float32),
        is_event=np.ones(len(times), dtype=bool),
    )


def in_order(*parts: Signals) -> Signals:
    """All of them, by time."""
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    order = np.argsort(joined["at"], kind="stable")
    return Signals(**{name: column[order] for name, column in joined.items()})


def signals_of_messages(intents: Intents, catalog: CatalogArrays) -> Signals:
    """Messages that speak to a running campaign, each once a campaign: the weakest sign of engagement."""
    aimed = sparse.csr_array(catalog.targets)
    _, first, message = np.unique(intents.message, return_index=True, return_inverse=True)
    rows = sparse.csr_array(
        (np.ones(len(message), dtype=np.float32), (message, intents.intent)),
        shape=(len(first), len(catalog.intent_ids)),
    )
    pairs = (rows @ aimed).tocoo()
    said, campaign = first[pairs.row], np.asarray(pairs.col, dtype=np.int64)
    at = intents.at[said]
    runs = (catalog.active_from[campaign] <= at) & (at < catalog.active_until[campaign])
    count = int(runs.sum())
    return Signals(
        user=intents.user[said[runs]],
        campaign=campaign[runs],
        at=at[runs],
        strength=np.full(count, ENGAGEMENT_STRENGTH["mention"], dtype=np.float32),
        is_event=np.zeros(count, dtype=bool),
    )


def _decay(age_ms: Whole, half_life_days: float) -> Vector:
    """2^(-age / half-life)."""
    return np.asarray(np.exp2(-age_ms / (half_life_days * DAY_MS)), dtype=np.float32)


def _sparse(weights: Vector, rows: Whole, columns: Whole, shape: tuple[int, int]) -> sparse.csr_array:
    """Sum of the weights by row and column."""
    return sparse.csr_array((weights.astype(np.float32), (rows, columns)), shape=shape)
