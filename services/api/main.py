"""The recommendation API. One event loop, pooled async clients that connect on first use."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import FastAPI, Response
from personalization.recommend.service import Recommender
from personalization.schemas import Recommendations
from personalization.settings import get_settings
from personalization.stores.analytics import AsyncAnalyticsReader
from personalization.stores.cache import AsyncCache
from personalization.stores.milvus import AsyncVectorReader
from personalization.stores.neo4j import AsyncGraphReader
from pydantic import BaseModel

from services.api.deps import Explain, RecommenderDep, Top, UserId
from services.api.problems import Problem, add_problem_handlers

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "description": "The user id or `top` is not valid."},
    503: {"model": Problem, "description": "A store does not answer; try again after `Retry-After` seconds."},
}


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the clients with the app, close them with it."""
    settings = get_settings()
    recommender = Recommender(
        cache=AsyncCache.from_settings(settings),
        vectors=AsyncVectorReader(settings),
        graph=AsyncGraphReader.from_settings(settings),
        analytics=AsyncAnalyticsReader.from_settings(settings),
        settings=settings,
    )
    app.state.recommender = recommender
    yield
    await recommender.cache.client.aclose()
    await recommender.vectors.close()
    await recommender.graph.driver.close()
    await recommender.analytics.engine.dispose()


app = FastAPI(
    title="Personalization Platform",
    summary="Which campaigns are worth showing to a user, and why.",
    version="0.1.0",
    lifespan=lifespan,
)
add_problem_handlers(app)


@app.get("/health", tags=["operations"])
async def health() -> Health:
    """Whether the process is up; asks no store."""
    return Health()


@app.get(
    "/recommendations/{user_id}",
    tags=["recommendations"],
    response_model=Recommendations,
    response_model_exclude_none=True,
    responses=_PROBLEMS,
)
async def recommendations(
    user_id: UserId, recommender: RecommenderDep, top: Top = 5, explain: Explain = False
) -> Response:
    """Active campaigns for a user, best first, with the reasons.

    With `explain`, each reason carries its data, and what a rule holds back is listed with that rule.

    A user nothing is known of gets popular campaigns, marked `"strategy": "popular"`.
    """
    return Response(await recommender.answer(user_id, top, explain=explain), media_type="application/json")
