"""Texts through a BERT without padding: a batch is one row of tokens, and attention stays within each text.

All else in the model works on each token by itself, so texts may lie one behind the other as long as positions are
counted anew for each and attention knows where each ends. Loads torch.
"""

import os
import platform
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
_PROGRAMS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Programs for a shape that oneDNN keeps, and PyTorch for it; by themselves 1,024 each, which batches of ever other
shapes fill with hundreds of MB, and which are no faster than 128.
"""
_STRETCH = 64  # tokens whose attention is computed together on a card
_SCORES_A_TEXT = 6400  # that it makes by stretches in the time of one text by itself, measured on an H200


class Device(NamedTuple):
    """How a device is kept busy."""

    workers: int
    batch_tokens: int

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """On a CPU a batch for each core, of what its cache holds: threads that share one wait for each other.

        A card is handed batches that fill it by one worker, which does not wait for what it has handed over: two
        would have theirs done at the same time, and the card without work.
        """
        return cls(joblib.cpu_count(), 2048) if device.type == "cpu" else cls(1, 65_536)


class Batch(NamedTuple):
    """Texts one behind the other, ascending by length."""

    places: np.ndarray[Any, np.dtype[np.int64]]
    """Where they stood among all texts."""
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    """Tokens of each."""
    token_ids: np.ndarray[Any, np.dtype[np.int64]]


class Encoded(NamedTuple):
    """Vectors of a batch, float32, shape (texts, model's dimension); on their way from a card until `arrived`."""

    vectors: Tensor
    arrived: torch.cuda.Event | None

    def fetch(self) -> np.ndarray[Any, Any]:
        """Wait for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        vectors: np.ndarray[Any, Any] = self.vectors.numpy()
        return vectors


class Bounds(NamedTuple):
    """Where the texts of a batch lie, for attention."""

    runs: list[tuple[int, int]]
    """(texts, tokens of each) of neighbours of one length."""
    ends: Tensor
    """First token of each text, and the end of the last; int32, shape (texts + 1,)."""
    longest: int
    apart: Tensor | None
    """Where attention goes by stretches: -inf between texts, shape (stretches, 1, _STRETCH, tokens in reach)."""


class PackedModel:
    """A sentence-transformers model whose transformer is a BERT or RoBERTa, changed to take packed batches."""

    def __init__(self, model: Any) -> None:
        transformer, *self._behind = model
        self._tokenizer = transformer.tokenizer.backend_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(transformer.tokenizer.model_max_length)
        self._bert = transformer.model
        self._bert.set_attn_implementation(_ATTENTION)
        config = self._bert.config
        self._first_position: int = config.pad_token_id + 1 if config.model_type in _COUNTED_BEHIND_PADDING else 0
        self._torch_device: torch.device = self._bert.device
        self._device = Device.of(self._torch_device)
        self._has_flash = _has_flash(self._bert)
        if self._has_flash:  # cuDNN plans for each shape anew, in the time of a batch
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self._torch_device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
            for cache in _PROGRAMS:  # read when the first one is made
                os.environ.setdefault(cache, "128")
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
            and transformer.tokenizer.is_fast
            and not config.is_decoder
            and [type(one).__name__ for one in behind[:1]] == ["Pooling"]
            and model.default_prompt_name is None
        )

    def encode(self, texts: list[str]) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Yield (places, vectors) of some of the texts at a time, float32, shape (places, model's dimension).

        Holds two slices of tokens, and a batch for each worker with two more.
        """
        yield from self._through(self._sliced(texts))

    def _through(self, slices: Iterable[list[Batch]]) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batches in slices:
            # A single batch gets all cores; of many, each has one.
            threads = joblib.cpu_count() if len(batches) == 1 else 1
            for batch in batches:
                if len(waiting) == self._device.workers + 2:
                    done, encoded = waiting.popleft()
                    yield done.places, encoded.result().fetch()
                waiting.append((batch, self._encoding.submit(self._encode, batch, threads)))
        for done, encoded in waiting:
            yield done.places, encoded.result().fetch()

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
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def _batches(self, token_ids: list[list[int]], first_place: int) -> list[Batch]:
        """Ascending by length, so that a batch has few lengths; alike, and as many for each worker."""
        lengths = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
        order = np.argsort(lengths, kind="stable")
        ends = lengths[order].cumsum()
        share = max(-(-int(ends[-1]) // self._device.workers), _LEAST_TOKENS)
        most = -(-share // -(-share // self._device.batch_tokens))
        cuts = np.flatnonzero(np.diff((ends - 1) // most)) + 1
        return [
            Batch(part + first_place, lengths[part], np.concatenate([token_ids[at] for at in part]))
            for part in np.split(order, cuts)
        ]

    @torch.inference_mode()
    def _encode(self, batch: Batch, threads: int) -> Encoded:
        torch.set_num_threads(threads)  # of this worker
        token_ids, lengths = batch.token_ids, batch.lengths
        reach = _reach(lengths) if self._has_flash else None
        if reach:  # a text of padding at each end, so that every stretch is whole and reaches as far
            behind = reach + -len(token_ids) % _STRETCH
            token_ids = np.pad(token_ids, (reach, behind))
            lengths = np.concatenate(([reach], lengths, [behind]))
        starts = lengths.cumsum() - lengths
        positions = np.arange(len(token_ids)) - np.repeat(starts, lengths) + self._first_position
        ends = self._on_device(np.append(starts, len(token_ids)).astype(np.int32))
        texts = self._on_device(np.repeat(np.arange(len(lengths)), lengths))
        of_length, counts = np.unique(batch.lengths, return_counts=True)
        runs = list(zip(counts.tolist(), of_length.tolist(), strict=True))
        bounds = Bounds(runs, ends, int(of_length[-1]), _apart(texts, reach, self._bert.dtype) if reach else None)
        input_ids = self._on_device(token_ids)[None]
        tokens = self._bert(
            input_ids=input_ids, position_ids=self._on_device(positions)[None], bounds=bounds
        ).last_hidden_state
        # As sentence-transformers' own unpadded batches come to what is behind the transformer.
        features = {"input_ids": input_ids, "token_embeddings": tokens, "cu_seq_lens_q": ends, "seq_idx": texts[None]}
        for module in self._behind:
            features = module(features)
        vectors = features["sentence_embedding"]
        return self._from_device(vectors[1:-1] if reach else vectors)

    def _on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._torch_device.type == "cuda":  # so that the copy does not wait for what is in the card
            tensor = tensor.pin_memory()
        return tensor.to(self._torch_device, non_blocking=True)

    def _from_device(self, vectors: Tensor) -> Encoded:
        if self._torch_device.type != "cuda":
            return Encoded(vectors.float().cpu(), None)
        on_its_way = vectors.float().to("cpu", non_blocking=True)
        return Encoded(on_its_way, torch.cuda.current_stream(self._torch_device).record_event())


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
    if bounds.apart is not None:
        return _by_stretches(q, k, v, bounds.apart, scaling)[None], None
    if _has_flash(query):
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


def _reach(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> int | None:
    """How far to each side attention goes by stretches; None where text by text is faster."""
    reach = -(-int(lengths[-1]) // 32) * 32
    return reach if (_STRETCH + 2 * reach) * lengths.mean() < _SCORES_A_TEXT else None


def _apart(texts: Tensor, reach: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores of tokens, given the text of each."""
    same = texts[reach:-reach].view(-1, 1, _STRETCH, 1) == _in_reach(texts, reach)[:, None, None]
    return torch.zeros_like(same, dtype=dtype).masked_fill_(~same, float("-inf"))


def _by_stretches(q: Tensor, k: Tensor, v: Tensor, apart: Tensor, scaling: float) -> Tensor:
    """Attention of each stretch of tokens to all that can be of the same texts, (tokens, heads, size).

    A kernel that takes text by text fills a tile of its own for each, most of it with nothing.
    """
    reach = (apart.shape[-1] - _STRETCH) // 2
    stretches = q[reach:-reach].view(-1, _STRETCH, *q.shape[1:]).transpose(1, 2)
    keys, values = (_in_reach(one, reach).transpose(2, 3) for one in (k, v))
    found = scaled_dot_product_attention(stretches, keys, values, attn_mask=apart, scale=scaling)
    attended = torch.zeros_like(q, memory_format=torch.contiguous_format)
    attended[reach:-reach] = found.transpose(1, 2).flatten(0, 1)
    return attended


def _in_reach(rows: Tensor, reach: int) -> Tensor:
    """What each stretch of rows can reach, as a view: (stretches, ..., _STRETCH + 2 * reach)."""
    return rows.unfold(0, _STRETCH + 2 * reach, _STRETCH)


def _has_flash(tensor: Any) -> bool:
    if tensor.device.type != "cuda" or tensor.dtype is torch.float32:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


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
