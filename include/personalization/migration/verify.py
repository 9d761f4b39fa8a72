"""Verify: is what was filled whole, of the model that is wanted, and as good as what is served?"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import structlog

from personalization.encoder import Vectors, get_encoder
from personalization.errors import MigrationError, TooLittleFeedbackError
from personalization.evaluation.recording import Request, plan_of
from personalization.evaluation.replay import Replay
from personalization.learning.loading import load_history
from personalization.learning.metrics import interval
from personalization.migration.differences import differences
from personalization.migration.scene import Scene
from personalization.pipeline.embed import campaign_vectors_of, embed_campaigns, embed_utterances, embeddings_of
from personalization.pipeline.lineage import StageReport
from personalization.schemas import VectorSpace
from personalization.staging import read
from personalization.stores.milvus import INTERESTS, MESSAGES, USERS

NEIGHBOURS = 10
_SAMPLE = 1000
_EMBEDDED_AGAIN = 100
_NORM_TOLERANCE = 1e-3
_SAME_COSINE = 0.99
"""Least cosine of a vector to that of the same text embedded again. Batches of bfloat16 differ by some 0.001."""
_FEWEST = 50
"""Messages to compare neighbours of."""
_POLICY = "fusion"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Bounds:
    """What the new space may lose. Set wider, they let through what is worse."""

    min_overlap: float = 0.1
    """Least share of the ten nearest messages that are the same in both spaces, on average. Good models share 0.3 to
    0.6; vectors that say nothing of the text share as many as chance.
    """
    max_intent_loss: float = 0.05
    """Most of the share of the catalog's examples whose nearest other example is of the same intent."""
    max_ndcg_loss: float = 0.02
    """Most NDCG@10 of rank fusion on the last weeks; only where the whole 95 % interval over users is a loss."""


@dataclass
class _Findings:
    """Figures for the report, and reasons not to swap."""

    figures: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def verify(report: StageReport, target: VectorSpace, bounds: Bounds, scene: Scene) -> dict[str, Any]:
    """Compare the target with MongoDB by set, look at every vector, and compare it with the live space; return the
    figures, which stand in the report, too.

    Reads each vector of the target once, a sample of 1,000 of the live ones, and, where there is feedback of the last
    four weeks, the history twice.

    Raises:
        MigrationError: a bound is not kept; says which, and how far.
    """
    report.model = target.model
    live = scene.live()
    if target == live:
        return {}
    found = _Findings(report.details)
    sample = _look_at_vectors(report, target, scene, found)
    _compare_counts(target, scene, found)
    _embed_again(sample, target, scene, found)
    _compare_neighbours(sample, live, bounds, scene, found)
    _compare_intents(report, live, target, bounds, scene, found)
    _compare_ranking(report, live, target, bounds, scene, found)
    log.info(f"checked: {found.figures}")
    if found.reasons:
        raise MigrationError(f"{live.name} goes on serving, as {target.name} {'; and '.join(found.reasons)}")
    return found.figures


def _look_at_vectors(
    report: StageReport, target: VectorSpace, scene: Scene, found: _Findings
) -> dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]:
    """See that all are unit vectors of the right dimension; return some, drawn by a hash of their ids."""
    vectors = scene.stores.vectors
    drawn: list[tuple[int, str, Any]] = []
    broken = 0
    for alias in (MESSAGES, USERS, INTERESTS):
        name = target.collection(alias)
        if (dim := vectors.dimension(name)) != target.dim:
            found.reasons.append(f"has {dim} dimensions in {name}")
        rows = 0
        for page in vectors.pages(name, ("id", "embedding")):
            matrix = np.asarray([one["embedding"] for one in page], dtype=np.float32)
            rows += len(page)
            broken += int((~(np.abs(np.linalg.norm(matrix, axis=1) - 1) <= _NORM_TOLERANCE)).sum())
            if alias == MESSAGES:
                named = [(-_draw(one["id"]), one["id"], matrix[at]) for at, one in enumerate(page)]
                drawn = heapq.nlargest(_SAMPLE, [*drawn, *named], key=lambda one: one[:2])
        found.figures[alias] = rows
        report.rows_in += rows
    if broken:
        found.reasons.append(f"has {broken:,} vectors that are not of unit length")
    return {one: vector for _, one, vector in drawn}


def _compare_counts(target: VectorSpace, scene: Scene, found: _Findings) -> None:
    with differences(scene, target) as unlike:
        missing = sum(len(_settled(ids, scene)) for ids in unlike.missing_pages(_SAMPLE))
        found.figures["missing"], found.figures["orphans"] = missing, unlike.orphans
    if missing:
        found.reasons.append(f"lacks {missing:,} messages")
    if unlike.orphans:
        found.reasons.append(f"has {unlike.orphans:,} vectors of no message")


def _embed_again(sample: dict[str, Any], target: VectorSpace, scene: Scene, found: _Findings) -> None:
    """A vector must be that of the message's text as it is now."""
    settled = _settled(list(sample)[:_EMBEDDED_AGAIN], scene)
    texts = scene.stores.mongo.texts(settled)
    settled = [one for one in settled if one in texts]
    if not settled:
        return
    encoder = get_encoder(target.model, target.dim)
    again = encoder.encode([texts[one]["message"] for one in settled])
    cosines = (again * np.stack([sample[one] for one in settled])).sum(axis=1)
    found.figures["embedded_again"] = len(settled)
    found.figures["least_cosine"] = round(float(cosines.min()), 4)
    if unlike := int((cosines < _SAME_COSINE).sum()):
        found.reasons.append(f"has other vectors than its model makes for {unlike:,} of {len(settled):,} messages")


