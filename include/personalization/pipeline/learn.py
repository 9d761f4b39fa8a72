"""Learn: what is known of the campaigns, and the ranker, from all that the stores hold."""

import time
from collections.abc import Sequence

import structlog

from personalization.catalog.loading import catalog_version
from personalization.learning.history import take_snapshot
from personalization.learning.loading import VectorSource, load_history
from personalization.learning.training import choose_ranker, past_examples
from personalization.pipeline.embed import campaign_vectors_of, embed_campaigns, embed_utterances
from personalization.pipeline.intents import fitted_classifier
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.run_vectors import run_vectors
from personalization.recommend.knowledge import ServedKnowledge, is_current
from personalization.recommend.ranking import LearnedRanker
from personalization.schemas import DAY_MS, Catalog, Ref, VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging, read, write_atomically
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import VectorStore

HORIZON_MS = 7 * DAY_MS
"""How far ahead of a moment engagement counts for it."""
UPCOMING_MS = 7 * DAY_MS
"""How long before its start a campaign is made ready."""
FRESH_MS = DAY_MS // 2
"""How long knowledge is good while nothing new comes in."""
SERVED_FILE = "served.npz"

log = structlog.get_logger(__name__)


def learn(
    report: StageReport,
    user_pages: list[Ref],
    embedded: Sequence[Ref] = (),
    *,
    catalog: Catalog,
    space: VectorSpace,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    staging: Staging,
    settings: Settings,
) -> bool:
    """Stage what `publish` is to serve; False where what is served is still good. `embedded` are the run's shards."""
    if not user_pages and _is_still_good(analytics, catalog, time.time_ns() // 1_000_000):
        report.details = {"nothing_new": True}
        return False
    with run_vectors(vectors, space, embedded) as at_hand:
        learn_anew(
            report,
            catalog=catalog,
            space=space,
            analytics=analytics,
            vectors=at_hand,
            staging=staging,
            settings=settings,
        )
    return True


def learn_anew(
    report: StageReport,
    *,
    catalog: Catalog,
    space: VectorSpace,
    analytics: AnalyticsStore,
    vectors: VectorSource,
    staging: Staging,
    settings: Settings,
) -> None:
    """Stage what is to be served, by the vectors of a space.

    Draws the knowledge of now, and fits the ranker to the past; it is served only if it beats rank fusion on
    moments it was not fitted to. Costs one `load_history`, a snapshot for each of thirteen moments and two fits.
    """
    now_ms = time.time_ns() // 1_000_000
    staged = embed_campaigns(report, catalog=catalog, space=space, staging=staging)
    history = load_history(
        analytics=analytics,
        vectors=vectors,
        space=space,
        catalog=catalog,
        campaign_vectors=campaign_vectors_of(read(staged), catalog),
        settings=settings,
    )
    snapshot = take_snapshot(history, now_ms, upcoming_ms=UPCOMING_MS)
    choice = choose_ranker(past_examples(history, now_ms, HORIZON_MS, "any"))
    learned = choice.ranker if isinstance(choice.ranker, LearnedRanker) else None
    # Kept since the stage that reads messages with it.
    utterances = embed_utterances(report, catalog=catalog, space=space, staging=staging)
    classifier = fitted_classifier(utterances).to_bytes() if utterances["rows"] else b""
    content = ServedKnowledge(catalog, snapshot.campaigns, learned, choice.fusion.version, space, classifier).to_bytes()
    write_atomically(staging.root / SERVED_FILE, content)
    report.bytes_written += len(content)
    report.rows_in = len(history.signals.at)
    report.rows_out = len(snapshot.campaigns.ids)
    report.details = {
        "catalog_version": catalog_version(catalog),
        "users": len(history.user_ids),
        "messages": len(history.messages.at),
        "ranker": choice.ranker.version,
        "why": choice.reason,
        "ndcg_gain": choice.gain,
        "bytes": len(content),
    }
    log.info(f"{choice.ranker.version}: {choice.reason}")


def _is_still_good(analytics: AnalyticsStore, catalog: Catalog, now_ms: int) -> bool:
    """Whether what is served is of this catalog and this version of the platform, and not old."""
    served_at = analytics.served_at()
    built = analytics.serving_state()
    if built is None or built.catalog_version != catalog_version(catalog):
        return False
    if served_at is None or now_ms - served_at >= FRESH_MS:
        return False
    content = analytics.served_content()
    return content is not None and is_current(content)
