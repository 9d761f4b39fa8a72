"""Filling: the shards of a migration, staged under the name of its space, so that any later run goes on with them."""

import json

import pyarrow as pa
from upath import UPath

from personalization.schemas import Ref, VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging, write_atomically
from personalization.stores.mongo import MongoStore

_PLAN = "plan.json"
_SCHEMA = pa.schema([("id", pa.string()), ("user_id", pa.string())])


class Filling:
    """Which messages are to be embedded, and which shards of them are done.

    A shard is done when all its vectors are in Milvus and MongoDB was asked again behind that. Users are staged with
    their messages, so that an erasure takes them out.
    """

    def __init__(self, staging: Staging) -> None:
        self._staging = staging

    @classmethod
    def of(cls, settings: Settings, space: VectorSpace) -> "Filling":
        """That of a space."""
        return cls(Staging(settings.staging_uri, f"reembed-{space.name}"))

    def plan(self, mongo: MongoStore, shard_rows: int) -> list[Ref]:
        """The shards, each with the ids of up to `shard_rows` messages; staged once, then read again."""
        plan = self._staging.root / _PLAN
        if plan.exists():
            known: list[Ref] = json.loads(plan.read_bytes())
            return known
        refs: list[Ref] = []
        waiting: list[tuple[str, str]] = []
        for page in mongo.pages("message", ("user_id",)):
            waiting += [(one["_id"], one["user_id"]) for one in page]
            while len(waiting) >= shard_rows:
                refs.append(self._stage(len(refs), waiting[:shard_rows]))
                waiting = waiting[shard_rows:]
        if waiting:
            refs.append(self._stage(len(refs), waiting))
        write_atomically(plan, json.dumps(refs).encode())
        return refs

    def is_filled(self, shard: Ref) -> bool:
        """Whether it is done."""
        return self._marker(shard).exists()

    def mark_filled(self, shard: Ref) -> None:
        """Say that it is done."""
        write_atomically(self._marker(shard), b"")

    def forget(self) -> None:
        """Drop all of it."""
        if self._staging.root.exists():
            self._staging.root.fs.rm(self._staging.root.path, recursive=True)

    def _stage(self, number: int, rows: list[tuple[str, str]]) -> Ref:
        columns = {"id": [one for one, _ in rows], "user_id": [user for _, user in rows]}
        return self._staging.write(f"shards/{number:06d}.parquet", pa.table(columns, schema=_SCHEMA))

    @staticmethod
    def _marker(shard: Ref) -> UPath:
        path = UPath(shard["uri"])
        return path.with_name(f"{path.stem}.filled")
