"""The same answer as a first version would make it: drivers without asyncio, one call after another.

The user's vector → similar users in Milvus → their running campaigns in Neo4j → the best of them. It looks up nothing
else and knows no reasons and no rules, so that it does less for an answer than what it is compared with.
"""

import os
import time
from typing import Any

from fastapi import FastAPI
from neo4j import GraphDatabase, RoutingControl
from pymilvus import MilvusClient

_NEIGHBOURS = 21  # as many as the API asks for, and the user
_CAMPAIGNS = """
    UNWIND $neighbours AS neighbour
    MATCH (u:User {user_id: neighbour.id})-[g:ENGAGED_WITH]->(c:Campaign)
    WHERE c.active_from <= $now AND $now < c.active_until
    RETURN c.campaign_id AS campaign_id, c.name AS name, c.description AS description, c.category AS category,
           sum(neighbour.similarity * g.count) AS score
    ORDER BY score DESC, campaign_id LIMIT $top
"""

milvus = MilvusClient(uri=f"http://{os.environ['MILVUS_HOST']}:{os.environ['MILVUS_PORT']}")
neo4j = GraphDatabase.driver(os.environ["NEO4J_URI"], auth=(os.environ["NEO4J_USER"], os.environ["NEO4J_PASSWORD"]))
app = FastAPI()


@app.get("/recommendations/{user_id}")
def recommendations(user_id: str, top: int = 5) -> dict[str, Any]:
    """The campaigns that similar users engaged with most."""
    own = milvus.get("users", ids=[user_id], output_fields=["embedding"])
    if not own:
        return {"user_id": user_id, "recommendations": []}
    hits = milvus.search(
        "users",
        data=[own[0]["embedding"]],
        limit=_NEIGHBOURS,
        output_fields=["id"],
        search_params={"metric_type": "COSINE", "params": {"ef": 64}},
    )[0]
    neighbours = [{"id": hit["id"], "similarity": float(hit["distance"])} for hit in hits if hit["id"] != user_id]
    found = neo4j.execute_query(
        _CAMPAIGNS, neighbours=neighbours, now=time.time_ns() // 1_000_000, top=top, routing_=RoutingControl.READ
    )
    return {"user_id": user_id, "recommendations": [record.data() for record in found.records]}
