"""The catalog on disk: what is refused with which words, and that the shipped one holds together."""

from collections import Counter
from pathlib import Path
from time import process_time

import pytest
from conftest import PROJECT, SAMPLE
from personalization.catalog.loading import catalog_version, load_catalog
from personalization.errors import CatalogError
from personalization.reading import read_rows
from personalization.schemas import FrequencyCap, Message
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


def test_files_of_all_kinds_make_one_catalog(tmp_path: Path):
    write(tmp_path, a=INTENTS)
    (tmp_path / "b.yml").write_text("rules: {max_per_category: 2}")
    (tmp_path / "c.json").write_text(
        '{"campaigns": [{"id": 119144,\n\t"name": "Caf\\u00e9 \\ud83d\\ude00", "boost": 1.5}]}'
    )
    (tmp_path / "d.jsonl").write_text(
        '{"id": "row", "name": "Row", "audience": {"include_intents": ["film_suggestion"]}}\n'
    )
    (tmp_path / "e.csv").write_text(
        "id,name,intents,pinned,active_from\n007,No,flight_booking | film_suggestion,1,2026-01-31\n8,Eight,,,\n"
    )
    catalog = load_catalog(tmp_path)

    assert [one.id for one in catalog.campaigns] == ["119144", "row", "007", "8"]
    assert [one.intents for one in catalog.campaigns] == [[], [], ["flight_booking", "film_suggestion"], []]
    assert catalog.campaigns[0].name == "Café 😀"
    assert catalog.campaigns[2].name == "No"
    assert (catalog.campaigns[2].pinned, catalog.campaigns[2].active_from_ms) == (1, 1_769_817_600_000)
    assert catalog.rules.max_per_category == 2


def test_one_file_may_hold_all_and_other_files_are_left_alone(tmp_path: Path):
    write(tmp_path, all=INTENTS + CAMPAIGNS)
    for name in ("notes.txt", "draft.yaml.off", ".#all.yaml", "._all.yaml"):
        (tmp_path / name).write_text("}{ not YAML")

    assert len(load_catalog(tmp_path).campaigns) == 2
    assert len(load_catalog(tmp_path / "all.yaml").campaigns) == 2


def test_what_is_written_is_meant(tmp_path: Path):
    """No id becomes another number, no name a truth value; a field left empty is left out; anchors save typing."""
    text = """
intents:
  - id: 0123
    name: Yes
    description:
    examples: [1e3, on, 2026-01-01, "null"]
campaigns:
  - &base
    id: 1_000
    name: 0x1F
    intents: [0123]
    active_until:
    frequency_cap: {impressions: 3, days: 0.5}
  - {<<: *base, id: 2.50}
rules:
"""
    catalog = load_catalog(write(tmp_path, all=text))

    assert (catalog.intents[0].id, catalog.intents[0].name) == ("0123", "Yes")
    assert catalog.intents[0].examples == ["1e3", "on", "2026-01-01", "null"]
    assert [(one.id, one.name, one.intents) for one in catalog.campaigns] == [
        ("1_000", "0x1F", ["0123"]),
        ("2.50", "0x1F", ["0123"]),
    ]
    assert catalog.campaigns[0].active_until is None
    assert catalog.campaigns[0].frequency_cap == FrequencyCap(impressions=3, days=0.5)


def test_a_catalog_may_do_without_intents_or_without_campaigns(tmp_path: Path):
    alone = load_catalog(write(tmp_path, all="campaigns: [{id: sale, name: Sale}]"))
    assert (alone.intents, alone.campaigns[0].text) == ([], "Sale")

    assert load_catalog(write(tmp_path, all=INTENTS + "campaigns:")).campaigns == []


def test_thousands_of_campaigns_are_read_in_a_moment(tmp_path: Path):
    entry = "  - {{id: c{0}, name: Campaign {0}, description: What it offers, intents: [film_suggestion]}}\n"
    write(tmp_path, intents=INTENTS, many="campaigns:\n" + "".join(entry.format(at) for at in range(3000)))

    started = process_time()
    assert len(load_catalog(tmp_path).campaigns) == 3000
    assert process_time() - started < 4  # about 1 s on an idle core


# --- what is refused


def refusal(folder: Path) -> list[str]:
    """The lines of the refusal, with the folder's name cut off."""
    with pytest.raises(CatalogError) as refused:
        load_catalog(folder)
    return str(refused.value).replace(f"{folder}/", "").splitlines()


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_without_catalog_files_is_refused_by_name(tmp_path: Path, kind: str):
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text(INTENTS)

    kinds = "*.yaml, *.yml, *.json, *.jsonl, *.csv"
    assert refusal(folder) == [f"{folder}: holds no catalog file ({kinds}); name the folder with the campaign catalog"]


