"""Feast's own feature server over the same Redis. Runs in an environment of its own, where Feast is installed.

    python feast_features.py ANSWERS PORT

`ANSWERS` is a JSON file of `{user: answer}`. The one feature is the answer as a string, so that Feast carries no more
than the others do.
"""

import json
import os
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd  # type: ignore[import-untyped]
import uvicorn
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType  # type: ignore[import-not-found]
from feast.feature_server import get_app  # type: ignore[import-not-found]
from feast.types import String  # type: ignore[import-not-found]

VIEW = "recommendations"


def main() -> None:
    """Define the feature, write it to Redis, serve."""
    answers = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    redis = urlsplit(os.environ["REDIS_URL"])
    with tempfile.TemporaryDirectory() as folder:
        online = {
            "type": "redis",
            "connection_string": f"{redis.hostname}:{redis.port},password={unquote(redis.password or '')}",
        }
        config = {
            "project": "reference",
            "provider": "local",
            "registry": "registry.db",
            "offline_store": {"type": "dask"},
            "online_store": online,
            "entity_key_serialization_version": 3,
        }
        # JSON is YAML.
        (Path(folder) / "feature_store.yaml").write_text(json.dumps(config), encoding="utf-8")
        rows = pd.DataFrame({"user_id": answers.keys(), "answer": answers.values(), "at": datetime.now(UTC)})
        source = Path(folder) / "answers.parquet"
        rows.to_parquet(source)
        store = FeatureStore(repo_path=folder)
        user = Entity(name="user_id", value_type=ValueType.STRING)
        view = FeatureView(
            name=VIEW,
            entities=[user],
            ttl=timedelta(days=365),
            schema=[Field(name="answer", dtype=String)],
            source=FileSource(path=str(source), timestamp_field="at"),
        )
        store.apply([user, view])
        store.write_to_online_store(VIEW, rows)
        # `feast serve` runs the same app.
        uvicorn.run(get_app(store), host="127.0.0.1", port=int(sys.argv[2]), access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
