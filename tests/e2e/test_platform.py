"""The whole platform as its user runs it: the embedded stack, the DAG in Airflow, the API, the dashboard."""

import gzip
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from browser import ARTIFACTS, chromium, needs_browser
from conftest import SAMPLE, SAMPLE_EVENTS, stack_config
from personalization.local.config import PACKAGED_MODEL
from personalization.local.demo import DAG_ID, DagFailedError, run_demo
from personalization.local.stack import Stack
from personalization.pipeline.lineage import STAGES
from playwright.sync_api import expect
from pymongo import MongoClient
from rich.console import Console
from sqlalchemy import create_engine, text
from upath import UPath

pytestmark = pytest.mark.timeout(900)

PATIENCE_S = 240
PATIENCE_MS = 60_000


class Receiver(ThreadingHTTPServer):
    """A server that takes OpenLineage's events, and the messages of a Slack-compatible webhook."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.messages: list[str] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                is_zipped = self.headers["Content-Encoding"] == "gzip"
                content = json.loads(gzip.decompress(body) if is_zipped else body)
                if self.path.startswith("/hooks/"):
                    receiver.messages.append(content["text"])
                else:
                    receiver.events.append(content)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Platform:
    """A running stack, and what its users see of it."""

    def __init__(self, stack: Stack, receiver: Receiver) -> None:
        self.stack = stack
        self.receiver = receiver
        self.airflow_url = f"http://127.0.0.1:{stack.config.airflow_port}"
        self.api_url = f"http://127.0.0.1:{stack.config.api_port}"
        self.dashboard_url = f"http://127.0.0.1:{stack.config.dashboard_port}"
        token = httpx.get(f"{self.airflow_url}/auth/token", timeout=30).json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        self.airflow = httpx.Client(base_url=f"{self.airflow_url}/api/v2", headers=headers, timeout=30)

    def demo(self, path: Path, events_path: Path | None = None) -> str:
        """Run the demo on the files; return what it printed."""
        output = io.StringIO()
        run_demo(self.stack, path, Console(file=output, width=200), events_path=events_path)
        return output.getvalue()

    def runs(self) -> list[dict[str, Any]]:
        answer = self.airflow.get(f"/dags/{DAG_ID}/dagRuns", params={"order_by": "-run_after"}).raise_for_status()
        runs: list[dict[str, Any]] = answer.json()["dag_runs"]
        return runs

    def wait_for_run(self, run_id: str) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            state = self.airflow.get(f"/dags/{DAG_ID}/dagRuns/{run_id}").raise_for_status().json()["state"]
            if state in ("success", "failed"):
                return str(state)
            time.sleep(1)
        raise AssertionError(f"{run_id} did not end")

    def task_states(self, run_id: str) -> dict[str, str]:
        url = f"/dags/{DAG_ID}/dagRuns/{run_id}/taskInstances"
        tasks = self.airflow.get(url, params={"limit": 1000}).raise_for_status().json()["task_instances"]
        return {task["task_id"]: task["state"] for task in tasks}

    def lineage(self, run_id: str) -> dict[str, Any]:
        engine = create_engine(f"sqlite:///{self.stack.config.platform_env['SQLITE_PATH']}")
        with engine.connect() as connection:
            rows = connection.execute(text("SELECT * FROM pipeline_runs WHERE run_id = :run_id"), {"run_id": run_id})
            found = {row.stage: row for row in rows}
        engine.dispose()
        return found

    def messages(self) -> int:
        with MongoClient(self.stack.config.platform_env["MONGODB_URI"]) as client:
            return client.personalization.conversations.count_documents({})


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield receiver
        receiver.shutdown()


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Platform]:
    webhook = {"conn_type": "slackwebhook", "host": f"{receiver.url}/hooks", "password": "T0/B0/secret"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENLINEAGE_URL", receiver.url)
        patch.setenv("AIRFLOW_CONN_PERSONALIZATION_WEBHOOK", json.dumps(webhook))
        stack = Stack(stack_config(tmp_path_factory.mktemp("platform") / "stack"))
        stack.start(print)
        yield Platform(stack, receiver)
        stack.stop()


@pytest.fixture(scope="module")
def demo_output(platform: Platform) -> str:
    return platform.demo(SAMPLE, SAMPLE_EVENTS)


def manual_run(platform: Platform) -> str:
    return next(run["dag_run_id"] for run in platform.runs() if run["run_type"] == "manual")


def test_the_embedding_service_is_ready_by_the_time_the_demo_ends(platform: Platform, demo_output: str) -> None:
    url = platform.stack.config.platform_env["EMBEDDING_URL"]

    assert httpx.get(f"{url}/ready", timeout=30).raise_for_status().json()["model"] == PACKAGED_MODEL


def test_the_demo_shows_every_task_the_recommendations_and_the_three_addresses(
    platform: Platform, demo_output: str
) -> None:
    for task in (
        "prepare",
        "ingest",
        "ingest_events",
        "embed [0]",
        "upsert_vectors [0]",
        "build_graph [0]",
        "learn",
        "publish",
        "record_lineage",
    ):
        assert f"✓ {task}" in demo_output
    assert "expressed “" in demo_output
    for url in (platform.airflow_url, platform.api_url, platform.dashboard_url):
        assert url in demo_output


def test_lineage_has_a_row_for_every_stage_with_its_figures(platform: Platform, demo_output: str) -> None:
    rows = platform.lineage(manual_run(platform))

    total = len(json.loads(SAMPLE.read_text()))
    events = len(SAMPLE_EVENTS.read_text().splitlines()) - 1
    assert set(rows) == set(STAGES)
    assert rows["ingest_events"].rows_in == rows["ingest_events"].rows_out == events
    assert {row.status for row in rows.values()} == {"success"}
    assert rows["ingest"].rows_in == rows["ingest"].rows_out == rows["upsert_vectors"].rows_out == total
    assert platform.messages() == total


def test_airflow_says_of_the_run_and_of_each_task_what_it_did(platform: Platform, demo_output: str) -> None:
    run_id = manual_run(platform)
    total = len(json.loads(SAMPLE.read_text()))
    events = len(SAMPLE_EVENTS.read_text().splitlines()) - 1

    run = platform.airflow.get(f"/dags/{DAG_ID}/dagRuns/{run_id}").raise_for_status().json()
    tasks = platform.airflow.get(f"/dags/{DAG_ID}/dagRuns/{run_id}/taskInstances", params={"limit": 100}).json()
    links = platform.airflow.get(f"/dags/{DAG_ID}/dagRuns/{run_id}/taskInstances/ingest/links").json()
    served = platform.airflow.get("/assets/events", params={"source_dag_id": DAG_ID, "source_run_id": run_id}).json()

    assert run["note"] == f"Lineage: messages: {total} in; events: {events} in"
    shown = {one["task_id"]: one["rendered_map_index"] for one in tasks["task_instances"]}
    assert (shown["ingest"], shown["embed"]) == (f"{total} in", f"0: {total} in")
    page = f"{platform.dashboard_url}/runs?run={quote(run_id, safe='')}"
    assert links["extra_links"] == {"Run on the dashboard": page}
    [extra] = [one["extra"] for one in served["asset_events"] if one["name"] == "personalization_serving"]
    assert extra["messages"] == total


def test_openlineage_gets_the_run_with_the_stores_datasets(platform: Platform, demo_output: str) -> None:
    collection = f"mongodb://127.0.0.1:{platform.stack.config.mongodb_port}", "personalization.conversations"
    done = [one for one in platform.receiver.events if one["eventType"] == "COMPLETE"]

    def datasets(stage: str, side: str) -> set[tuple[str, str]]:
        events = [one for one in done if one["job"]["name"] == f"{DAG_ID}.{stage}"]
        assert events, stage
        return {(dataset["namespace"], dataset["name"]) for event in events for dataset in event[side]}

    assert collection in datasets("ingest", "outputs")
    assert collection in datasets("upsert_vectors", "inputs")
    assert any(name.startswith("messages_") for _, name in datasets("upsert_vectors", "outputs"))
    assert {name for _, name in datasets("publish", "outputs")} == {"served", "generation"}
    assert any(one["job"]["name"] == DAG_ID for one in done)


def test_the_api_answers_with_reasons_after_the_run(platform: Platform, demo_output: str) -> None:
    assert httpx.get(f"{platform.api_url}/health", timeout=30).json() == {"status": "ok"}
    answer = httpx.get(f"{platform.api_url}/recommendations/maria", params={"top": 5}, timeout=30).json()
    assert answer["recommendations"][0]["campaign_id"] == "weekend_city_breaks"
    assert answer["recommendations"][0]["reasons"]


def test_a_scheduled_run_takes_the_inbox_once_and_is_green_when_nothing_is_new(
    platform: Platform, demo_output: str
) -> None:
    scheduled = next(run["dag_run_id"] for run in platform.runs() if run["run_type"] == "scheduled")
    assert platform.wait_for_run(scheduled) == "success"
    assert platform.lineage(scheduled)["ingest"].rows_in == 0

    inbox = UPath(platform.stack.config.platform_env["INBOX_URI"])
    row = {"user_id": "inbox-user", "message": "I lost my card, please block it", "timestamp": "2026-11-01T08:00:00Z"}
    (inbox / "monday.ndjson.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    (inbox / ".half-written.json").write_text("[{")
    header = "user_id,campaign_id,event,timestamp\n"
    (inbox / "events.csv").write_text(f"{header}inbox-user,card_protection_plus,click,2026-11-01T08:01:00Z\n")
    before = platform.messages()
    first, second = (trigger_without_path(platform) for _ in range(2))

    assert platform.wait_for_run(first) == platform.wait_for_run(second) == "success"
    assert platform.messages() == before + 1
    assert platform.lineage(first)["ingest"].rows_in == 1
    assert platform.lineage(second)["ingest"].rows_in == 0
    assert platform.lineage(first)["ingest_events"].rows_in == 1
    assert platform.lineage(second)["ingest_events"].rows_in == 0
    assert platform.task_states(second)["embed"] == "skipped"


def trigger_without_path(platform: Platform) -> str:
    answer = platform.airflow.post(f"/dags/{DAG_ID}/dagRuns", json={"logical_date": None}).raise_for_status()
    return str(answer.json()["dag_run_id"])


def test_a_failed_task_fails_the_demo_with_its_name_and_log_and_lineage_says_why(
    platform: Platform, demo_output: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps([{"who": "ann"}]))

    with pytest.raises(DagFailedError, match=r"task ingest failed; its log: .*attempt=1\.log") as failure:
        platform.demo(path)

    log = Path(str(failure.value).split("its log: ")[1])
    assert "user_id: Field required" in log.read_text()
    run_id = manual_run(platform)
    assert platform.task_states(run_id)["record_lineage"] == "success"
    rows = platform.lineage(run_id)
    assert rows["ingest"].status == "failed"
    assert "user_id: Field required" in rows["ingest"].error
    assert rows["publish"].status == "not_run"
    [told] = [one for one in platform.receiver.messages if run_id in one]
    assert told.startswith(f"*{DAG_ID}: ingest failed*")
    assert "RejectRatioExceededError" in told


def test_a_conf_that_breaks_the_schema_is_refused_at_the_door(platform: Platform, demo_output: str) -> None:
    trigger = {"logical_date": None, "conf": {"input_path": 7}}
    answer = platform.airflow.post(f"/dags/{DAG_ID}/dagRuns", json=trigger)
    assert answer.status_code == 400
    assert "input_path" in answer.text


@needs_browser
def test_a_trigger_from_the_form_runs_green(platform: Platform, demo_output: str) -> None:
    before = {run["dag_run_id"] for run in platform.runs()}
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(f"{platform.airflow_url}/dags/{DAG_ID}")
        page.get_by_role("button", name="Trigger").first.click(timeout=PATIENCE_MS)
        form = page.get_by_role("dialog").filter(has_text="Run Parameters")
        expect(form.get_by_text("Input file").first).to_be_visible(timeout=PATIENCE_MS)
        expect(form.get_by_text("A JSON array or NDJSON").first).to_be_visible()
        expect(form.get_by_text("Events file").first).to_be_visible()
        form.locator("input[name='element_input_path']").fill(str(SAMPLE))
        form.locator("input[name='element_input_path']").press("Tab")
        page.screenshot(path=ARTIFACTS / "airflow-trigger-form.png")
        form.get_by_role("button", name="Trigger").click()
        deadline = time.monotonic() + 30
        while not (new := {run["dag_run_id"] for run in platform.runs()} - before):
            assert time.monotonic() < deadline, "the form triggered no run"
            time.sleep(0.5)
        [run_id] = new
        assert platform.wait_for_run(run_id) == "success"
        assert platform.lineage(run_id)["ingest"].skipped == len(json.loads(SAMPLE.read_text()))
        page.goto(f"{platform.airflow_url}/dags/{DAG_ID}")
        page.get_by_role("button", name="Show Graph").click()
        expect(page.get_by_text("record_lineage").first).to_be_visible(timeout=PATIENCE_MS)
        page.wait_for_timeout(3000)  # the graph is laid out after it is there
        page.screenshot(path=ARTIFACTS / "airflow-graph.png")


@needs_browser
def test_the_dashboard_is_in_airflow_s_navigation_and_a_tab_of_each_run(platform: Platform, demo_output: str) -> None:
    run_id = next(run["dag_run_id"] for run in platform.runs() if "Lineage: messages" in (run["note"] or ""))
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(f"{platform.airflow_url}/dags/{DAG_ID}/runs/{quote(run_id, safe='')}")
        expect(page.get_by_text("Lineage: messages").first).to_be_visible(timeout=PATIENCE_MS)
        page.locator("a[href$='/plugin/personalization-run']").click()
        shown = page.frame_locator("iframe").get_by_role("heading", name="Runs")
        expect(shown).to_be_visible(timeout=PATIENCE_MS)
        expect(page.frame_locator("iframe").get_by_text(run_id).first).to_be_visible(timeout=PATIENCE_MS)
        page.screenshot(path=ARTIFACTS / "airflow-run-dashboard.png")
        page.goto(f"{platform.airflow_url}/dags/{DAG_ID}/runs/{quote(run_id, safe='')}/tasks/ingest/details")
        expect(page.get_by_role("link", name="Run on the dashboard")).to_be_visible(timeout=PATIENCE_MS)
        page.screenshot(path=ARTIFACTS / "airflow-task-link.png")
        page.locator("a[href='/plugin/personalization']").click()
        overview = page.frame_locator("iframe").get_by_role("heading", name="Overview")
        expect(overview).to_be_visible(timeout=PATIENCE_MS)


@needs_browser
def test_the_connection_form_knows_milvus(platform: Platform, demo_output: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(f"{platform.airflow_url}/connections")
        page.get_by_role("button", name="Add Connection").first.click(timeout=PATIENCE_MS)
        form = page.get_by_role("dialog").filter(has_text="Connection Type")
        kind = form.get_by_role("combobox").first
        kind.focus()
        kind.press_sequentially("Milvus", delay=50)
        expect(page.get_by_role("option", name="Milvus")).to_be_visible(timeout=PATIENCE_MS)
        kind.press("Enter")
        expect(form.get_by_text("Password or API key")).to_be_visible(timeout=PATIENCE_MS)
        page.screenshot(path=ARTIFACTS / "airflow-milvus-connection.png")


@needs_browser
def test_the_dashboard_shows_the_run(platform: Platform, demo_output: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 1400})
        page.goto(platform.dashboard_url)
        expect(page.get_by_role("heading", name="Overview")).to_be_visible(timeout=PATIENCE_MS)
        expect(page.get_by_text("Messages in MongoDB")).to_be_visible(timeout=PATIENCE_MS)
        expect(page.get_by_role("heading", name="The last run")).to_be_visible(timeout=PATIENCE_MS)
        expect(page.get_by_text(str(platform.messages()), exact=True).first).to_be_visible()
        page.wait_for_timeout(3000)  # charts are drawn after the text
        page.screenshot(path=ARTIFACTS / "platform-dashboard.png")
