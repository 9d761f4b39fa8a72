"""Swap: another vector space becomes what is served, in one step; and the former one goes, once it is not needed."""

import time
from datetime import UTC, datetime, timedelta

import structlog

from personalization.catalog.loading import catalog_version, intents_version
from personalization.errors import MigrationError
from personalization.migration.filling import Filling
from personalization.migration.scene import Scene
from personalization.pipeline.learn import SERVED_FILE, learn_anew
from personalization.pipeline.lineage import StageReport
from personalization.recommend.knowledge import ServedKnowledge
from personalization.schemas import VectorSpace
from personalization.stores.milvus import MESSAGES

MOVED_ON = timedelta(seconds=60)
"""By then no process of the API asks the former space: each request asks Redis which generation is served, and where
Redis is down, knowledge is believed for half as long.
"""

log = structlog.get_logger(__name__)


def swap(report: StageReport, target: VectorSpace, scene: Scene) -> None:
    """Learn what is known of the campaigns by the vectors of the target, and serve that: one transaction, which also
    makes the target the live space and the live one a kept one.

    What is served names its space, and the API asks that space's collections: an answer is of the one or of the other.
    Before the transaction nothing that is served has changed; what comes behind it may be repeated. The messages'
    intents are those of the former classifier until the stages behind this one have read them anew.

    Raises:
        StoreError: a run could not keep the target up to date since it was checked.
    """
    report.model = target.model
    stores = scene.stores
    if target != scene.live():
        learn_anew(
            report,
            catalog=scene.catalog(),
            space=target,
            analytics=stores.analytics,
            vectors=stores.vectors,
            staging=scene.staging,
            settings=scene.settings,
        )
        content = (scene.staging.root / SERVED_FILE).read_bytes()
        at = ServedKnowledge.from_bytes(content).campaigns.at
        stores.analytics.swap_served(content, at, report.run_id, target)
        log.info(f"{target.name} is served from now on")
    catalog = scene.catalog()
    # From here on what is served is of no one reading of the messages, until `publish` says so.
    stores.analytics.expect_versions(catalog_version(catalog), intents_version(catalog, target, scene.settings))
    if stores.analytics.served_at() is None:  # also where a former attempt ended here
        report.details["generation"] = stores.cache.next_generation()
        stores.analytics.announce_served()
    stores.vectors.serve(target)
    Filling.of(scene.settings, target).forget()


def finish(report: StageReport, scene: Scene) -> None:
    """Drop the space beside the live one: the former one after a migration, or one whose migration is given up.

    Waits until no process of the API asks it any more. There is no way back from here but another migration.

    Raises:
        MigrationError: there is none.
    """
    stores = scene.stores
    live = scene.live()
    if stores.analytics.served_at() is None:  # the API still asks the former space
        raise MigrationError("what is served is not announced yet; trigger `reembed` again, which ends what it began")
    beside = {space: since for space, (_, since) in stores.analytics.spaces_since().items() if space != live}
    if not beside:
        raise MigrationError(f"there is no other vector space beside {live.name}; nothing is to be dropped")
    for space, since in beside.items():
        wait = (since + MOVED_ON - datetime.now(UTC)).total_seconds()
        if wait > 0:
            log.info(f"waiting {wait:.0f} s, until all of the API has moved on")
            time.sleep(wait)
        report.details[space.name] = stores.vectors.count(space.collection(MESSAGES))
        stores.analytics.forget_space(space)  # first, so that no run writes to what is about to go
        stores.vectors.drop(space)
        Filling.of(scene.settings, space).forget()
        log.info(f"{space.name} is dropped")
