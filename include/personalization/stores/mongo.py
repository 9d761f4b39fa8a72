"""MongoDB: the raw messages and events, the rows that were refused, which runs were published, and who was erased."""

import asyncio
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypedDict, cast

from bson.errors import InvalidDocument
from pymongo import AsyncMongoClient, MongoClient, ReplaceOne, ReturnDocument
from pymongo.collection import Collection as MongoCollection
from pymongo.errors import BulkWriteError, ConfigurationError, OperationFailure, PyMongoError

from personalization.errors import StoreError
from personalization.schemas import Acknowledgement, ErasedStore, Event, EventKind, erasure_id
from personalization.settings import Settings

Document = dict[str, Any]
RecordKind = Literal["message", "event"]

_FILES: dict[RecordKind, str] = {"message": "files", "event": "event_files"}
_BATCH = 1000
_LOOK_UP = 50  # ids at once: what SecantusDB takes for those it finds grows with the square
_PENDING_KEPT = 1000
_LONGEST_RUN = timedelta(days=2)  # what was opened longer ago and is not published is not at work
_SAID = ("who", "note", "at")
_PAGE_WAITS_MS = 2000
_DUPLICATE_KEY = 11000  # MongoDB's error code

InsertOutcome = Literal["accepted", "duplicate", "conflict", "erased"]
"""What became of an event: stored, known already, refused as its id is that of an event with other content, or
refused as its user was erased.
"""


class Origin(TypedDict):
    """Where a message or event came from."""

    run_id: str | None
    """The run that last took it; None for an event that waits for its first."""
    attempt: int
    """Of that run's task; 0 before the first."""
    source: Document
    """`{uri}`; from a file also `sha256` and `row`."""


class StoredRecord(Origin):
    """What must be known of a message or event that is already stored, when it comes again."""

    _id: str
    user_id: str
    content_hash: str


class TakenFile(NamedTuple):
    """A file of messages as a run took it to its end."""

    sha256: str
    rules: str
    """What decided whether a row was good."""
    at: datetime
    rows: int
    duplicates: int
    refused: list[int]
    """Numbers of the rows that were quarantined."""
    changed: int
    """Messages that the run had changed by then."""


class PastEventRow(NamedTuple):
    """An event of a user."""

    campaign_id: str
    event: EventKind
    timestamp: int
    """Epoch milliseconds."""


def event_document(event: Event, origin: Origin) -> Document:
    """An event as the collection `events` keeps it. With `run_id` None the next run takes it."""
    return {
        "_id": event.event_id,
        **event.model_dump(exclude={"event_id"}),
        "content_hash": event.content_hash,
        "received_at": datetime.now(UTC),
        **origin,
    }


@contextmanager
def mongo_errors() -> Iterator[None]:
    """Turn driver errors into a `StoreError` that names the store and no credential."""
    try:
        yield
    except OperationFailure as error:
        refused = error.code in (13, 18)
        problem = "refused the user name or password" if refused else f"refused the operation ({error.code})"
        raise StoreError("mongodb", f"{problem}; check MONGODB_URI or the connection mongo_default") from error
    except ConfigurationError as error:
        raise StoreError("mongodb", "MONGODB_URI is not a valid connection string") from error
    except InvalidDocument as error:
        raise StoreError("mongodb", f"refused a document ({error})") from error
    except PyMongoError as error:
        raise StoreError("mongodb", f"does not answer ({type(error).__name__}); is it running?") from error


def _client_options(settings: Settings) -> dict[str, Any]:
    timeout_ms = int(settings.store_timeout_s * 1000)
    return {
        "host": settings.mongodb_uri.get_secret_value(),
        "serverSelectionTimeoutMS": timeout_ms,
        "connectTimeoutMS": timeout_ms,
        "tz_aware": True,
    }


