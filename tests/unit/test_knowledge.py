"""What is served: there and back through the store, and never more than data."""

import io
import json
import zipfile
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knowledge_data import DAY_MS, NOW, catalog_of, some_campaigns, some_history
from personalization.errors import StoreError
from personalization.learning.history import take_snapshot
from personalization.learning.training import fit_ranker, past_examples
from personalization.recommend import knowledge
from personalization.recommend.knowledge import ServedKnowledge, is_current
from personalization.recommend.sources import CampaignKnowledge
from personalization.schemas import VectorSpace
from personalization.understanding.classifier import IntentClassifier


def same(one: CampaignKnowledge, other: CampaignKnowledge) -> bool:
    for field in fields(CampaignKnowledge):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype, field.name
            assert ours.shape == theirs.shape, field.name
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
        else:
            assert ours == theirs, field.name
            assert type(ours) is type(theirs), field.name
    return True


def changed(served: ServedKnowledge, **changes: Any) -> bytes:
    """Its archive with some entries changed or, where None, left out."""
    with np.load(io.BytesIO(served.to_bytes())) as stored:
        content = {name: one for name, one in (dict(stored) | changes).items() if one is not None}
    crafted = io.BytesIO()
    np.savez_compressed(crafted, **content)
    return crafted.getvalue()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), candidates=st.integers(0, 6))
def test_what_is_served_comes_back_as_it_was(seed: int, candidates: int):
    campaigns = some_campaigns(np.random.default_rng(seed), candidates)
    served = ServedKnowledge(catalog_of(campaigns), campaigns, None)

    back = ServedKnowledge.from_bytes(served.to_bytes())

    assert same(back.campaigns, campaigns)
    assert back.catalog == served.catalog
    assert back.learned is None
    assert set(back.campaign_of) >= set(campaigns.ids)
    assert back.intent_names == {one: f"Intent {one}" for one in campaigns.intent_ids}


def test_the_ranker_goes_with_it():
    history = some_history(np.random.default_rng(3), users=60, campaigns=6, messages=600, events=1500)
    learned = fit_ranker(past_examples(history, NOW, 7 * DAY_MS, "any"))
    campaigns = take_snapshot(history, NOW).campaigns

    back = ServedKnowledge.from_bytes(ServedKnowledge(catalog_of(campaigns), campaigns, learned).to_bytes())

    assert back.learned == learned is not None
    assert same(back.campaigns, campaigns)


def test_ids_and_texts_in_any_script_come_back():
    campaigns = replace(some_campaigns(np.random.default_rng(1), 2), ids=["über uns, heute", "日本 🎿"])
    served = ServedKnowledge(catalog_of(campaigns), campaigns, None)

    back = ServedKnowledge.from_bytes(served.to_bytes())

    assert back.campaigns.ids == campaigns.ids
    assert back.catalog == served.catalog


def test_the_intents_reader_goes_with_it_and_reads_as_the_fitted_classifier_does():
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(5, 16))
    places = np.repeat(np.arange(5), 8)
    said = (centres[places] + rng.normal(size=(40, 16))).astype(np.float32)
    said /= np.linalg.norm(said, axis=1, keepdims=True)
    fitted = IntentClassifier.fit([f"i{place}" for place in places], said)
    campaigns = some_campaigns(rng, 2)
    served = ServedKnowledge(
        catalog_of(campaigns), campaigns, None, space=VectorSpace("a/model", 8), classifier_content=fitted.to_bytes()
    )

    back = ServedKnowledge.from_bytes(served.to_bytes())

    assert back.space == VectorSpace("a/model", 8)
    assert back.classifier is back.classifier is not None
    assert back.classifier.intent_ids == fitted.intent_ids
    for keep in (0.5, 0.94):
        assert back.classifier.classify(said, keep) == fitted.classify(said, keep)


def test_a_catalog_without_intents_has_no_reader():
    campaigns = some_campaigns(np.random.default_rng(0), 2)
    served = ServedKnowledge(catalog_of(campaigns), campaigns, None)

    assert ServedKnowledge.from_bytes(served.to_bytes()).classifier is None


@pytest.mark.parametrize(
    "changes", [{"format": np.int64(1)}, {"format": None}, {"classifier": None}, {"of_later": np.zeros(1)}]
)
def test_what_another_version_published_is_refused_with_the_remedy(changes: dict[str, Any]):
    campaigns = some_campaigns(np.random.default_rng(0), 2)
    served = ServedKnowledge(catalog_of(campaigns), campaigns, None)
    other = changed(served, **changes)

    assert is_current(served.to_bytes())
    assert not is_current(other)
    with pytest.raises(StoreError, match="analytics: what is served was published by another version; run the pipe"):
        ServedKnowledge.from_bytes(other)


def test_the_format_names_every_entry():
    """Whoever adds, drops or renames one sees here that what is stored has changed, and so do older processes."""
    campaigns = some_campaigns(np.random.default_rng(0), 2)
    content = ServedKnowledge(catalog_of(campaigns), campaigns, None).to_bytes()

    with np.load(io.BytesIO(content)) as stored:
        assert set(stored) == knowledge._ENTRIES


def test_no_pickled_object_is_read():
    served = ServedKnowledge(
        catalog_of(some_campaigns(np.random.default_rng(0), 2)), some_campaigns(np.random.default_rng(0), 2), None
    )
    crafted = changed(served, ids=np.asarray([json.loads], dtype=object))  # as an attacker might have it loaded

    with pytest.raises(ValueError, match="allow_pickle"):
        ServedKnowledge.from_bytes(crafted)
    with zipfile.ZipFile(io.BytesIO(served.to_bytes())) as archive:
        assert all(not np.load(archive.open(name)).dtype.hasobject for name in archive.namelist())


def test_only_what_runs_is_ranked_and_it_is_drawn_once():
    campaigns = some_campaigns(np.random.default_rng(0), 3)
    campaigns.active_from[:] = [NOW - DAY_MS, NOW + 1, 0]
    campaigns.active_until[:] = [NOW, NOW + DAY_MS, NOW + DAY_MS]
    served = ServedKnowledge(catalog_of(campaigns), campaigns, None)

    assert served.running(NOW - 1).ids == ["c0", "c2"]
    assert served.running(NOW).ids == ["c2"]
    assert served.running(NOW) is served.running(NOW)
    assert served.running(NOW + 1).ids == ["c1", "c2"]
    assert served.running(NOW + 2 * DAY_MS).ids == []
    assert served == ServedKnowledge(served.catalog, campaigns, None)  # what was drawn is no part of it
