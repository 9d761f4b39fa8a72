"""The simulated world: that it is what it says, and that what it knows is worth knowing."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from personalization.catalog.loading import load_catalog
from personalization.reading import read_rows
from personalization.schemas import Event, Message
from upath import UPath

from benchmarks import generator
from benchmarks.generator import END, POSITIONS, Config, Events, Interests, Truth, World, examination, generate

SMALL = Config(users=400, weeks=8, campaigns_per_week=12, seed=5)
DAY = 86_400


real = pytest.mark.usefixtures("shared_data")


@pytest.fixture(scope="module")
def world(shared_data: Path) -> World:
    return generate(SMALL)


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world.write(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is written


def test_the_same_configuration_writes_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path):
    generate(SMALL).write(tmp_path / "again")
    generate(replace(SMALL, seed=6)).write(tmp_path / "other")

    assert files(tmp_path / "again") == files(folder)
    other = files(tmp_path / "other")
    assert {name for name, content in files(folder).items() if other[name] == content} == set()


def test_all_that_is_written_is_what_the_platform_takes(world: World, folder: Path):
    messages = [Message.model_validate(row.value) for row in read_rows(UPath(folder / "messages.jsonl"))]
    rows = [row.value for row in read_rows(UPath(folder / "events.csv"))]
    numbers: dict[str, type[int] | type[float]] = {"position": int, "propensity": float}
    events = [
        Event.model_validate({name: numbers.get(name, str)(value) for name, value in row.items() if value})
        for row in rows
    ]
    catalog = load_catalog(folder / "catalog")

    assert (len(messages), len(events)) == (len(world.messages.user), len(world.events.user))
    assert {event.campaign_id for event in events} <= {campaign.id for campaign in catalog.campaigns}
    assert max(one.timestamp for one in [*messages, *events]) < END
    assert len({one.message_id for one in messages}) == len(messages)
    for kept in (messages, events):
        assert [one.timestamp for one in kept] == sorted(one.timestamp for one in kept)


def test_a_catalog_without_intents_is_of_the_same_world(folder: Path, tmp_path: Path):
    generate(replace(SMALL, with_intents=False)).write(tmp_path)
    campaigns = load_catalog(tmp_path / "catalog").campaigns
    labelled = load_catalog(folder / "catalog").campaigns

    assert all(not one.intents and one.category == "general" for one in campaigns)
    assert all(1 <= len(one.intents) <= 3 and one.category != "general" for one in labelled)
    assert [one.text for one in campaigns] == [one.text for one in labelled]
    for name in ("messages.jsonl", "events.csv", "truth.parquet"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@real
def test_the_command_line_writes_a_world_and_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generator.main([str(tmp_path), "--users", "20", "--weeks", "3", "--campaigns-per-week", "4", "--seed", "2"])

    counts = json.loads(capsys.readouterr().out)
    assert counts["messages"] == len((tmp_path / "messages.jsonl").read_text().splitlines())
    about = json.loads((tmp_path / "world.json").read_text())
    assert about["rows"] == counts
    assert (about["config"]["users"], about["start"]) == (20, "2026-10-11T00:00:00+00:00")


def test_without_the_real_messages_the_command_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(generator, "DATA", tmp_path / "nowhere")

    with pytest.raises(SystemExit):
        generator.main([str(tmp_path)])

    assert "PERSONALIZATION_TEST_DATA" in capsys.readouterr().err


@real
def test_the_smallest_world_can_be_drawn_and_an_empty_one_cannot():
    smallest = generate(Config(users=1, weeks=1, campaigns_per_week=1))

    assert smallest.counts()["campaigns"] >= 1
    with pytest.raises(ValueError, match="at least 1"):
        Config(users=0)


# --- messages and texts


@real
@pytest.mark.parametrize("corpus", ["clinc150", "banking77", "both"])
def test_what_users_say_is_never_what_the_catalog_says(corpus: generator.Corpus):
    texts = generator.load_texts(corpus, np.random.default_rng(1))
    speech, copy, examples = (
        {text.casefold() for intent in range(len(texts.intents)) for text in pool.of(intent)}
        for pool in (texts.speech, texts.copy, texts.examples)
    )

    assert len(speech) > 2 * len(copy) > 10 * len(texts.intents)
    assert speech & copy == speech & examples == copy & examples == set()
    assert len(texts.intents) == {"clinc150": 120, "banking77": 77, "both": 197}[corpus]


def test_two_in_five_messages_say_nothing_and_the_others_say_what_they_mean(world: World):
    messages, texts = world.messages, world.texts
    astray = messages.intent < 0

    assert 0.3 < astray.mean() < 0.5
    for place in np.flatnonzero(~astray)[:200]:
        assert messages.text[place] in texts.speech.of(messages.intent[place])
    nothing = {*texts.off_topic.of(0), *texts.off_topic.of(1)}
    assert set(messages.text[astray]) <= nothing


def test_activity_is_heavy_tailed_and_users_arrive_all_through(world: World):
    counts = np.bincount(world.messages.user, minlength=SMALL.users)
    present, first = np.unique(world.messages.user, return_index=True)
    arrivals = np.bincount(world.messages.seconds[first] // (7 * DAY), minlength=SMALL.weeks)

    assert counts.mean() == pytest.approx(SMALL.messages_per_user, rel=0.3)
    assert (counts < 3).mean() > 0.1
    assert np.sort(counts)[-SMALL.users // 10 :].sum() > 0.4 * counts.sum()
    assert len(present) < SMALL.users
    assert (arrivals > 0).all()


def test_interests_drift_but_stay_as_concentrated_as_they_were():
    domain_of = np.repeat(np.arange(8), 15)
    interests = Interests(600, domain_of, np.ones(120), np.random.default_rng(3))
    first = np.multiply(*interests.mixes())
    similarity = []
    for _ in range(20):
        interests.step()
        mix = np.multiply(*interests.mixes())
        lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(mix, axis=1)
        similarity.append((first * mix).sum(axis=1) / lengths)

    assert mix.sum(axis=1) == pytest.approx(np.ones(600))
    assert mix.max(axis=1).mean() == pytest.approx(first.max(axis=1).mean(), rel=0.1)
    assert np.mean(similarity[0]) > 0.9 > 0.7 > np.mean(similarity[-1]) > 0.3


# --- events


def true_relevance(world: World, events: Events) -> generator.Floats:
    """Of each event's campaign for its user at its moment."""
    mechanics = world.mechanics
    utility = mechanics.utility(events.user, np.arange(len(mechanics.campaigns.ids)), events.seconds)
    return mechanics.relevance(utility[np.arange(len(events.user)), events.campaign])


