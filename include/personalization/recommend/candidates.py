"""Candidates: what the stores know of one user, in the shape that the sources score."""

import asyncio
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from personalization.recommend.knowledge import ServedKnowledge
from personalization.recommend.ranking import Evidence
from personalization.recommend.rules import PastEvent, Viewer
from personalization.recommend.sources import CampaignKnowledge, Matrix, UserKnowledge, Vector
from personalization.schemas import DAY_MS
from personalization.stores.analytics import AsyncAnalyticsReader, ExpressedMessage
from personalization.stores.milvus import AsyncVectorReader, Neighbour
from personalization.stores.neo4j import AsyncGraphReader, EngagedRow, LinkRow

MIN_SIMILARITY = 0.5
"""Least cosine between two users' vectors for one to speak for the other."""


@dataclass(frozen=True)
class Known:
    """All that is known about one user, beside what is served to all."""

    served: ServedKnowledge
    campaigns: CampaignKnowledge
    """Of those that run now."""
    users: UserKnowledge
    viewer: Viewer
    expressed: list[LinkRow]
    engaged: list[LinkRow]
    neighbours: list[Neighbour]
    messages: list[ExpressedMessage]
    """The newest that express an intent."""

    @cached_property
    def evidence(self) -> Evidence:
        """What every source says."""
        return Evidence.of(self.campaigns, self.users)

    @property
    def is_personal(self) -> bool:
        """Whether anything is known of the user at all."""
        return bool(self.expressed or self.engaged or self.has_spoken)

    @property
    def has_spoken(self) -> bool:
        """Whether any message of the user is known."""
        return bool(self.users.messages[0])

    def column(self, campaign_id: str) -> int:
        """Place of the campaign among the candidates."""
        return self._columns[campaign_id]

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {campaign_id: at for at, campaign_id in enumerate(self.campaigns.ids)}


async def gather(
    user_id: str,
    now_ms: int,
    *,
    served: ServedKnowledge,
    neighbours: int,
    half_life_days: float,
    vectors: AsyncVectorReader,
    graph: AsyncGraphReader,
    analytics: AsyncAnalyticsReader,
) -> Known:
    """Ask the stores, in parallel where the data allow it.

    A constant number of round trips for any user: two to Milvus, two to Neo4j, one to analytics. Bytes grow
    with the user's links and events and with the candidates, not with `neighbours`.
    """

    async def near() -> tuple[Matrix, list[Neighbour], list[EngagedRow]]:
        own = await vectors.user_vectors(user_id)
        similar = await vectors.neighbours(user_id, own[0], neighbours) if len(own) else []
        similar = [one for one in similar if one["similarity"] >= MIN_SIMILARITY]
        engaged = await graph.engaged_by(similar, now_ms, half_life_days) if similar else []
        return own, similar, engaged

    (own, similar, neighbours_engaged), links, facts = await asyncio.gather(
        near(), graph.links(user_id), analytics.user_facts(user_id)
    )
    campaigns = served.running(now_ms)
    expressed = [one for one in links if one["kind"] == "intent" and one["id"] in served.intent_names]
    engaged = [one for one in links if one["kind"] == "campaign"]
    dims = campaigns.text.shape[1]
    own = own[:, :dims] if len(own) else np.zeros((1, dims), dtype=np.float32)
    users = UserKnowledge(
        ids=[user_id],
        intents=_row(expressed, campaigns.intent_ids, now_ms, half_life_days),
        engaged=_row(engaged, campaigns.engaged_ids, now_ms, half_life_days),
        profile=own[:1],
        interests=own[None, 1:] if len(own) > 1 else np.zeros((1, 1, dims), dtype=np.float32),
        neighbours_engaged=_over(campaigns.ids, {one["campaign_id"]: one["score"] for one in neighbours_engaged}),
        neighbours=_over(campaigns.ids, {one["campaign_id"]: one["users"] for one in neighbours_engaged}),
        messages=np.asarray([facts.messages], dtype=np.float32),
    )
    viewer = Viewer(
        user_id,
        frozenset(one["id"] for one in expressed),
        [PastEvent(*one) for one in facts.events],
    )
    return Known(served, campaigns, users, viewer, expressed, engaged, similar, facts.expressed)


def _row(links: list[LinkRow], ids: list[str], now_ms: int, half_life_days: float) -> sparse.csr_array:
    """(1, ids) the links' weights, as they have faded by now."""
    place = {one: at for at, one in enumerate(ids)}
    known = [one for one in links if one["id"] in place]
    ages = np.asarray([max(now_ms - one["last_at"], 0) for one in known], dtype=np.float64)
    weights = np.asarray([one["weight"] for one in known]) * np.exp2(-ages / (half_life_days * DAY_MS))
    columns = np.asarray([place[one["id"]] for one in known], dtype=np.int64)
    return sparse.csr_array(
        (weights.astype(np.float32), (np.zeros(len(known), dtype=np.int64), columns)), shape=(1, len(ids))
    )


def _over(ids: list[str], values: dict[str, float]) -> Matrix:
    row: Vector = np.asarray([values.get(one, 0) for one in ids], dtype=np.float32)
    return row[None, :]
