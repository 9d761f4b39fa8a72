"""The sources' formulas against naive ones, a campaign and a user at a time."""

import math
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from knowledge_data import DAY_MS, DIMS, NOW, some_campaigns, some_history, some_users
from personalization.learning import history as learning
from personalization.learning.history import take_snapshot
from personalization.recommend.sources import (
    LIFTED,
    SOURCES,
    TREND_HALF_LIVES_DAYS,
    WALK_CONTINUES,
    CampaignKnowledge,
    UserKnowledge,
    score_context,
    score_sources,
)

worlds = given(seed=st.integers(0, 2**32), users=st.integers(0, 3), candidates=st.integers(0, 6))


def cosine(one: Any, other: Any) -> float:
    return float(sum(float(a) * float(b) for a, b in zip(one, other, strict=True)))


def naive_sources(c: CampaignKnowledge, u: UserKnowledge, user: int, at: int) -> dict[str, float]:
    """What each source says of one candidate for one user."""
    intents = {name: math.log1p(w) for name, w in zip(c.intent_ids, u.intents.toarray()[user], strict=True) if w}
    engaged = {name: math.log1p(w) for name, w in zip(c.engaged_ids, u.engaged.toarray()[user], strict=True) if w}
    length = math.sqrt(sum(one**2 for one in engaged.values()))
    own = engaged.get(c.ids[at], 0)
    links = [(c.intent_ids.index(one), weight) for one, weight in intents.items()]
    links += [(len(c.intent_ids) + c.engaged_ids.index(one), weight) for one, weight in engaged.items()]
    total = sum(weight for _, weight in links)
    topics = [one for one in u.interests[user] if any(one)]
    hours = (c.at - max(c.last_at[at], min(c.active_from[at], c.at))) / 3_600_000
    together = sum(w / length * c.co_engagement[c.engaged_ids.index(one), at] for one, w in engaged.items())
    return {
        "own_intents": sum(w * c.targets[c.intent_ids.index(one), at] for one, w in intents.items()),
        "own_engagement": own,
        "similar_users": u.neighbours_engaged[user, at],
        "co_engagement": max(together - own, 0),
        "graph_walk": sum(w / total * 0.85 * c.walk[node, at] for node, w in links),
        "message_similarity": max((cosine(one, c.text[at]) for one in topics), default=0),
        "audience_similarity": cosine(u.profile[user], c.audience[at]),
        "popularity": math.log1p(c.trend[at, 2]),
        "recency": 1 / (1 + max(hours, 0) / 24),
    }


def naive_context(
    c: CampaignKnowledge, u: UserKnowledge, user: int, at: int, said: dict[str, float]
) -> dict[str, float]:
    topics = [one for one in u.interests[user] if any(one)]
    engaged = u.engaged.toarray()[user]
    of_category = [w for w, code in zip(engaged, c.engaged_category, strict=True) if code == c.category[at]]
    known = [w for w, code in zip(engaged, c.engaged_category, strict=True) if code >= 0]
    return {
        **{f"trend_{days:g}d": math.log1p(c.trend[at, n]) for n, days in enumerate(TREND_HALF_LIVES_DAYS)},
        "engaged_users": math.log1p(c.users[at]),
        "age_days": min((c.at - c.active_from[at]) / DAY_MS, 365),
        "user_messages": math.log1p(u.messages[user]),
        "user_engagement": math.log1p(sum(engaged)),
        "profile_similarity": cosine(u.profile[user], c.text[at]),
        "audience_interest": max((cosine(one, c.audience[at]) for one in topics), default=0),
        "neighbours": u.neighbours[user, at],
        "category_affinity": sum(of_category) / sum(known) if sum(known) else 0,
        **{f"{one}_lift": said[one] / (1 + c.trend[at, -1]) for one in LIFTED},
    }


