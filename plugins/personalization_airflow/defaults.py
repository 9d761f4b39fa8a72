"""What all tasks of the platform's DAGs have in common; a DAG adds its delays and time limits."""

from datetime import timedelta

from personalization_airflow import notifications

EVERY_TASK = {
    "owner": "personalization",
    "retries": 2,
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=10),
    "on_failure_callback": notifications.of_failure,
}
SUMMARISED = {"map_index_template": "{{ summary }}"}
"""Of a stage: its figures, such as `9,900 in, 100 rejected`, stand in the list of task instances."""
