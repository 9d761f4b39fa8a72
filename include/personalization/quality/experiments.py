"""Experiments: two policies, each shown to users of its own, side by side. Read from the events they left.

An event counts for the policy that it names. Users are what was split, so they are what the bootstrap draws.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats
from sqlalchemy import ColumnElement, Engine, Select, case, func, select

from personalization.errors import TooLittleFeedbackError
from personalization.resampling import Floats, Interval, around, resample
from personalization.settings import Settings
from personalization.stores.analytics import analytics_errors
from personalization.stores.tables import EventRecord

Metric = Literal["ctr", "clicks_per_user", "conversion_rate"]

LEARNED = "learned"
"""Name of all learned rankers together: each training makes one of its own, `learned-` and a digest."""
MIN_USERS = 20
"""Fewest users of a policy to compare it by."""
_METRICS: dict[Metric, str] = {
    "ctr": "clicks per impression",
    "clicks_per_user": "clicks per user",
    "conversion_rate": "share of users who convert",
}
_MISMATCH = 0.001
_POWER = 0.8
_FAR = 50
_DRAWS = 2000


class PolicyUsers(NamedTuple):
    """A policy and how many users it was shown to."""

    policy: str
    users: int


class Tally(NamedTuple):
    """Users of a policy who did the same."""

    policy: str
    impressions: int
    clicks: int
    conversions: int
    users: int


@dataclass(frozen=True)
class Arm:
    """What one policy reached."""

    policy: str
    users: int
    impressions: int
    clicks: int
    conversions: int
    metrics: dict[Metric, Interval]


@dataclass(frozen=True)
class Difference:
    """How far the treated policy is ahead of the control by a metric."""

    metric: Metric
    difference: Interval
    """Treated less control."""
    treated_is_better: float
    """Probability, as the share of the draws."""
    detectable: float
    """Difference, up or down, that so many users show with 80 % power at the 5 % level."""
    more_users: int | None
    """Users still to come until the present difference would show with that power; None where it shows already."""
    verdict: str


@dataclass(frozen=True)
class Experiment:
    """Control and treated side by side, with all there is to say against the comparison."""

    control: Arm
    treated: Arm
    crossed: int
    """Users who were shown both and are left out."""
    expected_share: float | None
    """Share of the users that the treated policy was to get; None where that is not known."""
    mismatch_p: float | None
    """Probability of so uneven a split by chance (chi-square, 1 degree of freedom)."""
    differences: list[Difference]
    warnings: list[str]


def family(policy: str) -> str:
    """The name that a policy is compared under."""
    return LEARNED if policy.startswith(f"{LEARNED}-") else policy


def policies_of(engine: Engine, since_ms: int, until_ms: int) -> list[PolicyUsers]:
    """The policies that were shown in [since, until), that with most users first: one pass over those events."""
    users = func.count(EventRecord.user_id.distinct()).label("users")
    name = _family_column()
    query = (
        select(name, users)
        .where(EventRecord.event == "impression", *_within(since_ms, until_ms))
        .group_by(name)
        .order_by(users.desc(), name)
    )
    with analytics_errors(), engine.connect() as connection:
        return [PolicyUsers(*row) for row in connection.execute(query)]


def tallies_of(engine: Engine, control: str, treated: str, since_ms: int, until_ms: int) -> tuple[list[Tally], int]:
    """What the users of both policies did in [since, until), and how many were shown both.

    One pass over those events; as many rows come back as there are different tallies.
    """
    users = _user_tallies(control, treated, since_ms, until_ms).cte("users")
    shown_both = select(users.c.user_id).group_by(users.c.user_id).having(func.count() > 1)
    columns = (users.c.policy, users.c.impressions, users.c.clicks, users.c.conversions)
    query = select(*columns, func.count()).where(users.c.user_id.not_in(shown_both)).group_by(*columns)
    with analytics_errors(), engine.connect() as connection:
        tallies = sorted(Tally(*row) for row in connection.execute(query))
        crossed = connection.execute(select(func.count()).select_from(shown_both.subquery())).scalar_one()
    return tallies, crossed


def _user_tallies(control: str, treated: str, since_ms: int, until_ms: int) -> Select[str, str, int, int, int]:
    """A row for each user and each of the two policies that was shown to them."""
    name = _family_column()

    def count(kind: str) -> ColumnElement[int]:
        return func.sum(case((EventRecord.event == kind, 1), else_=0))

    return (
        select(
            EventRecord.user_id,
            name,
            count("impression").label("impressions"),
            count("click").label("clicks"),
            count("conversion").label("conversions"),
        )
        .where(name.in_((control, treated)), *_within(since_ms, until_ms))
        .group_by(EventRecord.user_id, name)
        .having(count("impression") > 0)
    )


def _family_column() -> ColumnElement[str]:
    is_learned = func.substr(EventRecord.policy, 1, len(LEARNED) + 1) == f"{LEARNED}-"
    return case((is_learned, LEARNED), else_=EventRecord.policy).label("policy")


def _within(since_ms: int, until_ms: int) -> tuple[ColumnElement[bool], ...]:
    moment = EventRecord.timestamp
    return moment >= since_ms, moment < until_ms, EventRecord.policy.is_not(None)


def policies_among(events: Iterable[tuple[str, str, str | None]]) -> list[PolicyUsers]:
    """As `policies_of`, of events as (user, kind, policy)."""
    shown = {(family(policy), user) for user, kind, policy in events if policy and kind == "impression"}
    counts = Counter(policy for policy, _ in shown)
    return [PolicyUsers(*one) for one in sorted(counts.items(), key=lambda one: (-one[1], one[0]))]


def tallies_among(events: Iterable[tuple[str, str, str | None]], control: str, treated: str) -> tuple[list[Tally], int]:
    """As `tallies_of`, of events as (user, kind, policy)."""
    counts: dict[str, dict[str, Counter[str]]] = {control: {}, treated: {}}
    for user, kind, policy in events:
        if policy and family(policy) in counts:
            counts[family(policy)].setdefault(user, Counter())[kind] += 1
    shown = {
        policy: {user: kinds for user, kinds in users.items() if kinds["impression"]}
        for policy, users in counts.items()
    }
    crossed = shown[control].keys() & shown[treated].keys()
    alike = Counter(
        (policy, kinds["impression"], kinds["click"], kinds["conversion"])
        for policy, users in shown.items()
        for user, kinds in users.items()
        if user not in crossed
    )
    return sorted(Tally(*what, users) for what, users in alike.items()), len(crossed)


class Request(NamedTuple):
    """What to compare; what is not named comes from the settings, and from who has most users."""

    control: str | None = None
    treated: str | None = None
    share: float | None = None
    """Share of the users that the treated policy was to get."""


NOTHING_NAMED = Request()


def choose_pair(policies: Sequence[PolicyUsers], request: Request, settings: Settings) -> tuple[str, str, float | None]:
    """Control, treated, and its share of the users where that is known.

    What is named; else EXPERIMENT_RANKER as the treated one; else the policies with most users, the first as control.

    Raises:
        TooLittleFeedbackError: there are not two to compare.
    """
    known = {one.policy: one.users for one in policies}
    control, treated, share = request
    for name in (control, treated):
        if name is not None and name not in known:
            raise TooLittleFeedbackError(
                f"no impression of the policy {name}; there are: {', '.join(known) or 'none'}. Send back the `policy` "
                f"of each answer with its events"
            )
    planned = LEARNED if settings.experiment_ranker == "auto" else settings.experiment_ranker
    if treated is None and settings.experiment_name and planned in known and planned != control:
        treated = planned
    control = control or next((name for name in known if name != treated), None)
    treated = treated or next((name for name in known if name != control), None)
    if control is None or treated is None or control == treated:
        raise TooLittleFeedbackError(
            f"two policies are needed to compare, and the impressions name {', '.join(known) or 'none'}. Set "
            f"EXPERIMENT_NAME and EXPERIMENT_RANKER, and send back the `policy` of each answer with its events"
        )
    if share is None and settings.experiment_name and treated == planned:
        share = settings.experiment_share
    return control, treated, share


def compare_stored(
    engine: Engine, settings: Settings, since_ms: int, until_ms: int, request: Request = NOTHING_NAMED
) -> Experiment:
    """Compare two policies by the stores' events of [since, until): three queries, each one pass over those.

    Raises:
        TooLittleFeedbackError: there are not two policies, each with enough users.
    """
    control, treated, share = choose_pair(policies_of(engine, since_ms, until_ms), request, settings)
    tallies, crossed = tallies_of(engine, control, treated, since_ms, until_ms)
    return compare(tallies, control, treated, crossed=crossed, expected_share=share)


def compare_events(
    events: Sequence[tuple[str, str, str | None]], settings: Settings, request: Request = NOTHING_NAMED
) -> Experiment:
    """The same by events as (user, kind, policy).

    Raises:
        TooLittleFeedbackError: there are not two policies, each with enough users.
    """
    control, treated, share = choose_pair(policies_among(events), request, settings)
    tallies, crossed = tallies_among(events, control, treated)
    return compare(tallies, control, treated, crossed=crossed, expected_share=share)


def compare(
    tallies: Sequence[Tally], control: str, treated: str, *, crossed: int = 0, expected_share: float | None = None
) -> Experiment:
    """Compare the treated policy with the control.

    Intervals: percentile bootstrap over users. Split: chi-square of the users against `expected_share`, an alarm below
    0.001 (Fabijan et al. 2019). Detectable difference: (z₀.₉₇₅ + z₀.₈) standard errors, which shrink with the root of
    the users. O(draws x different tallies).

    Raises:
        TooLittleFeedbackError: a policy was shown to too few users.
    """
    sums, alike = {}, {}
    for name in (control, treated):
        rows = [one for one in tallies if one.policy == name]
        alike[name] = np.asarray([one.users for one in rows], dtype=np.int64)
        sums[name] = np.asarray(
            [(1, one.impressions, one.clicks, one.conversions, one.conversions > 0) for one in rows], dtype=float
        ).reshape(-1, 5)
        if alike[name].sum() < MIN_USERS:
            raise TooLittleFeedbackError(
                f"the policy {name} was shown to {alike[name].sum()} users who saw it alone, which takes {MIN_USERS}"
            )
    totals = {name: alike[name] @ sums[name] for name in sums}
    drawn = {name: _rates(resample(sums[name], alike[name], draws=_DRAWS, seed=seed)) for seed, name in enumerate(sums)}
    rates = {name: _rates(totals[name][None, :]) for name in sums}
    arms = {name: _arm(name, totals[name], rates[name], drawn[name]) for name in sums}
    users = arms[control].users + arms[treated].users
    mismatch = None if expected_share is None else _mismatch(arms[control].users, arms[treated].users, expected_share)
    differences = [
        _difference(
            metric,
            float(rates[treated][metric][0] - rates[control][metric][0]),
            drawn[treated][metric] - drawn[control][metric],
            users,
            treated,
        )
        for metric in _METRICS
    ]
    return Experiment(
        control=arms[control],
        treated=arms[treated],
        crossed=crossed,
        expected_share=expected_share,
        mismatch_p=mismatch,
        differences=differences,
        warnings=_warnings(arms[control], arms[treated], crossed, expected_share, mismatch),
    )


def _rates(totals: Floats) -> dict[Metric, Floats]:
    """The metrics of (draws, 5) totals of users, impressions, clicks, conversions and converting users."""
    users, impressions, clicks, _, converting = totals.T
    return {"ctr": clicks / impressions, "clicks_per_user": clicks / users, "conversion_rate": converting / users}


def _arm(name: str, totals: Floats, rates: dict[Metric, Floats], drawn: dict[Metric, Floats]) -> Arm:
    users, impressions, clicks, conversions = (int(one) for one in totals[:4])
    metrics = {metric: around(rates[metric][0], drawn[metric]) for metric in _METRICS}
    return Arm(name, users, impressions, clicks, conversions, metrics)


def _mismatch(control: int, treated: int, share: float) -> float:
    total = control + treated
    return float(stats.chisquare([control, treated], [total * (1 - share), total * share]).pvalue)


def _difference(metric: Metric, found: float, drawn: Floats, users: int, treated: str) -> Difference:
    interval = around(found, drawn)
    detectable = float((stats.norm.ppf(0.975) + stats.norm.ppf(_POWER)) * drawn.std(ddof=1))
    what = _METRICS[metric]
    more = None
    if interval.low > 0 or interval.high < 0:
        verdict = f"{treated} is {'ahead' if found > 0 else 'behind'} by {abs(found):.4f} {what}"
    elif detectable == 0:
        verdict = f"no difference in {what} at all"
    else:
        needed = users * (detectable / found) ** 2 if found else np.inf
        more = int(np.ceil(max(needed - users, 1))) if needed <= _FAR * users else None
        hint = (
            f"about {more:,} more users would settle it if the difference stays at {found:+.4f}"
            if more is not None
            else f"next to no difference so far; one of {detectable:.4f} would show with as many users"
        )
        verdict = f"not decided yet in {what}: {hint}"
    better = float((drawn > 0).mean() + (drawn == 0).mean() / 2)
    return Difference(metric, interval, better, detectable, more, verdict)


def _warnings(control: Arm, treated: Arm, crossed: int, share: float | None, mismatch: float | None) -> list[str]:
    found = []
    if mismatch is None:
        found.append("the split was not checked: say which share of the users the second policy was to get")
    elif share is not None and mismatch < _MISMATCH:
        got = treated.users / (control.users + treated.users)
        found.append(
            f"the split is not what was set: {treated.policy} has {got:.1%} of the users instead of {share:.1%} "
            f"(p = {mismatch:.1g}). Do not trust the comparison before it is known why; events of before the "
            f"experiment, or that only one policy's clients send, are the first to look for"
        )
    if crossed:
        found.append(f"{crossed:,} users were shown both policies and are left out")
    return found