@worlds
def test_the_formulas_are_those_of_naive_loops(seed: int, users: int, candidates: int):
    rng = np.random.default_rng(seed)
    campaigns = some_campaigns(rng, candidates)
    known = some_users(rng, users, campaigns)

    sources = score_sources(campaigns, known)
    context = score_context(campaigns, known, sources)

    assert set(sources) == set(SOURCES)
    for matrix in (*sources.values(), *context.values()):
        assert matrix.shape == (users, candidates)
        assert matrix.dtype == np.float32
        assert np.isfinite(matrix).all()
    for user in range(users):
        for at in range(candidates):
            said = naive_sources(campaigns, known, user, at)
            assert {one: sources[one][user, at] for one in said} == pytest.approx(said, rel=1e-4, abs=1e-5)
            about = naive_context(campaigns, known, user, at, said)
            assert {one: context[one][user, at] for one in context} == pytest.approx(about, rel=1e-4, abs=1e-5)


@worlds
def test_users_are_scored_one_by_one_as_together(seed: int, users: int, candidates: int):
    """The API asks for one user, training for a thousand."""
    rng = np.random.default_rng(seed)
    campaigns = some_campaigns(rng, candidates)
    known = some_users(rng, users, campaigns)
    together = score_sources(campaigns, known)
    for user in range(users):
        alone = UserKnowledge(**{name: values[user : user + 1] for name, values in vars(known).items()})
        for source, matrix in score_sources(campaigns, alone).items():
            np.testing.assert_allclose(matrix, together[source][user : user + 1], rtol=1e-5, atol=1e-6)


def test_of_a_user_nothing_is_known_of_only_the_crowd_speaks():
    rng = np.random.default_rng(0)
    campaigns = some_campaigns(rng, 6)
    known = some_users(rng, 1, campaigns)
    silent = UserKnowledge(
        ["new"],
        known.intents * 0,
        known.engaged * 0,
        *(0 * part for part in (known.profile, known.interests, known.neighbours_engaged, known.neighbours)),
        known.messages * 0,
    )

    speaking = {source for source, matrix in score_sources(campaigns, silent).items() if matrix.any()}

    assert speaking == {"popularity", "recency"}


