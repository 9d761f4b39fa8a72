"""Texts through a BERT without padding: a batch is one row of tokens, and attention stays within each text.

All else in the model works on each token by itself, so texts may lie one behind the other as long as positions are
counted anew for each and attention knows where each ends. Loads torch.
"""

import platform
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple, Self, cast

import joblib
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

_ATTENTION = "packed"
_COUNTED_FROM_0 = {"bert"}
_COUNTED_BEHIND_PADDING = {"roberta", "xlm-roberta"}
"""Whose first token has the position behind the padding token's id."""
_SLICE_TEXTS = 8192  # that are tokenised while those before are in the model
_LEAST_TOKENS = 256  # below which a batch is not worth a worker of its own


class Device(NamedTuple):
    """How a device is kept busy."""

    workers: int
    batch_tokens: int

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """On a CPU a batch for each core, of what its cache holds: threads that share one wait for each other.

        On a card two batches that fill it: while one is in the model, the next is copied and the last one fetched.
        """
        if device.type == "cpu":
            return cls(joblib.cpu_count(), 2048)
        return cls(2 if device.type == "cuda" else 1, 32_768)


class Batch(NamedTuple):
    """Texts one behind the other, ascending by length."""

    places: np.ndarray[Any, np.dtype[np.int64]]
    """Where they stood among all texts."""
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    """Tokens of each."""
    token_ids: np.ndarray[Any, np.dtype[np.int64]]


class Bounds(NamedTuple):
    """Where the texts of a batch lie, for attention."""

    runs: list[tuple[int, int]]
    """(texts, tokens of each) of neighbours of one length."""
    ends: Tensor
    """First token of each text, and the end of the last; int32, shape (texts + 1,)."""
    longest: int


