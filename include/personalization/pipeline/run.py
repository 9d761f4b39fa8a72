"""All stages in one process, without Airflow: for notebooks, tests and the command line."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from personalization.pipeline.overlap import at_once, one_ahead
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

    Events that wait in MongoDB are taken too. The same stage functions as the DAG's; those overlap that may.
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
    """A run in one process: the stages of the DAG, overlapping as there, in threads."""

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
        return self._reported(self.staging, name, shard)

    def _reported(self, staging: Staging, name: str, shard: int = 0) -> AbstractContextManager[StageReport]:
        model = self.space.model
        return reported(staging, self.run_id, name, shard=shard, settings=self.settings, model=model)

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
        with ThreadPoolExecutor(1) as beside:
            prepared = beside.submit(self.embed_catalog)  # loads the model meanwhile
            with self.stage("ingest") as report:
                shards = take(report)
            with self.stage("ingest_events") as report:
                ingest_events(
                    report,
                    files=events_files,
                    skip_bad_files=False,
                    mongo=self.stores.mongo,
                    analytics=self.stores.analytics,
                    staging=self.staging,
                    settings=self.settings,
                )
            utterances = prepared.result()
        embedded = []
        # A shard is written to Milvus while the next one is embedded.
        for number, shard in enumerate(one_ahead(self._embed(shards))):
            embedded.append(shard)
            with self.stage("upsert_vectors", number) as report:
                upsert_vectors(report, shard, space=self.space, mongo=self.stores.mongo, vectors=self.stores.vectors)
        with self.stage("mirror_vectors") as report:
            mirror_vectors(
                report,
                shards,
                space=self.space,
                mongo=self.stores.mongo,
                analytics=self.stores.analytics,
                vectors=self.stores.vectors,
                cache=VectorCache(self.stores.cache.client, self.settings.vector_cache_days),
            )
        pages = [*self.detect_intents(embedded, utterances), *more_users]
        *_, learned = at_once(
            lambda: self.build_graph(pages),
            lambda: self.roll_up_engagement(pages),
            lambda: self._refresh_profiles(embedded, more_users),
            lambda: self.learn(pages, embedded),
        )
        self.publish(pages, learned)

    def embed_catalog(self) -> Ref:
        """The stage; returns the staged utterances."""
        staging = Staging(self.settings.staging_uri, self.run_id)  # of its own, so that its bytes are not another's
        with self._reported(staging, "embed_catalog") as report:
            return embed_catalog(report, catalog=self.catalog, space=self.space, staging=staging)

    def _embed(self, shards: list[Ref]) -> Iterator[Ref]:
        staging = Staging(self.settings.staging_uri, self.run_id)
        cache = VectorCache(self.stores.cache.client, self.settings.vector_cache_days)
        for number, shard in enumerate(shards):
            with self._reported(staging, "embed", number) as report:
                embedded = embed(report, shard, space=self.space, staging=staging, cache=cache)
            yield embedded

    def detect_intents(self, embedded: list[Ref], utterances: Ref) -> list[Ref]:
        """The stage; returns the pages of users to refresh."""
        with self.stage("detect_intents") as report:
            return detect_intents(
                report,
                embedded,
                utterances,
                catalog=self.catalog,
                space=self.space,
                mongo=self.stores.mongo,
                analytics=self.stores.analytics,
                vectors=self.stores.vectors,
                staging=self.staging,
                settings=self.settings,
            )

    def build_graph(self, pages: list[Ref]) -> None:
        """The stage, a page of users at a time."""
        mongo, analytics, graph = self.stores.mongo, self.stores.analytics, self.stores.graph
        for number, page in enumerate(pages):
            with self.stage("build_graph", number) as report:
                build_graph(report, page, mongo=mongo, analytics=analytics, graph=graph, settings=self.settings)

    def roll_up_engagement(self, pages: list[Ref]) -> None:
        """The stage."""
        with self.stage("roll_up_engagement") as report:
            roll_up_engagement(report, pages, analytics=self.stores.analytics, settings=self.settings)

    def _refresh_profiles(self, embedded: list[Ref], more_users: Sequence[Ref]) -> None:
        with self.stage("refresh_profiles") as report:
            refresh_profiles(
                report,
                embedded,
                more_users,
                space=self.space,
                mongo=self.stores.mongo,
                analytics=self.stores.analytics,
                vectors=self.stores.vectors,
                settings=self.settings,
            )

    def learn(self, pages: list[Ref], embedded: list[Ref]) -> bool:
        """The stage; says whether there is something to serve."""
        staging = Staging(self.settings.staging_uri, self.run_id)
        with self._reported(staging, "learn") as report:
            return learn(
                report,
                pages,
                embedded,
                catalog=self.catalog,
                space=self.space,
                analytics=self.stores.analytics,
                vectors=self.stores.vectors,
                staging=staging,
                settings=self.settings,
            )

    def publish(self, pages: list[Ref], learned: bool) -> None:
        """The stage."""
        with self.stage("publish") as report:
            publish(
                report,
                pages,
                learned,
                catalog=self.catalog,
                space=self.space,
                mongo=self.stores.mongo,
                vectors=self.stores.vectors,
                graph=self.stores.graph,
                analytics=self.stores.analytics,
                cache=self.stores.cache,
                staging=self.staging,
                settings=self.settings,
            )


def _files(path: str | PathLike[str] | None) -> list[UPath]:
    return [locate(str(path))] if path is not None else []


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    counts = ("rows_in", "rows_out", "rejected", "skipped", "seconds", "error", "details")
    return {"stage": row["stage"], "status": row["status"]} | {key: row[key] for key in counts if row.get(key)}
