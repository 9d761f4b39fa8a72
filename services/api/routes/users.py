"""What is known of a user, and who is like them."""

import asyncio
import math
import time
from collections import defaultdict
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query
from personalization.recommend.knowledge import ServedKnowledge
from personalization.schemas import DAY_MS
from personalization.stores.analytics import UserRecord
from pydantic import BaseModel, Field

from services.api.deps import RecommenderDep, UserId
from services.api.links import about
from services.api.problems import problems
from services.api.security import needs

router = APIRouter(route_class=needs("read"), tags=["users"])

_DIGITS = 4
_PROFILE = {
    "user_id": "maria",
    "messages": 12,
    "last_message_at": "2026-11-01T09:00:00Z",
    "intents": [
        {
            "intent_id": "plan_trip",
            "name": "Plan a trip",
            "count": 3,
            "weight": 2.41,
            "confidence": 0.93,
            "last_seen": "2026-11-01T09:00:00Z",
        }
    ],
    "engagement": [
        {
            "campaign_id": "weekend_city_breaks",
            "name": "Weekend city breaks",
            "category": "travel",
            "mentions": 3,
            "impressions": 4,
            "clicks": 1,
            "conversions": 0,
            "dismisses": 0,
            "weight": 1.58,
            "last_at": "2026-11-01T09:30:00Z",
        }
    ],
    "categories": [{"category": "travel", "weight": 1.58, "share": 1.0}],
    "runs": [
        {
            "run_id": "scheduled__2026-11-02T00:00:00+00:00",
            "started_at": "2026-11-02T00:00:03Z",
            "messages": 12,
            "events": 5,
        }
    ],
}
_SIMILAR = {"user_id": "maria", "similar": [{"user_id": "filmfan82", "similarity": 0.8123}]}


class ProfileIntent(BaseModel):
    """An intent a user expressed."""

    intent_id: str
    name: str | None = Field(description="None where the intent left the catalog.")
    count: int = Field(description="Messages that express it.")
    weight: float = Field(description="Sum of their confidences, each faded by its age now.")
    confidence: float = Field(description="Mean over those messages.")
    last_seen: datetime


class ProfileEngagement(BaseModel):
    """What a user did with a campaign."""

    campaign_id: str
    name: str | None = Field(description="None where the campaign left the catalog, as `category` then.")
    category: str | None
    mentions: int = Field(description="Messages that speak to the campaign.")
    impressions: int
    clicks: int
    conversions: int
    dismisses: int
    weight: float = Field(description="Sum of the strengths of mentions, clicks and conversions, each faded by now.")
    last_at: datetime | None = Field(description="The last of all these.")


class ProfileCategory(BaseModel):
    """How much of a user's engagement a category has."""

    category: str
    weight: float
    share: float = Field(ge=0, le=1)


class ProfileRun(BaseModel):
    """A run that took messages or events of the user."""

    run_id: str
    started_at: datetime | None = Field(description="None until its lineage is recorded.")
    messages: int
    events: int


class Profile(BaseModel):
    """What the runs know of a user. The heaviest first."""

    user_id: str
    messages: int
    last_message_at: datetime | None
    intents: list[ProfileIntent]
    engagement: list[ProfileEngagement]
    categories: list[ProfileCategory]
    runs: list[ProfileRun] = Field(description="The newest first.")


class SimilarUser(BaseModel):
    """A user who says similar things."""

    user_id: str
    similarity: float = Field(ge=-1, le=1, description="Cosine of the two users' vectors.")


class SimilarUsers(BaseModel):
    """The nearest users, nearest first."""

    user_id: str
    similar: list[SimilarUser]