def test_what_is_shown_or_engaged_with_is_active(world: World):
    events, campaigns = world.events, world.mechanics.campaigns
    acted = (events.event == "impression") | ((events.event == "click") & (events.policy == ""))
    campaign, seconds = events.campaign[acted], events.seconds[acted]

    assert (campaigns.starts[campaign] <= seconds).all()
    assert (seconds < campaigns.ends[campaign]).all()
    running = [world.mechanics.active(np.arange(len(campaigns.ids)), np.array([day * DAY])).sum() for day in range(56)]
    assert min(running) > 1.5 * SMALL.campaigns_per_week
    assert max(running) < 5 * SMALL.campaigns_per_week


def test_what_follows_an_impression_carries_what_was_logged_with_it(world: World):
    events = world.events
    keys = list(zip(events.user, events.campaign, events.position, events.propensity, events.policy, strict=True))
    shown = {key for key, event in zip(keys, events.event, strict=True) if event == "impression"}
    logged = events.policy == "popularity"

    assert {key for key, of_slate in zip(keys, logged, strict=True) if of_slate} == shown
    assert set(events.event[logged]) == {"impression", "click", "conversion", "dismiss"}
    assert set(events.event[~logged]) == {"click", "conversion"}
    assert (events.position[~logged] == 0).all()
    assert np.isnan(events.propensity[~logged]).all()


def test_propensities_are_the_probabilities_of_what_was_shown(world: World):
    """Weighted by 1 / propensity, the campaigns shown at a place count all that could have been, on average."""
    events, campaigns = world.events, world.mechanics.campaigns
    shown = events.event == "impression"
    for position in range(1, POSITIONS + 1):
        here = shown & (events.position == position)
        days = events.seconds[here, None] // DAY
        could_be = ((campaigns.starts <= days * DAY) & (campaigns.ends >= (days + 1) * DAY)).sum(axis=1)
        weights = 1 / events.propensity[here]

        assert (weights <= could_be / 0.1 * (1 + 1e-9)).all()
        assert weights.mean() == pytest.approx(could_be.mean(), rel=0.25)


@real
def test_lower_places_are_clicked_less_only_because_they_are_looked_at_less():
    world = generate(replace(SMALL, slates_per_user=20.0, engagements_per_user=2.0))
    events = world.events
    shown = events.take(events.event == "impression")
    relevance = true_relevance(world, shown)

    assert examination(np.array([1, 5])) == pytest.approx([1, 0.276], abs=1e-3)
    for position in range(1, POSITIONS + 1):
        clicks = ((events.event == "click") & (events.position == position)).sum()
        expected = examination(np.array([position]))[0] * relevance[shown.position == position].sum()
        assert clicks == pytest.approx(expected, abs=4 * np.sqrt(expected))


@real
def test_full_feedback_shows_all_there_is_and_all_of_it_is_looked_at():
    world = generate(replace(SMALL, feedback="full", users=150))
    events = world.events
    shown = events.take(events.event == "impression")
    clicks = ((events.event == "click") & (events.policy == "everything")).sum()
    expected = true_relevance(world, shown).sum()
    slates = len({*zip(shown.user, shown.seconds, strict=True)})

    assert set(shown.propensity) == {1.0}
    assert set(events.position) == {0}
    assert len(shown.user) > 15 * slates
    assert clicks == pytest.approx(expected, abs=4 * np.sqrt(expected))


