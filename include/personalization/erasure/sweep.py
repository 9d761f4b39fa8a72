"""Go on with the erasures that are open, until nobody can bring those users back."""

from datetime import UTC, datetime, timedelta

import structlog

from personalization.erasure.erase import erase_everywhere, failures_told, record
from personalization.erasure.places import Places
from personalization.errors import ErasureError
from personalization.pipeline.lineage import at_work
from personalization.schemas import ErasureReceipt

SETTLES_AFTER = timedelta(hours=1)
"""By then all that tells nobody of its work has ended: a request of the API, another erasure."""
_CLOCK_SKEW = timedelta(minutes=5)
_AT_ONCE = 100

log = structlog.get_logger(__name__)


def sweep(places: Places) -> list[ErasureReceipt]:
    """Erase again all users whose erasure is open; settle those that nothing at work may still undo.

    Every write is refused since the request, but a task that had asked before may write after. So a name is
    forgotten only when all that was at work then has ended, and nothing is left behind it.

    Raises:
        StoreError: MongoDB does not answer.
        ErasureError: some could not be erased yet; the others are done.
    """
    erasures = places.mongo.open_erasures()
    if not erasures:
        return []
    # Before anything is erased: what ends meanwhile may have written behind our back.
    final = {one["_id"] for one in erasures if one["requested_at"] < _all_settled_until(places)}
    receipts = []
    for start in range(0, len(erasures), _AT_ONCE):  # a sweep that breaks off has done some
        part = erasures[start : start + _AT_ONCE]
        outcomes = erase_everywhere([one["user_id"] for one in part], places)
        for erasure in part:
            user_id = erasure["user_id"]
            found = record(user_id, outcomes[user_id], erasure, places)
            if found.status == "erased" and erasure["_id"] in final:
                found = found.model_copy(update={"settled_at": places.mongo.settle_erasure(user_id)["settled_at"]})
            receipts.append(found)
    with failures_told("analytics"), places.analytics() as analytics:  # they still count who is gone
        analytics.refresh_campaign_totals()
    settled = sum(one.settled_at is not None for one in receipts)
    log.info(f"{len(receipts):,} erasures were open, {settled:,} of them are settled")
    if pending := sorted({one.store for found in receipts for one in found.stores if one.status == "pending"}):
        raise ErasureError(f"users are still to be erased from {', '.join(pending)}; the log says why")
    return receipts


def _all_settled_until(places: Places) -> datetime:
    """Nothing is at work any more that began before this moment."""
    moments: list[datetime] = []  # where staging does not say
    with failures_told("staging"):
        began = at_work(places.staging_uri)
        moments = [datetime.now(UTC) - SETTLES_AFTER, *(one - _CLOCK_SKEW for one in began)]
    return min(moments, default=datetime.min.replace(tzinfo=UTC))
