"""Events: what users did with campaigns, from files and from the API, to MongoDB and the analytics database."""

from collections.abc import Sequence

import structlog
from upath import UPath

from personalization.pipeline.lineage import StageReport, code_version, forget_reports
from personalization.pipeline.taking import Taker
from personalization.reading import Row
from personalization.schemas import Event
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.mongo import Document, MongoStore, Origin, event_document

log = structlog.get_logger(__name__)


def ingest_events(
    report: StageReport,
    *,
    files: Sequence[UPath],
    skip_bad_files: bool,
    mongo: MongoStore,
    analytics: AnalyticsStore,
    staging: Staging,
    settings: Settings,
) -> None:
    """Take the files' events, and those in MongoDB that no published run has taken; set the table `events`.

    Per 1,000 rows of a file: one look-up of users, 20 of ids, and one bulk write where anything is new. Per 1,000
    events that wait in MongoDB: one read and one write. Per 1,000 events of the run: one read, one look-up, one
    transaction.

    Raises:
        InputError: a file cannot be taken, or too many of its rows; see `Taker.take`.
        StoreError: MongoDB or the analytics database.
    """
    forget_reports(staging, report.run_id, first_stage="detect_intents")
    mongo.ensure_schema()
    # Before the first event is of this run: what it leaves behind is then found by the next.
    mongo.open_run(report.run_id)
    taker = EventTaker(report, mongo, settings)
    from_files = sum(len(events) for events in taker.take(files, skip_bad_files=skip_bad_files))
    mongo.claim_events(report.run_id)
    for documents in mongo.events_of(report.run_id):
        erased = mongo.erased_among({one["user_id"] for one in documents})
        rows = [_row(one) for one in documents if one["user_id"] not in erased]
        if rows:
            analytics.set_events(rows)
        report.rows_out += len(rows)
    waiting = max(0, report.rows_out - from_files)  # an overlapping run may have taken some away
    report.rows_in += waiting
    report.details["waiting"] = waiting
    if not report.rows_out:
        log.info("no new events")


class EventTaker(Taker[Event]):
    """Takes events. Campaigns may be unknown: one may have left the catalog."""

    kind = "event"

    def parse(self, row: Row) -> Event:
        """Validate the event."""
        return Event.of_row(row.value, of_strings=row.of_strings)

    def identify(self, record: Event) -> str:
        """Given or derived."""
        return record.event_id

    def document(self, record: Event, origin: Origin) -> Document:
        """As in the collection `events`."""
        return event_document(record, origin)

    @property
    def rules(self) -> str:
        """The platform's version."""
        return code_version(self._settings)


def _row(document: Document) -> dict[str, object]:
    return {
        "event_id": document["_id"],
        "user_id": document["user_id"],
        "campaign_id": document["campaign_id"],
        "event": document["event"],
        "timestamp": int(document["timestamp"].timestamp() * 1000),
        "position": document["position"],
        "propensity": document["propensity"],
        "policy": document["policy"],
        "run_id": document["run_id"],
    }
