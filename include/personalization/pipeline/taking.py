"""Taking: rows of files to MongoDB, whatever they hold. Bad ones go to quarantine, known ones cost a look-up.

A record is done when the run that took it is published; until then every run that meets it takes it again.
Rows of erased users, good or bad, are kept nowhere.
"""

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Generic, TypeVar

import structlog
from pydantic import ValidationError
from upath import UPath

from personalization.errors import InputError, RejectRatioExceededError
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.overlap import one_ahead
from personalization.reading import Row, check_readable, file_digest, locate, read_rows
from personalization.schemas import Event, Message, is_identifier
from personalization.settings import Settings
from personalization.stores.mongo import Document, MongoStore, Origin, RecordKind, StoredRecord, TakenFile

_BATCH_ROWS = 1000
_PROGRESS_ROWS = 10_000
_EVENT_FILES = "events"
_SUFFIXES: dict[RecordKind, tuple[str, ...]] = {
    "message": (".json", ".jsonl", ".ndjson"),
    "event": (".json", ".jsonl", ".ndjson", ".csv"),
}
_MAX_RAW_BYTES = 12 * 2**20  # a MongoDB document holds at most 16 MiB
_BATCH_CHARS = 16 * 2**20
_REASONS_KEPT = 3
_REFUSED_KEPT = 1000  # rows of a file that is known again
_USER_IN_JSON = re.compile(r'"user_id"\s*:\s*("(?:[^"\\]|\\.){1,1000}")')
_CELLS = 50  # that are looked at for a user, of a broken row of CSV

Record = TypeVar("Record", Message, Event)

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


def select_files(kind: RecordKind, named: str, *, by_hand: bool, inbox_uri: str, mongo: MongoStore) -> list[UPath]:
    """The named file of a run by hand; else those of the inbox that no published run has taken yet, by name.

    In the inbox, a file whose name starts with `events` holds events, any other messages. Files that are
    still being written are expected under a name that starts with a dot.
    """
    if by_hand:
        return [locate(named)] if named else []
    inbox = UPath(inbox_uri).absolute()
    if not inbox.exists():
        return []
    waiting = {
        _fingerprint(path): path
        for path in sorted(inbox.iterdir(), key=str)
        if path.is_file() and _kind_of(path.name) == kind
    }
    taken = mongo.published_files(kind, waiting)
    return [path for fingerprint, path in waiting.items() if fingerprint not in taken]


def _kind_of(name: str) -> RecordKind | None:
    kind: RecordKind = "event" if name.startswith(_EVENT_FILES) else "message"
    known = name.removesuffix(".gz").endswith(_SUFFIXES[kind]) and not name.startswith(".")
    return kind if known else None


@dataclass
class _Batch(Generic[Record]):
    """Rows that were checked, but not yet compared with what is stored."""

    rows: int
    records: dict[str, tuple[Row, Record]] = field(default_factory=dict)
    """By id."""
    refused: list[tuple[Row, str]] = field(default_factory=list)
    erased: int = 0
    duplicates: int = 0


