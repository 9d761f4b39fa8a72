"""Audit: time and peak memory of comparing stores by set, beside holding all ids in Python sets.

Each measurement is a process of its own, so that its peak is its own. The streams are simulated: ids are digests, so
they come in no order, and in another on the other side; of every 10,000 one is missing, one too much, one different.
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from personalization.audit.scratch import Scratch, merged
from personalization.local.config import StackConfig
from personalization.local.stack import Stack
from personalization.settings import Settings

DATA = Path(os.environ.get("PERSONALIZATION_TEST_DATA", "../shared/data")) / "redial" / "messages.jsonl.gz"
SIZES = (100_000, 300_000, 1_000_000, 2_000_000)
MESSAGES = 5_000
_BATCH = 1000
_ONE_IN = 10_000
_STRIDE = 7_368_787  # a prime, so that all places are met once

Row = tuple[str, str, str]


def main(results: Path) -> None:
    """Measure and write `audit.md` and `audit.png` into `results`."""
    rows = []
    for ids in SIZES:
        rows.append((ids, _apart("bounded", ids), _apart("sets", ids)))
        print(rows[-1], flush=True)
    local = local_stores()
    print(local, flush=True)
    results.mkdir(parents=True, exist_ok=True)
    (results / "audit.md").write_text(table(rows, local))
    picture(rows, results / "audit.png")


def stream(ids: int, *, found: bool) -> Iterator[list[Row]]:
    """One side's rows of (id, user, value), a batch at a time."""
    batch: list[Row] = []
    for number in range(ids):
        place = number * _STRIDE % ids if found else number
        kind = place % _ONE_IN
        if kind == (1 if found else 2):  # missing on this side
            continue
        digest = hashlib.blake2b(place.to_bytes(8, "big"), digest_size=16).hexdigest()
        user = f"user-{place % 50_021}"
        batch.append((digest, user, f"{user} at {place + (found and kind == 3)}"))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def bounded(ids: int) -> int:
    """As the audit does it; the number of differences."""
    with Scratch.open() as scratch:
        for side in ("expected", "found"):
            scratch.table(side, "id TEXT, user_id TEXT, value TEXT")
            scratch.fill(side, stream(ids, found=side == "found"))
        query = merged(*(f"SELECT id, user_id, value FROM {side}" for side in ("expected", "found")))  # noqa: S608
        return sum(len(page) for page in scratch.pages(query))


def sets(ids: int) -> int:
    """All of both sides in memory."""
    expected, found = ({(row[0], row[2]) for batch in stream(ids, found=one) for row in batch} for one in (False, True))
    return len({row[0] for row in expected ^ found})


def local_stores() -> dict[str, Any]:
    """The whole audit of the embedded stores, with ReDial messages in them."""
    from personalization.pipeline.run import run_pipeline

    with gzip.open(DATA, "rt") as file:
        lines = [line for line in file if json.loads(line)["message"].strip()][:MESSAGES]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "messages.ndjson"
        path.write_text("".join(lines))
        config = StackConfig(
            local_stack_dir=Path(folder) / "stack",
            mongodb_port=38217,
            milvus_port=38530,
            neo4j_port=38687,
            redis_port=38379,
        )
        stack = Stack(config, only_stores=True)
        stack.start(print)
        try:
            settings = stack.config.settings(
                sqlite_path=Path(folder) / "a.db", staging_uri=str(Path(folder) / "staging")
            )
            summary = run_pipeline(path, settings)
            if summary["status"] != "success":
                raise RuntimeError(summary["error"])
            return _apart("whole", 0, settings)
        finally:
            stack.stop()


def whole() -> dict[str, Any]:
    """The audit of the stores that the environment names."""
    from personalization.audit.command import audit_at
    from personalization.settings import get_settings
    from rich.console import Console

    report = audit_at(get_settings(), Console(stderr=True, quiet=True), repair=False)
    return {"status": report.status, "compared": report.compared}


def _apart(work: str, ids: int, settings: Settings | None = None) -> dict[str, Any]:
    """Do the work in a process of its own."""
    env = dict(os.environ)
    if settings is not None:
        given = settings.model_dump(exclude_none=True)
        reveal = {name: getattr(one, "get_secret_value", lambda one=one: one)() for name, one in given.items()}
        env |= {name.upper(): str(value) for name, value in reveal.items()}
    command = [sys.executable, "-m", "benchmarks.audit", work, str(ids)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(rows: list[tuple[int, dict[str, Any], dict[str, Any]]], local: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Audit of the stores",
        "",
        "Written by `python -m benchmarks audit`. The comparing core alone, on simulated streams of ids from two",
        "stores in different orders; *Python sets* holds all of both sides, in the same run. Peak is the whole",
        "process, imports included; making the ids takes part of both times. Both find the same differences.",
        "",
        "| ids a store | differences | seconds | Python sets | peak MiB | Python sets |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for ids, ours, naive in rows:
        if ours["found"] != naive["found"]:
            raise RuntimeError(f"{ids:,} ids: {ours['found']} differences beside {naive['found']}")
        lines.append(
            f"| {ids:,} | {ours['found']:,} | {ours['seconds']:.1f} | {naive['seconds']:.1f} "
            f"| {ours['peak']:.0f} | {naive['peak']:.0f} |"
        )
    found = local["found"]
    read = "; ".join(
        f"{store} {', '.join(f'{count:,} {what}' for what, count in kinds.items())}"
        for store, kinds in found["compared"].items()
    )
    lines += [
        "",
        "![Peak memory and time over the number of ids](audit.png)",
        "",
        f"The whole audit of the embedded stores with {MESSAGES:,} ReDial messages, every vector read and classified:",
        f"{local['seconds']:.1f} s, peak {local['peak']:.0f} MiB, {found['status']}. Read: {read}.",
        "",
    ]
    return "\n".join(lines)


def picture(rows: list[tuple[int, dict[str, Any], dict[str, Any]]], path: Path) -> None:
    """Peak memory and time over the number of ids."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, measure, label in zip(axes, ("peak", "seconds"), ("peak memory, MiB", "seconds"), strict=True):
        sizes = [ids for ids, _, _ in rows]
        axis.plot(sizes, [ours[measure] for _, ours, _ in rows], marker="o", label="sorted on disk and merged")
        axis.plot(sizes, [naive[measure] for _, _, naive in rows], marker="s", label="Python sets")
        axis.set(xlabel="ids a store", ylabel=label, xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def _peak_mib() -> float:
    """Of this process alone: `getrusage` starts from what the parent had."""
    [line] = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    work, ids = sys.argv[1], int(sys.argv[2])
    started = time.perf_counter()
    works: dict[str, Callable[[], Any]] = {"bounded": lambda: bounded(ids), "sets": lambda: sets(ids), "whole": whole}
    outcome = works[work]()
    seconds = time.perf_counter() - started
    peak = _peak_mib()
    print(json.dumps({"found": outcome, "seconds": seconds, "peak": peak}))
