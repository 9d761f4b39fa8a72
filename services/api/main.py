"""The recommendation API. One event loop, pooled async clients that connect on first use."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from personalization.recommend.service import Recommender
from personalization.settings import Settings
from personalization.stores.analytics import AsyncAnalyticsReader
from personalization.stores.cache import AsyncCache
from personalization.stores.milvus import AsyncVectorReader
from personalization.stores.neo4j import AsyncGraphReader

from services.api.problems import Problem, add_problem_handlers
from services.api.routes import operations, recommendations

ROUTERS: tuple[APIRouter, ...] = (recommendations.router, operations.router)
UNVERSIONED = ("/recommendations/{user_id}", "/health")
"""Paths that are also there without `/v1`."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the clients with the app, close them with it."""
    settings: Settings = app.state.settings
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


def create_app(settings: Settings) -> FastAPI:
    """The app with these settings. It opens nothing before its lifespan begins."""
    app = FastAPI(
        title="Personalization Platform",
        summary="Which campaigns are worth showing to a user, and why.",
        version="0.1.0",
        lifespan=lifespan,
    )
    app.state.settings = settings
    add_problem_handlers(app)
    unversioned = APIRouter(routes=[one for router in ROUTERS for one in router.routes if _is_unversioned(one)])
    app.include_router(unversioned)  # first, as the hottest path is one of them
    for router in ROUTERS:
        app.include_router(router, prefix="/v1")
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document["components"]["schemas"].setdefault("Problem", Problem.model_json_schema())
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _is_unversioned(route: object) -> bool:
    return isinstance(route, APIRoute) and route.path in UNVERSIONED


app = create_app(Settings())