@router.get(
    "/users/{user_id}/profile",
    responses={
        **problems(404, 422),
        200: {
            "content": {"application/json": {"example": _PROFILE}},
            **about("$response.body#/user_id", "recommendations", "similar", "erase_user"),
        },
    },
)
async def profile(user_id: UserId, recommender: RecommenderDep) -> Profile:
    """What the user expressed and engaged with, as of the last run; weights as of now.

    What was received since is not in it, though a dismissal or conversion already counts in recommendations.
    """
    settings = recommender.settings
    ask = partial(recommender.analytics.user_record, user_id, settings.profile_half_life_days)
    record, served = await asyncio.gather(
        recommender.guard.call("analytics", ask, timeout_s=settings.answer_timeout_s), recommender.knowledge()
    )
    if not (record.messages or record.engagement or record.runs):
        raise HTTPException(404, "Nothing is known of this user.")
    return _profile(user_id, record, served, settings.profile_half_life_days)


@router.get(
    "/users/{user_id}/similar",
    responses={
        **problems(404, 422),
        200: {
            "content": {"application/json": {"example": _SIMILAR}},
            **about("$response.body#/similar/0/user_id", "recommendations", "profile", "similar"),
        },
    },
)
async def similar(
    user_id: UserId,
    recommender: RecommenderDep,
    top: Annotated[int, Query(ge=1, le=100, description="How many users at most.")] = 10,
) -> SimilarUsers:
    """Users whose messages are nearest to the user's, by the vectors of the last run; never the user."""
    space = (await recommender.knowledge()).space
    call = partial(recommender.guard.call, "milvus")
    vectors = await call(partial(recommender.vectors.user_vectors, space, [user_id]))
    if user_id not in vectors:
        raise HTTPException(404, "This user has no vector: no message of theirs is known.")
    own = vectors[user_id][:1]
    [near] = await call(partial(recommender.vectors.neighbours, space, own, top + 1))
    others = [one for one in near if one["user_id"] != user_id][:top]
    return SimilarUsers(
        user_id=user_id,
        similar=[
            SimilarUser(user_id=one["user_id"], similarity=round(max(-1.0, min(1.0, one["similarity"])), _DIGITS))
            for one in others
        ],
    )


def _profile(user_id: str, record: UserRecord, served: ServedKnowledge, half_life_days: float) -> Profile:
    now_ms = time.time_ns() // 1_000_000

    def faded(weight: float, as_of_ms: int | None) -> float:
        age_ms = max(now_ms - as_of_ms, 0) if as_of_ms is not None else 0
        return round(weight * math.exp2(-age_ms / (half_life_days * DAY_MS)), _DIGITS)

    intents = [
        ProfileIntent(
            intent_id=one.intent_id,
            name=served.intent_names.get(one.intent_id),
            count=one.count,
            weight=faded(one.weight, one.last_seen),
            confidence=round(one.confidence, _DIGITS),
            last_seen=_moment(one.last_seen),
        )
        for one in record.expressed
    ]
    engagement = []
    for one in record.engagement:
        campaign = served.campaign_of.get(one.campaign_id)
        last_at = max(one.last_at, one.last_event_at or 0)
        engagement.append(
            ProfileEngagement(
                campaign_id=one.campaign_id,
                name=campaign.name if campaign else None,
                category=campaign.category if campaign else None,
                mentions=one.count,
                impressions=one.impressions,
                clicks=one.clicks,
                conversions=one.conversions,
                dismisses=one.dismisses,
                weight=faded(one.weight, one.weight_at),
                last_at=_moment(last_at) if last_at else None,
            )
        )
    by_category: dict[str, float] = defaultdict(float)
    for found in engagement:
        if found.category is not None and found.weight:
            by_category[found.category] += found.weight
    total = sum(by_category.values())
    return Profile(
        user_id=user_id,
        messages=record.messages,
        last_message_at=_moment(record.last_message_at) if record.last_message_at is not None else None,
        intents=sorted(intents, key=lambda one: (-one.weight, one.intent_id)),
        engagement=sorted(engagement, key=lambda one: (-one.weight, one.campaign_id)),
        categories=[
            ProfileCategory(category=one, weight=round(weight, _DIGITS), share=round(weight / total, _DIGITS))
            for one, weight in sorted(by_category.items(), key=lambda one: (-one[1], one[0]))
        ],
        runs=[ProfileRun(**one._asdict()) for one in record.runs],
    )


def _moment(epoch_ms: int) -> datetime:
    return datetime.fromtimestamp(epoch_ms / 1000, UTC)
