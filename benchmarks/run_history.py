"""Simulated months of runs and of API traffic, with known faults: what `benchmarks/anomalies.py` judges detectors by.

A quiet history is not a calm one. Volumes follow the weekday and grow; errors have heavy tails (Student's t with 4
degrees of freedom); the machine hiccups; on holidays few write; old days are loaded anew by hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Literal

import numpy as np
from personalization.quality.unusual import RunFigures, StageFigures
from personalization.sketches import FEATURES, Sketch, sketch

START = datetime(2026, 1, 5, 1, 0, tzinfo=UTC)
STAGES = {
    "prepare": (1.5, 0.0),
    "ingest": (0.8, 0.0004),
    "ingest_events": (0.5, 0.0002),
    "embed_catalog": (0.2, 0.0),
    "embed": (4.0, 0.006),
    "upsert_vectors": (1.0, 0.0012),
    "detect_intents": (1.2, 0.0007),
    "build_graph": (0.8, 0.0018),
    "roll_up_engagement": (0.4, 0.0003),
    "refresh_profiles": (0.9, 0.0006),
    "learn": (6.0, 0.0008),
    "publish": (1.0, 0.0001),
}
"""Fixed seconds, and seconds a row."""
SLOWED = ("embed", "upsert_vectors", "build_graph", "learn")
EMPTIED = ("upsert_vectors", "build_graph", "roll_up_engagement", "refresh_profiles")

Fault = Literal[
    "run 5 × slower",
    "stage 3 × slower",
    "half the rows rejected",
    "volume drop",
    "volume spike",
    "silent empty stage",
    "`other` ratio jump",
    "embedding drift",
    "abnormal user",
]
RUN_FAULTS: tuple[Fault, ...] = (
    "run 5 × slower",
    "stage 3 × slower",
    "half the rows rejected",
    "volume drop",
    "volume spike",
    "silent empty stage",
    "`other` ratio jump",
    "embedding drift",
    "abnormal user",
)

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class SimulatedRun:
    """A run, and what was wrong with it."""

    figures: RunFigures
    fault: Fault | None = None
    stage: str | None = None
    """Where a fault of one stage lies."""
    marker: str | None = None
    """What a detector might stumble over without reason: a holiday, a backfill."""


class World:
    """One platform: its size, its week, its users' topics. All of it drawn from the seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        draw = self.random
        self.volume = float(np.exp(draw.uniform(np.log(2_000), np.log(20_000))))
        self.growth = draw.uniform(-0.02, 0.08)  # a month
        self.week = np.array([1.0, 1.05, 1.0, 0.98, 0.95, 0.0, 0.0])
        self.week[5:] = draw.uniform(0.4, 0.9, 2)
        self.volume_noise = draw.uniform(0.05, 0.15)
        self.rejects = draw.uniform(0.005, 0.04)
        self.others = draw.uniform(0.15, 0.4)
        self.busiest = draw.uniform(10, 40)
        self.speed = draw.uniform(0.7, 1.6)
        self.topics = draw.uniform(0.5, 1.5, 10)
        self.weekend_topics = self.topics * draw.uniform(0.8, 1.25, 10)

    def noise(self, scale: float) -> float:
        """Heavy-tailed, around 0."""
        return float(self.random.standard_t(4) * scale)

    def happens(self, every_days: float) -> bool:
        """Whether what comes about once in so many days comes today."""
        return bool(self.random.random() < 1 / every_days)

    @cached_property
    def _topic_features(self) -> Floats:
        """The mean features of ten topics, and of an eleventh that nobody spoke of before."""
        means = []
        for _ in range(11):
            centre = self.random.standard_normal(64)
            vectors = centre / np.linalg.norm(centre) + self.random.standard_normal((400, 64)) * 0.12
            drawn = sketch((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))
            if drawn is not None:
                means.append(drawn.mean)
        return np.stack(means)

    def sketch(self, vectors: int, weekend: bool, drifted: float) -> Sketch:
        """Of vectors whose topics vary from day to day; `drifted` is the share of a topic that is new."""
        topics = self.weekend_topics if weekend else self.topics
        shares = self.random.dirichlet(topics * 40) * (1 - drifted)
        counts = self.random.multinomial(vectors, [*shares, drifted])
        mean = counts @ self._topic_features / vectors
        chance = np.sqrt(max(1 - float((mean**2).sum()), 0) / vectors / FEATURES)
        return Sketch(mean + self.random.standard_normal(FEATURES) * chance, vectors)


