"""Which of the stores' datasets each stage reads and writes, for OpenLineage.

Where Airflow's OpenLineage provider is switched on, it collects what is told here and sends it with the task's
events; otherwise telling costs nothing.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from airflow.sdk import BaseHook
from airflow.sdk.lineage import NoOpCollector, get_hook_lineage_collector
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.stores.milvus import MESSAGES, USERS

if TYPE_CHECKING:
    from airflow.sdk import Asset
    from openlineage.client.event_v2 import Dataset

_PORTS = {"mongo_default": 27017, "milvus_default": 19530, "neo4j_default": 7687, "redis_default": 6379}

# By stage what is read, and what is written. Files of a run are no datasets: their rows are in MongoDB.
_CONVERSATIONS, _EVENTS, _QUARANTINE = "mongo:conversations", "mongo:events", "mongo:quarantine"
_MESSAGES, _USERS = f"milvus:{MESSAGES}", f"milvus:{USERS}"
_INTENTS, _SQL_EVENTS, _ENGAGEMENT = "sql:message_intents", "sql:events", "sql:user_engagement"
_FLOW: dict[str, tuple[list[str], list[str]]] = {
    "prepare": ([], ["neo4j:graph", "sql:campaigns"]),
    "ingest": ([], [_CONVERSATIONS, _QUARANTINE]),
    "ingest_events": ([_EVENTS], [_EVENTS, _QUARANTINE, _SQL_EVENTS]),
    "embed": ([_CONVERSATIONS], []),
    "upsert_vectors": ([_CONVERSATIONS], [_MESSAGES]),
    "mirror_vectors": ([_CONVERSATIONS], []),
    "detect_intents": ([_CONVERSATIONS], [_INTENTS]),
    "build_graph": ([_INTENTS, _SQL_EVENTS], ["neo4j:graph"]),
    "roll_up_engagement": ([_INTENTS, _SQL_EVENTS], [_ENGAGEMENT, "sql:campaigns"]),
    "refresh_profiles": ([_MESSAGES, _INTENTS], [_USERS]),
    "learn": ([_MESSAGES, _INTENTS, _SQL_EVENTS], []),
    "publish": ([_ENGAGEMENT, _INTENTS, _SQL_EVENTS], ["sql:served", "redis:generation"]),
    "evaluate": ([_MESSAGES, _INTENTS, _SQL_EVENTS], ["sql:evaluations"]),
}


def tell_datasets(stage: str, space: VectorSpace, settings: Settings) -> None:
    """Tell the collector what the stage reads and writes; nothing where nobody collects."""
    collector = get_hook_lineage_collector()
    if isinstance(collector, NoOpCollector):
        return
    read, written = _FLOW.get(stage, ([], []))
    for name in read:
        collector.add_input_asset(_CONTEXT, uri=_uri(name, space, settings))
    for name in written:
        collector.add_output_asset(_CONTEXT, uri=_uri(name, space, settings))


_CONTEXT = BaseHook()
"""The collector asks whose the assets are."""


def to_openlineage(asset: "Asset", context: object) -> "Dataset":  # noqa: ARG001
    """A dataset by OpenLineage's names: the server, and what it holds of that name."""
    from openlineage.client.event_v2 import Dataset

    parsed = urlsplit(asset.uri)
    namespace = f"{parsed.scheme}://{parsed.netloc}{parsed.path}".rstrip("/")
    return Dataset(namespace=namespace, name=parse_qs(parsed.query)["name"][0])


def _uri(name: str, space: VectorSpace, settings: Settings) -> str:
    store, _, what = name.partition(":")
    if store == "sql":
        url = settings.analytics_database
        is_file = url.get_backend_name() == "sqlite"
        place = Path(url.database or "").absolute() if is_file else f"{url.host}:{url.port or 5432}/{url.database}"
        return f"{url.get_backend_name()}://{place}?name={what}"
    address = partial(_address, f"{store}_default")
    if store == "mongo":
        return f"mongodb://{address(settings.mongodb_database)}/{what}"
    if store == "milvus":
        what = space.collection(what)
        return f"milvus://{address('')}?name={what}"
    return f"{store}://{address('')}?name={what}"


def _address(conn_id: str, database: str) -> str:
    connection = BaseHook.get_connection(conn_id)
    port = connection.port or _PORTS[conn_id]
    return f"{connection.host}:{port}/{connection.schema or database}".rstrip("/")