def _compare_neighbours(
    sample: dict[str, Any], live: VectorSpace, bounds: Bounds, scene: Scene, found: _Findings
) -> None:
    pages = scene.stores.vectors.vectors(live.collection(MESSAGES), list(sample))
    there = {row["id"]: np.asarray(row["embedding"], dtype=np.float32) for rows in pages for row in rows}
    ids = [one for one in sample if one in there]
    if len(ids) < _FEWEST:
        return
    count = min(NEIGHBOURS, len(ids) - 1)
    own = _nearest(np.stack([sample[one] for one in ids]), count)
    former = _nearest(np.stack([there[one] for one in ids]), count)
    shared = [len({*mine} & {*theirs}) for mine, theirs in zip(own.tolist(), former.tolist(), strict=True)]
    overlap = float(np.mean(shared)) / count
    found.figures["neighbour_overlap"] = round(overlap, 4)
    found.figures["overlap_by_chance"] = round(count / (len(ids) - 1), 4)
    if overlap < bounds.min_overlap:
        found.reasons.append(
            f"shares {overlap:.3f} of the {count} nearest messages with it, less than min_overlap "
            f"{bounds.min_overlap:g}"
        )


def _compare_intents(
    report: StageReport, live: VectorSpace, target: VectorSpace, bounds: Bounds, scene: Scene, found: _Findings
) -> None:
    catalog = scene.catalog()
    accuracies = []
    for space in (live, target):
        staged = embed_utterances(report.model_copy(), catalog=catalog, space=space, staging=scene.staging)
        table = read(staged)
        intents = table.column("intent_id").to_pylist()
        if len(intents) < 2:
            return
        nearest = _nearest(embeddings_of(table), 1)[:, 0]
        accuracies.append(
            float(np.mean([intents[one] == intent for one, intent in zip(nearest, intents, strict=True)]))
        )
    before, after = accuracies
    found.figures["intent_accuracy"] = {"before": round(before, 4), "after": round(after, 4)}
    if before - after > bounds.max_intent_loss:
        found.reasons.append(
            f"tells the catalog's intents apart in {after:.3f} of the examples instead of {before:.3f}, more than "
            f"max_intent_loss {bounds.max_intent_loss:g} less"
        )


def _compare_ranking(
    report: StageReport, live: VectorSpace, target: VectorSpace, bounds: Bounds, scene: Scene, found: _Findings
) -> None:
    try:
        plan = plan_of(scene.stores.analytics, Request())
    except TooLittleFeedbackError as error:
        found.figures["ranking"] = str(error)
        return
    catalog = scene.catalog()
    values, owners = [], []
    for space in (live, target):
        staged = embed_campaigns(report.model_copy(), catalog=catalog, space=space, staging=scene.staging)
        history = load_history(
            analytics=scene.stores.analytics,
            vectors=scene.stores.vectors,
            space=space,
            catalog=catalog,
            campaign_vectors=campaign_vectors_of(read(staged), catalog),
            settings=scene.settings,
        )
        outcome = Replay(history, plan).run([_POLICY], lambda _: None)[_POLICY]
        if not outcome.owners:
            found.figures["ranking"] = "nobody engaged with a campaign that they could be shown"
            return
        values.append(outcome.column("ndcg@10"))
        owners.append(np.concatenate(outcome.owners))
    if not np.array_equal(owners[0], owners[1]):  # a run has brought in events in between
        found.figures["ranking"] = "could not be compared, as a run was at work"
        return
    gain = interval(values[1] - values[0], owners[0])
    found.figures["ndcg"] = {
        "before": round(float(values[0].mean()), 4),
        "after": round(float(values[1].mean()), 4),
        "gain": [round(one, 4) for one in gain],
    }
    if gain.mean < -bounds.max_ndcg_loss and gain.high < 0:
        found.reasons.append(
            f"ranks worse: NDCG@10 of {_POLICY} changes by {gain.mean:.3f} ({gain.low:.3f} … {gain.high:.3f}), more "
            f"than max_ndcg_loss {bounds.max_ndcg_loss:g}"
        )


def _settled(ids: Sequence[str], scene: Scene) -> list[str]:
    """Those of the messages that a published run has taken: of others the run at work writes the vector itself."""
    mongo = scene.stores.mongo
    taken = mongo.stored("message", ids)
    published = mongo.runs_published({one["run_id"] for one in taken.values() if one["run_id"]})
    return [one for one in ids if one in taken and taken[one]["run_id"] in published]


def _draw(message_id: str) -> int:
    return int.from_bytes(blake2b(message_id.encode(), digest_size=8).digest(), "big")


def _nearest(matrix: Vectors, count: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """(n, count) places of each row's nearest others by cosine, of unit vectors (n, dim)."""
    similar = matrix @ matrix.T
    np.fill_diagonal(similar, -np.inf)
    return np.argpartition(-similar, count - 1, axis=1)[:, :count]
