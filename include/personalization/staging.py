"""Staged files: how tasks hand data to each other.

Files are Parquet, written aside and renamed, so that a name never shows half a file. Any folder
that `universal_pathlib` addresses will do, so workers on other machines need only another base URI.

A file from which users were erased says in its own metadata which file it was before. A reference to that
one stays good, so a run goes on without those users.
"""

import hashlib
import io
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from personalization.errors import StagingError, StoreError
from personalization.schemas import Ref

_USER = "user_id"
_FORMER = b"personalization.former"
_ABANDONED_S = 3600
"""Age at which a file that is still aside is nobody's: who wrote it was killed."""

SHARED_FOLDER = "catalog"
"""Staged files that outlive their run."""


class Staging:
    """The staging folder of one run."""

    def __init__(self, base_uri: str, run_id: str) -> None:
        self.base = UPath(base_uri).absolute()
        self.root = self.base / _folder_name(run_id)
        self.bytes_written = 0

    def write(self, name: str, table: pa.Table) -> Ref:
        """Write `table` as `name` and return its reference. A rewrite replaces the file at once."""
        content = _as_parquet(table)
        path = self.root / name
        write_atomically(path, content)
        self.bytes_written += len(content)
        return Ref(uri=str(path), rows=table.num_rows, sha256=_digest(content))

    def find(self, name: str) -> Ref | None:
        """Reference to a file staged earlier, if there is one."""
        path = self.root / name
        if not path.exists():
            return None
        content = path.read_bytes()
        rows = pq.read_metadata(pa.BufferReader(content)).num_rows
        return Ref(uri=str(path), rows=rows, sha256=_digest(content))

    def prune(self, older_than_days: int) -> int:
        """Delete the folders of other runs last written more than `older_than_days` ago; return how many."""
        if not self.base.exists():
            return 0
        kept = {self.root.name, SHARED_FOLDER}
        horizon = time.time() - older_than_days * 86_400
        stale = [
            folder
            for folder in self.base.iterdir()
            if folder.is_dir() and folder.name not in kept and _newest_mtime(folder) < horizon
        ]
        for folder in stale:
            folder.fs.rm(folder.path, recursive=True)
        return len(stale)


def read(ref: Ref) -> pa.Table:
    """Read a staged file and check that it is the one the reference speaks of, if need be without erased users.

    Raises:
        StagingError: the file is gone, or its digest differs.
    """
    try:
        content = UPath(ref["uri"]).read_bytes()
    except FileNotFoundError:
        raise StagingError(f"staged file {ref['uri']} is gone; clear the run's first task to stage it again") from None
    if _digest(content) == ref["sha256"]:
        return pq.read_table(pa.BufferReader(content))
    try:
        if ref["sha256"] in _former(content):
            table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
            return table.replace_schema_metadata(None)  # what is made of it is another file
    except (pa.ArrowInvalid, OSError):  # damaged
        pass
    raise StagingError(f"staged file {ref['uri']} is not the one that was handed over")


def read_column(refs: list[Ref], column: str) -> Iterator[list[Any]]:
    """Yield one column of each staged file as a list, a file at a time."""
    for ref in refs:
        yield read(ref).column(column).to_pylist()


def erase_staged(base_uri: str, user_ids: Collection[str]) -> Counter[str]:
    """Take the users' rows out of the staged files of all runs; return how many by user.

    Reads one column of every file, and whole those that hold one of them, a file at a time. Files that a killed task
    left aside are deleted.

    Raises:
        StoreError: the staging folder cannot be read or written, or a file in it is no Parquet.
    """
    removed: Counter[str] = Counter()
    with staging_errors():
        for path in _staged_files(base_uri):
            if found := _users_in(path, user_ids):
                try:
                    content = path.read_bytes()
                except FileNotFoundError:  # pruned meanwhile
                    continue
                write_atomically(path, _without(content, user_ids))
                removed.update(found)
        for path in _abandoned(base_uri):
            path.unlink(missing_ok=True)
    return removed


def count_staged(base_uri: str, user_ids: Collection[str]) -> Counter[str]:
    """Rows of the users in the staged files of all runs, by user. Reads one column of every file.

    Raises:
        StoreError: as `erase_staged`.
    """
    with staging_errors():
        return sum((_users_in(path, user_ids) for path in _staged_files(base_uri)), Counter())


def write_atomically(path: UPath, content: bytes) -> None:
    """Write aside, then rename: a reader sees the old file, the new one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{time.time_ns()}")
    aside.write_bytes(content)
    aside.rename(path)


def _as_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=1, write_page_checksum=True)
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _former(content: bytes) -> list[str]:
    """Digests of the files it was before users were erased from it, the oldest first."""
    kept = pq.read_metadata(pa.BufferReader(content)).metadata or {}
    return kept.get(_FORMER, b"").decode().split()  # type: ignore[no-any-return]


def _without(content: bytes, user_ids: Collection[str]) -> bytes:
    table = pq.read_table(pa.BufferReader(content))
    left = table.filter(pc.invert(_is_of(table.column(_USER), user_ids)))
    former = " ".join([*_former(content), _digest(content)])
    return _as_parquet(left.replace_schema_metadata({_FORMER: former}))


def _users_in(path: UPath, user_ids: Collection[str]) -> Counter[str]:
    """How many rows of each of the users a file holds."""
    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as file:
            if _USER not in file.schema_arrow.names:
                return Counter()
            column = file.read(columns=[_USER]).column(_USER)
    except FileNotFoundError:  # pruned meanwhile
        return Counter()
    except pa.ArrowInvalid as error:
        raise StoreError("staging", f"{path} cannot be read ({error}); delete it") from error
    return Counter(column.filter(_is_of(column, user_ids)).to_pylist())


def _is_of(column: pa.ChunkedArray, user_ids: Collection[str]) -> pa.ChunkedArray:
    return pc.is_in(column, value_set=pa.array(list(user_ids), column.type))


def _staged_files(base_uri: str) -> Iterator[UPath]:
    return (path for path in _files(base_uri) if path.suffix == ".parquet" and not path.name.startswith("."))


def _abandoned(base_uri: str) -> Iterator[UPath]:
    horizon = time.time() - _ABANDONED_S
    aside = (path for path in _files(base_uri) if path.name.startswith(".") and path.is_file())
    return (path for path in aside if path.stat().st_mtime < horizon)


def _files(base_uri: str) -> Iterator[UPath]:
    base = UPath(base_uri).absolute()
    yield from base.rglob("*") if base.exists() else ()


@contextmanager
def staging_errors() -> Iterator[None]:
    """Turn errors of the file system or object store into a `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError("staging", f"{type(error).__name__}: {error}; check STAGING_URI") from error


def _folder_name(run_id: str) -> str:
    name = "".join(char if char.isalnum() or char in "-_.+" else "_" for char in run_id)
    return name if name.strip(".") else name.replace(".", "_")


def _newest_mtime(folder: UPath) -> float:
    return max((entry.stat().st_mtime for entry in folder.rglob("*")), default=folder.stat().st_mtime)
