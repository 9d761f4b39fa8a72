"""What is unusual about a run, beside the runs before it.

Every figure that is looked at has a share of one budget of false alarms, whatever the number of stages and of runs a
month. It must also differ enough to be worth a look: chance is not the only thing that does not matter.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np

from personalization.quality.anomaly import Anomaly
from personalization.quality.baselines import (
    FEWEST,
    Expectation,
    Floats,
    expect_effort,
    expect_level,
    probability,
    threshold,
)
from personalization.sketches import Sketch, distances

BUDGET = 0.5
"""False alarms a month that are put up with, over all figures together."""
HISTORY = 90
"""Runs that a run is compared with, at most."""
ALL_STAGES = "all stages"
BUSY = "A user is unusually busy"
MORE_REJECTED = "More rejected rows than usual"

_MONTH = timedelta(days=30)
_DAY_S = 86_400
_FEWEST_ROWS = 50
_FEWEST_BY_USER = 30
_BY_HAND = frozenset({"manual", "backfill"})
_NAMED = 3
_STAGES_OF_A_PACE = 4
_SLOWER = 1.75
_SLOWER_S = 5.0
_VOLUME = 2.0
_MORE_REJECTED = 0.03
_OTHERS_APART = 0.1
_BUSIER = 3.0
_DRIFT = 0.02


@dataclass(frozen=True)
class StageFigures:
    """One stage of one run."""

    seconds: float
    rows_in: int
    rows_out: int
    rejected: int
    skipped: int


@dataclass(frozen=True)
class RunFigures:
    """What one run is judged by. Only stages that succeeded are in it."""

    run_id: str
    started_at: datetime
    stages: dict[str, StageFigures]
    succeeded: bool
    """Whether no stage failed."""
    sketch: Sketch | None = None
    """Of its vectors."""
    model: str | None = None
    busiest: dict[str, int] = field(default_factory=dict)
    """By `messages` and `events`: the most that one user left on one day."""

    @property
    def day(self) -> float:
        """Days since the epoch, UTC."""
        return self.started_at.timestamp() / _DAY_S

    @property
    def origin(self) -> str:
        """What started the run, as Airflow's ids tell: scheduled, manual, backfill …"""
        return self.run_id.partition("__")[0]

    @property
    def seconds(self) -> float:
        """Work time of all stages."""
        return sum(one.seconds for one in self.stages.values())


class Figure(NamedTuple):
    """A figure of a run beside its history, on the scale on which it is judged."""

    kind: str
    stage: str
    value: float
    expected: Expectation
    worth_a_look: bool

    @property
    def score(self) -> float:
        """How unusual it is."""
        return self.expected.score(self.value)


def unusual(run: RunFigures, before: Sequence[RunFigures]) -> list[Anomaly]:
    """What is unusual about the run, beside those before it, oldest first. Some 10 ms."""
    before = before[-HISTORY:]
    figures = figures_of(run, before)
    if not figures:
        return []
    line = threshold(BUDGET / (len(figures) * max(runs_a_month(run, before), 1)))
    return findings(run, [one for one in figures if one.worth_a_look and abs(one.score) > line])


def runs_a_month(run: RunFigures, before: Sequence[RunFigures]) -> float:
    """How many runs there are in 30 days, as the newest of them came."""
    if not before:
        return 1.0
    newest = before[-30:]
    return float(len(newest) / max((run.started_at - newest[0].started_at) / _MONTH, 1 / _DAY_S))


def figures_of(run: RunFigures, before: Sequence[RunFigures]) -> list[Figure]:
    """All figures of the run that its history is long enough to judge."""
    found = [*_efforts(run, before), *_volumes(run, before), *_ratios(run, before)]
    return [*found, *_drift(run, before), *_busiest(run, before)]


def findings(run: RunFigures, figures: Iterable[Figure]) -> list[Anomaly]:
    """The figures in words; several slow stages, or none, make one slow run."""
    by_kind: dict[str, list[Figure]] = {}
    for one in figures:
        by_kind.setdefault(one.kind, []).append(one)
    slow_run, slow_stages = by_kind.pop("run", []), by_kind.pop("stage", [])
    if slow_run and len(slow_stages) != 1:
        found = [_slow_run(run, slow_run[0], slow_stages)]
    else:
        found = [_slow_stage(run, one) for one in slow_stages]
    words = {"volume": _volume, "rejected": _rejected, "other": _other, "drift": _drifted, "busiest": _busy}
    return [*found, *(words[kind](run, one) for kind, some in by_kind.items() for one in some)]


