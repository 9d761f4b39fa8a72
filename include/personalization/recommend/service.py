"""The recommender: cache, evidence, ranking, rules and explanation put together."""

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import structlog

from personalization.errors import StoreError
from personalization.recommend.candidates import Known, gather
from personalization.recommend.explanation import reasons
from personalization.recommend.exploration import arm, explore
from personalization.recommend.knowledge import ServedKnowledge
from personalization.recommend.ranking import NAMED_RANKERS, Ranker
from personalization.recommend.rules import arrange, exclusions
from personalization.schemas import Recommendation, Recommendations, Source
from personalization.settings import Settings
from personalization.stores.analytics import AsyncAnalyticsReader
from personalization.stores.cache import AsyncCache
from personalization.stores.milvus import AsyncVectorReader
from personalization.stores.neo4j import AsyncGraphReader

_UNSURE_S = 30.0
"""How long knowledge is trusted while Redis cannot say which generation is served."""

log = structlog.get_logger(__name__)


@dataclass
class Recommender:
    """Answers which campaigns are worth showing to a user."""

    cache: AsyncCache
    vectors: AsyncVectorReader
    graph: AsyncGraphReader
    analytics: AsyncAnalyticsReader
    settings: Settings
    _served: ServedKnowledge | None = field(default=None, init=False)
    _generation: int | None = field(default=None, init=False)
    _read_at: float = field(default=0.0, init=False)
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def answer(self, user_id: str, top: int, *, explain: bool = False) -> bytes:
        """The answer as JSON, from the cache where it is fresh.

        Redis down makes it slower, not broken.

        Raises:
            StoreError: a store that holds the evidence does not answer, or nothing was published yet.
        """
        try:
            generation = await self.cache.generation()
            cached = await self.cache.get(generation, user_id, top, explain=explain)
        except StoreError as error:
            log.warning("answering without the cache", problem=str(error))
            return (await self.recommend(user_id, top, explain=explain)).model_dump_json(exclude_none=True).encode()
        if cached is not None:
            return cached
        found = await self.recommend(user_id, top, explain=explain, generation=generation)
        answer = found.model_dump_json(exclude_none=True).encode()
        try:
            # Under the generation read before the evidence: data published meanwhile make another key.
            await self.cache.put(generation, user_id, top, answer, explain=explain)
        except StoreError as error:
            log.warning("the answer was not cached", problem=str(error))
        return answer

    async def recommend(
        self, user_id: str, top: int, *, explain: bool = False, generation: int | None = None
    ) -> Recommendations:
        """Up to `top` campaigns that may be shown; popular ones for a user nothing is known of."""
        now_ms = time.time_ns() // 1_000_000
        known = await gather(
            user_id,
            now_ms,
            served=await self._knowledge(generation),
            neighbours=self.settings.neighbours,
            half_life_days=self.settings.profile_half_life_days,
            vectors=self.vectors,
            graph=self.graph,
            analytics=self.analytics,
        )
        return decide(known, top, now_ms, self.settings, explain=explain)

    async def _knowledge(self, generation: int | None) -> ServedKnowledge:
        """What is served, read again only for another generation; by one caller where many ask at once."""
        if self._served is not None and self._is_current(generation):
            return self._served
        async with self._reading:
            if self._served is None or not self._is_current(generation):
                content = await self.analytics.served()
                self._served = await asyncio.to_thread(ServedKnowledge.from_bytes, content)
                self._generation, self._read_at = generation, time.monotonic()
            return self._served

    def _is_current(self, generation: int | None) -> bool:
        if generation is None:
            return time.monotonic() - self._read_at < _UNSURE_S
        return generation == self._generation


def decide(known: Known, top: int, now_ms: int, settings: Settings, *, explain: bool) -> Recommendations:
    """Rank, apply the catalog's rules, explore, explain. No store is asked."""
    ranker = _ranker(known, settings)
    catalog = known.served.catalog
    campaigns = [known.served.campaign_of[one] for one in known.campaigns.ids]
    boosts = np.asarray([one.boost for one in campaigns], dtype=np.float32)
    scores = ranker.score(known.evidence)[0] * boosts
    # Who asks why is told of those that ended, too.
    asked = catalog.campaigns if explain else campaigns
    held_back = exclusions(asked, known.viewer, now_ms)
    out = {one.campaign_id for one in held_back}
    order = sorted(range(len(campaigns)), key=lambda at: (-scores[at], campaigns[at].id))
    ranked = [campaigns[at] for at in order if campaigns[at].id not in out]
    arranged = arrange(ranked, catalog.rules, top)
    epoch = datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%G-%V")
    shown, propensities = explore(
        [*arranged.campaign_ids, *arranged.spare],
        top,
        user_id=known.viewer.user_id,
        epoch=epoch,
        share=settings.exploration_share,
    )
    columns = np.asarray([known.column(one) for one in shown], dtype=np.int64)
    # Only what is shown is split into shares: that costs far more than the scores of all.
    names, shares = ranker.shares(known.evidence, columns)
    given = shares[0] * (boosts / np.maximum(scores, 1))[columns, None]  # a boost lifts nothing above certainty
    found = []
    for place, (campaign_id, propensity) in enumerate(zip(shown, propensities, strict=True), start=1):
        campaign = known.served.campaign_of[campaign_id]
        parts: dict[Source, float] = dict(zip(names, map(float, given[place - 1]), strict=True))
        told = reasons(known, campaign_id, parts, with_data=explain)
        found.append(
            Recommendation(
                campaign_id=campaign_id,
                name=campaign.name,
                description=campaign.description,
                category=campaign.category,
                score=round(sum(one.share for one in told), 4),
                position=place,
                propensity=float(f"{propensity:.6g}"),  # never 0, which no event may carry
                reasons=told,
            )
        )
    return Recommendations(
        user_id=known.viewer.user_id,
        strategy="personalized" if known.is_personal else "popular",
        policy=ranker.version,
        recommendations=found,
        excluded=[*held_back, *arranged.excluded] if explain else None,
    )


def _ranker(known: Known, settings: Settings) -> Ranker:
    """By the switch `RANKER`; a user of the experiment's share gets its ranker instead."""
    name = settings.ranker
    if settings.experiment_ranker and arm(known.viewer.user_id, settings.experiment_name, settings.experiment_share):
        name = settings.experiment_ranker
    if name == "auto":
        return known.served.learned or NAMED_RANKERS[known.served.fusion]
    return NAMED_RANKERS[name]
