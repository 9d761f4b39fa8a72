"""A data set of one's own: messages, events and a catalog, from files to a history."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import structlog
from pydantic import ValidationError
from upath import UPath

from personalization.encoder import get_encoder
from personalization.learning.history import (
    CatalogArrays,
    History,
    Intents,
    Messages,
    in_order,
    signals_of_events,
    signals_of_messages,
)
from personalization.reading import Row, check_readable, read_rows
from personalization.recommend.sources import Matrix
from personalization.schemas import Catalog, Event, Message
from personalization.settings import Settings
from personalization.understanding.classifier import IntentClassifier

_PROBLEMS_KEPT = 5
_Record = TypeVar("_Record", Message, Event)

log = structlog.get_logger(__name__)


@dataclass
class Refused:
    """Rows that could not be taken: how many, and the first few with their place."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str, problem: str) -> None:
        """Count one, and keep it if it is among the first."""
        self.count += 1
        if len(self.first) < _PROBLEMS_KEPT:
            self.first.append(f"{place}: {problem}")


def load_messages(path: UPath, refused: Refused) -> list[Message]:
    """The messages of a file, once each by id; none of an empty file."""
    if path.is_file() and path.stat().st_size == 0:
        return []
    return _load(path, refused, lambda row: Message.model_validate(row.value), lambda one: one.message_id)


def load_events(path: UPath, refused: Refused) -> list[Event]:
    """The events of a file, once each by id."""
    return _load(
        path, refused, lambda row: Event.of_row(row.value, of_strings=row.of_strings), lambda one: one.event_id
    )


def _load(
    path: UPath, refused: Refused, parse: Callable[[Row], _Record], id_of: Callable[[_Record], str]
) -> list[_Record]:
    check_readable(path)
    records: dict[str, _Record] = {}
    for row in read_rows(path):
        place = f"{path}:{row.number}"
        if row.problem is not None or not isinstance(row.value, dict):
            refused.add(place, row.problem or f"is not an object but {type(row.value).__name__}")
            continue
        try:
            record = parse(row)
        except ValidationError as error:
            refused.add(place, "; ".join(_explain(one) for one in error.errors(include_url=False)))
        else:
            known = records.setdefault(id_of(record), record)
            if known.content_hash != record.content_hash:
                refused.add(place, f"the id {id_of(record)} stands in an earlier row with other content")
    return list(records.values())


def _explain(problem: Any) -> str:
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"


def build_history(
    messages: Sequence[Message], events: Sequence[Event], catalog: Catalog, settings: Settings
) -> History:
    """Embed what has text, classify it where the catalog has intents, and put all of it in order of time.

    Events of campaigns that the catalog does not hold are left out, and said.
    """
    campaign_ids = {one.id: at for at, one in enumerate(catalog.campaigns)}
    unknown = Counter(one.campaign_id for one in events if one.campaign_id not in campaign_ids)
    if unknown:
        log.warning(f"{sum(unknown.values()):,} events of {len(unknown):,} campaigns that the catalog does not hold")
    events = sorted(
        (one for one in events if one.campaign_id in campaign_ids), key=lambda one: (one.timestamp_ms, one.event_id)
    )
    messages = sorted(messages, key=lambda one: (one.timestamp_ms, one.message_id))
    user_ids = sorted({one.user_id for one in messages} | {one.user_id for one in events})
    place = {user_id: at for at, user_id in enumerate(user_ids)}
    examples = [(intent.id, example) for intent in catalog.intents for example in intent.examples]
    vectors, texts, utterances = _embed(
        [one.message for one in messages],
        [one.text for one in catalog.campaigns],
        [example for _, example in examples],
        settings=settings,
    )
    said = Messages(
        user=np.asarray([place[one.user_id] for one in messages], dtype=np.int64),
        at=np.asarray([one.timestamp_ms for one in messages], dtype=np.int64),
        vectors=vectors,
    )
    arrays = CatalogArrays.of(catalog.campaigns, [one.id for one in catalog.intents], texts)
    classifier = IntentClassifier.fit([intent_id for intent_id, _ in examples], utterances) if examples else None
    intents = _classify(said, classifier, arrays.intent_ids, settings.intent_keep)
    engaged = signals_of_events(
        (place[one.user_id], campaign_ids[one.campaign_id], one.event, one.timestamp_ms) for one in events
    )
    return History(
        user_ids,
        arrays,
        said,
        intents,
        in_order(engaged, signals_of_messages(intents, arrays)),
        settings.profile_half_life_days,
        settings.neighbours,
        settings.profile_max_messages,
    )


def _embed(*parts: list[str], settings: Settings) -> list[Matrix]:
    """Vectors of each part's texts, without the zeros that pad a smaller model."""
    encoder = get_encoder(settings.embedding_model, settings.embedding_dim)
    vectors = encoder.encode([text for part in parts for text in part])[:, : encoder.model_dim]
    return np.split(vectors, np.cumsum([len(part) for part in parts])[:-1])


def _classify(said: Messages, classifier: IntentClassifier | None, intent_ids: list[str], keep: float) -> Intents:
    """What the messages express; nothing where there is no intent to tell."""
    place = {intent_id: at for at, intent_id in enumerate(intent_ids)}
    readings = classifier.classify(said.vectors, keep) if classifier else []
    expressed = [
        (message, place[intent_id], probability)
        for message, reading in enumerate(readings)
        for intent_id, probability in reading.expressed
    ]
    messages, intents, probabilities = zip(*expressed, strict=True) if expressed else ((), (), ())
    of_message = np.asarray(messages, dtype=np.int64)
    return Intents(
        user=said.user[of_message],
        at=said.at[of_message],
        intent=np.asarray(intents, dtype=np.int64),
        confidence=np.asarray(probabilities, dtype=np.float32),
        message=of_message,
    )
