"""Numbers and times as people read them."""

from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import streamlit as st

MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in r"\`*_{}[]()#+-.!|<>$~:"})
"""Takes from text what Markdown would read into it."""


def zone() -> tzinfo:
    """The viewer's zone, or UTC where the browser names none that is known here."""
    try:
        return ZoneInfo(st.context.timezone) if st.context.timezone else UTC
    except ZoneInfoNotFoundError:
        return UTC


def local(moment: datetime) -> datetime:
    """The moment in the viewer's zone."""
    return moment.astimezone(zone())


def local_ms(epoch_ms: int) -> datetime:
    """The moment of so many milliseconds since the epoch, in the viewer's zone."""
    return local(datetime.fromtimestamp(epoch_ms / 1000, UTC))


def moment(value: datetime | None) -> str:
    """Date and time to the minute, in the viewer's zone."""
    return f"{local(value):%d %b %Y, %H:%M}" if value else "—"


def count(value: int | None) -> str:
    """A whole number with thousands set apart."""
    return "—" if value is None else f"{value:,}"


def large(value: int) -> str:
    """A whole number, short where it is large."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            size = 1e3 if sign == "k" else size
            return f"{value / size:,.1f} {sign}"
    return f"{value:,}"


def duration(seconds: float) -> str:
    """A length of time, to two units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
