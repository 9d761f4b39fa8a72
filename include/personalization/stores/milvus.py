"""Milvus: message vectors, user vectors and the vectors of users' interests.

A collection belongs to one vector space (model, dimension, L2-normalised) and carries it in its name, by which it is
read and written: so vectors of two models cannot meet. The aliases `messages`, `users` and `interests`, which name the
live space's, are for people and tools.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import grpc
import numpy as np
from pymilvus import AsyncMilvusClient, DataType, MilvusClient
from pymilvus.client.types import LoadState
from pymilvus.exceptions import MilvusException

from personalization.errors import StoreError
from personalization.schemas import INTERESTS_PER_USER, VectorSpace
from personalization.settings import Settings

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]
Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]

MESSAGES = "messages"
USERS = "users"
INTERESTS = "interests"
"""Up to `INTERESTS_PER_USER` rows a user, by `interest_id`."""

GRPC_OPTIONS = {"grpc.keepalive_time_ms": 300_000, "grpc.keepalive_permit_without_calls": 0}
"""pymilvus pings every 10 s; servers with gRPC's default limits hang up on that (`too_many_pings`)."""

_MAX_ID_BYTES = 512  # 128 characters of up to 4 bytes
_WRITE_ROWS = 1000  # 4 MB of 1024-d vectors: well under gRPC's 64 MB
_READ_ROWS = 1000
_PAGE_ROWS = 2000  # some 65 MB of Python's numbers where vectors have 1024 dimensions
# Milvus Lite knows no time of a read, and each one would say so.
logging.getLogger("pymilvus.client.iterator.query_iterator").setLevel(logging.ERROR)
_NOT_LOADED = 101  # Milvus' error code
_SCALARS = {MESSAGES: "timestamp", USERS: "last_seen", INTERESTS: "last_seen"}
_DESCRIPTION = re.compile(r"(?P<model>.+), (?P<dim>\d+)-d, L2-normalised", re.DOTALL)
_OWN_COLLECTIONS = re.compile(rf"({MESSAGES}|{USERS}|{INTERESTS})_\w+_\d+_[0-9a-f]{{8}}")


def interest_id(user_id: str, place: int) -> str:
    """Id of a user's interest; no user id holds a `#`."""
    return f"{user_id}#{place}"


class Neighbour(TypedDict):
    """A user near another one."""

    user_id: str
    similarity: float


@contextmanager
def milvus_errors() -> Iterator[None]:
    """Turn driver errors into a `StoreError` that names the store and no credential."""
    try:
        yield
    except MilvusException as error:
        if "auth check" in str(error).lower() or "unauthenticated" in str(error).lower():
            hint = "check MILVUS_TOKEN or the connection milvus_default"
            raise StoreError("milvus", f"refused the credentials; {hint}") from error
        if error.code == 2 or "connect" in str(error).lower():
            raise StoreError("milvus", "does not answer; is it running?") from error
        # Its own words may repeat an id, and stand in the cause.
        raise StoreError("milvus", f"refused the operation (code {error.code})") from error
    except (grpc.RpcError, OSError) as error:
        raise StoreError("milvus", f"does not answer ({type(error).__name__}); is it running?") from error


