"""
### How the API answers

Reads the counters of the API at `/v1/metrics` every five minutes and keeps what they rose by: requests, errors and
latencies by route in the table `api_latency`, answers by where they came from and by the stores they lacked in
`api_counts`. Days old it is joined to hours, months old to days. The dashboard's page *Latency* shows it.

Then it looks whether a route was slow or failed beyond what is usual, which the page *Anomalies* shows.

Where the API asks for keys, `API_KEY` is one with the scope `read`. Reading twice counts nothing twice.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task
from personalization_airflow import defaults, tasks

DEFAULT_ARGS = {
    **defaults.EVERY_TASK,
    "retry_delay": timedelta(seconds=20),
    "max_retry_delay": timedelta(minutes=2),
    "execution_timeout": timedelta(minutes=4),
}


@dag(
    schedule="*/5 * * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=False,
    default_args=DEFAULT_ARGS,
    tags=["personalization", "serving", "observability"],
    doc_md=__doc__,
)
def api_health() -> None:
    task(tasks.watch_api)()


api_health()
