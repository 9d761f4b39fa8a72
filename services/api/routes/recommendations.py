"""What to show to a user."""

from fastapi import APIRouter, Response
from personalization.schemas import Recommendations

from services.api.deps import Explain, RecommenderDep, Top, UserId
from services.api.problems import problems
from services.api.security import needs

router = APIRouter(route_class=needs("read"), tags=["recommendations"])


@router.get(
    "/recommendations/{user_id}",
    response_model=Recommendations,
    response_model_exclude_none=True,
    responses=problems(422),
)
async def recommendations(
    user_id: UserId, recommender: RecommenderDep, top: Top = 5, explain: Explain = False
) -> Response:
    """Active campaigns for a user, best first, with the reasons.

    With `explain`, each reason carries its data, and what a rule holds back is listed with that rule.

    A user nothing is known of gets popular campaigns, marked `"strategy": "popular"`.
    """
    return Response(await recommender.answer(user_id, top, explain=explain), media_type="application/json")
