"""Milvus by Airflow connection; no provider ships a hook."""

from contextlib import closing
from typing import Any

from airflow.sdk import BaseHook
from personalization.stores.milvus import GRPC_OPTIONS
from pymilvus import MilvusClient

DEFAULT_PORT = 19530


class MilvusHook(BaseHook):
    """A `MilvusClient` made from a connection of type `milvus`.

    Host and port address the server, schema names the database. With a user the password goes
    with it; without one the password is taken for an API key.
    """

    conn_name_attr = "milvus_conn_id"
    default_conn_name = "milvus_default"
    conn_type = "milvus"
    hook_name = "Milvus"

    def __init__(self, milvus_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.milvus_conn_id = milvus_conn_id

    def get_conn(self) -> MilvusClient:
        """Connect; raises `MilvusException` where the server does not answer in time."""
        connection = self.get_connection(self.milvus_conn_id)
        extra = connection.extra_dejson
        # A connection given as a URI has text here.
        scheme = "https" if str(extra.get("secure")).lower() in ("true", "1") else "http"
        login, password = connection.login or "", connection.password or ""
        return MilvusClient(
            uri=f"{scheme}://{connection.host or 'localhost'}:{connection.port or DEFAULT_PORT}",
            token=f"{login}:{password}" if login else password,
            db_name=connection.schema or "",
            timeout=float(extra.get("timeout") or 10),
            grpc_options=GRPC_OPTIONS,
        )

    def test_connection(self) -> tuple[bool, str]:
        """For the UI's `Test` button."""
        try:
            with closing(self.get_conn()) as client:
                version = client.get_server_version()
        except Exception as error:  # noqa: BLE001 - the button shows whatever went wrong
            return False, str(error)
        return True, f"Connected to Milvus {version}"
