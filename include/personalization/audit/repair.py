"""Repair: what has drifted is made anew from MongoDB, by the pipeline's own stages.

Orphans are deleted first. Then one run of the pipeline takes the messages and events that something is missing or wrong
of, and refreshes their users and those whose derived data differ. Every step may be repeated: what a repair that was
killed had taken belongs to a run that was never published, and the next repair takes it again.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import structlog

from personalization.audit.evidence import IN_FLUX, REPAIR_RUN
from personalization.audit.findings import KINDS, Remedy
from personalization.audit.scratch import Scratch
from personalization.catalog.loading import load_catalog
from personalization.pipeline.ingest import MESSAGE_SCHEMA
from personalization.pipeline.lineage import StageReport, record_lineage
from personalization.pipeline.run import Run
from personalization.pipeline.spaces import live_space
from personalization.schemas import Ref
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.milvus import INTERESTS, MESSAGES, USERS, interest_id
from personalization.stores.together import Stores

_RERUN: tuple[Remedy, ...] = ("messages", "events", "users", "catalog", "publish", "delete")
"""Remedies that take a run of the pipeline: what is deleted leaves users to refresh."""
_INTERESTS_ONCE = 100
"""More than anybody ever had."""

log = structlog.get_logger(__name__)


def repair(scratch: Scratch, stores: Stores, settings: Settings, *, erase: Callable[[str], object]) -> str | None:
    """Mend what `drift` holds; return the id of the run that did, None where none was needed.

    Costs what is in `drift`: look-ups and deletes by id, 1,000 a round trip, and a run of the pipeline over the
    messages and users concerned, which also learns and publishes.

    Raises:
        PersonalizationError: a stage failed. What was done stays done, and a repeat goes on.
    """
    remedies = {KINDS[kind].remedy for (kind,) in scratch.rows("SELECT DISTINCT kind FROM drift")} - {None}
    work = _Repair(scratch, stores, settings)
    for (user_id,) in scratch.rows("SELECT DISTINCT user_id FROM drift WHERE kind = 'erased_user_left'"):
        erase(user_id)
    run_id = None
    if remedies & set(_RERUN):
        work.delete_orphans()
        run_id = work.run()
    if remedies - {"erase"}:
        work.begin_generation()  # also where the run itself found nothing new: what was cached is of before
    return run_id


class _Repair:
    def __init__(self, scratch: Scratch, stores: Stores, settings: Settings) -> None:
        self._scratch = scratch
        self._stores = stores
        self._settings = settings
        self._space = live_space(stores.analytics, stores.vectors, settings)
        self._run_id = f"{REPAIR_RUN}{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}_{uuid.uuid4().hex[:8]}"
        self._staging = Staging(settings.staging_uri, self._run_id)

    def begin_generation(self) -> None:
        """One that was never before: beyond what lineage and the cached answers say."""
        [(newest,)] = self._scratch.rows("SELECT coalesce(max(generation), 0) FROM answers")
        began = max(self._stores.analytics.latest_generations(1000), default=0)
        generation = self._stores.cache.begin_generation(max(newest, began) + 1)
        log.info(f"repair: serving generation {generation} begins")

    def delete_orphans(self) -> None:
        """Delete what is of no message, no event and no user; asks MongoDB again right before."""
        mongo, vectors, analytics = self._stores.mongo, self._stores.vectors, self._stores.analytics
        for ids in self._ids("vector_without_message"):
            vectors.delete(self._space.collection(MESSAGES), _left(ids, mongo.stored("message", ids)))
        kept = [space for space, state in analytics.spaces().items() if state == "kept"]
        for ids in self._ids("kept_vector_without_message"):
            for space in kept:
                vectors.delete(space.collection(MESSAGES), _left(ids, mongo.stored("message", ids)))
        for ids in self._ids("intents_without_message"):
            analytics.replace_message_intents(_left(ids, mongo.stored("message", ids)), [])
        for ids in self._ids("event_without_source"):
            analytics.delete_events(_left(ids, mongo.stored("event", ids)))
        for user_ids in self._users():
            if strangers := _left(user_ids, mongo.users_among(user_ids)):
                self._forget(strangers)
        # A node with an edge twice is made anew: to set both would leave both.
        twice = "kind IN ('expressed_differs', 'engaged_differs') AND found LIKE '% rows'"
        for user_ids in self._users(twice):
            self._stores.graph.delete_users(user_ids)

    def run(self) -> str:
        """A run of the pipeline over what is concerned."""
        catalog = load_catalog(self._settings.catalog_path)
        run = Run(self._run_id, self._settings, self._staging, self._stores, catalog)
        try:
            with run.stage("prepare") as report:
                run.prepare(report)
            events = self._with_remedy("events")
            for ids in self._pages(f"SELECT DISTINCT id FROM drift WHERE kind IN ({events})"):  # noqa: S608
                self._stores.mongo.retake("event", ids, None, but_of=self._at_work())
            run.stages(self._take, more_users=self._stage_users())
            self._stores.analytics.refresh_campaign_totals()
        finally:
            record_lineage(self._run_id, self._staging, self._stores.analytics)
        return self._run_id

    def _take(self, report: StageReport) -> list[Ref]:
        """The stage `ingest`, but from MongoDB: stage the messages that something is missing or wrong of."""
        mongo = self._stores.mongo
        mongo.open_run(self._run_id)
        refs: list[Ref] = []
        kinds = self._with_remedy("messages")
        query = f"SELECT DISTINCT id FROM drift WHERE kind IN ({kinds})"  # noqa: S608
        for ids in self._pages(query, self._settings.shard_rows):
            messages = []
            for at in range(0, len(ids), 1000):
                some = ids[at : at + 1000]
                mongo.retake("message", some, self._run_id, but_of=self._at_work())
                messages += mongo.messages(self._run_id, some)
            report.rows_in += len(ids)
            if messages:
                refs.append(self._stage(f"messages/{len(refs):06d}.parquet", messages))
        report.rows_out = sum(ref["rows"] for ref in refs)
        report.skipped = report.rows_in - report.rows_out
        return refs

    def _stage(self, name: str, messages: Sequence[dict[str, Any]]) -> Ref:
        columns = {
            "id": [one["_id"] for one in messages],
            "user_id": [one["user_id"] for one in messages],
            "timestamp": [int(one["timestamp"].timestamp() * 1000) for one in messages],
            "text": [one["message"] for one in messages],
        }
        return self._staging.write(name, pa.table(columns, schema=MESSAGE_SCHEMA))

    def _stage_users(self) -> list[Ref]:
        """Pages of the users concerned, but those that MongoDB does not know."""
        refs = []
        for number, user_ids in enumerate(self._users(rows=self._settings.shard_rows)):
            known = sorted(
                one
                for at in range(0, len(user_ids), 1000)
                for one in self._stores.mongo.users_among(user_ids[at : at + 1000])
            )
            if known:
                refs.append(self._staging.write(f"users/repaired-{number:06d}.parquet", pa.table({"user_id": known})))
        return refs

    def _forget(self, user_ids: list[str]) -> None:
        """Take users nobody knows out of the graph, the profiles and the engagement."""
        vectors = self._stores.vectors
        self._stores.graph.delete_users(user_ids)
        vectors.delete(self._space.collection(USERS), user_ids)
        interests = [interest_id(one, place) for one in user_ids for place in range(_INTERESTS_ONCE)]
        vectors.delete(self._space.collection(INTERESTS), interests)
        self._stores.analytics.roll_up_engagement(user_ids, self._settings.profile_half_life_days)

    def _at_work(self) -> list[str]:
        """Runs whose messages and events are theirs: they do what a repair would."""
        judged = dict(self._scratch.rows("SELECT run_id, for_messages FROM runs"))
        open_runs = [run_id for run_id, (_, at) in self._stores.mongo.run_states().items() if at is None]
        return [run_id for run_id in open_runs if run_id != self._run_id and judged.get(run_id, IN_FLUX) == IN_FLUX]

    def _users(self, where: str = "kind <> 'erased_user_left'", rows: int = 1000) -> Iterator[list[str]]:
        """Users of the drift, and those whom a vector or row was of that is another's."""
        users = [f"SELECT user_id FROM drift WHERE {where}"]  # noqa: S608
        users += [
            f"SELECT user_id FROM {table} WHERE id IN (SELECT id FROM drift WHERE {where})"  # noqa: S608
            for table in ("vectors", "intents", "sql_events")
        ]
        return self._pages(f"SELECT user_id FROM ({' UNION '.join(users)}) WHERE user_id IS NOT NULL", rows)  # noqa: S608

    def _ids(self, kind: str) -> Iterator[list[str]]:
        return self._pages(f"SELECT DISTINCT id FROM drift WHERE kind = '{kind}'")  # noqa: S608

    def _pages(self, query: str, rows: int = 1000) -> Iterator[list[str]]:
        return ([one for (one,) in page] for page in self._scratch.pages(query, rows=rows))

    @staticmethod
    def _with_remedy(remedy: Remedy) -> str:
        return ", ".join(f"'{one.name}'" for one in KINDS.values() if one.remedy == remedy)


def _left(ids: Sequence[str], known: Any) -> list[str]:
    return [one for one in ids if one not in known]
