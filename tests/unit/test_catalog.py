"""The catalog on disk: what is refused with which words, and that the shipped one holds together."""

from collections import Counter
from pathlib import Path

import pytest
from conftest import PROJECT, SAMPLE
from personalization.catalog.loading import catalog_version, load_catalog
from personalization.errors import CatalogError
from personalization.reading import read_rows
from personalization.schemas import Message
from upath import UPath

SHIPPED = PROJECT / "include" / "catalog"

INTENTS = """
intents:
  - {id: flight_booking, name: Flights, examples: [I want to fly to Lisbon]}
  - {id: film_suggestion, name: Films, examples: [Show me a film]}
"""
CAMPAIGNS = """
campaigns:
  - {id: city_breaks, name: City breaks, intents: [flight_booking]}
  - {id: film_night, name: Film night, intents: [film_suggestion], active_until: 2027-01-01}
"""


def write(folder: Path, **files: str | bytes) -> Path:
    """A catalog folder; `a="…"` becomes `a.yaml`."""
    for name, content in files.items():
        path = folder / f"{name}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# --- reading


def test_all_yaml_files_of_the_folder_make_one_catalog(tmp_path: Path):
    more = "campaigns: [{id: late_show, name: Late show, intents: [film_suggestion]}]"
    catalog = load_catalog(write(tmp_path, intents=INTENTS, campaigns=CAMPAIGNS, more=more))

    assert [one.id for one in catalog.intents] == ["flight_booking", "film_suggestion"]
    assert [one.id for one in catalog.campaigns] == ["city_breaks", "film_night", "late_show"]


def test_one_file_may_hold_all_and_other_files_are_left_alone(tmp_path: Path):
    write(tmp_path, all=INTENTS + CAMPAIGNS, empty="", only_a_comment="# nothing yet")
    (tmp_path / "notes.txt").write_text("}{ not YAML")
    (tmp_path / "draft.yaml.off").write_text("}{ not YAML")

    assert len(load_catalog(tmp_path).campaigns) == 2


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_without_catalog_files_is_refused_by_name(tmp_path: Path, kind: str):
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text(INTENTS)

    with pytest.raises(CatalogError) as refused:
        load_catalog(folder)

    assert str(refused.value) == (f"{folder}: holds no *.yaml file; name the folder with the campaign catalog")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("campaigns: [", "is not readable YAML: while parsing"),
        ("campaigns:\n\t- {id: x}", "is not readable YAML: while scanning"),
        ("campaigns: []\n---\ncampaigns: []", "is not readable YAML: expected a single document"),
        ("campaigns: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"campaigns: \xff\xfe", "is not readable YAML: 'utf-8' codec"),
        ("- {id: x}", "must hold lists named `intents` or `campaigns`, nothing else"),
        ("just words", "must hold lists named `intents` or `campaigns`, nothing else"),
        ("offers: []", "must hold lists named `intents` or `campaigns`, nothing else"),
        ("campaigns: {id: x}", "`campaigns` must be a list"),
        ("campaigns:", "`campaigns` must be a list"),
    ],
)
def test_a_file_that_is_no_catalog_is_refused_by_name(tmp_path: Path, content: str | bytes, words: str):
    write(tmp_path, intents=INTENTS, broken=content)

    with pytest.raises(CatalogError) as refused:
        load_catalog(tmp_path)

    assert str(refused.value).startswith(f"{tmp_path / 'broken.yaml'}: ")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "place", "reason"),
    [
        ("id: film_night", "id: Film Night", "campaigns.1.id", "String should match pattern"),
        ("name: Film night, ", "", "campaigns.1.name", "Field required"),
        ("intents: [film_suggestion]", "intents: []", "campaigns.1.intents", "at least 1 item"),
        ("2027-01-01", "next year", "campaigns.1.active_until", "valid date"),
        ("2027-01-01", "2027-01-01, active_from: 2027-01-01", "campaigns.1", "active_until must be after"),
        ("active_until", "ends", "campaigns.1.ends", "Extra inputs are not permitted"),
        ("examples: [Show me a film]", "examples: []", "intents.1.examples", "at least 1 item"),
        ("examples: [Show me a film]", "examples: [5]", "intents.1.examples.0", "valid string"),
        ("id: film_night", "id: city_breaks", "catalog", "campaign ids must be unique: city_breaks"),
        ("[film_suggestion]", "[films]", "catalog", "campaign film_night targets unknown intents: films"),
    ],
)
def test_a_bad_entry_is_refused_by_place_and_reason(tmp_path: Path, old: str, new: str, place: str, reason: str):
    assert old in INTENTS + CAMPAIGNS
    write(tmp_path, intents=INTENTS.replace(old, new), campaigns=CAMPAIGNS.replace(old, new))

    with pytest.raises(CatalogError) as refused:
        load_catalog(tmp_path)

    assert str(refused.value).startswith(str(tmp_path))
    assert f": {place}: " in str(refused.value)
    assert reason in str(refused.value)


