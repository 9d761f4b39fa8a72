"""Scratch: what the stores say, on disk, where sets of any size are compared in bounded memory.

A SQLite file of its own that goes with the audit. Both sides of a comparison are sorted outside of memory and merged
(`UNION ALL … GROUP BY`, SQLite's external merge sort), so neither has to come in any order.
"""

import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

Row = Sequence[Any]

_CACHE_KIB = 16 * 1024
"""Memory for pages, and for a sorted run before it goes to disk."""
_PAGE = 1000


class Scratch:
    """Tables of an audit. Names and SQL are the audit's own, never anybody's input."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Self]:
        """In the folder for temporary files, gone behind the block. Takes about 200 bytes a row and index."""
        with tempfile.TemporaryDirectory(prefix="audit-") as folder:
            connection = sqlite3.connect(Path(folder) / "scratch.db", isolation_level=None)
            try:
                # Nobody needs it after a crash.
                for pragma in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", f"cache_size=-{_CACHE_KIB}"):
                    connection.execute(f"PRAGMA {pragma}").fetchall()
                yield cls(connection)
            finally:
                connection.close()

    def table(self, name: str, columns: str) -> None:
        """Make a table; `columns` as in SQL."""
        self._connection.execute(f"CREATE TABLE {name} ({columns})")

    def fill(self, name: str, batches: Iterable[Sequence[Row]]) -> int:
        """Append rows, a batch a transaction; return how many."""
        rows = 0
        for batch in batches:
            if batch:
                places = ", ".join("?" * len(batch[0]))
                self._connection.execute("BEGIN")
                self._connection.executemany(f"INSERT INTO {name} VALUES ({places})", batch)  # noqa: S608
                self._connection.execute("COMMIT")
            rows += len(batch)
        return rows

    def function(self, name: str, work: Callable[[str], str]) -> None:
        """Make a function of one text known to SQL."""
        self._connection.create_function(name, 1, work, deterministic=True)

    def run(self, statement: str, *parameters: Any) -> None:
        """Execute one statement."""
        self._connection.execute(statement, parameters)

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """All rows of a small result."""
        return self._connection.execute(query, parameters).fetchall()

    def pages(self, query: str, *parameters: Any, rows: int = _PAGE) -> Iterator[list[tuple[Any, ...]]]:
        """Rows of any number, some at a time, as the query finds them. What it reads must not change meanwhile."""
        cursor = self._connection.execute(query, parameters)
        while page := cursor.fetchmany(rows):
            yield page


def merged(expected: str, found: str) -> str:
    """SQL of what differs between two queries of `(id, user_id, value)`, as `(id, user_id, expected, found)`.

    What one side has not is null there; what it has several times is named as such. One external sort of both.
    """
    sides = ", ".join(
        f"CASE WHEN sum(side = {side}) > 1 THEN sum(side = {side}) || ' rows' "
        f"ELSE max(CASE WHEN side = {side} THEN value END) END AS {name}"
        for side, name in enumerate(("expected", "found"))
    )
    return f"""
        SELECT id, coalesce(max(CASE WHEN side = 0 THEN user_id END), max(user_id)) AS user_id, {sides}
        FROM (SELECT id, user_id, value, 0 AS side FROM ({expected})
              UNION ALL
              SELECT id, user_id, value, 1 FROM ({found}))
        GROUP BY id
        HAVING sum(side = 0) <> 1 OR sum(side = 1) <> 1 OR min(value) IS NOT max(value)"""  # noqa: S608
