"""Ranking: evidence to scored campaigns, each score the sum of its sources' shares."""

import math
from collections import defaultdict
from typing import Literal, NamedTuple

from personalization.recommend.candidates import Evidence
from personalization.stores.neo4j import CampaignRow

Source = Literal["own_intents", "similar_users", "popularity"]

WEIGHTS: dict[Source, float] = {"own_intents": 0.6, "similar_users": 0.25, "popularity": 0.15}
"""What each source may add to a score at most; they sum to 1."""

_HALF_LIFE_MS = 30 * 86_400_000


class Ranked(NamedTuple):
    """A campaign with what each source added to its score."""

    campaign: CampaignRow
    shares: dict[Source, float]

    @property
    def score(self) -> float:
        """Sum of the shares, from 0 to 1."""
        return round(sum(self.shares.values()), 4)


def rank(evidence: Evidence) -> list[Ranked]:
    """Active campaigns that the user's intents or similar users speak for, best first.

    Every source is scaled by its largest value, so that none drowns another by its unit.
    """
    ranked = _ranked(evidence, {"own_intents": _own(evidence), "similar_users": _similar(evidence)})
    return [one for one in ranked if one.shares]  # a share can round to nothing


def rank_popular(evidence: Evidence) -> list[Ranked]:
    """Active campaigns by engaged users: for a user nothing is known of."""
    return _ranked(evidence, {"popularity": {one["campaign_id"]: 0.0 for one in evidence.campaigns}})


def _ranked(evidence: Evidence, sources: dict[Source, dict[str, float]]) -> list[Ranked]:
    candidates = {campaign_id for scores in sources.values() for campaign_id in scores}
    sources = {**sources, "popularity": _popularity(evidence)}
    scaled = {source: _scaled(scores, WEIGHTS[source]) for source, scores in sources.items()}
    ranked = [
        Ranked(
            campaign,
            {
                source: shares[campaign["campaign_id"]]
                for source, shares in scaled.items()
                if shares.get(campaign["campaign_id"])
            },
        )
        for campaign in evidence.campaigns
        if campaign["campaign_id"] in candidates
    ]
    return sorted(ranked, key=lambda one: (-one.score, one.campaign["campaign_id"]))


def _own(evidence: Evidence) -> dict[str, float]:
    """How often, how clearly and how recently the user expressed the campaign's intents."""
    newest = max((row["last_seen"] for row in evidence.own_intents), default=0)
    scores: dict[str, float] = defaultdict(float)
    for row in evidence.own_intents:
        recency = 0.5 ** ((newest - row["last_seen"]) / _HALF_LIFE_MS)
        scores[row["campaign_id"]] += math.log1p(row["count"]) * max(row["confidence"], 0.0) * recency
    return scores


def _similar(evidence: Evidence) -> dict[str, float]:
    """How much users with a similar vector engaged with the campaign, by similarity."""
    similarity = {one["user_id"]: one["similarity"] for one in evidence.neighbours}
    scores: dict[str, float] = defaultdict(float)
    for row in evidence.neighbours_campaigns:
        scores[row["campaign_id"]] += similarity[row["user_id"]] * math.log1p(row["count"])
    return scores


def _popularity(evidence: Evidence) -> dict[str, float]:
    return {campaign_id: math.log1p(users) for campaign_id, users in evidence.engaged_users.items()}


def _scaled(scores: dict[str, float], weight: float) -> dict[str, float]:
    largest = max(scores.values(), default=0.0)
    return {key: round(weight * value / largest, 4) for key, value in scores.items()} if largest else {}
