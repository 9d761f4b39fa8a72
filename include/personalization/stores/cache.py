"""Redis: answers with a time to live, fenced by the serving generation, and vectors of texts that were met before.

The generation is part of every stored answer. `publish` moves it on, so answers computed from older data are
never given as fresh again and expire by themselves.
"""

import hashlib
import random
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from personalization.errors import StoreError
from personalization.settings import Settings

_GENERATION_KEY = "personalization:generation"
_ANSWER = "answer:{"
_GENERATION_BYTES = 20
_EARLIEST = 0.8
_KEPT_TTLS = 12
"""Times to live for which an answer is kept to stand in."""
_VECTOR = "vector:"
_VECTORS_AT_ONCE = 1000
_DAY_S = 86_400
_OUTLIVES_S = 3600


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn driver errors into a `StoreError` that names the store and no credential."""
    try:
        yield
    except AuthenticationError as error:
        hint = "check REDIS_URL or the connection redis_default"
        raise StoreError("redis", f"refused the password; {hint}") from error
    except ValueError as error:
        raise StoreError("redis", "REDIS_URL is not a valid address") from error
    except (RedisError, OSError) as error:
        raise StoreError("redis", f"does not answer ({type(error).__name__}); is it running?") from error


class CachePublisher:
    """The pipeline's side: moves the generation on."""

    def __init__(self, client: Redis) -> None:
        self.client = client

    @classmethod
    def from_settings(cls, settings: Settings) -> "CachePublisher":
        """Connect lazily."""
        with redis_errors():
            client = Redis.from_url(
                settings.redis_url.get_secret_value(),
                socket_timeout=settings.store_timeout_s,
                socket_connect_timeout=settings.store_timeout_s,
            )
        return cls(client)

    def next_generation(self) -> int:
        """Start a new serving generation and return its number.

        Counts up only, so a repeated publish never brings an older generation's answers back.
        """
        with redis_errors():
            return int(self.client.incr(_GENERATION_KEY))

    def generation(self) -> int | None:
        """The serving generation; None where there is none, or what is there is no number."""
        with redis_errors():
            value = cast("bytes | None", self.client.get(_GENERATION_KEY)) or b""
        return int(value) if value.isdigit() else None

    def begin_generation(self, at_least: int) -> int:
        """Start a new serving generation that is not below `at_least`; return its number. Safe to repeat."""
        if self.generation() is None:
            with redis_errors():
                self.client.set(_GENERATION_KEY, 0)
        with redis_errors():
            # Counted up, so that a publish in between is not undone.
            return int(self.client.incrby(_GENERATION_KEY, max(1, at_least - (self.generation() or 0))))

    def answers(self) -> Iterator[list[tuple[str, str, int | None]]]:
        """Yield (key, user, generation) of all cached answers, some hundreds at a time; None for what is no number.

        Two round trips a page; reads the first bytes of an answer.
        """
        cursor = 0
        while True:
            with redis_errors():
                cursor, keys = cast("tuple[int, list[bytes]]", self.client.scan(cursor, f"{_ANSWER}*", 1000))
                pipeline = self.client.pipeline(transaction=False)
                for key in keys:
                    pipeline.getrange(key, 0, _GENERATION_BYTES)
                heads = [head.partition(b"|")[0] for head in pipeline.execute()] if keys else []
            yield [
                (name := key.decode(), name[len(_ANSWER) :].partition("}")[0], int(head) if head.isdigit() else None)
                for key, head in zip(keys, heads, strict=True)
                if head  # else it has expired meanwhile
            ]
            if cursor == 0:
                return

    def touch(self, user_id: str, ttl_s: int) -> None:
        """Make all cached answers of the user old, those being made now, too; `ttl_s` is that of an answer."""
        with redis_errors():
            self.client.set(_touched_key(user_id), secrets.token_hex(8), ex=ttl_s * _KEPT_TTLS * 2)

    def erase_user(self, user_id: str) -> dict[str, int]:
        """Delete the user's answers, and the vectors of what they said; return how many of each.

        Reads the names of all keys, 1,000 a round trip.
        """
        with redis_errors():
            keys = self._answers_of(user_id)
            answers = int(self.client.delete(*keys)) if keys else 0
            return {"answers": answers, "vectors": VectorCache(self.client, 0).erase_user(user_id)}

    def count_user(self, user_id: str) -> int:
        """Stored answers of the user, and vectors of what they said."""
        with redis_errors():
            return len(self._answers_of(user_id)) + VectorCache(self.client, 0).count_user(user_id)

    def _answers_of(self, user_id: str) -> list[bytes]:
        # No id holds a character that a pattern would take for another.
        return list(self.client.scan_iter(match=answer_key(user_id, "*"), count=1000))


