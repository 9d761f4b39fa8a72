"""
### Drop the vectors of the former embedding model

Behind `reembed`, the vectors of the former model are kept and kept up to date, so that one trigger of `reembed` leads
back. Once nobody wants to go back, trigger this: their collections are dropped, and daily runs embed for one model
again. It also gives up a migration that is half filled.

What is served is never dropped. It waits, for a minute at most, until the API asks the former vectors no more. May be
repeated.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task
from personalization_airflow import defaults, tasks

DEFAULT_ARGS = {
    **defaults.EVERY_TASK,
    "retry_delay": timedelta(seconds=20),
    "execution_timeout": timedelta(minutes=30),
}


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=False,  # nothing happens without a trigger
    default_args=DEFAULT_ARGS,
    tags=["personalization", "embedding", "maintenance"],
    doc_md=__doc__,
)
def reembed_finish() -> None:
    task(tasks.finish)()


reembed_finish()