def test_communities_engage_with_the_same_campaigns_beyond_what_interest_says(world: World):
    events, mechanics = world.events, world.mechanics
    clicks = (events.event == "click") & (events.policy == "")
    ties = np.einsum(
        "ec,ec->e",
        mechanics.users.membership[events.user[clicks]],
        mechanics.campaigns.affinity[events.campaign[clicks]],
    )
    strangers = np.einsum(
        "ec,ec->e",
        mechanics.users.membership[np.random.default_rng(0).permutation(events.user[clicks])],
        mechanics.campaigns.affinity[events.campaign[clicks]],
    )

    assert ties.mean() > 1.5 * strangers.mean()


# --- truth


def toy_truth() -> Truth:
    rows = [("ann", "c1", 3, 0.0, 0.5), ("ann", "c2", 3, 0.0, 0.25), ("ann", "c3", 3, 0.0, 0.125)]
    rows += [("bob", "c1", 3, 0.0, 0.0625), ("ann", "c1", 4, 0.0, 0.75)]
    names = ("user_id", "campaign_id", "week", "utility", "probability")
    return Truth(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))))


def test_rankings_are_scored_by_what_is_true():
    truth = toy_truth()

    best = truth.score({"ann": ["c1", "c2", "c3"], "bob": ["c1"], "unknown": ["c1"]}, week=3)
    assert (best.users, best.ndcg) == (2, pytest.approx(1.0))
    assert best.expected_clicks == pytest.approx((0.5 + 0.25 * 2**-0.8 + 0.125 * 3**-0.8 + 0.0625) / 2)
    worse = truth.score({"ann": ["over", "c1"]}, week=3, k=2)
    assert worse.ndcg == pytest.approx((0.5 / np.log2(3)) / (0.5 + 0.25 / np.log2(3)))
    assert truth.score({"ann": ["c1", "c2"]}, week=3, k=1, seen={"ann": {"c1"}}) == (1, 0.0, 0.0)
    assert truth.users(3) == ["ann", "bob"]
    assert truth.relevance("ann", 4) == {"c1": 0.75}
    with pytest.raises(ValueError, match="week 4 is known of none of the 1 ranked users"):
        truth.score({"bob": ["c1"]}, week=4)


def test_the_truth_that_is_written_is_that_of_the_mechanics(world: World, folder: Path):
    mechanics, truth = world.mechanics, Truth.load(folder)
    users, campaigns = mechanics.users.ids.tolist(), mechanics.campaigns.ids.tolist()

    assert truth.table.equals(world.truth.table)
    week = 5
    for user in truth.users(week)[:10]:
        known = truth.relevance(user, week)
        seconds = np.array([week * 7 * DAY])
        utility = mechanics.utility(
            np.array([users.index(user)]), np.array([campaigns.index(one) for one in known]), seconds
        )
        assert list(known.values()) == pytest.approx(mechanics.relevance(utility)[0].tolist(), rel=1e-4)
        assert len(known) == mechanics.active(np.arange(len(campaigns)), seconds).sum()


def test_popularity_beats_chance_and_the_truth_beats_popularity_by_far(world: World):
    """The task: what of the next seven days is new to the user, by clicks, graded by their being there."""
    scores = {name: [] for name in ("chance", "popularity", "truth")}
    events, mechanics = world.events, world.mechanics
    rng = np.random.default_rng(0)
    clicks = events.take(events.event == "click")
    for week in range(4, SMALL.weeks):
        now = week * 7 * DAY
        live = np.flatnonzero(mechanics.active(np.arange(len(mechanics.campaigns.ids)), np.array([now]))[0])
        before, after = clicks.seconds < now, (clicks.seconds >= now) & (clicks.seconds < now + 7 * DAY)
        users = np.unique(clicks.user[after])
        seen = _pairs(clicks.user[before], clicks.campaign[before], world)[np.ix_(users, live)]
        wanted = _pairs(clicks.user[after], clicks.campaign[after], world)[np.ix_(users, live)] & ~seen
        popularity = np.bincount(clicks.campaign[before], minlength=len(mechanics.campaigns.ids))[live]
        rankers: Mapping[str, np.ndarray] = {
            "chance": rng.random(wanted.shape),
            "popularity": popularity + rng.random(wanted.shape),
            "truth": mechanics.utility(users, live, np.full(len(users), now)),
        }
        for name, score in rankers.items():
            order = np.argsort(-np.where(seen, -np.inf, score), axis=1)[:, :10]
            some = wanted.any(axis=1)
            scores[name] += (np.take_along_axis(wanted, order, axis=1)[some] @ (1 / np.log2(np.arange(2, 12)))).tolist()
    chance, popularity, truth = (np.mean(scores[name]) for name in ("chance", "popularity", "truth"))

    assert popularity > 1.5 * chance
    assert truth > 1.5 * popularity


def _pairs(users: generator.Ints, campaigns: generator.Ints, world: World) -> generator.Bools:
    pairs = np.zeros((len(world.mechanics.users.ids), len(world.mechanics.campaigns.ids)), dtype=bool)
    pairs[users, campaigns] = True
    return pairs
