"""Which of the catalog's intents a message expresses, or that it expresses none: fitted on the example utterances.

Two linear models over unit vectors. A multinomial logistic regression says which intent. How far a message is in
scope is the sum of two standardised scores: the largest discriminant score over all intents, with the covariance
within intents shrunk towards a sphere (linear discriminant analysis; Friedman, "Regularized discriminant analysis",
JASA 1989), and the cosine to the nearest example of the likeliest intent. Where the line is drawn, and how the
probabilities are tempered (Guo et al., "On calibration of modern neural networks", ICML 2017), comes from
cross-validation over the examples: no message out of scope is needed.

A sentence vector is near the sum of what the sentence says. So what is left of it, once the direction of the likeliest
intent is taken out, is read again: if it points to another intent more clearly than what is left of examples that
express one intent, the message expresses that one as well.
"""

import warnings
from dataclasses import replace
from typing import Self

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from personalization.understanding.reader import Calibration, Fit, Floats, Integers, IntentReader

_INVERSE_PENALTY = 30.0
_ITERATIONS = 100
_TOLERANCE = 3e-5
_TINY = 1e-6
_SHRINKAGE = 0.7
_FOLDS = 5
_FOLDS_OF_MANY = 2
_MANY = 5000
_ENOUGH = 10  # held-out examples, below which a quantile means nothing
_COSINE_OF_FEW = 0.45
_COSINE_SPREAD = 0.1
_TEMPERATURE_OF_FEW = 0.5
_TEMPERATURES = (0.25, 4.0)  # without a least one, examples that are all told apart would make it 0
_ALONE = 0.98


class IntentClassifier(IntentReader):
    """Fitted on example utterances; says of each message what it expresses."""

    @classmethod
    def fit(cls, intent_ids: list[str], vectors: Floats) -> Self:
        """Fit on examples: `intent_ids[i]` is expressed by the unit vector `vectors[i]`, shape (n, dim).

        Deterministic, and blind to zero-padding, to repeated examples and to the order of the intents. With fewer
        than ten examples whose intent has another one there is too little to validate on: a cosine decides then.
        """
        ids, examples, intents = _sorted(intent_ids, vectors)
        # Threads wait for each other longer than these small products take.
        with threadpool_limits(limits=1, user_api="blas"):
            return cls(ids, _fit(examples, intents, len(ids)), _calibrate(examples, intents, len(ids)))


def _sorted(intent_ids: list[str], vectors: Floats) -> tuple[list[str], Floats, Integers]:
    """Intent ids in order, their different examples in that order without padding, and the place of each one's id."""
    different = {
        (intent_id, vector.tobytes()): row
        for row, (intent_id, vector) in enumerate(zip(intent_ids, vectors, strict=True))
    }
    rows = sorted(different.values(), key=lambda row: (intent_ids[row], row))
    ids = sorted(set(intent_ids))
    place = {intent_id: at for at, intent_id in enumerate(ids)}
    used = np.flatnonzero(vectors.any(axis=0))
    width = int(used[-1]) + 1 if len(used) else vectors.shape[1]
    intents = np.array([place[intent_ids[row]] for row in rows], dtype=np.int64)
    return ids, np.ascontiguousarray(vectors[rows, :width], dtype=np.float32), intents


def _fit(examples: Floats, intents: Integers, count: int) -> Fit:
    """Fit both models on examples sorted by intent. Every intent weighs the same, however many examples it has."""
    width = examples.shape[1]
    counts = np.bincount(intents, minlength=count)
    starts = np.concatenate([[0], np.cumsum(counts)])
    present = np.flatnonzero(counts)
    logit_weights = np.zeros((width, count), dtype=np.float32)
    logit_bias = np.full(count, -np.inf, dtype=np.float32)
    logit_bias[present] = 0
    if len(present) > 1:
        model = LogisticRegression(C=_INVERSE_PENALTY, class_weight="balanced", max_iter=_ITERATIONS, tol=_TOLERANCE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # some steps more change nothing that counts
            warnings.filterwarnings(
                "ignore", "The number of unique classes", UserWarning
            )  # one example an intent will do
            model.fit(examples, intents)
        # Of two intents scikit-learn tells the second from the first.
        rows = present[1:] if len(present) == 2 else present
        logit_weights[:, rows] = model.coef_.T
        logit_bias[rows] = model.intercept_
    means = np.zeros((count, width), dtype=np.float32)
    np.add.at(means, intents, examples)
    means[present] /= counts[present, None]
    spread = examples - means[intents]
    covariance = spread.T @ spread / max(len(examples) - len(present), 1)
    variance = float(np.trace(covariance)) / width or 1 / width  # no intent has two examples
    covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * variance * np.eye(width, dtype=np.float32)
    weights = np.linalg.solve(covariance, means.T).astype(np.float32)
    bias = -0.5 * (means * weights.T).sum(axis=1)
    bias[counts == 0] = -np.inf
    directions = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), _TINY)
    return Fit(logit_weights, logit_bias, weights, bias, examples, directions, starts)


def _calibrate(examples: Floats, intents: Integers, count: int) -> Calibration:
    """Cross-validate. An intent's only example is left out: nothing is left to know it by."""
    counts = np.bincount(intents, minlength=count)
    starts = np.cumsum(counts) - counts
    folds = _FOLDS if len(examples) <= _MANY else _FOLDS_OF_MANY
    # Shifted from intent to intent, so that small intents do not all lose an example to the same fold.
    fold = (np.arange(len(examples)) - starts[intents] + intents) % folds
    has_another = counts[intents] > 1
    if has_another.sum() < _ENOUGH:
        location, scale = np.array([[0, _COSINE_OF_FEW], [np.inf, _COSINE_SPREAD]], dtype=np.float32)
        return Calibration(_TEMPERATURE_OF_FEW, 1.0, location, scale, np.zeros(1))
    logits = np.empty((len(examples), count), dtype=np.float32)
    left = np.empty_like(logits)
    evidence = np.empty((len(examples), 2), dtype=np.float32)
    for one in range(folds):
        rows = np.flatnonzero((fold == one) & has_another)
        if len(rows):
            others = fold != one
            fit = _fit(examples[others], intents[others], count)
            logits[rows] = fit.logits(examples[rows])
            left[rows] = fit.leftover_logits(examples[rows], logits[rows].argmax(axis=1))
            evidence[rows] = fit.evidence(examples[rows], logits[rows])
    logits, left, evidence = logits[has_another], left[has_another], evidence[has_another]
    temperature = _temperature(logits, intents[has_another])
    alone = float(np.quantile(softmax(left, axis=1).max(axis=1), _ALONE)) if count > 1 else 1.0
    location, scale = evidence.mean(axis=0), np.maximum(evidence.std(axis=0), _TINY)
    calibration = Calibration(temperature, alone, location, scale, np.zeros(0))
    return replace(calibration, in_scope=np.sort(calibration.scores(evidence)))


def _temperature(logits: Floats, intents: Integers) -> float:
    """What the logits are divided by so that held-out examples are likeliest."""
    finite = np.where(np.isfinite(logits), logits, -1e4).astype(np.float64)

    def loss(log_temperature: float) -> float:
        likelihood = log_softmax(finite / np.exp(log_temperature), axis=1)
        return -float(likelihood[np.arange(len(intents)), intents].mean())

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded").x))
