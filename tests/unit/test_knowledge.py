"""What is served: there and back through the store, and never more than data."""

import io
import json
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knowledge_data import DAY_MS, NOW, catalog_of, some_campaigns, some_history
from personalization.learning.history import take_snapshot
from personalization.learning.training import fit_ranker, past_examples
from personalization.recommend.knowledge import ServedKnowledge
from personalization.recommend.sources import CampaignKnowledge


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


def test_no_pickled_object_is_read():
    served = ServedKnowledge(
        catalog_of(some_campaigns(np.random.default_rng(0), 2)), some_campaigns(np.random.default_rng(0), 2), None
    )
    with np.load(io.BytesIO(served.to_bytes())) as stored:
        content = dict(stored)
    content["ids"] = np.asarray([json.loads], dtype=object)  # as an attacker might have it loaded
    crafted = io.BytesIO()
    np.savez_compressed(crafted, **content)

    with pytest.raises(ValueError, match="allow_pickle"):
        ServedKnowledge.from_bytes(crafted.getvalue())
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
