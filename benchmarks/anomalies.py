"""Anomalies: what is found of known faults in simulated months, and what is cried over nothing, beside plain rules.

The histories go through the analytics database and `record_anomalies`, as those of real runs do; traffic of the API
goes through `bursts`. The worlds reported on are none that anything was tuned on. The plain rules see the same figures
and get the same rules for what is wrong whatever was before (an empty stage, more than a tenth rejected).
"""

import csv
import gzip
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from personalization.encoder import get_encoder
from personalization.local.config import StackConfig
from personalization.quality.anomalies import record_anomalies
from personalization.quality.baselines import threshold
from personalization.quality.traffic import bursts
from personalization.quality.unusual import ALL_STAGES, BUSY, MORE_REJECTED, RunFigures, figures_of
from personalization.quality.unusual import BUDGET as FIGURES_BUDGET
from personalization.schemas import DAY_MS
from personalization.sketches import distances, sketch
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.tables import EventRecord, MessageIntent
from scipy import stats
from sqlalchemy import create_engine, insert

from benchmarks import api_history
from benchmarks.intents import DATA as INTENTS
from benchmarks.run_history import RUN_FAULTS, START, Fault, SimulatedRun, runs

DATA = Path(__file__).parent
"""Nothing else is needed."""

WARM_UP = 45
QUIET_DAYS, FAULTY_DAYS = WARM_UP + 120, WARM_UP + 45
TUNED_ON, REPORTED_ON = range(8), range(100, 120)
API_QUIET_DAYS = 30
_WORLDS_WITH_FAULTS = 2  # for each quiet one
_BEFORE = 30  # runs that the plain rules look back on
_LEVEL = 0.95
_FIGURES = 25  # that are judged of a run

Alarms = list[set[str]]
"""Of each judged run, what is cried: `kind stage`."""
Figured = list[dict[str, float]]
"""The figures of each run, by `kind stage`."""
Rule = Callable[[dict[str, float], dict[str, list[float]], float], set[str]]

OURS, FIXED, SIGMA = "ours", "fixed threshold", "3-sigma"
FIXED_TUNED, SIGMA_TUNED = "fixed threshold, tuned", "k-sigma, tuned"


def answers(fault: Fault, stage: str | None) -> set[str]:
    """The alarms that name the fault, any of which counts as found."""
    return {
        "run 5 × slower": {f"run {ALL_STAGES}"},
        "stage 3 × slower": {f"stage {stage}"},
        "half the rows rejected": {"rejected ingest"},
        "volume drop": {"volume ingest"},
        "volume spike": {"volume ingest"},
        "silent empty stage": {f"empty {stage}"},
        "`other` ratio jump": {"other detect_intents"},
        "embedding drift": {"drift embed"},
        "abnormal user": {"busiest messages"},
    }[fault]


TITLES = {
    "The run was slower than usual": "run",
    "Slower than usual": "stage",
    "Many rejected rows": "rejected",
    MORE_REJECTED: "rejected",
    "Fewer rows than usual": "volume",
    "More rows than usual": "volume",
    "Wrote nothing": "empty",
    "Embedded and written vectors differ": "empty",
    "More messages of no intent than usual": "other",
    "Fewer messages of no intent than usual": "other",
    "Messages unlike those before": "drift",
    BUSY: "busiest",
}


@dataclass
class Tally:
    """What one detector did."""

    found: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    """By fault."""
    true: int = 0
    false: int = 0
    """Alarms on runs with faults that name the fault, and all others there."""
    quiet: int = 0
    """Alarms in quiet months."""
    about: Counter[str] = field(default_factory=Counter)
    months: float = 0.0

    @property
    def recall(self) -> float:
        """Share of the faults that are found, each kind alike."""
        return float(np.mean([np.mean(some) for some in self.found.values()]))

    @property
    def precision(self) -> float:
        """Share of the alarms in months with faults that name one."""
        return self.true / max(self.true + self.false, 1)

    @property
    def a_month(self) -> float:
        """False alarms in a quiet month."""
        return self.quiet / self.months

    def interval(self) -> tuple[float, float]:
        """Of that, 95 %, exact (Garwood, 1936)."""
        tail = (1 - _LEVEL) / 2
        low = stats.chi2.ppf(tail, 2 * self.quiet) / 2 if self.quiet else 0.0
        return low / self.months, float(stats.chi2.ppf(1 - tail, 2 * self.quiet + 2) / 2 / self.months)

    def judge(self, cried: set[str], fault: str | None, right: set[str], quiet: bool, days: float = 1.0) -> None:
        """Count the alarms of a run, or of a day of the API."""
        if quiet:
            self.months += days / 30
            self.quiet += len(cried)
            self.about.update(cried)
        elif fault is not None:
            self.found[fault].append(bool(cried & right))
            self.true += bool(cried & right)
            self.false += len(cried - right)
        else:
            self.false += len(cried)


