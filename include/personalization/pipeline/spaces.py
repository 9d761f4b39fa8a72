"""Vector spaces: which one is live is what the stores say; settings decide where nothing was published yet."""

import structlog

from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import VectorStore

log = structlog.get_logger(__name__)


def live_space(analytics: AnalyticsStore, vectors: VectorStore, settings: Settings) -> VectorSpace:
    """The space of what is served; before the first publish, that of the settings.

    An analytics database of an earlier version, or one that was lost, does not say: then what the aliases name in
    Milvus is live. Completes the database's schema. One query; where nothing is published, a few calls to Milvus.
    """
    analytics.ensure_schema()
    wanted = VectorSpace(settings.embedding_model, settings.embedding_dim)
    live = next((space for space, state in analytics.spaces().items() if state == "live"), None)
    if live is None and analytics.serving_state() is not None:
        live = vectors.served_space()
    if live is not None and live != wanted:
        log.info(f"the live vector space is {live.name}, whatever the settings say; the DAG `reembed` changes it")
    return live or wanted


def spaces_beside(analytics: AnalyticsStore, space: VectorSpace) -> list[VectorSpace]:
    """The other spaces that a run of `space` keeps up to date. Asked when they are written to, not when a run begins:
    what a run wrote to MongoDB before a migration began is read by that.
    """
    return [one for one, state in analytics.spaces().items() if state != "behind" and one != space]
