"""Ingest: messages a second into all stores, beside LangChain into Milvus alone and a message at a time into all.

Every run is a process of its own with the model loaded before, on stores that were empty. How many messages there
are is the only thing that differs between runs of a series, so that scaling and memory can be read off it.
"""

import gzip
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
from personalization.encoder import get_encoder, model_location
from personalization.local.config import StackConfig
from personalization.local.stack import Stack
from personalization.settings import Settings

from benchmarks.serving import free_ports

DATA = Path(os.environ.get("PERSONALIZATION_TEST_DATA", "../shared/data")) / "redial" / "messages.jsonl.gz"
SIZES = (10_000, 30_000, 100_000)
_REFERENCE_ROWS = 4000
_SINGLE_ROWS = 200
_REFERENCES = Path(__file__).parent / "references"
_LANGCHAIN_HOME = Path(".local") / "langchain"
_LANGCHAIN = "langchain-milvus==0.4.0"
_STORES = ("mongodb", "milvus", "neo4j", "redis")


@dataclass(frozen=True)
class Taken:
    """What a run of the pipeline over a file took."""

    messages: int
    seconds: float
    load: float
    """Seconds the model took to load, before."""
    client: float
    """CPU seconds of the run's process, without what it took to load."""
    servers: dict[str, float]
    """CPU seconds of the stores' servers."""
    peak: float
    """MiB."""
    stages: dict[str, float]
    """Seconds by stage; some overlap."""


@dataclass(frozen=True)
class Alone:
    """Messages a second of the model by itself."""

    plain: float
    """`SentenceTransformer.encode` in float32."""
    ours: float
    dtype: str


def main(results: Path) -> None:
    """Measure and write `ingest.md` and `ingest.png` into `results`."""
    langchain = _langchain()
    rows = messages_of(max(SIZES))
    first: list[Taken] = []
    again: list[Taken] = []
    references: dict[str, float] = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder, _stores(Path(folder)) as stack:
            file = _written(Path(folder), rows[:size])
            first.append(take(file, size, stack))
            print(f"{size:,} messages in {first[-1].seconds:.1f} s")
            again.append(take(file, size, stack))
            print(f"the same again in {again[-1].seconds:.2f} s")
            if size == min(SIZES):
                references = _references(Path(folder), rows, stack, langchain)
                print(references)
    settings = StackConfig(local_stack_dir=Path(tempfile.gettempdir())).settings()
    alone = model_alone([row["message"] for row in rows[: min(SIZES)]], settings)
    results.mkdir(parents=True, exist_ok=True)
    report = table(first, again, references, alone)
    (results / "ingest.md").write_text(report)
    picture(first, references, alone, results / "ingest.png")
    print(report)