def main(results: Path) -> None:
    """Simulate, judge, and write `anomalies.md` and `anomalies.png` into `results`."""
    started = time.perf_counter()
    tuned = {name: tune(rule) for name, rule in ((FIXED_TUNED, fixed), (SIGMA_TUNED, sigma))}
    print("tuned:", tuned, f"{time.perf_counter() - started:.0f} s", flush=True)
    rules: dict[str, tuple[Rule, float]] = {
        FIXED: (fixed, 2.0),
        SIGMA: (sigma, 3.0),
        FIXED_TUNED: (fixed, tuned[FIXED_TUNED]),
        SIGMA_TUNED: (sigma, tuned[SIGMA_TUNED]),
    }
    tallies = {name: Tally() for name in (OURS, *rules)}
    seconds: list[float] = []
    for seed in REPORTED_ON:
        for world, quiet, days in worlds(seed):
            history = list(runs(world, days, faults=not quiet))
            ours = _ours(history, seconds)
            figured = all_plain_figures(history)
            plain = {name: plain_alarms(history, figured, *rule) for name, rule in rules.items()}
            for at, one in judged(history):
                right = answers(one.fault, one.stage) if one.fault else set()
                for name, tally in tallies.items():
                    cried = ours[at] if name == OURS else plain[name][at]
                    tally.judge(cried, one.fault, right, quiet, days=float(one.marker != "backfill"))
        print(f"world {seed}:", {name: (one.quiet, round(one.recall, 2)) for name, one in tallies.items()}, flush=True)
    api = {name: Tally() for name in (OURS, FIXED, SIGMA)}
    for seed in REPORTED_ON:
        judge_api(seed, api)
    drift = real_drift() if INTENTS.exists() else []
    results.mkdir(parents=True, exist_ok=True)
    (results / "anomalies.md").write_text(table(tallies, api, tuned, seconds, drift), encoding="utf-8")
    draw(tallies, api).savefig(results / "anomalies.png", dpi=150)


def worlds(seed: int) -> Iterator[tuple[int, bool, int]]:
    """A quiet world, and some with faults, of seeds of their own: (seed, quiet, days)."""
    yield seed * 10, True, QUIET_DAYS
    for number in range(_WORLDS_WITH_FAULTS):
        yield seed * 10 + 1 + number, False, FAULTY_DAYS


def judged(history: Sequence[SimulatedRun]) -> Iterator[tuple[int, SimulatedRun]]:
    """The runs behind the warm-up, with their places."""
    start = history[0].figures.day + WARM_UP
    yield from ((at, one) for at, one in enumerate(history) if one.figures.day >= start - 0.5)


# --- ours, through the database


def _ours(history: Sequence[SimulatedRun], seconds: list[float]) -> Alarms:
    """What is recorded after each run."""
    first = next(judged(history))[0]
    cried: Alarms = []
    with tempfile.TemporaryDirectory() as folder:
        store = AnalyticsStore(create_engine(f"sqlite:///{folder}/analytics.db"))
        store.ensure_schema()
        for at, one in enumerate(history):
            _record(store, one.figures)
            if at < first:
                cried.append(set())
                continue
            began = time.perf_counter()
            found = record_anomalies(store)
            seconds.append(time.perf_counter() - began)
            cried.append({f"{TITLES[a.title]} {_subject(a.title, a.stage)}" for a in found})
        store.engine.dispose()
    return cried


def _subject(title: str, stage: str) -> str:
    return {"ingest": "messages", "ingest_events": "events"}[stage] if title == BUSY else stage


def _record(store: AnalyticsStore, run: RunFigures) -> None:
    rows = []
    for position, (name, stage) in enumerate(run.stages.items()):
        details: dict[str, Any] = {}
        if name == "embed" and run.sketch is not None:
            details = {"model": run.model, "sketch": run.sketch.to_details()}
        rows.append(
            {"run_id": run.run_id, "stage": name, "position": position, "status": "success"}
            | {"started_at": run.started_at, "finished_at": run.started_at, "details": details}
            | vars(stage)
        )
    store.record_runs(rows)
    moment = int(run.started_at.timestamp() * 1000)
    common = {"run_id": run.run_id, "timestamp": moment}
    said = [
        common | {"message_id": f"{run.run_id} {user} {at}", "user_id": user, "intent_id": "other", "confidence": 1.0}
        for user, most in (("busiest", run.busiest["messages"]), ("other", 3))
        for at in range(most)
    ]
    did = [
        common | {"event_id": f"{run.run_id} {at}", "user_id": "busiest", "campaign_id": "c", "event": "click"}
        for at in range(run.busiest["events"])
    ]
    with store.engine.begin() as connection:
        connection.execute(insert(MessageIntent), said)
        connection.execute(insert(EventRecord), did)


