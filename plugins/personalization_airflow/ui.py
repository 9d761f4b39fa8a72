"""What Airflow's UI shows of the platform: links to the dashboard, and on each run what became of it."""

from typing import Any
from urllib.parse import quote

from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin
from airflow.sdk import BaseOperatorLink
from personalization.settings import get_settings

PIPELINE, REEMBED = "personalization_pipeline", "reembed"
SUMMARY = "Lineage: "
"""Begins the line of a run's note that is ours; the others are the user's."""

_RUN_PAGE = "runs?run={run_id}"
_PAGES = {PIPELINE: _RUN_PAGE, REEMBED: _RUN_PAGE, "offline_evaluation": "evaluation", "store_audit": "audit"}


def dashboard_page(dag_id: str, run_id: str) -> str:
    """The page of the dashboard that shows a run of a DAG; its front page where none does."""
    page = _PAGES.get(dag_id, "").format(run_id=quote(run_id, safe=""))
    return f"{get_settings().dashboard_url.rstrip('/')}/{page}"


class DashboardLink(BaseOperatorLink):
    """A button on every task of the platform's DAGs."""

    name = "Run on the dashboard"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:  # noqa: ARG002
        """Empty, which disables the button, on what is no DAG of the platform."""
        return dashboard_page(ti_key.dag_id, ti_key.run_id) if ti_key.dag_id in _PAGES else ""


class RunNote:
    """Puts what `record_lineage` returned into the run's note. Called by the scheduler, in its transaction."""

    @hookimpl
    def on_dag_run_success(self, dag_run: Any) -> None:
        """Also where there was nothing new."""
        _note(dag_run)

    @hookimpl
    def on_dag_run_failed(self, dag_run: Any) -> None:
        """With the stage that failed."""
        _note(dag_run)


def _note(dag_run: Any) -> None:
    from airflow.models.xcom import XComModel
    from sqlalchemy import select
    from sqlalchemy.orm import object_session

    session = object_session(dag_run)
    if dag_run.dag_id not in (PIPELINE, REEMBED) or session is None:
        return
    returned = select(XComModel.value).where(
        XComModel.dag_id == dag_run.dag_id,
        XComModel.run_id == dag_run.run_id,
        XComModel.task_id == "record_lineage",
        XComModel.key == "return_value",
    )
    if (summary := session.scalar(returned)) is None:
        return
    kept = [line for line in (dag_run.note or "").splitlines() if not line.startswith(SUMMARY)]
    dag_run.note = "\n".join([*kept, f"{SUMMARY}{summary}"])


class PersonalizationPlugin(AirflowPlugin):
    """Read by Airflow's API server, which shows the links, and by its scheduler, which calls the listener."""

    name = "personalization"
    # With a route each is a page within Airflow: a link that leads out would be a button that does nothing (3.3.2).
    external_views = [  # noqa: RUF012 - as Airflow declares it
        {
            "name": "Dashboard",
            "href": f"{dashboard_page('', '')}?embed=true",
            "destination": "nav",
            "url_route": "personalization",
        },
        {
            "name": "Dashboard",
            "href": f"{dashboard_page('', '')}runs?run={{RUN_ID}}&embed=true",  # Airflow fills in which run
            "destination": "dag_run",
            "url_route": "personalization-run",
        },
    ]
    global_operator_extra_links = [DashboardLink()]  # noqa: RUF012
    listeners = [RunNote()]  # noqa: RUF012