class Taker(ABC, Generic[Record]):
    """Sorts the rows of files into accepted, repeated and refused, and keeps them in MongoDB.

    Per 1,000 rows: one look-up of users, 20 of ids, and one bulk write where anything is new.
    """

    kind: ClassVar[RecordKind]

    def __init__(self, report: StageReport, mongo: MongoStore, settings: Settings) -> None:
        self._report = report
        self._mongo = mongo
        self._settings = settings
        self._done: dict[str | None, bool] = {None: False}
        self._reasons: dict[str, int] = {}  # the first few, each with the row it was first met in
        self._outcomes = Counter(dict.fromkeys(("new", "changed", "unchanged", "duplicates", "resumed", "erased"), 0))
        self._files: list[Document] = []
        self._taken: dict[int, TakenFile] = {}  # by place among the files
        self._refused: list[int] = []  # rows of the file at work
        report.details["files"] = self._files

    @abstractmethod
    def parse(self, row: Row) -> Record | str:
        """The record that an object row holds, or the reason to refuse it. May raise a ValidationError."""

    @abstractmethod
    def identify(self, record: Record) -> str:
        """The record's id."""

    @abstractmethod
    def document(self, record: Record, origin: Origin) -> Document:
        """The record as MongoDB keeps it."""

    @property
    @abstractmethod
    def rules(self) -> str:
        """What decides whether a row is good, beside the row and the time."""

    def as_taken(self, sha256: str) -> TakenFile | None:  # noqa: ARG002
        """The file as a run took it, where nothing has become of its records since: then no row is looked up."""
        return None

    def take(self, files: Sequence[UPath], *, skip_bad_files: bool) -> Iterator[list[Record]]:
        """Take the files; yield the records that later stages have to work on, up to 1,000 at a time.

        With `skip_bad_files`, a file that cannot be taken is quarantined as such and the others go on.

        Raises:
            InputError: a file cannot be taken, or not to its end; what came before is kept.
            RejectRatioExceededError: more than `max_reject_ratio` of the rows were quarantined.
        """
        for path in files:
            try:
                yield from self._take_file(path)
            except InputError as error:
                if not skip_bad_files:
                    raise
                self._refuse_file(path, str(error))
        self._report.details |= dict(self._outcomes)
        report = self._report
        if report.rows_in and report.rejected / report.rows_in > self._settings.max_reject_ratio:
            raise RejectRatioExceededError(self._reject_summary(files))
        if files:
            taken = [
                {"taken": self._taken[at]._asdict()} if at in self._taken else {} for at in range(len(self._files))
            ]
            entries = [file | facts for file, facts in zip(self._files, taken, strict=True)]
            self._mongo.record_files(self.kind, report.run_id, entries, self._outcomes["changed"])

    def _take_file(self, path: UPath) -> Iterator[list[Record]]:
        source = SourceFile.of(path)
        self._files.append({"uri": str(path), "sha256": source.sha256, "fingerprint": _fingerprint(path)})
        place, before, rows_before = len(self._files) - 1, self._outcomes.copy(), self._report.rows_in
        started, self._refused = datetime.now(UTC), []
        if (known := self.as_taken(source.sha256)) is not None:
            log.info(f"{path.name}: taken before, and nothing of it has changed since")
            yield from self._take_again(source, known)
        else:
            yield from self._take_all(source)
        if self._outcomes["erased"] == before["erased"] and len(self._refused) <= _REFUSED_KEPT:
            self._taken[place] = TakenFile(
                sha256=source.sha256,
                rules=self.rules,
                at=started,
                rows=self._report.rows_in - rows_before,
                duplicates=self._outcomes["duplicates"] - before["duplicates"],
                refused=self._refused,
                changed=self._outcomes["changed"],
            )

    def _take_all(self, source: SourceFile) -> Iterator[list[Record]]:
        # The next rows are read and checked while MongoDB is at work on these.
        for batch in one_ahead(map(self._checked, _batches(read_rows(source.path)))):
            yield self._keep(source, batch)
            if self._report.rows_in % _PROGRESS_ROWS == 0:
                log.info(f"{source.path.name}: {self._report.rows_in:,} rows read, {self._report.rejected:,} rejected")

    def _take_again(self, source: SourceFile, known: TakenFile) -> Iterator[list[Record]]:
        """Only what was refused is looked at: time may have made it good, and quarantine names the last run."""
        if refused := set(known.refused):
            rows = (row for row in read_rows(source.path) if row.number in refused)
            for batch in _batches(rows):
                yield self._keep(source, self._checked(batch))
        self._report.rows_in += known.rows - len(refused)
        self._outcomes["duplicates"] += known.duplicates
        self._outcomes["unchanged"] += known.rows - len(refused) - known.duplicates
        self._count_skipped()

    def _checked(self, rows: list[Row]) -> "_Batch[Record]":
        """The rows by themselves, before what MongoDB knows of their ids."""
        batch = _Batch[Record](len(rows))
        for row in self._without_erased(batch, rows):
            record = self._validate(row)
            if isinstance(record, str):
                batch.refused.append((row, record))
                continue
            first = batch.records.setdefault(self.identify(record), (row, record))
            if first[0] is row:
                continue
            if first[1].content_hash == record.content_hash:
                batch.duplicates += 1
            else:
                batch.refused.append((row, self._conflict(record, first[0].number)))
        return batch

    def _keep(self, source: SourceFile, batch: "_Batch[Record]") -> list[Record]:
        """Store what is new or changed, quarantine what is refused; return the records that are to be worked on."""
        self._report.rows_in += batch.rows
        self._outcomes["erased"] += batch.erased
        self._outcomes["duplicates"] += batch.duplicates
        refused = batch.refused
        stored = self._mongo.stored(self.kind, list(batch.records))
        self._learn_done(one["run_id"] for one in stored.values())
        to_do: list[Record] = []
        new: list[Document] = []
        known: list[Document] = []
        for record_id, (row, record) in batch.records.items():
            outcome = self._compare(source, row, record, stored.get(record_id))
            if outcome not in self._outcomes:
                refused.append((row, outcome))
                continue
            self._outcomes[outcome] += 1
            if outcome in ("new", "changed", "resumed"):
                to_do.append(record)
                (new if outcome == "new" else known).append(self._document(source, row, record))

        self._mongo.insert(self.kind, new)
        self._mongo.upsert(self.kind, known)
        self._quarantine(source, refused)
        self._count_skipped()
        return to_do

    def _count_skipped(self) -> None:
        self._report.skipped = sum(self._outcomes[one] for one in ("unchanged", "duplicates", "erased"))

    def _without_erased(self, batch: "_Batch[Record]", rows: list[Row]) -> list[Row]:
        users = [_users_in(row) for row in rows]
        erased = self._mongo.erased_among(set().union(*users))
        left = [row for row, found in zip(rows, users, strict=True) if not found & erased]
        batch.erased = len(rows) - len(left)
        return left

    def _refuse_file(self, path: UPath, problem: str) -> None:
        """Quarantine what is wrong with a file as its row 0. It counts as taken until it is replaced."""
        log.error(problem)
        fingerprint = _fingerprint(path)
        if str(path) not in {file["uri"] for file in self._files}:
            self._files.append({"uri": str(path), "sha256": None, "fingerprint": fingerprint})
        self._report.rows_in += 1
        self._quarantine(SourceFile(path, sha256=fingerprint), [(Row(0, raw=""), problem)])

    def _validate(self, row: Row) -> Record | str:
        if row.problem is not None:
            return row.problem
        if not isinstance(row.value, dict):
            return f"is not an object but {type(row.value).__name__}"
        try:
            return self.parse(row)
        except ValidationError as error:
            return "; ".join(_explain(problem) for problem in error.errors(include_url=False, include_input=False))

    def _compare(self, source: SourceFile, row: Row, record: Record, stored: StoredRecord | None) -> str:
        """What the record is beside the stored one: an outcome, or the reason to refuse it."""
        if stored is None:
            return "new"
        same_place = stored["source"] == _place(source, row)
        taken_now = stored["run_id"] == self._report.run_id and stored["attempt"] == self._report.attempt
        same_file = stored["source"].get("sha256") == source.sha256
        if stored["user_id"] != record.user_id:
            return f"{self.kind}_id: {self.identify(record)} already belongs to another user"
        if stored["content_hash"] != record.content_hash:
            met_before = taken_now or (same_file and not same_place)
            return self._conflict(record, stored["source"]["row"]) if met_before else "changed"
        if self._done[stored["run_id"]]:
            return "unchanged"
        return "duplicates" if taken_now else "resumed"

    def _learn_done(self, run_ids: Iterable[str | None]) -> None:
        if unknown := {run_id for run_id in run_ids if run_id is not None and run_id not in self._done}:
            published = self._mongo.runs_published(unknown)
            self._done |= {run_id: run_id in published for run_id in unknown}

    def _document(self, source: SourceFile, row: Row, record: Record) -> Document:
        report = self._report
        return self.document(record, Origin(run_id=report.run_id, attempt=report.attempt, source=_place(source, row)))

    def _quarantine(self, source: SourceFile, refused: list[tuple[Row, str]]) -> None:
        self._report.rejected += len(refused)
        self._refused += [row.number for row, _ in refused]
        for row, reason in refused:
            if len(self._reasons) < _REASONS_KEPT:
                self._reasons.setdefault(reason, row.number)
        self._mongo.upsert_quarantine(
            [
                {
                    "_id": f"{self.kind}:{source.sha256}:{row.number}",
                    "kind": self.kind,
                    "file": str(source.path),
                    "row": row.number,
                    "user_id": _user_of(row),
                    "reason": reason,
                    "raw": _cut(row.raw),
                    "raw_chars": len(row.raw),
                    "run_id": self._report.run_id,
                    "quarantined_at": datetime.now(UTC),
                }
                for row, reason in refused
            ]
        )

    def _conflict(self, record: Record, other_row: int) -> str:
        return f"{self.kind}_id: {self.identify(record)} stands in row {other_row} with other content"

    def _reject_summary(self, files: Sequence[UPath]) -> str:
        examples = "; ".join(f"row {row}: {reason}" for reason, row in self._reasons.items())
        names = ", ".join(map(str, files))
        return (
            f"{names}: {self._report.rejected:,} of {self._report.rows_in:,} rows were refused, more than "
            f"max_reject_ratio {self._settings.max_reject_ratio:g} allows. They are in the collection `quarantine`. "
            f"First: {examples}"
        )


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


