"""Labelled messages as intents: a CSV of texts, each with the intent it expresses."""

from collections import defaultdict
from typing import Any

import numpy as np
from pydantic import ValidationError
from upath import UPath

from personalization.errors import CatalogError
from personalization.reading import Row, check_readable, read_rows
from personalization.schemas import OTHER_INTENT, Intent

_LABELS = ("intent", "label", "category")
_PROBLEMS_SHOWN = 10


def read_labelled(path: UPath) -> list[Intent]:
    """Read a CSV, plain or gzipped, with the columns `text` and `intent` (or `label`, or `category`).

    Intents come in order of their first text; ids and texts are kept verbatim.

    Raises:
        InputError: the file cannot be read.
        CatalogError: what is wrong, each with file, line and remedy; the first ten of all problems.
    """
    check_readable(path)
    texts: dict[str, list[str]] = defaultdict(list)
    problems: list[str] = []
    for row in read_rows(path):
        problem = row.problem or _problem(row)
        if problem:
            problems.append(f"{path}:{row.number}: {problem}")
        else:
            texts[_label(row.value)].append(row.value["text"])
    intents = []
    for intent_id, examples in texts.items():
        try:
            intents.append(Intent(id=intent_id, name=intent_id, examples=examples))
        except ValidationError:
            problems.append(
                f"{path}: the intent {intent_id!r} is no id; write 1 to 128 printable characters, no quotation mark, "
                f"backtick or backslash, no space at its ends"
            )
    if not texts and not problems:
        problems.append(f"{path}: holds no row behind its header; write lines of text,intent")
    if problems:
        more = len(problems) - _PROBLEMS_SHOWN
        raise CatalogError("\n".join([*problems[:_PROBLEMS_SHOWN], *([f"and {more} more"] if more > 0 else [])]))
    return intents


def draw_examples(intents: list[Intent], count: int, seed: int) -> list[Intent]:
    """The intents with `count` of their examples each, drawn at random, or all of them where they are fewer."""
    random = np.random.default_rng(seed)
    drawn = []
    for intent in sorted(intents, key=lambda one: one.id):
        places = sorted(random.permutation(len(intent.examples))[:count].tolist())
        drawn.append(intent.model_copy(update={"examples": [intent.examples[place] for place in places]}))
    return drawn


def _label(cells: dict[str, Any]) -> str:
    return next((str(cells[name]) for name in _LABELS if name in cells), "")


def _problem(row: Row) -> str:
    """What is wrong with a row that could be parsed, with the remedy."""
    text = row.value.get("text", "")
    label = _label(row.value)
    if not text.strip():
        return "has no `text`; the header must name a column `text`, and each line fill it"
    if not label:
        return "has no intent; the header must name a column `intent`, `label` or `category`, and each line fill it"
    if label == OTHER_INTENT:
        return f"the intent `{OTHER_INTENT}` is reserved for messages that express none; leave such lines out"
    if any(0xD800 <= ord(char) <= 0xDFFF for char in text + label):
        return "is not valid UTF-8; save the file as UTF-8"
    return ""
