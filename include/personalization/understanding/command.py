"""The command `classify`: messages in, what they express out."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from upath import UPath

from personalization.catalog.loading import load_catalog
from personalization.encoder import Encoder, get_encoder
from personalization.errors import CatalogError
from personalization.schemas import OTHER_INTENT, Intent
from personalization.settings import Settings
from personalization.understanding.classifier import IntentClassifier
from personalization.understanding.labelled import draw_examples, read_labelled
from personalization.understanding.reader import Reading

_BATCH = 1024
_PASSED_ON = ("message_id", "user_id")
_SHOWN_CHARS = 70

log = structlog.get_logger(__name__)


class MessageReader:
    """Encoder and classifier of one catalog."""

    def __init__(self, intents: list[Intent], settings: Settings) -> None:
        self._encoder: Encoder = get_encoder(settings.embedding_model, settings.embedding_dim)
        examples = [(intent.id, example) for intent in intents for example in intent.examples]
        vectors = self._encoder.encode([example for _, example in examples])
        self._classifier = IntentClassifier.fit([intent_id for intent_id, _ in examples], vectors)
        self._keep = settings.intent_keep
        log.info(f"{len(intents)} intents, {len(examples):,} examples")

    def answers(self, lines: Iterable[bytes], refuse: Callable[[int, str], None]) -> Iterator[dict[str, Any]]:
        """Yield an answer for each message, in order; `refuse` is told line and problem of what is none."""
        messages = _messages(lines, refuse)
        done = 0
        while batch := list(islice(messages, _BATCH)):
            vectors = self._encoder.encode([message["message"] for message in batch])
            for message, reading in zip(batch, self._classifier.classify(vectors, self._keep), strict=True):
                yield message | _answer(reading)
            done += len(batch)
            log.info(f"{done:,} messages classified")


def intents_at(path: Path, per_intent: int | None, seed: int) -> list[Intent]:
    """The intents of a catalog or of a CSV of labelled texts, with at most `per_intent` examples each.

    Raises:
        CatalogError, InputError: they cannot be taken; says where and why.
    """
    labelled = path.is_file() and path.name.lower().endswith((".csv", ".csv.gz"))
    intents = read_labelled(UPath(path)) if labelled else load_catalog(path).intents
    if not intents:
        raise CatalogError(f"{path}: holds no intents; write some with examples")
    return intents if per_intent is None else draw_examples(intents, per_intent, seed)


def show(answers: Iterable[dict[str, Any]], console: Console) -> None:
    """Print the answers as a table, a batch at a time."""
    rows = iter(answers)
    first = True
    while batch := list(islice(rows, _BATCH)):
        table = Table(box=None, show_header=first, expand=True)
        table.add_column("message", ratio=3, no_wrap=True)
        table.add_column("intents", ratio=2)
        table.add_column("out of scope", justify="right", width=12)
        for answer in batch:
            likely = {one["intent_id"]: one["probability"] for one in answer["intents"]}
            expressed = [f"{one} {likely[one]:.0%}" if one in likely else one for one in answer["expressed"]]
            shown = escape(", ".join(expressed)) or f"[dim]{OTHER_INTENT}[/]"
            table.add_row(escape(answer["message"][:_SHOWN_CHARS]), shown, f"{answer['out_of_scope']:.2f}")
        console.print(table)
        first = False


def _messages(lines: Iterable[bytes], refuse: Callable[[int, str], None]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            refuse(number, f"not valid JSON ({error}); write an object with `message`, or a string, on each line")
            continue
        row = {"message": value} if isinstance(value, str) else value
        message = row.get("message") if isinstance(row, dict) else None
        if not isinstance(message, str) or not message.strip():
            refuse(number, 'holds no message; write {"message": "…"} or "…", not blank')
        elif any(0xD800 <= ord(char) <= 0xDFFF for char in message):
            refuse(number, "the message holds a lone surrogate, which is no text; correct it where it is written")
        else:
            yield {name: row[name] for name in _PASSED_ON if name in row} | {"message": message}


def _answer(reading: Reading) -> dict[str, Any]:
    expressed = [intent_id for intent_id, _ in reading.expressed]
    return {
        "intents": [{"intent_id": intent_id, "probability": probability} for intent_id, probability in reading.top],
        "expressed": expressed,
        "intent": expressed[0] if expressed else OTHER_INTENT,
        "out_of_scope": reading.out_of_scope,
    }