def messages_of(count: int) -> list[dict[str, Any]]:
    """Messages of ReDial; beyond those, new ones of other users, each of two halves of messages of ReDial.

    So lengths and words stay as they are, and hardly a text comes twice: the model has as much to do.
    """
    with gzip.open(DATA, "rt") as stream:
        real = [row for row in map(json.loads, stream) if row["message"].strip()]
    rows, draw, copy = list(real[:count]), random.Random(5), 0  # noqa: S311
    while len(rows) < count:
        copy += 1
        for row in real[: count - len(rows)]:
            words, other = row["message"].split(), draw.choice(real)["message"].split()
            text = " ".join([*words[: math.ceil(len(words) / 2)], *other[len(other) // 2 :]])
            ids = {"message_id": f"{row['message_id']}-{copy}", "user_id": f"{row['user_id']}-{copy}"}
            rows.append(row | ids | {"message": text})
    return rows


def take(file: Path, messages: int, stack: Stack) -> Taken:
    """Run the pipeline over the file in a process of its own."""
    servers = _servers(stack)
    before = {name: _cpu(server) for name, server in servers.items()}
    command = [sys.executable, "-m", "benchmarks.references.run_once", str(file)]
    answer = _answer(command, stack.config.platform_env)
    summary = answer["summary"]
    if summary["status"] != "success":
        raise RuntimeError(summary)
    return Taken(
        messages=messages,
        seconds=answer["seconds"],
        load=answer["load"],
        client=answer["cpu"],
        servers={name: _cpu(server) - before[name] for name, server in servers.items()},
        peak=answer["peak"],
        stages={stage["stage"]: stage.get("seconds", 0.0) for stage in summary["stages"]},
    )


def model_alone(texts: list[str], settings: Settings) -> Alone:
    """The model over the texts: plain `encode` in float32 at its usual batch size, and the pipeline's encoder."""
    from sentence_transformers import SentenceTransformer

    few = texts[:_REFERENCE_ROWS]
    model = SentenceTransformer(model_location(settings.embedding_model), device="cpu")
    model.encode(few[:64], show_progress_bar=False)
    started = time.perf_counter()
    model.encode(few, batch_size=32, show_progress_bar=False)
    plain = len(few) / (time.perf_counter() - started)
    encoder = get_encoder(settings.embedding_model, settings.embedding_dim)
    encoder.encode(few[:64])
    started = time.perf_counter()
    encoder.encode(texts)
    return Alone(plain, len(texts) / (time.perf_counter() - started), encoder.dtype_name)


def table(first: list[Taken], again: list[Taken], references: dict[str, float], alone: Alone) -> str:
    """The results as Markdown."""
    largest, langchain = first[-1], references["langchain"]
    about = (
        f"Written by `make bench`, on {psutil.cpu_count()} cores. Messages of ReDial; beyond its 31,000 new ones of "
        "two halves each. Stores: the embedded stack, empty before each size. One process, no Airflow, the model "
        "loaded before. Beside it in the same run: LangChain, and a message at a time."
    )
    alike = (
        f"The model alone: {alone.ours:,.0f} messages/s ({alone.dtype}); plain `encode` in float32 {alone.plain:,.0f} "
        f"({alone.ours / alone.plain:.2f} ×)."
    )
    growth = (
        f"Time grows with the messages to the power of {exponent(first):.2f}; peak memory at {largest.messages:,} is "
        f"{largest.peak / first[0].peak:.2f} × that at {first[0].messages:,}."
    )
    overlap = (
        "Seconds by stage (`embed` goes on beside `upsert_vectors`, `embed_catalog` beside `ingest`, and from "
        "`build_graph` to `learn` all at once):"
    )
    single = references["single"]
    lines = [
        "# Ingest",
        "",
        about,
        "",
        "| messages | into | messages/s | beside LangChain | beside the model alone | peak RSS, MiB |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for one in first:
        rate = one.messages / one.seconds
        lines.append(
            f"| {one.messages:,} | all stores | {rate:,.0f} | {rate / langchain:.2f} × | {rate / alone.ours:.2f} × | "
            f"{one.peak:,.0f} |"
        )
    for rows, name, rate in (
        (_REFERENCE_ROWS, "LangChain: Milvus alone", langchain),
        (_SINGLE_ROWS, "all stores, one message at a time", single),
    ):
        lines.append(f"| {rows:,} | {name} | {rate:,.0f} | {rate / langchain:.2f} × | {rate / alone.plain:.2f} × | – |")
    lines += [
        "",
        alike,
        growth,
        f"Everything but the model: {_around(largest, alone):.0%} of the time at {largest.messages:,}.",
        "",
        "The same file again:",
        "",
        "| messages | seconds | of the first run | CPU of all processes, of the first run's |",
        "|---:|---:|---:|---:|",
        *(
            f"| {one.messages:,} | {one.seconds:.2f} | {one.seconds / before.seconds:.1%} | "
            f"{_all_cpu(one) / _all_cpu(before):.1%} |"
            for before, one in zip(first, again, strict=True)
        ),
        "",
        overlap,
        "",
        f"| stage | {' | '.join(f'{one.messages:,}' for one in first)} |",
        f"|---|{'---:|' * len(first)}",
        *(
            f"| {stage} | {' | '.join(f'{one.stages[stage]:.2f}' for one in first)} |"
            for stage in largest.stages
            if any(one.stages[stage] >= 0.005 for one in first)
        ),
        "",
        "CPU milliseconds a message, of the run's process and of each server:",
        "",
        f"| | {' | '.join(f'{one.messages:,}' for one in first)} |",
        f"|---|{'---:|' * len(first)}",
        f"| the run, with the model | {' | '.join(f'{one.client / one.messages * 1000:.2f}' for one in first)} |",
        *(
            f"| {store} | {' | '.join(f'{one.servers[store] / one.messages * 1000:.2f}' for one in first)} |"
            for store in _STORES
        ),
        "",
    ]
    return "\n".join(lines)


def picture(first: list[Taken], references: dict[str, float], alone: Alone, path: Path) -> None:
    """Rates beside each other, and what the stages of each size took a message."""
    import matplotlib.pyplot as plt

    figure, (rates, shares) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    bars = {
        "one at a time,\nall stores": references["single"],
        "LangChain,\nMilvus alone": references["langchain"],
        **{f"{one.messages:,},\nall stores": one.messages / one.seconds for one in first},
        "model alone": alone.ours,
    }
    drawn = rates.bar(list(bars), list(bars.values()), color=["0.6", "0.6", *["C0"] * len(first), "C2"])
    rates.bar_label(drawn, fmt="{:,.0f}")
    rates.set_ylabel("messages a second")
    rates.tick_params(axis="x", labelsize=8)
    left = np.zeros(len(first))
    names = [f"{one.messages:,}" for one in first]
    for stage in first[-1].stages:
        each = np.asarray([one.stages[stage] / one.messages * 1000 for one in first])
        if each.max() >= 0.01:
            shares.barh(names, each, left=left, label=stage)
            left += each
    shares.set_xlabel("milliseconds a message, stage by stage; some overlap")
    shares.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def exponent(runs: list[Taken]) -> float:
    """Of the power of the messages that the seconds grow with, by least squares."""
    sizes = np.log([one.messages for one in runs])
    return float(np.polyfit(sizes, np.log([one.seconds for one in runs]), 1)[0])


def _around(one: Taken, alone: Alone) -> float:
    return 1 - one.messages / alone.ours / one.seconds


def _all_cpu(one: Taken) -> float:
    return one.client + sum(one.servers.values())


def _references(folder: Path, rows: list[dict[str, Any]], stack: Stack, langchain: Path) -> dict[str, float]:
    """Messages a second of LangChain into Milvus, and of a message at a time into all stores."""
    settings = stack.config.settings()
    many, few = _written(folder, rows[:_REFERENCE_ROWS]), _written(folder, rows[:_SINGLE_ROWS])
    script = [sys.executable, str(_REFERENCES / "langchain_into_milvus.py"), str(many), settings.milvus_uri]
    usual = _answer([*script, model_location(settings.embedding_model)], {"PYTHONPATH": str(langchain)})
    single = _answer([sys.executable, "-m", "benchmarks.references.one_by_one", str(few)], stack.config.platform_env)
    return {"langchain": _REFERENCE_ROWS / usual["seconds"], "single": _SINGLE_ROWS / single["seconds"]}


def _answer(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    """What the process printed in its last line."""
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@contextmanager
def _stores(folder: Path) -> Iterator[Stack]:
    """Stores of their own, beside those that may be running."""
    mongodb, milvus, neo4j, redis = free_ports(4)
    config = StackConfig(
        local_stack_dir=folder / "stack", mongodb_port=mongodb, milvus_port=milvus, neo4j_port=neo4j, redis_port=redis
    )
    stack = Stack(config, only_stores=True)
    try:
        stack.start(lambda _: None)
        yield stack
    finally:
        stack.stop()


def _servers(stack: Stack) -> dict[str, psutil.Process]:
    """The servers' processes, by store."""
    pids = {one.name: int(one.description.split()[1].rstrip(",")) for one in stack.states() if one.running}
    return {name: psutil.Process(pids[name]) for name in _STORES}


def _cpu(process: psutil.Process) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


def _written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{len(rows)}.ndjson"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _langchain() -> Path:
    """A folder with LangChain and what it needs, made where there is none; the model is the project's."""
    done = _LANGCHAIN_HOME / _LANGCHAIN
    if not done.exists():
        uv = str(Path(sys.executable).with_name("uv"))
        there = ["--target", str(_LANGCHAIN_HOME), "--python", sys.executable]
        subprocess.run([uv, "pip", "install", "--quiet", *there, _LANGCHAIN], check=True)
        done.touch()
    return _LANGCHAIN_HOME.absolute()
