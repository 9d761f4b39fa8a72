"""A migration that is killed at random points, between two real models, with a reader in a loop on the API.

`kill -9` while MiniLM's vectors are replaced by mpnet's, and those by MiniLM's again, until so many kills are made,
each at a random moment of a stage that is drawn, be it long or short. Every migration is taken up again until it is
done; then both collections are compared with a clean encoding.
"""

import gzip
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import structlog
from personalization.encoder import get_encoder
from personalization.errors import MigrationError
from personalization.local.config import PACKAGED_MODEL, StackConfig
from personalization.local.stack import Stack
from personalization.pipeline.lineage import MIGRATION_STAGES
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.stores.milvus import MESSAGES as ALIAS
from personalization.stores.together import Stores

from benchmarks.audit import DATA
from benchmarks.mpnet import mpnet

MESSAGES, KILLS, SHARD_ROWS = 500, 20, 100
DIM = 1024
_PROCESSES = multiprocessing.get_context("forkserver")
"""Each attempt is a process of its own; what they import is imported once."""
_PROCESSES.set_forkserver_preload(["sentence_transformers", "personalization.migration.run"])
_API_PORT = 38_100
_STAGE_S = 5.0
"""How long a stage may last, where none was seen yet."""
_MINUTES = 60.0
"""After so many, what is under way is ended without another kill."""
_ASKED = 12
"""Users that the reader asks about in turn."""
_ROUNDING = 0.01
"""Between similarities of vectors that bfloat16 made in other batches."""
_SAME = 0.995
"""Least cosine of a stored vector to a clean one."""


@dataclass
class Tally:
    """What became of it."""

    kills: list[str] = field(default_factory=list)
    """What was at work when it was killed."""
    migrations: list[dict[str, Any]] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def main(results: Path, messages: int = MESSAGES, kills: int = KILLS, seed: int = 0, minutes: float = _MINUTES) -> None:
    """Measure, and write the results."""
    spaces = [VectorSpace(PACKAGED_MODEL, DIM), VectorSpace(str(mpnet()), DIM)]
    tally = Tally()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, _stores(Path(name), messages) as settings:
        clean = _clean(spaces, settings)
        with _api(settings, Path(name)) as url, Reader(url, sorted(_users(settings))[:_ASKED], tally) as reader:
            reader.learn()
            aim = _Aim(random.Random(seed))  # noqa: S311
            until = started + minutes * 60
            at = 0
            while len(tally.kills) < kills and time.monotonic() < until:
                target = spaces[1 - at % 2]
                _migrate(target, settings, tally, lambda: len(tally.kills) < kills and time.monotonic() < until, aim)
                reader.learn()
                tally.migrations.append({"to": target.name, **_compared(spaces, clean, settings)})
                print(tally.migrations[-1], dict(tally.answers))
                _drop_former(settings)
                at += 1
    results.mkdir(exist_ok=True)
    (results / "migration.md").write_text(table(tally, messages, kills, time.monotonic() - started))
    print((results / "migration.md").read_text())


