"""
### Conversations in, recommendations out

Takes a file of conversations into MongoDB, Milvus, Neo4j and the analytics database, and publishes
what the API serves.

* **Scheduled** (daily): takes the files of the inbox that no successful run has taken yet. Nothing
  new is a success.
* **By hand**: *Trigger* with `input_path`, or `{"input_path": "/data/conversations.json"}` as conf.

Every task may be retried, cleared or run twice: all writes are upserts by stable ids, and messages
count as done only when `publish` has succeeded. Rows that cannot be taken are in MongoDB's
`quarantine` with their reason; what each stage did is in `pipeline_runs`, whatever happened.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, cast

from airflow.sdk import Param, TriggerRule, dag, get_current_context, task
from personalization_airflow.stage import run_settings, stage
from personalization_airflow.stores import (
    analytics_store,
    cache_publisher,
    graph_store,
    mongo_store,
    vector_store,
)

from personalization import pipeline
from personalization.schemas import Ref
from personalization.staging import Staging


@task
def prepare() -> None:
    """Make the stores ready and bring the catalog into them."""
    with (
        stage("prepare") as s,
        vector_store() as vectors,
        graph_store(s.settings) as graph,
        analytics_store(s.settings) as analytics,
    ):
        pipeline.prepare(
            s.report, catalog=s.catalog, space=s.space, vectors=vectors, graph=graph, analytics=analytics
        )
