"""A migration in one process, without Airflow: the stages of the DAG `reembed`, one after the other."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from personalization.errors import MigrationError
from personalization.migration.check import check, target_of
from personalization.migration.fill import catch_up, fill
from personalization.migration.scene import Scene
from personalization.migration.swap import finish, swap
from personalization.migration.verify import Bounds, verify
from personalization.pipeline.lineage import MIGRATION_STAGES, StageReport, record_lineage, reported
from personalization.pipeline.run import Run
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.together import Stores

_FINISH = ("finish",)


def migrate(model: str, dim: int | None, settings: Settings, bounds: Bounds | None = None) -> dict[str, Any]:
    """Move what is served to another model; return the figures of the check. May be killed and repeated.

    Raises:
        PersonalizationError: it cannot be made, or the check failed: what was served is.
    """
    with _run(settings, MIGRATION_STAGES) as run:
        target = target_of(run.scene, model, dim)
        return run.migrate(target, bounds or Bounds())


def roll_back(settings: Settings, bounds: Bounds | None = None) -> dict[str, Any]:
    """Move back to the space that is kept. Raises as `migrate`."""
    with _run(settings, MIGRATION_STAGES) as run:
        kept = [space for space, state in run.scene.stores.analytics.spaces().items() if state in ("kept", "behind")]
        if not kept:
            raise MigrationError("no former vector space is kept; name the model to migrate to")
        return run.migrate(kept[0], bounds or Bounds())


def drop_former(settings: Settings) -> dict[str, Any]:
    """Drop the space that is kept; return how many messages each of its collections held.

    Raises:
        MigrationError: none is kept.
    """
    with _run(settings, _FINISH) as run, run.stage("finish") as report:
        finish(report, run.scene)
        return report.details


@contextmanager
def _run(settings: Settings, stages: tuple[str, ...]) -> Iterator["_Run"]:
    run_id = f"reembed__{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}_{uuid.uuid4().hex[:8]}"
    staging = Staging(settings.staging_uri, run_id)
    with Stores.of(settings) as stores:
        stores.analytics.ensure_schema()
        try:
            yield _Run(run_id, Scene(stores, staging, settings))
        finally:
            if staging.root.exists():
                record_lineage(run_id, staging, stores.analytics, stages=stages)


class _Run:
    def __init__(self, run_id: str, scene: Scene) -> None:
        self.run_id = run_id
        self.scene = scene

    @contextmanager
    def stage(self, name: str, shard: int = 0) -> Iterator[StageReport]:
        """A stage at work, which keeps its report."""
        settings = self.scene.settings
        with reported(self.scene.staging, self.run_id, name, shard=shard, settings=settings) as report:
            yield report

    def migrate(self, target: VectorSpace, bounds: Bounds) -> dict[str, Any]:
        """All stages."""
        scene = self.scene
        with self.stage("check") as report:
            shards = check(report, target, scene)
        for number, shard in enumerate(shards):
            with self.stage("fill", number) as report:
                fill(report, shard, target, scene)
        with self.stage("catch_up") as report:
            catch_up(report, target, scene)
        with self.stage("verify") as report:
            figures = verify(report, target, bounds, scene)
        with self.stage("swap") as report:
            swap(report, target, scene)
        self._read_anew()
        return figures

    def _read_anew(self) -> None:
        """The stages of a run of the pipeline over all stored messages, as behind an edit of the intents."""
        scene = self.scene
        run = Run(self.run_id, scene.settings, scene.staging, scene.stores, scene.catalog())
        pages = run.detect_intents([], run.embed_catalog())
        run.build_graph(pages)
        run.roll_up_engagement(pages)
        run.publish(pages, run.learn(pages, []))