# --- plain rules, on the same figures


def plain_alarms(history: Sequence[SimulatedRun], figured: Figured, rule: Rule, strictness: float) -> Alarms:
    """What a plain rule cries; several slow stages, or a slow run, are one alarm beside the one that is right."""
    past: dict[str, list[float]] = defaultdict(list)
    cried: Alarms = []
    for one, figures in zip(history, figured, strict=True):
        alarms = rule(figures, {name: values[-_BEFORE:] for name, values in past.items()}, strictness)
        cried.append(_together(alarms | always_wrong(one.figures)))
        for name, value in figures.items():
            past[name].append(value)
    return cried


def all_plain_figures(history: Sequence[SimulatedRun]) -> Figured:
    """Of each run."""
    return [plain_figures(one.figures, [each.figures for each in history[:at]]) for at, one in enumerate(history)]


def _together(alarms: set[str]) -> set[str]:
    slow = {one for one in alarms if one.startswith("stage ")}
    run = f"run {ALL_STAGES}"
    return alarms - slow if run in alarms and len(slow) != 1 else alarms - {run} if slow else alarms


def always_wrong(run: RunFigures) -> set[str]:
    """The platform's rules that know no history."""
    empty = {
        f"empty {name}"
        for name, one in run.stages.items()
        if not one.rows_out and one.rows_in - one.skipped - one.rejected > 0
    }
    return empty | {f"rejected {name}" for name, one in run.stages.items() if one.rejected > 0.1 * one.rows_in}


def plain_figures(run: RunFigures, before: Sequence[RunFigures]) -> dict[str, float]:
    """By `kind stage`; those that grow by factors as logarithms."""
    found = {f"stage {name}": float(np.log(one.seconds / one.rows_in)) for name, one in run.stages.items()}
    found[f"run {ALL_STAGES}"] = float(np.log(run.seconds / max(run.stages["ingest"].rows_out, 1)))
    if run.origin == "scheduled":
        found |= {f"volume {name}": float(np.log1p(run.stages[name].rows_in)) for name in ("ingest", "ingest_events")}
    found |= {
        f"rejected {name}": run.stages[name].rejected / max(run.stages[name].rows_in, 1)
        for name in ("ingest", "ingest_events")
    }
    found["other detect_intents"] = run.stages["detect_intents"].skipped / max(run.stages["detect_intents"].rows_in, 1)
    found |= {f"busiest {name}": float(np.log(max(most, 1))) for name, most in run.busiest.items()}
    some = [one.sketch for one in before[-_BEFORE:] if one.sketch is not None]
    if run.sketch is not None and some:
        centre = np.median(np.stack([one.mean for one in some]), axis=0)
        apart = distances(run.sketch.mean[None], np.array([run.sketch.vectors], dtype=float), centre)
        found["drift embed"] = float(np.sqrt(apart.clip(0))[0])
    return found


def fixed(figures: dict[str, float], past: dict[str, list[float]], strictness: float) -> set[str]:
    """So many times the mean of the runs before, or beyond a line that somebody drew."""
    lines = {"rejected": 0.05 * strictness, "other": 0.25 * strictness, "drift": 0.15 * strictness}
    alarms = set()
    for name, value in figures.items():
        kind = name.partition(" ")[0]
        if kind in lines:
            cries = value > lines[kind]
        elif len(past.get(name, ())) < 10:
            cries = False
        else:
            apart = value - float(np.mean(past[name]))
            cries = apart > np.log(strictness) or (kind == "volume" and apart < -np.log(strictness))
        if cries:
            alarms.add(name)
    return alarms


def sigma(figures: dict[str, float], past: dict[str, list[float]], strictness: float) -> set[str]:
    """So many standard deviations from the mean of the runs before."""
    alarms = set()
    for name, value in figures.items():
        values = past.get(name, [])
        if len(values) >= 10:
            apart = value - float(np.mean(values))
            far = strictness * float(np.std(values))
            if apart > far or (name.partition(" ")[0] in ("volume", "other") and apart < -far):
                alarms.add(name)
    return alarms


