"""Candidates: what the stores know of some users, in the shape that the sources score."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from scipy import sparse

from personalization.errors import StoreError
from personalization.recommend.guard import Guard
from personalization.recommend.knowledge import ServedKnowledge
from personalization.recommend.ranking import Evidence
from personalization.recommend.rules import PastEvent, Viewer
from personalization.recommend.sources import CampaignKnowledge, UserKnowledge
from personalization.schemas import DAY_MS, INTERESTS_PER_USER, Source, VectorSpace
from personalization.stores.analytics import AsyncAnalyticsReader, ExpressedMessage, UserFacts
from personalization.stores.milvus import AsyncVectorReader, Neighbour, Vectors
from personalization.stores.mongo import AsyncEventStore, PastEventRow
from personalization.stores.neo4j import AsyncGraphReader, EngagedRow, LinkRow

MIN_SIMILARITY = 0.5
"""Least cosine between two users' vectors for one to speak for the other."""

_LONGEST_RUN_MS = DAY_MS
"""Events received this long before the served knowledge was learned may not be in SQL yet."""

T = TypeVar("T")


@dataclass(frozen=True)
class Known:
    """All that is known about one user, beside what is served to all."""

    served: ServedKnowledge
    campaigns: CampaignKnowledge
    """Of those that run now."""
    together: Evidence
    """What every source says of them, for all users that were asked about at once."""
    at: int
    """This user's place there."""
    viewer: Viewer
    expressed: list[LinkRow]
    engaged: list[LinkRow]
    neighbours: list[Neighbour]
    messages: list[ExpressedMessage]
    """The newest that express an intent."""
    message_count: int
    missing: frozenset[str] = frozenset()
    """Stores that could not be asked."""

    @property
    def is_personal(self) -> bool:
        """Whether anything is known of the user at all."""
        return bool(self.expressed or self.engaged or self.has_spoken)

    @property
    def has_spoken(self) -> bool:
        """Whether any message of the user is known."""
        return bool(self.message_count)

    @property
    def evidence(self) -> Evidence:
        """What every source says of the campaigns for this user, (1, C) each; views."""
        return self.together.rows([self.at])

    def says(self, source: Source, campaign_id: str) -> float:
        """Score of a source for the campaign."""
        return float(self.together.sources[source][self.at, self.campaigns.column[campaign_id]])

    def neighbours_engaged(self, campaign_id: str) -> int:
        """How many similar users engaged with the campaign."""
        return int(self.together.context["neighbours"][self.at, self.campaigns.column[campaign_id]])


@dataclass(frozen=True)
class Lookup:
    """Whom to ask about users, and how far."""

    vectors: AsyncVectorReader
    graph: AsyncGraphReader
    analytics: AsyncAnalyticsReader
    events: AsyncEventStore
    guard: Guard
    neighbours: int
    """Similar users that are asked for campaigns."""
    half_life_days: float


@dataclass(frozen=True)
class _Found:
    """What the stores say of one user, as they say it."""

    user_id: str
    vectors: Vectors
    """(1 + k, dim) the user's and those of their interests; no row for one who said nothing."""
    links: list[LinkRow]
    facts: UserFacts
    pending: list[PastEventRow]
    """Events that no run has rolled up yet."""


async def gather(user_ids: Sequence[str], now_ms: int, *, served: ServedKnowledge, lookup: Lookup) -> list[Known]:
    """Ask the stores about different users, in parallel where the data allow it.

    A constant number of round trips for any number of users: three to Milvus, two to Neo4j, one to analytics, two to
    MongoDB. Bytes grow with the users' links and events and with the candidates, not with `neighbours`. A store that
    cannot be asked is left out and named.
    """
    missing: set[str] = set()
    since_ms = served.campaigns.at - _LONGEST_RUN_MS
    no_links: list[LinkRow] = []
    no_events: dict[str, list[PastEventRow]] = {}
    no_facts: dict[str, UserFacts] = {}

    async def near() -> tuple[dict[str, Vectors], list[list[Neighbour]], list[EngagedRow]]:
        nothing: dict[str, Vectors] = {}
        look = partial(lookup.vectors.user_vectors, served.space, user_ids)
        own = await _partly(lookup.guard, "milvus", look, nothing, missing)
        vectors = [own.get(one) for one in user_ids]
        similar, engaged = await _near(vectors, user_ids, now_ms, served.space, lookup, missing)
        return own, similar, engaged

    (own, similar, neighbours_engaged), links, facts, pending = await asyncio.gather(
        near(),
        _partly(lookup.guard, "neo4j", partial(lookup.graph.links, user_ids), no_links, missing),
        _partly(lookup.guard, "analytics", partial(lookup.analytics.user_facts, user_ids), no_facts, missing),
        _partly(lookup.guard, "mongodb", partial(lookup.events.pending_of, user_ids, since_ms), no_events, missing),
    )
    links_of: dict[str, list[LinkRow]] = {one: [] for one in user_ids}
    for link in links:
        links_of[link["user_id"]].append(link)
    nothing = np.zeros((0, 0), dtype=np.float32)
    found = [
        _Found(
            one,
            own.get(one, nothing),
            links_of[one],
            # Who has a vector has spoken, even where SQL cannot say so.
            facts.get(one) or UserFacts(int(one in own), [], []),
            pending.get(one, []),
        )
        for one in user_ids
    ]
    # In a thread: who only waits for Redis need not wait for this.
    return await asyncio.to_thread(
        _known, found, similar, neighbours_engaged, now_ms, served, lookup.half_life_days, frozenset(missing)
    )