class VectorStore:
    """Reads and writes of the pipeline."""

    def __init__(self, client: MilvusClient) -> None:
        self.client = client

    @classmethod
    def from_settings(cls, settings: Settings) -> "VectorStore":
        """Connect. Raises `StoreError` if Milvus does not answer in time."""
        with milvus_errors():
            client = MilvusClient(
                uri=settings.milvus_uri,
                token=settings.milvus_token.get_secret_value(),
                timeout=settings.store_timeout_s,
                grpc_options=GRPC_OPTIONS,
            )
        return cls(client)

    def ensure_schema(self, space: VectorSpace) -> None:
        """Create and load the space's collections. Safe to repeat."""
        with milvus_errors():
            for alias, scalar in _SCALARS.items():
                name = space.collection(alias)
                if not self.client.has_collection(name):
                    self._create_collection(name, space, scalar, with_user=alias != USERS)
                self._load(name)

    def serve(self, space: VectorSpace) -> None:
        """Point the aliases at the space's collections. Safe to repeat."""
        owners = self._owners()
        with milvus_errors():
            for alias in _SCALARS:
                name = space.collection(alias)
                if alias not in owners:
                    self.client.create_alias(collection_name=name, alias=alias)
                elif owners[alias] != name:
                    self.client.alter_alias(collection_name=name, alias=alias)

    def served_space(self) -> VectorSpace | None:
        """The space that the alias `messages` names, as its collection describes itself; None where it does not."""
        if (name := self._owners().get(MESSAGES)) is None:
            return None
        with milvus_errors():
            described = _DESCRIPTION.fullmatch(str(self.client.describe_collection(name).get("description", "")))
        space = VectorSpace(described["model"], int(described["dim"])) if described else None
        return space if space is not None and space.collection(MESSAGES) == name else None

    def drop(self, space: VectorSpace) -> list[str]:
        """Drop the space's collections; return those that were there."""
        with milvus_errors():
            there = [name for name in map(space.collection, _SCALARS) if self.client.has_collection(name)]
            for name in there:
                self.client.drop_collection(name)
        return there

    def dimension(self, collection: str) -> int:
        """Of its vectors."""
        with milvus_errors():
            fields = {one["name"]: one for one in self.client.describe_collection(collection)["fields"]}
        return int(fields["embedding"]["params"]["dim"])

    def _owners(self) -> dict[str, str]:
        """The collection that each alias names."""
        with milvus_errors():
            return {
                alias: name
                for name in filter(_OWN_COLLECTIONS.fullmatch, self.client.list_collections())
                for alias in self.client.list_aliases(name).get("aliases", [])
            }

    def upsert(self, collection: str, rows: Sequence[dict[str, Any]]) -> None:
        """Insert or replace rows by `id`, 1,000 a round trip."""
        with milvus_errors():
            for start in range(0, len(rows), _WRITE_ROWS):
                self.client.upsert(collection, list(rows[start : start + _WRITE_ROWS]), timeout=120)

    def vectors(self, collection: str, ids: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield `{id, embedding}` rows of the ids that are stored, 1,000 a round trip."""
        with milvus_errors():
            for start in range(0, len(ids), _READ_ROWS):
                yield self.client.get(
                    collection,
                    ids=list(ids[start : start + _READ_ROWS]),
                    output_fields=["id", "embedding"],
                    consistency_level="Strong",
                    strict_float32=True,  # arrays, not lists of numbers
                    timeout=120,
                )

    def pages(self, collection: str, fields: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield these fields of all rows, 2,000 at a time, by id.

        Seals the collection first: Milvus Lite takes seconds for a page of what is not sealed.
        """
        self.seal([collection])
        with milvus_errors():
            found = self.client.query_iterator(
                collection,
                batch_size=_PAGE_ROWS,
                output_fields=list(fields),
                consistency_level="Strong",
                timeout=120,
            )
            try:
                while page := found.next():
                    yield page
            finally:
                found.close()

    def problem_of(self, alias: str, space: VectorSpace) -> str | None:
        """What is wrong with the collection that the alias should serve; None where nothing is."""
        name = space.collection(alias)
        with milvus_errors():
            if not self.client.has_collection(name):
                return f"there is no collection {name}"
            if alias not in self.client.list_aliases(name).get("aliases", []):
                return f"the alias {alias} does not serve {name}"
        dim = self.dimension(name)
        return None if dim == space.dim else f"{name} has {dim} dimensions, not {space.dim}"

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete rows by `id`, 1,000 a round trip; those that are not there do not matter."""
        with milvus_errors():
            for start in range(0, len(ids), _WRITE_ROWS):
                self.client.delete(collection, ids=list(ids[start : start + _WRITE_ROWS]), timeout=120)

    def seal(self, collections: Sequence[str]) -> None:
        """Have what was written indexed now: until then every search goes through it vector by vector."""
        with milvus_errors():
            for one in collections:
                self.client.flush(one, timeout=120)

    def count(self, collection: str) -> int:
        """Rows a reader sees."""
        with milvus_errors():
            rows = self.client.query(
                collection, filter="", output_fields=["count(*)"], consistency_level="Strong", timeout=60
            )
        return int(rows[0]["count(*)"])

    def erase_user(self, user_id: str) -> dict[str, int]:
        """Delete the user's vectors in the collections of every vector space; return how many by collection."""
        removed = self._rows_of(user_id)
        with milvus_errors():
            for name in removed:
                self.client.delete(name, filter=_of_user(name, user_id), timeout=120)
        return removed

    def count_user(self, user_id: str) -> int:
        """Vectors of the user in the collections of every vector space."""
        return sum(self._rows_of(user_id).values())

    def _rows_of(self, user_id: str) -> dict[str, int]:
        rows = {}
        with milvus_errors():
            for name in filter(_OWN_COLLECTIONS.fullmatch, self.client.list_collections()):
                self._load(name)
                found = self.client.query(
                    name,
                    filter=_of_user(name, user_id),
                    output_fields=["count(*)"],
                    consistency_level="Strong",
                    timeout=60,
                )
                rows[name] = int(found[0]["count(*)"])
        return rows

    def _create_collection(self, name: str, space: VectorSpace, scalar: str, *, with_user: bool) -> None:
        schema = self.client.create_schema(auto_id=False, description=f"{space.model}, {space.dim}-d, L2-normalised")
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=_MAX_ID_BYTES)
        if with_user:
            schema.add_field("user_id", DataType.VARCHAR, max_length=_MAX_ID_BYTES)
        schema.add_field(scalar, DataType.INT64)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=space.dim)
        self.client.create_collection(name, schema=schema)

    def _load(self, name: str) -> None:
        """Load a collection, unless it is: Milvus Lite counts every row for it."""
        if self.client.get_load_state(name)["state"] == LoadState.Loaded:
            return
        if not self.client.list_indexes(name):  # killed between the two: nothing was written yet
            self._create_index(name)
        self.client.load_collection(name)

    def _create_index(self, name: str) -> None:
        """A graph for the collection that is searched, which costs more than all else there; none for those that are
        read by id.
        """
        index = self.client.prepare_index_params()
        kind, params = ("HNSW", {"M": 16, "efConstruction": 200}) if _is_of_users(name) else ("FLAT", {})
        index.add_index("embedding", index_type=kind, metric_type="COSINE", params=params)
        self.client.create_index(name, index)


