"""Evidence: what each store holds, streamed into scratch, and what of it is at rest.

What is derived is read before what it is derived from. So a message that a run brings in meanwhile is known by the time
its vector or edge is judged, and none is taken for an orphan. What was taken by a run that is at work, or was published
only after the audit began, is *in flux*: it is read, but not judged.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import select

from personalization.audit.scratch import Row, Scratch
from personalization.catalog.loading import catalog_version, intents_version
from personalization.errors import StoreError
from personalization.pipeline.lineage import LONGEST_TASK, StageReport
from personalization.pipeline.spaces import live_space
from personalization.recommend.knowledge import ServedKnowledge
from personalization.schemas import OTHER_INTENT, Engagement, VectorSpace, erasure_id
from personalization.settings import Settings
from personalization.staging import Staging, staging_errors
from personalization.stores.milvus import INTERESTS, MESSAGES, USERS, Vectors
from personalization.stores.tables import CampaignRecord, CampaignTarget, EventRecord, MessageIntent, UserEngagement
from personalization.stores.together import Stores
from personalization.understanding.reader import IntentReader, Reading

REPAIR_RUN = "repair__"
"""How the ids of runs of a repair begin."""
SETTLED, IN_FLUX, LEFT_BEHIND = "settled", "in flux", "left behind"
NORM_TOLERANCE = 1e-3
"""How far from 1 a length may be: thousands of times float32's rounding, a quarter of bfloat16's."""
_SURE_TOLERANCE = 1e-3
_NUDGE = 1e-5
"""Another batch rounds a vector's products otherwise by less than this; what tips over by it is no drift."""
_QUIET = timedelta(hours=1)
"""Longer than any pause between the tasks of a run, retries included."""
_USERS_AT_ONCE = 1000
_PUBLISHES = 200

_TABLES = {
    "messages": "id TEXT, user_id TEXT, at INTEGER, run_id TEXT",
    "events": "id TEXT, user_id TEXT, value TEXT, run_id TEXT",
    "runs": "run_id TEXT PRIMARY KEY, for_messages TEXT, for_events TEXT",
    "vectors": "id TEXT, user_id TEXT, at INTEGER",
    "kept_vectors": "id TEXT, user_id TEXT",
    "profiles": "id TEXT, user_id TEXT, last_seen INTEGER",
    "intents": "id TEXT, user_id TEXT, at INTEGER, run_id TEXT",
    "sql_events": "id TEXT, user_id TEXT, value TEXT",
    "nodes": "user_id TEXT",
    "expressed_edges": "id TEXT, user_id TEXT, value TEXT",
    "expressed": "id TEXT, user_id TEXT, value TEXT",
    "engaged_edges": "id TEXT, user_id TEXT, value TEXT",
    "engaged": "id TEXT, user_id TEXT, value TEXT",
    "engagement_rows": "id TEXT, user_id TEXT, value TEXT",
    "engagement": "id TEXT, user_id TEXT, value TEXT",
    "catalog_graph": "id TEXT, value TEXT",
    "catalog_sql": "id TEXT, value TEXT",
    "catalog_served": "id TEXT, value TEXT",
    "answers": "id TEXT, user_id TEXT, generation INTEGER",
    "erased": "digest TEXT PRIMARY KEY",
    "erasing": "user_id TEXT PRIMARY KEY",
    "drift": "kind TEXT, id TEXT, user_id TEXT, expected TEXT, found TEXT",
}
_GONE = "none"


@dataclass
class Evidence:
    """What was read, beside the rows in scratch."""

    scratch: Scratch
    compared: dict[str, dict[str, int]] = field(default_factory=dict)
    in_flux: int = 0
    is_catalog_in_flux: bool = False
    """A run at work applies another catalog: all that is derived by it is about to change."""
    has_published: bool = False
    keeps: VectorSpace | None = None
    """A former vector space that is kept for a way back. One that is being filled is not compared."""
    serves: ServedKnowledge | None = None
    """What is served, where it is of the catalog and the version of now."""
    serving_problem: str | None = None

    def drift(self, kind: str, rows: Sequence[Row]) -> None:
        """Keep cases of `(id, user_id, expected, found)`."""
        self.scratch.fill("drift", [[(kind, *row) for row in rows]])

    def count(self, store: str, what: str, rows: int) -> None:
        """Say how much was read."""
        self.compared.setdefault(store, {})[what] = rows


