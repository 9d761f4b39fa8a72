"""Embed: the texts of shards and of the catalog to vectors, staged."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import structlog

from personalization.encoder import Vectors, get_encoder, model_version
from personalization.errors import StoreError
from personalization.pipeline.lineage import StageReport
from personalization.schemas import Catalog, Ref, VectorSpace
from personalization.sketches import sketch
from personalization.staging import SHARED_FOLDER, Staging, read
from personalization.stores.cache import VectorCache

_FLOAT = np.dtype("<f4")

log = structlog.get_logger(__name__)


def embed(report: StageReport, shard: Ref, *, space: VectorSpace, staging: Staging, cache: VectorCache) -> Ref:
    """Add `embedding` (a row's float32 as bytes, see `as_column`) to a shard in place of `text`.

    Texts that the cache knows cost a look-up; where it knows all, no model is loaded. Without Redis all are encoded.

    Raises:
        EmbeddingError: the model cannot be loaded or does not fit the space's dimension.
    """
    messages = read(shard)
    said = list(zip(messages.column("user_id").to_pylist(), messages.column("text").to_pylist(), strict=True))
    report.rows_in = report.rows_out = messages.num_rows
    report.details = {"model": space.model, "dim": space.dim}
    vectors = vectors_of(said, space, cache, report)
    # Of the first shard, whose details stand for the stage; `quality` compares runs by it.
    if report.shard == 0 and (summary := sketch(vectors)) is not None:
        report.details["sketch"] = summary.to_details()
    embedded = messages.drop_columns("text").append_column("embedding", as_column(vectors))
    return staging.write(f"embedded/{Path(shard['uri']).name}", embedded)


def vectors_of(said: list[tuple[str, str]], space: VectorSpace, cache: VectorCache, report: StageReport) -> Vectors:
    """The vectors of (user, text) pairs, shape (pairs, dim), from the cache or the model; the report says how many."""
    place = {text: at for at, text in enumerate(dict.fromkeys(text for _, text in said))}
    texts = list(place)
    vectors = np.zeros((len(texts), space.dim), dtype=np.float32)
    version = model_version(space.model)
    is_known = np.zeros(len(texts), dtype=bool)
    with _cache_told() as failures:
        known = cache.look_up(version or "", texts)
        if known.vectors.shape[1] <= space.dim:  # else the encoder says what does not fit
            vectors[known.places, : known.vectors.shape[1]] = known.vectors
            is_known[known.places] = True
    missing = np.flatnonzero(~is_known)
    for name, count in (("cache_hits", len(texts) - len(missing)), ("cache_misses", len(missing))):
        report.details[name] = report.details.get(name, 0) + count  # of all shards that the stage mirrors
    made: dict[str, Vectors] = {}
    if len(missing):
        encoder = get_encoder(space.model, space.dim)
        vectors[missing] = encoder.encode([texts[at] for at in missing])
        made = {texts[at]: vectors[at, : encoder.model_dim] for at in missing}
        version = version or model_version(space.model)
        report.details |= {"device": encoder.device, "dtype": encoder.dtype_name}
    if version and not failures:
        with _cache_told():
            cache.keep(version, said, made)
    return vectors[[place[text] for _, text in said]]


@contextmanager
def _cache_told() -> Iterator[list[StoreError]]:
    """Log that Redis failed, and go on behind the block: without it texts are encoded anew, and none is kept."""
    failures: list[StoreError] = []
    try:
        yield failures
    except StoreError as error:
        failures.append(error)
        log.warning("vectors are made without the cache", problem=str(error))


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
    """The `embedding` column as a matrix, shape (rows, dim), read-only; without a copy where it is in one piece."""
    column = table.column("embedding")
    rows = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    width = rows.type.byte_width // _FLOAT.itemsize
    flat = np.frombuffer(rows.buffers()[1] or b"", _FLOAT)
    return flat[rows.offset * width : (rows.offset + len(rows)) * width].reshape(len(rows), width)


def _embed_once(
    column: str,
    texts: list[tuple[str, str]],
    version: str,
    space: VectorSpace,
    staging: Staging,
    report: StageReport,
) -> Ref:
    """Stage the texts' vectors beside their ids, unless that was done in any run."""
    name = f"{version}-{space.name}.f4.parquet"
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
    ref = shared.write(name, pa.table({column: ids, "embedding": as_column(vectors)}))
    report.bytes_written += shared.bytes_written
    return ref


def as_column(vectors: Vectors) -> pa.FixedSizeBinaryArray:
    """A matrix as a column `embedding`: of each row its little-endian float32, one behind the other.

    As a list of floats Parquet spends ten times as long, on a level for each number.
    """
    content = np.ascontiguousarray(vectors, _FLOAT)
    width = pa.binary(vectors.shape[1] * _FLOAT.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(width, len(vectors), [None, pa.py_buffer(content)])
