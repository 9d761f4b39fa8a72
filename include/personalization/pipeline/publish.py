"""Publish: the run's data become what is served."""

import structlog

from personalization.catalog.loading import catalog_version, intents_version
from personalization.errors import StagingError
from personalization.pipeline.learn import SERVED_FILE
from personalization.pipeline.lineage import StageReport
from personalization.recommend.knowledge import ServedKnowledge
from personalization.schemas import Catalog, Ref, VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.cache import CachePublisher
from personalization.stores.milvus import MESSAGES, VectorStore
from personalization.stores.mongo import MongoStore
from personalization.stores.neo4j import GraphStore

log = structlog.get_logger(__name__)


def publish(
    report: StageReport,
    user_pages: list[Ref],
    learned: bool,
    *,
    catalog: Catalog,
    space: VectorSpace,
    mongo: MongoStore,
    vectors: VectorStore,
    graph: GraphStore,
    analytics: AnalyticsStore,
    cache: CachePublisher,
    staging: Staging,
    settings: Settings,
) -> None:
    """Mark the run's messages and events as processed and start a new serving generation.

    A run that a migration to another model has overtaken serves none of what it learned. It mirrored its vectors,
    and the next run reads all messages by the classifier of the space that is live then.

    The last stage: whatever stopped before it leaves them to be taken again. Where nothing
    changed, the generation stays and cached answers stay good.
    """
    graph.drop_what_left_the_catalog(catalog)
    changed_users = sum(page["rows"] for page in user_pages)
    report.rows_in = report.rows_out = changed_users
    # Counting reads whole collections on some servers: where nothing is new, the last counts are good.
    totals = analytics.latest_totals() if not user_pages else {}
    messages = mongo.count_messages()
    report.details = {
        "nothing_new": not user_pages,
        **(totals or _count(space, mongo, vectors, graph, analytics)),
        "messages": messages,
    }
    if learned:
        content = _learned(staging)
        at = ServedKnowledge.from_bytes(content).campaigns.at
        if not analytics.publish_served(content, at, report.run_id, space):
            report.details["overtaken"] = True
            log.warning("a migration to another model has overtaken this run; the next one serves what it learned of")
    if user_pages or learned:
        report.details["generation"] = cache.next_generation()
        analytics.announce_served()
    # Last, so that whatever fails above leaves the work to be taken up again.
    analytics.set_serving_state(catalog_version(catalog), intents_version(catalog, space, settings), report.run_id)
    mongo.publish_run(report.run_id, space.model, messages)
    staging.prune(settings.staging_retention_days)
    log.info("nothing new to publish" if not user_pages else f"published: {report.details}")


def _count(
    space: VectorSpace, mongo: MongoStore, vectors: VectorStore, graph: GraphStore, analytics: AnalyticsStore
) -> dict[str, int]:
    """What the stores hold beside messages."""
    return {
        "events": mongo.count_events(),
        "vectors": vectors.count(space.collection(MESSAGES)),
        **graph.totals(),
        "users_without_intent": analytics.count_users_without_intent(),
    }


def _learned(staging: Staging) -> bytes:
    try:
        return (staging.root / SERVED_FILE).read_bytes()
    except FileNotFoundError as error:
        raise StagingError(f"{error.filename}: is gone; clear the run's task `learn`, which makes it anew") from error
