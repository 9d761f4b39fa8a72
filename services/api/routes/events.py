"""What users do with campaigns, as it happens. The next run rolls it up; a conversion or dismissal counts at once."""

import asyncio
from collections.abc import Collection, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, HTTPException, Response
from personalization.errors import StoreError
from personalization.recommend.service import Recommender
from personalization.schemas import Event
from personalization.stores.mongo import InsertOutcome
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from services.api.deps import RecommenderDep
from services.api.links import about
from services.api.problems import problems, told
from services.api.security import needs

router = APIRouter(route_class=needs("write"), tags=["events"])

MOST_EVENTS = 500
_AT_ONCE = ("conversion", "dismiss")
"""What takes a campaign out of the very next answer."""
_UNKNOWN_CAMPAIGN = "The served catalog has no such campaign. The event was kept, as it may have left."
_REFUSALS: dict[InsertOutcome, tuple[int, str]] = {
    "conflict": (409, "The event_id is that of another event, which was kept as it is."),
    "erased": (410, "The user was erased; nothing of theirs is taken."),
}

_JSON = "application/json"
_CLICK = {
    "event_id": "shop-20261101-000017",
    "user_id": "maria",
    "campaign_id": "weekend_city_breaks",
    "event": "click",
    "timestamp": "2026-11-01T09:30:00Z",
    "position": 1,
    "propensity": 1.0,
    "policy": "fusion",
}
_DISMISS = {
    "user_id": "maria",
    "campaign_id": "winter_ski_weeks",
    "event": "dismiss",
    "timestamp": "2026-11-01T09:31:00Z",
}
_DERIVED_ID = "ac12185e-0d28-59af-a804-14219e34fcc5"

_validated = TypeAdapter(Event).validate_python


class Received(BaseModel):
    """What became of an event."""

    event_id: str = Field(description="As given; else derived from user, campaign, kind and time.")
    status: Literal["accepted", "duplicate"] = Field(description="duplicate: it was known, and stays as it was.")
    warning: str | None = Field(default=None, description="Where no served campaign has the id.")


class BatchEvent(BaseModel):
    """What became of one event of several."""

    index: int = Field(description="Place in `events`, from 0.")
    event_id: str | None = Field(default=None, description="Of an event that is valid.")
    status: Literal["accepted", "duplicate", "rejected"]
    reason: Literal["invalid", "conflict", "erased"] | None = Field(
        default=None,
        description="Why it was rejected: it is not valid, its id is that of another event, or its user was erased.",
    )
    detail: str | None = None
    warning: str | None = Field(default=None, description="Where no served campaign has the id.")


class BatchReceived(BaseModel):
    """What became of several events."""

    accepted: int
    duplicates: int
    rejected: int
    events: list[BatchEvent]


class EventBatch(BaseModel):
    """Several events. Each is judged by itself, so one that is not valid does not keep the others out."""

    events: Annotated[
        list[Any],
        Field(
            min_length=1,
            max_length=MOST_EVENTS,
            json_schema_extra={"items": {"anyOf": [{"$ref": "#/components/schemas/Event"}, {}]}},
        ),
    ]


@router.post(
    "/events",
    status_code=202,
    response_model_exclude_none=True,
    responses={
        202: {
            "description": "The event is kept, or was known.",
            "content": {_JSON: {"example": {"event_id": _CLICK["event_id"], "status": "accepted"}}},
            **about("$request.body#/user_id", "recommendations", "profile", "similar", "erase_user"),
        },
        **problems(400, 409, 410, 422),
    },
)
async def receive(
    event: Annotated[
        Event,
        Body(
            openapi_examples={
                "click": {"summary": "A click, with what the answer said of the campaign", "value": _CLICK},
                "dismiss": {"summary": "A dismissal; its id is derived", "value": _DISMISS},
            }
        ),
    ],
    recommender: RecommenderDep,
) -> Received:
    """Take an event: impression, click, conversion or dismiss.

    It may be sent again: an `event_id` counts once, with the content it first came with. Without one the id is derived
    from user, campaign, kind and time. Send `position`, `propensity` and `policy` as the answer gave them.

    A campaign that is not in the served catalog makes a `warning`, no error.
    """
    [outcome], [warning] = await _keep([event], recommender)
    if outcome in _REFUSALS:
        raise HTTPException(*_REFUSALS[outcome])
    return Received(event_id=event.event_id, status=_status(outcome), warning=warning)


