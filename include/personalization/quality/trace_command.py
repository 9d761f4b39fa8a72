"""The command `trace`: where a recommendation comes from, for a person to read."""

import json
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from textwrap import shorten

from rich.console import Console
from rich.markup import escape

from personalization.quality.provenance import Source, Trace, TracedMessage, TracedRun, trace
from personalization.settings import Settings
from personalization.stores.analytics import open_read_only
from personalization.stores.mongo import MongoStore

_TEXT_CHARS = 160


def trace_stores(user_id: str, campaign_id: str, settings: Settings) -> Trace:
    """Trace in the stores of the settings.

    Raises:
        StoreError: the analytics database or MongoDB.
    """
    engine = open_read_only(settings)
    mongo = MongoStore.from_settings(settings)
    with closing(mongo.client):
        try:
            return trace(user_id, campaign_id, engine=engine, mongo=mongo)
        finally:
            engine.dispose()


def to_json(found: Trace) -> str:
    """All of it; moments in ISO 8601."""
    return json.dumps(asdict(found), indent=2, ensure_ascii=False, default=datetime.isoformat)


def show(found: Trace, console: Console) -> None:
    """The messages and events with the rows they stand in, then the runs with what each stage did."""
    console.print(f"[bold]{escape(found.campaign_id)}[/] for [bold]{escape(found.user_id)}[/]")
    if not found.messages and not found.events:
        console.print("Nothing the user said or did speaks for it: what others do is all there is.")
    for message in found.messages:
        _show_message(message, console)
    if left := found.messages_in_all - len(found.messages):
        console.print(f"… and {left:,} older messages")
    for event in found.events:
        console.print(f"\n{_time(event.at)}  [bold]{event.event}[/]")
        console.print(f"    {_place(event.source)}, run {event.run_id}", style="dim", markup=False, soft_wrap=True)
    if left := found.events_in_all - len(found.events):
        console.print(f"… and {left:,} older events")
    for run in found.runs:
        _show_run(run, console)


def _show_message(message: TracedMessage, console: Console) -> None:
    text = shorten(message.text, _TEXT_CHARS, placeholder=" …") if message.text else "(no longer in MongoDB)"
    console.print(f"\n{_time(message.said_at)}  “{escape(text)}”", highlight=False, soft_wrap=True)
    intents = ", ".join(
        f"{one.intent_id} {one.confidence:.2f}{'' if one.is_targeted else ' (not targeted)'}" for one in message.intents
    )
    console.print(f"    expresses {escape(intents)}", highlight=False, soft_wrap=True)
    console.print(f"    {_place(message.source)}, run {message.run_id}", style="dim", markup=False, soft_wrap=True)


def _show_run(run: TracedRun, console: Console) -> None:
    served = ", what is served is of it" if run.is_served else ""
    began = f", {_time(run.started_at)}" if run.started_at else ""
    code = next((f", version {one.code_version}" for one in run.stages if one.code_version), "")
    model = next((f", model {one.model}" for one in run.stages if one.model), "")
    console.print(
        f"\n[bold]Run {escape(run.run_id)}[/]: {run.status}{began}{code}{escape(model)}{served}", soft_wrap=True
    )
    for stage in run.stages:
        figures = (
            f"{stage.rows_in:,} in, {stage.rows_out:,} out, {stage.rejected:,} rejected, {stage.skipped:,} skipped"
        )
        retried = f", {stage.retries} retried" if stage.retries else ""
        error = f": {stage.error_type}" if stage.error_type else ""
        console.print(
            f"    {stage.stage:<19}{stage.status:<8} {figures}, {stage.seconds:.1f} s{retried}{error}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _place(source: Source | None) -> str:
    if source is None:
        return "source unknown"
    return f"row {source.row:,} of {source.uri}" if source.row is not None else source.uri


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
