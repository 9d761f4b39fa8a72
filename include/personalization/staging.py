"""Staged files: how tasks hand data to each other.

Files are Parquet, written aside and renamed, so that a name never shows half a file. Any folder
that `universal_pathlib` addresses will do, so workers on other machines need only another base URI.
"""

import hashlib
import io
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from personalization.errors import StagingError
from personalization.schemas import Ref

SHARED_FOLDER = "catalog"
"""Staged files that outlive their run."""


class Staging:
    """The staging folder of one run."""

    def __init__(self, base_uri: str, run_id: str) -> None:
        self.base = UPath(base_uri).absolute()
        self.root = self.base / _folder_name(run_id)

    def write(self, name: str, table: pa.Table) -> Ref:
        """Write `table` as `name` and return its reference. A rewrite replaces the file at once."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", compression_level=1)
        content = buffer.getvalue()
        path = self.root / name
        write_atomically(path, content)
        return Ref(uri=str(path), rows=table.num_rows, sha256=hashlib.sha256(content).hexdigest())

    def find(self, name: str) -> Ref | None:
        """Reference to a file staged earlier, if there is one."""
        path = self.root / name
        if not path.exists():
            return None
        content = path.read_bytes()
        rows = pq.read_metadata(pa.BufferReader(content)).num_rows
        return Ref(uri=str(path), rows=rows, sha256=hashlib.sha256(content).hexdigest())

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
    """Read a staged file and check that it is the one the reference speaks of.

    Raises:
        StagingError: the file is gone, or its digest differs.
    """
    try:
        content = UPath(ref["uri"]).read_bytes()
    except FileNotFoundError:
        raise StagingError(f"staged file {ref['uri']} is gone; clear the run's first task to stage it again") from None
    if hashlib.sha256(content).hexdigest() != ref["sha256"]:
        raise StagingError(f"staged file {ref['uri']} is not the one that was handed over")
    return pq.read_table(pa.BufferReader(content))


def read_column(refs: list[Ref], column: str) -> Iterator[list[Any]]:
    """Yield one column of each staged file as a list, a file at a time."""
    for ref in refs:
        yield read(ref).column(column).to_pylist()


def write_atomically(path: UPath, content: bytes) -> None:
    """Write aside, then rename: a reader sees the old file, the new one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{time.time_ns()}")
    aside.write_bytes(content)
    aside.rename(path)


def _folder_name(run_id: str) -> str:
    name = "".join(char if char.isalnum() or char in "-_.+" else "_" for char in run_id)
    return name if name.strip(".") else name.replace(".", "_")


def _newest_mtime(folder: UPath) -> float:
    return max((entry.stat().st_mtime for entry in folder.rglob("*")), default=folder.stat().st_mtime)
