"""What to show to a user."""

from typing import Annotated, Final

from fastapi import APIRouter, HTTPException, Query, Request, Response
from personalization.recommend.service import Answer, Ask
from personalization.schemas import (
    CatalogId,
    Identifier,
    MessageText,
    Preview,
    Recommendations,
    is_identifier,
    whole_of_float,
)
from personalization.stores.cache import LookedUp
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Scope

from services.api.deps import Explain, RecommenderDep, Top, UserId
from services.api.links import about
from services.api.problems import problems
from services.api.security import needs

_KNOWN_QUERIES: Final = 1024
_OUTCOMES: Final = {
    "hit": "personalization; hit",
    "stale": "personalization; hit; detail=stale",
    "miss": "personalization; fwd=miss",
}
_JSON: Final = "application/json"


class _CachedFirst(needs("read")):  # type: ignore[misc]
    """Looks into the cache first.

    A query that once was valid is known by its bytes, so a hit costs one round trip to Redis and no validation but
    of the user's id.
    """

    async def at_once(self, scope: Scope) -> Response | None:
        """The answer, where a fresh one is stored."""
        state = scope["app"].state
        variant = state.variants.get(scope["query_string"])
        user_id = scope["path_params"]["user_id"]
        if variant is None or not is_identifier(user_id):
            return None
        looked_up = await state.recommender.look_up(((user_id, variant),))
        before = looked_up[0] if looked_up else None
        if before is not None and (answer := state.recommender.fresh(before)) is not None:
            return _response(answer)
        scope.setdefault("state", {})["before"] = before
        return None


router = APIRouter(tags=["recommendations"])
_cached = APIRouter(route_class=_CachedFirst)
_made = APIRouter(route_class=needs("read"))

Category = Annotated[str | None, Query(min_length=1, max_length=64, description="Only campaigns of this category.")]
Exclude = Annotated[
    list[CatalogId], Query(max_length=50, description="Campaigns that are not wanted; may be given several times.")
]
_EXAMPLE = {
    "user_id": "maria",
    "strategy": "personalized",
    "policy": "fusion",
    "recommendations": [
        {
            "campaign_id": "weekend_city_breaks",
            "name": "Weekend city breaks",
            "description": "Flights and two nights in forty cities.",
            "category": "travel",
            "score": 0.95,
            "position": 1,
            "propensity": 1.0,
            "reasons": [
                {
                    "source": "own_intents",
                    "text": "expressed “Plan a trip” (3×), last on 1 Nov 2026",
                    "share": 0.95,
                }
            ],
        }
    ],
}


_Top = Annotated[int, Field(ge=1, le=50), whole_of_float]


class BatchAsk(BaseModel):
    """Which users, and what is asked about each."""

    model_config = ConfigDict(strict=True)

    user_ids: Annotated[list[Identifier], Field(min_length=1, max_length=100, examples=[["maria", "filmfan82"]])]
    top: _Top = 5
    category: str | None = Field(default=None, min_length=1, max_length=64)
    exclude: list[CatalogId] = Field(default=[], max_length=50)
    explain: bool = False


class BatchAnswer(BaseModel):
    """An answer for each user, in the order asked."""

    answers: list[Recommendations]


class PreviewAsk(BaseModel):
    """What somebody says."""

    model_config = ConfigDict(strict=True)

    message: MessageText = Field(min_length=1, max_length=8192, examples=["Any cheap flights to Porto in May?"])
    top: _Top = 5


@_cached.get(
    "/recommendations/{user_id}",
    response_model=Recommendations,
    response_model_exclude_none=True,
    responses={
        **problems(422),
        200: {
            "content": {_JSON: {"example": _EXAMPLE}},
            **about("$response.body#/user_id", "profile", "similar", "erase_user"),
        },
    },
)
async def recommendations(
    request: Request,
    user_id: UserId,
    recommender: RecommenderDep,
    top: Top = 5,
    category: Category = None,
    exclude: Exclude = [],  # noqa: B006 - FastAPI copies it
    explain: Explain = False,
) -> Response:
    """Active campaigns for a user, best first, with the reasons.

    With `explain`, each reason carries its data, and what a rule holds back is listed with that rule.

    A user nothing is known of gets popular campaigns, marked `"strategy": "popular"`. Where a store cannot be asked,
    the answer is made of what the others know and names what is missing in `degraded`.
    """
    ask = Ask(user_id, top, category, frozenset(exclude), explain)
    variant = recommender.variant(ask)
    if hasattr(request.state, "before"):
        before: LookedUp | None = request.state.before
    else:
        looked_up = await recommender.look_up([(user_id, variant)])
        before = looked_up[0] if looked_up else None
        variants = request.app.state.variants
        if len(variants) >= _KNOWN_QUERIES:
            variants.clear()
        variants[request.scope["query_string"]] = variant
    return _response(await recommender.answer(ask, before))


@_made.post(
    "/recommendations:batch",
    response_model=BatchAnswer,
    response_model_exclude_none=True,
    responses={
        **problems(400, 422),
        200: {
            "content": {_JSON: {"example": {"answers": [_EXAMPLE]}}},
            **about("$response.body#/answers/0/user_id", "recommendations", "profile"),
        },
    },
)
async def batch(asked: BatchAsk, recommender: RecommenderDep) -> Response:
    """The same for up to 100 users, in as many round trips to each store as for one."""
    exclude = frozenset(asked.exclude)
    asks = [Ask(one, asked.top, asked.category, exclude, asked.explain) for one in asked.user_ids]
    answers = await recommender.answers(asks)
    return Response(b'{"answers":[%s]}' % b",".join(one.body for one in answers), media_type=_JSON)


@_made.post("/recommendations:preview", response_model_exclude_none=True, responses=problems(400, 422))
async def preview(asked: PreviewAsk, recommender: RecommenderDep) -> Preview:
    """What would be shown to somebody of whom only this message is known. Nothing is stored."""
    most = recommender.settings.max_message_chars
    if len(asked.message) > most:
        raise HTTPException(422, f"message: must have at most {most} characters")
    return await recommender.preview(asked.message, asked.top)


router.include_router(_cached)
router.include_router(_made)


def _response(answer: Answer) -> Response:
    return Response(answer.body, media_type=_JSON, headers={"Cache-Status": _OUTCOMES[answer.outcome]})
