"""Made-up knowledge, histories and stores for the tests of ranking; the same for the same seed."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from personalization.learning.history import (
    CatalogArrays,
    History,
    Intents,
    Messages,
    in_order,
    signals_of_events,
    signals_of_messages,
    unit,
)
from personalization.recommend.candidates import Known, Lookup, gather
from personalization.recommend.guard import Guard
from personalization.recommend.knowledge import ServedKnowledge
from personalization.recommend.ranking import LearnedRanker
from personalization.recommend.sources import CampaignKnowledge, UserKnowledge
from personalization.schemas import DAY_MS, INTERESTS_PER_USER, Campaign, Catalog, Intent, VectorSpace
from personalization.stores.analytics import ExpressedMessage, UserEvent, UserFacts
from personalization.stores.milvus import Neighbour
from personalization.stores.neo4j import EngagedRow, LinkRow
from scipy import sparse

NOW = 1_790_000_000_000
DIMS = 5


def vectors(rng: np.random.Generator, *shape: int) -> Any:
    """Unit vectors, some of them zero."""
    found = unit(rng.normal(size=(int(np.prod(shape[:-1])), shape[-1])))
    found[rng.random(len(found)) < 0.2] = 0
    return found.reshape(shape)


def sparse_weights(rng: np.random.Generator, rows: int, columns: int) -> sparse.csr_array:
    """Weights above 0, most of them missing."""
    dense = rng.exponential(2, size=(rows, columns)) * (rng.random((rows, columns)) < 0.4)
    return sparse.csr_array(dense.astype(np.float32))


def some_campaigns(rng: np.random.Generator, candidates: int, intents: int = 4, engaged: int = 5) -> CampaignKnowledge:
    """Of candidates `c0` …; some of those that were engaged with are none."""
    known = [f"c{at}" for at in range(candidates + 2)]
    hubs = sorted(rng.choice(known, size=min(engaged, len(known)), replace=False).tolist())
    active_from = np.where(rng.random(candidates) < 0.3, 0, NOW - rng.integers(0, 100 * DAY_MS, candidates))
    return CampaignKnowledge(
        at=NOW,
        ids=known[:candidates],
        active_from=active_from.astype(np.int64),
        active_until=np.full(candidates, NOW + DAY_MS, dtype=np.int64),
        category=rng.integers(0, 3, candidates),
        intent_ids=[f"i{at}" for at in range(intents)],
        engaged_ids=hubs,
        engaged_category=rng.integers(-1, 3, len(hubs)),
        targets=(rng.random((intents, candidates)) < 0.4).astype(np.float32),
        text=vectors(rng, candidates, DIMS),
        audience=vectors(rng, candidates, DIMS),
        trend=(rng.exponential(3, (candidates, 4)) * (rng.random((candidates, 1)) < 0.7)).astype(np.float32),
        users=rng.integers(0, 9, candidates).astype(np.float32),
        last_at=np.where(rng.random(candidates) < 0.3, 0, NOW - rng.integers(0, 40 * DAY_MS, candidates)),
        co_engagement=rng.exponential(1, (len(hubs), candidates)).astype(np.float32),
        walk=(rng.random((intents + len(hubs), candidates)) / 10).astype(np.float32),
    )


def some_users(rng: np.random.Generator, count: int, campaigns: CampaignKnowledge) -> UserKnowledge:
    """Users of whom more or less is known, of some nothing."""
    shape = (count, len(campaigns.ids))
    neighbours = rng.integers(0, 3, shape).astype(np.float32)
    interests = vectors(rng, count, INTERESTS_PER_USER, DIMS)
    interests[rng.random(count) < 0.3] = 0
    return UserKnowledge(
        ids=[f"u{at}" for at in range(count)],
        intents=sparse_weights(rng, count, len(campaigns.intent_ids)),
        engaged=sparse_weights(rng, count, len(campaigns.engaged_ids)),
        profile=vectors(rng, count, DIMS),
        interests=interests,
        neighbours_engaged=(neighbours * rng.random(shape)).astype(np.float32),
        neighbours=neighbours,
        messages=rng.integers(0, 30, count).astype(np.float32),
    )


def some_history(
    rng: np.random.Generator, users: int = 6, campaigns: int = 5, messages: int = 40, events: int = 40, days: int = 60
) -> History:
    """What users with a taste each said and did in the `days` before `NOW`."""
    count, topics = 3, unit(np.random.default_rng(1).normal(size=(3, DIMS)))
    intent_ids = [f"i{at}" for at in range(count)]
    kinds = [
        Campaign(
            id=f"c{at}",
            name=f"Campaign {at}",
            category=f"k{at % 2}",
            intents=sorted({intent_ids[at % count], *([intent_ids[0]] if at % 2 else [])}),
        )
        for at in range(campaigns)
    ]
    text = unit(topics[np.arange(campaigns) % count] + 0.3 * rng.normal(size=(campaigns, DIMS)))
    arrays = CatalogArrays.of(kinds, intent_ids, text)
    taste = rng.integers(count, size=users)
    start = NOW - days * DAY_MS
    said = np.sort(rng.integers(start, NOW, messages))
    speaker = rng.integers(users, size=messages)
    spoken = unit(topics[taste[speaker]] + 0.4 * rng.normal(size=(messages, DIMS)))
    # A message expresses nothing, one intent or two.
    expressed = [(at, (taste[speaker[at]] + more) % count) for at in range(messages) for more in range(rng.integers(3))]
    of_message, intent = (np.asarray(column, dtype=np.int64) for column in zip(*expressed, strict=True))
    intents = Intents(
        user=speaker[of_message],
        at=said[of_message],
        intent=intent,
        confidence=rng.uniform(0.3, 1, len(intent)).astype(np.float32),
        message=of_message,
    )
    happened = []
    for at in np.sort(rng.integers(start, NOW, events)).tolist():
        user = int(rng.integers(users))
        campaign = int(rng.choice([taste[user], rng.integers(campaigns)])) % campaigns
        kind = str(rng.choice(["impression", "click", "conversion", "dismiss"], p=[0.2, 0.5, 0.2, 0.1]))
        happened.append((user, campaign, kind, at))
    return History(
        [f"u{at}" for at in range(users)],
        arrays,
        Messages(speaker, said, spoken),
        intents,
        in_order(signals_of_events(happened), signals_of_messages(intents, arrays)),
    )


def catalog_of(campaigns: CampaignKnowledge, **changes: dict[str, Any]) -> Catalog:
    """A catalog that holds the candidates and what was engaged with; `changes` by campaign."""
    kept = sorted({*campaigns.ids, *campaigns.engaged_ids})
    kinds = [
        Campaign(
            id=one,
            name=f"Campaign {one}",
            category=f"k{campaigns.category[campaigns.ids.index(one)]}" if one in campaigns.ids else "gone",
            intents=[
                intent
                for at, intent in enumerate(campaigns.intent_ids)
                if one in campaigns.ids and campaigns.targets[at, campaigns.ids.index(one)]
            ],
            **changes.get(one, {}),
        )
        for one in kept
    ]
    intents = [Intent(id=one, name=f"Intent {one}", examples=[one]) for one in campaigns.intent_ids]
    return Catalog(intents=intents, campaigns=kinds)


def some_known(
    seed: int,
    candidates: int = 6,
    *,
    learned: LearnedRanker | None = None,
    silent: bool = False,
    catalog: Catalog | None = None,
) -> Known:
    """What is known of the user `ann`: nothing at all where she is `silent`."""
    rng = np.random.default_rng(seed)
    campaigns = some_campaigns(rng, candidates)
    served = ServedKnowledge(catalog or catalog_of(campaigns), campaigns, learned)
    return know(served, rng, silent=silent)


def know(served: ServedKnowledge, rng: np.random.Generator, *, silent: bool = False, now_ms: int = NOW) -> Known:
    """Gather, from stores that are made up."""
    stores: Any = _Stores(served, rng, silent)
    lookup = Lookup(stores, stores, stores, stores, Guard(5), neighbours=50, half_life_days=30)
    [known] = asyncio.run(gather(["ann"], now_ms, served=served, lookup=lookup))
    assert not known.missing
    return known


class _Stores:
    """All of them at once, as the API's readers see them."""

    def __init__(self, served: ServedKnowledge, rng: np.random.Generator, silent: bool) -> None:
        self._campaigns = served.campaigns
        self._rng = rng
        self._silent = silent

    async def user_vectors(self, space: VectorSpace, user_ids: Sequence[str]) -> dict[str, Any]:
        if self._silent:
            return {}
        return {
            # As a smaller model is padded.
            one: np.pad(unit(self._rng.normal(size=(1 + int(self._rng.integers(1, 5)), DIMS))), ((0, 0), (0, 3)))
            for one in user_ids
        }

    async def neighbours(self, space: VectorSpace, vectors: Any, limit: int) -> list[list[Neighbour]]:
        near = [self._rng.uniform(0.3, 1, int(self._rng.integers(0, 8))) for _ in vectors]
        return [[Neighbour(user_id=f"u{at}", similarity=float(one)) for at, one in enumerate(of)] for of in near]

    async def engaged_by(
        self, neighbours: Sequence[Sequence[Neighbour]], now_ms: int, half_life_days: float
    ) -> list[EngagedRow]:
        return [
            EngagedRow(at=at, campaign_id=one, score=float(self._rng.random()), users=int(self._rng.integers(1, 4)))
            for at in range(len(neighbours))
            for one in self._campaigns.ids
            if self._rng.random() < 0.5
        ]

    async def links(self, user_ids: Sequence[str]) -> list[LinkRow]:
        if self._silent:
            return []
        named = [("intent", one) for one in [*self._campaigns.intent_ids, "left"]]
        named += [("campaign", one) for one in self._campaigns.engaged_ids]
        return [
            LinkRow(
                user_id=user_id,
                kind=kind,
                id=one,
                name=one.title(),
                count=int(self._rng.integers(1, 9)),
                weight=float(self._rng.uniform(0.1, 9)),
                last_at=NOW - int(self._rng.integers(0, 50 * DAY_MS)),
            )
            for user_id in user_ids
            for kind, one in named
            if self._rng.random() < 0.6
        ]

    async def user_facts(self, user_ids: Sequence[str]) -> dict[str, UserFacts]:
        if self._silent:
            return {one: UserFacts(0, [], []) for one in user_ids}
        said = [ExpressedMessage(f"m{at}", f"i{at % 4}", NOW - at) for at in range(7)]
        return {one: UserFacts(7, [UserEvent("c0", "impression", NOW - DAY_MS)], said) for one in user_ids}

    async def pending_of(self, user_ids: Sequence[str], since_ms: int) -> dict[str, list[Any]]:
        return {}
