"""Ingest: messages a second of every stage on real messages, beside the model alone.

The reference is plain `SentenceTransformer.encode` in float32 at its usual batch size over the same
texts, in the same process on the same machine, so that the ratio means something anywhere.
"""

import gzip
import json
import os
import tempfile
import time
from pathlib import Path

from personalization.encoder import model_location
from personalization.local.config import StackConfig
from personalization.local.stack import Stack
from personalization.pipeline.run import RunSummary, run_pipeline
from personalization.settings import Settings

DATA = Path(os.environ.get("PERSONALIZATION_TEST_DATA", "../shared/data")) / "redial" / "messages.jsonl.gz"


def main(messages: int, results: Path) -> None:
    """Measure and write `ingest.md` into `results`."""
    with gzip.open(DATA, "rt") as stream:
        lines = [line for line in stream if json.loads(line)["message"].strip()][:messages]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "messages.ndjson"
        path.write_text("".join(lines))
        stack = Stack(_stack_config(Path(folder)), only_stores=True)
        stack.start(print)
        try:
            settings = stack.config.settings()
            first = run_pipeline(path, settings)
            again = run_pipeline(path, settings)
        finally:
            stack.stop()
        reference = model_alone([json.loads(line)["message"] for line in lines], settings)
    results.mkdir(parents=True, exist_ok=True)
    report = table(first, again, len(lines), reference)
    (results / "ingest.md").write_text(report)
    print(report)


def _stack_config(folder: Path) -> StackConfig:
    """A stack of its own, beside the one that may be running."""
    return StackConfig(
        local_stack_dir=folder / "stack", mongodb_port=37017, milvus_port=39530, neo4j_port=37687, redis_port=36379
    )


def model_alone(texts: list[str], settings: Settings) -> float:
    """Seconds plain `SentenceTransformer.encode` takes in float32."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_location(settings.embedding_model), device="cpu")
    model.encode(texts[:64], show_progress_bar=False)
    started = time.perf_counter()
    model.encode(texts, batch_size=32, show_progress_bar=False)
    return time.perf_counter() - started


def table(first: RunSummary, again: RunSummary, messages: int, reference: float) -> str:
    """The results as Markdown."""
    total = sum(stage.get("seconds", 0.0) for stage in first["stages"])
    rerun = sum(stage.get("seconds", 0.0) for stage in again["stages"])
    lines = [
        f"# Ingest of {messages:,} ReDial messages",
        "",
        "Written by `make bench`. Stores: the embedded stack. One process, no Airflow.",
        "",
        "| stage | seconds | messages/s | share |",
        "|---|---:|---:|---:|",
    ]
    for stage in first["stages"]:
        seconds = stage.get("seconds", 0.0)
        lines.append(f"| {stage['stage']} | {seconds:.2f} | {messages / seconds:,.0f} | {seconds / total:.0%} |")
    lines += [
        f"| **all stages** | **{total:.2f}** | **{messages / total:,.0f}** | 100% |",
        f"| the same file again | {rerun:.2f} | {messages / rerun:,.0f} | {rerun / total:.1%} |",
        f"| plain `encode` in float32 | {reference:.2f} | {messages / reference:,.0f} | {reference / total:.0%} |",
        "",
        f"All stages into all stores run at {reference / total:.2f} × the rate of the reference.",
        "",
    ]
    return "\n".join(lines)
