"""The catalog: read from YAML, brought into the stores."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from personalization.errors import CatalogError
from personalization.pipeline.lineage import StageReport
from personalization.schemas import Catalog
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import VectorSpace, VectorStore
from personalization.stores.neo4j import GraphStore


def load_catalog(folder: Path) -> Catalog:
    """Read all `*.yaml` files of a folder as one catalog.

    Raises:
        CatalogError: no file, not YAML, or a catalog that does not hold together; names the place.
    """
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    if not files:
        raise CatalogError(f"{folder}: holds no *.yaml file; name the folder with the campaign catalog")
    content: dict[str, list[Any]] = {"intents": [], "campaigns": []}
    for file in files:
        try:
            part = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise CatalogError(f"{file}: is not readable YAML: {error}") from error
        if not isinstance(part, dict) or not set(part) <= set(content):
            raise CatalogError(f"{file}: must hold lists named `intents` or `campaigns`, nothing else")
        for key, entries in part.items():
            if not isinstance(entries, list):
                raise CatalogError(f"{file}: `{key}` must be a list")
            content[key] += entries
    try:
        return Catalog.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'catalog'}: {problem['msg']}" for problem in error.errors()[:5]
        )
        raise CatalogError(f"{folder}: {problems}") from error


def catalog_version(catalog: Catalog) -> str:
    """Digest of everything the catalog says."""
    return hashlib.blake2b(catalog.model_dump_json().encode(), digest_size=8).hexdigest()


def prepare(
    report: StageReport,
    *,
    catalog: Catalog,
    space: VectorSpace,
    vectors: VectorStore,
    graph: GraphStore,
    analytics: AnalyticsStore,
) -> None:
    """Make the stores ready for the run and bring the catalog into them. Safe to repeat."""
    vectors.ensure_schema(space)
    graph.ensure_schema()
    analytics.ensure_schema()
    graph.sync_catalog(catalog)
    analytics.sync_catalog(catalog)
    report.rows_in = report.rows_out = len(catalog.intents) + len(catalog.campaigns)
    report.details = {
        "catalog_version": catalog_version(catalog),
        "intents": len(catalog.intents),
        "campaigns": len(catalog.campaigns),
        "collection": space.collection("messages"),
    }