# --- the figures


def _efforts(run: RunFigures, before: Sequence[RunFigures]) -> list[Figure]:
    """Seconds by the rows there were: of each stage beside the others of its run, and of the run by the rows it staged.

    What slows all stages alike is the run's pace, and is no stage's fault.
    """
    found = []
    *paces, pace = _paces([*before, run])
    for name, stage in run.stages.items():
        past = [
            (one.stages[name].rows_in, one.stages[name].seconds / at)
            for one, at in zip(before, paces, strict=True)
            if name in one.stages and one.stages[name].rows_in
        ]
        if stage.rows_in and len(past) >= FEWEST:
            found.append(_effort("stage", name, (stage.rows_in, stage.seconds / pace), past))
    whole = [(_staged(one), one.seconds) for one in before if one.succeeded and _staged(one)]
    if run.succeeded and _staged(run) and len(whole) >= FEWEST:
        found.append(_effort("run", ALL_STAGES, (_staged(run), run.seconds), whole))
    return found


def _paces(runs: Sequence[RunFigures]) -> list[float]:
    """How many times as long as usual each run took, by the median over its stages; 1 of runs of few stages."""
    names = sorted({name for run in runs for name, stage in run.stages.items() if stage.rows_in})
    rates = np.full((len(runs), len(names)), np.nan)
    for row, run in enumerate(runs):
        for column, name in enumerate(names):
            stage = run.stages.get(name)
            if stage is not None and stage.rows_in:
                rates[row, column] = np.log(max(stage.seconds, 0.01) / stage.rows_in)
    known = (~np.isnan(rates)).sum(axis=1) >= _STAGES_OF_A_PACE
    paces = np.zeros(len(runs))
    if known.any():
        paces[known] = np.nanmedian(rates[known] - np.nanmedian(rates, axis=0), axis=1)
    return [float(one) for one in np.exp(paces)]


def _effort(kind: str, name: str, now: tuple[int, float], past: Sequence[tuple[int, float]]) -> Figure:
    sizes, efforts = _logs([rows for rows, _ in past]), _logs([seconds for _, seconds in past])
    value = float(_logs([now[1]])[0])
    expected = expect_effort(sizes, efforts, float(_logs([now[0]])[0]), floor=0.1)
    usual = float(np.exp(expected.high))
    is_slow = now[1] > _SLOWER * usual and now[1] - usual > _SLOWER_S
    return Figure(kind, name, value, expected, is_slow)


def _volumes(run: RunFigures, before: Sequence[RunFigures]) -> list[Figure]:
    """Rows in. A file taken by hand is as large as it is."""
    found = []
    alike = [one for one in before if one.origin == run.origin]
    for name in ("ingest", "ingest_events") if run.origin not in _BY_HAND else ():
        past = [one for one in alike if name in one.stages]
        if name in run.stages and len(past) >= FEWEST:
            rows = run.stages[name].rows_in
            value = float(np.log1p(rows))
            days, values = _series(past, lambda one, name=name: float(np.log1p(one.stages[name].rows_in)))  # type: ignore[misc]
            expected = expect_level(days, values, run.day, floor=0.1, quiet_days=True)
            is_far = abs(expected.distance(value)) > np.log(_VOLUME) and expected.high > np.log(_FEWEST_ROWS)
            found.append(Figure("volume", name, value, expected, bool(is_far)))
    return found


def _ratios(run: RunFigures, before: Sequence[RunFigures]) -> list[Figure]:
    """Rejected rows, which only more of are unusual, and messages of no intent, on the scale of log odds."""
    return [
        figure
        for kind, name, count, least in (
            ("rejected", "ingest", lambda one: one.rejected, _MORE_REJECTED),
            ("rejected", "ingest_events", lambda one: one.rejected, _MORE_REJECTED),
            ("other", "detect_intents", lambda one: one.skipped, _OTHERS_APART),
        )
        for figure in _ratio(kind, name, count, least, run, before)
    ]


