"""Neo4j: the User–Intent–Campaign graph.

    (:User {user_id})-[:EXPRESSED {count, last_seen, confidence, weight}]->(:Intent {intent_id})
    (:Campaign {campaign_id})-[:TARGETS]->(:Intent)
    (:User)-[:ENGAGED_WITH {count, last_at, weight}]->(:Campaign)

Times are epoch milliseconds. All writes are managed transactions, which retry deadlocks.
"""

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, LiteralString, TypedDict, TypeVar, cast

from neo4j import (
    READ_ACCESS,
    AsyncDriver,
    AsyncGraphDatabase,
    Driver,
    GraphDatabase,
    ManagedTransaction,
    RoutingControl,
)
from neo4j.exceptions import AuthError, ConfigurationError, DriverError, Neo4jError

from personalization.errors import StoreError
from personalization.schemas import DAY_MS, Campaign, Catalog, Engagement, ExpressedIntent
from personalization.settings import Settings
from personalization.stores.milvus import Neighbour

_PAGE_ROWS = 1000

_CONSTRAINTS: tuple[LiteralString, ...] = (
    "CREATE CONSTRAINT user_id_unique IF NOT EXISTS FOR (u:User) REQUIRE u.user_id IS UNIQUE",
    "CREATE CONSTRAINT intent_id_unique IF NOT EXISTS FOR (i:Intent) REQUIRE i.intent_id IS UNIQUE",
    "CREATE CONSTRAINT campaign_id_unique IF NOT EXISTS FOR (c:Campaign) REQUIRE c.campaign_id IS UNIQUE",
)

# In order, in one transaction: nodes, then edges.
_SYNC_CATALOG: tuple[LiteralString, ...] = (
    """UNWIND $intents AS row
       MERGE (i:Intent {intent_id: row.intent_id})
       SET i.name = row.name""",
    """UNWIND $campaigns AS row
       MERGE (c:Campaign {campaign_id: row.campaign_id})
       SET c.name = row.name, c.description = row.description, c.category = row.category,
           c.active_from = row.active_from, c.active_until = row.active_until""",
    """UNWIND $campaigns AS row
       MATCH (c:Campaign {campaign_id: row.campaign_id})-[t:TARGETS]->(i:Intent)
       WHERE NOT i.intent_id IN row.intents
       DELETE t""",
    """UNWIND $targets AS row
       MATCH (c:Campaign {campaign_id: row.campaign_id})
       MATCH (i:Intent {intent_id: row.intent_id})
       MERGE (c)-[:TARGETS]->(i)""",
)

_DROP_WHAT_LEFT: tuple[LiteralString, ...] = (
    "MATCH (c:Campaign) WHERE NOT c.campaign_id IN $campaign_ids DETACH DELETE c",
    "MATCH (i:Intent) WHERE NOT i.intent_id IN $intent_ids DETACH DELETE i",
)

_WRITE_USERS: tuple[LiteralString, ...] = (
    "UNWIND $user_ids AS user_id MERGE (:User {user_id: user_id})",
    """UNWIND $expressed AS row
       MATCH (u:User {user_id: row.user_id})
       MATCH (i:Intent {intent_id: row.intent_id})
       MERGE (u)-[e:EXPRESSED]->(i)
       SET e.count = row.count, e.last_seen = row.last_seen, e.confidence = row.confidence,
           e.weight = row.weight""",
    """UNWIND $kept AS row
       MATCH (u:User {user_id: row.user_id})-[e:EXPRESSED]->(i:Intent)
       WHERE NOT i.intent_id IN row.intents
       DELETE e""",
    """UNWIND $engaged AS row
       MATCH (u:User {user_id: row.user_id})
       MATCH (c:Campaign {campaign_id: row.campaign_id})
       MERGE (u)-[g:ENGAGED_WITH]->(c)
       SET g.count = row.count, g.last_at = row.last_at, g.weight = row.weight""",
    """UNWIND $kept AS row
       MATCH (u:User {user_id: row.user_id})-[g:ENGAGED_WITH]->(c:Campaign)
       WHERE NOT c.campaign_id IN row.campaigns
       DELETE g""",
)

# What the API reads comes as one record of many rows: the driver spends more on a record than on what is in it.
_LINKS: LiteralString = """
    UNWIND $user_ids AS user_id
    MATCH (u:User {user_id: user_id})-[e:EXPRESSED]->(i:Intent)
    RETURN collect([user_id, 'intent', i.intent_id, i.name, e.count, e.weight, e.last_seen]) AS rows
    UNION ALL
    UNWIND $user_ids AS user_id
    MATCH (u:User {user_id: user_id})-[g:ENGAGED_WITH]->(c:Campaign)
    RETURN collect([user_id, 'campaign', c.campaign_id, c.name, g.count, g.weight, g.last_at]) AS rows
"""