@router.post(
    "/events:batch",
    status_code=202,
    response_model=BatchReceived,
    response_model_exclude_none=True,
    responses={
        202: {
            "description": "Every event is kept, or was known.",
            "content": {
                _JSON: {
                    "example": {
                        "accepted": 1,
                        "duplicates": 1,
                        "rejected": 0,
                        "events": [
                            {"index": 0, "event_id": _CLICK["event_id"], "status": "duplicate"},
                            {"index": 1, "event_id": _DERIVED_ID, "status": "accepted"},
                        ],
                    }
                }
            },
        },
        207: {
            "model": BatchReceived,
            "description": "Some were rejected, and are named; the others are kept.",
            "content": {
                _JSON: {
                    "example": {
                        "accepted": 1,
                        "duplicates": 0,
                        "rejected": 1,
                        "events": [
                            {"index": 0, "event_id": _CLICK["event_id"], "status": "accepted"},
                            {
                                "index": 1,
                                "status": "rejected",
                                "reason": "invalid",
                                "detail": "timestamp: is in the future",
                            },
                        ],
                    }
                }
            },
        },
        **problems(400, 422),
    },
)
async def receive_batch(
    batch: Annotated[EventBatch, Body(openapi_examples={"two": {"value": {"events": [_CLICK, _DISMISS]}}})],
    recommender: RecommenderDep,
    response: Response,
) -> BatchReceived:
    """Take up to 500 events, in as many round trips as one. Safe to repeat as a whole."""
    found: dict[int, BatchEvent] = {}
    valid: dict[int, Event] = {}
    for index, value in enumerate(batch.events):
        try:
            valid[index] = _validated(value)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False)
            detail = told({**one, "loc": ("event", *one["loc"])} for one in faults)
            found[index] = BatchEvent(index=index, status="rejected", reason="invalid", detail=detail)
    outcomes, warnings = await _keep(list(valid.values()), recommender)
    for (index, event), outcome, warning in zip(valid.items(), outcomes, warnings, strict=True):
        one = BatchEvent(index=index, event_id=event.event_id, status="rejected")
        if outcome == "conflict" or outcome == "erased":
            one.reason, one.detail = outcome, _REFUSALS[outcome][1]
        else:
            one.status, one.warning = _status(outcome), warning
        found[index] = one
    statuses = [one.status for one in found.values()]
    if "rejected" in statuses:
        response.status_code = 207
    return BatchReceived(
        accepted=statuses.count("accepted"),
        duplicates=statuses.count("duplicate"),
        rejected=statuses.count("rejected"),
        events=[found[index] for index in range(len(batch.events))],
    )


async def _keep(
    events: Sequence[Event], recommender: Recommender
) -> tuple[Sequence[InsertOutcome], Sequence[str | None]]:
    """Keep the events; what became of each, and what to warn of."""
    if not events:
        return [], []
    insert = partial(recommender.events.insert, events)
    outcomes, campaigns = await asyncio.gather(
        recommender.guard.call("mongodb", insert, timeout_s=recommender.settings.answer_timeout_s),
        _served_campaigns(recommender),
    )
    # Of known ones, too: whoever sends again may not have been answered.
    kept = [event for event, outcome in zip(events, outcomes, strict=True) if outcome not in _REFUSALS]
    if changed := {one.user_id for one in kept if one.event in _AT_ONCE}:
        await recommender.forget(changed)
    unknown = [campaigns is not None and one.campaign_id not in campaigns for one in events]
    return outcomes, [_UNKNOWN_CAMPAIGN if one else None for one in unknown]


async def _served_campaigns(recommender: Recommender) -> Collection[str] | None:
    """Ids of the catalog's; None where nothing is published or can be read."""
    try:
        return (await recommender.knowledge()).campaign_of
    except StoreError:
        return None


def _status(outcome: InsertOutcome) -> Literal["accepted", "duplicate"]:
    return "duplicate" if outcome == "duplicate" else "accepted"
