"""Tells Airflow of the `milvus` connection type, so that the UI offers its form, and how OpenLineage names the stores'
datasets.
"""

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Entry point `apache_airflow_provider`; read without importing the hook."""
    return {
        "package-name": "personalization-platform",
        "name": "Milvus",
        "description": "Milvus vector database",
        "connection-types": [
            {
                "hook-class-name": "personalization_airflow.milvus.MilvusHook",
                "hook-name": "Milvus",
                "connection-type": "milvus",
                "ui-field-behaviour": {
                    "hidden-fields": [],
                    "relabeling": {"login": "User", "schema": "Database", "password": "Password or API key"},
                    "placeholders": {"host": "127.0.0.1", "port": "19530", "schema": "default"},
                },
                "conn-fields": {
                    "secure": {
                        "label": "Use TLS",
                        "description": "Connect by https instead of http.",
                        "schema": {"type": ["boolean", "null"], "default": False},
                    },
                    "timeout": {
                        "label": "Timeout",
                        "description": "Seconds to wait for a connection or an answer.",
                        "schema": {"type": ["number", "null"], "default": 10},
                    },
                },
            }
        ],
        "asset-uris": [
            {
                "schemes": ["milvus", "neo4j", "redis", "sqlite", "postgresql"],
                "handler": None,
                "to_openlineage_converter": "personalization_airflow.datasets.to_openlineage",
            }
        ],
    }
