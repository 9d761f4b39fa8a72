"""The recommendation API. One event loop, pooled async clients that connect on first use."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from personalization.recommend.service import Recommender
from personalization.settings import Settings

from services.api.base import base_app
from services.api.logs import configure_logs
from services.api.routes import campaigns, erasure, events, operations, recommendations, users

ROUTERS: tuple[APIRouter, ...] = (
    recommendations.router,
    events.router,
    campaigns.router,
    users.router,
    erasure.router,
    operations.router,
)
UNVERSIONED = ("/recommendations/{user_id}", "/health")
"""Paths that are also there without `/v1`."""


_SWITCH_S = 0.0005
"""Ranking runs in threads; by default each could keep the event loop waiting for 5 ms at a time."""
_WARMING_ENDS_S = 5.0
"""A driver that is slow to notice that its call was given up does not keep the process from ending."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the clients with the app, close them with it.

    Raises:
        SettingsError: nobody could ask this API.
    """
    configure_logs()
    sys.setswitchinterval(_SWITCH_S)
    app.state.gate.check()
    settings: Settings = app.state.settings
    recommender = Recommender.from_settings(settings, app.state.metrics)
    app.state.variants = {}
    app.state.recommender = recommender
    app.state.readiness = operations.Readiness(recommender)
    operations.watch(app.state.metrics, recommender)
    warming = asyncio.create_task(recommender.warm_up())
    yield
    warming.cancel()
    await asyncio.wait([warming], timeout=_WARMING_ENDS_S)
    await recommender.aclose()


def create_app(settings: Settings) -> FastAPI:
    """The app with these settings. It opens nothing before its lifespan begins."""
    app = base_app(settings, lifespan)
    unversioned = APIRouter(routes=[one for router in ROUTERS for one in router.routes if _is_unversioned(one)])
    app.include_router(unversioned)  # first, as the hottest path is one of them
    for router in ROUTERS:
        app.include_router(router, prefix="/v1")
    return app


def _is_unversioned(route: object) -> bool:
    return isinstance(route, APIRoute) and route.path in UNVERSIONED


app = create_app(Settings())
