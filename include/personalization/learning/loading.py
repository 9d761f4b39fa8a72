"""Loading: the history as the stores hold it."""

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import structlog

from personalization.learning.history import (
    CatalogArrays,
    History,
    Intents,
    Messages,
    in_order,
    signals_of_events,
    signals_of_messages,
)
from personalization.recommend.sources import Matrix, Whole
from personalization.schemas import OTHER_INTENT, Catalog, VectorSpace
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import MESSAGES

_ALWAYS = (0, 2**62)

log = structlog.get_logger(__name__)


class VectorSource(Protocol):
    """Where the vectors of messages are read, such as a `VectorStore`."""

    def vectors(self, collection: str, ids: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield `{id, embedding}` rows of the ids that are stored."""
        ...


class _Said(NamedTuple):
    message_id: str
    user: int
    at: int


def load_history(
    *,
    analytics: AnalyticsStore,
    vectors: VectorSource,
    space: VectorSpace,
    catalog: Catalog,
    campaign_vectors: Matrix,
    settings: Settings,
) -> History:
    """All intents and events, and the newest `learning_max_messages` messages with their vectors.

    `campaign_vectors`: (C, D) in the catalog's order. Reads each row of `message_intents` and `events` once, streamed,
    and each vector once, 1,000 a round trip. Memory: a float32 for each message and dimension that is no padding, some
    100 bytes a message kept, some 50 an intent, click, conversion, and pair of user and campaign shown.
    """
    width = _width(campaign_vectors)
    arrays = CatalogArrays.of(catalog.campaigns, [one.id for one in catalog.intents], campaign_vectors[:, :width])
    users: dict[str, int] = {}
    intents, newest = _read_expressions(analytics, users, arrays.intent_ids, settings.learning_max_messages)
    events = signals_of_events(_read_events(analytics, users, arrays.ids))
    messages = _read_vectors(vectors, space.collection(MESSAGES), newest, width)
    history = History(
        list(users),
        arrays,
        messages,
        intents,
        in_order(events, signals_of_messages(intents, arrays)),
        settings.profile_half_life_days,
        settings.neighbours,
        settings.profile_max_messages,
    )
    return _by_user_id(history)


def _read_expressions(
    analytics: AnalyticsStore, users: dict[str, int], intent_ids: list[str], limit: int
) -> tuple[Intents, list[_Said]]:
    """What was expressed, and the newest messages. New users are added."""
    places = {intent_id: at for at, intent_id in enumerate(intent_ids)}
    newest: deque[_Said] = deque(maxlen=limit)
    of_message, of_user, times, of_intent = (array("q") for _ in range(4))
    count = 0
    confidences = array("f")
    for rows in analytics.expressions(*_ALWAYS):
        named = zip(
            rows["message_id"], rows["user_id"], rows["timestamp"], rows["intent_id"], rows["confidence"], strict=True
        )
        for message_id, user_id, at, intent_id, confidence in named:
            user = users.setdefault(user_id, len(users))
            if not newest or newest[-1].message_id != message_id:  # the rows of a message follow each other
                newest.append(_Said(message_id, user, at))
                count += 1
            if intent_id != OTHER_INTENT and intent_id in places:
                of_message.append(count)
                of_user.append(user)
                times.append(at)
                of_intent.append(places[intent_id])
                confidences.append(confidence)
    intents = Intents(
        user=np.array(of_user, dtype=np.int64),
        at=np.array(times, dtype=np.int64),
        intent=np.array(of_intent, dtype=np.int64),
        confidence=np.array(confidences, dtype=np.float32),
        message=np.array(of_message, dtype=np.int64),
    )
    return intents, list(newest)


def _read_events(
    analytics: AnalyticsStore, users: dict[str, int], campaign_ids: list[str]
) -> Iterator[tuple[int, int, str, int]]:
    """Events of the catalog's campaigns. New users are added."""
    places = {campaign_id: at for at, campaign_id in enumerate(campaign_ids)}
    for rows in analytics.interactions(*_ALWAYS):
        named = zip(rows["user_id"], rows["campaign_id"], rows["event"], rows["timestamp"], strict=True)
        for user_id, campaign_id, kind, at in named:
            if campaign_id in places:
                yield users.setdefault(user_id, len(users)), places[campaign_id], kind, at


def _read_vectors(vectors: VectorSource, collection: str, said: list[_Said], width: int) -> Messages:
    """The messages that have a vector, by time."""
    place = {one.message_id: at for at, one in enumerate(said)}
    matrix = np.empty((len(said), width), dtype=np.float32)
    found = np.zeros(len(said), dtype=bool)
    for rows in vectors.vectors(collection, list(place)):
        for row in rows:
            at = place[row["id"]]
            matrix[at] = row["embedding"][:width]
            found[at] = True
    if missing := len(said) - int(found.sum()):
        log.warning(f"{missing:,} messages have no vector and are left out")
        matrix = matrix[found]
    return Messages(
        user=np.asarray([one.user for one in said], dtype=np.int64)[found],
        at=np.asarray([one.at for one in said], dtype=np.int64)[found],
        vectors=matrix,
    )


def _by_user_id(history: History) -> History:
    """The same with users in order of their ids, whatever the order in which the stores named them."""
    user_ids = sorted(history.user_ids)
    rank = {user_id: at for at, user_id in enumerate(user_ids)}
    places: Whole = np.asarray([rank[user_id] for user_id in history.user_ids], dtype=np.int64)
    return replace(
        history,
        user_ids=user_ids,
        messages=replace(history.messages, user=places[history.messages.user]),
        intents=replace(history.intents, user=places[history.intents.user]),
        signals=replace(history.signals, user=places[history.signals.user]),
    )


def _width(vectors: Matrix) -> int:
    """Dimensions without the zeros that pad a smaller model; all, where there is nothing to tell by."""
    used = np.flatnonzero(vectors.any(axis=0))
    return int(used[-1]) + 1 if len(used) else vectors.shape[1]
