"""Whether the service is up, what it can do at the moment, and how it has fared."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from personalization.errors import StoreError
from personalization.recommend.service import NOBODY, Recommender
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from sqlalchemy.pool import QueuePool

from services.api.metrics import Metrics, PoolUse
from services.api.security import needs

router = APIRouter(tags=["operations"])
guarded = APIRouter(tags=["operations"], route_class=needs("read"))

_DEADLINE_S = 2.0
_BELIEVED_S = 1.0
"""How long an answer of `/ready` stands: anybody may ask, and not each time should every store be asked."""
_INFORMATIONAL = frozenset({"embedding"})
"""Not needed for a recommendation."""


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class StoreState(BaseModel):
    """How a store answered just now."""

    ok: bool
    latency_ms: float


class Ready(BaseModel):
    """What can be answered at the moment."""

    status: Literal["ready", "degraded", "unready"] = Field(
        description="degraded: answers lack a store. unready: there are none, as nothing was published or can be read."
    )
    generation: int | None = Field(description="The serving generation; none while Redis does not answer.")
    learned_at: datetime | None = Field(description="The moment of the published run's knowledge.")
    stores: dict[str, StoreState]


class Readiness:
    """Asks every store at once whether it answers; one an app."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender
        self._asking = asyncio.Lock()
        self._found: Ready | None = None
        self._found_at = 0.0

    async def now(self) -> Ready:
        """As of this moment or shortly before, within the deadline of one store."""
        async with self._asking:
            if self._found is None or time.monotonic() - self._found_at > _BELIEVED_S:
                self._found = await self._ask()
                self._found_at = time.monotonic()
            return self._found

    async def _ask(self) -> Ready:
        recommender = self._recommender
        probes: dict[str, Callable[[], Awaitable[Any]]] = {
            "redis": recommender.cache.generation,
            "milvus": recommender.vectors.ping,
            "neo4j": lambda: recommender.graph.links([NOBODY]),
            "analytics": recommender.analytics.learned_at,
            "mongodb": recommender.events.ping,
            "embedding": recommender.embedder.ping,
        }
        answers = await asyncio.gather(*(_asked(probe) for probe in probes.values()))
        stores = {name: state for name, (state, _) in zip(probes, answers, strict=True)}
        said = {name: answer for name, (_, answer) in zip(probes, answers, strict=True)}
        moment = said["analytics"]
        if moment is None and recommender.serving is not None:  # read before, and still answered from
            _, moment = recommender.serving
        if moment is None:
            status: Literal["ready", "degraded", "unready"] = "unready"
        elif all(state.ok for name, state in stores.items() if name not in _INFORMATIONAL):
            status = "ready"
        else:
            status = "degraded"
        return Ready(
            status=status,
            generation=said["redis"],
            learned_at=datetime.fromtimestamp(moment / 1000, UTC) if moment is not None else None,
            stores=stores,
        )


async def _asked(probe: Callable[[], Awaitable[Any]]) -> tuple[StoreState, Any]:
    started = time.perf_counter()
    ok, answer = True, None
    try:
        async with asyncio.timeout(_DEADLINE_S):
            answer = await probe()
    except (StoreError, TimeoutError):
        ok = False
    return StoreState(ok=ok, latency_ms=round((time.perf_counter() - started) * 1000, 2)), answer


def watch(metrics: Metrics, recommender: Recommender) -> None:
    """Let the metrics read what the recommender holds. Neo4j's and MongoDB's drivers do not tell of their pools."""

    def pools() -> Iterator[PoolUse]:
        (idle, _), (in_use, _) = recommender.cache.client.connection_pool.get_connection_count()
        yield PoolUse("redis", in_use, idle)
        pool = recommender.analytics.engine.pool
        if isinstance(pool, QueuePool):
            yield PoolUse("analytics", pool.checkedout(), pool.checkedin())

    metrics.watch_pools(pools)
    metrics.watch_generation(lambda: recommender.serving[0] if recommender.serving else 0)


def _readiness(request: Request) -> Readiness:
    readiness: Readiness = request.app.state.readiness
    return readiness


def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


@router.get("/health")
async def health() -> Health:
    """Whether the process is up; asks no store."""
    return Health()


@router.get("/ready", responses={503: {"model": Ready, "description": "There is nothing to answer from."}})
async def ready(readiness: Annotated[Readiness, Depends(_readiness)], response: Response) -> Ready:
    """Which stores answer, how fast, and what is served. 503 only where no answer can be made at all."""
    found = await readiness.now()
    if found.status == "unready":
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    return found


@guarded.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}})
async def metrics(metrics: Annotated[Metrics, Depends(_metrics)]) -> Response:
    """Counts and times for Prometheus, which sends a key as its `authorization` credentials."""
    return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)


router.include_router(guarded)
