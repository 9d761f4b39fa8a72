"""What Airflow loads of ours beside the DAGs: the plugin, notifications, and the datasets that OpenLineage is told."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from aiosmtpd.controller import Controller
from conftest import PROJECT, free_ports
from personalization.schemas import VectorSpace
from personalization.settings import Settings, get_settings

RUN = "manual__2026-11-01T09:00:00+00:00"
QUOTED = "manual__2026-11-01T09%3A00%3A00%2B00%3A00"


@pytest.fixture(scope="module", autouse=True)
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Airflow keeps off anybody's AIRFLOW_HOME."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
        patch.setenv("DASHBOARD_URL", "https://dash.example/")
        get_settings.cache_clear()
        yield
    get_settings.cache_clear()


def in_airflow(script: str, **env: str) -> dict[str, Any]:
    """What a script prints last, as JSON, in a process that has the project's plugins folder."""
    given = {"AIRFLOW__CORE__PLUGINS_FOLDER": str(PROJECT / "plugins"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | given | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- the plugin


def test_airflow_loads_the_plugin_once_without_an_error_and_no_driver_with_it():
    found = in_airflow(
        "import json, sys\n"
        "from airflow import plugins_manager as manager\n"
        "errors = manager._get_plugins()[1]\n"
        "views = [(one['name'], one['href'], one['destination']) for one in manager._get_ui_plugins()[0]]\n"
        "heavy = {'pymilvus', 'pymongo', 'neo4j', 'torch', 'pyarrow'} & set(sys.modules)\n"
        "print(json.dumps({'errors': errors, 'views': views, 'heavy': sorted(heavy),\n"
        "    'links': [one.name for one in manager.get_global_operator_extra_links()]}))\n"
    )

    assert found["errors"] == {}
    assert found["heavy"] == []
    assert found["views"] == [
        ["Dashboard", "https://dash.example/?embed=true", "nav"],
        ["Dashboard", "https://dash.example/runs?run={RUN_ID}&embed=true", "dag_run"],
    ]
    assert found["links"] == ["Run on the dashboard"]


@pytest.mark.parametrize(
    ("dag_id", "link"),
    [
        ("personalization_pipeline", f"https://dash.example/runs?run={QUOTED}"),
        ("reembed", f"https://dash.example/runs?run={QUOTED}"),
        ("offline_evaluation", "https://dash.example/evaluation"),
        ("store_audit", "https://dash.example/audit"),
        ("somebody_else_s", ""),
    ],
)
def test_a_task_links_to_the_page_of_its_run(dag_id: str, link: str):
    from personalization_airflow.ui import DashboardLink

    key = SimpleNamespace(dag_id=dag_id, run_id=RUN)
    assert DashboardLink().get_link(None, ti_key=key) == link


# --- who is told


class Inbox:
    """What a mail server and a webhook received."""

    def __init__(self) -> None:
        self.mails: list[tuple[list[str], str, str]] = []
        self.posts: list[tuple[str, dict[str, Any]]] = []
        [self.smtp_port] = free_ports(1)
        inbox = self

        class Webhook(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                inbox.posts.append((self.path, json.loads(body)))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: Any) -> None:
                pass

        self.web = ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
        self.mail = Controller(self, hostname="127.0.0.1", port=self.smtp_port)

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        message = message_from_bytes(envelope.content)
        [part] = message.get_payload()
        text = part.get_payload(decode=True).decode()
        self.mails.append((envelope.rcpt_tos, message["Subject"], text))
        return "250 OK"


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    # Slack's client asks for its logger's level, which Airflow's loggers have and the default ones lack.
    structlog.configure(wrapper_class=structlog.stdlib.BoundLogger, logger_factory=structlog.stdlib.LoggerFactory())
    inbox = Inbox()
    inbox.mail.start()
    threading.Thread(target=inbox.web.serve_forever, daemon=True).start()
    yield inbox
    inbox.mail.stop()
    inbox.web.shutdown()
    inbox.web.server_close()


def connect(inbox: Inbox, monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Give Airflow the connections."""
    mail = {
        "conn_type": "smtp",
        "host": "127.0.0.1",
        "port": inbox.smtp_port,
        "extra": {"from_email": "airflow@shop", "to": "ann@shop, bob@shop", "disable_ssl": True, "disable_tls": True},
    }
    address = f"http://127.0.0.1:{inbox.web.server_address[1]}/hooks"
    webhook = {"conn_type": "slackwebhook", "host": address, "password": "T0/B0/secret"}
    for kind, connection in (("mail", mail), ("webhook", webhook)):
        if kind in kinds:
            monkeypatch.setenv(f"AIRFLOW_CONN_PERSONALIZATION_{kind.upper()}", json.dumps(connection))


def failed(error: BaseException) -> dict[str, Any]:
    """The context of a task that failed."""
    return {
        "dag_run": SimpleNamespace(dag_id="personalization_pipeline", run_id=RUN),
        "ti": SimpleNamespace(task_id="ingest", try_number=3, log_url="https://airflow.example/log"),
        "exception": error,
    }


def late() -> dict[str, Any]:
    """The context that Airflow gives the callback of a missed deadline."""
    return {
        "dag_run": {"dag_id": "personalization_pipeline", "dag_run_id": RUN},
        "deadline": {"id": "1", "deadline_time": "2026-11-01 13:00:00+00:00"},
    }


def test_without_a_connection_nobody_is_told_and_nothing_fails(inbox: Inbox):
    from personalization_airflow import notifications

    notifications.of_failure(failed(ValueError("x")))
    notifications.of_deadline(late())

    assert (inbox.mails, inbox.posts) == ([], [])


def test_a_failed_task_is_told_by_mail_and_webhook_with_where_to_look(inbox: Inbox, monkeypatch: pytest.MonkeyPatch):
    from airflow.sdk.exceptions import AirflowFailException
    from personalization.errors import InputError
    from personalization_airflow import notifications

    connect(inbox, monkeypatch, "mail", "webhook")
    error = AirflowFailException("in.json: <b>is</b> {{ dag_run }}")
    error.__cause__ = InputError("in.json: <b>is</b> {{ dag_run }}")

    notifications.of_failure(failed(error))

    [(receivers, subject, mail)] = inbox.mails
    [(path, post)] = inbox.posts
    assert receivers == ["ann@shop", "bob@shop"]
    assert subject == "personalization_pipeline: ingest failed"
    assert path == "/hooks/T0/B0/secret"
    assert post["text"].startswith("*personalization_pipeline: ingest failed*\n")
    assert "InputError: in.json: <b>is</b> {{ dag_run }}." in post["text"]  # as it is: no template, and in HTML no tag
    assert "InputError: in.json: &lt;b&gt;is&lt;/b&gt; {{ dag_run }}." in mail
    for text in (mail, post["text"]):
        assert f"attempt 3 of run {RUN}" in text
        assert "https://airflow.example/log" in text
        assert f"https://dash.example/runs?run={QUOTED}" in text


def test_of_an_error_that_nobody_meant_to_be_read_the_class_alone_is_told(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
):
    from personalization_airflow import notifications

    connect(inbox, monkeypatch, "webhook")

    notifications.of_failure(failed(ValueError("password hunter2 at 10.0.0.1")))

    [(_, post)] = inbox.posts
    assert inbox.mails == []
    assert "failed with ValueError." in post["text"]
    assert "hunter2" not in post["text"]


def test_a_late_run_is_told(inbox: Inbox, monkeypatch: pytest.MonkeyPatch):
    from personalization_airflow import notifications

    connect(inbox, monkeypatch, "mail", "webhook")

    notifications.of_deadline(late())

    [(_, subject, mail)] = inbox.mails
    assert subject == "personalization_pipeline: a run is late"
    assert f"Run {RUN} was to be done by 2026-11-01 13:00:00+00:00." in mail
    assert f"https://dash.example/runs?run={QUOTED}" in inbox.posts[0][1]["text"]


# --- OpenLineage's datasets


def test_every_stage_of_the_pipeline_that_touches_a_store_says_so():
    from personalization.pipeline.lineage import STAGES
    from personalization_airflow.datasets import _FLOW

    assert set(_FLOW) - {"evaluate"} == set(STAGES) - {"embed_catalog"}


DATASETS = """
import json
from airflow.sdk.lineage import get_hook_lineage_collector
from airflow.providers.openlineage.extractors.manager import ExtractorManager
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization_airflow.datasets import tell_datasets
settings = Settings(_env_file=None, sqlite_path="/data/analytics.db")
for stage in ("ingest_events", "refresh_profiles", "publish", "build_graph"):
    tell_datasets(stage, VectorSpace("hub/small", 8), settings)
found = ExtractorManager().get_hook_lineage()
names = {kind: sorted(f"{one.namespace} {one.name}" for one in getattr(found, kind) if found) if found else []
         for kind in ("inputs", "outputs")}
print(json.dumps({**names, "collector": type(get_hook_lineage_collector()).__name__}))
"""
CONNECTIONS = {
    "AIRFLOW_CONN_MONGO_DEFAULT": "mongo://user:hidden@mongodb/personalization",
    "AIRFLOW_CONN_MILVUS_DEFAULT": "milvus://milvus:19531",
    "AIRFLOW_CONN_NEO4J_DEFAULT": "neo4j://user:hidden@neo4j/neo4j",
    "AIRFLOW_CONN_REDIS_DEFAULT": "redis://:hidden@redis:6379",
}


def test_openlineage_is_told_the_stores_datasets_by_its_own_names_and_no_password():
    found = in_airflow(DATASETS, OPENLINEAGE_URL="http://127.0.0.1:9", **CONNECTIONS)

    collection = "small_8_"
    assert [one for one in found["inputs"] if collection not in one] == [
        "mongodb://mongodb:27017 personalization.events",
        "sqlite:///data/analytics.db events",
        "sqlite:///data/analytics.db message_intents",
        "sqlite:///data/analytics.db user_engagement",
    ]
    assert [one.rpartition("_")[0] for one in found["inputs"] if collection in one] == [
        "milvus://milvus:19531 messages_small_8"
    ]
    assert [one for one in found["outputs"] if collection not in one] == [
        "mongodb://mongodb:27017 personalization.events",
        "mongodb://mongodb:27017 personalization.quarantine",
        "neo4j://neo4j:7687/neo4j graph",
        "redis://redis:6379 generation",
        "sqlite:///data/analytics.db events",
        "sqlite:///data/analytics.db served",
    ]
    assert "hidden" not in str(found)


def test_where_openlineage_is_off_nothing_is_collected_and_no_connection_is_asked_for():
    found = in_airflow(DATASETS, OPENLINEAGE_URL="")

    assert found == {"inputs": [], "outputs": [], "collector": "NoOpCollector"}


def test_a_database_on_a_server_is_named_by_host_and_port(monkeypatch: pytest.MonkeyPatch):
    from personalization_airflow.datasets import _uri, to_openlineage

    settings = Settings(_env_file=None, analytics_url="postgresql+psycopg://u:hidden@db/analytics")

    dataset = to_openlineage(SimpleNamespace(uri=_uri("sql:events", VectorSpace("", 0), settings)), None)  # type: ignore[arg-type]

    assert (dataset.namespace, dataset.name) == ("postgresql://db:5432/analytics", "events")


@pytest.mark.parametrize("given", [None, [], {"uri": "a"}, [{"uri": "a"}], [{"uri": "a"}, {"uri": "b"}]])
def test_what_a_mapped_group_returned_is_a_list_however_many_shards_there_were(given: Any):
    from personalization_airflow.tasks import of_all_shards

    assert of_all_shards(given) == ([given] if isinstance(given, dict) else given or [])
