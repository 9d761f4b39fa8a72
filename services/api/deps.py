"""What routes ask for."""

from typing import Annotated

from fastapi import Depends, Path, Query, Request
from personalization.recommend.service import Recommender
from personalization.schemas import Identifier


def _recommender(request: Request) -> Recommender:
    recommender: Recommender = request.app.state.recommender
    return recommender


RecommenderDep = Annotated[Recommender, Depends(_recommender)]
UserId = Annotated[Identifier, Path(description="The user, as named in the conversations.", examples=["maria"])]
Top = Annotated[int, Query(ge=1, le=50, description="How many campaigns at most.")]
Explain = Annotated[bool, Query(description="With the data behind each reason, and what the rules hold back.")]
