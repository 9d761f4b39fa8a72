"""Redis: answers with a time to live, fenced by the serving generation.

The generation is part of every key. `publish` moves it on, so answers computed from older data are
never looked up again and expire by themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import AuthenticationError, RedisError

from personalization.errors import StoreError
from personalization.settings import Settings

_GENERATION_KEY = "personalization:generation"


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


class AsyncCache:
    """The API's side: answers by user, `top` and generation."""

    def __init__(self, client: AsyncRedis, ttl_s: int) -> None:
        self.client = client
        self._ttl_s = ttl_s

    @classmethod
    def from_settings(cls, settings: Settings) -> "AsyncCache":
        """Connect lazily."""
        with redis_errors():
            client = AsyncRedis.from_url(
                settings.redis_url.get_secret_value(),
                socket_timeout=settings.store_timeout_s,
                socket_connect_timeout=settings.store_timeout_s,
            )
        return cls(client, settings.cache_ttl_s)

    async def generation(self) -> int:
        """The serving generation; 0 before the first publish."""
        with redis_errors():
            return int(await self.client.get(_GENERATION_KEY) or 0)

    async def get(self, generation: int, user_id: str, top: int, *, explain: bool = False) -> bytes | None:
        """A stored answer, as the bytes it was stored as."""
        with redis_errors():
            return cast("bytes | None", await self.client.get(_answer_key(generation, user_id, top, explain=explain)))

    async def put(self, generation: int, user_id: str, top: int, answer: bytes, *, explain: bool = False) -> None:
        """Store an answer until its time to live is over."""
        with redis_errors():
            await self.client.set(_answer_key(generation, user_id, top, explain=explain), answer, ex=self._ttl_s)


def _answer_key(generation: int, user_id: str, top: int, *, explain: bool) -> str:
    return f"{'explained' if explain else 'recommendations'}:{generation}:{top}:{user_id}"
