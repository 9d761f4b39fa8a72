"""What schemathesis cannot read out of the API's document. Loaded by the process that test_openapi.py starts."""

import re
import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Any

import schemathesis
from hypothesis import strategies as st

_NOW = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)

# Events are of the past and not from before 1970, for which JSON Schema has no words.
schemathesis.openapi.format(
    "date-time",
    st.timedeltas(timedelta(0), timedelta(days=18_000)).map(lambda age: (_NOW - age).isoformat()),
)


@schemathesis.hook
def filter_body(context: schemathesis.HookContext, body: Any) -> bool:
    """Moments are also taken from answers, where campaigns end in the future."""
    try:
        moment = datetime.fromisoformat(body["timestamp"])
    except (TypeError, KeyError, ValueError):
        return True
    return 1970 <= moment.year <= _NOW.year


@schemathesis.hook
def filter_query(context: schemathesis.HookContext, query: dict[str, Any] | None) -> bool:
    """A list, as one of many wrong values, is sent as a parameter that comes several times: then the last counts."""
    return not any(isinstance(value, list) for name, value in (query or {}).items() if name != "exclude")


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    r"""Spell out categories of characters in patterns: schemathesis takes `\p{C}` for the control characters of ASCII.

    In full they are 14,000 letters long, and schemathesis takes minutes over them.
    """
    _spell_out(raw_schema)


def _spell_out(node: Any) -> None:
    if isinstance(node, list):
        for one in node:
            _spell_out(one)
    elif isinstance(node, dict):
        if isinstance(pattern := node.get("pattern"), str):
            node["pattern"] = re.sub(r"\\p\{(\w)\}", lambda match: _latin_1(match[1]), pattern)
        for one in node.values():
            _spell_out(one)


def _latin_1(category: str) -> str:
    """The characters of a category, as the inside of a class."""
    return "".join(f"\\x{at:02x}" for at in range(256) if unicodedata.category(chr(at)).startswith(category))
