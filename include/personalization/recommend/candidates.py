"""Candidates: what the stores know that speaks for a campaign."""

import asyncio
from dataclasses import dataclass

from personalization.stores.analytics import AsyncAnalyticsReader
from personalization.stores.milvus import AsyncVectorReader, Neighbour
from personalization.stores.neo4j import AsyncGraphReader, CampaignRow, NeighbourCampaignRow, OwnIntentRow

MIN_SIMILARITY = 0.5
"""Least cosine between two users' vectors for one to speak for the other."""


@dataclass(frozen=True)
class Evidence:
    """All that is known about a user and the campaigns that are active now."""

    campaigns: list[CampaignRow]
    own_intents: list[OwnIntentRow]
    neighbours: list[Neighbour]
    neighbours_campaigns: list[NeighbourCampaignRow]
    engaged_users: dict[str, int]
    """Number of users engaged with each campaign."""


async def gather_evidence(
    user_id: str,
    now_ms: int,
    *,
    neighbours: int,
    vectors: AsyncVectorReader,
    graph: AsyncGraphReader,
    analytics: AsyncAnalyticsReader,
) -> Evidence:
    """Ask the stores, in parallel where the data allow it.

    A constant number of round trips for any user: two to Milvus, three to Neo4j, one to analytics.
    Bytes grow with the active campaigns and with `neighbours`.
    """
    similar, campaigns, own_intents, engaged_users = await asyncio.gather(
        vectors.neighbours(user_id, neighbours),
        graph.active_campaigns(now_ms),
        graph.own_intents(user_id, now_ms),
        analytics.campaign_users(),
    )
    near = [one for one in similar if one["similarity"] >= MIN_SIMILARITY]
    neighbours_campaigns = await graph.neighbours_campaigns([one["user_id"] for one in near], now_ms) if near else []
    return Evidence(campaigns, own_intents, near, neighbours_campaigns, engaged_users)
