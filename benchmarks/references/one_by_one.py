"""The plain way into five stores: a message at a time, each written to all of them.

`python -m benchmarks.references.one_by_one FILE`, with the stores' addresses in the environment; prints the seconds.
"""

import json
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from neo4j import GraphDatabase
from personalization.encoder import model_location
from personalization.settings import get_settings
from pymilvus import DataType, MilvusClient
from pymongo import MongoClient
from redis import Redis
from sentence_transformers import SentenceTransformer

_EDGE = (
    "MERGE (u:Reader {id: $user}) MERGE (i:Topic {id: $topic}) MERGE (u)-[e:SAID]->(i) "
    "SET e.count = coalesce(e.count, 0) + 1"
)


def main() -> None:
    """Write the file and say how long that took."""
    settings = get_settings()
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    model = SentenceTransformer(model_location(settings.embedding_model), device="cpu")
    milvus = MilvusClient(uri=settings.milvus_uri)
    schema = milvus.create_schema(auto_id=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=512)
    schema.add_field("user_id", DataType.VARCHAR, max_length=512)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=model.get_embedding_dimension())
    milvus.create_collection("one_by_one", schema=schema)
    mongo: MongoClient[dict[str, Any]] = MongoClient(settings.mongodb_uri.get_secret_value())
    messages = mongo["one_by_one"]["messages"]
    redis = Redis.from_url(settings.redis_url.get_secret_value())
    auth = (settings.neo4j_user, settings.neo4j_password.get_secret_value())
    with (
        tempfile.TemporaryDirectory() as folder,
        sqlite3.connect(Path(folder) / "lineage.db") as lineage,
        GraphDatabase.driver(settings.neo4j_uri, auth=auth) as graph,
        graph.session(database=settings.neo4j_database) as session,
    ):
        lineage.execute("CREATE TABLE messages (id TEXT PRIMARY KEY, user_id TEXT, at TEXT)")
        started = time.perf_counter()
        for row in rows:
            messages.replace_one({"_id": row["message_id"]}, row, upsert=True)
            vector = model.encode(row["message"], show_progress_bar=False)
            milvus.upsert("one_by_one", [{"id": row["message_id"], "user_id": row["user_id"], "embedding": vector}])
            session.run(_EDGE, user=row["user_id"], topic=row["message"].split()[0]).consume()
            lineage.execute(
                "INSERT OR REPLACE INTO messages VALUES (?, ?, ?)",
                (row["message_id"], row["user_id"], row["timestamp"]),
            )
            lineage.commit()
            redis.delete(f"answer:{row['user_id']}")
        print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
