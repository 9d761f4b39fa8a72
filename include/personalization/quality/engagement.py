"""What users do with campaigns: over time, step by step, and whether they come back. Sums are the database's."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from scipy.stats import binomtest
from sqlalchemy import Engine, func, inspect, select

from personalization.schemas import DAY_MS
from personalization.stores.analytics import analytics_errors
from personalization.stores.tables import EventRecord, UserWeek

_FIRST_MONDAY = date(1969, 12, 29)  # of week 0


@dataclass(frozen=True)
class DayOfEvents:
    """Events of one kind on one day, which is UTC's."""

    day: date
    event: str
    count: int


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval by Wilson's score."""

    of: int
    have: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class CohortWeek:
    """Users of one first week, and how many of them did something so many weeks later."""

    first_week: date
    """Its Monday."""
    weeks_later: int
    users: int
    of: int

    @property
    def share(self) -> float:
        """Of the users of that first week."""
        return self.users / self.of


def events_by_day(engine: Engine, since: datetime, campaign_id: str | None = None) -> list[DayOfEvents]:
    """Events of each kind by day, of one campaign or of all, in order. Reads the index of these days alone."""
    day = EventRecord.timestamp // DAY_MS
    query = (
        select(day.label("day"), EventRecord.event, func.count().label("events"))
        .where(EventRecord.timestamp >= int(since.timestamp() * 1000))
        .group_by(day, EventRecord.event)
        .order_by(day, EventRecord.event)
    )
    if campaign_id is not None:
        query = query.where(EventRecord.campaign_id == campaign_id)
    with analytics_errors(), engine.connect() as connection:
        return [
            DayOfEvents(datetime.fromtimestamp(one.day * DAY_MS / 1000, UTC).date(), one.event, one.events)
            for one in connection.execute(query)
        ]


def share(have: int, of: int) -> Share | None:
    """`have` of `of`, with its interval (Wilson 1927, as SciPy has it); None of nothing."""
    if not of:
        return None
    found = binomtest(have, of).proportion_ci(method="wilson")
    return Share(of, have, have / of, float(found.low), float(found.high))


def cohorts(engine: Engine, weeks: int, now: datetime) -> list[CohortWeek]:
    """Users by the week in which they first did something, over the latest weeks; first weeks in order.

    One scan of an index over the rows of these users. None before the first run that knows of weeks.
    """
    this_week = (now.astimezone(UTC).date() - _FIRST_MONDAY).days // 7
    query = (
        select(UserWeek.first_week, UserWeek.week, func.count())
        .where(UserWeek.first_week > this_week - weeks, UserWeek.first_week <= this_week)
        .group_by(UserWeek.first_week, UserWeek.week)
        .order_by(UserWeek.first_week, UserWeek.week)
    )
    with analytics_errors(), engine.connect() as connection:
        if not inspect(connection).has_table(UserWeek.__tablename__):
            return []
        rows: Sequence[tuple[int, int, int]] = [(one[0], one[1], one[2]) for one in connection.execute(query)]
    size = {first: users for first, week, users in rows if week == first}
    return [
        CohortWeek(_FIRST_MONDAY + timedelta(weeks=first), week - first, users, size[first])
        for first, week, users in rows
        if week <= this_week
    ]
