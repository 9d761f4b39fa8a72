"""Recommendation: the shipped policy beside the baselines, on generated worlds with a known truth and on ReDial.

Worlds are made of real labelled messages; their seeds are none that anything was tuned on. ReDial's films are the
campaigns, and what a seeker said to like is the engagement.
"""

import csv
import gzip
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from personalization.catalog.loading import load_catalog
from personalization.evaluation.dataset import Refused, build_history, load_events, load_messages
from personalization.evaluation.pictures import markdown, write_report
from personalization.evaluation.policies import ABLATIONS, STANDARD
from personalization.evaluation.replay import Plan, Replay, summarise
from personalization.learning.history import History, take_snapshot
from personalization.learning.training import Task, choose_ranker, past_examples
from personalization.local.config import StackConfig
from personalization.recommend.ranking import Evidence
from personalization.schemas import DAY_MS
from personalization.settings import Settings
from upath import UPath

from benchmarks.generator import Config, generate
from benchmarks.intents import DATA as INTENTS

REDIAL = INTENTS.parent / "redial"

_SPLITS = 6
_ANSWERS = 50


@dataclass(frozen=True)
class Case:
    """A data set and how it is split."""

    title: str
    name: str
    task: Task
    every_days: float
    splits: int
    policies: tuple[str, ...] = STANDARD


def main(results: Path) -> None:
    """Replay every case; write a folder of figures and a picture each, and the summary."""
    settings = StackConfig().settings()
    parts = ["# Recommendation", "Made by `python -m benchmarks recommendation`; intervals are 95 %, over users."]
    with tempfile.TemporaryDirectory() as scratch:
        for seed, with_intents in ((101, True), (102, False)):
            folder = Path(scratch) / f"world-{seed}"
            generate(Config(seed=seed, with_intents=with_intents)).write(folder)
            kind = "intents" if with_intents else "name and description only"
            title = f"Generated world {seed}, campaigns with {kind}"
            history, seconds = _load(folder, settings)
            new = Case(f"{title}: new to the user", f"world-{seed}-new", "new", 7, _SPLITS, (*STANDARD, *ABLATIONS))
            seen = Case(f"{title}: seen before or not", f"world-{seed}-any", "any", 7, _SPLITS)
            parts += [*_replay(history, new, results), *_replay(history, seen, results), *_cost(history, seconds)]
        folder = Path(scratch) / "redial"
        _write_redial(folder)
        history, _ = _load(folder, settings)
        for task, words in (("new", "not liked before"), ("any", "liked before or not")):
            case = Case(f"ReDial: films {words}", f"redial-{task}", task, 2, 16)  # type: ignore[arg-type]
            parts += _replay(history, case, results)
    (results / "recommendation.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _load(folder: Path, settings: Settings) -> tuple[History, float]:
    started = time.perf_counter()
    refused = Refused()
    messages = load_messages(UPath(folder / "messages.jsonl"), refused)
    events = load_events(UPath(folder / "events.csv"), refused)
    if refused.count:
        print(f"{folder.name}: {refused.count} rows are left out, first {refused.first[0]}", flush=True)
    history = build_history(messages, events, load_catalog(folder / "catalog"), settings)
    return history, time.perf_counter() - started


def _replay(history: History, case: Case, results: Path) -> list[str]:
    started = time.perf_counter()
    every = int(case.every_days * DAY_MS)
    end = int(history.signals.at[history.signals.is_event][-1]) + 1
    plan = Plan(end - case.splits * every, every, every, end, case.task)
    replay = Replay(history, plan)
    outcomes = replay.run(case.policies, lambda done: print(f"{case.name}: {done} of {case.splits} splits", flush=True))
    report = summarise(replay, plan, outcomes)
    write_report(report, results / case.name)
    seconds = time.perf_counter() - started
    return [f"## {case.title}", markdown(report), f"![]({case.name}/policies.png)", f"Replayed in {seconds:.0f} s."]


def _cost(history: History, load_seconds: float) -> list[str]:
    """What ranking adds to an answer, and what learning adds to a run."""
    now = int(history.signals.at[-1]) + 1
    started = time.perf_counter()
    choice = choose_ranker(past_examples(history, now, 7 * DAY_MS, "any"))
    learning = time.perf_counter() - started
    snapshot = take_snapshot(history, now)
    rng = np.random.default_rng(0)
    took = []
    for user in rng.choice(len(history.user_ids), _ANSWERS, replace=False):
        known = snapshot.users(np.asarray([user]))
        started = time.perf_counter()
        evidence = Evidence.of(snapshot.campaigns, known)
        best = np.argsort(-choice.ranker.score(evidence)[0])[:5]
        choice.ranker.shares(evidence, best[None, :])
        took.append((time.perf_counter() - started) * 1000)
    return [
        (
            f"{len(history.messages.at):,} messages and {len(history.signals.at):,} signals loaded and embedded in "
            f"{load_seconds:.0f} s; ranker learned in {learning:.0f} s; ranking {len(snapshot.columns)} candidates "
            f"and explaining the best five takes {np.median(took):.1f} ms (p95 {np.quantile(took, 0.95):.1f})."
        )
    ]


def _write_redial(folder: Path) -> None:
    (folder / "catalog").mkdir(parents=True)
    with gzip.open(REDIAL / "messages.jsonl.gz") as source, (folder / "messages.jsonl").open("wb") as target:
        shutil.copyfileobj(source, target)
    with gzip.open(REDIAL / "engagement.csv.gz", "rt", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    films = {row["movie_id"]: row["movie"] or row["movie_id"] for row in rows}
    campaigns = [{"id": film, "name": name} for film, name in sorted(films.items())]
    (folder / "catalog" / "campaigns.json").write_text(json.dumps({"campaigns": campaigns}), encoding="utf-8")
    with (folder / "events.csv").open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target)
        writer.writerow(["user_id", "campaign_id", "event", "timestamp"])
        writer.writerows(
            [row["user_id"], row["movie_id"], "click", row["timestamp"]] for row in rows if row["liked"] == "1"
        )
