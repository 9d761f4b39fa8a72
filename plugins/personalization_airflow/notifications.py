"""Who is told of a failed task or a late run: those whom the connections of Airflow name, by standard notifiers.

Without a connection nobody is told, and nothing fails. They run where tasks run, which has a way out.
"""

from collections.abc import Iterator
from typing import Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException
from personalization.errors import PersonalizationError

MAIL = "personalization_mail"
"""A connection of type `smtp`; its extra names `from_email`, and by comma in `to` who is told."""

WEBHOOK = "personalization_webhook"
"""A connection of type `slackwebhook`, for Slack or what takes its messages."""

_FAILED = "{{ dag_run.dag_id }}: {{ ti.task_id }} failed"
_FAILED_TEXT = (
    "{{ ti.task_id }}, attempt {{ ti.try_number }} of run {{ dag_run.run_id }}, failed with {{ reason }}.\n"
    "Log: {{ ti.log_url }}\nRun: {{ page }}"
)
_LATE = "{{ dag_run.dag_id }}: a run is late"
_LATE_TEXT = "Run {{ dag_run.dag_run_id }} was to be done by {{ deadline.deadline_time }}.\nRun: {{ page }}"


def of_failure(context: Any) -> None:
    """Tell of a task that failed for good; an `on_failure_callback`."""
    from personalization_airflow.ui import dashboard_page

    dag_run = context["dag_run"]
    page = dashboard_page(dag_run.dag_id, dag_run.run_id)
    _tell(_FAILED, _FAILED_TEXT, {**context, "reason": _reason(context.get("exception")), "page": page})


def of_deadline(context: Any) -> None:
    """Tell of a run that is not done in time; a callback of a `DeadlineAlert`."""
    from personalization_airflow.ui import dashboard_page

    dag_run = context["dag_run"]
    _tell(_LATE, _LATE_TEXT, {**context, "page": dashboard_page(dag_run["dag_id"], dag_run["dag_run_id"])})


def _tell(subject: str, text: str, context: dict[str, Any]) -> None:
    for notifier in _notifiers(subject, text):
        notifier(context)


def _notifiers(subject: str, text: str) -> Iterator[Any]:
    """Of the connections that are there. Their texts are templates, over the context."""
    if mail := _connection(MAIL):
        from airflow.providers.smtp.notifications.smtp import SmtpNotifier

        receivers = [one.strip() for one in mail.extra_dejson.get("to", "").split(",") if one.strip()]
        html = f"<pre>{{% filter e %}}{text}{{% endfilter %}}</pre>"
        yield SmtpNotifier(smtp_conn_id=MAIL, to=receivers, subject=subject, html_content=html)
    if _connection(WEBHOOK):
        from airflow.providers.slack.notifications.slack_webhook import SlackWebhookNotifier

        yield SlackWebhookNotifier(slack_webhook_conn_id=WEBHOOK, text=f"*{subject}*\n{text}")


def _connection(conn_id: str) -> Any:
    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException:
        return None


def _reason(error: Any) -> str:
    """Errors raised on purpose are meant to be read; of others the words may hold anything."""
    if isinstance(error, AirflowFailException):
        error = error.__cause__ or error
    told = isinstance(error, PersonalizationError | AirflowFailException)
    return f"{type(error).__name__}: {error}" if told else type(error).__name__
