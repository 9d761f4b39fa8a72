"""The pipeline's tasks: each a stage with the clients of its stores.

Imports are inside, so that parsing the DAG loads no driver; torch comes with the first text encoded.
"""

from collections.abc import Sequence
from typing import Any

from personalization.schemas import Ref


def of_all_shards(given: Sequence[Ref] | Ref | None) -> list[Ref]:
    """What the tasks of a mapped group returned: Airflow hands over None of no task, and of one its value as it is."""
    if given is None:
        return []
    return [given] if isinstance(given, dict) else list(given)


def prepare() -> None:
    """Make the stores ready and bring the catalog into them."""
    from personalization.pipeline import prepare as stages
    from personalization.pipeline.spaces import live_space
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import graph_store, vector_store

    with (
        stage("prepare") as s,
        vector_store() as vectors,
        graph_store(s.settings) as graph,
        analytics_store(s.settings) as analytics,
    ):
        stages.prepare(
            s.report,
            catalog=s.take_catalog(),
            space=s.take_space(live_space(analytics, vectors, s.settings)),
            vectors=vectors,
            graph=graph,
            analytics=analytics,
            settings=s.settings,
        )


def ingest(input_path: str, events_path: str) -> list[Ref]:
    """Take the named file of messages, or, where no file is named, the inbox's new ones; return the staged shards."""
    from personalization.pipeline import ingest, taking

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import mongo_store

    with stage("ingest") as s, mongo_store(s.settings) as mongo:
        by_hand = bool(input_path or events_path)
        files = taking.select_files("message", input_path, by_hand=by_hand, inbox_uri=s.settings.inbox_uri, mongo=mongo)
        return ingest.ingest(
            s.report,
            files=files,
            skip_bad_files=not input_path,
            mongo=mongo,
            staging=s.staging,
            settings=s.settings,
        )


def ingest_events(input_path: str, events_path: str) -> None:
    """Take the named file of events, or, where no file is named, the inbox's new ones; and those of the API."""
    from personalization.pipeline import events, taking
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import mongo_store

    with stage("ingest_events") as s, mongo_store(s.settings) as mongo, analytics_store(s.settings) as analytics:
        by_hand = bool(input_path or events_path)
        events.ingest_events(
            s.report,
            files=taking.select_files(
                "event", events_path, by_hand=by_hand, inbox_uri=s.settings.inbox_uri, mongo=mongo
            ),
            skip_bad_files=not events_path,
            mongo=mongo,
            analytics=analytics,
            staging=s.staging,
            settings=s.settings,
        )


def embed_catalog() -> Ref:
    """Embed the catalog's example utterances, once a catalog and model."""
    from personalization.pipeline import embed

    from personalization_airflow.stage import stage

    with stage("embed_catalog") as s:
        return embed.embed_catalog(s.report, catalog=s.catalog, space=s.space, staging=s.staging)


def embed(shard: Ref) -> Ref:
    """Embed one shard of messages."""
    from personalization.pipeline import embed

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import vector_cache

    with stage("embed") as s, vector_cache(s.settings) as cache:
        return embed.embed(s.report, shard, space=s.space, staging=s.staging, cache=cache)


def upsert_vectors(shard: Ref) -> None:
    """Write one shard's vectors to Milvus."""
    from personalization.pipeline import vectors

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import mongo_store, vector_store

    with stage("upsert_vectors") as s, mongo_store(s.settings) as mongo, vector_store() as store:
        vectors.upsert_vectors(s.report, shard, space=s.space, mongo=mongo, vectors=store)


def mirror_vectors(shards: list[Ref]) -> None:
    """Embed the shards for the other vector spaces that are kept up to date; nothing where there is none."""
    from personalization.pipeline import mirror
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import mongo_store, vector_cache, vector_store

    with (
        stage("mirror_vectors") as s,
        mongo_store(s.settings) as mongo,
        analytics_store(s.settings) as analytics,
        vector_store() as store,
        vector_cache(s.settings) as cache,
    ):
        mirror.mirror_vectors(
            s.report,
            shards,
            space=s.space,
            mongo=mongo,
            analytics=analytics,
            vectors=store,
            cache=cache,
        )


def detect_intents(shards: Sequence[Ref] | Ref | None, utterances: Ref) -> list[Ref]:
    """Find what each message expresses; return the users to refresh, in pages."""
    from personalization.pipeline import intents
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import mongo_store, vector_store

    with (
        stage("detect_intents") as s,
        mongo_store(s.settings) as mongo,
        analytics_store(s.settings) as analytics,
        vector_store() as vectors,
    ):
        return intents.detect_intents(
            s.report,
            of_all_shards(shards),
            utterances,
            catalog=s.catalog,
            space=s.space,
            mongo=mongo,
            analytics=analytics,
            vectors=vectors,
            staging=s.staging,
            settings=s.settings,
        )


