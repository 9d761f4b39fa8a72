"""Forget a person."""

from functools import cache, partial
from typing import Any

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import APIRouter, Request, Response
from personalization.schemas import ErasedStore, ErasureReceipt
from personalization.settings import Settings

from services.api.deps import RecommenderDep, UserId
from services.api.links import about
from services.api.problems import problems
from services.api.security import needs

router = APIRouter(route_class=needs("erase"), tags=["users"])

_AFTERWARDS = about("$response.body#/user_id", "recommendations", "profile", "similar", "erase_user")

_REMOVED: dict[ErasedStore, dict[str, int]] = {
    "mongodb": {"conversations": 12, "events": 9, "quarantine": 0},
    "milvus": {"messages_all_roberta_large_v1_1024_5d2a9c01": 12, "users_all_roberta_large_v1_1024_5d2a9c01": 1},
    "neo4j": {"nodes": 1, "edges": 6},
    "analytics": {"events": 9, "message_intents": 13, "user_engagement": 5},
    "redis": {"answers": 2, "vectors": 12},
    "staging": {"rows": 25},
}


def _example(down: ErasedStore | None = None) -> dict[str, Any]:
    stores: list[dict[str, Any]] = [
        {"store": store, "status": "erased", "removed": removed, "remaining": 0}
        if store != down
        else {
            "store": store,
            "status": "pending",
            "removed": {},
            "remaining": None,
            "problem": "It could not be asked. It is queued.",
        }
        for store, removed in _REMOVED.items()
    ]
    return {
        "user_id": "maria",
        "erasure_id": "6db628c32592417621fbe58e8989056d",
        "status": "queued" if down else "erased",
        "requested_at": "2026-10-01T09:00:00Z",
        "settled_at": None,
        "stores": stores,
    }


@router.delete(
    "/users/{user_id}",
    response_model=ErasureReceipt,
    responses={
        200: {
            "description": "Nothing is left in any store.",
            "content": {"application/json": {"example": _example()}},
            **_AFTERWARDS,
        },
        202: {
            "model": ErasureReceipt,
            "description": "A store could not be asked, or not be found empty; the DAG `maintenance` goes on.",
            "content": {"application/json": {"example": _example(down="neo4j")}},
            **_AFTERWARDS,
        },
        **problems(422),
    },
)
async def erase_user(user_id: UserId, request: Request, response: Response, recommender: RecommenderDep) -> Any:
    """Erase a person from every store; the receipt says what was removed where, and that nothing is left.

    From then on nothing of the person is taken, whoever sends it again. May be repeated: the receipt then is of all
    attempts together. `settled_at` says since when nothing that was at work at the request can undo it.

    Where MongoDB does not answer it is a 503 and nothing was done.
    """
    settings: Settings = request.app.state.settings
    receipt = await anyio.to_thread.run_sync(partial(_erase, user_id, settings), limiter=_at_once())
    if any(one.store == "redis" and one.status == "pending" for one in receipt.stores):
        await recommender.forget([user_id])  # what is still cached counts for nothing once Redis is back
    response.status_code = 200 if receipt.status == "erased" else 202
    return receipt


@cache
def _at_once() -> CapacityLimiter:
    """A store that hangs holds up other erasures, and nothing else."""
    return CapacityLimiter(2)


def _erase(user_id: str, settings: Settings) -> ErasureReceipt:
    """On connections of its own, in a thread of its own: the one place of the API that writes to the pipeline's stores.

    Loaded at the first erasure: staged files need pyarrow.
    """
    from personalization.erasure.erase import erase
    from personalization.erasure.places import Places

    with Places.of(settings) as places:
        return erase(user_id, places)
