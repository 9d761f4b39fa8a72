"""The recommender: cache, evidence, ranking and explanation put together."""

import time
from dataclasses import dataclass

import structlog

from personalization.errors import StoreError
from personalization.recommend.candidates import gather_evidence
from personalization.recommend.explanation import explain
from personalization.recommend.ranking import rank, rank_popular
from personalization.schemas import Recommendation, Recommendations
from personalization.stores.analytics import AsyncAnalyticsReader
from personalization.stores.cache import AsyncCache
from personalization.stores.milvus import AsyncVectorReader
from personalization.stores.neo4j import AsyncGraphReader

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Recommender:
    """Answers which campaigns are worth showing to a user."""

    cache: AsyncCache
    vectors: AsyncVectorReader
    graph: AsyncGraphReader
    analytics: AsyncAnalyticsReader
    neighbours: int

    async def answer(self, user_id: str, top: int) -> bytes:
        """The answer as JSON, from the cache where it is fresh.

        Redis down makes it slower, not broken.

        Raises:
            StoreError: a store that holds the evidence does not answer.
        """
        try:
            generation = await self.cache.generation()
            cached = await self.cache.get(generation, user_id, top)
        except StoreError as error:
            log.warning("answering without the cache", problem=str(error))
            return (await self.recommend(user_id, top)).model_dump_json().encode()
        if cached is not None:
            return cached
        answer = (await self.recommend(user_id, top)).model_dump_json().encode()
        try:
            # Under the generation read before the evidence: data published meanwhile make another key.
            await self.cache.put(generation, user_id, top, answer)
        except StoreError as error:
            log.warning("the answer was not cached", problem=str(error))
        return answer

    async def recommend(self, user_id: str, top: int) -> Recommendations:
        """Up to `top` active campaigns; popular ones for a user nothing is known of."""
        evidence = await gather_evidence(
            user_id,
            time.time_ns() // 1_000_000,
            neighbours=self.neighbours,
            vectors=self.vectors,
            graph=self.graph,
            analytics=self.analytics,
        )
        personal = rank(evidence)
        ranked = (personal or rank_popular(evidence))[:top]
        return Recommendations(
            user_id=user_id,
            strategy="personalized" if personal else "popular",
            recommendations=[
                Recommendation(**one.campaign, score=one.score, reasons=explain(one, evidence)) for one in ranked
            ],
        )
