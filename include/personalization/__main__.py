"""Conversations in, campaign recommendations out: run the pipeline, manage the embedded local stack."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import structlog
import typer
from rich.console import Console
from rich.markup import escape

from personalization.errors import PersonalizationError

if TYPE_CHECKING:
    from personalization.settings import Settings

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
stack_app = typer.Typer(help="The embedded local stack: stores, Airflow, API and dashboard.", no_args_is_help=True)
catalog_app = typer.Typer(help="The catalog of intents and campaigns: check it, propose one.", no_args_is_help=True)
experiment_app = typer.Typer(help="What experiments and exploration say, from the events.", no_args_is_help=True)
keys_app = typer.Typer(help="Keys of those who may ask the API.", no_args_is_help=True)
app.add_typer(stack_app, name="stack")
app.add_typer(catalog_app, name="catalog")
app.add_typer(experiment_app, name="experiment")
app.add_typer(keys_app, name="keys")

console = Console()

Model = Annotated[
    str | None,
    typer.Option(
        help="Embedding model; EMBEDDING_MODEL if not given, and where that is not set either, a small one at hand.",
        show_default=False,
    ),
]
OnlyStores = Annotated[bool, typer.Option("--only-stores", help="Without Airflow, API and dashboard.")]


@app.command()
def run(
    path: Annotated[str | None, typer.Argument(help="Conversations: a JSON array or NDJSON, plain or gzipped.")] = None,
    events: Annotated[str | None, typer.Option(help="Events: CSV, a JSON array or NDJSON, plain or gzipped.")] = None,
) -> None:
    """Take conversations, events or both through all stages without Airflow; print the summary as JSON.

    Exit status 0 where every stage succeeded, 1 otherwise.
    """
    if path is None and events is None:
        raise typer.BadParameter("name a file of conversations, one of --events, or both")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.pipeline.run import run_pipeline
    from personalization.quality.anomalies import record_anomalies
    from personalization.settings import get_settings
    from personalization.stores.analytics import analytics_store

    summary = run_pipeline(path, events_path=events)
    with analytics_store(get_settings()) as analytics:
        record_anomalies(analytics, [summary["run_id"]])
    typer.echo(json.dumps(summary, indent=2, default=str))
    raise typer.Exit(0 if summary["status"] == "success" else 1)


@app.command()
def erase(user_id: Annotated[str, typer.Argument(help="The user, as named in the conversations.")]) -> None:
    """Erase a person from every store; print the receipt as JSON. May be repeated.

    Exit status 0 where nothing is left anywhere, 1 where the rest is queued for the DAG `maintenance`.
    """
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.erasure.erase import erase as erase_user
    from personalization.erasure.places import Places
    from personalization.settings import get_settings

    with Places.of(get_settings()) as places:
        receipt = erase_user(user_id, places)
    typer.echo(receipt.model_dump_json(indent=2))
    raise typer.Exit(0 if receipt.status == "erased" else 1)


@app.command()
def trace(
    user_id: Annotated[str, typer.Argument(help="The user, as named in the conversations.")],
    campaign_id: Annotated[str, typer.Argument(help="A campaign that was recommended.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Walk from a recommendation back to the user's messages and events, their source rows, and the runs."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.quality.trace_command import show, to_json, trace_stores
    from personalization.settings import get_settings

    found = trace_stores(user_id, campaign_id, get_settings())
    if as_json:
        typer.echo(to_json(found))
    else:
        show(found, console)


@app.command()
def audit(
    repair: Annotated[bool, typer.Option("--repair", help="Make anew from MongoDB what has drifted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Compare MongoDB, Milvus, Neo4j, the analytics database and Redis, by set.

    Exit status 0 only where they agree, in the end; 1 where drift is left.
    """
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.audit.command import audit_at, show
    from personalization.settings import get_settings

    report = audit_at(get_settings(), Console(stderr=True), repair=repair)
    if as_json:
        typer.echo(json.dumps(report.plain(), indent=2, ensure_ascii=False))
    else:
        show(report, console)
    raise typer.Exit(1 if report.status == "drift" else 0)