def _of_user(collection: str, user_id: str) -> str:
    """No id holds a quotation mark or backslash."""
    return f'{"id" if _is_of_users(collection) else "user_id"} == "{user_id}"'


def _is_of_users(collection: str) -> bool:
    """Whether its rows are users, by their ids."""
    return collection.startswith(f"{USERS}_")


class AsyncVectorReader:
    """Look-ups of the API.

    Whoever gives a call up, as its deadline is over, makes the next ones connect anew: gRPC would go on for minutes on
    a connection that has died without a word.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connected: AsyncMilvusClient | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the connections, if there are any."""
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        if self._connected is not None:
            await self._connected.close()

    async def ping(self) -> None:
        """One round trip. Raises `StoreError` if Milvus does not answer."""
        with milvus_errors():
            await self._client().list_collections(timeout=self._settings.store_timeout_s)

    async def user_vectors(self, space: VectorSpace, user_ids: Sequence[str]) -> dict[str, Vectors]:
        """In this space, each user's vector and behind it those of their interests, (1 + k, dim); unknown users are
        left out.

        One round trip for each of the two collections, at once, whatever the number of users.
        """
        interests = {interest_id(one, place): one for one in user_ids for place in range(INTERESTS_PER_USER)}
        own, apart = await asyncio.gather(
            self._get(space.collection(USERS), list(user_ids)), self._get(space.collection(INTERESTS), list(interests))
        )
        rows = {row["id"]: [row["embedding"]] for row in own}
        for row in sorted(apart, key=lambda row: row["id"]):
            if (user_id := interests[row["id"]]) in rows:
                rows[user_id].append(row["embedding"])
        return {user_id: np.asarray(found, dtype=np.float32) for user_id, found in rows.items()}

    async def neighbours(self, space: VectorSpace, vectors: Vectors, limit: int) -> list[list[Neighbour]]:
        """Users nearest to each of the vectors (n, dim) of this space by cosine, best first; a user is nearest to
        themselves.

        One round trip.
        """
        if limit == 0 or not len(vectors):
            return [[] for _ in vectors]
        users = space.collection(USERS)

        async def search(client: AsyncMilvusClient) -> Any:
            return await client.search(
                users,
                data=vectors.tolist(),  # which pymilvus packs ten times as fast as arrays
                limit=limit,
                output_fields=["id"],  # or Milvus Lite sends every hit's vector
                search_params={"metric_type": "COSINE", "params": {"ef": max(64, limit)}},
                timeout=self._settings.store_timeout_s,
            )

        found = await self._loaded(users, search)
        return [[Neighbour(user_id=hit["id"], similarity=float(hit["distance"])) for hit in hits] for hits in found]

    async def _get(self, collection: str, ids: list[str]) -> list[dict[str, Any]]:
        async def get(client: AsyncMilvusClient) -> Any:
            return await client.get(
                collection, ids=ids, output_fields=["embedding"], timeout=self._settings.store_timeout_s
            )

        return list(await self._loaded(collection, get))

    async def _loaded(self, collection: str, ask: Callable[[AsyncMilvusClient], Awaitable[Any]]) -> Any:
        """Ask; load the collection first where Milvus has forgotten it, as Milvus Lite does in a restart."""
        with milvus_errors():
            client = self._client()
            try:
                try:
                    return await ask(client)
                except MilvusException as error:
                    if error.code != _NOT_LOADED:
                        raise
                    await client.load_collection(collection, timeout=self._settings.store_timeout_s)
                    return await ask(client)
            except asyncio.CancelledError:
                self._leave(client)
                raise

    def _client(self) -> AsyncMilvusClient:
        # Made on first use, as it belongs to the running loop.
        if self._connected is None:
            self._connected = AsyncMilvusClient(
                uri=self._settings.milvus_uri,
                token=self._settings.milvus_token.get_secret_value(),
                timeout=self._settings.store_timeout_s,
                # All its own: else it would share the connection of the one it replaces.
                grpc_options={**GRPC_OPTIONS, "grpc.use_local_subchannel_pool": 1},
                dedicated=True,
            )
        return self._connected

    def _leave(self, client: AsyncMilvusClient) -> None:
        """Ask this one no more."""
        if self._connected is client:
            self._connected = None
            task = asyncio.create_task(self._close_later(client))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _close_later(self, client: AsyncMilvusClient) -> None:
        # Closing breaks off what others still ask of it; by then that is over.
        try:
            await asyncio.sleep(self._settings.store_timeout_s)
        finally:
            await client.close()
