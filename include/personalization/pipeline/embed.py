"""Embed: the texts of shards and of the catalog to vectors, staged."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from personalization.encoder import Vectors, get_encoder
from personalization.pipeline.lineage import StageReport
from personalization.schemas import Catalog, Ref
from personalization.settings import Settings
from personalization.staging import SHARED_FOLDER, Staging, read


def embed(report: StageReport, shard: Ref, *, staging: Staging, settings: Settings) -> Ref:
    """Add `embedding` (fixed-size list of float32) to a shard in place of `text`.

    Raises:
        EmbeddingError: the model cannot be loaded or does not fit EMBEDDING_DIM.
    """
    messages = read(shard)
    encoder = get_encoder(settings.embedding_model, settings.embedding_dim, settings.embedding_batch_size)
    vectors = encoder.encode(messages.column("text").to_pylist())
    report.rows_in = report.rows_out = messages.num_rows
    report.details = {
        "model": settings.embedding_model,
        "dim": settings.embedding_dim,
        "device": encoder.device,
        "dtype": encoder.dtype_name,
    }
    embedded = messages.drop_columns("text").append_column("embedding", _as_column(vectors))
    return staging.write(f"embedded/{Path(shard['uri']).name}", embedded)


def embed_catalog(report: StageReport, *, catalog: Catalog, staging: Staging, settings: Settings) -> Ref:
    """Stage `intent_id, embedding` of every example utterance.

    The file is named by the utterances and the model, outside any run; where it exists, nothing is embedded.
    """
    name = f"{catalog.intents_version}-{_file_name(settings.embedding_model)}-{settings.embedding_dim}.parquet"
    examples = [(intent.id, example) for intent in catalog.intents for example in intent.examples]
    report.rows_in = len(examples)
    shared = Staging(str(staging.base), SHARED_FOLDER)
    if (known := shared.find(name)) is not None:
        report.skipped = len(examples)
        return known
    vectors = np.zeros((0, settings.embedding_dim), dtype=np.float32)
    if examples:
        encoder = get_encoder(settings.embedding_model, settings.embedding_dim, settings.embedding_batch_size)
        vectors = encoder.encode([example for _, example in examples])
    intent_ids = pa.array([intent_id for intent_id, _ in examples], pa.string())
    table = pa.table({"intent_id": intent_ids, "embedding": _as_column(vectors)})
    report.rows_out = len(examples)
    return shared.write(name, table)


def embeddings_of(table: pa.Table) -> Vectors:
    """The `embedding` column as a matrix, shape (rows, dim), without a Python object per vector."""
    column = table.column("embedding").combine_chunks()
    flat: np.ndarray[Any, np.dtype[np.float32]] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)


def _as_column(vectors: Vectors) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def _file_name(model_name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in model_name)
