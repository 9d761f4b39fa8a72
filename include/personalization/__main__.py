"""Command line: run the pipeline on a file, and manage the embedded local stack."""

import json
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
stack_app = typer.Typer(help="The embedded local stack.")
app.add_typer(stack_app, name="stack")


@app.command()
def run(path: Annotated[Path, typer.Argument(help="Conversations: a JSON array or NDJSON, plain or gzipped.")]) -> None:
    """Take a file through all stages without Airflow; print the summary as JSON.

    Exit status 0 where every stage succeeded, 1 otherwise.
    """
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from personalization.pipeline import run_pipeline

    summary = run_pipeline(path)
    typer.echo(json.dumps(summary, indent=2, default=str))
    raise typer.Exit(0 if summary["status"] == "success" else 1)


@stack_app.command()
def start() -> None:
    """Bring up what is not running; wait until everything answers."""
    stack().start(typer.echo)


if __name__ == "__main__":
    app(prog_name="personalization")
