"""Tables as files."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st

ROWS = 10_000
"""In a file at most."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def button(label: str, file_name: str, rows: Callable[[], Sequence[dict[str, Any]]]) -> None:
    """A button that makes the file when it is clicked."""
    st.download_button(
        label,
        lambda: as_csv(rows()),
        file_name=file_name,
        mime="text/csv",
        icon=":material/download:",
        on_click="ignore",
    )


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows under their names. Text that a spreadsheet would take for a formula is quoted."""
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    return content.getvalue()


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
