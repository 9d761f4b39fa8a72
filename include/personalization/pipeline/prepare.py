"""Prepare: the stores' schemas, and the catalog into the stores."""

from personalization.catalog.loading import catalog_version, intents_version
from personalization.pipeline.lineage import StageReport
from personalization.schemas import Catalog, VectorSpace
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import VectorStore
from personalization.stores.neo4j import GraphStore


def prepare(
    report: StageReport,
    *,
    catalog: Catalog,
    space: VectorSpace,
    vectors: VectorStore,
    graph: GraphStore,
    analytics: AnalyticsStore,
    settings: Settings,
) -> None:
    """Make the stores ready for the run and bring the catalog into them. Safe to repeat."""
    report.model = space.model
    vectors.ensure_schema(space)
    vectors.serve(space)
    graph.ensure_schema()
    analytics.ensure_schema()
    # From here on what is served is of no one catalog, until `publish` says so.
    analytics.expect_versions(catalog_version(catalog), intents_version(catalog, space, settings))
    graph.sync_catalog(catalog)
    analytics.sync_catalog(catalog)
    report.rows_in = report.rows_out = len(catalog.intents) + len(catalog.campaigns)
    report.details = {
        "catalog_version": catalog_version(catalog),
        "intents": len(catalog.intents),
        "campaigns": len(catalog.campaigns),
        "collection": space.collection("messages"),
    }
