"""
### Do the stores agree?

Compares MongoDB, which is the source of truth, Milvus, Neo4j, the analytics database and Redis, id by id: messages
without vectors and vectors without messages, vectors that are no unit vectors, intents and events that differ, edges
and engagement that count something else, users nobody knows, a serving generation that went back.

* **After each run** of `personalization_pipeline` that published.
* **By hand**: *Trigger*; with `repair` what has drifted is made anew from MongoDB by a run of the pipeline's own
  stages over what is concerned, and the stores are compared again.

Fails where drift is left. What a run at work has taken, and events that wait for the next run, are no drift. The
findings are in the tables `audits` and `audit_findings` and on the dashboard's page *Audit*. May be repeated, or killed
and repeated, and may run beside the pipeline.
"""

from datetime import datetime, timedelta

from airflow.sdk import Param, dag, task
from personalization_airflow import assets, defaults, tasks

DEFAULT_ARGS = {
    **defaults.EVERY_TASK,
    "retry_delay": timedelta(minutes=1),
    "execution_timeout": timedelta(hours=6),
}

PARAMS = {
    "repair": Param(
        False,
        type="boolean",
        title="Repair",
        description="Make anew from MongoDB what has drifted, delete what is of nothing, and compare again.",
    ),
}


@dag(
    schedule=[assets.SERVING],
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=False,  # nobody would think of it on a day when all seems well
    default_args=DEFAULT_ARGS,
    params=PARAMS,
    tags=["personalization", "audit", "observability"],
    doc_md=__doc__,
)
def store_audit() -> None:
    task(tasks.audit_stores)()


store_audit()
