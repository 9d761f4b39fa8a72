"""The audit as a whole: compare, repair, compare again, and keep what was found."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import structlog
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from personalization.audit.checks import find_drift, findings_of
from personalization.audit.evidence import Evidence, Reader
from personalization.audit.findings import KINDS, AuditReport, Finding
from personalization.audit.repair import repair as mend
from personalization.audit.scratch import Scratch
from personalization.erasure.erase import erase
from personalization.erasure.places import Places
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.together import Stores

KEPT = 500
"""Audits that are kept, some months of them."""

log = structlog.get_logger(__name__)


def audit(
    stores: Stores,
    settings: Settings,
    *,
    places: Places,
    repair: bool = False,
    audit_id: str | None = None,
    progress: Callable[[str], object] = log.info,
) -> AuditReport:
    """Compare all stores by set; with `repair`, mend what can be mended and compare again. Keeps the outcome.

    Reads every id, edge and vector once, 1,000 to 10,000 at a time, and as often again behind a repair. Memory does
    not grow with their number; the disk takes some hundred bytes a row.

    Raises:
        StoreError: a store does not answer: nothing is known then.
        PersonalizationError: a stage of the repair failed; what was found before it is kept.
    """
    started_at = datetime.now(UTC)
    audit_id = audit_id or f"audit__{started_at:%Y-%m-%dT%H:%M:%S}_{uuid.uuid4().hex[:8]}"
    stores.analytics.ensure_schema()

    def report(evidence: Evidence, findings: Sequence[Finding]) -> AuditReport:
        left = sum(one.count if one.left is None else one.left for one in findings)
        done = AuditReport(
            audit_id=audit_id,
            started_at=started_at,
            finished_at=datetime.now(UTC),
            status="drift" if left else "repaired" if findings else "clean",
            repair=repair,
            compared=evidence.compared,
            in_flux=evidence.in_flux,
            findings=findings,
        )
        record(done, stores.analytics)
        return done

    with Scratch.open() as scratch:
        evidence = _examine(scratch, stores, settings, repair, progress)
        found = findings_of(scratch)
        first = report(evidence, found)
        if not repair or not found:
            return first
        progress("repair")
        mend(scratch, stores, settings, erase=lambda user_id: erase(user_id, places))
    with Scratch.open() as scratch:
        evidence = _examine(scratch, stores, settings, repair, progress)
        return report(evidence, _beside(found, findings_of(scratch)))


def record(report: AuditReport, analytics: AnalyticsStore) -> None:
    """Set the audit's rows; those of the oldest audits go."""
    findings = report.findings
    audit_id = report.audit_id
    analytics.record_audit(
        {
            "audit_id": audit_id,
            "started_at": report.started_at,
            "finished_at": report.finished_at,
            "status": report.status,
            "repair": report.repair,
            "findings": len(findings),
            "drift": sum(one.count for one in findings),
            "left": sum(one.count if one.left is None else one.left for one in findings),
            "in_flux": report.in_flux,
            "compared": report.compared,
        },
        [
            {
                "audit_id": audit_id,
                "kind": one.kind.name,
                "store": one.kind.store,
                "severity": one.kind.severity,
                "title": one.kind.title,
                "meaning": one.kind.meaning,
                "advice": one.kind.advice,
                "repairable": one.kind.remedy is not None,
                "count": one.count,
                "left": one.left,
            }
            for one in findings
        ],
        [
            {"audit_id": audit_id, "kind": one.kind.name, "position": position, **vars(sample)}
            for one in findings
            for position, sample in enumerate(one.samples)
        ],
        keep=KEPT,
    )


def audit_at(settings: Settings, console: Console, *, repair: bool) -> AuditReport:
    """Audit the stores of the settings, with a line that says what is read."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Stores.of(settings) as stores,
        Places.of(settings) as places,
        Progress(*columns, console=console, transient=True) as shown,
    ):
        line = shown.add_task("audit", total=None)
        return audit(
            stores,
            settings,
            places=places,
            repair=repair,
            progress=lambda step: shown.update(line, description=f"audit: {step}"),
        )


def show(report: AuditReport, console: Console) -> None:
    """The audit as tables."""
    read = "; ".join(
        f"{store} {', '.join(f'{rows:,} {what}' for what, rows in kinds.items())}"
        for store, kinds in report.compared.items()
    )
    seconds = (report.finished_at - report.started_at).total_seconds()
    console.print(f"Read in {seconds:.1f} s: {read}.", highlight=False)
    if report.in_flux:
        console.print(f"{report.in_flux:,} messages of a run at work were not compared.", highlight=False)
    for one in report.findings:
        colour = "red" if one.kind.severity == "error" else "yellow"
        outcome = "" if one.left is None else f", {one.left:,} left" if one.left else ", mended"
        console.print(
            f"\n[{colour}]{one.kind.severity}[/] {one.kind.store}: [b]{one.kind.title}[/] ({one.count:,}{outcome})"
        )
        console.print(f"{one.kind.meaning} {one.kind.advice}", highlight=False)
        table = Table("id", "should be", "is", box=None, padding=(0, 2, 0, 2))
        for sample in one.samples:
            table.add_row(*(escape(text) if text else "—" for text in (sample.item, sample.expected, sample.found)))
        console.print(table)
        if one.count > len(one.samples):
            console.print(f"  … and {one.count - len(one.samples):,} more", highlight=False)
    words = {"clean": "[green]The stores agree.[/]", "repaired": "[green]Mended: the stores agree.[/]"}
    console.print("\n" * bool(report.findings) + words.get(report.status, "[red]The stores do not agree.[/]"))


def _examine(
    scratch: Scratch, stores: Stores, settings: Settings, repair: bool, progress: Callable[[str], object]
) -> Evidence:
    reader = Reader(scratch, stores, settings, repairs=repair)
    for step in reader.steps():
        progress(f"reading {step}")
    for step in find_drift(reader.evidence):
        progress(f"comparing: {step}")
    return reader.evidence


def _beside(found: Sequence[Finding], left: Sequence[Finding]) -> list[Finding]:
    """What was found, with how much of it is left; what came up only behind the repair is as it is then."""
    rest = {one.kind.name: one for one in left}
    before = {one.kind.name for one in found}
    return [
        *(replace(one, left=rest[one.kind.name].count if one.kind.name in rest else 0) for one in found),
        *(replace(rest[name], left=rest[name].count) for name in KINDS if name in rest and name not in before),
    ]