@app.command()
def reembed(
    model: Annotated[
        str | None,
        typer.Option(help="What to move to: a hub name, a folder, or package:NAME.", show_default=False),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(min=8, max=32768, help="Its dimensions, zero-padded; as now if not given.")
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Move back to the former model, which is kept.")] = False,
    finish: Annotated[bool, typer.Option("--finish", help="Drop the vectors beside those that are served.")] = False,
    min_overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of nearest messages that stay the same.")
    ] = 0.1,
    max_intent_loss: Annotated[
        float, typer.Option(min=0, max=1, help="Most accuracy to lose on the catalog's examples.")
    ] = 0.05,
    max_ndcg_loss: Annotated[float, typer.Option(min=0, max=1, help="Most NDCG@10 to lose on past weeks.")] = 0.02,
) -> None:
    """Move everything that is served to another embedding model: fill, check, swap. Prints the check as JSON.

    What is served goes on being served until the check holds. May be killed and repeated; daily runs may go on.
    """
    if sum((model is not None, rollback, finish)) != 1:
        raise typer.BadParameter("name a --model, or say --rollback or --finish")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.migration.run import drop_former, migrate, roll_back
    from personalization.migration.verify import Bounds
    from personalization.settings import get_settings

    bounds = Bounds(min_overlap, max_intent_loss, max_ndcg_loss)
    settings = get_settings()
    if finish:
        done = drop_former(settings)
    elif model is not None:
        done = migrate(model, dim, settings, bounds)
    else:
        done = roll_back(settings, bounds)
    typer.echo(json.dumps(done, indent=2))


@app.command()
def anomalies(
    days: Annotated[int, typer.Option(min=1, max=400, help="Of so many days back.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Every figure, as JSON.")] = False,
) -> None:
    """Show what was odd: of runs and of the API, the newest first. Exit status 1 where there are errors."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.quality.command import recent, show
    from personalization.settings import get_settings

    found = recent(get_settings(), days)
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    else:
        show(found, console)
    raise typer.Exit(1 if any(one["severity"] == "error" for one in found) else 0)


@app.command()
def evaluate(
    messages: Annotated[Path, typer.Option(help="Messages: JSON array or NDJSON, plain or gzipped.")],
    events: Annotated[Path, typer.Option(help="Events: CSV, JSON array or NDJSON, plain or gzipped.")],
    catalog: Annotated[Path, typer.Option(help="Folder of the catalog. Campaigns may come without intents.")],
    split_at: Annotated[str, typer.Option(help="First split: ISO 8601. Policies know only what lies before it.")],
    every: Annotated[str | None, typer.Option(help="Split again so often, such as 7d or 12h.")] = None,
    horizon: Annotated[str | None, typer.Option(help="How far behind a split counts, such as 7d. To the end.")] = None,
    until: Annotated[str | None, typer.Option(help="No horizon ends behind it: ISO 8601. The last event.")] = None,
    task: Annotated[str, typer.Option(help="new: campaigns new to the user; any: all.")] = "new",
    policies: Annotated[str | None, typer.Option(help="Some of them, by comma. All but single ablations.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for a picture, a table and all figures.")] = None,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every figure with its interval, as JSON.")] = False,
) -> None:
    """Replay anybody's data: what would each policy have shown, and what did users then engage with?

    Needs no running stack. At each split only what lies before it is known.
    """
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.evaluation.command import evaluate_files, print_report

    report = evaluate_files(
        messages=messages,
        events=events,
        catalog=catalog,
        split_at=split_at,
        every=every,
        horizon=horizon,
        until=until,
        task=task,
        policies=[one.strip() for one in policies.split(",")] if policies else None,
        output=output,
        settings=_settings_with(model),
    )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        print_report(report, console)


@app.command()
def classify(
    catalog: Annotated[
        Path,
        typer.Option(help="Folder or file of the catalog, or a CSV with `text` and `intent`, `label` or `category`."),
    ],
    examples_per_intent: Annotated[
        int | None, typer.Option(min=1, help="Learn from so many examples of each intent, drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of that draw.")] = 0,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Say which intents the messages of standard input express: NDJSON with `message`, or a JSON string a line.

    Needs no running stack. A line that is no message is reported and left out; the exit status is then 1.
    """
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.understanding.command import MessageReader, intents_at, show

    reader = MessageReader(intents_at(catalog, examples_per_intent, seed), _settings_with(model))
    refused: list[int] = []

    def refuse(line: int, problem: str) -> None:
        refused.append(line)
        typer.echo(f"standard input:{line}: {problem}", err=True)

    answers = reader.answers(sys.stdin.buffer, refuse)
    if as_json:
        for answer in answers:
            typer.echo(json.dumps(answer, ensure_ascii=False))
    else:
        show(answers, console)
    if refused:
        typer.echo(f"{len(refused):,} lines were refused", err=True)
        raise typer.Exit(1)


