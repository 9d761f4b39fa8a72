"""Erase users from every store, and say what was removed where.

First MongoDB refuses the user for good (`erasures`); from then on no stage writes anything of theirs. Then all stores
are worked on at once, each on its own: one that is down stays `pending` and the others go on.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, get_args

import structlog

from personalization.erasure.places import Places
from personalization.errors import InputError, StoreError
from personalization.schemas import ErasedStore, ErasureReceipt, StoreReceipt, erasure_id, is_identifier
from personalization.staging import count_staged, erase_staged
from personalization.stores.mongo import Document

STORES: tuple[ErasedStore, ...] = get_args(ErasedStore)

log = structlog.get_logger(__name__)


class Erasing(Protocol):
    """What every store offers."""

    def erase_user(self, user_id: str) -> dict[str, int]:
        """Remove what is the user's; return how much by collection."""

    def count_user(self, user_id: str) -> int:
        """How much of the user is there."""


@dataclass
class Outcome:
    """What became of a user in one store."""

    removed: dict[str, int] = field(default_factory=dict)
    remaining: int | None = None
    """None where it could not be counted."""


Outcomes = dict[ErasedStore, Outcome]


def erase(user_id: str, places: Places) -> ErasureReceipt:
    """Erase a user. Safe to repeat; the counts of all attempts add up.

    Costs a scan of the cached answers' keys and of the column `user_id` of all staged files, and in each store what is
    the user's, read twice.

    Raises:
        InputError: no user can have this id.
        StoreError: MongoDB does not answer, so nothing can be promised and nothing was done.
    """
    if not is_identifier(user_id):
        raise InputError(f"{user_id!r} is no user id")
    requested = places.mongo.request_erasure(user_id)
    return record(user_id, erase_everywhere([user_id], places)[user_id], requested, places)


def erase_everywhere(user_ids: Sequence[str], places: Places) -> dict[str, Outcomes]:
    """Take the users out of all stores at once, and count what is left. Never fails for a store."""
    outcomes = {user_id: {store: Outcome() for store in STORES} for user_id in user_ids}
    # Before the evidence goes: what is being computed of it now counts as old where it is cached.
    with failures_told("redis"), places.cache() as cache:
        for user_id in user_ids:
            cache.touch(user_id, places.cache_ttl_s)
    jobs: dict[ErasedStore, Callable[[], AbstractContextManager[Erasing]]] = {
        "mongodb": lambda: _open(places.mongo),
        "milvus": places.vectors,
        "neo4j": places.graph,
        "analytics": places.analytics,
        "staging": lambda: _open(_Staged(places, user_ids)),
    }
    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(_erase_in, store, opened, outcomes) for store, opened in jobs.items()]:
            done.result()
    _erase_in("redis", places.cache, outcomes)
    return outcomes


def record(user_id: str, outcomes: Outcomes, requested: Document, places: Places) -> ErasureReceipt:
    """Keep what was done with the erasure; the receipt over all its attempts."""
    results = {store: (one.removed, one.remaining) for store, one in outcomes.items()}
    kept = requested
    with failures_told("mongodb") as failures:
        kept = places.mongo.record_erasure(user_id, results)
    if failures:  # not written down, so it is still to be done
        outcomes["mongodb"].remaining = None
        kept = {**requested, "stores": {store: {"removed": one.removed} for store, one in outcomes.items()}}
    return receipt(user_id, kept, outcomes)


def receipt(user_id: str, kept: Document, outcomes: Outcomes) -> ErasureReceipt:
    """Of an erasure as MongoDB has it, and what the last attempt left."""
    stores = [_store_receipt(store, kept["stores"][store].get("removed", {}), outcomes[store]) for store in STORES]
    is_done = all(one.status == "erased" for one in stores)
    return ErasureReceipt(
        user_id=user_id,
        erasure_id=erasure_id(user_id),
        status="erased" if is_done else "queued",
        requested_at=kept["requested_at"],
        settled_at=kept.get("settled_at") if is_done else None,
        stores=stores,
    )


def _store_receipt(store: ErasedStore, removed: dict[str, int], outcome: Outcome) -> StoreReceipt:
    if outcome.remaining == 0:
        return StoreReceipt(store=store, status="erased", removed=removed, remaining=0)
    asked = outcome.remaining is not None
    problem = "Something came back meanwhile." if asked else "It could not be asked."
    return StoreReceipt(
        store=store, status="pending", removed=removed, remaining=outcome.remaining, problem=f"{problem} It is queued."
    )


def _erase_in(
    store: ErasedStore, opened: Callable[[], AbstractContextManager[Erasing]], outcomes: dict[str, Outcomes]
) -> None:
    with failures_told(store), opened() as place:
        for user_id, of_user in outcomes.items():
            of_user[store].removed = place.erase_user(user_id)
            of_user[store].remaining = place.count_user(user_id)


class _Staged:
    """The staged files of all runs, each rewritten once for all users.

    Also those of others whose erasure is open: a file that is rewritten for one at the same time is then never put
    back with another in it.
    """

    def __init__(self, places: Places, user_ids: Sequence[str]) -> None:
        self._uri = places.staging_uri
        still_open = [one["user_id"] for one in places.mongo.open_erasures()]
        self._removed = erase_staged(self._uri, {*user_ids, *still_open})
        self._left = count_staged(self._uri, user_ids)

    def erase_user(self, user_id: str) -> dict[str, int]:
        return {"rows": self._removed[user_id]}

    def count_user(self, user_id: str) -> int:
        return self._left[user_id]


@contextmanager
def _open(store: Erasing) -> Iterator[Erasing]:
    yield store


@contextmanager
def failures_told(store: ErasedStore) -> Iterator[list[StoreError]]:
    """Log that the store failed, and go on behind the block. Never names a user."""
    failures: list[StoreError] = []
    try:
        yield failures
    except StoreError as error:
        failures.append(error)
        log.warning("an erasure is not done yet", store=store, problem=str(error))