class Reader:
    """Reads all stores once."""

    def __init__(self, scratch: Scratch, stores: Stores, settings: Settings, *, repairs: bool) -> None:
        self._scratch = scratch
        self._stores = stores
        self._settings = settings
        self._repairs = repairs
        self._space = live_space(stores.analytics, stores.vectors, settings)
        self.evidence = Evidence(scratch)

    def steps(self) -> Iterator[str]:
        """Do the work, a store's part at a time; yield what comes next. The order matters, see above."""
        for name, columns in _TABLES.items():
            self._scratch.table(name, columns)
        began = self._stores.mongo.run_states()
        self.evidence.has_published = any(published_at for _, published_at in began.values())
        served_before = self._read_serving()
        generations = self._stores.analytics.latest_generations(_PUBLISHES)
        yield "Redis"
        self._read_cache(max(generations, default=None))
        yield "Neo4j"
        self._read_graph()
        yield "Milvus"
        self._read_vectors()
        self._read_kept()
        self._read_profiles()
        yield "SQL"
        self._read_sql()
        self._read_engagement()
        yield "MongoDB"
        self._read_mongo()
        self._settle(began, served_before)

    # --- what is served

    def _read_serving(self) -> tuple[str, str, str] | None:
        """What the published data are said to be built from, and whether the knowledge that is served is of that."""
        state = self._stores.analytics.serving_state()
        content = self._stores.analytics.served_content()
        if state is None or content is None:
            self.evidence.serving_problem = "nothing is served"
            return None
        versions = (state.catalog_version, state.intents_version, state.run_id)
        if self._stores.analytics.served_at() is None:
            self.evidence.serving_problem = "what was published last is not announced"
        try:
            served = ServedKnowledge.from_bytes(content)
        except StoreError:
            self.evidence.serving_problem = "what is served is of another version of the platform"
            return versions
        if catalog_version(served.catalog) == state.catalog_version:
            self.evidence.serves = served
        elif not state.catalog_version:
            self.evidence.serving_problem = "a run has applied a catalog and has not published"
        else:
            self.evidence.serving_problem = "what is served is not of the catalog that was published"
        return versions

    def _read_cache(self, recorded: int | None) -> None:
        cache = self._stores.cache
        self.evidence.count("redis", "answers", self._scratch.fill("answers", cache.answers()))
        generation = cache.generation()  # behind the answers: none of them may be of a later one
        if recorded is not None and (generation is None or generation < recorded):
            found = _GONE if generation is None else str(generation)
            self.evidence.drift("generation_stale", [("generation", None, f"{recorded} or later", found)])
        self._scratch.run(
            """INSERT INTO drift SELECT 'answer_of_no_generation', id, user_id, ?, coalesce(generation, 'no number')
               FROM answers WHERE generation IS NULL OR generation > ?""",
            f"{generation or 0} or before",
            generation or 0,
        )

    # --- derived: graph, vectors, SQL

    def _read_graph(self) -> None:
        graph, fill, count = self._stores.graph, self._scratch.fill, self.evidence.count
        nodes = graph.pages("MATCH (u:User) RETURN u.user_id")
        count("neo4j", "users", fill("nodes", nodes))
        expressed = graph.pages(
            "MATCH (u:User)-[e:EXPRESSED]->(i:Intent) RETURN u.user_id, i.intent_id, e.count, e.last_seen"
        )
        count("neo4j", "expressed", fill("expressed_edges", (_pairs(page) for page in expressed)))
        engaged = graph.pages(
            "MATCH (u:User)-[g:ENGAGED_WITH]->(c:Campaign) RETURN u.user_id, c.campaign_id, g.count, g.last_at"
        )
        count("neo4j", "engaged", fill("engaged_edges", (_pairs(page) for page in engaged)))
        campaigns = graph.pages(
            "MATCH (c:Campaign) RETURN c.campaign_id, c.name, c.category, c.active_from, c.active_until"
        )
        rows = fill("catalog_graph", ([_campaign(*row) for row in page] for page in campaigns))
        targets = graph.pages("MATCH (c:Campaign)-[:TARGETS]->(i:Intent) RETURN c.campaign_id, i.intent_id")
        rows += fill("catalog_graph", ([_target(*row) for row in page] for page in targets))
        count("neo4j", "catalog", rows)

    def _read_vectors(self) -> None:
        """Message vectors: whose they are, whether they are unit vectors, and what the served classifier reads."""
        if not self._is_readable(MESSAGES):
            return
        reader = self._classifier()
        fields = ("id", "user_id", "timestamp", "embedding")
        rows = 0
        for page in self._stores.vectors.pages(self._space.collection(MESSAGES), fields):
            matrix, problems = _judged(page)
            columns = [(one["id"], one["user_id"], one["timestamp"] // 1000) for one in page]
            rows += self._scratch.fill("vectors", [columns])
            self.evidence.drift(
                "vector_invalid",
                [
                    (one["id"], one["user_id"], "unit length", problems[at])
                    for at, one in enumerate(page)
                    if problems[at]
                ],
            )
            if reader is not None:
                sound = [at for at in range(len(page)) if not problems[at]]
                self._read_intents(reader, [page[at] for at in sound], matrix[sound])
        self.evidence.count("milvus", "vectors", rows)

    def _read_kept(self) -> None:
        """The ids of a former space's message vectors."""
        spaces = self._stores.analytics.spaces()
        self.evidence.keeps = next((space for space, state in spaces.items() if state == "kept"), None)
        if self.evidence.keeps is None:
            return
        pages = self._stores.vectors.pages(self.evidence.keeps.collection(MESSAGES), ("id", "user_id"))
        rows = self._scratch.fill("kept_vectors", ([(one["id"], one["user_id"]) for one in page] for page in pages))
        self.evidence.count("milvus", "kept vectors", rows)

    def _read_intents(self, reader: IntentReader, messages: Sequence[dict[str, Any]], matrix: Vectors) -> None:
        """Compare the stored intents of a page of messages with what the classifier reads now."""
        stored = self._stores.analytics.intents_of([one["id"] for one in messages])
        keep = self._settings.intent_keep
        readings = [_expressed(one) for one in reader.classify(matrix, keep)]
        suspects = [
            at for at, one in enumerate(messages) if one["id"] in stored and not _agree(readings[at], stored[one["id"]])
        ]
        if not suspects:
            return
        nudged = [reader.classify(matrix[suspects] * np.float32(1 + by), keep) for by in (-_NUDGE, _NUDGE)]
        cases = []
        for place, at in enumerate(suspects):
            one = messages[at]
            if not any(_agree(_expressed(other[place]), stored[one["id"]]) for other in nudged):
                cases.append((one["id"], one["user_id"], _words(readings[at]), _words(stored[one["id"]])))
        self.evidence.drift("intents_differ", cases)

    def _classifier(self) -> IntentReader | None:
        """That of what is served, where all messages were classified with it."""
        state, serves = self._stores.analytics.serving_state(), self.evidence.serves
        if serves is None or state is None:
            return None
        is_current = state.intents_version == intents_version(serves.catalog, self._space, self._settings)
        return serves.classifier if is_current and serves.space == self._space else None

    def _read_profiles(self) -> None:
        rows = 0
        for alias, user in ((USERS, "id"), (INTERESTS, "user_id")):
            if not self._is_readable(alias):
                continue
            fields = tuple(dict.fromkeys(("id", user, "last_seen", "embedding")))
            for page in self._stores.vectors.pages(self._space.collection(alias), fields):
                _, problems = _judged(page)
                named = [(f"{alias}/{one['id']}", one[user], one["last_seen"] // 1000) for one in page]
                rows += self._scratch.fill("profiles", [named])
                self.evidence.drift(
                    "profile_invalid",
                    [
                        (named[at][0], named[at][1], "unit length", problems[at])
                        for at in range(len(page))
                        if problems[at]
                    ],
                )
        self.evidence.count("milvus", "profiles", rows)

    def _is_readable(self, alias: str) -> bool:
        if (problem := self._stores.vectors.problem_of(alias, self._space)) is None:
            return True
        if self.evidence.has_published:
            self.evidence.drift("collection_wrong", [(alias, None, self._space.collection(alias), problem)])
        return False

    def _read_sql(self) -> None:
        pages, fill, count = self._stores.analytics.pages, self._scratch.fill, self.evidence.count
        intents = select(
            MessageIntent.message_id, MessageIntent.user_id, MessageIntent.timestamp // 1000, MessageIntent.run_id
        ).distinct()
        count("analytics", "messages", fill("intents", pages(intents)))
        names = ("event_id", "user_id", "campaign_id", "event", "timestamp", "position", "policy", "propensity")
        rows_of_events = pages(select(*(getattr(EventRecord, name) for name in names)))
        events = ([_event(row[0], dict(zip(names, row, strict=True))) for row in page] for page in rows_of_events)
        count("analytics", "events", fill("sql_events", events))
        campaigns = select(
            CampaignRecord.campaign_id,
            CampaignRecord.name,
            CampaignRecord.category,
            CampaignRecord.active_from,
            CampaignRecord.active_until,
        )
        targets = select(CampaignTarget.campaign_id, CampaignTarget.intent_id)
        rows = fill("catalog_sql", ([_campaign(*row) for row in page] for page in pages(campaigns)))
        rows += fill("catalog_sql", ([_target(*row) for row in page] for page in pages(targets)))
        count("analytics", "catalog", rows)
        if self.evidence.serves is not None:
            served = self.evidence.serves.catalog.campaigns
            nodes = [
                _campaign(one.id, one.name, one.category, one.active_from_ms, one.active_until_ms) for one in served
            ]
            fill("catalog_served", [nodes, [_target(one.id, intent) for one in served for intent in one.intents]])

    def _read_engagement(self) -> None:
        """What `message_intents` and `events` make of each user, as the pipeline itself sums it up."""
        analytics, fill = self._stores.analytics, self._scratch.fill
        stored = select(UserEngagement.__table__)
        names = [column.name for column in UserEngagement.__table__.columns]
        rows = (
            [_engagement(Engagement(**dict(zip(names, row, strict=True)))) for row in page]
            for page in analytics.pages(stored)
        )
        self.evidence.count("analytics", "engagement", fill("engagement_rows", rows))
        campaigns = {row[0] for page in analytics.pages(select(CampaignRecord.campaign_id)) for row in page}
        half_life = self._settings.profile_half_life_days
        for users in analytics.users(None, _USERS_AT_ONCE):
            expressed = analytics.expressed_intents(users, half_life)
            fill("expressed", [_pairs([(one.user_id, one.intent_id, one.count, one.last_seen) for one in expressed])])
            engagement = analytics.engagement(users, half_life)
            fill("engagement", [[_engagement(one) for one in engagement]])
            edges = [one for one in engagement if one.signals and one.campaign_id in campaigns]
            fill("engaged", [_pairs([(one.user_id, one.campaign_id, one.signals, one.weight_at) for one in edges])])
        totals = analytics.wrong_totals()
        self.evidence.drift("campaign_totals_differ", [(name, None, right, wrong) for name, right, wrong in totals])

    # --- the source of truth

    def _read_mongo(self) -> None:
        mongo, fill, count = self._stores.mongo, self._scratch.fill, self.evidence.count
        messages = (
            [(one["_id"], one["user_id"], int(one["timestamp"].timestamp()), one["run_id"]) for one in page]
            for page in mongo.pages("message", ("user_id", "timestamp", "run_id"))
        )
        count("mongodb", "messages", fill("messages", messages))
        fields = ("user_id", "campaign_id", "event", "timestamp", "position", "policy", "propensity", "run_id")
        events = (
            [
                # As the pipeline does, to the last millisecond.
                (*_event(one["_id"], one | {"timestamp": int(one["timestamp"].timestamp() * 1000)}), one["run_id"])
                for one in page
            ]
            for page in mongo.pages("event", fields)
        )
        count("mongodb", "events", fill("events", events))
        fill("erased", ([(one,) for one in page] for page in mongo.erased_digests()))
        fill("erasing", [[(one["user_id"],) for one in mongo.open_erasures()]])
        self._scratch.function("erasure_id", erasure_id)

    def _settle(
        self, began: dict[str, tuple[str | None, datetime | None]], served_before: tuple[str, str, str] | None
    ) -> None:
        """Say of every run whether what it took is at rest."""
        rows = []
        at_work = False
        for run_id, (model, published_at) in self._stores.mongo.run_states().items():
            if published_at is not None and began.get(run_id) == (model, published_at):
                rows.append((run_id, SETTLED, SETTLED))
            elif published_at is not None or self._is_at_work(run_id):  # published meanwhile
                at_work = True
                rows.append((run_id, IN_FLUX, IN_FLUX))
            else:
                rows.append((run_id, LEFT_BEHIND, IN_FLUX))  # the next run claims events by itself
        self._scratch.fill("runs", [rows])
        state = self._stores.analytics.serving_state()
        served = (state.catalog_version, state.intents_version, state.run_id) if state else None
        is_between = state is None or not state.catalog_version or not state.intents_version
        self.evidence.is_catalog_in_flux = is_between or served != served_before
        if at_work:
            self.evidence.serving_problem = None
        [(self.evidence.in_flux,)] = self._scratch.rows(
            "SELECT count(*) FROM messages JOIN runs USING (run_id) WHERE for_messages = ?", IN_FLUX
        )

    def _is_at_work(self, run_id: str) -> bool:
        """Whether a run may still go on: one of its tasks says so, or was at work a short while ago.

        A repair that was killed is known by another repair to be over: there is one at a time.
        """
        if self._repairs and run_id.startswith(REPAIR_RUN):
            return False
        folder = Staging(self._settings.staging_uri, run_id).root / "reports"
        now = time.time()
        with staging_errors():
            if not folder.exists():
                return False
            ages = {path: now - path.stat().st_mtime for path in folder.glob("*.json")}
            if any(age < _QUIET.total_seconds() for age in ages.values()):
                return True
            recent = [path for path, age in ages.items() if age < LONGEST_TASK.total_seconds()]
            return any(StageReport.model_validate_json(path.read_bytes()).status == "running" for path in recent)


def _judged(page: Sequence[dict[str, Any]]) -> tuple[Vectors, list[str | None]]:
    """The page's vectors, and what is wrong with each."""
    matrix = np.asarray([one["embedding"] for one in page], dtype=np.float32)
    norms = np.linalg.norm(matrix, axis=1)
    sound = np.abs(norms - 1) <= NORM_TOLERANCE  # false for what is no number
    return matrix, [
        None if good else "zero" if norm == 0 else f"length {norm:.4f}"
        for good, norm in zip(sound.tolist(), norms.tolist(), strict=True)
    ]


def _expressed(reading: Reading) -> dict[str, float]:
    return dict(reading.expressed) or {OTHER_INTENT: reading.out_of_scope}


def _agree(read: dict[str, float], stored: dict[str, float]) -> bool:
    return read.keys() == stored.keys() and all(abs(read[one] - stored[one]) <= _SURE_TOLERANCE for one in read)


def _words(intents: dict[str, float]) -> str:
    return ", ".join(f"{intent} {sure:.3f}" for intent, sure in sorted(intents.items()))


def _pairs(rows: Sequence[Sequence[Any]]) -> list[Row]:
    """Edges as (user, other end, count, moment)."""
    return [(f"{user} → {other}", user, f"count {count}, last {_moment(at)}") for user, other, count, at in rows]


def _engagement(row: Engagement) -> Row:
    """All that is counted or dated. A weight depends on the half-life that was set when it was made."""
    counted = row.model_dump(exclude={"user_id", "campaign_id", "weight"})
    dated = {name: _moment(value) if name.endswith("_at") else value for name, value in counted.items() if value}
    words = ", ".join(f"{name} {value}" for name, value in dated.items())
    return f"{row.user_id} → {row.campaign_id}", row.user_id, words or "nothing"


def _moment(epoch_ms: Any) -> str:
    """To the millisecond, UTC; what is none, as it is: a store may hold anything."""
    try:
        return datetime.fromtimestamp(epoch_ms / 1000, UTC).isoformat(" ", "milliseconds").removesuffix("+00:00")
    except (TypeError, ValueError, OverflowError, OSError):
        return str(epoch_ms)


def _event(event_id: str, row: Mapping[str, Any]) -> Row:
    who, when = f"{row['user_id']} {row['event']} {row['campaign_id']}", f"at {_moment(row['timestamp'])}"
    return event_id, row["user_id"], f"{who} {when}, place {row['position']} of {row['policy']}, {row['propensity']}"


def _campaign(campaign_id: str, name: str, category: str, active_from: int, active_until: int) -> Row:
    return campaign_id, f"{name} ({category}) from {active_from} until {active_until}"


def _target(campaign_id: str, intent_id: str) -> Row:
    return f"{campaign_id} → {intent_id}", "targets"