EMPTY = "1: is empty; write `intents:` or `campaigns:` into it, or remove it"
NO_SECTIONS = "1: must hold the sections `intents`, `campaigns` or `rules`; put a list under one of these names"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("campaigns: [", "2:1: cannot be read as YAML (did not find expected node content); check the indentation"),
        ("campaigns: [a,\nb: c", "cannot be read as YAML (while parsing a flow sequence, from line 1 on: "),
        (
            "campaigns:\n\t- {id: x}",
            "2:1: cannot be read as YAML (found character that cannot start any token); indent",
        ),
        ("a: b: c", "1:5: cannot be read as YAML (mapping values are not allowed in this context); put text that"),
        (
            "x: *a",
            "1:4: cannot be read as YAML (found undefined alias); put text that starts with * in quotation marks",
        ),
        ("campaigns: []\n---\ncampaigns: []", "2:1: cannot be read as YAML (expected a single document in the stream,"),
        (
            "campaigns: !!python/object/apply:os.getcwd []",
            "1:12: cannot be read as YAML (could not determine a constructor",
        ),
        ("campaigns: [!!timestamp 2027-31-01]", "1: cannot be read as YAML (month must be in 1..12)"),
        ("# a\ncampaigns: \x07", "2: holds a control character; remove it"),
        (b"# one\ncampaigns: \xff\xfe", "2: is not UTF-8; save the file as UTF-8"),
        ("", EMPTY),
        (" \n\n", EMPTY),
        ("# nothing yet", EMPTY),
        ("- {id: x}", NO_SECTIONS),
        ("just words", NO_SECTIONS),
        ("# a\ncampaign: []", "2: unknown section `campaign`; did you mean `campaigns`?"),
        ("offers: []", "1: unknown section `offers`; there are intents, campaigns, rules"),
        ("campaigns: {id: x}", "1: `campaigns` must be a list; start each entry under it with `- id: …`"),
        ("rules: [a]", "1: rules: must be a mapping; write its fields under it, of max_per_category"),
        (
            "rules: {max_per_category: 0}",
            "1: rules: `max_per_category`: input should be greater than or equal to 1,",
        ),
        ("intents: []\nrules: {}\nintents: []", "3: `intents` stands here a second time, first in line 1; keep one"),
    ],
)
def test_a_file_that_is_no_catalog_is_refused_by_place(tmp_path: Path, content: str | bytes, words: str):
    write(tmp_path, intents=INTENTS, broken=content)

    [line] = refusal(tmp_path)

    assert line.startswith("broken.yaml:")
    assert words in line


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '{"campaigns":\n [', "a.json:2:3: cannot be read as JSON (Expecting value); check the commas"),
        ("a.json", "[" * 100_000, "a.json:1: cannot be read as JSON (maximum recursion depth exceeded"),
        ("a.json", "[]", f"a.json:{NO_SECTIONS}"),
        (
            "a.json",
            '{"campaigns": [\n\t{"id": "é\\"", "name": "x"}]}',
            "a.json:2: campaign `é\"`: `id` is no id: 'é\"'; ",
        ),
        (
            "a.json",
            '{"campaigns": [\n{"id": 1, "name": "x"},\n{"name": "y", "id":\n1}]}',
            "a.json:3: campaign `1`: the",
        ),
        ("a.json", '{"campaigns"\n:[{"id": 1}]}', "a.json:1: campaign `1`: `name` is missing; add `name: …`"),
        ("a.jsonl", '{"id": 1, "name": "x"}\n{"id": 2}\n', "a.jsonl:2: campaign `2`: `name` is missing"),
        ("a.jsonl", '{"id": 1, "name": "x"}\n\n{"id\n', "a.jsonl:3: not valid JSON (Unterminated string starting at,"),
        (
            "a.jsonl",
            "id,name\n",
            "a.jsonl: row 1: not valid JSON (Expecting value, column 1); expected a JSON array, or",
        ),
        ("a.csv", 'id,name\n1,"a\nb"\n2,c,d\n', "a.csv:4: has 3 cells where the header has 2; correct or remove the"),
        ("a.csv", "id,name,boost\n1,x,high\n", "a.csv:2: campaign `1`: `boost`: input should be a valid number, unab"),
        ("a.csv", "id,names\n1,x\n", "a.csv:2: campaign `1`: unknown field `names`; did you mean `name`?"),
        ("a.csv", "", "a.csv: holds nothing but white space; write one campaign a line"),
    ],
)
def test_files_of_other_kinds_are_refused_by_place_too(tmp_path: Path, name: str, content: str, words: str):
    (tmp_path / name).write_text(content, encoding="utf-8")

    assert words in "\n".join(refusal(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        (
            "id: film_night",
            "id: 'film\"night'",
            "campaigns.yaml:4",
            (
                "campaign `film\"night`: `id` is no id: 'film\"night'; write 1 to 128 printable characters, "
                "no quotation mark, backtick or backslash, no space at its ends"
            ),
        ),
        ("name: Film night, ", "", "campaigns.yaml:4", ("NIGHT: `name` is missing; add `name: …`")),
        ("id: film_night, ", "", "campaigns.yaml:4", ("campaign without an id: `id` is missing; add `id: …`")),
        (
            "name: Film night",
            "name: ''",
            "campaigns.yaml:4",
            ("NIGHT: `name`: string should have at least 1 character, found ''; write its text"),
        ),
        (
            "2027-01-01",
            "next year",
            "campaigns.yaml:4",
            (
                "NIGHT: `active_until` is no day or moment (Invalid isoformat string: 'next year'); write "
                "2026-01-31 or 2026-01-31T09:00:00Z"
            ),
        ),
        (
            "2027-01-01",
            "2027-02-29",
            "campaigns.yaml:4",
            (
                "NIGHT: `active_until` is no day or moment (day is out of range for month); write "
                "2026-01-31 or 2026-01-31T09:00:00Z"
            ),
        ),
        (
            "active_until: 2027-01-01",
            "active_from: 2027-01-01,\n     active_until: 2027-01-01",
            "campaigns.yaml:5",
            (
                "NIGHT: `active_until` is not after active_from; write the moment from which the campaign "
                "is over, such as the day after its last"
            ),
        ),
        (
            "active_until",
            "active_til",
            "campaigns.yaml:4",
            ("NIGHT: unknown field `active_til`; did you mean `active_until`?"),
        ),
        (
            "active_until: 2027-01-01",
            "budget: 1",
            "campaigns.yaml:4",
            (
                "NIGHT: unknown field `budget`; there are id, name, description, category, intents, "
                "active_from, active_until, audience, frequency_cap, not_again, boost, pinned"
            ),
        ),
        (
            "[film_suggestion]",
            "film_suggestion",
            "campaigns.yaml:4",
            (
                "NIGHT: `intents`: input should be a valid list, found 'film_suggestion'; write a list, "
                "such as `[one, another]`"
            ),
        ),
        (
            "[film_suggestion]",
            "[film_suggestion, film_suggestion]",
            "campaigns.yaml:4",
            ("NIGHT: `intents` names film_suggestion more than once; name each intent once"),
        ),
        (
            "[film_suggestion]",
            "[film_suggestions]",
            "campaigns.yaml:4",
            ("NIGHT: `intents` names the unknown intent `film_suggestions`; did you mean `film_suggestion`?"),
        ),
        (
            "[film_suggestion]",
            "[film_suggestion,\n   cars]",
            "campaigns.yaml:5",
            ("NIGHT: `intents` names the unknown intent `cars`; there are film_suggestion, flight_booking"),
        ),
        (
            "active_until: 2027-01-01",
            "audience:\n {exclude_intents: [flights_booking]}",
            "campaigns.yaml:5",
            (
                "NIGHT: `audience.exclude_intents` names the unknown intent `flights_booking`; did you "
                "mean `flight_booking`?"
            ),
        ),
        (
            "active_until: 2027-01-01",
            "audience:\n {include_users: [two words]}",
            "campaigns.yaml:5",
            ("NIGHT: `audience.include_users` must be 1 to 128 letters, digits or any of . : @ + = | ~ - _"),
        ),
        (
            "active_until: 2027-01-01",
            "audience: {\n include_intent: [x]}",
            "campaigns.yaml:5",
            ("NIGHT: unknown field `audience.include_intent`; did you mean `include_intents`?"),
        ),
        (
            "active_until: 2027-01-01",
            "frequency_cap: 3",
            "campaigns.yaml:4",
            ("NIGHT: `frequency_cap` must be a mapping, found '3'; indent its fields under it: impressions, days"),
        ),
        (
            "active_until: 2027-01-01",
            "frequency_cap: {impressions: 1.5, days: 7}",
            "campaigns.yaml:4",
            (
                "NIGHT: `frequency_cap.impressions`: input should be a valid integer, unable to parse "
                "string as an integer, found '1.5'; write a number"
            ),
        ),
        (
            "active_until: 2027-01-01",
            "boost: 50",
            "campaigns.yaml:4",
            ("NIGHT: `boost`: input should be less than or equal to 10, found '50'; write a number within the bounds"),
        ),
        (
            "id: film_night",
            "id: city_breaks",
            "campaigns.yaml:4",
            ("campaign `city_breaks`: the id is taken already at campaigns.yaml:3; give one of the two another id"),
        ),
        (
            "name: Film night",
            "name: Film night, name: Late night",
            "campaigns.yaml:4",
            ("`name` stands here a second time, first in line 4; keep one"),
        ),
        (
            "- {id: film_night",
            "- film_night\n  - {id: film_night",
            "campaigns.yaml:4",
            (
                "campaign without an id: must be a mapping; write its fields under it, of id, name, "
                "description, category, intents, active_from, active_until, audience, frequency_cap, "
                "not_again, boost, pinned"
            ),
        ),
        (
            "examples: [Show me a film]",
            "examples: []",
            "intents.yaml:4",
            (
                "intent `film_suggestion`: `examples`: list should have at least 1 item after validation, "
                "not 0, found []; write one at least"
            ),
        ),
        (
            "examples: [Show me a film]",
            "examples: [ok,\n I want: a film]",
            "intents.yaml:5",
            (
                "intent `film_suggestion`: `examples`: input should be a valid string, found {'I want': 'a "
                "film'}; write one text, in quotation marks if it holds `: ` or ` #`"
            ),
        ),
        (
            "{id: flight_booking",
            "{id: other, name: Other, examples: [x]}\n  - {id: flight_booking",
            "intents.yaml:3",
            ("intent `other`: the id is reserved for messages that match no intent; take another"),
        ),
        (
            "{id: flight_booking",
            "{id: film_suggestion, name: Films, examples: [x]}\n  - {id: flight_booking",
            "intents.yaml:5",
            ("intent `film_suggestion`: the id is taken already at intents.yaml:3; give one of the two another id"),
        ),
    ],
)
def test_a_bad_entry_is_refused_by_place_with_the_remedy(tmp_path: Path, old: str, new: str, place: str, words: str):
    assert old in INTENTS + CAMPAIGNS
    write(tmp_path, intents=INTENTS.replace(old, new, 1), campaigns=CAMPAIGNS.replace(old, new, 1))

    assert refusal(tmp_path) == [f"{place}: {words.replace('NIGHT', 'campaign `film_night`')}"]