async def imagine(
    vector: Vectors,
    expressed: Sequence[tuple[str, float]],
    now_ms: int,
    *,
    served: ServedKnowledge,
    lookup: Lookup,
) -> Known:
    """What would be known of a new user who says one message now: its vector (1, dim) and intents with confidence.

    One round trip to Milvus, one to Neo4j.
    """
    missing: set[str] = set()
    links = [
        LinkRow(
            user_id="",
            kind="intent",
            id=intent_id,
            name=served.intent_names[intent_id],
            count=1,
            weight=confidence,
            last_at=now_ms,
        )
        for intent_id, confidence in expressed
    ]
    both = np.concatenate([vector, vector])  # all they said, and what they talk about
    similar, engaged = await _near([both], [""], now_ms, served.space, lookup, missing)
    found = _Found("", both, links, UserFacts(1, [], []), [])
    [known] = await asyncio.to_thread(
        _known, [found], similar, engaged, now_ms, served, lookup.half_life_days, frozenset(missing)
    )
    return known


async def _near(
    vectors: Sequence[Vectors | None],
    user_ids: Sequence[str],
    now_ms: int,
    space: VectorSpace,
    lookup: Lookup,
    missing: set[str],
) -> tuple[list[list[Neighbour]], list[EngagedRow]]:
    """Similar users of each, never the user, and what they engaged with."""
    similar: list[list[Neighbour]] = [[] for _ in user_ids]
    asking = [at for at, one in enumerate(vectors) if one is not None and len(one)]
    if asking and lookup.neighbours:
        profiles = np.stack([vectors[at][0] for at in asking])  # type: ignore[index]
        nobody: list[list[Neighbour]] = [[] for _ in asking]
        # One more than wanted instead of a filter: filtered HNSW returns too few hits.
        search = partial(lookup.vectors.neighbours, space, profiles, lookup.neighbours + 1)
        hits = await _partly(lookup.guard, "milvus", search, nobody, missing)
        for at, found in zip(asking, hits, strict=True):
            others = [one for one in found if one["user_id"] != user_ids[at] and one["similarity"] >= MIN_SIMILARITY]
            similar[at] = others[: lookup.neighbours]
    engaged: list[EngagedRow] = []
    if any(similar):
        look = partial(lookup.graph.engaged_by, similar, now_ms, lookup.half_life_days)
        engaged = await _partly(lookup.guard, "neo4j", look, engaged, missing)
    return similar, engaged


async def _partly(guard: Guard, store: str, ask: Callable[[], Awaitable[T]], otherwise: T, missing: set[str]) -> T:
    """What the store says; `otherwise` where it cannot be asked, which is noted."""
    try:
        return await guard.call(store, ask)
    except StoreError:
        missing.add(store)
        return otherwise


def _known(
    found: Sequence[_Found],
    similar: Sequence[list[Neighbour]],
    neighbours_engaged: Sequence[EngagedRow],
    now_ms: int,
    served: ServedKnowledge,
    half_life_days: float,
    missing: frozenset[str],
) -> list[Known]:
    campaigns = served.running(now_ms)
    expressed = [
        [one for one in user.links if one["kind"] == "intent" and one["id"] in served.intent_names] for user in found
    ]
    engaged = [[one for one in user.links if one["kind"] == "campaign"] for user in found]
    dims = campaigns.text.shape[1]
    profile = np.zeros((len(found), dims), dtype=np.float32)
    interests = np.zeros((len(found), INTERESTS_PER_USER, dims), dtype=np.float32)
    for at, user in enumerate(found):
        if len(user.vectors):
            profile[at] = user.vectors[0, :dims]
            interests[at, : len(user.vectors) - 1] = user.vectors[1:, :dims]
    column = campaigns.column
    scores = np.zeros((2, len(found), len(column)), dtype=np.float32)
    for row in neighbours_engaged:
        if (place := column.get(row["campaign_id"])) is not None:
            scores[:, row["at"], place] = row["score"], row["users"]
    users = UserKnowledge(
        ids=[one.user_id for one in found],
        intents=_weights(expressed, campaigns.intent_ids, now_ms, half_life_days),
        engaged=_weights(engaged, campaigns.engaged_ids, now_ms, half_life_days),
        profile=profile,
        interests=interests,
        neighbours_engaged=scores[0],
        neighbours=scores[1],
        messages=np.asarray([one.facts.messages for one in found], dtype=np.float32),
    )
    evidence = Evidence.of(campaigns, users)
    return [
        Known(
            served,
            campaigns,
            evidence,
            at,
            Viewer(user.user_id, frozenset(one["id"] for one in expressed[at]), _events(user), "neo4j" not in missing),
            expressed[at],
            engaged[at],
            similar[at],
            user.facts.expressed,
            user.facts.messages,
            missing,
        )
        for at, user in enumerate(found)
    ]


def _events(user: _Found) -> list[PastEvent]:
    """Those of SQL and those no run has rolled up yet, each once though it may be among both."""
    rolled_up = (PastEvent(*one) for one in user.facts.events)
    return list({*rolled_up, *(PastEvent(*one) for one in user.pending)})


def _weights(
    links: Sequence[Sequence[LinkRow]], ids: list[str], now_ms: int, half_life_days: float
) -> sparse.csr_array:
    """(users, ids) the links' weights, as they have faded by now."""
    place = {one: at for at, one in enumerate(ids)}
    known = [(at, one) for at, of_user in enumerate(links) for one in of_user if one["id"] in place]
    ages = np.asarray([max(now_ms - one["last_at"], 0) for _, one in known], dtype=np.float64)
    weights = np.asarray([one["weight"] for _, one in known]) * np.exp2(-ages / (half_life_days * DAY_MS))
    rows = np.asarray([at for at, _ in known], dtype=np.int64)
    columns = np.asarray([place[one["id"]] for _, one in known], dtype=np.int64)
    return sparse.csr_array((weights.astype(np.float32), (rows, columns)), shape=(len(links), len(ids)))
