"""Check: may there be a migration to this model, and what is still to be filled?"""

import structlog

from personalization.encoder import get_encoder
from personalization.errors import MigrationError
from personalization.migration.filling import Filling
from personalization.migration.scene import Scene
from personalization.pipeline.lineage import StageReport
from personalization.schemas import Ref, VectorSpace

log = structlog.get_logger(__name__)


def target_of(scene: Scene, model: str, dim: int | None) -> VectorSpace:
    """The space that is wanted: the model as it is named, in as many dimensions as the live one if none are.

    Raises:
        MigrationError: nothing was published yet, so settings decide.
    """
    live = scene.live()
    return VectorSpace(model.strip(), dim or live.dim)


def check(report: StageReport, target: VectorSpace, scene: Scene) -> list[Ref]:
    """See that the migration can be made, make its collections, and return the shards that are still to be filled.

    From here on daily runs keep the target up to date, too. A space that is kept for a way back has all vectors, and
    nothing to fill. One that is live already is only brought to its end, where a migration to it broke off behind the
    swap. Reads the ids of all messages once; a migration that is taken up again reads none.

    Raises:
        MigrationError: there is nothing to do, or another space must be dropped first.
        EmbeddingError: the model cannot be loaded, or is wider than the dimension.
    """
    report.model = target.model
    live = scene.live()
    states = scene.stores.analytics.spaces()
    report.details = {"from": live.name, "to": target.name, "state": states.get(target, "new")}
    if target == live:
        if scene.is_settled():
            raise MigrationError(f"{target.model} in {target.dim} dimensions is what is served; there is nothing to do")
        log.info("it is served already; what a migration left undone behind that is done now")
        return []
    if others := [space.name for space in states if space not in (live, target)]:
        raise MigrationError(
            f"{others[0]} is kept beside {live.name}, and each daily run embeds for both; drop it first, by the DAG "
            f"`reembed_finish` or `personalization reembed --finish`"
        )
    get_encoder(target.model, target.dim)
    scene.stores.vectors.ensure_schema(target)
    filling = Filling.of(scene.settings, target)
    if states.get(target) == "kept":
        return []
    if states.get(target) != "filling":
        filling.forget()  # of a migration that was given up: what it filled is not kept up to date since
        scene.stores.analytics.set_space(target, "filling")
    shards = filling.plan(scene.stores.mongo, scene.settings.shard_rows)
    left = [one for one in shards if not filling.is_filled(one)]
    report.rows_in = sum(one["rows"] for one in shards)
    report.rows_out = sum(one["rows"] for one in left)
    report.skipped = report.rows_in - report.rows_out
    log.info(f"{report.rows_out:,} of {report.rows_in:,} messages are to be embedded, in {len(left):,} shards")
    return left