def test_what_is_named_elsewhere_is_said_of_the_campaigns_alone(tmp_path: Path):
    """An intent that is itself refused is not unknown to its campaigns on top."""
    write(tmp_path, intents=INTENTS.replace("name: Films", "name: ''"), campaigns=CAMPAIGNS)

    assert len(refusal(tmp_path)) == 1


def test_without_intents_a_campaign_that_names_one_is_told_so(tmp_path: Path):
    [line] = refusal(write(tmp_path, campaigns="campaigns: [{id: a, name: A, intents: [films]}]"))

    assert line.endswith("`films`; there are no intents in this catalog: add it under `intents:`")


def test_rules_stand_in_one_file(tmp_path: Path):
    write(tmp_path, a=INTENTS + "rules: {max_per_category: 2}", b="# ours\nrules: {max_per_category: 3}")

    place = f"{tmp_path / 'a.yaml'}:5"
    with pytest.raises(CatalogError) as refused:
        load_catalog(tmp_path)
    assert str(refused.value) == f"{tmp_path / 'b.yaml'}:2: `rules` stand already at {place}; keep them in one file"


def test_all_problems_are_counted_and_the_first_ten_shown_in_order(tmp_path: Path):
    entries = "".join(f"  - {{id: c{at}, name: '', boost: 11}}\n" for at in range(20))
    lines = refusal(
        write(tmp_path, intents=INTENTS.replace("name: Films", "name: ''"), campaigns=f"campaigns:\n{entries}")
    )

    assert [line.split(": ")[0] for line in lines] == [
        *(f"campaigns.yaml:{number}" for number in (2, 2, 3, 3, 4, 4, 5, 5, 6, 6)),
        "and 31 more",
    ]


@pytest.mark.parametrize("content", ["intents: []", "campaigns:", "rules: {max_per_category: 1}"])
def test_a_catalog_of_nothing_is_refused(tmp_path: Path, content: str):
    assert refusal(write(tmp_path, all=content)) == [
        f"{tmp_path}: holds neither intents nor campaigns; write some under `campaigns:`"
    ]


def test_a_file_nobody_may_read_is_refused_by_name(tmp_path: Path):
    (tmp_path / "all.yaml").mkdir()

    assert refusal(tmp_path) == ["all.yaml: cannot be read (Is a directory)"]


# --- versions


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