@app.command()
def demo(
    input_path: Annotated[Path | None, typer.Option("--input", help="Your own file instead of the sample.")] = None,
    events: Annotated[
        Path | None, typer.Option(help="Your own events; the sample's where neither file is named.")
    ] = None,
) -> None:
    """Start the stack if need be, run the DAG on the files, and show recommendations."""
    from personalization.local.config import StackConfig
    from personalization.local.demo import SAMPLE, SAMPLE_EVENTS, run_demo
    from personalization.local.stack import Stack

    stack = Stack(StackConfig())
    stack.start(console.print)
    if input_path is None and events is None:
        events = SAMPLE_EVENTS
    run_demo(stack, input_path or SAMPLE, console, events_path=events)


@stack_app.command()
def start(only_stores: OnlyStores = False) -> None:
    """Bring up what is not running; wait until everything answers."""
    from personalization.local.config import StackConfig
    from personalization.local.stack import Stack

    Stack(StackConfig(), only_stores=only_stores).start(console.print)


@stack_app.command()
def stop() -> None:
    """Stop every process; the data stay."""
    from personalization.local.config import StackConfig
    from personalization.local.stack import Stack

    stopped = Stack(StackConfig()).stop()
    console.print("stopped; the data stay in .local/" if stopped else "nothing was running")


@stack_app.command()
def status() -> None:
    """Show every process. Exit status 1 if one has died."""
    from rich.table import Table

    from personalization.local.config import StackConfig
    from personalization.local.stack import Stack

    states = Stack(StackConfig()).states()
    table = Table("service", "state", "port", "since", "log", box=None)
    for one in states:
        colour = "green" if one.running else "red" if one.crashed else "dim"
        table.add_row(one.name, f"[{colour}]{one.state}[/]", str(one.port or ""), one.description, str(one.log))
    console.print(table)
    raise typer.Exit(1 if any(one.crashed for one in states) else 0)


@stack_app.command()
def logs(
    service: Annotated[str | None, typer.Argument(help="One service; all where none is named.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written.")] = False,
) -> None:
    """Show the end of the logs."""
    from personalization.local.config import StackConfig
    from personalization.local.stack import Stack

    stack = Stack(StackConfig())
    names = [one.name for one in stack.services]
    if service is not None and service not in names:
        raise typer.BadParameter(f"no service {service!r}; there are: {', '.join(names)}")
    files = [str(stack.log_file(name)) for name in ([service] if service else names) if stack.log_file(name).exists()]
    if not files:
        console.print("no logs yet; `make demo` starts the stack")
        return
    subprocess.run([shutil.which("tail") or "tail", *(["-F"] if follow else ["-n", "20"]), *files], check=False)  # noqa: S603


