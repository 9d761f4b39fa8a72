"""The vectors of texts that were met before, on real Redis."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import Stores, free_ports
from personalization.encoder import get_encoder, model_version
from personalization.pipeline.embed import embed, embeddings_of
from personalization.pipeline.ingest import MESSAGE_SCHEMA
from personalization.pipeline.lineage import StageReport
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging, read
from personalization.stores.cache import CachePublisher, VectorCache
from redis import Redis
from structlog.testing import capture_logs

DAY_S = 86_400
SAID = [
    ("ann", "a week in Lisbon"),
    ("bob", "my card was stolen"),
    ("ann", "hello"),
    ("bob", "hello"),
    ("ann", "a week in Lisbon"),
]
VERSION = "0123456789abcdef"


@pytest.fixture
def cache(stores: Stores) -> VectorCache:
    return VectorCache(stores.redis, 30)


@pytest.fixture
def space(settings: Settings) -> Iterator[VectorSpace]:
    yield VectorSpace(settings.embedding_model, settings.embedding_dim)
    get_encoder.cache_clear()


class Embedded:
    """What the stage makes of (user, text) pairs."""

    def __init__(self, folder: Path, space: VectorSpace, cache: VectorCache, said: list[tuple[str, str]]) -> None:
        staging = Staging(str(folder), "run")
        columns = {
            "id": [f"m{at}" for at in range(len(said))],
            "user_id": [user for user, _ in said],
            "timestamp": list(range(len(said))),
            "text": [text for _, text in said],
        }
        shard = staging.write("messages/000000.parquet", pa.table(columns, schema=MESSAGE_SCHEMA))
        report = StageReport(run_id="run", stage="embed", shard=0, attempt=1, started_at=datetime.now(UTC))
        self.vectors = embeddings_of(read(embed(report, shard, space=space, staging=staging, cache=cache)))
        self.details = report.details
        self.counts = (report.details["cache_hits"], report.details["cache_misses"])


def unit(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def test_what_was_embedded_before_is_the_same_and_loads_no_model(
    tmp_path: Path, space: VectorSpace, cache: VectorCache
):
    first = Embedded(tmp_path, space, cache, SAID)
    get_encoder.cache_clear()

    again = Embedded(tmp_path, space, cache, [("somebody new", text) for _, text in SAID])

    assert (first.counts, again.counts) == ((0, 3), (3, 0))
    np.testing.assert_array_equal(again.vectors, first.vectors)
    assert get_encoder.cache_info().misses == 0
    assert "device" not in again.details
    assert (first.vectors[2] == first.vectors[3]).all()


def test_only_what_is_new_is_encoded(tmp_path: Path, space: VectorSpace, cache: VectorCache):
    Embedded(tmp_path, space, cache, SAID)
    said = [("cleo", "what does a good risotto need?"), *SAID]

    mixed = Embedded(tmp_path, space, cache, said)

    assert mixed.counts == (3, 1)
    alone = get_encoder(space.model, space.dim).encode([text for _, text in said])
    assert (mixed.vectors * alone).sum(axis=1).min() > 0.9995


def test_vectors_of_another_model_are_not_known(cache: VectorCache):
    cache.keep(VERSION, SAID, {"hello": unit(0.6, 0.8)})

    known = cache.look_up(VERSION, ["nobody said this", "hello"])
    assert known.places.tolist() == [1]
    np.testing.assert_array_equal(known.vectors, [unit(0.6, 0.8)])
    assert len(cache.look_up(VERSION[::-1], ["hello"]).places) == 0


def test_thousands_of_texts_keep_their_places(cache: VectorCache):
    said = [("ann", f"text {number}") for number in range(2500)]
    made = {text: unit(number, 1) for number, (_, text) in enumerate(said) if number % 3}
    cache.keep(VERSION, said, made)

    known = cache.look_up(VERSION, [text for _, text in said])

    assert known.places.tolist() == [number for number in range(2500) if number % 3]
    assert known.vectors[:, 0].tolist() == known.places.tolist()
    assert CachePublisher(cache.client).count_user("ann") == len(made)
    assert CachePublisher(cache.client).erase_user("ann") == {"answers": 0, "vectors": len(made)}


def test_vectors_and_whose_they_are_go_after_their_days(cache: VectorCache, stores: Stores):
    cache.keep(VERSION, SAID, {"hello": unit(1, 0)})

    (vector,) = stores.redis.keys("vector:*")
    assert 29 * DAY_S < stores.redis.ttl(vector) <= 30 * DAY_S
    assert stores.redis.ttl("vectors-of:{bob}") > stores.redis.ttl(vector)


def test_with_no_days_nothing_is_asked_and_nothing_kept(stores: Stores):
    off = VectorCache(stores.redis, 0)
    off.keep(VERSION, SAID, {"hello": unit(1, 0)})

    assert len(off.look_up(VERSION, ["hello"]).places) == 0
    assert stores.redis.keys("vector*") == []


def test_with_a_user_go_the_vectors_of_what_they_said_and_others_stay(cache: VectorCache, stores: Stores):
    publisher = CachePublisher(stores.redis)
    cache.keep(VERSION, SAID, {text: unit(1, 0) for _, text in SAID})
    assert (publisher.count_user("ann"), publisher.count_user("bob")) == (2, 2)

    assert publisher.erase_user("ann") == {"answers": 0, "vectors": 2}

    assert publisher.count_user("ann") == 0
    assert not stores.redis.exists("vectors-of:{ann}")
    known = cache.look_up(VERSION, ["a week in Lisbon", "hello", "my card was stolen"])
    assert known.places.tolist() == [2]
    assert publisher.count_user("bob") == 1
    cache.keep(VERSION, SAID[2:4], {"hello": unit(1, 0)})  # a task that was at work when ann was erased
    assert publisher.count_user("ann") == 1


def test_without_redis_texts_are_encoded_and_the_log_says_so_once(tmp_path: Path, space: VectorSpace):
    down = VectorCache(Redis(port=free_ports(1)[0]), 30)

    with capture_logs() as logs:
        embedded = Embedded(tmp_path, space, down, SAID)

    assert embedded.counts == (0, 3)
    np.testing.assert_allclose(np.linalg.norm(embedded.vectors, axis=1), 1, atol=1e-6)
    told = [one for one in logs if one["log_level"] == "warning"]
    assert [one["event"] for one in told] == ["vectors are made without the cache"]
    assert "redis: does not answer" in told[0]["problem"]


def test_the_local_stack_s_model_has_a_version(space: VectorSpace):
    assert len(model_version(space.model) or "") == 16