def _user_of(row: Row) -> str | None:
    """The user whose row it says it is, even if it is a broken one; None where it does not."""
    user_id = row.value.get("user_id") if isinstance(row.value, dict) else None
    if user_id is None and (found := _USER_IN_JSON.search(row.raw)):
        try:
            user_id = json.loads(found[1])
        except json.JSONDecodeError:
            return None
    user_id = user_id.strip() if isinstance(user_id, str) else None
    return user_id if is_identifier(user_id) else None


def _users_in(row: Row) -> set[str]:
    """The row's user; of a row that does not say, whatever could be one."""
    if user_id := _user_of(row):
        return {user_id}
    cells = (cell.strip() for cell in row.raw.split(",", _CELLS)) if row.problem else ()
    return {cell for cell in cells if is_identifier(cell)}


def _cut(raw: str) -> str:
    return raw.encode()[:_MAX_RAW_BYTES].decode(errors="ignore")


def _place(source: SourceFile, row: Row) -> dict[str, Any]:
    return {"uri": str(source.path), "sha256": source.sha256, "row": row.number}


def _explain(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"


def _fingerprint(path: UPath) -> str:
    """Changes when the file is replaced; cheap, from the file system's own facts."""
    facts = path.stat()
    return f"{path.name}:{facts.st_size}:{facts.st_mtime}"
