"""Mirror: the run's messages into the other vector spaces that are kept up to date, beside the live one."""

from collections.abc import Sequence

import structlog

from personalization.errors import EmbeddingError, StoreError
from personalization.pipeline.embed import vectors_of
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.spaces import spaces_beside
from personalization.pipeline.vectors import write_vectors
from personalization.schemas import Ref, VectorSpace
from personalization.staging import read
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.cache import VectorCache
from personalization.stores.milvus import VectorStore
from personalization.stores.mongo import MongoStore

log = structlog.get_logger(__name__)


def mirror_vectors(
    report: StageReport,
    shards: Sequence[Ref],
    *,
    space: VectorSpace,
    mongo: MongoStore,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    cache: VectorCache,
) -> None:
    """Embed the shards for every space beside `space` and write the vectors; costs nothing where there is none.

    A space whose model cannot be loaded any more, or whose collection is gone, falls behind, and the run goes on: what
    is served does not wait for what is not. A migration to it then fills it anew.

    Raises:
        StoreError: MongoDB or the analytics database does not answer; or Milvus does not, for the live space, which
            is beside where a migration overtook the run.
    """
    for other in spaces_beside(analytics, space) if shards else []:
        try:
            for shard in shards:
                _mirror(report, shard, other, mongo, vectors, cache)
        except (EmbeddingError, StoreError) as error:
            is_live = analytics.spaces().get(other) == "live"
            if is_live or (isinstance(error, StoreError) and error.store != "milvus"):
                raise
            analytics.set_space(other, "behind")
            log.warning(f"{other.name} falls behind: {error}. A migration to it fills it anew")
            report.details["behind"] = other.name
        else:
            report.details["spaces"] = [*report.details.get("spaces", []), other.name]


def _mirror(
    report: StageReport, shard: Ref, space: VectorSpace, mongo: MongoStore, vectors: VectorStore, cache: VectorCache
) -> None:
    messages = read(shard)
    said = list(zip(messages.column("user_id").to_pylist(), messages.column("text").to_pylist(), strict=True))
    matrix = vectors_of(said, space, cache, report)
    written = write_vectors(messages, matrix, space=space, mongo=mongo, vectors=vectors)
    report.rows_in += messages.num_rows
    report.rows_out += written
    report.skipped += messages.num_rows - written
    report.bytes_written += written * space.vector_bytes
