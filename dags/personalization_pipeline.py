"""
### Conversations in, recommendations out

Takes conversations, and what users did with campaigns, into MongoDB, Milvus, Neo4j and the analytics
database, and publishes what the API serves.

* **Scheduled** (daily): takes the files of the inbox that no successful run has taken yet, those named
  `events*` as events. Nothing new is a success.
* **By hand**: *Trigger* with `input_path`, `events_path` or both, or with the conf
  `{"input_path": "/data/conversations.json", "events_path": "/data/events.csv"}`. The inbox is left alone.
* **Always**: the events that the API has received since the last successful run.

Every task may be retried, cleared or run twice: all writes are upserts by stable ids, and messages and
events count as done only when `publish` has succeeded. Rows that cannot be taken are in MongoDB's
collection `quarantine` with their reason; what each stage did is in the table `pipeline_runs`, each attempt
in `stage_attempts`, whatever happened. The run's note sums it up, and *Map Index* in its list of task instances
says it of each task. Who is told of a failed task, or of a run that is not done four hours after it was queued,
is in the connections `personalization_mail` and `personalization_webhook`.
"""

from datetime import datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import Param, TriggerRule, dag, task, task_group
from airflow.sdk.definitions.callback import SyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from personalization_airflow import assets, defaults, notifications, tasks

DEFAULT_ARGS = {
    **defaults.EVERY_TASK,
    **defaults.SUMMARISED,
    "retry_delay": timedelta(seconds=20),
    "execution_timeout": timedelta(minutes=30),
}
EMBEDDING = {"pool": "embedding", "execution_timeout": timedelta(hours=2)}
WHOLE_FILES = {"execution_timeout": timedelta(hours=6)}
MAPPED = {"max_active_tis_per_dagrun": 4}
EVEN_IF_NOTHING_NEW = {"trigger_rule": TriggerRule.NONE_FAILED}
# The flow of data as Airflow draws it.
MESSAGES_OUT = {"outlets": [assets.MESSAGES]}
EVENTS_OUT = {"outlets": [assets.EVENTS]}
BOTH_IN = {"inlets": [assets.MESSAGES, assets.EVENTS]}
SERVING_OUT = {"outlets": [assets.SERVING]}

PARAMS = {
    "input_path": Param(
        None,
        type=["null", "string"],
        title="Input file",
        description="A JSON array or NDJSON, plain or .gz; a local path or an object store's URI, "
        "such as `include/data/sample_conversations.json`. "
        "Empty: the new files of the inbox, unless a file of events is named.",
        minLength=1,
        maxLength=1024,
    ),
    "events_path": Param(
        None,
        type=["null", "string"],
        title="Events file",
        description="What users did with campaigns: CSV, a JSON array or NDJSON, plain or .gz; a local path or an "
        "object store's URI, such as `include/data/sample_events.csv`. "
        "Empty: the new files of the inbox named `events*`, unless an input file is named.",
        minLength=1,
        maxLength=1024,
    ),
    "max_reject_ratio": Param(
        None,
        type=["null", "number"],
        title="Most rows to refuse",
        description="The run fails if more than this share of the rows is refused. Empty: MAX_REJECT_RATIO.",
        minimum=0,
        maximum=1,
    ),
    "catalog_path": Param(
        None,
        type=["null", "string"],
        title="Campaign catalog",
        description="Folder of the intents' and campaigns' YAML files. Empty: CATALOG_PATH.",
        minLength=1,
    ),
}


def shard_vectors(shard: Any) -> Any:
    """The vectors of one shard of messages: made, and written to Milvus."""
    embedded = task(tasks.embed, **EMBEDDING, **MAPPED)(shard)
    return embedded, task(tasks.upsert_vectors, **MAPPED)(embedded)


@dag(
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    params=PARAMS,
    deadline=DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=4),
        callback=SyncCallback(notifications.of_deadline),
    ),
    tags=["personalization", "ingest", "recommendations"],
    doc_md=__doc__,
)
def personalization_pipeline() -> None:
    prepared = task(tasks.prepare)()
    named = ("{{ params.input_path or '' }}", "{{ params.events_path or '' }}")
    shards = task(tasks.ingest, **WHOLE_FILES, **MESSAGES_OUT)(*named)
    events = task(tasks.ingest_events, **WHOLE_FILES, **EVENTS_OUT)(*named)
    utterances = task(tasks.embed_catalog, **EMBEDDING)()

    # A shard is written while the next one is embedded.
    in_groups: Any = task_group(prefix_group_id=False)(shard_vectors).expand(shard=shards)
    embedded, upserted = in_groups
    mirrored = task(tasks.mirror_vectors, **EMBEDDING)(shards)
    user_pages = task(tasks.detect_intents, **EVEN_IF_NOTHING_NEW, **BOTH_IN)(embedded, utterances)
    graph = task(tasks.build_graph, **MAPPED).expand(user_page=user_pages)
    engagement = task(tasks.roll_up_engagement)(user_pages)
    profiles = task(tasks.refresh_profiles, **EVEN_IF_NOTHING_NEW)(embedded)
    learned = task(tasks.learn, **EVEN_IF_NOTHING_NEW)(user_pages, embedded)
    published = task(tasks.publish, **EVEN_IF_NOTHING_NEW, **SERVING_OUT)(user_pages, learned)
    lineage = task(tasks.record_lineage)().as_teardown(on_failure_fail_dagrun=True)

    prepared >> [utterances, embedded, events, mirrored]
    events >> user_pages
    upserted >> [profiles, learned]
    [user_pages, mirrored] >> profiles
    # A teardown's success would make the run green; `complete` is green only where `publish` is.
    complete = EmptyOperator(task_id="complete")
    [graph, engagement, profiles] >> published >> complete
    # Behind every task, so that it waits for those that still run when another has failed.
    taken = [prepared, shards, events, utterances, embedded, upserted, mirrored]
    [*taken, user_pages, graph, engagement, profiles, learned, published] >> lineage


personalization_pipeline()
