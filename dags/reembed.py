"""
### Another embedding model, without losing or mixing a vector

*Trigger* with the `model` to move to. What is served goes on being served until the new vectors are whole and checked;
then one transaction swaps.

1. `check`: is the model there, and does it fit? From here on daily runs write to both.
2. `fill`: all messages are embedded from MongoDB, a mapped task a shard.
3. `catch_up`: what came in meanwhile, what was edited or erased; then profiles and interests.
4. `verify`: ids by set, length and dimension of every vector, some embedded again, nearest messages, intents and
   ranking beside the former model's. The figures are the task's return value, and in `pipeline_runs`.
5. `swap`: campaigns' vectors, classifier and ranker are learned and served, with the new vectors, in one step.
6. What is behind reads the intents of all messages by the new classifier, as after an edit of the intents.

**It failed, or was killed**: the former model is served and whole. Clear the task, or trigger again: shards that are
done are not embedded again. **Back**: trigger with the former model, which daily runs keep up to date; nothing is
filled. **Done with the former one**: trigger `reembed_finish`, which drops it, and daily runs embed once again. It
also gives up a migration that is half filled.

`EMBEDDING_MODEL` need not be changed: it decides only where nothing is published yet.
"""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import Param, TriggerRule, dag, task
from personalization_airflow import assets, defaults, tasks

DEFAULT_ARGS = {
    **defaults.EVERY_TASK,
    **defaults.SUMMARISED,
    "retry_delay": timedelta(seconds=20),
    "execution_timeout": timedelta(hours=2),
}
EMBEDDING = {"pool": "embedding", "execution_timeout": timedelta(hours=6)}
MAPPED = {"max_active_tis_per_dagrun": 4}
ALSO_WITH_NOTHING_TO_FILL = {"trigger_rule": TriggerRule.NONE_FAILED}
SERVING_OUT = {"outlets": [assets.SERVING]}

PARAMS = {
    "model": Param(
        type="string",
        title="Model",
        description="A name of the hub, a folder that all workers reach, or package:NAME. To go back: the former one.",
        minLength=1,
        maxLength=250,
    ),
    "dim": Param(
        None,
        type=["null", "integer"],
        title="Dimensions",
        description="A smaller model is zero-padded to it, a wider one refused. Empty: as they are now.",
        minimum=8,
        maximum=32768,
    ),
    "min_overlap": Param(
        0.1,
        type="number",
        title="Least overlap",
        description="Share of the ten nearest messages that must be the same by both models, on average.",
        minimum=0,
        maximum=1,
    ),
    "max_intent_loss": Param(
        0.05,
        type="number",
        title="Most accuracy to lose",
        description="Of telling the intents of the catalog's examples apart.",
        minimum=0,
        maximum=1,
    ),
    "max_ndcg_loss": Param(
        0.02,
        type="number",
        title="Most NDCG@10 to lose",
        description="Of rank fusion over the last four weeks, where there is enough feedback to tell.",
        minimum=0,
        maximum=1,
    ),
}


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=False,  # nothing happens without a trigger
    default_args=DEFAULT_ARGS,
    params=PARAMS,
    tags=["personalization", "embedding", "maintenance"],
    doc_md=__doc__,
)
def reembed() -> None:
    shards = task(tasks.check, **EMBEDDING)()
    filled = task(tasks.fill, **EMBEDDING, **MAPPED).expand(shard=shards)
    caught_up = task(tasks.catch_up, **EMBEDDING, **ALSO_WITH_NOTHING_TO_FILL)()
    verified = task(tasks.verify, **EMBEDDING)()
    swapped = task(tasks.swap, **EMBEDDING)()
    utterances = task(tasks.embed_catalog, **EMBEDDING)()
    user_pages = task(tasks.detect_intents)([], utterances)
    graph = task(tasks.build_graph, **MAPPED).expand(user_page=user_pages)
    engagement = task(tasks.roll_up_engagement)(user_pages)
    learned = task(tasks.learn)(user_pages)
    published = task(tasks.publish, **SERVING_OUT)(user_pages, learned)
    lineage = task(tasks.record_lineage)(of_migration=True).as_teardown(on_failure_fail_dagrun=True)

    shards >> filled >> caught_up >> verified >> swapped >> utterances
    complete = EmptyOperator(task_id="complete")
    [graph, engagement] >> published >> complete
    taken = [shards, filled, caught_up, verified, swapped, utterances]
    [*taken, user_pages, graph, engagement, learned, published] >> lineage


reembed()