def build_graph(user_page: Ref) -> None:
    """Write what one page of users expressed and engaged with to Neo4j."""
    from personalization.pipeline import graph
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import graph_store, mongo_store

    with (
        stage("build_graph") as s,
        mongo_store(s.settings) as mongo,
        analytics_store(s.settings) as analytics,
        graph_store(s.settings) as store,
    ):
        graph.build_graph(s.report, user_page, mongo=mongo, analytics=analytics, graph=store, settings=s.settings)


def roll_up_engagement(user_pages: list[Ref]) -> None:
    """Set the users' engagement and the campaigns' totals."""
    from personalization.pipeline import engagement
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import stage

    with stage("roll_up_engagement") as s, analytics_store(s.settings) as analytics:
        engagement.roll_up_engagement(s.report, user_pages, analytics=analytics, settings=s.settings)


def refresh_profiles(embedded: Sequence[Ref] | Ref | None) -> None:
    """Set the users' vectors from those of their messages."""
    from personalization.pipeline import vectors
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import mongo_store, vector_store

    with (
        stage("refresh_profiles") as s,
        mongo_store(s.settings) as mongo,
        analytics_store(s.settings) as analytics,
        vector_store() as store,
    ):
        vectors.refresh_profiles(
            s.report,
            of_all_shards(embedded),
            space=s.space,
            mongo=mongo,
            analytics=analytics,
            vectors=store,
            settings=s.settings,
        )


def learn(user_pages: list[Ref], embedded: Sequence[Ref] | Ref | None = None) -> bool:
    """Draw what is known of the campaigns, and fit the ranker."""
    from personalization.pipeline import learn
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import vector_store

    with stage("learn") as s, analytics_store(s.settings) as analytics, vector_store() as vectors:
        return learn.learn(
            s.report,
            user_pages,
            of_all_shards(embedded),
            catalog=s.catalog,
            space=s.space,
            analytics=analytics,
            vectors=vectors,
            staging=s.staging,
            settings=s.settings,
        )


def publish(user_pages: list[Ref], learned: bool) -> None:
    """Make the run's data what is served."""
    from airflow.sdk import get_current_context
    from personalization.pipeline import publish
    from personalization.stores.analytics import analytics_store

    from personalization_airflow import assets
    from personalization_airflow.stage import stage
    from personalization_airflow.stores import (
        cache_publisher,
        graph_store,
        mongo_store,
        vector_store,
    )

    with (
        stage("publish") as s,
        mongo_store(s.settings) as mongo,
        vector_store() as vectors,
        graph_store(s.settings) as graph,
        analytics_store(s.settings) as analytics,
        cache_publisher() as cache,
    ):
        publish.publish(
            s.report,
            user_pages,
            learned,
            catalog=s.catalog,
            space=s.space,
            mongo=mongo,
            vectors=vectors,
            graph=graph,
            analytics=analytics,
            cache=cache,
            staging=s.staging,
            settings=s.settings,
        )
        get_current_context()["outlet_events"][assets.SERVING].extra = dict(s.report.details)


def check() -> list[Ref]:
    """See that what is served can move to the model of the params; return the shards that are still to be filled."""
    from airflow.sdk import get_current_context
    from personalization.migration import check as checking

    from personalization_airflow.stage import migration

    params = get_current_context()["params"]
    with migration("check") as (s, scene):
        target = s.take_space(checking.target_of(scene, params["model"], params["dim"]))
        shards = checking.check(s.report, target, scene)
        s.keep_catalog(scene.catalog())
        return shards


def fill(shard: Ref) -> None:
    """Embed one shard of messages by the new model."""
    from personalization.migration import fill

    from personalization_airflow.stage import migration

    with migration("fill") as (s, scene):
        fill.fill(s.report, shard, s.space, scene)


def catch_up() -> None:
    """Embed what came in meanwhile, drop what is gone, and make the users' vectors."""
    from personalization.migration import fill

    from personalization_airflow.stage import migration

    with migration("catch_up") as (s, scene):
        fill.catch_up(s.report, s.space, scene)


def verify() -> dict[str, Any]:
    """Compare the new vectors with MongoDB and with those that are served; fails where they must not be."""
    from airflow.sdk import get_current_context
    from personalization.migration import verify

    from personalization_airflow.stage import migration

    params = get_current_context()["params"]
    bounds = verify.Bounds(**{name: params[name] for name in ("min_overlap", "max_intent_loss", "max_ndcg_loss")})
    with migration("verify") as (s, scene):
        return verify.verify(s.report, s.space, bounds, scene)


def swap() -> None:
    """Serve by the new vectors, in one step."""
    from personalization.migration import swap

    from personalization_airflow.stage import migration

    with migration("swap") as (s, scene):
        swap.swap(s.report, s.space, scene)


