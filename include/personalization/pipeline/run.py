"""All stages in one process, without Airflow: for notebooks, tests and the command line."""

import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from os import PathLike
from typing import Any, TypedDict

from upath import UPath

from personalization.catalog.loading import load_catalog
from personalization.errors import PersonalizationError
from personalization.pipeline.embed import embed, embed_catalog
from personalization.pipeline.engagement import roll_up_engagement
from personalization.pipeline.events import ingest_events
from personalization.pipeline.graph import build_graph
from personalization.pipeline.ingest import ingest
from personalization.pipeline.intents import detect_intents
from personalization.pipeline.learn import learn
from personalization.pipeline.lineage import StageReport, record_lineage, reported
from personalization.pipeline.mirror import mirror_vectors
from personalization.pipeline.prepare import prepare
from personalization.pipeline.publish import publish
from personalization.pipeline.spaces import live_space
from personalization.pipeline.vectors import refresh_profiles, upsert_vectors
from personalization.reading import locate
from personalization.schemas import Catalog, Ref, VectorSpace
from personalization.settings import Settings, get_settings
from personalization.staging import Staging
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.cache import VectorCache
from personalization.stores.together import Stores


class RunSummary(TypedDict, total=False):
    """What a run did; `error` only where it failed."""

    run_id: str
    status: str
    stages: list[dict[str, Any]]
    error: str


def run_pipeline(
    path: str | PathLike[str] | None,
    settings: Settings | None = None,
    events_path: str | PathLike[str] | None = None,
) -> RunSummary:
    """Take a file of messages, one of events, or both through all stages into all stores.

    Events that wait in MongoDB are taken too. The same stage functions as the DAG's, one after the other.
    An error the platform foresees ends in `status` "failed" with `error`; lineage is written either way.
    """
    settings = settings or get_settings()
    run_id = f"local__{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}_{uuid.uuid4().hex[:8]}"
    staging = Staging(settings.staging_uri, run_id)
    summary = RunSummary(run_id=run_id, status="success")
    with ExitStack() as stack:
        analytics = AnalyticsStore.from_settings(settings)
        stack.callback(analytics.engine.dispose)
        try:
            _run_stages(run_id, _files(path), _files(events_path), settings, staging, stack)
        except PersonalizationError as error:
            summary["status"] = "failed"
            summary["error"] = str(error)
        finally:
            rows = record_lineage(run_id, staging, analytics)
        summary["stages"] = [_brief(row) for row in rows]
    return summary


def _run_stages(
    run_id: str,
    files: list[UPath],
    events_files: list[UPath],
    settings: Settings,
    staging: Staging,
    stack: ExitStack,
) -> None:
    with reported(staging, run_id, "prepare", settings=settings) as report:
        catalog = load_catalog(settings.catalog_path)
        stores = stack.enter_context(Stores.of(settings))
        run = Run(run_id, settings, staging, stores, catalog)
        run.prepare(report)

    def take(report: StageReport) -> list[Ref]:
        return ingest(
            report,
            files=files,
            skip_bad_files=False,
            mongo=stores.mongo,
            staging=staging,
            settings=settings,
        )

    run.stages(take, events_files=events_files)


@dataclass(frozen=True)
class Run:
    """A run in one process: the stages of the DAG, one after the other."""

    run_id: str
    settings: Settings
    staging: Staging
    stores: Stores
    catalog: Catalog

    @cached_property
    def space(self) -> VectorSpace:
        """The vector space of the run: the one that is live when it is first asked for."""
        return live_space(self.stores.analytics, self.stores.vectors, self.settings)

    def stage(self, name: str, shard: int = 0) -> AbstractContextManager[StageReport]:
        """A stage at work, which keeps its report."""
        model = self.space.model
        return reported(self.staging, self.run_id, name, shard=shard, settings=self.settings, model=model)

    def prepare(self, report: StageReport) -> None:
        """The first stage."""
        prepare(
            report,
            catalog=self.catalog,
            space=self.space,
            vectors=self.stores.vectors,
            graph=self.stores.graph,
            analytics=self.stores.analytics,
            settings=self.settings,
        )

    def stages(
        self,
        take: Callable[[StageReport], list[Ref]],
        *,
        events_files: Sequence[UPath] = (),
        more_users: Sequence[Ref] = (),
    ) -> None:
        """All stages behind `prepare`. `take` is the stage `ingest`: it returns staged shards of messages.

        `more_users` are pages of users to refresh beside those of the run.
        """
        catalog, staging, settings, space = self.catalog, self.staging, self.settings, self.space
        mongo, vectors, graph = self.stores.mongo, self.stores.vectors, self.stores.graph
        analytics, cache = self.stores.analytics, self.stores.cache
        with self.stage("ingest") as report:
            shards = take(report)
        with self.stage("ingest_events") as report:
            ingest_events(
                report,
                files=events_files,
                skip_bad_files=False,
                mongo=mongo,
                analytics=analytics,
                staging=staging,
                settings=settings,
            )
        with self.stage("embed_catalog") as report:
            utterances = embed_catalog(report, catalog=catalog, space=space, staging=staging)
        known = VectorCache(cache.client, settings.vector_cache_days)
        embedded = []
        for number, shard in enumerate(shards):
            with self.stage("embed", number) as report:
                embedded.append(embed(report, shard, space=space, staging=staging, cache=known))
        for number, shard in enumerate(embedded):
            with self.stage("upsert_vectors", number) as report:
                upsert_vectors(report, shard, space=space, mongo=mongo, vectors=vectors)
        with self.stage("mirror_vectors") as report:
            mirror_vectors(
                report,
                shards,
                space=space,
                mongo=mongo,
                analytics=analytics,
                vectors=vectors,
                cache=known,
            )
        with self.stage("detect_intents") as report:
            pages = detect_intents(
                report,
                embedded,
                utterances,
                catalog=catalog,
                space=space,
                mongo=mongo,
                analytics=analytics,
                vectors=vectors,
                staging=staging,
                settings=settings,
            )
        pages = [*pages, *more_users]
        for number, page in enumerate(pages):
            with self.stage("build_graph", number) as report:
                build_graph(report, page, mongo=mongo, analytics=analytics, graph=graph, settings=settings)
        with self.stage("roll_up_engagement") as report:
            roll_up_engagement(report, pages, analytics=analytics, settings=settings)
        with self.stage("refresh_profiles") as report:
            refresh_profiles(
                report,
                more_users,
                space=space,
                mongo=mongo,
                analytics=analytics,
                vectors=vectors,
                settings=settings,
            )
        with self.stage("learn") as report:
            learned = learn(
                report,
                pages,
                catalog=catalog,
                space=space,
                analytics=analytics,
                vectors=vectors,
                staging=staging,
                settings=settings,
            )
        with self.stage("publish") as report:
            publish(
                report,
                pages,
                learned,
                catalog=catalog,
                space=space,
                mongo=mongo,
                vectors=vectors,
                graph=graph,
                analytics=analytics,
                cache=cache,
                staging=staging,
                settings=settings,
            )


def _files(path: str | PathLike[str] | None) -> list[UPath]:
    return [locate(str(path))] if path is not None else []


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    counts = ("rows_in", "rows_out", "rejected", "skipped", "seconds", "error", "details")
    return {"stage": row["stage"], "status": row["status"]} | {key: row[key] for key in counts if row.get(key)}
