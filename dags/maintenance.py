"""
### Erasures that are not over yet

`DELETE /users/{user_id}` erases a person at once. Here it is gone on with, hourly, until nothing can undo it:

* A store that was **down** then is asked again. A task that fails names the stores that still are; nothing else is
  left undone for them.
* What a task wrote that was **at work** at the request, and had asked before who is erased, is removed. Once all
  such tasks have ended and nothing is left, the name is forgotten too; a digest stays in MongoDB's collection
  `erasures`, so that no later file, retry or backfill brings the person back.

Nothing to do is a success. May run beside the pipeline, and be repeated.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task
from personalization_airflow import defaults, tasks

DEFAULT_ARGS = {
    **defaults.EVERY_TASK,
    "retry_delay": timedelta(minutes=1),
    "execution_timeout": timedelta(minutes=30),
}


@dag(
    schedule="@hourly",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=False,  # an erasure that waits must not wait for somebody to think of it
    default_args=DEFAULT_ARGS,
    tags=["personalization", "maintenance", "erasure"],
    doc_md=__doc__,
)
def maintenance() -> None:
    task(tasks.sweep_erasures)()


maintenance()
