"""Explanation: the evidence behind a recommendation, in plain words."""

from datetime import UTC, datetime

from personalization.recommend.candidates import Evidence
from personalization.recommend.ranking import Ranked, Source
from personalization.schemas import Reason


def explain(ranked: Ranked, evidence: Evidence) -> list[Reason]:
    """One reason a source, the weightiest first."""
    campaign_id = ranked.campaign["campaign_id"]
    words = {"own_intents": _own_intents, "similar_users": _similar_users, "popularity": _popularity}
    shares: list[tuple[Source, float]] = sorted(ranked.shares.items(), key=lambda one: -one[1])
    return [Reason(source=source, text=words[source](campaign_id, evidence), share=share) for source, share in shares]


def _own_intents(campaign_id: str, evidence: Evidence) -> str:
    rows = [row for row in evidence.own_intents if row["campaign_id"] == campaign_id]
    rows.sort(key=lambda row: (-row["count"], row["intent_name"]))
    last_seen = datetime.fromtimestamp(max(row["last_seen"] for row in rows) / 1000, UTC)
    topics = ", ".join(f"“{row['intent_name']}” ({row['count']}×)" for row in rows)
    return f"expressed {topics}, last on {last_seen.day} {last_seen:%b %Y}"


def _similar_users(campaign_id: str, evidence: Evidence) -> str:
    users = {row["user_id"] for row in evidence.neighbours_campaigns if row["campaign_id"] == campaign_id}
    return f"{len(users)} of {len(evidence.neighbours)} similar users engaged with it"


def _popularity(campaign_id: str, evidence: Evidence) -> str:
    return f"{evidence.engaged_users[campaign_id]:,} users in all engaged with it"