@dataclass(frozen=True)
class KnownVectors:
    """What the cache knows of some texts."""

    places: np.ndarray[Any, np.dtype[np.int64]]
    """Of the texts that are known among those asked for."""
    vectors: np.ndarray[Any, np.dtype[np.float32]]
    """Theirs, shape (places, model's dimension), of unit length, not padded."""


class VectorCache:
    """The pipeline's vectors by model and text: a text that was met before costs a look-up instead of a model.

    A vector is a key of its own with a time to live, so Redis drops what it has no room for. Beside them stands for
    each user which are of what they said, so that they are found when the user is erased, whatever became of the texts.
    A vector of several users goes with the first of them that is erased.
    """

    def __init__(self, client: Redis, days: int) -> None:
        self.client = client
        self._ttl_s = days * _DAY_S
        """0: nothing is asked or kept."""

    def look_up(self, version: str, texts: Sequence[str]) -> KnownVectors:
        """Of the texts, by the version of the model. A round trip for 1,000 texts; nothing is unpacked one by one."""
        values: list[bytes | None] = []
        with redis_errors():
            for start in range(0, len(texts) if self._ttl_s else 0, _VECTORS_AT_ONCE):
                keys = [_vector_key(version, text) for text in texts[start : start + _VECTORS_AT_ONCE]]
                values += cast("list[bytes | None]", self.client.mget(keys))
        places = np.array([place for place, value in enumerate(values) if value], np.int64)
        numbers = np.frombuffer(b"".join(value for value in values if value), "<f4")
        return KnownVectors(places, numbers.reshape(len(places), -1 if len(places) else 0))

    def keep(
        self,
        version: str,
        said: Sequence[tuple[str, str]],
        made: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]],
    ) -> None:
        """Keep the vectors that were `made`, by text, and who `said` which text. Safe to repeat.

        A round trip for 1,000 texts; per text one SET, per user one SADD.
        """
        if not self._ttl_s:
            return
        with redis_errors():
            for start in range(0, len(said), _VECTORS_AT_ONCE):
                part = said[start : start + _VECTORS_AT_ONCE]
                of_users: dict[str, list[str]] = {}
                for user_id, text in part:
                    of_users.setdefault(user_id, []).append(_vector_key(version, text))
                pipeline = self.client.pipeline(transaction=False)
                for user_id, keys in of_users.items():  # first, so that no vector is without
                    pipeline.sadd(_vectors_of(user_id), *keys)
                    pipeline.expire(_vectors_of(user_id), self._ttl_s + _OUTLIVES_S)
                for text in {text for _, text in part if text in made}:
                    pipeline.set(_vector_key(version, text), made[text].astype("<f4").tobytes(), ex=self._ttl_s)
                pipeline.execute()

    def erase_user(self, user_id: str) -> int:
        """Delete the vectors of what the user said; return how many there were."""
        removed = 0
        with redis_errors():
            for keys in self._of_user(user_id):
                pipeline = self.client.pipeline()
                pipeline.delete(*keys)
                pipeline.srem(_vectors_of(user_id), *keys)  # not the set: a task at work may have added to it
                removed += int(pipeline.execute()[0])
        return removed

    def count_user(self, user_id: str) -> int:
        """Vectors of what the user said."""
        with redis_errors():
            return sum(int(self.client.exists(*keys)) for keys in self._of_user(user_id))

    def _of_user(self, user_id: str) -> Iterator[list[bytes]]:
        keys = list(cast("set[bytes]", self.client.smembers(_vectors_of(user_id))))
        for start in range(0, len(keys), _VECTORS_AT_ONCE):
            yield keys[start : start + _VECTORS_AT_ONCE]


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer as it was stored."""

    generation: bytes
    touched: bytes
    fresh_until: float
    """Seconds since the epoch."""
    recent_until: float
    """Until then it may be given while a new one is made."""
    body: bytes


@dataclass(frozen=True, slots=True)
class LookedUp:
    """What Redis says about an answer."""

    generation: bytes
    """The serving generation; 0 before the first publish."""
    touched: bytes
    """Changes with everything the user did that must count at once."""
    stored: Stored | None

    @property
    def is_current(self) -> bool:
        """Whether the stored answer is of this generation."""
        return self.is_of_user and self.stored.generation == self.generation  # type: ignore[union-attr]

    @property
    def is_of_user(self) -> bool:
        """Whether the stored answer is of what the user did last. Not where that was forgotten."""
        return self.stored is not None and self.touched != b"" and self.stored.touched == self.touched

    @property
    def is_recent(self) -> bool:
        """Whether the stored answer may be given while a new one is made."""
        return self.is_current and time.time() < self.stored.recent_until  # type: ignore[union-attr]

    @property
    def is_fresh(self) -> bool:
        """Whether the stored answer may be given as it is."""
        return self.is_current and time.time() < self.stored.fresh_until  # type: ignore[union-attr]


class AsyncCache:
    """The API's side: answers by user and variant.

    A stored answer carries the generation and the user's token it was made under. Reading those that count now and
    the answer is one `MGET`, so what is not of now is seen in the same round trip. Answers stay for a while after
    they are fresh, to stand in while a new one is made or a store is down.
    """

    def __init__(self, client: AsyncRedis, ttl_s: int) -> None:
        self.client = client
        self._ttl_s = ttl_s
        self.untouched: set[str] = set()
        """Users whose cached answers are old without Redis knowing it; made up for before their next look-up."""

    @classmethod
    def from_settings(cls, settings: Settings) -> "AsyncCache":
        """Connect lazily. A connection that has died is replaced once; what is slow is not asked again."""
        with redis_errors():
            client = AsyncRedis.from_url(
                settings.redis_url.get_secret_value(),
                socket_timeout=settings.answer_store_timeout_s,
                socket_connect_timeout=settings.answer_store_timeout_s,
                retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            )
        return cls(client, settings.cache_ttl_s)

    async def generation(self) -> int:
        """The serving generation; 0 before the first publish."""
        with redis_errors():
            return int(await self.client.get(_GENERATION_KEY) or 0)

    async def look_up(self, asked: Sequence[tuple[str, str]]) -> list[LookedUp]:
        """Of each (user, variant), where a variant is what was asked about the user. One round trip."""
        if self.untouched and (late := self.untouched & {user_id for user_id, _ in asked}):
            await self.touch(late)
        keys = [_GENERATION_KEY]
        for user_id, variant in asked:
            keys += (_touched_key(user_id), answer_key(user_id, variant))
        with redis_errors():
            generation, *values = cast("list[bytes | None]", await self.client.mget(keys))
        generation = generation or b"0"
        return [
            LookedUp(generation, touched or b"", self._parsed(value) if value is not None else None)
            for touched, value in zip(values[::2], values[1::2], strict=True)
        ]

    async def put(self, answers: Sequence[tuple[str, str, bytes, bytes, bytes]]) -> None:
        """Store answers as (user, variant, generation, token, JSON), in one round trip.

        Under the generation and token looked up before the evidence was: what was published or done meanwhile makes
        them old at once.
        """
        now = time.time()
        with redis_errors():
            pipeline = self.client.pipeline(transaction=False)
            for user_id, variant, generation, touched, body in answers:
                if not touched:  # or the answer would outlive a token that Redis had no room for
                    touched = secrets.token_hex(8).encode()
                    pipeline.set(_touched_key(user_id), touched, ex=self._ttl_s * _KEPT_TTLS * 2, nx=True)
                # Spread, so that what was made at once does not end at once.
                fresh_until = now + self._ttl_s * random.uniform(_EARLIEST, 1)  # noqa: S311
                value = b"|".join((generation, touched, b"%.3f" % fresh_until, body))
                pipeline.set(answer_key(user_id, variant), value, ex=self._ttl_s * _KEPT_TTLS)
            await pipeline.execute()

    def _parsed(self, value: bytes) -> Stored:
        generation, touched, fresh_until, body = value.split(b"|", 3)
        until = float(fresh_until)
        return Stored(generation, touched, until, until + self._ttl_s, body)

    async def touch(self, user_ids: Collection[str]) -> None:
        """Make all cached answers of the users old, those being made now, too. One round trip."""
        with redis_errors():
            pipeline = self.client.pipeline(transaction=False)
            for user_id in user_ids:
                pipeline.set(_touched_key(user_id), secrets.token_hex(8), ex=self._ttl_s * _KEPT_TTLS * 2)
            await pipeline.execute()
        self.untouched.difference_update(user_ids)


def answer_key(user_id: str, variant: str) -> str:
    """The braces keep all keys of a user in one slot of a cluster; no id holds one."""
    return f"answer:{{{user_id}}}:{variant}"


def _touched_key(user_id: str) -> str:
    return f"touched:{{{user_id}}}"


def _vector_key(version: str, text: str) -> str:
    return f"{_VECTOR}{version}:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _vectors_of(user_id: str) -> str:
    return f"vectors-of:{{{user_id}}}"
