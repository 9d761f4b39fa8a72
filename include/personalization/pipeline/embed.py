"""Embed: the texts of shards and of the catalog to vectors, staged."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from personalization.encoder import Vectors, get_encoder
from personalization.pipeline.lineage import StageReport
from personalization.schemas import Catalog, Ref, VectorSpace
from personalization.sketches import sketch
from personalization.staging import SHARED_FOLDER, Staging, read


def embed(report: StageReport, shard: Ref, *, space: VectorSpace, staging: Staging) -> Ref:
    """Add `embedding` (fixed-size list of float32) to a shard in place of `text`.

    Raises:
        EmbeddingError: the model cannot be loaded or does not fit the space's dimension.
    """
    messages = read(shard)
    encoder = get_encoder(space.model, space.dim)
    vectors = encoder.encode(messages.column("text").to_pylist())
    report.rows_in = report.rows_out = messages.num_rows
    report.details = {
        "model": space.model,
        "dim": space.dim,
        "device": encoder.device,
        "dtype": encoder.dtype_name,
    }
    # Of the first shard, whose details stand for the stage; `quality` compares runs by it.
    if report.shard == 0 and (summary := sketch(vectors)) is not None:
        report.details["sketch"] = summary.to_details()
    embedded = messages.drop_columns("text").append_column("embedding", _as_column(vectors))
    return staging.write(f"embedded/{Path(shard['uri']).name}", embedded)


def embed_catalog(report: StageReport, *, catalog: Catalog, space: VectorSpace, staging: Staging) -> Ref:
    """Stage the example utterances, which are returned, and what campaigns say beside them.

    The files are named by their texts and the model, outside any run; where one exists, nothing is embedded for it.
    """
    staged = embed_utterances(report, catalog=catalog, space=space, staging=staging)
    embed_campaigns(report, catalog=catalog, space=space, staging=staging)
    return staged


def embed_utterances(report: StageReport, *, catalog: Catalog, space: VectorSpace, staging: Staging) -> Ref:
    """Stage `intent_id, embedding` of every example utterance; where that is staged, nothing is embedded."""
    utterances = [(intent.id, example) for intent in catalog.intents for example in intent.examples]
    return _embed_once("intent_id", utterances, catalog.intents_version, space, staging, report)


def embed_campaigns(report: StageReport, *, catalog: Catalog, space: VectorSpace, staging: Staging) -> Ref:
    """Stage `campaign_id, embedding` of what every campaign says; where that is staged, nothing is embedded."""
    texts = [(campaign.id, campaign.text) for campaign in catalog.campaigns]
    digest = hashlib.blake2b("\0".join(part for pair in texts for part in pair).encode(), digest_size=8)
    return _embed_once("campaign_id", texts, f"campaigns-{digest.hexdigest()}", space, staging, report)


def campaign_vectors_of(table: pa.Table, catalog: Catalog) -> Vectors:
    """What `embed_campaigns` staged, in the catalog's order, shape (campaigns, dim)."""
    place = {campaign_id: at for at, campaign_id in enumerate(table.column("campaign_id").to_pylist())}
    return embeddings_of(table)[[place[one.id] for one in catalog.campaigns]]


def embeddings_of(table: pa.Table) -> Vectors:
    """The `embedding` column as a matrix, shape (rows, dim), without a Python object per vector."""
    column = table.column("embedding").combine_chunks()
    flat: np.ndarray[Any, np.dtype[np.float32]] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)


def _embed_once(
    column: str,
    texts: list[tuple[str, str]],
    version: str,
    space: VectorSpace,
    staging: Staging,
    report: StageReport,
) -> Ref:
    """Stage the texts' vectors beside their ids, unless that was done in any run."""
    name = f"{version}-{space.name}.parquet"
    report.rows_in += len(texts)
    shared = Staging(str(staging.base), SHARED_FOLDER)
    if (known := shared.find(name)) is not None:
        report.skipped += len(texts)
        return known
    vectors = np.zeros((0, space.dim), dtype=np.float32)
    if texts:
        encoder = get_encoder(space.model, space.dim)
        vectors = encoder.encode([text for _, text in texts])
    ids = pa.array([one for one, _ in texts], pa.string())
    report.rows_out += len(texts)
    ref = shared.write(name, pa.table({column: ids, "embedding": _as_column(vectors)}))
    report.bytes_written += shared.bytes_written
    return ref


def _as_column(vectors: Vectors) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