def runs(seed: int, days: int, faults: bool, warm_up: int = 45) -> Iterator[SimulatedRun]:
    """A run a day, and backfills; with `faults`, one of each kind on days of its own behind the warm-up."""
    world = World(seed)
    planned: dict[int, Fault] = {}
    if faults:
        # A day between two faults, so that each stands alone.
        free = world.random.permutation(np.arange(warm_up, days, 2))
        planned = {int(day): fault for day, fault in zip(free, RUN_FAULTS, strict=False)}
    for day in range(days):
        moment = START + timedelta(days=day, minutes=float(world.random.uniform(0, 20)))
        yield _run(world, day, moment, planned.get(day))
        if world.happens(45):
            yield _backfill(world, moment + timedelta(hours=6))


def _run(world: World, day: int, moment: datetime, fault: Fault | None) -> SimulatedRun:
    weekday = moment.weekday()
    trend = (1 + world.growth) ** (day / 30)
    rows = world.volume * world.week[weekday] * trend * np.exp(world.noise(world.volume_noise))
    events = int(rows * 0.3 * np.exp(world.noise(0.1)))  # from elsewhere: faults of messages leave them alone
    marker = None
    if fault is None and weekday < 5 and world.happens(30):
        marker = "holiday"
        rows *= world.random.uniform(0.95, 1.05) * world.week[5:].mean()
    if fault == "volume drop":
        rows *= world.random.uniform(0.02, 0.25)
    elif fault == "volume spike":
        rows *= world.random.uniform(3.0, 8.0)
    run = _figures(world, f"scheduled__{moment.isoformat()}", moment, (int(rows), events), weekday >= 5, fault)
    return _with_fault(world, run, fault, marker)


def _backfill(world: World, moment: datetime) -> SimulatedRun:
    rows = int(world.volume * world.random.uniform(5, 20))
    run = _figures(world, f"backfill__{moment.isoformat()}", moment, (rows, int(rows * 0.3)), weekend=False, fault=None)
    return SimulatedRun(run, marker="backfill")


def _figures(
    world: World, run_id: str, moment: datetime, volume: tuple[int, int], weekend: bool, fault: Fault | None
) -> RunFigures:
    rows, events = volume
    rejected = _share(world, rows, 0.5 if fault == "half the rows rejected" else world.rejects, 0.25)
    staged = rows - rejected
    others = world.others + world.random.uniform(0.25, 0.45) if fault == "`other` ratio jump" else world.others
    said_nothing = _share(world, staged, others, 0.12)
    pace = world.speed * np.exp(world.noise(0.06))
    if fault == "run 5 × slower":
        pace *= 5
    stages = {}
    for name, (fixed, per_row) in STAGES.items():
        rows_in = {"prepare": 30, "ingest": rows, "ingest_events": events, "embed_catalog": 200}.get(name, staged)
        hiccup = world.random.uniform(1.2, 1.6) if world.happens(60) else 1.0
        seconds = (fixed + per_row * rows_in) * pace * hiccup * np.exp(world.noise(0.08))
        stages[name] = StageFigures(float(seconds), rows_in, rows_in, 0, 0)
    stages["ingest"] = replace(stages["ingest"], rows_out=staged, rejected=rejected)
    stages["ingest_events"] = replace(stages["ingest_events"], rejected=_share(world, events, 0.002, 0.3))
    stages["detect_intents"] = replace(stages["detect_intents"], rows_out=staged - said_nothing, skipped=said_nothing)
    drifted = float(world.random.uniform(0.3, 0.8)) if fault == "embedding drift" else 0.0
    busiest = world.busiest * np.exp(world.noise(0.12))
    if fault == "abnormal user":
        busiest *= world.random.uniform(6, 20)
    drawn = world.sketch(min(max(staged, 1), 2000), weekend, drifted)
    most = {"messages": round(busiest), "events": round(8 * np.exp(world.noise(0.15)))}
    return RunFigures(run_id, moment, stages, True, drawn, "model", most)


def _with_fault(world: World, run: RunFigures, fault: Fault | None, marker: str | None) -> SimulatedRun:
    if fault == "stage 3 × slower":
        name = str(world.random.choice(SLOWED))
        slowed = replace(run.stages[name], seconds=run.stages[name].seconds * 3)
        return SimulatedRun(replace(run, stages=run.stages | {name: slowed}), fault, name)
    if fault == "silent empty stage":
        name = str(world.random.choice(EMPTIED))
        emptied = replace(run.stages[name], rows_out=0)
        return SimulatedRun(replace(run, stages=run.stages | {name: emptied}), fault, name)
    return SimulatedRun(run, fault, marker=marker)


def _share(world: World, rows: int, share: float, noise: float) -> int:
    odds = share / (1 - share) * np.exp(world.noise(noise))
    return int(world.random.binomial(rows, odds / (1 + odds)))