def tune(rule: Rule) -> float:
    """The least strict that cries at most once a quiet month over the worlds to tune on."""
    quiet = [list(runs(seed * 10, QUIET_DAYS, faults=False)) for seed in TUNED_ON]
    figured = [all_plain_figures(history) for history in quiet]
    for strictness in np.arange(1.5, 30, 0.25):
        tally = Tally()
        for history, figures in zip(quiet, figured, strict=True):
            alarms = plain_alarms(history, figures, rule, float(strictness))
            for at, one in judged(history):
                tally.judge(alarms[at], None, set(), quiet=True, days=float(one.marker != "backfill"))
        if tally.a_month <= 1:
            break
    return float(strictness)


# --- the API


def judge_api(seed: int, tallies: dict[str, Tally]) -> None:
    """A quiet month behind a week, then days with faults, each judged at its end."""
    for quiet, days in ((True, 7 + API_QUIET_DAYS), (False, 7 + len(api_history.PLAN))):
        windows = api_history.windows(seed * 10 + (not quiet), days, faults=not quiet)
        for day in range(7, days):
            day_ms = api_history.START_MS + day * DAY_MS
            seen = [one for one in windows if day_ms - 7 * DAY_MS <= one.moment_ms < day_ms + DAY_MS]
            fault = None if quiet else api_history.PLAN[day - 7]
            right = {f"{fault} {api_history.FAULTY}"} if fault else set()
            cried = {
                OURS: {
                    f"{'latency' if 'slower' in one.title else 'errors'} {one.stage}" for one in bursts(seen, day_ms)
                },
                FIXED: api_history.fixed(seen, day_ms),
                SIGMA: api_history.sigma(seen, day_ms),
            }
            for name, tally in tallies.items():
                tally.judge(cried[name], f"API {fault} burst" if fault else None, right, quiet)


def _api_kind(title: str) -> str:
    return "latency" if "slower" in title else "errors"


# --- drift of real messages