def _ratio(
    kind: str,
    name: str,
    count: Callable[[StageFigures], int],
    least: float,
    run: RunFigures,
    before: Sequence[RunFigures],
) -> list[Figure]:
    past = [one for one in before if name in one.stages and one.stages[name].rows_in >= _FEWEST_ROWS]
    now = run.stages.get(name)
    if now is None or now.rows_in < _FEWEST_ROWS or len(past) < FEWEST:
        return []
    days, values = _series(past, lambda one: _log_odds(count(one.stages[name]), one.stages[name].rows_in)[0])
    value, chance = _log_odds(count(now), now.rows_in)
    expected = expect_level(days, values, run.day, floor=float(np.hypot(0.1, chance)))
    apart = count(now) / now.rows_in - _odds_to_share(expected.middle)
    return [Figure(kind, name, value, expected, apart > least or (kind == "other" and apart < -least))]


def _drift(run: RunFigures, before: Sequence[RunFigures]) -> list[Figure]:
    """How far the run's vectors lie from where those of the runs before it lay."""

    def sketched(one: RunFigures) -> bool:
        return one.sketch is not None and one.sketch.vectors >= _FEWEST_ROWS and one.model == run.model

    past = [one for one in before if sketched(one)]
    if not sketched(run) or len(past) < FEWEST:
        return []
    some = [one.sketch for one in (*past, run) if one.sketch is not None]
    means = np.stack([one.mean for one in some])
    counts = np.array([one.vectors for one in some], dtype=float)
    found = np.sqrt(distances(means, counts, np.median(means[:-1], axis=0)).clip(0))
    days = np.array([one.day for one in past])
    expected = expect_level(days, found[:-1], run.day, floor=0.006)
    value = float(found[-1])
    return [Figure("drift", "embed", value, expected, value - expected.middle > _DRIFT)]


def _busiest(run: RunFigures, before: Sequence[RunFigures]) -> list[Figure]:
    """The most that one user left on a day."""
    found = []
    for name, most in run.busiest.items():
        past = [one for one in before if one.busiest.get(name)]
        if most and len(past) >= FEWEST:
            days, values = _series(past, lambda one, name=name: float(np.log(one.busiest[name])))  # type: ignore[misc]
            expected = expect_level(days, values, run.day, floor=0.15)
            usual = float(np.exp(expected.high))
            is_busy = most >= _FEWEST_BY_USER and most > _BUSIER * usual
            found.append(Figure("busiest", name, float(np.log(most)), expected, is_busy))
    return found


def _series(runs: Sequence[RunFigures], value: Callable[[RunFigures], float]) -> tuple[Floats, Floats]:
    return np.array([one.day for one in runs]), np.array([value(one) for one in runs])


def _staged(run: RunFigures) -> int:
    return run.stages["ingest"].rows_out if "ingest" in run.stages else 0


def _logs(values: Sequence[float]) -> Floats:
    logs: Floats = np.log(np.asarray(values, dtype=float).clip(0.01))
    return logs


def _log_odds(count: int, of: int) -> tuple[float, float]:
    """The logarithm of the odds, and how far chance moves that (Haldane and Anscombe's half added to each)."""
    yes, no = count + 0.5, max(of - count, 0) + 0.5
    return float(np.log(yes / no)), float(np.sqrt(1 / yes + 1 / no))


def _odds_to_share(log_odds: float) -> float:
    return float(1 / (1 + np.exp(-log_odds)))


# --- in words


def _anomaly(
    run: RunFigures, stage: str, title: str, evidence: str, advice: str, figure: Figure, shown: tuple[float, float]
) -> Anomaly:
    observed, expected = shown
    rarity = probability(figure.score)
    chance = f"1 in {1 / rarity:,.0f} runs" if rarity > 1e-6 else "fewer than 1 in a million runs"
    return Anomaly(
        severity="warning",
        run_id=run.run_id,
        run_started_at=run.started_at,
        stage=stage,
        title=title,
        evidence=f"{evidence} By chance in {chance} ({abs(figure.score):.1f} robust standard deviations).",
        advice=advice,
        observed=observed,
        expected=expected,
        score=figure.score,
    )


