"""The least that a FastAPI route over Redis can do: give back the string stored under a key."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from redis.asyncio import Redis

PREFIX = "reference:"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for all requests."""
    async with Redis.from_url(os.environ["REDIS_URL"]) as app.state.redis:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/stored/{user_id}")
async def stored(user_id: str, request: Request) -> Response:
    """The string, as it is."""
    return Response(await request.app.state.redis.get(PREFIX + user_id), media_type="application/json")