@dataclass
class _Aim:
    """Draws when to kill: in the stages that were aimed at least often, of those that a migration has ahead of it."""

    rng: random.Random
    aimed: Counter[str] = field(default_factory=Counter)
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage that was seen."""

    def wait(self, process: BaseProcess, log: Path, passed: int) -> None:
        """Wait for a random moment of a stage behind as many that are `passed`, or for the end of the process."""
        ahead = MIGRATION_STAGES[passed:] or MIGRATION_STAGES[-1:]
        stage = min(ahead, key=lambda one: (self.aimed[one], self.rng.random()))
        self.aimed[stage] += 1
        while process.is_alive() and (not log.stat().st_size or _passed(log) < MIGRATION_STAGES.index(stage)):
            time.sleep(0.02)
        process.join(self.rng.uniform(0, self.longest.get(stage, _STAGE_S)))
        for name, seconds in _stages_done(log).items():
            self.longest[name] = max(seconds, self.longest.get(name, 0.0))


def _passed(log: Path) -> int:
    """How many stages came to their end, or at least a shard of them."""
    return max((MIGRATION_STAGES.index(one) + 1 for one in _stages_done(log)), default=0)


def _stages_done(log: Path) -> dict[str, float]:
    """Seconds of each stage that came to its end, all its shards together; in their order."""
    found: defaultdict[str, float] = defaultdict(float)
    for name, seconds in re.findall(r"(\w+) success: .* ([\d.]+) s$", log.read_text(), re.MULTILINE):
        if name in MIGRATION_STAGES:
            found[name] += float(seconds)
    return dict(found)


def _migrate(target: VectorSpace, settings: Settings, tally: Tally, kills_left: Callable[[], bool], aim: _Aim) -> None:
    """Until it is done, killed again and again."""
    log = Path(settings.staging_uri).parent / "said.log"
    passed = 0
    while True:
        log.write_text("")
        started = time.monotonic()
        process = _PROCESSES.Process(target=_attempt, args=(target, settings, log))
        process.start()
        if kills_left():
            aim.wait(process, log, passed)
        else:
            process.join()
        if process.is_alive():
            process.kill()
            process.join()
            passed = max(passed, _passed(log))
            tally.kills.append(f"behind {['its start', *_stages_done(log)][-1]}")
            print(f"kill {len(tally.kills)} after {time.monotonic() - started:.0f} s, {tally.kills[-1]}", flush=True)
        elif process.exitcode == 0:
            return
        else:
            raise RuntimeError(log.read_text())


def _attempt(target: VectorSpace, settings: Settings, said: Path) -> None:
    """What `personalization reembed` does. One that was killed behind its very last write has nothing left to do."""
    from personalization.migration.run import migrate

    with said.open("a", buffering=1) as log:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(log))
        try:
            migrate(*target, settings)
        except MigrationError as error:
            log.write(f"{error}\n")
            if "nothing to do" not in str(error):
                raise


def _drop_former(settings: Settings) -> None:
    from personalization.migration.run import drop_former

    drop_former(settings)


class Reader:
    """Asks the API in a loop, and knows what the answers of each space are."""

    def __init__(self, url: str, users: Sequence[str], tally: Tally) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)
        self._users = users
        self._tally = tally
        self._known: list[dict[str, dict[str, float]]] = []
        self._waiting: list[tuple[str, Any]] = []
        self._lists: list[dict[str, list[str]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._judge()
        self._client.close()

    def learn(self) -> None:
        """Take the answers of now, while nothing changes, for those of the space that is served; then judge those since
        the last time, and go on reading.
        """
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
        self._known.append({one: self._similar(one) for one in self._users})
        self._lists.append({one: self._recommended(one) for one in self._users})
        self._judge()
        self._stop.clear()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stop.is_set():
            for user in self._users:
                for kind, ask in (("similar", self._similar), ("list", self._recommended)):
                    try:
                        self._waiting.append((f"{kind} {user}", ask(user)))
                    except (httpx.HTTPError, ValueError) as error:
                        self._tally.wrong.append(f"{kind} {user}: {error}")
                    if self._stop.is_set():
                        return

    def _judge(self) -> None:
        for name, found in self._waiting:
            kind, user = name.split(" ", 1)
            if kind == "similar":
                places = [at for at, known in enumerate(self._known) if _alike(found, known[user])]
                if places:
                    self._tally.answers[f"similar users by {('MiniLM', 'mpnet')[places[0] % 2]}"] += 1
                else:
                    self._tally.wrong.append(f"{name}: {found}")
            elif any(found == known[user] for known in self._lists):
                self._tally.answers["lists as before or behind"] += 1
            else:
                self._tally.answers["lists while intents are read anew"] += 1
        self._waiting.clear()

    def _similar(self, user: str) -> dict[str, float]:
        answer = self._client.get(f"/v1/users/{user}/similar", params={"top": 10}).raise_for_status().json()
        return {one["user_id"]: one["similarity"] for one in answer["similar"]}

    def _recommended(self, user: str) -> list[str]:
        answer = self._client.get(f"/v1/recommendations/{user}", params={"top": 5}).raise_for_status().json()
        if "degraded" in answer:
            raise ValueError(f"degraded: {answer['degraded']}")
        return [one["campaign_id"] for one in answer["recommendations"]]


def _alike(found: dict[str, float], known: dict[str, float]) -> bool:
    """The same users at the same similarity, but for those at the end that rounding lets change places."""
    pairs = zip(sorted(found.values()), sorted(known.values()), strict=False)
    alike = all(abs(one - other) <= _ROUNDING for one, other in pairs) and len(found) == len(known)
    return alike and all(abs(found[one] - known[one]) <= _ROUNDING for one in found.keys() & known.keys())


def _compared(spaces: Sequence[VectorSpace], clean: dict[VectorSpace, dict[str, Any]], settings: Settings) -> Any:
    """Both collections beside MongoDB and a clean encoding."""
    found: dict[str, Any] = {}
    with Stores.of(settings) as stores:
        for space in spaces:
            pages = stores.vectors.pages(space.collection(ALIAS), ("id", "embedding"))
            there = {row["id"]: np.asarray(row["embedding"], dtype=np.float32) for page in pages for row in page}
            right = clean[space]
            shared = [float(there[one] @ right[one]) for one in there.keys() & right.keys()]
            found[space.name] = {
                "missing": len(right.keys() - there.keys()),
                "too much": len(there.keys() - right.keys()),
                "other vectors": sum(one < _SAME for one in shared),
                "least cosine": round(min(shared), 4),
            }
    return found


def _clean(spaces: Sequence[VectorSpace], settings: Settings) -> dict[VectorSpace, dict[str, Any]]:
    with Stores.of(settings) as stores:
        texts = {one["_id"]: one["message"] for page in stores.mongo.pages("message", ("message",)) for one in page}
    found = {}
    for space in spaces:
        encoder = get_encoder(space.model, space.dim)
        found[space] = dict(zip(texts, encoder.encode(list(texts.values())), strict=True))
    return found


def _users(settings: Settings) -> set[str]:
    """Who said more than once."""
    with Stores.of(settings) as stores:
        said = Counter(one["user_id"] for page in stores.mongo.pages("message", ("user_id",)) for one in page)
    return {user for user, count in said.items() if count > 1}


@contextmanager
def _stores(folder: Path, messages: int) -> Iterator[Settings]:
    """The embedded stores with ReDial messages in them."""
    from personalization.pipeline.run import run_pipeline

    with gzip.open(DATA, "rt") as file:
        lines = [line for line in file if json.loads(line)["message"].strip()][:messages]
    path = folder / "messages.ndjson"
    path.write_text("".join(lines))
    config = StackConfig(
        local_stack_dir=folder / "stack",
        mongodb_port=38_117,
        milvus_port=38_130,
        neo4j_port=38_187,
        redis_port=38_179,
    )
    stack = Stack(config, only_stores=True)
    stack.start(print)
    try:
        settings = stack.config.settings(
            sqlite_path=folder / "a.db",
            staging_uri=str(folder / "staging"),
            embedding_model=PACKAGED_MODEL,
            embedding_dim=DIM,
            shard_rows=SHARD_ROWS,
            store_timeout_s=30,
            answer_timeout_s=30,
            answer_store_timeout_s=20,
            cache_ttl_s=1,
        )
        summary = run_pipeline(path, settings)
        if summary["status"] != "success":
            raise RuntimeError(summary["error"])
        yield settings
    finally:
        stack.stop()


@contextmanager
def _api(settings: Settings, folder: Path) -> Iterator[str]:
    """The API as a process of its own."""
    url = f"http://127.0.0.1:{_API_PORT}"
    command = [sys.executable, "-m", "uvicorn", "services.api.main:app", "--port", str(_API_PORT), "--no-access-log"]
    env = _environment(settings) | {"API_AUTH": "off"}
    with (folder / "api.log").open("w") as log, subprocess.Popen(command, env=env, stderr=log, stdout=log) as process:
        try:
            for _ in range(600):
                try:
                    if httpx.get(f"{url}/v1/ready", timeout=30).is_success:
                        break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield url
        finally:
            process.terminate()


def _environment(settings: Settings) -> dict[str, str]:
    given = settings.model_dump(exclude_none=True)
    reveal = {name: getattr(one, "get_secret_value", lambda one=one: one)() for name, one in given.items()}
    return os.environ | {name.upper(): str(value) for name, value in reveal.items()}


def table(tally: Tally, messages: int, kills: int, seconds: float) -> str:
    """The results as Markdown."""
    points = Counter(tally.kills)
    lines = [
        "# A migration that is killed",
        "",
        "Written by `python -m benchmarks migration`: MiniLM (384-d) and mpnet (768-d), both padded to 1,024, on the",
        f"embedded stores with {messages:,} ReDial messages in shards of {SHARD_ROWS}. `kill -9` at random moments of",
        "stages that are drawn, taken up again each time; a reader asks the API without end. A former space is dropped",
        "before the next one.",
        "",
        "| | |",
        "|---|---|",
        f"| kills | {len(tally.kills)}{'' if len(tally.kills) >= kills else f' of {kills}, as the time was over'} |",
        f"| migrations, each completed | {len(tally.migrations)} |",
        f"| answers read | {sum(tally.answers.values()) + len(tally.wrong):,} |",
        *(f"| … {name} | {count:,} |" for name, count in sorted(tally.answers.items())),
        f"| **wrong or failed answers** | **{len(tally.wrong)}** |",
        f"| minutes | {seconds / 60:.0f} |",
        "",
        "Killed: " + ", ".join(f"{count} × {point}" for point, count in sorted(points.items())) + ".",
        "",
        "| migration | space | missing | too much | other vectors | least cosine to a clean encoding |",
        "|---|---|---|---|---|---|",
    ]
    for number, one in enumerate(tally.migrations, start=1):
        for name, figures in one.items():
            if name != "to":
                shown = " | ".join(str(figure) for figure in figures.values())
                lines.append(f"| {number}, to {one['to']} | {name} | {shown} |")
    lines += [
        "",
        "An answer of similar users is wrong unless its users and similarities are those of one of the spaces. Lists",
        "hang on the messages' intents as well, which are read anew behind the swap, a page of users at a time, as",
        "behind any run: *while intents are read anew* are lists whose order is neither that of before nor that of",
        "behind it.",
        "",
        *tally.wrong[:10],
    ]
    return "\n".join(lines).rstrip() + "\n"
