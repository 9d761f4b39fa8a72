"""The encoder: text to L2-normalised float32 vectors. Loads torch, and only when it is made."""

import ctypes
import hashlib
import importlib.util
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from personalization.errors import EmbeddingError

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]

_PACKAGE_PREFIX = "package:"
_SLICE_TEXTS = 2048
_MODEL_FILES = {".json", ".txt", ".model", ".bin", ".safetensors"}

log = structlog.get_logger(__name__)


class Encoder:
    """A sentence-transformers model on the best device at hand, in half precision where that is faster."""

    def __init__(self, model_name: str, dim: int, *, only_local: bool = False) -> None:
        """Load the model; with `only_local` nothing is fetched from the hub."""
        import torch
        from sentence_transformers import SentenceTransformer

        from personalization.packed import PackedModel

        self.device = _best_device(torch)
        self.dtype = _best_dtype(torch, self.device)
        try:
            self._model: Any = SentenceTransformer(
                model_location(model_name),
                device=self.device,
                model_kwargs={"dtype": self.dtype},
                local_files_only=only_local,
            )
        except (OSError, ValueError) as error:
            raise EmbeddingError(
                f"EMBEDDING_MODEL {model_name!r} cannot be loaded: {error}. Name a model of the hub, a folder that "
                f"holds one, or package:NAME for a Python package that carries one"
            ) from error
        self.model_dim: int = self._model.get_embedding_dimension() or 0
        if self.model_dim > dim:
            raise EmbeddingError(
                f"EMBEDDING_MODEL {model_name!r} makes {self.model_dim}-d vectors, which do not fit "
                f"EMBEDDING_DIM={dim}; set it, or the dim of a migration, to {self.model_dim} or more"
            )
        self._dim = dim
        self._packed = PackedModel(self._model) if PackedModel.can_take(self._model) else None
        way = "without padding" if self._packed else "in padded batches"
        log.info(f"{model_name}: {self.model_dim}-d, {way}, {self.dtype_name} on {self.device}, as {dim}-d vectors")

    @property
    def dtype_name(self) -> str:
        """Precision of the forward pass."""
        return str(self.dtype).removeprefix("torch.")

    def encode(self, texts: list[str]) -> Vectors:
        """Vectors of the texts, shape (len(texts), dim), float32, unit length, zero-padded to `dim`.

        Identical texts are encoded once, and nothing is padded where the model allows it (`PackedModel`).
        Zero-padding leaves cosine and inner product unchanged.
        """
        place = {text: at for at, text in enumerate(dict.fromkeys(texts))}
        unique = list(place)
        vectors = np.zeros((len(unique), self._dim), dtype=np.float32)
        tell = log.info if len(unique) > _SLICE_TEXTS else log.debug  # of long work, not of each request
        started = time.perf_counter()
        done = told = 0
        for places, encoded in self._encode(unique):
            norms = np.linalg.norm(encoded, axis=1, keepdims=True)
            if not np.all(np.isfinite(norms) & (norms > 0)):
                raise EmbeddingError("the model made a vector without a direction: of length zero, or not a number")
            vectors[places, : self.model_dim] = encoded / norms
            done += len(places)
            if done - told >= _SLICE_TEXTS or done == len(unique):
                told = done
                tell(f"{done:,} of {len(unique):,} texts embedded, {done / (time.perf_counter() - started):,.0f}/s")
                if self.device == "cpu" and len(unique) > _SLICE_TEXTS:
                    _give_memory_back()
        return vectors if len(unique) == len(texts) else vectors[[place[text] for text in texts]]

    def _encode(self, texts: list[str]) -> Iterator[tuple[Any, Any]]:
        """Yield (places, vectors) of some of the texts at a time."""
        if self._packed:
            yield from self._packed.encode(texts)
            return
        by_length = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        for start in range(0, len(by_length), _SLICE_TEXTS):
            part = by_length[start : start + _SLICE_TEXTS]
            encoded = self._model.encode([texts[at] for at in part], convert_to_tensor=True, show_progress_bar=False)
            yield part, encoded.float().cpu().numpy()


@lru_cache(maxsize=2)
def get_encoder(model_name: str, dim: int) -> Encoder:
    """The process's encoders, two at most: of the live vector space and of one beside it. Loading takes seconds."""
    return Encoder(model_name, dim)


def model_version(model_name: str) -> str | None:
    """Tells the model's present weights from others, without loading them: 16 hexadecimal digits.

    Of a model of the hub the commit that this machine holds, None before one was fetched; else a digest of the files,
    at some GB a second. The precision is no part of it: float32 and bfloat16 differ by less than 0.001 in cosine.
    """
    location = model_location(model_name)
    if Path(location).is_dir():
        return _digest_of_files(location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(location, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return hashlib.blake2b(f"{location} {Path(folder).name}".encode(), digest_size=8).hexdigest()


@lru_cache(maxsize=1)
def _digest_of_files(folder: str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in _MODEL_FILES and path.is_file():
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            with path.open("rb") as stream:
                while chunk := stream.read(2**20):
                    digest.update(chunk)
    return digest.hexdigest()


def model_location(model_name: str) -> str:
    """A hub name or folder as it is; `package:NAME` is the folder `model` that the Python package carries."""
    if not model_name.startswith(_PACKAGE_PREFIX):
        return model_name
    package = model_name.removeprefix(_PACKAGE_PREFIX)
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise EmbeddingError(f"EMBEDDING_MODEL names the Python package {package!r}, which is not installed")
    return str(Path(spec.origin).parent / "model")


def _best_device(torch: Any) -> str:
    if torch.cuda.is_available():  # of several cards, mapped tasks get one or another
        return f"cuda:{os.getpid() % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _best_dtype(torch: Any, device: str) -> Any:
    """Half precision where the hardware multiplies in it; elsewhere it is slower than float32."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device == "cpu" and _cpu_has_bf16():
        return torch.bfloat16
    return torch.float16 if device == "mps" else torch.float32


def _give_memory_back() -> None:
    """What batches of ever other sizes leave in pieces, glibc keeps: some 40 MB more with each shard. Some 10 ms."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _cpu_has_bf16() -> bool:
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.exists() and bool({"avx512_bf16", "amx_bf16"} & set(cpu_info.read_text().split()))
