"""Which of the catalog's intents a message expresses, read from its vector by what a classifier has learnt.

Needs NumPy and SciPy alone, so that what serves can read messages without what fits (`classifier.py`, which says how
it works).
"""

import io
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self, cast

import numpy as np
from scipy.special import softmax

Floats = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]

TOP = 5
_TINY = 1e-6
_BAR = 0.3
_BAR_OF_BEST = 0.6


class Reading(NamedTuple):
    """What one message expresses."""

    top: list[tuple[str, float]]
    """The likeliest intents and their probabilities given that the message is in scope, best first."""
    expressed: list[tuple[str, float]]
    """Those it is held to express, likeliest first; none where it is out of scope. An intent found in what the
    likeliest one leaves of the message comes last, with its probability in what is left."""
    out_of_scope: float
    """In [0, 1]; from 0.5 on the message is out of scope."""


@dataclass(frozen=True)
class Fit:
    """What one set of examples gives."""

    logit_weights: Floats
    logit_bias: Floats
    discriminant_weights: Floats
    discriminant_bias: Floats
    examples: Floats
    """Sorted by intent."""
    directions: Floats
    """Unit length: the mean of each intent's examples, shape (intents, dim)."""
    starts: Integers
    """Where each intent's examples begin, and the end of the last."""

    def logits(self, vectors: Floats) -> Floats:
        """Shape (n, intents)."""
        return cast("Floats", vectors @ self.logit_weights + self.logit_bias)

    def evidence(self, vectors: Floats, logits: Floats) -> Floats:
        """Largest discriminant score and cosine to the nearest example of the likeliest intent, shape (n, 2)."""
        discriminant = (vectors @ self.discriminant_weights + self.discriminant_bias).max(axis=1)
        likeliest = logits.argmax(axis=1)
        cosine = np.empty(len(vectors), dtype=np.float32)
        order = np.argsort(likeliest, kind="stable")
        bounds = np.searchsorted(likeliest[order], np.arange(len(self.logit_bias) + 1))
        for intent in np.unique(likeliest):
            rows = order[bounds[intent] : bounds[intent + 1]]
            own = self.examples[self.starts[intent] : self.starts[intent + 1]]
            cosine[rows] = (vectors[rows] @ own.T).max(axis=1)
        return np.stack([discriminant, cosine], axis=1)

    def leftover_logits(self, vectors: Floats, likeliest: Integers) -> Floats:
        """Logits of what the likeliest intent's direction leaves of each vector, that intent ruled out."""
        direction = self.directions[likeliest]
        rest = vectors - (vectors * direction).sum(axis=1, keepdims=True) * direction
        rest /= np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), _TINY)
        logits = self.logits(rest)
        logits[np.arange(len(vectors)), likeliest] = -np.inf
        return logits


@dataclass(frozen=True)
class Calibration:
    """What held-out examples teach."""

    temperature: float
    alone: float
    """Probability of the second intent in what is left, untempered, above which a message expresses it."""
    location: Floats
    scale: Floats
    in_scope: Doubles
    """Scores of the examples, ascending."""

    def scores(self, evidence: Floats) -> Doubles:
        """How far in scope: standardised evidence, summed, shape (n,)."""
        return cast("Doubles", ((evidence - self.location) / self.scale).sum(axis=1, dtype=np.float64))


class IntentReader:
    """What was learnt from example utterances; says of each message what it expresses."""

    def __init__(self, intent_ids: list[str], fit: Fit, calibration: Calibration) -> None:
        self.intent_ids = intent_ids
        self._fit = fit
        self._calibration = calibration

    def classify(self, vectors: Floats, keep: float) -> list[Reading]:
        """Read the unit vectors, shape (n, dim), so that a share of `keep` of messages in scope is held to be so.

        A message in scope expresses its likeliest intent, every other that is likely enough and nearly as likely,
        and one that what is left of the message points to. O(n · intents · dim).
        """
        if not self.intent_ids or not len(vectors):
            return [Reading([], [], 1.0) for _ in vectors]
        calibration = self._calibration
        vectors = np.ascontiguousarray(vectors[:, : self._fit.examples.shape[1]])
        logits = self._fit.logits(vectors)
        scores = calibration.scores(self._fit.evidence(vectors, logits))
        margin = scores - np.quantile(calibration.in_scope, 1 - keep)
        probabilities = softmax(logits / calibration.temperature, axis=1)
        top = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
        likely = np.take_along_axis(probabilities, top, axis=1)
        counts = (likely >= np.maximum(_BAR, _BAR_OF_BEST * likely[:, :1])).sum(axis=1)
        counts = np.where(margin > 0, np.maximum(counts, 1), 0)
        seconds, clear = self._seconds(vectors, top[:, 0])
        seconds = np.where(margin > 0, seconds, -1)
        out_of_scope = 0.5 - 0.5 * margin / (1 + np.abs(margin))  # of no exponential: it must not saturate
        columns = (top, likely, counts, seconds, clear, out_of_scope)
        return [self._reading(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def _seconds(self, vectors: Floats, likeliest: Integers) -> tuple[Integers, Floats]:
        """The intent that what is left of each message points to clearly, else -1, and its probability there."""
        if len(self.intent_ids) == 1:
            return np.full(len(vectors), -1), np.zeros(len(vectors), dtype=np.float32)
        logits = self._fit.leftover_logits(vectors, likeliest)
        clear = softmax(logits, axis=1).max(axis=1) > self._calibration.alone
        probabilities = softmax(logits / self._calibration.temperature, axis=1)
        return np.where(clear, logits.argmax(axis=1), -1), probabilities.max(axis=1)

    def _reading(
        self, places: list[int], likely: list[float], count: int, second: int, clear: float, out_of_scope: float
    ) -> Reading:
        top = [(self.intent_ids[place], probability) for place, probability in zip(places, likely, strict=True)]
        expressed = top[:count]
        if second >= 0 and second not in places[:count]:
            expressed.append((self.intent_ids[second], clear))
        return Reading(top, expressed, out_of_scope)

    def to_bytes(self) -> bytes:
        """The fitted classifier as arrays in NumPy's `.npz`, without pickle."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            intent_ids=np.asarray(self.intent_ids, dtype=np.str_),
            **vars(self._fit),
            **vars(self._calibration),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """What `to_bytes` made.

        Raises:
            ValueError, KeyError, zipfile.BadZipFile: it is not that.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            fit = Fit(**{field.name: arrays[field.name] for field in fields(Fit)})
            learnt = {field.name: arrays[field.name] for field in fields(Calibration)}
            learnt |= {name: array.item() for name, array in learnt.items() if array.ndim == 0}
            calibration = Calibration(**learnt)
            return cls(arrays["intent_ids"].tolist(), fit, calibration)
