"""Intents: what each message expresses, by a classifier fitted on the catalog's example utterances, else `other`."""

from collections.abc import Iterator
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import structlog
from upath import UPath

from personalization.catalog.loading import catalog_version, intents_version
from personalization.encoder import Vectors
from personalization.pipeline.embed import embeddings_of
from personalization.pipeline.lineage import StageReport
from personalization.schemas import OTHER_INTENT, Catalog, Ref, VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging, read, write_atomically
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import MESSAGES, VectorStore
from personalization.stores.mongo import MongoStore
from personalization.understanding import CLASSIFIER_VERSION
from personalization.understanding.classifier import IntentClassifier

log = structlog.get_logger(__name__)


def detect_intents(
    report: StageReport,
    shards: list[Ref],
    utterances: Ref,
    *,
    catalog: Catalog,
    space: VectorSpace,
    mongo: MongoStore,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    staging: Staging,
    settings: Settings,
) -> list[Ref]:
    """Set the intents of the run's messages; return the users to refresh, as pages of `user_id`.

    After an edit of the catalog all users are refreshed, and if its intents changed, all messages are
    classified again from their stored vectors, without embedding them again.
    """
    classifier = fitted_classifier(utterances)
    run_id = report.run_id
    built = analytics.serving_state()
    intents_changed = built is None or built.intents_version != intents_version(catalog, space, settings)
    if intents_changed:
        for known in analytics.all_messages(settings.shard_rows):
            log.info(f"the catalog's intents changed: classifying {len(known):,} stored messages again")
            _keep(report, mongo, analytics, _with_vectors(known, space, vectors), classifier, settings.intent_keep)
    for shard in shards:
        table = read(shard)
        messages = table.select(["id", "user_id", "timestamp"]).to_pylist()
        of_run = [{**message, "run_id": run_id} for message in messages]
        _keep(report, mongo, analytics, (of_run, embeddings_of(table)), classifier, settings.intent_keep)

    catalog_changed = intents_changed or built is None or built.catalog_version != catalog_version(catalog)
    pages = analytics.users(None if catalog_changed else run_id, settings.shard_rows)
    refs = _stage_pages(pages, staging)
    report.details = {"users": sum(ref["rows"] for ref in refs), "catalog_changed": catalog_changed}
    return refs


def fitted_classifier(utterances: Ref) -> IntentClassifier:
    """The classifier of the staged utterances: fitted once, then kept beside them for all runs."""
    staged = UPath(utterances["uri"])
    kept = staged.with_name(f"{staged.stem}-{utterances['sha256'][:16]}-classifier-{CLASSIFIER_VERSION}.npz")
    if kept.exists():
        try:
            return IntentClassifier.from_bytes(kept.read_bytes())
        except (ValueError, KeyError, BadZipFile) as error:
            log.warning(f"{kept} is not readable and is made anew: {error}")
    examples = read(utterances)
    classifier = IntentClassifier.fit(examples.column("intent_id").to_pylist(), embeddings_of(examples))
    write_atomically(kept, classifier.to_bytes())
    log.info(f"classifier of {len(classifier.intent_ids)} intents fitted on {examples.num_rows:,} utterances")
    return classifier


def _keep(
    report: StageReport,
    mongo: MongoStore,
    analytics: AnalyticsStore,
    batch: tuple[list[dict[str, Any]], Vectors],
    classifier: IntentClassifier,
    keep: float,
) -> None:
    messages, matrix = batch
    report.rows_in += len(messages)
    if erased := mongo.erased_among({message["user_id"] for message in messages}):
        left = [at for at, message in enumerate(messages) if message["user_id"] not in erased]
        report.skipped += len(messages) - len(left)
        messages, matrix = [messages[at] for at in left], matrix[left]
    if not messages:
        return
    readings = classifier.classify(matrix, keep)
    rows = [
        {
            "message_id": message["id"],
            "intent_id": intent_id,
            "user_id": message["user_id"],
            "timestamp": message["timestamp"],
            "confidence": confidence,
            "run_id": message["run_id"],
        }
        for message, reading in zip(messages, readings, strict=True)
        for intent_id, confidence in reading.expressed or [(OTHER_INTENT, reading.out_of_scope)]
    ]
    analytics.replace_message_intents([message["id"] for message in messages], rows)
    others = sum(not reading.expressed for reading in readings)
    report.rows_out += len(messages) - others
    report.skipped += others


def _with_vectors(
    messages: list[dict[str, Any]], space: VectorSpace, vectors: VectorStore
) -> tuple[list[dict[str, Any]], Vectors]:
    by_id = {message["id"]: message for message in messages}
    found = [row for rows in vectors.vectors(space.collection(MESSAGES), list(by_id)) for row in rows]
    matrix = np.asarray([row["embedding"] for row in found], dtype=np.float32).reshape(len(found), space.dim)
    return [by_id[row["id"]] for row in found], matrix


def _stage_pages(pages: Iterator[list[str]], staging: Staging) -> list[Ref]:
    return [
        staging.write(f"users/{number:06d}.parquet", pa.table({"user_id": page})) for number, page in enumerate(pages)
    ]
