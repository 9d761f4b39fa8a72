"""The campaigns that answers are made of."""

import time
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from personalization.schemas import Campaign, CatalogId
from pydantic import BaseModel, Field

from services.api.deps import RecommenderDep
from services.api.problems import problems
from services.api.security import needs

router = APIRouter(route_class=needs("read"), tags=["campaigns"])

_EXAMPLE = {
    "campaigns": [
        {
            "campaign_id": "weekend_city_breaks",
            "name": "Weekend city breaks",
            "description": "Flights and two nights in forty cities.",
            "category": "travel",
            "intents": ["book_flight", "plan_trip"],
            "active_from": "2026-01-01T00:00:00Z",
            "active_until": None,
            "active": True,
        }
    ],
    "next": "weekend_city_breaks",
}


_NEXT_PAGE = {"next": {"operationId": "campaigns", "parameters": {"after": "$response.body#/next"}}}


class CampaignItem(BaseModel):
    """A campaign of the served catalog."""

    campaign_id: str
    name: str
    description: str
    category: str
    intents: list[str] = Field(description="Users who express one of them are whom it is for.")
    active_from: datetime | None = Field(description="None: from ever.")
    active_until: datetime | None = Field(description="The first moment in which it is over; none: without end.")
    active: bool = Field(description="Whether it may be shown now.")


class Campaigns(BaseModel):
    """A page of campaigns, by id."""

    campaigns: list[CampaignItem]
    next: str | None = Field(description="`after` of the next page; none where this is the last.")


@router.get(
    "/campaigns",
    responses={**problems(422), 200: {"content": {"application/json": {"example": _EXAMPLE}}, "links": _NEXT_PAGE}},
)
async def campaigns(
    recommender: RecommenderDep,
    category: Annotated[str | None, Query(min_length=1, max_length=64, description="Only of this category.")] = None,
    active: Annotated[bool | None, Query(description="Only those that run now, or only those that do not.")] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="How many at most.")] = 100,
    after: Annotated[CatalogId | None, Query(description="Go on behind this id: `next` of the page before.")] = None,
) -> Campaigns:
    """The campaigns of the published catalog, by id. From memory: no store but the cache's generation is asked."""
    now_ms = time.time_ns() // 1_000_000
    served = await recommender.knowledge()
    found = [
        one
        for one in sorted(served.catalog.campaigns, key=lambda one: one.id)
        if (category is None or one.category == category)
        and (active is None or _is_active(one, now_ms) == active)
        and (after is None or one.id > after)
    ]
    page = found[:limit]
    return Campaigns(
        campaigns=[
            CampaignItem(
                campaign_id=one.id,
                name=one.name,
                description=one.description,
                category=one.category,
                intents=one.intents,
                active_from=one.active_from,
                active_until=one.active_until,
                active=_is_active(one, now_ms),
            )
            for one in page
        ],
        next=page[-1].id if len(found) > limit else None,
    )


def _is_active(campaign: Campaign, now_ms: int) -> bool:
    return campaign.active_from_ms <= now_ms < campaign.active_until_ms