# exp and log are known to Neo4j and to ArcadeDB, powers are not written alike.
_ENGAGED_BY: LiteralString = """
    UNWIND $neighbours AS neighbour
    MATCH (u:User {user_id: neighbour.user_id})-[g:ENGAGED_WITH]->(c:Campaign)
    WHERE c.active_from <= $now AND $now < c.active_until
    WITH neighbour.at AS at, c.campaign_id AS campaign_id, neighbour.similarity AS similarity,
         g.weight * exp((g.last_at - $now) * $fading) AS weight
    WITH at, campaign_id, sum(similarity * log(1.0 + weight)) AS score, count(*) AS users
    RETURN collect([at, campaign_id, score, users]) AS rows
"""


class LinkRow(TypedDict):
    """An intent a user expressed, or a campaign they engaged with."""

    user_id: str
    kind: str
    id: str
    name: str
    count: int
    weight: float
    """As it was at `last_at`."""
    last_at: int


class EngagedRow(TypedDict):
    """A campaign that the users near to one of those asked for engaged with."""

    at: int
    """Place of the one asked for."""
    campaign_id: str
    score: float
    """Sum of similarity times log(1 + weight)."""
    users: int


R = TypeVar("R", LinkRow, EngagedRow)


@contextmanager
def neo4j_errors() -> Iterator[None]:
    """Turn driver errors into a `StoreError` that names the store and no credential."""
    try:
        yield
    except AuthError as error:
        hint = "check NEO4J_USER and NEO4J_PASSWORD or the connection neo4j_default"
        raise StoreError("neo4j", f"refused the user name or password; {hint}") from error
    except Neo4jError as error:
        raise StoreError("neo4j", f"refused the query ({error.code})") from error
    except (ConfigurationError, ValueError) as error:
        raise StoreError("neo4j", "NEO4J_URI is not a valid address") from error
    except (DriverError, OSError) as error:
        raise StoreError("neo4j", f"does not answer ({type(error).__name__}); is it running?") from error


def _driver_options(settings: Settings) -> dict[str, Any]:
    return {
        "auth": (settings.neo4j_user, settings.neo4j_password.get_secret_value()),
        "connection_timeout": settings.store_timeout_s,
        "connection_acquisition_timeout": settings.store_timeout_s * 2,
        "max_transaction_retry_time": settings.store_timeout_s * 2,
        "notifications_min_severity": "OFF",
    }


class GraphStore:
    """Writes of the pipeline."""

    def __init__(self, driver: Driver, database: str) -> None:
        self.driver = driver
        self._database = database

    @classmethod
    def from_settings(cls, settings: Settings) -> "GraphStore":
        """Connect lazily."""
        with neo4j_errors():
            driver = GraphDatabase.driver(settings.neo4j_uri, **_driver_options(settings))
        return cls(driver, settings.neo4j_database)

    def ensure_schema(self) -> None:
        """Create the uniqueness constraints that every MERGE relies on. Safe to repeat."""
        with neo4j_errors(), self.driver.session(database=self._database) as session:
            for constraint in _CONSTRAINTS:
                session.run(constraint).consume()

    def sync_catalog(self, catalog: Catalog) -> None:
        """Bring the catalog's intents, campaigns and TARGETS edges into the graph, in one transaction."""
        parameters = {
            "intents": [{"intent_id": one.id, "name": one.name} for one in catalog.intents],
            "campaigns": [_campaign_row(one) for one in catalog.campaigns],
            "targets": [
                {"campaign_id": campaign.id, "intent_id": intent_id}
                for campaign in catalog.campaigns
                for intent_id in campaign.intents
            ],
        }
        self._write(_SYNC_CATALOG, parameters)

    def drop_what_left_the_catalog(self, catalog: Catalog) -> None:
        """Delete the intents and campaigns that the catalog holds no more, with their edges."""
        parameters = {
            "intent_ids": [one.id for one in catalog.intents],
            "campaign_ids": [one.id for one in catalog.campaigns],
        }
        self._write(_DROP_WHAT_LEFT, parameters)

    def write_users(
        self, user_ids: Sequence[str], expressed: Sequence[ExpressedIntent], engaged: Sequence[Engagement]
    ) -> None:
        """Make the users' edges equal to the rows given: set, never incremented, stale ones deleted.

        Engagement with a campaign that left the catalog gets no edge.
        One transaction of five statements whatever the number of users.
        """
        kept = {user_id: {"user_id": user_id, "intents": [], "campaigns": []} for user_id in user_ids}
        for row in expressed:
            kept[row.user_id]["intents"].append(row.intent_id)  # type: ignore[attr-defined]
        for one in engaged:
            kept[one.user_id]["campaigns"].append(one.campaign_id)  # type: ignore[attr-defined]
        parameters = {
            "user_ids": list(user_ids),
            "expressed": [row.model_dump() for row in expressed],
            "engaged": [_engaged_row(one) for one in engaged],
            "kept": list(kept.values()),
        }
        self._write(_WRITE_USERS, parameters)

    def erase_user(self, user_id: str) -> dict[str, int]:
        """Delete the user's node and edges, in one transaction; return how many."""
        found = self._of_user(user_id)
        self._write(["MATCH (u:User {user_id: $user_id}) DETACH DELETE u"], {"user_id": user_id})
        return found

    def count_user(self, user_id: str) -> int:
        """Nodes and edges of the user."""
        return sum(self._of_user(user_id).values())

    def _of_user(self, user_id: str) -> dict[str, int]:
        query: LiteralString = """
            MATCH (u:User {user_id: $user_id}) OPTIONAL MATCH (u)-[r]-()
            RETURN count(DISTINCT u) AS nodes, count(r) AS edges"""
        with neo4j_errors():
            found = self.driver.execute_query(query, user_id=user_id, database_=self._database)
        return {"nodes": found.records[0]["nodes"], "edges": found.records[0]["edges"]}

    def pages(self, query: LiteralString) -> Iterator[list[list[Any]]]:
        """Yield the rows of a read, 1,000 at a time, as the server finds them."""
        with (
            neo4j_errors(),
            self.driver.session(
                database=self._database, default_access_mode=READ_ACCESS, fetch_size=_PAGE_ROWS
            ) as session,
        ):
            found = iter(session.run(query))
            while page := [one.values() for one in islice(found, _PAGE_ROWS)]:
                yield page

    def delete_users(self, user_ids: Sequence[str]) -> None:
        """Delete the users' nodes and edges, in one transaction."""
        query: LiteralString = "UNWIND $user_ids AS user_id MATCH (u:User {user_id: user_id}) DETACH DELETE u"
        self._write([query], {"user_ids": list(user_ids)})

    def totals(self) -> dict[str, int]:
        """Users in the graph and the sum of all EXPRESSED counts."""
        with neo4j_errors():
            users = self.driver.execute_query(
                "MATCH (u:User) RETURN count(u) AS users",
                database_=self._database,
                routing_=RoutingControl.READ,
            )
            expressed = self.driver.execute_query(
                "MATCH (:User)-[e:EXPRESSED]->(:Intent) RETURN sum(e.count) AS expressed",
                database_=self._database,
                routing_=RoutingControl.READ,
            )
        return {"users": users.records[0]["users"], "expressed": expressed.records[0]["expressed"] or 0}

    def _write(self, statements: Sequence[LiteralString], parameters: dict[str, Any]) -> None:
        def work(transaction: ManagedTransaction) -> None:
            for statement in statements:
                transaction.run(statement, parameters).consume()

        with neo4j_errors(), self.driver.session(database=self._database) as session:
            session.execute_write(work)