@stack_app.command()
def reset(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Stop the stack and delete all its data."""
    from personalization.local.config import StackConfig
    from personalization.local.stack import Stack

    stack = Stack(StackConfig())
    if not stack.config.root.exists():
        console.print("nothing to delete")
        return
    if not yes:
        typer.confirm(f"Delete {stack.config.root} with all messages, vectors, graphs and runs in it?", abort=True)
    stack.reset()
    console.print("deleted")


@catalog_app.command()
def check(
    path: Annotated[Path | None, typer.Argument(help="Folder or file of the catalog; CATALOG_PATH if none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail as well.")] = False,
    model: Model = None,
) -> None:
    """Find what keeps campaigns from users, or messages from their intents.

    Exit status 1 where there are errors, 0 where there are none or only warnings.
    """
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.catalog.check import check_folder, show

    settings = _settings_with(model)
    report = check_folder(path or settings.catalog_path, settings)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        show(report, console)
    raise typer.Exit(1 if report.count("error") or (strict and report.findings) else 0)


@catalog_app.command("suggest")
def suggest_catalog(
    path: Annotated[str, typer.Argument(help="Conversations, as `run` takes them.")],
    out: Annotated[Path | None, typer.Option(help="File to write; printed if none.", show_default=False)] = None,
    min_size: Annotated[
        int | None,
        typer.Option(min=2, help="Fewest messages of an intent; 10, or 0.25 % if that is more, if not given."),
    ] = None,
    max_intents: Annotated[int, typer.Option(min=1, help="Most intents, largest first.")] = 50,
    model: Model = None,
) -> None:
    """No catalog yet? Propose intents, with examples, out of messages that are alike: a YAML file to edit."""
    if out is not None and out.exists():
        raise typer.BadParameter(f"{out} exists; remove it or name another file", param_hint="--out")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.encoder import get_encoder
    from personalization.reading import locate
    from personalization.understanding.suggest import read_messages, suggest, to_yaml

    settings = _settings_with(model)
    messages = read_messages(locate(path), settings.max_message_chars)
    for reason, count in messages.refused.most_common(5):
        typer.echo(f"{count:,} rows are left out: {reason}", err=True)
    encoder = get_encoder(settings.embedding_model, settings.embedding_dim)
    found = suggest(path, messages, encoder.encode, min_size=min_size, max_intents=max_intents)
    if out is None:
        typer.echo(to_yaml(found), nl=False)
        return
    out.write_text(to_yaml(found), encoding="utf-8")
    typer.echo(
        f"{out}: {len(found.proposals)} intents that hold {found.coverage:.0%} of the messages; it says what next"
    )


Since = Annotated[str | None, typer.Option(help="Only events of this moment and later: ISO 8601.")]
Until = Annotated[str | None, typer.Option(help="Only events of before this moment: ISO 8601.")]


@experiment_app.command("report")
def report_experiment(
    events: Annotated[
        Path | None, typer.Option(help="Events: CSV, JSON array or NDJSON, plain or gzipped. The stores' if none.")
    ] = None,
    policy_a: Annotated[str | None, typer.Option(help="The control; `learned` for all learned rankers.")] = None,
    policy_b: Annotated[str | None, typer.Option(help="The policy that is tried.")] = None,
    share: Annotated[float | None, typer.Option(help="Share of users B was to get. EXPERIMENT_SHARE.")] = None,
    since: Since = None,
    until: Until = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every figure with its interval, as JSON.")] = False,
) -> None:
    """Compare two policies, each shown to users of its own: is one better, and is that decided yet?

    Without names: EXPERIMENT_RANKER, or else the two policies with most users. Decide on a day before you look:
    looking every day until an interval leaves out 0 finds differences that are not there.
    """
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.evaluation.experiments import plain, print_experiment, report
    from personalization.quality.experiments import Request
    from personalization.settings import get_settings

    found = report(events, get_settings(), Request(policy_a, policy_b, share), since=since, until=until)
    if as_json:
        typer.echo(json.dumps(plain(found), indent=2))
    else:
        print_experiment(found, console)


@experiment_app.command("compare")
def compare_policies(
    events: Annotated[Path, typer.Option(help="Events: CSV, JSON array or NDJSON, plain or gzipped.")],
    policy: Annotated[str | None, typer.Option(help="Only lists of this policy.")] = None,
    reward: Annotated[str, typer.Option(help="click or conversion.")] = "click",
    exploration_share: Annotated[
        float | None, typer.Option(help="With which the lists were shown. EXPLORATION_SHARE.")
    ] = None,
    since: Since = None,
    until: Until = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every figure with its interval, as JSON.")] = False,
) -> None:
    """At the places that are explored: what would the ranker alone have earned, and what chance alone?"""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.evaluation.experiments import compare_file, plain, print_estimates
    from personalization.settings import get_settings

    found = compare_file(
        events, get_settings(), reward=reward, share=exploration_share, policy=policy, since=since, until=until
    )
    if as_json:
        typer.echo(json.dumps(plain(found), indent=2))
    else:
        print_estimates(found, reward, console)


@keys_app.command("new")
def new_api_key(
    name: Annotated[str, typer.Option(help="Who bears it; its requests are counted and logged under that name.")],
    scopes: Annotated[
        str, typer.Option(help="By comma: read (ask), write (send events), erase (delete a user).")
    ] = "read",
) -> None:
    """Draw a key for the API. It is shown this once: the server keeps its SHA-256 alone."""
    from personalization.keys import new_key

    secret, key = new_key(name, [one.strip() for one in scopes.split(",")])
    typer.echo(f"The key, for {name}. Nothing can show it again:\n\n  {secret}\n")
    typer.echo(f"For the API; several are parted by a comma:\n\n  API_KEYS={key}")


def _settings_with(model: str | None) -> "Settings":
    """The settings with this embedding model, or one that needs no hub where none is set."""
    from personalization.local.config import PACKAGED_MODEL
    from personalization.settings import get_settings

    settings = get_settings()
    if model is None and "embedding_model" not in settings.model_fields_set:
        package = PACKAGED_MODEL.partition(":")[2]
        model = PACKAGED_MODEL if importlib.util.find_spec(package) else None
    return settings.model_copy(update={"embedding_model": model}) if model else settings


def main() -> None:
    """Entry point: an error the platform foresees is one clear line."""
    try:
        app(prog_name="personalization")
    except PersonalizationError as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
