"""What the audits of the stores found, as the dashboard shows it. Each report is one bounded query."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Engine, inspect, select

from personalization.stores.analytics import analytics_errors
from personalization.stores.tables import AuditFinding, AuditRun, AuditSample

Status = Literal["clean", "repaired", "drift"]


@dataclass(frozen=True)
class Audit:
    """One audit of the stores."""

    audit_id: str
    started_at: datetime
    finished_at: datetime
    status: Status
    repair: bool
    findings: int
    """Kinds of drift."""
    drift: int
    """Cases found."""
    left: int
    """Cases at the end."""
    in_flux: int
    """Messages of a run at work, which were not compared."""
    compared: dict[str, dict[str, int]]
    """Rows read, by store and kind of row."""

    @property
    def seconds(self) -> float:
        """How long it took, a repair included."""
        return (self.finished_at - self.started_at).total_seconds()


@dataclass(frozen=True)
class Case:
    """One case of a finding."""

    item: str
    expected: str | None
    """None for what should not be there."""
    found: str | None
    """None for what is missing."""


@dataclass(frozen=True)
class Finding:
    """A kind of drift that an audit found."""

    kind: str
    store: str
    severity: Literal["error", "warning"]
    title: str
    meaning: str
    advice: str
    repairable: bool
    count: int
    left: int | None
    """Behind the repair; none where none was tried."""
    cases: list[Case]
    """Some of them."""

    @property
    def is_left(self) -> bool:
        """Whether there is drift of the kind at the end of the audit."""
        return self.left != 0


def latest_audits(engine: Engine, limit: int) -> list[Audit]:
    """The latest audits, the newest first; none before the first, or where the database is of an earlier version."""
    query = select(AuditRun.__table__).order_by(AuditRun.started_at.desc()).limit(limit)
    with analytics_errors(), engine.connect() as connection:
        if not inspect(connection).has_table(AuditRun.__tablename__):
            return []
        return [Audit(**row) for row in connection.execute(query).mappings()]


def findings_of(engine: Engine, audit_id: str) -> list[Finding]:
    """What an audit found: what is left first, errors before warnings. Two queries."""
    findings = select(AuditFinding.__table__).where(AuditFinding.audit_id == audit_id)
    samples = (
        select(AuditSample.__table__)
        .where(AuditSample.audit_id == audit_id)
        .order_by(AuditSample.kind, AuditSample.position)
    )
    with analytics_errors(), engine.connect() as connection:
        cases: dict[str, list[Case]] = {}
        for row in connection.execute(samples).mappings():
            cases.setdefault(row["kind"], []).append(Case(row["item"], row["expected"], row["found"]))
        found = [
            Finding(**_without(row, "audit_id"), cases=cases.get(row["kind"], []))
            for row in connection.execute(findings).mappings()
        ]
    return sorted(found, key=lambda one: (not one.is_left, one.severity, one.store, one.title))


def _without(row: Any, name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}
