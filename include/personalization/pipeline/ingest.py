"""Ingest: validate rows, quarantine the bad ones, keep the good ones in MongoDB, stage what is to do.

What is to do: messages that are new or changed, and those no published run has processed with this
embedding model. So a file taken again costs one look-up a batch, and a failed run heals.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import structlog
from pydantic import ValidationError
from upath import UPath

from personalization.errors import InputError, RejectRatioExceededError
from personalization.pipeline.lineage import StageReport, forget_reports
from personalization.reading import Row, check_readable, file_digest, locate, read_rows
from personalization.schemas import Message, Ref
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.mongo import MongoStore, StoredMessage

MESSAGE_SCHEMA = pa.schema(
    [("id", pa.string()), ("user_id", pa.string()), ("timestamp", pa.int64()), ("text", pa.string())]
)

_BATCH_ROWS = 1000
_PROGRESS_ROWS = 10_000
_INBOX_SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
_MAX_RAW_BYTES = 12 * 2**20  # a MongoDB document holds at most 16 MiB
_BATCH_CHARS = 16 * 2**20
_REASONS_KEPT = 3

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """An input file, by its place and its content."""

    path: UPath
    sha256: str

    @classmethod
    def of(cls, path: UPath) -> "SourceFile":
        """Check that the file can be read, and digest it."""
        check_readable(path)
        return cls(path, file_digest(path))


def select_files(input_path: str | None, *, inbox_uri: str, mongo: MongoStore) -> list[UPath]:
    """The named file, or those of the inbox that no published run has taken yet, by name.

    Files that are still being written are expected under a name that starts with a dot.
    """
    if input_path:
        return [locate(input_path)]
    inbox = UPath(inbox_uri).absolute()
    if not inbox.exists():
        return []
    waiting = {
        _fingerprint(path): path
        for path in sorted(inbox.iterdir(), key=str)
        if path.is_file() and path.name.endswith(_INBOX_SUFFIXES) and not path.name.startswith(".")
    }
    taken = mongo.published_files(waiting)
    return [path for fingerprint, path in waiting.items() if fingerprint not in taken]


def ingest(
    report: StageReport,
    *,
    files: Sequence[UPath],
    skip_bad_files: bool,
    model: str,
    mongo: MongoStore,
    staging: Staging,
    settings: Settings,
) -> list[Ref]:
    """Take the files and return the staged shards: `id, user_id, timestamp (epoch ms), text`.

    Per 1,000 rows: one look-up, and one bulk write where anything is new. Memory is bounded by the shard.
    With `skip_bad_files`, a file that cannot be taken is quarantined as such and the others go on.

    Raises:
        InputError: a file cannot be taken, or not to its end; what came before is kept.
        RejectRatioExceededError: more than `max_reject_ratio` of the rows were quarantined.
        StoreError: MongoDB.
    """
    forget_reports(staging, report.run_id)
    mongo.ensure_schema()
    if files:
        mongo.open_run(report.run_id)
    taker = _Taker(report, model, mongo, settings)
    shards = _ShardWriter(staging, settings.shard_rows)
    report.details["files"] = []
    for path in files:
        try:
            _take_file(path, taker, shards, report)
        except InputError as error:
            if not skip_bad_files:
                raise
            taker.refuse_file(path, str(error))
    refs = shards.close()
    report.rows_out = sum(ref["rows"] for ref in refs)
    report.details |= dict(taker.outcomes)
    if report.rows_in and report.rejected / report.rows_in > settings.max_reject_ratio:
        raise RejectRatioExceededError(_reject_summary(report, files, taker.reasons, settings))
    if files:
        mongo.record_files(report.run_id, report.details["files"])
    if not refs:
        log.info("nothing new: no file to take" if not files else "nothing new: every message is already processed")
    return refs


def _take_file(path: UPath, taker: "_Taker", shards: "_ShardWriter", report: StageReport) -> None:
    source = SourceFile.of(path)
    report.details["files"].append({"uri": str(path), "sha256": source.sha256, "fingerprint": _fingerprint(path)})
    for batch in _batches(read_rows(path)):
        shards.add(taker.take(source, batch))
        if report.rows_in % _PROGRESS_ROWS == 0:
            log.info(f"{path.name}: {report.rows_in:,} rows read, {report.rejected:,} rejected")


class _Taker:
    """Sorts rows into accepted, repeated and refused, and keeps them in MongoDB."""

    def __init__(self, report: StageReport, model: str, mongo: MongoStore, settings: Settings) -> None:
        self._report = report
        self._model = model
        self._mongo = mongo
        self._max_chars = settings.max_message_chars
        self._published: dict[str, bool] = {}
        self.outcomes: Counter[str] = Counter(new=0, changed=0, unchanged=0, duplicates=0, resumed=0)
        self.reasons: dict[str, int] = {}
        """The first few reasons, each with the row it was first met in."""

    def take(self, source: SourceFile, rows: list[Row]) -> list[Message]:
        """Process one batch; return the messages that later stages have to work on."""
        self._report.rows_in += len(rows)
        messages: dict[str, tuple[Row, Message]] = {}
        refused: list[tuple[Row, str]] = []
        for row in rows:
            message = self._validate(row)
            if isinstance(message, str):
                refused.append((row, message))
            elif message.message_id not in messages:
                messages[message.message_id] = (row, message)
            elif messages[message.message_id][1].content_hash == message.content_hash:
                self.outcomes["duplicates"] += 1
            else:
                refused.append((row, _conflict(message, messages[message.message_id][0].number)))

        stored = self._mongo.stored_messages(list(messages))
        self._learn_published(one["run_id"] for one in stored.values())
        to_do: list[tuple[Row, Message]] = []
        for message_id, (row, message) in messages.items():
            outcome = self._compare(source, row, message, stored.get(message_id))
            if outcome in self.outcomes:
                self.outcomes[outcome] += 1
                if outcome in ("new", "changed", "resumed"):
                    to_do.append((row, message))
            else:
                refused.append((row, outcome))

        self._mongo.upsert_messages([self._document(source, row, message) for row, message in to_do])
        self._quarantine(source, refused)
        self._report.skipped = self.outcomes["unchanged"] + self.outcomes["duplicates"]
        return [message for _, message in to_do]

    def refuse_file(self, path: UPath, problem: str) -> None:
        """Quarantine what is wrong with a file as its row 0. It counts as taken until it is replaced."""
        log.error(problem)
        known = {file["uri"] for file in self._report.details["files"]}
        fingerprint = _fingerprint(path)
        if str(path) not in known:
            self._report.details["files"].append({"uri": str(path), "sha256": None, "fingerprint": fingerprint})
        self._report.rows_in += 1
        self._quarantine(SourceFile(path, sha256=fingerprint), [(Row(0, raw=""), problem)])

    def _validate(self, row: Row) -> Message | str:
        if row.problem is not None:
            return row.problem
        if not isinstance(row.value, dict):
            return f"is not an object but {type(row.value).__name__}"
        try:
            message = Message.model_validate(row.value)
        except ValidationError as error:
            return "; ".join(_explain(problem) for problem in error.errors(include_url=False, include_input=False))
        if len(message.message) > self._max_chars:
            return f"message: is {len(message.message):,} characters long, more than {self._max_chars:,}"
        return message

    def _compare(self, source: SourceFile, row: Row, message: Message, stored: StoredMessage | None) -> str:
        """What the message is beside the stored one: an outcome, or the reason to refuse it."""
        if stored is None:
            return "new"
        same_place = stored["source"] == _place(source, row)
        taken_now = stored["run_id"] == self._report.run_id and stored["attempt"] == self._report.attempt
        same_file = stored["source"]["sha256"] == source.sha256
        if stored["user_id"] != message.user_id:
            return f"message_id: {message.message_id} already belongs to another user"
        if stored["content_hash"] != message.content_hash:
            met_before = taken_now or (same_file and not same_place)
            return _conflict(message, stored["source"]["row"]) if met_before else "changed"
        if self._published[stored["run_id"]]:
            return "unchanged"
        return "duplicates" if taken_now else "resumed"

    def _learn_published(self, run_ids: Iterable[str]) -> None:
        if unknown := {run_id for run_id in run_ids if run_id not in self._published}:
            published = self._mongo.runs_published_with(self._model, unknown)
            self._published |= {run_id: run_id in published for run_id in unknown}

    def _document(self, source: SourceFile, row: Row, message: Message) -> dict[str, Any]:
        return {
            "_id": message.message_id,
            "user_id": message.user_id,
            "message": message.message,
            "timestamp": message.timestamp,
            "content_hash": message.content_hash,
            "run_id": self._report.run_id,
            "attempt": self._report.attempt,
            "source": _place(source, row),
        }

    def _quarantine(self, source: SourceFile, refused: list[tuple[Row, str]]) -> None:
        self._report.rejected += len(refused)
        for row, reason in refused:
            if len(self.reasons) < _REASONS_KEPT:
                self.reasons.setdefault(reason, row.number)
        self._mongo.upsert_quarantine(
            [
                {
                    "_id": f"{source.sha256}:{row.number}",
                    "file": str(source.path),
                    "row": row.number,
                    "reason": reason,
                    "raw": _cut(row.raw),
                    "raw_chars": len(row.raw),
                    "run_id": self._report.run_id,
                    "quarantined_at": datetime.now(UTC),
                }
                for row, reason in refused
            ]
        )


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


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Up to 1,000 rows or 16 MiB at a time. What came before an error is handed out before the error."""
    batch: list[Row] = []
    chars = 0
    try:
        for row in rows:
            batch.append(row)
            chars += len(row.raw)
            if len(batch) == _BATCH_ROWS or chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    except InputError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _cut(raw: str) -> str:
    return raw.encode()[:_MAX_RAW_BYTES].decode(errors="ignore")


def _place(source: SourceFile, row: Row) -> dict[str, Any]:
    return {"uri": str(source.path), "sha256": source.sha256, "row": row.number}


def _conflict(message: Message, other_row: int) -> str:
    return f"message_id: {message.message_id} stands in row {other_row} with other content"


def _explain(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"


def _fingerprint(path: UPath) -> str:
    """Changes when the file is replaced; cheap, from the file system's own facts."""
    facts = path.stat()
    return f"{path.name}:{facts.st_size}:{facts.st_mtime}"


def _reject_summary(report: StageReport, files: Sequence[UPath], reasons: dict[str, int], settings: Settings) -> str:
    examples = "; ".join(f"row {row}: {reason}" for reason, row in reasons.items())
    names = ", ".join(map(str, files))
    return (
        f"{names}: {report.rejected:,} of {report.rows_in:,} rows were refused, more than max_reject_ratio "
        f"{settings.max_reject_ratio:g} allows. They are in the collection `quarantine`. First: {examples}"
    )
