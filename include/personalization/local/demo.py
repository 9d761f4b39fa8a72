"""The demo: trigger the DAG as any client of Airflow would, watch it, and show what came of it."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from upath import UPath

from personalization.errors import LocalStackError, PersonalizationError
from personalization.local.config import HOST, StackConfig
from personalization.local.stack import Stack
from personalization.reading import check_readable, read_rows
from personalization.schemas import Message
from personalization.stores.analytics import AnalyticsStore

DAG_ID = "personalization_pipeline"
SAMPLE = Path("include/data/sample_conversations.json")
SAMPLE_EVENTS = Path("include/data/sample_events.csv")

_PARSED_TIMEOUT_S = 120
_POLL_S = 1.0
_PAGE = 100
_USERS_SHOWN = 3
_REASONS_SHOWN = 4
_ROWS_LOOKED_AT = 2000
_ENDED_WELL = {"success", "skipped"}
_MARKS = {
    "success": "[green]✓[/]",
    "skipped": "[dim]–[/]",
    "failed": "[red]✗[/]",
    "upstream_failed": "[dim red]✗[/]",
}


class DagFailedError(PersonalizationError):
    """The DAG run ended in failure; says which task, and where its log is."""


def run_demo(stack: Stack, input_path: Path, console: Console, *, events_path: Path | None = None) -> None:
    """Trigger the pipeline on the files, follow it, and print recommendations for a few of the users.

    Raises:
        DagFailedError: a task failed.
        LocalStackError: a process of the stack died meanwhile.
    """
    sources = [UPath(path.absolute()) for path in (input_path, events_path) if path is not None]
    for source in sources:
        check_readable(source)
    config = stack.config
    with _airflow(config) as airflow:
        _wait_until_parsed(airflow, stack)
        airflow.patch(f"/dags/{DAG_ID}", json={"is_paused": False}).raise_for_status()
        conf = dict(zip(("input_path", "events_path"), map(str, sources), strict=False))
        trigger = {"logical_date": None, "conf": conf}
        run_id = airflow.post(f"/dags/{DAG_ID}/dagRuns", json=trigger).raise_for_status().json()["dag_run_id"]
        console.print(
            f"\nTriggered [bold]{DAG_ID}[/] on {escape(' and '.join(conf.values()))}, run {run_id}",
            highlight=False,
            soft_wrap=True,
        )
        _follow(airflow, stack, run_id, console)
    _show_recommendations(config, sources[0], console)
    console.print(
        f"Airflow    http://{HOST}:{config.airflow_port}/dags/{DAG_ID}\n"
        f"API        http://{HOST}:{config.api_port}/docs\n"
        f"Dashboard  http://{HOST}:{config.dashboard_port}\n\n"
        "`make status` shows the stack, `make stop` stops it, `make demo INPUT=your.json EVENTS=your.csv` takes your "
        "own files.",
        highlight=False,
        soft_wrap=True,
    )


def _airflow(config: StackConfig) -> httpx.Client:
    address = f"http://{HOST}:{config.airflow_port}"
    token = httpx.get(f"{address}/auth/token", timeout=30, trust_env=False).raise_for_status().json()["access_token"]
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=f"{address}/api/v2", headers=headers, timeout=30, trust_env=False)


def _wait_until_parsed(airflow: httpx.Client, stack: Stack) -> None:
    deadline = time.monotonic() + _PARSED_TIMEOUT_S
    while airflow.get(f"/dags/{DAG_ID}").status_code == httpx.codes.NOT_FOUND:
        stack.check_alive()
        if time.monotonic() > deadline:
            errors = airflow.get("/importErrors").raise_for_status().json()["import_errors"]
            reason = errors[0]["stack_trace"] if errors else f"see {stack.log_file('airflow-dag-processor')}"
            raise LocalStackError(f"Airflow did not parse {DAG_ID}: {reason}")
        time.sleep(_POLL_S)


def _follow(airflow: httpx.Client, stack: Stack, run_id: str, console: Console) -> None:
    seen: set[tuple[str, int]] = set()
    with console.status("waiting for the scheduler") as status:
        while True:
            stack.check_alive()
            run = airflow.get(f"/dags/{DAG_ID}/dagRuns/{run_id}").raise_for_status().json()
            tasks = list(_tasks(airflow, run_id))
            for task in sorted(tasks, key=lambda one: one["end_date"] or ""):
                key = (task["task_id"], task["map_index"])
                if task["state"] in _MARKS and key not in seen:
                    seen.add(key)
                    console.print(_line(task))
            status.update(_running(tasks) if run["state"] != "queued" else "waiting for the run before it to end")
            if run["state"] in ("success", "failed"):
                break
            time.sleep(_POLL_S)
    if run["state"] == "failed":
        raise DagFailedError(_failure(stack.config, run_id, tasks))


def _tasks(airflow: httpx.Client, run_id: str) -> Iterator[dict[str, Any]]:
    url = f"/dags/{DAG_ID}/dagRuns/{run_id}/taskInstances"
    offset = 0
    while True:
        page = airflow.get(url, params={"limit": _PAGE, "offset": offset}).raise_for_status().json()
        yield from page["task_instances"]
        offset += len(page["task_instances"])
        if offset >= page["total_entries"] or not page["task_instances"]:
            return


def _line(task: dict[str, Any]) -> str:
    name = task["task_id"] + (f" \\[{task['map_index']}]" if task["map_index"] >= 0 else "")
    seconds = f"{task['duration']:6.1f} s" if task["duration"] else " " * 8
    return f"  {_MARKS[task['state']]} {name:<24}{seconds}  {'' if task['state'] == 'success' else task['state']}"


def _running(tasks: list[dict[str, Any]]) -> str:
    states = Counter(task["state"] or "waiting" for task in tasks)
    running = sorted({task["task_id"] for task in tasks if task["state"] == "running"})
    return f"{states.total() - states['waiting']} of {states.total()} tasks begun; now: {', '.join(running) or '–'}"


def _failure(config: StackConfig, run_id: str, tasks: list[dict[str, Any]]) -> str:
    failed = [task for task in tasks if task["state"] == "failed"] or [
        task for task in tasks if task["state"] not in _ENDED_WELL
    ]
    task = failed[0]
    folder = config.root / "airflow" / "logs" / f"dag_id={DAG_ID}" / f"run_id={run_id}" / f"task_id={task['task_id']}"
    if task["map_index"] >= 0:
        folder /= f"map_index={task['map_index']}"
    log = folder / f"attempt={task['try_number']}.log"
    return f"task {task['task_id']} failed; its log: {log}"


def _show_recommendations(config: StackConfig, source: UPath, console: Console) -> None:
    with httpx.Client(base_url=f"http://{HOST}:{config.api_port}", timeout=30, trust_env=False) as api:
        for user_id in _telling_users(config, source):
            response = api.get(f"/recommendations/{user_id}", params={"top": 3})
            if response.is_error:
                raise LocalStackError(f"the API answered {response.text}; see {config.logs / 'api.log'}")
            answer = response.json()
            console.print(f"\n[bold]{escape(user_id)}[/] [dim]({answer['strategy']})[/]")
            for place, one in enumerate(answer["recommendations"], start=1):
                console.print(f"  {place}. [bold cyan]{escape(one['name'])}[/]  {one['score']:.2f}")
                for reason in one["reasons"][:_REASONS_SHOWN]:  # the weightiest; the API has all
                    console.print(
                        f"       {reason['share']:.2f}  {escape(reason['text'])}",
                        highlight=False,
                        soft_wrap=True,
                    )
    console.print()


def _telling_users(config: StackConfig, source: UPath) -> list[str]:
    """Users of the file's beginning who expressed the most."""
    users: set[str] = set()
    for row in islice(read_rows(source), _ROWS_LOOKED_AT):
        with suppress(ValidationError):
            users.add(Message.model_validate(row.value).user_id)
    settings = config.settings()
    analytics = AnalyticsStore.from_settings(settings)
    expressed: Counter[str] = Counter()
    for intent in analytics.expressed_intents(sorted(users), settings.profile_half_life_days):
        expressed[intent.user_id] += intent.count
    analytics.engine.dispose()
    return [user_id for user_id, _ in expressed.most_common(_USERS_SHOWN)]