class PackedModel:
    """A sentence-transformers model whose transformer is a BERT or RoBERTa, changed to take packed batches."""

    def __init__(self, model: Any) -> None:
        transformer, *self._behind = model
        self._tokenizer = transformer.tokenizer
        self._bert = transformer.model
        self._bert.set_attn_implementation(_ATTENTION)
        config = self._bert.config
        self._first_position: int = config.pad_token_id + 1 if config.model_type in _COUNTED_BEHIND_PADDING else 0
        self._torch_device: torch.device = self._bert.device
        self._device = Device.of(self._torch_device)
        if self._torch_device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
            _prepack(self._bert, self._device.batch_tokens)
        self._tokenising = ThreadPoolExecutor(1, "tokenising")
        self._encoding = ThreadPoolExecutor(self._device.workers, "encoding")

    @staticmethod
    def can_take(model: Any) -> bool:
        """Whether the model is of a kind that is known to be right without padding."""
        transformer, *behind = model
        config: Any = getattr(getattr(transformer, "model", None), "config", None)
        return (
            getattr(config, "model_type", None) in _COUNTED_FROM_0 | _COUNTED_BEHIND_PADDING
            and not config.is_decoder
            and [type(one).__name__ for one in behind[:1]] == ["Pooling"]
            and model.default_prompt_name is None
        )

    def encode(self, texts: list[str]) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Yield (places, vectors) of some of the texts at a time, float32, shape (places, model's dimension).

        Holds one slice of tokens and two batches a worker.
        """
        waiting: deque[tuple[Batch, Future[np.ndarray[Any, Any]]]] = deque()
        for batches in self._sliced(texts):
            # A single batch gets all cores; of many, each has one.
            threads = joblib.cpu_count() if len(batches) == 1 else 1
            for batch in batches:
                if len(waiting) == 2 * self._device.workers:
                    done, vectors = waiting.popleft()
                    yield done.places, vectors.result()
                waiting.append((batch, self._encoding.submit(self._encode, batch, threads)))
        for done, vectors in waiting:
            yield done.places, vectors.result()

    def _sliced(self, texts: list[str]) -> Iterator[list[Batch]]:
        """The batches of a slice at a time, of which the next is tokenised meanwhile."""
        ahead: Future[list[list[int]]] | None = None
        for start in range(0, len(texts) + _SLICE_TEXTS, _SLICE_TEXTS):
            tokenised, ahead = ahead, None
            if part := texts[start : start + _SLICE_TEXTS]:
                ahead = self._tokenising.submit(self._tokenise, part)
            if tokenised is not None:
                yield self._batches(tokenised.result(), start - _SLICE_TEXTS)

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, truncation=True, return_attention_mask=False, return_token_type_ids=False)
        token_ids: list[list[int]] = encoded["input_ids"]
        return token_ids

    def _batches(self, token_ids: list[list[int]], first_place: int) -> list[Batch]:
        """Ascending by length, so that a batch has few lengths; as many for each worker, where there is enough."""
        lengths = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
        order = np.argsort(lengths, kind="stable")
        ends = lengths[order].cumsum()
        fair = -(-int(ends[-1]) // self._device.workers)
        most = min(self._device.batch_tokens, max(fair, _LEAST_TOKENS))
        cuts = np.flatnonzero(np.diff((ends - 1) // most)) + 1
        return [
            Batch(part + first_place, lengths[part], np.concatenate([token_ids[at] for at in part]))
            for part in np.split(order, cuts)
        ]

    @torch.inference_mode()
    def _encode(self, batch: Batch, threads: int) -> np.ndarray[Any, Any]:
        torch.set_num_threads(threads)  # of this worker
        starts = batch.lengths.cumsum() - batch.lengths
        positions = np.arange(len(batch.token_ids)) - np.repeat(starts, batch.lengths) + self._first_position
        ends = np.append(starts, len(batch.token_ids)).astype(np.int32)
        input_ids, position_ids = self._on_device(batch.token_ids)[None], self._on_device(positions)[None]
        runs = [(len(list(run)), int(length)) for length, run in groupby(batch.lengths)]
        bounds = Bounds(runs, self._on_device(ends), int(batch.lengths[-1]))
        tokens = self._bert(input_ids=input_ids, position_ids=position_ids, bounds=bounds).last_hidden_state
        # As sentence-transformers' own unpadded batches come to what is behind the transformer.
        features = {"input_ids": input_ids, "token_embeddings": tokens, "cu_seq_lens_q": bounds.ends}
        for module in self._behind:
            features = module(features)
        vectors: np.ndarray[Any, Any] = features["sentence_embedding"].float().cpu().numpy()
        return vectors

    def _on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._torch_device.type == "cuda":  # so that the copy does not wait for what is in the card
            tensor = tensor.pin_memory()
        return tensor.to(self._torch_device, non_blocking=True)


def attend(
    module: nn.Module,  # noqa: ARG001 - as transformers calls it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # noqa: ARG001
    *,
    scaling: float,
    bounds: Bounds,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each text to itself; of (1, heads, tokens, size) to (1, tokens, heads, size)."""
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    if query.device.type == "cuda" and _has_flash(query):
        ends, longest = bounds.ends, bounds.longest
        return cast("Tensor", varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling))[None], None
    attended = torch.empty_like(q)
    start = 0
    for texts, length in bounds.runs:
        part = slice(start, start := start + texts * length)
        query, key, value = (one[part].reshape(texts, length, *one.shape[1:]).transpose(1, 2) for one in (q, k, v))
        attended[part] = _within(query, key, value, scaling).transpose(1, 2).flatten(0, 1)
    return attended[None], None


def _within(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention in texts of one length, (texts, heads, length, size)."""
    if query.device.type == "cpu" and query.dtype is torch.bfloat16:
        # Twice as fast for short texts as the fused kernel, which costs some microseconds a text and head.
        q, k, v = (one.flatten(0, 1) for one in (query, key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
        return torch.bmm(scores.softmax(-1), v).view(query.shape)
    attended: Tensor = scaled_dot_product_attention(query, key, value, scale=scaling)
    return attended


def _has_flash(query: Tensor) -> bool:
    return query.dtype is not torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)


class _PrepackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN reads them, which else puts them in order for each batch anew."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return product


def _prepack(module: nn.Module, rows: int) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _PrepackedLinear(child, rows))
        else:
            _prepack(child, rows)


AttentionInterface.register(_ATTENTION, attend)