def real_drift() -> list[tuple[float, float]]:
    """Share of other messages in a run, and how often that was found: banking77, and more and more of clinc150.

    Days differ in what is asked: the shares of the intents are drawn anew each day. Of each share 40 runs.
    """
    settings = StackConfig().settings()
    encoder = get_encoder(settings.embedding_model, settings.embedding_dim)
    draw = np.random.default_rng(11)
    with (INTENTS / "banking77_train.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    rows = [rows[at] for at in draw.permutation(len(rows))[:4000]]
    with gzip.open(INTENTS / "clinc150_train_val.json.gz", "rt", encoding="utf-8") as stream:
        others = [text for text, _ in json.load(stream)["val"]]
    others = [others[at] for at in draw.permutation(len(others))[:1000]]
    known, foreign = encoder.encode([text for text, _ in rows]), encoder.encode(others)
    labels = np.array([label for _, label in rows])
    by_intent = [np.flatnonzero(labels == one) for one in sorted(set(labels))]

    def run(day: int, share: float) -> RunFigures:
        other = int(600 * share)
        counts = draw.multinomial(600 - other, draw.dirichlet(np.full(len(by_intent), 5.0)))
        some = np.concatenate([draw.choice(one, count) for one, count in zip(by_intent, counts, strict=True)])
        vectors = np.concatenate([known[some], foreign[draw.choice(len(foreign), other)]])
        moment = START + timedelta(days=day)
        return RunFigures(f"scheduled__{day}", moment, {}, True, sketch(vectors), "model")

    found = []
    for share in (0.0, 0.1, 0.2, 0.3, 0.5):
        before = [run(day, 0.0) for day in range(WARM_UP)]
        line = threshold(FIGURES_BUDGET / (_FIGURES * 30))
        figures = [one for _ in range(40) for one in figures_of(run(WARM_UP, share), before)]
        found.append((share, float(np.mean([one.worth_a_look and one.score > line for one in figures]))))
    return found


# --- the report


def table(
    tallies: dict[str, Tally],
    api: dict[str, Tally],
    tuned: dict[str, float],
    seconds: Sequence[float],
    drift: Sequence[tuple[float, float]],
) -> str:
    """The results as Markdown."""
    strict = ", ".join(f"{name.partition(',')[0]}: {value:g}" for name, value in tuned.items())
    head = f"""# Anomalies

Written by `python -m benchmarks anomalies`. Simulated platforms with a run a day: volumes follow the weekday and grow
by −2 to 8 % a month, errors have heavy tails (Student's t, 4 degrees of freedom), stages hiccup, on holidays as few
write as on a Sunday, old days are loaded anew by hand. Judged behind {WARM_UP} days of history on {len(REPORTED_ON)}
worlds of {(QUIET_DAYS - WARM_UP) // 30} quiet months, and {_WORLDS_WITH_FAULTS * len(REPORTED_ON)} with one fault of
each kind in {FAULTY_DAYS - WARM_UP} days. All of them are of seeds that nothing was tuned on. A fault is found if an
alarm of its run names its kind and its stage.

*Fixed threshold*: twice the mean of the last 30 runs, or more than 10 % rejected, 50 % of no intent, 0.3 of drift.
*3-sigma*: three standard deviations from the mean of the last 30, on the same figures (logarithms where they grow by
factors). *Tuned*: the same made as strict as it must be for one false alarm a quiet month on other seeds
({strict}). All have the platform's rules for what is wrong whatever was before.

"""
    names = list(tallies)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [
        f"| {fault} | {' | '.join(f'{np.mean(one.found[fault]):.0%}' for one in tallies.values())} |"
        for fault in RUN_FAULTS
    ]
    lines += _summary(tallies)
    names = list(api)
    lines += [
        "",
        "The API: three routes, windows of five minutes, a week of history before each day that is judged.",
        "",
    ]
    lines += [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    faults = list(api[OURS].found)
    lines += [f"| {one} | {' | '.join(f'{np.mean(each.found[one]):.0%}' for each in api.values())} |" for one in faults]
    lines += _summary(api)
    if drift:
        told = ", ".join(f"{share:.0%}: {found:.0%}" for share, found in drift)
        lines += [
            "",
            "Drift of real messages: runs of 600 of banking77 whose mix of intents changes daily, and a share of other",
            f"messages, of clinc150. Share of other messages, and of 40 such runs each those found: {told}.",
        ]
    about = ", ".join(f"{name} {count}" for name, count in tallies[OURS].about.most_common()) or "none"
    lines += [
        "",
        f"What ours cried over nothing, of runs: {about}.",
        f"Recording what is odd about a run took {np.median(seconds) * 1000:.0f} ms (median; 45 to 90 runs before it).",
        "",
        "![Recall and false alarms](anomalies.png)",
    ]
    return head + "\n".join(lines) + "\n"


def _summary(tallies: dict[str, Tally]) -> list[str]:
    some = list(tallies.values())
    alarms = [f"{one.a_month:.2f} ({one.interval()[0]:.2f} … {one.interval()[1]:.2f})" for one in some]
    return [
        f"| **recall** | {' | '.join(f'**{one.recall:.3f}**' for one in some)} |",
        f"| precision | {' | '.join(f'{one.precision:.3f}' for one in some)} |",
        f"| **false alarms a quiet month** (95 %) | {' | '.join(alarms)} |",
    ]


def draw(tallies: dict[str, Tally], api: dict[str, Tally]) -> Figure:
    """Recall by the kind of fault, and false alarms."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    recall, alarms = figure.subplots(1, 2, width_ratios=[3, 2])
    looks = zip(tallies, ("#0072B2", "#8A8F98", "#E69F00", "#56B4E9", "#CC79A7"), "DsovX", strict=True)
    style = {name: (color, marker) for name, color, marker in looks}
    faults = [*RUN_FAULTS, *api[OURS].found]
    for name, (color, marker) in style.items():
        both = {**tallies[name].found, **(api[name].found if name in api else {})}
        points = [(float(np.mean(both[one])), at) for at, one in enumerate(faults) if one in both]
        recall.plot(*zip(*points, strict=True), marker, color=color, markersize=8, alpha=0.85, label=name)
    recall.set_yticks(range(len(faults)), faults)
    recall.invert_yaxis()
    recall.set_xlabel("share of the faults that are found")
    recall.set_xlim(-0.03, 1.03)
    recall.grid(axis="x", alpha=0.3)
    recall.legend(loc="lower left")
    for at, (name, tally) in enumerate(tallies.items()):
        low, high = tally.interval()
        color, marker = style[name]
        error = [[tally.a_month - low], [high - tally.a_month]]
        alarms.errorbar(tally.a_month, at, xerr=error, fmt=marker, color=color, markersize=9, capsize=4)
    alarms.axvline(1, color="#8A8F98", linestyle="dotted")
    alarms.set_yticks(range(len(tallies)), list(tallies))
    alarms.invert_yaxis()
    alarms.set_xscale("log")
    alarms.set_xlim(0.1, 10)
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
    alarms.set_xticks(ticks, [f"{one:g}" for one in ticks])
    alarms.minorticks_off()
    alarms.set_xlabel("false alarms of runs in a quiet month (95 %)")
    alarms.grid(axis="x", alpha=0.3)
    return figure
