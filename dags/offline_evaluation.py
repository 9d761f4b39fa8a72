"""
### Is what is shown worth more than the most popular campaigns?

Replays the last weeks of what the stores hold. At each split only what lies before it is known; each policy
ranks the campaigns, and what the users then clicked or bought says how good the list was. The figures, with
their intervals, are in the table `evaluations` and on the dashboard's page *Evaluation*.

* **Scheduled** (weekly): the last four weeks, split every seven days.
* **By hand**: *Trigger* with other splits, or with some policies only, such as the conf
  `{"weeks": 8, "policies": ["shipped", "popularity"]}`.

Skipped where there are too few clicks and conversions to tell one policy from another; the task's log says
how many. Of the data it writes `evaluations` alone, so it may run beside the pipeline; a repeated run
sets its rows anew.
"""

from datetime import datetime, timedelta

from airflow.sdk import Param, dag, task
from personalization_airflow import assets, defaults, tasks

DEFAULT_ARGS = {
    **defaults.EVERY_TASK,
    **defaults.SUMMARISED,
    "retry_delay": timedelta(minutes=1),
    "execution_timeout": timedelta(hours=2),
}
FLOW = {"inlets": [assets.SERVING], "outlets": [assets.EVALUATION]}

PARAMS = {
    "task": Param(
        "any",
        type="string",
        enum=["new", "any"],
        title="Task",
        description="new: campaigns that the user has not engaged with yet; any: all campaigns.",
    ),
    "split_days": Param(
        7,
        type="integer",
        title="Days between splits",
        description="Also how many days behind a split count.",
        minimum=1,
        maximum=90,
    ),
    "weeks": Param(
        4,
        type="integer",
        title="Weeks",
        description="How long before the last click or conversion the first split lies.",
        minimum=1,
        maximum=52,
    ),
    "policies": Param(
        None,
        type=["null", "array"],
        items={"type": "string"},
        title="Policies",
        description="One name a line, such as `shipped`. Empty: all that `personalization evaluate` compares.",
    ),
}


@dag(
    schedule="@weekly",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    params=PARAMS,
    tags=["personalization", "evaluation", "recommendations"],
    doc_md=__doc__,
)
def offline_evaluation() -> None:
    task(tasks.evaluate, **FLOW)()


offline_evaluation()
