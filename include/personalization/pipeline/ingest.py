"""Ingest: validate rows, quarantine the bad ones, keep the good ones in MongoDB, stage what is to do.

What is to do: messages that are new or changed, and those no published run has processed. So a file taken again costs
little, where nothing became of it since a few look-ups in all, and a failed run heals.
"""

from collections.abc import Sequence

import pyarrow as pa
import structlog
from upath import UPath

from personalization.pipeline.lineage import StageReport, code_version, forget_reports
from personalization.pipeline.taking import Taker
from personalization.reading import Row
from personalization.schemas import Message, Ref
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.mongo import Document, MongoStore, Origin, TakenFile

MESSAGE_SCHEMA = pa.schema(
    [("id", pa.string()), ("user_id", pa.string()), ("timestamp", pa.int64()), ("text", pa.string())]
)

log = structlog.get_logger(__name__)


def ingest(
    report: StageReport,
    *,
    files: Sequence[UPath],
    skip_bad_files: bool,
    mongo: MongoStore,
    staging: Staging,
    settings: Settings,
) -> list[Ref]:
    """Take the files and return the staged shards: `id, user_id, timestamp (epoch ms), text`.

    Per 1,000 rows: one look-up of users, 20 of ids, and one bulk write where anything is new. Memory is bounded by
    the shard.

    Raises:
        InputError: a file cannot be taken, or too many of its rows; see `Taker.take`.
        StoreError: MongoDB.
    """
    forget_reports(staging, report.run_id, first_stage="embed")
    mongo.ensure_schema()
    if files:
        mongo.open_run(report.run_id)
    taker = MessageTaker(report, mongo, settings)
    shards = _ShardWriter(staging, settings.shard_rows)
    for messages in taker.take(files, skip_bad_files=skip_bad_files):
        shards.add(messages)
    refs = shards.close()
    report.rows_out = sum(ref["rows"] for ref in refs)
    if not refs:
        log.info("nothing new: no file to take" if not files else "nothing new: every message is already processed")
    return refs


class MessageTaker(Taker[Message]):
    """Takes messages."""

    kind = "message"

    def parse(self, row: Row) -> Message | str:
        """Validate the message; it may be as long as the settings say."""
        message = Message.model_validate(row.value)
        if len(message.message) > self._settings.max_message_chars:
            longest = self._settings.max_message_chars
            return f"message: is {len(message.message):,} characters long, more than {longest:,}"
        return message

    def identify(self, record: Message) -> str:
        """Given or derived."""
        return record.message_id

    def document(self, record: Message, origin: Origin) -> Document:
        """As in the collection `conversations`."""
        return {
            "_id": record.message_id,
            **record.model_dump(exclude={"message_id"}),
            "content_hash": record.content_hash,
            **origin,
        }

    @property
    def rules(self) -> str:
        """The platform's version, and the longest message."""
        return f"{code_version(self._settings)}, {self._settings.max_message_chars} characters"

    def as_taken(self, sha256: str) -> TakenFile | None:
        """Not where this run may have changed messages itself."""
        if self._report.attempt > 1 or self._outcomes["changed"]:
            return None
        return self._mongo.file_as_taken(self._report.run_id, sha256, self.rules)


class _ShardWriter:
    """Collects messages and stages them `shard_rows` at a time."""

    def __init__(self, staging: Staging, shard_rows: int) -> None:
        self._staging = staging
        self._shard_rows = shard_rows
        self._waiting: list[Message] = []
        self._refs: list[Ref] = []

    def add(self, messages: list[Message]) -> None:
        self._waiting += messages
        while len(self._waiting) >= self._shard_rows:
            self._write(self._shard_rows)

    def close(self) -> list[Ref]:
        if self._waiting:
            self._write(len(self._waiting))
        return self._refs

    def _write(self, count: int) -> None:
        shard, self._waiting = self._waiting[:count], self._waiting[count:]
        columns = {
            "id": [one.message_id for one in shard],
            "user_id": [one.user_id for one in shard],
            "timestamp": [one.timestamp_ms for one in shard],
            "text": [one.message for one in shard],
        }
        table = pa.table(columns, schema=MESSAGE_SCHEMA)
        self._refs.append(self._staging.write(f"messages/{len(self._refs):06d}.parquet", table))
