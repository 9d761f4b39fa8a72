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
from personalization.errors import InputError
from personalization.learning.history import (
    CatalogArrays,
    History,
    Intents,
    Messages,
    Signals,
    signals_of_messages,
)
from personalization.reading import Row, check_readable, read_rows
from personalization.recommend.sources import Matrix
from personalization.schemas import ENGAGEMENT_STRENGTH, Catalog, Event, Message
from personalization.settings import Settings

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
    """The messages of a file, once each by id."""
    return _load(path, refused, lambda row: Message.model_validate(row.value), lambda one: one.message_id)


def load_events(path: UPath, refused: Refused) -> list[Event]:
    """The events of a file, once each by id."""
    return _load(path, refused, _event, lambda one: one.event_id)


def _event(row: Row) -> Event:
    return Event.model_validate_strings(row.value) if row.of_strings else Event.model_validate(row.value)


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
            records.setdefault(id_of(record), record)
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
    events = sorted((one for one in events if one.campaign_id in campaign_ids), key=lambda one: one.timestamp)
    if not events:
        raise InputError("no event is of a campaign of the catalog; is it the right catalog?")
    messages = sorted(messages, key=lambda one: one.timestamp)
    user_ids = sorted({one.user_id for one in messages} | {one.user_id for one in events})
    place = {user_id: at for at, user_id in enumerate(user_ids)}
    vectors, texts = _embed([one.message for one in messages], [one.text for one in catalog.campaigns], settings)
    said = Messages(
        user=np.asarray([place[one.user_id] for one in messages], dtype=np.int64),
        at=np.asarray([one.timestamp_ms for one in messages], dtype=np.int64),
        vectors=vectors,
    )
    arrays = CatalogArrays.of(catalog.campaigns, [one.id for one in catalog.intents], texts)
    intents = _classify(said, catalog, settings)
    return History(
        user_ids,
        arrays,
        said,
        intents,
        _in_order(_signals(events, place, campaign_ids), signals_of_messages(intents, arrays)),
    )


def _embed(said: list[str], campaigns: list[str], settings: Settings) -> tuple[Matrix, Matrix]:
    """Vectors of messages and campaigns, without the zeros that pad a smaller model."""
    encoder = get_encoder(settings.embedding_model, settings.embedding_dim, settings.embedding_batch_size)
    vectors = encoder.encode([*said, *campaigns])[:, : encoder.model_dim]
    return vectors[: len(said)], vectors[len(said) :]


def _signals(events: Sequence[Event], users: dict[str, int], campaigns: dict[str, int]) -> Signals:
    """Clicks and conversions, each with the place at which the campaign had last been shown."""
    shown: dict[tuple[str, str], int] = {}
    positive: list[tuple[Event, int]] = []
    for one in events:
        key = (one.user_id, one.campaign_id)
        if one.event == "impression" and one.position:
            shown[key] = one.position
        elif one.event in ENGAGEMENT_STRENGTH:
            positive.append((one, one.position or shown.get(key, 0)))
    return Signals(
        user=np.asarray([users[one.user_id] for one, _ in positive], dtype=np.int64),
        campaign=np.asarray([campaigns[one.campaign_id] for one, _ in positive], dtype=np.int64),
        at=np.asarray([one.timestamp_ms for one, _ in positive], dtype=np.int64),
        strength=np.asarray([ENGAGEMENT_STRENGTH[one.event] for one, _ in positive], dtype=np.float32),
        is_event=np.ones(len(positive), dtype=bool),
        position=np.asarray([position for _, position in positive], dtype=np.int64),
    )


def _in_order(*parts: Signals) -> Signals:
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    order = np.argsort(joined["at"], kind="stable")
    return Signals(**{name: column[order] for name, column in joined.items()})


def _classify(said: Messages, catalog: Catalog, settings: Settings) -> Intents:
    nothing = np.zeros(0, dtype=np.int64)
    return Intents(nothing, nothing, nothing, np.zeros(0, dtype=np.float32))
