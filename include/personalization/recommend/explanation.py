"""Explanation: the evidence behind a recommendation, in plain words and as data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from personalization.recommend.candidates import Known
from personalization.schemas import Reason, Source
from personalization.stores.neo4j import LinkRow

_DIGITS = 4
_SHOWN = 3
_MESSAGES_SHOWN = 5
_UNTRIED = "nobody has engaged with it yet"
_SILENT = "nothing is known yet of what the user talks about"


@dataclass(frozen=True)
class Fact:
    """What a source has to say, in words and as data."""

    text: str
    data: dict[str, Any]


def reasons(known: Known, campaign_id: str, shares: dict[Source, float], *, with_data: bool) -> list[Reason]:
    """A reason for each source that gave something, the weightiest first; their shares add up to the score."""
    kept = {source: share for source, share in _rounded(shares).items() if share > 0}
    ordered = sorted(kept.items(), key=lambda one: (-one[1], one[0]))
    told = []
    for source, share in ordered:
        fact = _FACTS[source](known, campaign_id)
        told.append(Reason(source=source, text=fact.text, share=share, data=fact.data if with_data else None))
    return told


def _rounded(shares: dict[Source, float]) -> dict[Source, float]:
    """To `_DIGITS` digits by largest remainder, so that they add up to their rounded sum and never to more than 1."""
    scale = 10**_DIGITS
    units = {source: math.floor(share * scale) for source, share in shares.items()}
    left = round(min(sum(shares.values()), 1.0) * scale) - sum(units.values())
    largest = sorted(units, key=lambda source: (units[source] - shares[source] * scale, source))
    for source in largest[: max(left, 0)]:
        units[source] += 1
    return {source: count / scale for source, count in units.items()}


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
            "path": [f"User {known.viewer.user_id}", f"Intent {links[0]['id']}", f"Campaign {campaign_id}"],
        },
    )


def _own_engagement(known: Known, campaign_id: str) -> Fact:
    link = next((one for one in known.engaged if one["id"] == campaign_id), None)
    category = known.served.campaign_of[campaign_id].category
    if link is None:
        of_category = any(
            one.category == category for one in map(known.served.campaign_of.get, _ids(known.engaged)) if one
        )
        words = f"engages with {category} campaigns" if of_category else "has not engaged with it yet"
        return Fact(words, {"count": 0, "category": category})
    return Fact(
        f"engaged with it {link['count']}×, last on {_day(link['last_at'])}",
        {"count": link["count"], "last_at": link["last_at"], "category": category},
    )


def _similar_users(known: Known, campaign_id: str) -> Fact:
    engaged = known.neighbours_engaged(campaign_id)
    return Fact(
        f"{engaged} of {len(known.neighbours)} similar users engaged with it"
        if known.neighbours
        else "no user is similar enough yet",
        {"similar_users": len(known.neighbours), "engaged": engaged},
    )


def _co_engagement(known: Known, campaign_id: str) -> Fact:
    links = _strongest(known.engaged, campaign_id)
    words = "users who engaged with {names} engaged with it, too"
    return _by_links(links, words, "the user has engaged with no other campaign")


def _graph_walk(known: Known, campaign_id: str) -> Fact:
    links = _strongest([*known.engaged, *known.expressed], campaign_id)
    return _by_links(links, "is close in the graph to {names}", "nothing else in the graph is linked to the user")


def _strongest(links: list[LinkRow], campaign_id: str) -> list[LinkRow]:
    return sorted((one for one in links if one["id"] != campaign_id), key=lambda one: -one["weight"])[:_SHOWN]


def _by_links(links: list[LinkRow], words: str, without: str) -> Fact:
    names = ", ".join(f"“{one['name']}”" for one in links)
    return Fact(words.format(names=names) if links else without, {"from": _ids(links)})


def _message_similarity(known: Known, campaign_id: str) -> Fact:
    cosine = known.says("message_similarity", campaign_id)
    return Fact(
        "its text is near to what the user talks about" if known.has_spoken else _SILENT,
        {"cosine": round(cosine, 3), "message_ids": [one.message_id for one in known.messages[:_MESSAGES_SHOWN]]},
    )


def _audience_similarity(known: Known, campaign_id: str) -> Fact:
    cosine = known.says("audience_similarity", campaign_id)
    words = "talks like those who engage with it" if known.has_spoken else _SILENT
    return Fact(words, {"cosine": round(cosine, 3)})


def _popularity(known: Known, campaign_id: str) -> Fact:
    users = int(known.campaigns.users[known.campaigns.column[campaign_id]])
    words = f"{users:,} user{'' if users == 1 else 's'} in all engaged with it" if users else _UNTRIED
    return Fact(words, {"users": users})


def _recency(known: Known, campaign_id: str) -> Fact:
    last_at = int(known.campaigns.last_at[known.campaigns.column[campaign_id]])
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


def _ids(links: list[LinkRow]) -> list[str]:
    return [one["id"] for one in links]


def _day(moment_ms: int) -> str:
    moment = datetime.fromtimestamp(moment_ms / 1000, UTC)
    return f"{moment.day} {moment:%b %Y}"