class AsyncGraphReader:
    """Look-ups of the API: one round trip each, parameterised."""

    def __init__(self, driver: AsyncDriver, database: str, timeout_s: float) -> None:
        self.driver = driver
        self._database = database
        self._timeout_s = timeout_s

    @classmethod
    def from_settings(cls, settings: Settings) -> "AsyncGraphReader":
        """Connect lazily."""
        with neo4j_errors():
            # Answers do not wait as long as the driver does before it tries again.
            options = {**_driver_options(settings), "max_transaction_retry_time": 0}
            driver = AsyncGraphDatabase.driver(settings.neo4j_uri, **options)
        return cls(driver, settings.neo4j_database, settings.store_timeout_s)

    async def links(self, user_ids: Sequence[str]) -> list[LinkRow]:
        """What the users expressed and engaged with: a row for each edge."""
        return await self._read(LinkRow, _LINKS, user_ids=list(user_ids))

    async def engaged_by(
        self, neighbours: Sequence[Sequence[Neighbour]], now_ms: int, half_life_days: float
    ) -> list[EngagedRow]:
        """What the users near to each one asked for engaged with, summed in the store: a row for each of their
        running campaigns.
        """
        flat = [{**one, "at": at} for at, near in enumerate(neighbours) for one in near]
        return await self._read(
            EngagedRow, _ENGAGED_BY, neighbours=flat, now=now_ms, fading=math.log(2) / (half_life_days * DAY_MS)
        )

    async def _read(self, row: type[R], query: LiteralString, **parameters: Any) -> list[R]:
        """All rows, as one exchange: a managed transaction would take two."""
        names = tuple(row.__annotations__)
        with neo4j_errors():
            async with (
                asyncio.timeout(self._timeout_s),
                self.driver.session(database=self._database, default_access_mode=READ_ACCESS) as session,
            ):
                parts = await (await session.run(query, parameters)).values()
        return [cast("R", dict(zip(names, one, strict=True))) for [rows] in parts for one in rows]


def _engaged_row(engagement: Engagement) -> dict[str, Any]:
    return {
        "user_id": engagement.user_id,
        "campaign_id": engagement.campaign_id,
        "count": engagement.signals,
        "last_at": engagement.weight_at,
        "weight": engagement.weight,
    }


def _campaign_row(campaign: Campaign) -> dict[str, Any]:
    return {
        "campaign_id": campaign.id,
        "name": campaign.name,
        "description": campaign.description,
        "category": campaign.category,
        "intents": campaign.intents,
        "active_from": campaign.active_from_ms,
        "active_until": campaign.active_until_ms,
    }
