"""MongoDB: the raw messages, the rows that were refused, and which runs were published."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypedDict

from bson.errors import InvalidDocument
from pymongo import MongoClient, ReplaceOne
from pymongo.errors import ConfigurationError, OperationFailure, PyMongoError

from personalization.errors import StoreError
from personalization.settings import Settings

Document = dict[str, Any]


class StoredMessage(TypedDict):
    """What ingest must know of a message that is already stored."""

    _id: str
    user_id: str
    content_hash: str
    run_id: str
    attempt: int
    source: Document


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


class MongoStore:
    """Raw messages (`conversations`), refused rows (`quarantine`) and published runs (`runs`)."""

    def __init__(self, client: MongoClient[Document], database: str) -> None:
        self.client = client
        # Journalled: an acknowledged message outlives a crash of the server.
        self._db = client.get_database(database)
        self.conversations = self._db["conversations"]
        self.quarantine = self._db["quarantine"]
        self.runs = self._db["runs"]

    @classmethod
    def from_settings(cls, settings: Settings) -> "MongoStore":
        """Connect lazily, with the timeouts of the settings."""
        timeout_ms = int(settings.store_timeout_s * 1000)
        with mongo_errors():
            client: MongoClient[Document] = MongoClient(
                settings.mongodb_uri.get_secret_value(),
                serverSelectionTimeoutMS=timeout_ms,
                connectTimeoutMS=timeout_ms,
                tz_aware=True,
                appname="personalization",
            )
        return cls(client, settings.mongodb_database)

    def ensure_schema(self) -> None:
        """Create the secondary indexes that reads rely on. Safe to repeat."""
        with mongo_errors():
            self.conversations.create_index([("user_id", 1), ("timestamp", -1)])
            self.quarantine.create_index("run_id")

    def stored_messages(self, message_ids: Sequence[str]) -> dict[str, StoredMessage]:
        """Look up messages by id. One round trip; costs grow with `len(message_ids)`."""
        fields = {"user_id": 1, "content_hash": 1, "run_id": 1, "attempt": 1, "source": 1}
        with mongo_errors():
            found = self.conversations.find({"_id": {"$in": list(message_ids)}}, fields)
            return {document["_id"]: document for document in found}  # type: ignore[misc]

    def upsert_messages(self, documents: Sequence[Document]) -> None:
        """Insert or replace messages by `_id`. One round trip a call."""
        self._replace_all(self.conversations, documents)

    def upsert_quarantine(self, documents: Sequence[Document]) -> None:
        """Keep refused rows by `_id` (file digest and row), so that a rerun adds none."""
        self._replace_all(self.quarantine, documents)

    def open_run(self, run_id: str) -> None:
        """Say that a run works on messages. One that is taken up again is not published any more."""
        with mongo_errors():
            not_published = {"$unset": {"model": "", "published_at": ""}}
            self.runs.update_one({"_id": run_id}, not_published, upsert=True)

    def record_files(self, run_id: str, files: Sequence[Document]) -> None:
        """Remember which files a run took."""
        with mongo_errors():
            self.runs.update_one({"_id": run_id}, {"$set": {"files": list(files)}}, upsert=True)

    def publish_run(self, run_id: str, model: str) -> None:
        """Mark a run's messages as processed in every store, and its files as taken."""
        facts = {"model": model, "published_at": datetime.now(UTC)}
        with mongo_errors():
            self.runs.update_one({"_id": run_id}, {"$set": facts}, upsert=True)

    def runs_published_with(self, model: str, run_ids: Iterable[str]) -> set[str]:
        """Which of the runs were published with this embedding model."""
        query = {"_id": {"$in": sorted(set(run_ids))}, "model": model}
        with mongo_errors():
            return {run["_id"] for run in self.runs.find(query, {"_id": 1})}

    def published_files(self, fingerprints: Iterable[str]) -> set[str]:
        """Which of these file fingerprints a published run has taken."""
        wanted = list(fingerprints)
        with mongo_errors():
            query = {"files.fingerprint": {"$in": wanted}, "published_at": {"$exists": True}}
            runs = self.runs.find(query, {"files.fingerprint": 1})
            return {file["fingerprint"] for run in runs for file in run["files"]} & set(wanted)

    def count_messages(self) -> int:
        """Number of stored messages, from the collection's own counter."""
        with mongo_errors():
            return self.conversations.estimated_document_count()

    @staticmethod
    def _replace_all(collection: Any, documents: Sequence[Document]) -> None:
        if documents:
            operations = [ReplaceOne({"_id": one["_id"]}, one, upsert=True) for one in documents]
            with mongo_errors():
                collection.bulk_write(operations, ordered=False)
