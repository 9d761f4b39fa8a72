"""Explanation: the evidence behind a recommendation, in plain words and as data."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from personalization.recommend.candidates import Known
from personalization.schemas import Reason, Source

_SHOWN = 3
_MESSAGES_SHOWN = 5


@dataclass(frozen=True)
class Fact:
    """What a source has to say, in words and as data."""

    text: str
    data: dict[str, Any]


def reasons(known: Known, campaign_id: str, shares: dict[Source, float], *, with_data: bool) -> list[Reason]:
    """A reason for each source that gave something, the weightiest first; their shares add up to the score.

    What would show as nothing is added to the weightiest.
    """
    kept = {source: round(share, 4) for source, share in shares.items() if round(share, 4) > 0}
    ordered = sorted(kept.items(), key=lambda one: (-one[1], one[0]))
    told = []
    for source, share in ordered:
        fact = _FACTS[source](known, campaign_id)
        told.append(Reason(source=source, text=fact.text, share=share, data=fact.data if with_data else None))
    return told


def _own_intents(known: Known, campaign_id: str) -> Fact:
    targets = set(known.served.campaign_of[campaign_id].intents)
    links = sorted((one for one in known.expressed if one["id"] in targets), key=lambda one: -one["weight"])
    if not links:
        return Fact("its topics are not among those the user speaks of", {"intents": []})
    topics = ", ".join(f"“{known.served.intent_names[one['id']]}” ({one['count']}×)" for one in links[:_SHOWN])
    newest = max(one["last_at"] for one in links)
    messages = [one for one in known.messages if one.intent_id in targets][:_MESSAGES_SHOWN]
    return Fact(
        f"expressed {topics}, last on {_day(newest)}",
        {
            "intents": [{"intent_id": one["id"], "count": one["count"], "last_seen": one["last_at"]} for one in links],
            "message_ids": [one.message_id for one in messages],
            "path": [f"User {known.users.ids[0]}", f"Intent {links[0]['id']}", f"Campaign {campaign_id}"],
        },
    )


def _own_engagement(known: Known, campaign_id: str) -> Fact:
    link = next((one for one in known.engaged if one["id"] == campaign_id), None)
    category = known.served.campaign_of[campaign_id].category
    if link is None:
        return Fact(f"engages with {category} campaigns", {"count": 0, "category": category})
    return Fact(
        f"engaged with it {link['count']}×, last on {_day(link['last_at'])}",
        {"count": link["count"], "last_at": link["last_at"], "category": category},
    )


def _similar_users(known: Known, campaign_id: str) -> Fact:
    engaged = int(known.users.neighbours[0, known.column(campaign_id)])
    return Fact(
        f"{engaged} of {len(known.neighbours)} similar users engaged with it",
        {"similar_users": len(known.neighbours), "engaged": engaged},
    )


def _co_engagement(known: Known, campaign_id: str) -> Fact:
    return _by_links(known, campaign_id, "users who engaged with {names} engaged with it, too")


def _graph_walk(known: Known, campaign_id: str) -> Fact:
    return _by_links(known, campaign_id, "is close in the graph to {names}")


def _by_links(known: Known, campaign_id: str, words: str) -> Fact:
    links = [*known.engaged, *known.expressed]
    links = sorted((one for one in links if one["id"] != campaign_id), key=lambda one: -one["weight"])[:_SHOWN]
    names = ", ".join(f"“{one['name']}”" for one in links) or "what is popular"
    return Fact(words.format(names=names), {"from": [one["id"] for one in links]})


def _message_similarity(known: Known, campaign_id: str) -> Fact:
    cosine = float(known.evidence.sources["message_similarity"][0, known.column(campaign_id)])
    return Fact(
        "its text is near to what the user talks about",
        {"cosine": round(cosine, 3), "message_ids": [one.message_id for one in known.messages[:_MESSAGES_SHOWN]]},
    )


def _audience_similarity(known: Known, campaign_id: str) -> Fact:
    cosine = float(known.evidence.sources["audience_similarity"][0, known.column(campaign_id)])
    return Fact("talks like those who engage with it", {"cosine": round(cosine, 3)})


def _popularity(known: Known, campaign_id: str) -> Fact:
    users = int(known.served.campaigns.users[known.column(campaign_id)])
    words = "nobody has engaged with it yet" if not users else f"{users:,} users in all engaged with it"
    return Fact(words, {"users": users})


def _recency(known: Known, campaign_id: str) -> Fact:
    last_at = int(known.served.campaigns.last_at[known.column(campaign_id)])
    if not last_at:
        return Fact("is new", {"last_engagement": None})
    return Fact(f"someone engaged with it on {_day(last_at)}", {"last_engagement": last_at})


_FACTS: dict[Source, Callable[[Known, str], Fact]] = {
    "own_intents": _own_intents,
    "own_engagement": _own_engagement,
    "similar_users": _similar_users,
    "co_engagement": _co_engagement,
    "graph_walk": _graph_walk,
    "message_similarity": _message_similarity,
    "audience_similarity": _audience_similarity,
    "popularity": _popularity,
    "recency": _recency,
}


def _day(moment_ms: int) -> str:
    moment = datetime.fromtimestamp(moment_ms / 1000, UTC)
    return f"{moment.day} {moment:%b %Y}"