class MongoStore:
    """Raw messages (`conversations`) and `events`, refused rows (`quarantine`), published runs (`runs`), and the
    digests of erased users (`erasures`).
    """

    def __init__(self, client: MongoClient[Document], database: str) -> None:
        self.client = client
        # Journalled: an acknowledged message outlives a crash of the server.
        self._db = client.get_database(database)
        self.conversations = self._db["conversations"]
        self.events = self._db["events"]
        self.quarantine = self._db["quarantine"]
        self.runs = self._db["runs"]
        self.erasures = self._db["erasures"]
        self._records = {"message": self.conversations, "event": self.events}

    @classmethod
    def from_settings(cls, settings: Settings) -> "MongoStore":
        """Connect lazily, with the timeouts of the settings."""
        with mongo_errors():
            client: MongoClient[Document] = MongoClient(**_client_options(settings), appname="personalization")
        return cls(client, settings.mongodb_database)

    def ensure_schema(self) -> None:
        """Create the secondary indexes that reads rely on. Safe to repeat."""
        with mongo_errors():
            self.conversations.create_index([("user_id", 1), ("timestamp", -1)])
            self.events.create_index([("run_id", 1), ("_id", 1)])
            self.events.create_index([("user_id", 1), ("received_at", 1)])
            self.quarantine.create_index("run_id")
            self.quarantine.create_index("user_id")

    def stored(self, kind: RecordKind, ids: Sequence[str]) -> dict[str, StoredRecord]:
        """Look up messages or events by id, 50 a round trip."""
        fields = ("user_id", "content_hash", "run_id", "attempt", "source")
        return {one["_id"]: cast("StoredRecord", one) for one in self._by_id(self._records[kind], ids, fields)}

    def read(self, kind: RecordKind, ids: Sequence[str]) -> dict[str, Document]:
        """Whole messages or events by id; those that are gone are missing. One round trip; meant for few ids."""
        with mongo_errors():
            return {document["_id"]: document for document in self._records[kind].find({"_id": {"$in": list(ids)}})}

    def insert(self, kind: RecordKind, documents: Sequence[Document]) -> None:
        """Insert messages or events that no look-up found, which is a fifth of the work of a replacement.

        One round trip a call; a second replaces those that somebody else has stored since.
        """
        if not documents:
            return
        with mongo_errors():
            try:
                self._records[kind].insert_many(documents, ordered=False)
            except BulkWriteError as error:
                self._replace_all(self._records[kind], [documents[at] for at in _known_already(error)])

    def upsert(self, kind: RecordKind, documents: Sequence[Document]) -> None:
        """Insert or replace messages or events by `_id`. One round trip a call."""
        self._replace_all(self._records[kind], documents)

    def upsert_quarantine(self, documents: Sequence[Document]) -> None:
        """Keep refused rows by `_id` (file digest and row), so that a rerun adds none."""
        self._replace_all(self.quarantine, documents)

    def open_run(self, run_id: str) -> None:
        """Say that a run works on messages. One that is taken up again is not published any more."""
        with mongo_errors():
            opened = {"$set": {"opened_at": datetime.now(UTC)}, "$unset": {"model": "", "published_at": ""}}
            self.runs.update_one({"_id": run_id}, opened, upsert=True)

    def claim_events(self, run_id: str) -> None:
        """Make the events that no published run has taken the run's own: new ones of the API, and those of
        runs that broke off. One read and one write per 1,000; safe to repeat and to overlap.
        """
        not_published = {"published_at": {"$exists": False}, "_id": {"$ne": run_id}}
        with mongo_errors():
            broken_off = [run["_id"] for run in self.runs.find(not_published, {"_id": 1})]
            waiting = {"run_id": {"$in": [None, *broken_off]}}
            while ids := [one["_id"] for one in self.events.find(waiting, {"_id": 1}).limit(_BATCH)]:
                self.events.update_many({"_id": {"$in": ids}, **waiting}, {"$set": {"run_id": run_id}})
                if len(ids) < _BATCH:  # what arrives meanwhile is the next run's
                    return

    def events_of(self, run_id: str) -> Iterator[list[Document]]:
        """Yield the run's events by id, 1,000 a round trip, as they were when the first was asked for."""
        with mongo_errors(), self.events.find({"run_id": run_id}, batch_size=_BATCH).sort("_id", 1) as found:
            while page := list(islice(found, _BATCH)):
                yield page

    def record_files(self, kind: RecordKind, run_id: str, files: Sequence[Document], changed: int) -> None:
        """Remember which files of messages or events a run took, and how many that were stored it changed."""
        facts = {_FILES[kind]: list(files), f"{kind}s_changed": changed}
        with mongo_errors():
            self.runs.update_one({"_id": run_id}, {"$set": facts}, upsert=True)

    def publish_run(self, run_id: str, model: str, messages: int) -> None:
        """Mark a run's messages as processed in every store, and its files as taken; `messages` are stored now."""
        facts = {"model": model, "published_at": datetime.now(UTC), "messages": messages}
        with mongo_errors():
            self.runs.update_one({"_id": run_id}, {"$set": facts}, upsert=True)

    def file_as_taken(self, run_id: str, sha256: str, rules: str) -> TakenFile | None:
        """The file of messages as a published run took it, if each of its messages is still stored and done as then.

        That is so where the run took it by the same rules, no run since has changed a message or stopped before it was
        published, nobody was erased, and as many messages are stored as when a run was last published. Four small
        look-ups and the collection's counter.
        """
        with mongo_errors():
            taken_by = {"files.sha256": sha256, "published_at": {"$exists": True}}
            runs = list(self.runs.find(taken_by, {"files": 1, "messages_changed": 1}))
            files = [(run, TakenFile(**file["taken"])) for run in runs for file in run["files"] if "taken" in file]
            files = [(run, file) for run, file in files if (file.sha256, file.rules) == (sha256, rules)]
            if not files:
                return None
            by, newest = max(files, key=lambda one: one[1].at)
            at_work = {"published_at": {"$exists": False}, "opened_at": {"$gt": newest.at - _LONGEST_RUN}}
            since = {"_id": {"$nin": [run_id, by["_id"]]}, "$or": [{"published_at": {"$gt": newest.at}}, at_work]}
            others = self.runs.find(since, {"published_at": 1, "files": 1, "messages_changed": 1})
            unlike = any("published_at" not in one or one.get("messages_changed", "files" in one) for one in others)
            if unlike or by["messages_changed"] != newest.changed:
                return None
            if self.erasures.find_one({"requested_at": {"$gt": newest.at}}, {"_id": 1}) is not None:
                return None
            last = (
                self.runs.find({"published_at": {"$exists": True}}, {"messages": 1}).sort("published_at", -1).limit(1)
            )
            return newest if next(last).get("messages") == self.count_messages() else None

    def runs_published(self, run_ids: Iterable[str]) -> set[str]:
        """Which of the runs were published. A migration to another model takes along what any of them took."""
        query = {"_id": {"$in": sorted(set(run_ids))}, "published_at": {"$exists": True}}
        with mongo_errors():
            return {run["_id"] for run in self.runs.find(query, {"_id": 1})}

    def published_files(self, kind: RecordKind, fingerprints: Iterable[str]) -> set[str]:
        """Which of these file fingerprints a published run has taken."""
        wanted = list(fingerprints)
        field = _FILES[kind]
        with mongo_errors():
            query = {f"{field}.fingerprint": {"$in": wanted}, "published_at": {"$exists": True}}
            runs = self.runs.find(query, {f"{field}.fingerprint": 1})
            return {file["fingerprint"] for run in runs for file in run[field]} & set(wanted)

    def erased_among(self, user_ids: Iterable[str]) -> set[str]:
        """Those of the users who were erased: nothing of them may be written any more. One round trip."""
        digests = {erasure_id(user_id): user_id for user_id in user_ids}
        with mongo_errors():
            found = self.erasures.find({"_id": {"$in": list(digests)}}, {"_id": 1})
            return {digests[one["_id"]] for one in found}

    def request_erasure(self, user_id: str) -> Document:
        """Refuse the user from now on, and keep the name until the erasure is settled."""
        change = {"$set": {"user_id": user_id, "status": "pending"}, "$unset": {"settled_at": ""}}
        return self._change_erasure(user_id, change)

    def open_erasures(self) -> list[Document]:
        """Those that are not settled, the oldest first."""
        with mongo_errors():
            found = list(self.erasures.find({"user_id": {"$exists": True}}))
        return sorted(found, key=lambda one: one["requested_at"])

    def record_erasure(
        self, user_id: str, results: Mapping[ErasedStore, tuple[Mapping[str, int], int | None]]
    ) -> Document:
        """Keep what was removed (counts add up) and what remains in each store; None remains where that is unknown."""
        is_done = all(remaining == 0 for _, remaining in results.values())
        removed = {
            f"stores.{store}.removed.{name}": count
            for store, (counts, _) in results.items()
            for name, count in counts.items()
        }
        remaining = {f"stores.{store}.remaining": left for store, (_, left) in results.items()}
        change = {"$set": {"user_id": user_id, "status": "settling" if is_done else "pending", **remaining}}
        return self._change_erasure(user_id, {**change, "$inc": removed} if removed else change)

    def settle_erasure(self, user_id: str) -> Document:
        """Forget the name; the digest stays, so that the user is refused for good."""
        change = {"$set": {"status": "erased", "settled_at": datetime.now(UTC)}, "$unset": {"user_id": ""}}
        return self._change_erasure(user_id, change)

    def erase_user(self, user_id: str) -> dict[str, int]:
        """Delete what is the user's; return how much by collection. Of the refused rows that are not even JSON each is
        read, and goes if it seems to name the user.
        """
        with mongo_errors():
            return {
                collection.name: collection.delete_many(query).deleted_count
                for collection, query in self._of_user(user_id)
            }

    def count_user(self, user_id: str) -> int:
        """Messages, events and refused rows of the user."""
        with mongo_errors():
            return sum(collection.count_documents(query) for collection, query in self._of_user(user_id))

    def _of_user(self, user_id: str) -> list[tuple[MongoCollection[Document], Document]]:
        spelled = "|".join({re.escape(user_id), re.escape(json.dumps(user_id)[1:-1])})
        names_them = rf'"user_id"\s*:\s*"({spelled})"|(^|,)\s*({spelled})\s*(,|$)'
        refused = {"$or": [{"user_id": user_id}, {"user_id": None, "raw": {"$regex": names_them}}]}
        theirs = {"user_id": user_id}
        return [(self.conversations, theirs), (self.events, theirs), (self.quarantine, refused)]

    def _change_erasure(self, user_id: str, change: Document) -> Document:
        first = {"requested_at": datetime.now(UTC)}
        with mongo_errors():
            changed = self.erasures.find_one_and_update(
                {"_id": erasure_id(user_id)},
                {**change, "$setOnInsert": first},
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
        return cast("Document", changed)  # there, as it is made if need be

    def run_states(self) -> dict[str, tuple[str | None, datetime | None]]:
        """Of every run, the model it was published with and when; None where it is not published."""
        with mongo_errors():
            runs = self.runs.find({}, {"model": 1, "published_at": 1})
            return {one["_id"]: (one.get("model"), one.get("published_at")) for one in runs}

    def pages(self, kind: RecordKind, fields: Sequence[str]) -> Iterator[list[Document]]:
        """Yield these fields of all messages or events, in no order, 1,000 a page: one streamed read."""
        with mongo_errors(), self._records[kind].find({}, fields, batch_size=_BATCH) as found:
            while page := list(islice(found, _BATCH)):
                yield page

    def erased_digests(self) -> Iterator[list[str]]:
        """Yield the digests of all who were erased, 1,000 a page."""
        with mongo_errors(), self.erasures.find({}, {"_id": 1}, batch_size=_BATCH) as found:
            while page := [one["_id"] for one in islice(found, _BATCH)]:
                yield page

    def retake(self, kind: RecordKind, ids: Sequence[str], run_id: str | None, *, but_of: Collection[str] = ()) -> None:
        """Make messages or events the run's own, but those of some runs; with None, events wait for the next run.

        One write per 1,000.
        """
        with mongo_errors():
            for start in range(0, len(ids), _BATCH):
                some = {"_id": {"$in": list(ids[start : start + _BATCH])}, "run_id": {"$nin": list(but_of)}}
                self._records[kind].update_many(some, {"$set": {"run_id": run_id}})

    def texts(self, ids: Sequence[str]) -> dict[str, Document]:
        """`user_id, timestamp, message, content_hash` of messages by id, 50 a round trip; those that are gone are
        missing.
        """
        fields = ("user_id", "timestamp", "message", "content_hash")
        return {one["_id"]: one for one in self._by_id(self.conversations, ids, fields)}

    def messages(self, run_id: str, ids: Sequence[str]) -> list[Document]:
        """`_id, user_id, timestamp, message` of those of the messages that are the run's, 50 a round trip."""
        fields = ("user_id", "timestamp", "message")
        return list(self._by_id(self.conversations, ids, fields, {"run_id": run_id}))

    def users_among(self, user_ids: Sequence[str]) -> set[str]:
        """Those of the users who have a message or an event. Two reads of an index by user."""
        query = {"user_id": {"$in": list(user_ids)}}
        with mongo_errors():
            return {*self.conversations.distinct("user_id", query), *self.events.distinct("user_id", query)}

    def count_messages(self) -> int:
        """Number of stored messages, from the collection's own counter."""
        with mongo_errors():
            return self.conversations.estimated_document_count()

    def count_events(self) -> int:
        """Number of stored events, from the collection's own counter."""
        with mongo_errors():
            return self.events.estimated_document_count()

    @staticmethod
    def _by_id(
        collection: MongoCollection[Document], ids: Sequence[str], fields: Sequence[str], also: Document | None = None
    ) -> Iterator[Document]:
        """Fields of those of the documents that are there, and match `also`; 50 a round trip."""
        with mongo_errors():
            for start in range(0, len(ids), _LOOK_UP):
                query = {"_id": {"$in": list(ids[start : start + _LOOK_UP])}, **(also or {})}
                yield from collection.find(query, fields)

    @staticmethod
    def _replace_all(collection: Any, documents: Sequence[Document]) -> None:
        if documents:
            operations = [ReplaceOne({"_id": one["_id"]}, one, upsert=True) for one in documents]
            with mongo_errors():
                collection.bulk_write(operations, ordered=False)


class MongoReader:
    """What the dashboard shows of messages and refused rows. It only reads; each call is bounded and has a limit of
    time.
    """

    def __init__(self, client: MongoClient[Document], database: str) -> None:
        self.client = client
        db = client.get_database(database)
        self._records = {"message": db["conversations"], "event": db["events"]}
        self._quarantine = db["quarantine"]

    @classmethod
    def from_settings(cls, settings: Settings) -> "MongoReader":
        """Connect on first use. The timeout of the settings is that of a whole call."""
        options = _client_options(settings)
        with mongo_errors():
            client: MongoClient[Document] = MongoClient(
                **options, timeoutMS=options["connectTimeoutMS"], appname="personalization-dashboard"
            )
        return cls(client, settings.mongodb_database)

    def read(self, kind: RecordKind, ids: Sequence[str]) -> dict[str, Document]:
        """Whole messages or events by id; those that are gone are missing. One round trip; meant for few ids."""
        with mongo_errors():
            return {one["_id"]: one for one in self._records[kind].find({"_id": {"$in": list(ids)}})}

    def messages_of(self, user_id: str, limit: int, offset: int = 0) -> list[Document]:
        """The user's messages, newest first, from the given place on: off the index on user and time."""
        newest_first = [("user_id", 1), ("timestamp", -1)]
        with mongo_errors():
            found = self._records["message"].find({"user_id": user_id})
            return list(found.sort(newest_first).skip(offset).limit(limit))

    def refused_rows(self, run_id: str, limit: int, offset: int = 0) -> list[Document]:
        """Rows that the run was the last to refuse, in the order of their ids: off the index on the run."""
        with mongo_errors():
            return list(self._quarantine.find({"run_id": run_id}).sort("_id", 1).skip(offset).limit(limit))

    def refusal_reasons(self, run_id: str, rows: int, limit: int) -> list[Document]:
        """`{_id: reason, rows, file, row, raw}` with the first row of each reason, most frequent first, over so many
        of the rows that the run was the last to refuse.
        """
        first = {name: {"$first": f"${name}"} for name in ("file", "row", "raw")}
        stages: list[Document] = [
            {"$match": {"run_id": run_id}},
            {"$limit": rows},
            {"$group": {"_id": "$reason", "rows": {"$sum": 1}, **first}},
            {"$sort": {"rows": -1, "_id": 1}},
            {"$limit": limit},
        ]
        with mongo_errors():
            return list(self._quarantine.aggregate(stages))


class AcknowledgementStore:
    """What people said of anomalies, by the anomaly's id: all that the dashboard writes."""

    def __init__(self, client: MongoClient[Document], database: str) -> None:
        self.client = client
        self._acknowledgements = client.get_database(database)["acknowledgements"]

    @classmethod
    def from_settings(cls, settings: Settings) -> "AcknowledgementStore":
        """Connect on first use; a page waits for no more than two seconds."""
        options = {**_client_options(settings), "serverSelectionTimeoutMS": _PAGE_WAITS_MS}
        with mongo_errors():
            client: MongoClient[Document] = MongoClient(
                **options, timeoutMS=_PAGE_WAITS_MS, appname="personalization-dashboard"
            )
        return cls(client, settings.mongodb_database)

    def acknowledge(self, acknowledgements: Sequence[Acknowledgement]) -> None:
        """Insert or replace by the anomaly's id. One round trip."""
        operations = [
            ReplaceOne({"_id": one.anomaly_id}, one.model_dump(exclude={"anomaly_id"}), upsert=True)
            for one in acknowledgements
        ]
        if operations:
            with mongo_errors():
                self._acknowledgements.bulk_write(operations, ordered=False)

    def of(self, anomaly_ids: Sequence[str]) -> dict[str, Acknowledgement]:
        """Those of the anomalies, by id. One round trip a thousand."""
        found = {}
        with mongo_errors():
            for start in range(0, len(anomaly_ids), _BATCH):
                some = list(anomaly_ids[start : start + _BATCH])
                for one in self._acknowledgements.find({"_id": {"$in": some}}, batch_size=_BATCH):
                    found[one["_id"]] = Acknowledgement(anomaly_id=one["_id"], **{k: one[k] for k in _SAID})
        return found


class AsyncEventStore:
    """The API's side: takes events, and reads those that no run may have rolled up yet."""

    def __init__(self, client: AsyncMongoClient[Document], database: str) -> None:
        self.client = client
        db = client.get_database(database)
        self.events = db["events"]
        self.erasures = db["erasures"]

    @classmethod
    def from_settings(cls, settings: Settings) -> "AsyncEventStore":
        """Connect on first use. The timeout of the settings is that of a whole call."""
        options = _client_options(settings)
        with mongo_errors():
            client: AsyncMongoClient[Document] = AsyncMongoClient(
                **options, timeoutMS=options["connectTimeoutMS"], appname="personalization-api"
            )
        return cls(client, settings.mongodb_database)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.client.close()

    async def ping(self) -> None:
        """One round trip. Raises `StoreError` if MongoDB does not answer in time."""
        with mongo_errors():
            await self.client.admin.command("ping")

    async def insert(self, events: Sequence[Event]) -> list[InsertOutcome]:
        """Keep events for the next run; what became of each, in order.

        One that is known stays as it is, with the run that took it. Two round trips for up to 1,000: who was erased,
        and the insertion; a third where ids are known.
        """
        digests = {one.user_id: erasure_id(one.user_id) for one in events}
        outcomes: dict[int, InsertOutcome] = {}
        with mongo_errors():
            refused = self.erasures.find({"_id": {"$in": list(digests.values())}}, {"_id": 1}, batch_size=_BATCH)
            erased = {one["_id"] async for one in refused}
            for at, one in enumerate(events):
                outcomes[at] = "erased" if digests[one.user_id] in erased else "accepted"
            wanted = [at for at, outcome in outcomes.items() if outcome == "accepted"]
            known = await self._insert([events[at] for at in wanted])
            if known:
                ids = sorted({events[wanted[at]].event_id for at in known})
                stored = self.events.find({"_id": {"$in": ids}}, {"content_hash": 1}, batch_size=_BATCH)
                content = {one["_id"]: one["content_hash"] async for one in stored}
                for at in (wanted[one] for one in known):
                    is_same = content.get(events[at].event_id) == events[at].content_hash
                    outcomes[at] = "duplicate" if is_same else "conflict"
        return list(outcomes.values())

    async def pending_of(self, user_ids: Sequence[str], since_ms: int) -> dict[str, list[PastEventRow]]:
        """What was received of the users after `since_ms` that rules ask for; users without any are left out.

        Conversions and dismissals apart from impressions, of which there may be many; of each at most 1,000 times as
        many as there are users, the newest. Two round trips at once, and two ranges of an index for each user. Events
        are dated just before they are stored: `since_ms` should be a little early.
        """
        if not user_ids:
            return {}
        # For one user SecantusDB takes half the time by equality.
        who = user_ids[0] if len(user_ids) == 1 else {"$in": list(user_ids)}
        received = {"$gt": datetime.fromtimestamp(since_ms / 1000, UTC)}
        fields = {"_id": 0, "user_id": 1, "campaign_id": 1, "event": 1, "timestamp": 1}
        limit = _PENDING_KEPT * len(user_ids)
        found: dict[str, list[PastEventRow]] = {}
        with mongo_errors():
            parts = await asyncio.gather(
                *(
                    self.events.find({"user_id": who, "received_at": received, "event": kind}, fields)
                    .sort("received_at", -1)
                    .limit(limit)
                    .batch_size(limit)
                    .to_list()
                    for kind in ({"$in": ["conversion", "dismiss"]}, "impression")
                )
            )
        for one in chain(*parts):
            row = PastEventRow(one["campaign_id"], one["event"], int(one["timestamp"].timestamp() * 1000))
            found.setdefault(one["user_id"], []).append(row)
        return found

    async def _insert(self, events: Sequence[Event]) -> list[int]:
        """Insert those whose id is new; the places of the others."""
        if not events:
            return []
        origin: Origin = {"run_id": None, "attempt": 0, "source": {"uri": "api"}}
        try:
            await self.events.insert_many([event_document(one, origin) for one in events], ordered=False)
        except BulkWriteError as error:
            return _known_already(error)
        return []


def _known_already(error: BulkWriteError) -> list[int]:
    """The places of those that an insertion refused as their `_id` is known. Raises `error` if it says more."""
    refused = error.details["writeErrors"]
    if error.details["writeConcernErrors"] or any(one["code"] != _DUPLICATE_KEY for one in refused):
        raise error
    return [one["index"] for one in refused]