@worlds
def test_some_of_the_candidates_are_known_as_all_were(seed: int, users: int, candidates: int):
    rng = np.random.default_rng(seed)
    campaigns = some_campaigns(rng, candidates)
    known = some_users(rng, users, campaigns)
    kept = rng.random(candidates) < 0.6
    fewer = UserKnowledge(
        **{name: values[:, kept] if name.startswith("neighbours") else values for name, values in vars(known).items()}
    )

    part = campaigns.only(kept)

    assert part.ids == [one for one, keep in zip(campaigns.ids, kept, strict=True) if keep]
    whole = score_sources(campaigns, known)
    for source, matrix in score_sources(part, fewer).items():
        np.testing.assert_allclose(matrix, whole[source][:, kept], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(part.active(NOW), campaigns.active(NOW)[kept])
    assert campaigns.only(np.ones(candidates, dtype=bool)) is campaigns


def test_a_campaign_runs_from_its_first_millisecond_until_its_end():
    campaigns = some_campaigns(np.random.default_rng(0), 1)
    start, end = int(campaigns.active_from[0]), int(campaigns.active_until[0])

    assert [bool(campaigns.active(at)[0]) for at in (start - 1, start, end - 1, end)] == [False, True, True, False]


# --- walks


def graph_of(expressed: Any, engaged: Any, targets: Any) -> nx.Graph:
    """Users, intents and campaigns as networkx sees them."""
    graph = nx.Graph()
    graph.add_nodes_from(("user", at) for at in range(expressed.shape[0]))
    graph.add_nodes_from(("intent", at) for at in range(expressed.shape[1]))
    graph.add_nodes_from(("campaign", at) for at in range(engaged.shape[1]))
    for kind, matrix in (("intent", expressed), ("campaign", engaged)):
        for (user, at), weight in np.ndenumerate(np.log1p(matrix.toarray().astype(float))):
            if weight:
                graph.add_edge(("user", user), (kind, at), weight=weight)
    for (intent, campaign), weight in np.ndenumerate(targets):
        if weight:
            graph.add_edge(("intent", intent), ("campaign", campaign), weight=float(weight))
    return graph


def pagerank(graph: nx.Graph, start: tuple[str, int]) -> Any:
    found = nx.pagerank(graph, alpha=0.85, personalization={start: 1}, weight="weight", tol=1e-12, max_iter=5000)
    return np.asarray([found["campaign", at] for at in range(sum(kind == "campaign" for kind, _ in graph))])


@pytest.mark.parametrize("seed", range(8))
def test_a_walk_is_the_personalised_pagerank_of_networkx(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learning, "_WALK_STEPS", 200)
    monkeypatch.setattr(learning, "_COLUMNS_AT_ONCE", 3)
    rng = np.random.default_rng(seed)
    past = some_history(rng, users=5, campaigns=6, messages=12, events=12)
    expressed, engaged, targets = past.expressed(NOW), past.engaged(NOW), past.catalog.targets
    columns = np.sort(rng.choice(6, size=4, replace=False))
    graph = graph_of(expressed, engaged, targets)

    walks = learning._walks(expressed, engaged, targets, columns)

    intents = targets.shape[0]
    assert walks.shape == (intents + 6, 4)
    nodes = [("intent", at) for at in range(intents)] + [("campaign", at) for at in range(6)]
    for node, walk in zip(nodes, walks, strict=True):
        if graph.degree(node):  # from where nothing leads away, networkx starts over and the platform stops
            np.testing.assert_allclose(walk, pagerank(graph, node)[columns], atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_a_user_s_walk_is_the_mean_of_those_of_their_links(seed: int, monkeypatch: pytest.MonkeyPatch):
    """So a user takes no walk of their own: PageRank is linear in where it restarts."""
    monkeypatch.setattr(learning, "_WALK_STEPS", 200)
    past = some_history(np.random.default_rng(seed), users=5, campaigns=6, messages=12, events=12)
    snapshot = take_snapshot(past, NOW)
    graph = graph_of(past.expressed(NOW), past.engaged(NOW), past.catalog.targets)

    walked = score_sources(snapshot.campaigns, snapshot.users(np.arange(5)))["graph_walk"]

    for user in range(5):
        if graph.degree(("user", user)):
            np.testing.assert_allclose(walked[user], pagerank(graph, ("user", user))[snapshot.columns], atol=1e-5)
        else:
            assert not walked[user].any()


@pytest.mark.parametrize("seed", range(8))
def test_the_steps_that_are_taken_are_near_to_the_end_of_the_walk(seed: int, monkeypatch: pytest.MonkeyPatch):
    past = some_history(np.random.default_rng(seed), users=12, campaigns=8)
    short = take_snapshot(past, NOW).campaigns.walk
    monkeypatch.setattr(learning, "_WALK_STEPS", 300)

    long = take_snapshot(past, NOW).campaigns.walk

    assert np.abs(short - long).max() < WALK_CONTINUES**12 / 4
    for ours, theirs in zip(short, long, strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] > 0.99


def test_an_interest_that_points_away_is_no_likeness_of_nothing():
    """The best of a user's interests counts, also where all point away; no interest at all is a 0."""
    campaigns = some_campaigns(np.random.default_rng(0), 1)
    campaigns.text[0] = np.eye(DIMS)[0]
    known = some_users(np.random.default_rng(0), 3, campaigns)
    known.interests[:] = 0
    known.interests[0, 0] = -np.eye(DIMS)[0]
    known.interests[1, :2] = -np.eye(DIMS)[0], np.eye(DIMS)[1]

    assert score_sources(campaigns, known)["message_similarity"][:, 0].tolist() == [-1, 0, 0]