def finish() -> dict[str, Any]:
    """Drop the vectors beside those that are served; return how many messages they were of."""
    from personalization.migration import swap

    from personalization_airflow.stage import migration

    with migration("finish") as (s, scene):
        swap.finish(s.report, scene)
        return s.report.details


def evaluate() -> dict[str, Any]:
    """Replay the last weeks of what the stores hold; return each policy's NDCG@10. Skipped with too little feedback."""
    from airflow.sdk import get_current_context
    from airflow.sdk.exceptions import AirflowSkipException
    from personalization.errors import TooLittleFeedbackError
    from personalization.evaluation.policies import STANDARD
    from personalization.evaluation.recording import Request, evaluate_stores
    from personalization.pipeline.spaces import live_space
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import stage
    from personalization_airflow.stores import vector_store

    params = get_current_context()["params"]
    request = Request(params["task"], params["split_days"], params["weeks"], params["policies"] or STANDARD)
    with stage("evaluate") as s, analytics_store(s.settings) as analytics, vector_store() as vectors:
        try:
            report = evaluate_stores(
                s.report,
                request,
                catalog=s.take_catalog(),
                space=s.take_space(live_space(analytics, vectors, s.settings)),
                analytics=analytics,
                vectors=vectors,
                staging=s.staging,
                settings=s.settings,
            )
        except TooLittleFeedbackError as error:
            report, reason = None, str(error)
    if report is None:
        raise AirflowSkipException(reason)
    return {policy: entry["ndcg@10"] for policy, entry in report["policies"].items()}


def sweep_erasures() -> dict[str, int]:
    """Go on with the erasures that are open; return how many were, and how many of them are settled."""
    from personalization.erasure.sweep import sweep

    from personalization_airflow.stage import run_settings
    from personalization_airflow.stores import places

    with places(run_settings()) as stores:
        receipts = sweep(stores)
    return {"open": len(receipts), "settled": sum(one.settled_at is not None for one in receipts)}


def audit_stores() -> dict[str, int]:
    """Compare the stores, with `repair` mend them; fails where drift is left, which no retry would change.

    Returns the cases found, by kind.
    """
    from airflow.sdk import get_current_context
    from airflow.sdk.exceptions import AirflowFailException
    from personalization.audit.command import audit

    from personalization_airflow.stage import run_settings
    from personalization_airflow.stores import all_stores, places

    context = get_current_context()
    settings = run_settings()
    with all_stores(settings) as stores, places(settings) as erasing:
        report = audit(
            stores,
            settings,
            places=erasing,
            repair=bool(context["params"]["repair"]),
            audit_id=str(context["run_id"]),
        )
    if report.status == "drift":
        left = [one for one in report.findings if one.left != 0]
        words = "; ".join(f"{one.kind.title}: {one.count if one.left is None else one.left:,}" for one in left)
        raise AirflowFailException(f"the stores do not agree. {words}. The dashboard's page Audit says what to do")
    return {one.kind.name: one.count for one in report.findings}


def watch_api() -> dict[str, int]:
    """Keep what the API's counters rose by; return the requests since the last time, and what was odd today.

    An API that does not answer is an anomaly, and fails the task once a day, so that people are told once.
    """
    from datetime import UTC, datetime

    from airflow.sdk import get_current_context
    from airflow.sdk.exceptions import AirflowSkipException
    from personalization.errors import StoreError
    from personalization.quality import scrape, traffic
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import run_settings

    settings = run_settings()
    now = datetime.now(UTC)
    instance = get_current_context()["ti"]
    with analytics_store(settings) as analytics:
        try:
            reading = scrape.read_api(settings)
        except StoreError as error:
            is_last = instance.try_number > instance.max_tries
            if is_last and not traffic.record_silence(analytics, now, str(error)):
                raise AirflowSkipException(f"still: {error}") from error
            raise
        requests = scrape.keep(analytics, reading, now)
        return {"requests": requests, "anomalies": len(traffic.record_bursts(analytics, now))}


def record_lineage(*, of_migration: bool = False) -> str:
    """Write what every stage and attempt did to the analytics database, whatever became of the run; sum it up."""
    from airflow.sdk import get_current_context
    from personalization.pipeline import lineage
    from personalization.quality import anomalies
    from personalization.staging import Staging
    from personalization.stores.analytics import analytics_store

    from personalization_airflow.stage import failed_tasks, run_settings

    context = get_current_context()
    run_id = str(context["run_id"])
    settings = run_settings()
    with analytics_store(settings) as analytics:
        rows = lineage.record_lineage(
            run_id,
            Staging(settings.staging_uri, run_id),
            analytics,
            stages=lineage.MIGRATION_STAGES if of_migration else lineage.STAGES,
            failed_tasks=failed_tasks(context),
        )
        if not of_migration:  # there are too few to say what is usual
            anomalies.record_anomalies(analytics, [run_id])
    summary = lineage.run_summary(rows)
    context["summary"] = summary  # type: ignore[typeddict-unknown-key]
    return summary
