"""What the API knows of a user is what learning knows of them at the same moment: no skew between the two.

By design they differ only beyond limits that the sample does not reach: learning knows the newest
`LEARNING_MAX_MESSAGES` messages of all users; HNSW may miss a neighbour among very many; and a message from a clock
ahead of ours is known to the API at once, to learning from its moment on.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLE, empty_settings, with_quiet_user
from personalization.catalog.loading import load_catalog
from personalization.learning.history import History, take_snapshot
from personalization.learning.loading import load_history
from personalization.local.stack import Stack
from personalization.pipeline.embed import campaign_vectors_of, embed_campaigns
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.run import run_pipeline
from personalization.recommend.candidates import Known, Lookup, gather
from personalization.recommend.guard import Guard
from personalization.recommend.knowledge import ServedKnowledge
from personalization.recommend.ranking import DEFAULT_FUSION, Evidence
from personalization.recommend.sources import SOURCES
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging, read
from personalization.stores.analytics import AnalyticsStore, AsyncAnalyticsReader
from personalization.stores.milvus import AsyncVectorReader, VectorStore
from personalization.stores.mongo import AsyncEventStore
from personalization.stores.neo4j import AsyncGraphReader

# Single precision all the way, sums in another order; Milvus and Neo4j each round once more.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


class Sides:
    """Both ways to the same evidence."""

    def __init__(self, settings: Settings, served: ServedKnowledge, history: History) -> None:
        self.settings = settings
        self.served = served
        self.history = history
        self.moment = served.campaigns.at
        self.vectors = AsyncVectorReader(settings)
        self.graph = AsyncGraphReader.from_settings(settings)
        self.analytics = AsyncAnalyticsReader.from_settings(settings)
        self.events = AsyncEventStore.from_settings(settings)

    async def ask(self, user_id: str) -> Known:
        lookup = Lookup(
            self.vectors,
            self.graph,
            self.analytics,
            self.events,
            Guard(self.settings.store_timeout_s),
            self.settings.neighbours,
            self.settings.profile_half_life_days,
        )
        # Beside others, whose evidence must not mix with theirs.
        ids = list(dict.fromkeys([user_id, "maria", "nobody-we-know"]))
        known, *_ = await gather(ids, self.moment, served=self.served, lookup=lookup)
        assert not known.missing
        return known


CHANGED = {"profile_half_life_days": 9.0, "neighbours": 4, "profile_max_messages": 3}


@pytest.fixture(scope="module", params=[{}, CHANGED], ids=["defaults", "changed"])
def published(request: Any, store_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("parity")
    settings = empty_settings(store_stack, folder).model_copy(update=request.param)
    assert run_pipeline(SAMPLE, settings, with_quiet_user(folder))["status"] == "success"
    return settings


@pytest.fixture
async def sides(published: Settings) -> AsyncIterator[Sides]:
    catalog = load_catalog(published.catalog_path)
    report = StageReport(run_id="parity", stage="learn", shard=0, attempt=1, started_at=datetime.now(UTC))
    staged = embed_campaigns(
        report,
        catalog=catalog,
        space=VectorSpace(published.embedding_model, published.embedding_dim),
        staging=Staging(published.staging_uri, "parity"),
    )
    analytics, vectors = AnalyticsStore.from_settings(published), VectorStore.from_settings(published)
    history = load_history(
        analytics=analytics,
        vectors=vectors,
        space=VectorSpace(published.embedding_model, published.embedding_dim),
        catalog=catalog,
        campaign_vectors=campaign_vectors_of(read(staged), catalog),
        settings=published,
    )
    analytics.engine.dispose()
    vectors.client.close()
    reader = AsyncAnalyticsReader.from_settings(published)
    served = ServedKnowledge.from_bytes(await reader.served())
    await reader.engine.dispose()
    both = Sides(published, served, history)
    yield both
    await both.vectors.close()
    await both.graph.driver.close()
    await both.analytics.engine.dispose()
    await both.events.aclose()


async def test_the_api_s_evidence_is_that_of_learning(sides: Sides) -> None:
    snapshot = take_snapshot(sides.history, sides.moment)
    assert {"maria", "quiet"} <= set(sides.history.user_ids)
    spoke = dict.fromkeys(SOURCES, 0)
    for place, user_id in enumerate(sides.history.user_ids):
        known = await sides.ask(user_id)
        assert known.campaigns.ids == snapshot.campaigns.ids
        learned = Evidence.of(snapshot.campaigns, snapshot.users(np.asarray([place])))

        for source, theirs in learned.sources.items():
            ours = known.evidence.sources[source]
            np.testing.assert_allclose(ours, theirs, **TOLERANCE, err_msg=f"{user_id}: {source}")
            spoke[source] += bool(theirs.any())
        for name, theirs in learned.context.items():
            ours = known.evidence.context[name]
            np.testing.assert_allclose(ours, theirs, **TOLERANCE, err_msg=f"{user_id}: {name}")
        np.testing.assert_allclose(
            DEFAULT_FUSION.score(known.evidence), DEFAULT_FUSION.score(learned), atol=0.02, err_msg=user_id
        )
    # Each source speaks of some, so that their agreement means something.
    assert min(spoke.values()) >= 3, spoke


async def test_of_a_user_nothing_is_known_of_both_know_nothing(sides: Sides) -> None:
    known = await sides.ask("nobody-we-know")

    assert not known.is_personal
    speaking = {source for source, matrix in known.evidence.sources.items() if matrix.any()}
    assert speaking <= {"popularity", "recency"}


async def test_what_is_served_is_what_was_known_at_its_moment(sides: Sides) -> None:
    running = take_snapshot(sides.history, sides.moment).campaigns
    served = sides.served.running(sides.moment)

    for name, ours in vars(running).items():
        theirs = getattr(served, name)
        if isinstance(ours, np.ndarray):
            np.testing.assert_allclose(theirs, ours, **TOLERANCE, err_msg=name)
        else:
            assert theirs == ours, name


async def test_the_limits_of_the_two_are_not_reached(sides: Sides) -> None:
    """Or the tests above would compare what is different by design."""
    assert len(sides.history.messages.at) < sides.settings.learning_max_messages
    assert sides.history.messages.at.max() < sides.moment