def _slow_run(run: RunFigures, figure: Figure, stages: Sequence[Figure]) -> Anomaly:
    seconds, usual = float(np.exp(figure.value)), float(np.exp(figure.expected.high))
    slowest = sorted(stages, key=lambda one: np.exp(one.expected.high) - np.exp(one.value))[:_NAMED]
    named = ", ".join(f"{one.stage} {np.exp(one.value - one.expected.high):.1f} ×" for one in slowest)
    evidence = f"{_staged(run):,} messages took {seconds:,.0f} s of work, usually {usual:,.0f} s"
    evidence += f" ({seconds / usual:.1f} ×). Most of it: {named}." if named else f" ({seconds / usual:.1f} ×)."
    advice = (
        "All of it is slow: see whether something else uses the machine, its CPU, memory or disk. "
        "If it stays so, this is the new normal, and no more is said of it."
    )
    return _anomaly(run, ALL_STAGES, "The run was slower than usual", evidence, advice, figure, (seconds, usual))


def _slow_stage(run: RunFigures, figure: Figure) -> Anomaly:
    seconds, rows = run.stages[figure.stage].seconds, run.stages[figure.stage].rows_in
    usual = float(np.exp(figure.expected.high))
    evidence = f"{rows:,} rows took {seconds:,.1f} s, usually {usual:,.1f} s ({seconds / usual:.1f} ×)."
    advice = "Look at the store that this stage writes, or, for `embed`, at the device; compare with an earlier run."
    return _anomaly(run, figure.stage, "Slower than usual", evidence, advice, figure, (seconds, usual))


def _volume(run: RunFigures, figure: Figure) -> Anomaly:
    rows = run.stages[figure.stage].rows_in
    is_less = rows < np.expm1(figure.expected.middle)
    usual = float(np.expm1(figure.expected.low if is_less else figure.expected.high))
    evidence = f"{rows:,} rows, usually {'at least ' if is_less else ''}{usual:,.0f} on such a day."
    if is_less:
        title = "Fewer rows than usual"
        advice = "See whether all of the day's files came, and whether they are whole; send what is missing."
    else:
        title = "More rows than usual"
        advice = "See whether a file came twice or holds older days; where it is meant, there is nothing to do."
    return _anomaly(run, figure.stage, title, evidence, advice, figure, (rows, usual))


def _rejected(run: RunFigures, figure: Figure) -> Anomaly:
    stage = run.stages[figure.stage]
    share, usual = stage.rejected / stage.rows_in, _odds_to_share(figure.expected.middle)
    evidence = f"{stage.rejected:,} of {stage.rows_in:,} rows ({share:.1%}), usually {usual:.1%}."
    advice = "Look at the reasons in the quarantine, correct the source and send the rows again."
    return _anomaly(run, figure.stage, MORE_REJECTED, evidence, advice, figure, (share, usual))


def _other(run: RunFigures, figure: Figure) -> Anomaly:
    stage = run.stages[figure.stage]
    share, usual = stage.skipped / stage.rows_in, _odds_to_share(figure.expected.middle)
    evidence = (
        f"{stage.skipped:,} of {stage.rows_in:,} messages ({share:.1%}) expressed no intent, usually {usual:.1%}."
    )
    if share > usual:
        title = "More messages of no intent than usual"
        advice = (
            "Read some of them: users may speak of something new, which the catalog needs an intent for "
            "(`personalization catalog suggest`), or a source sends other texts."
        )
    else:
        title = "Fewer messages of no intent than usual"
        advice = "See whether the catalog's intents or INTENT_KEEP changed, and read some messages that now have one."
    return _anomaly(run, figure.stage, title, evidence, advice, figure, (share, usual))


def _drifted(run: RunFigures, figure: Figure) -> Anomaly:
    usual = figure.expected.middle
    evidence = (
        f"The messages' vectors lie {figure.value:.3f} from the runs before (maximum mean discrepancy), "
        f"usually {usual:.3f}."
    )
    advice = (
        "Read some messages of the run: another language, channel or template? If the texts are as ever, "
        "see whether EMBEDDING_MODEL points to other weights."
    )
    return _anomaly(run, "embed", "Messages unlike those before", evidence, advice, figure, (figure.value, usual))


def _busy(run: RunFigures, figure: Figure) -> Anomaly:
    most, usual = run.busiest[figure.stage], float(np.exp(figure.expected.middle))
    evidence = f"The busiest user of the run left {most:,} {figure.stage} on one day, usually {usual:,.0f}."
    advice = "See whether it is a person: a script or a shared account teaches the ranker nothing. It can be erased."
    stage = "ingest" if figure.stage == "messages" else "ingest_events"
    return _anomaly(run, stage, BUSY, evidence, advice, figure, (most, usual))