@pytest.mark.parametrize("day", ["2027-31-01", "2027-02-29"])
def test_a_day_no_calendar_has_is_refused_by_file(tmp_path: Path, day: str):
    write(tmp_path, intents=INTENTS, campaigns=CAMPAIGNS.replace("2027-01-01", day))

    with pytest.raises(CatalogError, match=r"campaigns\.yaml"):
        load_catalog(tmp_path)


def test_a_bad_entry_is_refused_by_its_file(tmp_path: Path):
    write(tmp_path, intents=INTENTS, campaigns=CAMPAIGNS.replace("id: film_night", "id: Film Night"))

    with pytest.raises(CatalogError, match=r"campaigns\.yaml: .*id: String should match pattern"):
        load_catalog(tmp_path)


def test_several_bad_entries_are_named_at_once(tmp_path: Path):
    write(tmp_path, intents=INTENTS.replace("name: Films", "name: ''"))
    write(tmp_path, campaigns=CAMPAIGNS.replace("name: City breaks", "name: ''"))

    with pytest.raises(CatalogError, match=r"campaigns\.0\.name: .+; .+intents\.1\.name: "):
        load_catalog(tmp_path)


def test_a_catalog_without_campaigns_is_refused(tmp_path: Path):
    with pytest.raises(CatalogError, match="campaigns: List should have at least 1 item"):
        load_catalog(write(tmp_path, intents=INTENTS))


def test_the_version_changes_with_anything_the_catalog_says(tmp_path: Path):
    versions = set()
    for old, new in (("", ""), ("Film night", "Film nights"), ("2027", "2028"), ("to Lisbon", "to Porto")):
        text = (INTENTS + CAMPAIGNS).replace(old, new) if old else INTENTS + CAMPAIGNS
        versions.add(catalog_version(load_catalog(write(tmp_path, all=text))))

    assert len(versions) == 4
    assert catalog_version(load_catalog(write(tmp_path, all=INTENTS + CAMPAIGNS))) in versions


# --- what is shipped


def sample_messages() -> list[Message]:
    """The shipped sample, every row of which must be valid."""
    return [Message.model_validate(row.value) for row in read_rows(UPath(SAMPLE))]


def test_the_shipped_catalog_is_valid():
    catalog = load_catalog(SHIPPED)

    assert len(catalog.intents) >= 20
    assert len(catalog.campaigns) >= 20
    assert all(one.description for one in [*catalog.intents, *catalog.campaigns])


def test_every_shipped_intent_is_targeted_by_a_campaign_that_is_active_at_the_sample_s_end():
    catalog = load_catalog(SHIPPED)
    now = max(message.timestamp_ms for message in sample_messages())

    served = {
        intent
        for campaign in catalog.campaigns
        if campaign.active_from_ms <= now < campaign.active_until_ms
        for intent in campaign.intents
    }

    assert {intent.id for intent in catalog.intents} - served == set()


def test_the_shipped_catalog_shows_campaigns_that_are_over_and_that_are_to_come():
    now = max(message.timestamp_ms for message in sample_messages())
    campaigns = load_catalog(SHIPPED).campaigns

    assert [one.id for one in campaigns if one.active_until_ms <= now]
    assert [one.id for one in campaigns if one.active_from_ms > now]


def test_no_example_of_the_shipped_catalog_speaks_for_two_intents():
    examples = Counter(example for intent in load_catalog(SHIPPED).intents for example in intent.examples)

    assert [example for example, count in examples.items() if count > 1] == []


def test_the_shipped_sample_is_valid_to_its_last_row():
    messages = sample_messages()

    assert len(messages) >= 400
    assert len({message.user_id for message in messages}) >= 40
    assert len({message.message_id for message in messages}) == len(messages)
