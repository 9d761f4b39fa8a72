"""Intents: the classifier beside one nearest neighbour and nearest centroid, on labelled messages of two data sets.

banking77: fitted on a draw of the training rows, judged on the others. clinc150: fitted on a draw of `train`, judged on
`val`, and on `oos_train` and `oos_val`, which nothing is fitted on.
"""

import csv
import gzip
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from personalization.encoder import Vectors, get_encoder
from personalization.local.config import StackConfig
from personalization.settings import Settings
from personalization.understanding.classifier import IntentClassifier
from sklearn.metrics import roc_auc_score

DATA = Path(os.environ.get("PERSONALIZATION_TEST_DATA", "../shared/data")) / "intents"

DRAWS = 5
PER_INTENT = (1, 2, 5, 10, 30, None)
_HELD_OUT = 2500  # rows of banking77, where all others are fitted on
_BINS = 15
_T95 = 2.776  # Student's t at 97.5 %, DRAWS - 1 = 4 degrees of freedom

Labels = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Split:
    """Messages to fit on and to judge by."""

    examples: Vectors
    intents: Labels
    messages: Vectors
    said: Labels


class DataSet:
    """A labelled data set, embedded."""

    def __init__(self, name: str, vectors: Vectors, labels: list[str], test: tuple[Vectors, list[str]] | None) -> None:
        self.name = name
        self.ids, self._labels = np.unique(labels, return_inverse=True)
        self._vectors = vectors
        self._test = test

    def split(self, per_intent: int | None, seed: int) -> Split:
        """`per_intent` examples of each intent, drawn at random, and messages that are none of them."""
        order = np.random.default_rng(seed).permutation(len(self._labels))
        if per_intent is None:
            drawn = order if self._test else order[_HELD_OUT:]
        else:
            drawn = np.concatenate(
                [order[self._labels[order] == intent][:per_intent] for intent in range(len(self.ids))]
            )
        if self._test:
            messages, said = self._test[0], np.searchsorted(self.ids, self._test[1])
        else:
            rest = np.setdiff1d(order, drawn)
            messages, said = self._vectors[rest], self._labels[rest]
        return Split(self._vectors[drawn], self._labels[drawn], messages, said)


def main(results: Path) -> None:
    """Measure and write `intents.md` into `results`."""
    settings = StackConfig().settings()
    banking, clinc, strangers = load(settings)
    rows = []
    for data_set in (banking, clinc):
        for per_intent in PER_INTENT:
            draws = 1 if per_intent is None else DRAWS
            figures = [measure(data_set.split(per_intent, seed), strangers, settings) for seed in range(draws)]
            rows.append((data_set.name, per_intent, figures))
            print(line(*rows[-1]), flush=True)
    results.mkdir(parents=True, exist_ok=True)
    (results / "intents.md").write_text(table(rows, settings))


def load(settings: Settings) -> tuple[DataSet, DataSet, Vectors]:
    """banking77, clinc150, and clinc150's messages out of scope."""
    encoder = get_encoder(settings.embedding_model, settings.embedding_dim)
    with (DATA / "banking77_train.csv").open(encoding="utf-8", newline="") as file:
        banking = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    with gzip.open(DATA / "clinc150_train_val.json.gz", "rt", encoding="utf-8") as stream:
        clinc = json.load(stream)

    def embedded(rows: list[Any]) -> tuple[Vectors, list[str]]:
        return encoder.encode([text for text, _ in rows]), [label for _, label in rows]

    strangers, _ = embedded(clinc["oos_train"] + clinc["oos_val"])
    return (
        DataSet("banking77", *embedded(banking), test=None),
        DataSet("clinc150", *embedded(clinc["train"]), test=embedded(clinc["val"])),
        strangers,
    )


def measure(split: Split, strangers: Vectors, settings: Settings) -> dict[str, float]:
    """The figures of one draw."""
    intents = int(split.intents.max()) + 1
    cosines = split.messages @ split.examples.T
    neighbour = split.intents[cosines.argmax(axis=1)]
    centroids = np.stack([split.examples[split.intents == intent].mean(axis=0) for intent in range(intents)])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    started = time.perf_counter()
    classifier = IntentClassifier.fit([f"{intent:04d}" for intent in split.intents], split.examples)
    fitted = time.perf_counter()
    readings = classifier.classify(split.messages, settings.intent_keep)
    seconds = time.perf_counter() - fitted
    right = np.array([int(reading.top[0][0]) for reading in readings]) == split.said
    sure = np.array([reading.top[0][1] for reading in readings])
    inside = np.array([reading.out_of_scope for reading in readings])
    outside = np.array([one.out_of_scope for one in classifier.classify(strangers, settings.intent_keep)])
    foreign = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    return {
        "1-NN": float((neighbour == split.said).mean()),
        "centroid": float(((split.messages @ centroids.T).argmax(axis=1) == split.said).mean()),
        "ours": float(right.mean()),
        "ECE": calibration_error(sure, right),
        "AUROC": float(roc_auc_score(foreign, np.r_[inside, outside])),
        "kept": float((inside < 0.5).mean()),
        "refused": float((outside >= 0.5).mean()),
        "fit": fitted - started,
        "rate": len(readings) / seconds,
    }


def calibration_error(sure: Any, right: Any) -> float:
    """Expected calibration error over 15 bins of equal width (Guo et al., ICML 2017)."""
    place = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = [abs(float((sure[place == one] - right[place == one]).sum())) for one in range(_BINS)]
    return sum(gaps) / len(sure)


def line(name: str, per_intent: int | None, figures: list[dict[str, float]]) -> str:
    """A row of the table: means over the draws, with 95 % intervals (t) of the accuracies."""

    def mean(key: str) -> float:
        return float(np.mean([one[key] for one in figures]))

    def accuracy(key: str) -> str:
        if len(figures) == 1:
            return f"{mean(key):.1%}"
        half = _T95 * float(np.std([one[key] for one in figures], ddof=1)) / len(figures) ** 0.5
        return f"{mean(key):.1%} ± {100 * half:.1f}"

    cells = [name, str(per_intent or "all"), *(accuracy(key) for key in ("1-NN", "centroid", "ours"))]
    cells += [f"{mean('ECE'):.3f}", f"{mean('AUROC'):.3f}", f"{mean('kept'):.1%}", f"{mean('refused'):.1%}"]
    cells += [f"{mean('fit'):.1f}", f"{mean('rate'):,.0f}"]
    return f"| {' | '.join(cells)} |"


def table(rows: list[tuple[str, int | None, list[dict[str, float]]]], settings: Settings) -> str:
    """The results as Markdown."""
    head = f"""# Intents

Written by `python -m benchmarks intents`. Vectors of {settings.embedding_model}; mean of {DRAWS} random draws of the
examples, ± half a 95 % interval over the draws; one fit where all are taken. Judged on messages that nothing was fitted
on: the rest of banking77's training rows, clinc150's `val`. Out of scope, for both, are the 200 messages of clinc150's
`oos_train` and `oos_val`; nothing is fitted on those. *kept* and *refused*: share in and out of scope at the default
`INTENT_KEEP={settings.intent_keep}`, a line drawn from the examples alone.

| data | examples an intent | 1-NN | nearest centroid | ours | ECE | AUROC | kept | refused | fit s | messages/s |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""
    return head + "\n".join(line(*row) for row in rows) + "\n"
