"""Reading input files: which rows come out, in how much memory, and how a broken file is refused."""

import gzip
import json
import os
import random
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from personalization.errors import InputError
from personalization.pipeline.taking import SourceFile
from personalization.reading import Row, check_readable, file_digest, locate, read_rows
from personalization.schemas import Message
from upath import UPath

CHUNK = 2**16  # the reader takes as many bytes at once
BOM = b"\xef\xbb\xbf"

VALUES: list[Any] = [
    {"user_id": "ann", "message": "Grüße, 東京 😀", "timestamp": "2026-10-01T09:00:00Z"},
    {"nested": {"list": [1, [2, {"three": [None, True, False]}], "]},{["], "empty": {}}},
    {"escapes": 'quote " backslash \\ slash / newline \n tab \t snowman \u2603'},
    [],
    "a bare string, with [ brackets ] and , commas",
    -17,
    None,
]


def put(folder: Path, content: bytes, name: str = "input") -> UPath:
    path = UPath(folder / name)
    path.write_bytes(content)
    return path


def rows_of(folder: Path, content: bytes) -> list[Row]:
    return list(read_rows(put(folder, content)))


def values_of(folder: Path, content: bytes) -> list[Any]:
    rows = rows_of(folder, content)
    assert [row.problem for row in rows] == [None] * len(rows)
    return [row.value for row in rows]


def as_array(values: list[Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode()


def as_ndjson(values: list[Any]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def with_padding(element: bytes, behind: int) -> bytes:
    """An array whose first chunk ends `behind` bytes into the element."""
    return b"[" + b" " * (CHUNK - 1 - behind) + element + b", 7]"


def unchanged(content: bytes) -> bytes:
    return content


# --- what comes out


@pytest.mark.parametrize("packed", [unchanged, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("mark", [b"", BOM], ids=["no BOM", "BOM"])
@pytest.mark.parametrize("laid_out", [as_array, as_ndjson])
def test_every_layout_gives_the_same_rows_in_order(
    tmp_path: Path,
    laid_out: Callable[[list[Any]], bytes],
    mark: bytes,
    packed: Callable[[bytes], bytes],
):
    rows = rows_of(tmp_path, packed(mark + laid_out(VALUES)))

    assert [row.value for row in rows] == VALUES
    assert [row.number for row in rows] == list(range(1, len(VALUES) + 1))
    assert [json.loads(row.raw) for row in rows] == VALUES
    assert {row.problem for row in rows} == {None}


def test_gzip_is_known_by_its_content_not_its_name(tmp_path: Path):
    packed = put(tmp_path, gzip.compress(as_array(VALUES)), "conversations.json")
    plain = put(tmp_path, as_array(VALUES), "conversations.json.gz")

    assert [row.value for row in read_rows(packed)] == [row.value for row in read_rows(plain)]


def test_a_gzip_of_several_members_is_read_to_its_end(tmp_path: Path):
    assert values_of(tmp_path, gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n')) == [
        {"a": 1},
        {"a": 2},
    ]


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b"[]", []),
        (b" \n[\t] \r\n", []),
        (b'\r\n [\n\t{"a" :\n1}\n ,\r\n 2\t]\n\n', [{"a": 1}, 2]),
        (b'[{"a":1},{"a":2}]', [{"a": 1}, {"a": 2}]),
        (BOM + b'\n[{"a": 1}]', [{"a": 1}]),
        (b'{"a": 1}\r\n{"a": 2}\r\n', [{"a": 1}, {"a": 2}]),
        (b'\n\n{"a": 1}\n   \n{"a": 2}', [{"a": 1}, {"a": 2}]),
        (b'{"only": "one line, no newline"}', [{"only": "one line, no newline"}]),
    ],
)
def test_white_space_between_rows_does_not_matter(tmp_path: Path, content: bytes, values: list[Any]):
    assert values_of(tmp_path, content) == values


def test_any_amount_of_white_space_may_stand_before_an_array(tmp_path: Path):
    assert values_of(tmp_path, b" " * (CHUNK + 1) + b'[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]


def test_rows_are_numbered_by_element_in_an_array_and_by_line_in_ndjson(tmp_path: Path):
    assert [row.number for row in rows_of(tmp_path, b'\n\n[{"a": 1},\n\n\n{"a": 2}]')] == [1, 2]
    assert [row.number for row in rows_of(tmp_path, b'\n{"a": 1}\n\n\n{"a": 2}\n')] == [2, 5]


def test_rows_come_before_the_rest_of_the_file_is_read(tmp_path: Path):
    content = as_array(["x" * 1000] * 500) + b" and then it breaks"

    rows = read_rows(put(tmp_path, content))

    assert next(rows).number == 1
    with pytest.raises(InputError, match="row 500: found 'a' behind the end of the array"):
        deque(rows, maxlen=0)


# --- chunk boundaries


@pytest.mark.parametrize(
    "element",
    [
        b'{"t":"\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"}',
        rb'{"t":"\u00e9 \ud83d\ude00 \" \\"}',
        b'[true,null,{"n":-12.5e+3},[]]',
        b"1234567",
        b"-40",
        *(number for number in (b"1.5", b"2e5", b"-3.25e-7")),
    ],
    ids=bytes.decode,
)
def test_an_element_may_be_cut_by_a_chunk_at_any_byte(tmp_path: Path, element: bytes):
    for behind in range(len(element) + 3):
        values = values_of(tmp_path, with_padding(element, behind))

        assert values == [json.loads(element), 7], f"cut {behind} bytes into the element"


@pytest.mark.parametrize("size", [0, 1, CHUNK - 3, CHUNK - 2, CHUNK - 1, CHUNK, 3 * CHUNK, 20 * CHUNK + 1])
@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_elements_may_be_larger_than_a_chunk(tmp_path: Path, size: int, letter: str):
    values = ["before", letter * size, "after"]

    assert values_of(tmp_path, as_array(values)) == values
    assert values_of(tmp_path, as_ndjson(values)) == values


@pytest.mark.parametrize("seed", range(4))
def test_elements_of_all_sizes_come_back_whole(tmp_path: Path, seed: int):
    draw = random.Random(seed)
    sizes = (0, 1, 10, 100, 1000, 10_000, 70_000, 150_000)
    values = [
        {"id": number, "text": "".join(draw.choices('aé€😀]},[{\\" \n', k=draw.choice(sizes)))} for number in range(60)
    ]
    spaces = ["", " ", "\n", "\r\n\t ", " " * 5000]
    elements = [json.dumps(value, ensure_ascii=draw.random() < 0.5) for value in values]
    array = "[" + ",".join(draw.choice(spaces) + one + draw.choice(spaces) for one in elements) + "]"

    rows = rows_of(tmp_path, array.encode())

    assert [row.value for row in rows] == values
    assert [row.raw for row in rows] == elements


# --- bad rows in a good file


def test_a_broken_line_is_a_row_with_a_problem_and_the_others_go_on(tmp_path: Path):
    rows = rows_of(tmp_path, b'{"a": 1}\n{"a": \n{"a": 3} x\nnot json\n{"a": 5}\n')

    assert [(row.number, row.value) for row in rows if row.problem is None] == [(1, {"a": 1}), (5, {"a": 5})]
    problems = {row.number: row.problem for row in rows if row.problem}
    assert problems == {
        2: "not valid JSON (Expecting value, column 7)",
        3: "not valid JSON (Extra data, column 10)",
        4: "not valid JSON (Expecting value, column 1)",
    }
    assert [row.raw for row in rows][1:4] == ['{"a": ', '{"a": 3} x', "not json"]


def test_broken_lines_ahead_of_the_first_good_one_are_rows_too(tmp_path: Path):
    rows = rows_of(tmp_path, b'# exported today\n{"a": \n\n{"a": 1}\n')

    assert [(row.number, row.problem is None) for row in rows] == [(1, False), (2, False), (4, True)]


@pytest.mark.parametrize("line", [b"[" * 100_000 + b"]" * 100_000, b"9" * 5000], ids=["depth", "digits"])
def test_a_line_that_python_cannot_hold_is_a_row_with_a_problem(tmp_path: Path, line: bytes):
    rows = rows_of(tmp_path, b'{"a": 1}\n' + line + b'\n{"a": 3}\n')

    assert [row.problem for row in rows] == [
        None,
        "nested too deeply, or a number with too many digits",
        None,
    ]


@pytest.mark.parametrize("laid_out", [b"[%s, %s, %s]", b"%s\n%s\n%s\n"], ids=["array", "ndjson"])
@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (b"caf\xe9", r"caf\xe9"),  # Latin-1
        (b"\xe2\x82", r"\xe2\x82"),  # a character cut in two
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),  # a surrogate as UTF-8
        (b"\xc0\xaf", r"\xc0\xaf"),  # an overlong form
        (b"\xff\xfe", r"\xff\xfe"),
    ],
)
def test_undecodable_bytes_spoil_only_their_own_row(tmp_path: Path, laid_out: bytes, bad: bytes, shown: str):
    good = '{"message": "é"}'.encode()
    content = laid_out % (good, b'{"message": "' + bad + b'"}', good)

    before, spoilt, after = rows_of(tmp_path, content)

    assert before.value == after.value == {"message": "é"}
    assert (before.number, spoilt.number, after.number) == (1, 2, 3)
    assert spoilt.raw == f'{{"message": "{shown}"}}'
    assert spoilt.raw.encode()
    assert problems_of(spoilt.value) == {"message": "is not valid UTF-8 (a lone surrogate or an undecodable byte)"}


@pytest.mark.parametrize("laid_out", [b"[%s]", b"%s\n"], ids=["array", "ndjson"])
def test_lone_surrogates_are_left_to_validation(tmp_path: Path, laid_out: bytes):
    [row] = rows_of(tmp_path, laid_out % rb'{"message": "a\ud800b"}')

    assert row.value == {"message": "a\ud800b"}
    assert row.raw == r'{"message": "a\ud800b"}'
    assert problems_of(row.value) == {"message": "is not valid UTF-8 (a lone surrogate or an undecodable byte)"}


def problems_of(value: dict[str, Any]) -> dict[str, str]:
    """Why `Message` refuses the row, which lacks nothing but what `value` gets wrong."""
    with pytest.raises(ValueError, match="validation error") as refused:
        Message.model_validate({"user_id": "ann", "timestamp": "2026-10-01T09:00:00Z"} | value)
    errors: list[Any] = refused.value.errors()  # type: ignore[attr-defined]
    return {error["loc"][0]: error["msg"].removeprefix("Value error, ") for error in errors}


# --- files that are refused

GZIPPED = gzip.compress(as_ndjson([{"n": n, "noise": random.Random(n).random()} for n in range(10_000)]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "holds nothing but white space", id="empty"),
        pytest.param(b" \n\t\r\n ", "holds nothing but white space", id="blank"),
        pytest.param(BOM + b" \n", "holds nothing but white space", id="only a BOM"),
        pytest.param(gzip.compress(b""), "holds nothing but white space", id="gzip of nothing"),
        pytest.param('[{"a": 1}]'.encode("utf-16"), "is UTF-16; save it as UTF-8", id="UTF-16"),
        pytest.param(b"\xfe\xff" + "[]".encode("utf-16-be"), "is UTF-16; save", id="UTF-16 BE"),
        pytest.param(b'[{"a": 1}, {"a": 2}', "row 2: the array is cut off", id="no closing bracket"),
        pytest.param(b'[{"a": 1}, {"a": 2', "row 2: the array is cut off", id="cut in an element"),
        pytest.param(b'[{"a": 1}, {"a": "tw', "row 2: the array is cut off", id="cut in a string"),
        pytest.param(b'[{"a": 1},', "row 2: the array is cut off", id="cut behind a comma"),
        pytest.param(b"[", "row 1: the array is cut off", id="cut behind the bracket"),
        pytest.param(b'[{"a": 1} {"a": 2}]', "row 1: expected a comma, found '{'", id="missing comma"),
        pytest.param(b'[{"a": 1}, , {"a": 2}]', "row 2: not valid JSON (Expecting value)", id="two commas"),
        pytest.param(b'[, {"a": 1}]', "row 1: not valid JSON (Expecting value)", id="leading comma"),
        pytest.param(b'[{"a": 1}, {a: 2}, 3]', "row 2: not valid JSON (Expecting property", id="no JSON"),
        pytest.param(b'[{"a": 1}] {"a": 2}', "row 1: found '{' behind the end of the array", id="garbage"),
        pytest.param(b'[{"a": 1}]]', "row 1: found ']' behind the end of the array", id="bracket too many"),
        pytest.param(b"[1, " + b"[" * 100_000, "row 2: is nested too deeply", id="nested too deeply"),
        pytest.param(b"[1, " + b"9" * 5000 + b"]", "row 2: is nested too deeply or holds", id="digits"),
        pytest.param(b"user_id,message\nann,hi\n", "row 1: not valid JSON", id="CSV"),
        pytest.param(b'\n{\n  "a": 1\n}\n', "row 2: not valid JSON", id="pretty-printed object"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0", "expected a JSON array, or one JSON object", id="picture"),
        pytest.param(b"x\n" * 5000, "row 1: not valid JSON", id="thousands of lines that are no JSON"),
        pytest.param(GZIPPED[:-4], "truncated or damaged (Compressed file ended", id="gzip cut at its end"),
        pytest.param(GZIPPED[: len(GZIPPED) // 2], "the gzip stream is truncated", id="half a gzip"),
        pytest.param(GZIPPED[:5], "row 1: the gzip stream is truncated", id="gzip cut in its header"),
        pytest.param(GZIPPED + b"tail", "the gzip stream is truncated or damaged", id="garbage behind gzip"),
        pytest.param(GZIPPED[:10_000] + b"\xff" * 64 + GZIPPED[10_064:], "truncated or damaged", id="corrupt gzip"),
        pytest.param(GZIPPED[:-8] + b"\0" * 4 + GZIPPED[-4:], "damaged (CRC check failed", id="gzip with a wrong sum"),
    ],
)
def test_a_file_that_cannot_be_taken_is_refused_by_name_place_and_reason(tmp_path: Path, content: bytes, words: str):
    path = put(tmp_path, content)

    with pytest.raises(InputError) as refused:
        deque(read_rows(path), maxlen=0)

    assert str(refused.value).startswith(f"{path}: ")
    assert words in str(refused.value)


def test_a_large_blank_file_is_refused_as_well(tmp_path: Path):
    with pytest.raises(InputError, match="holds nothing but white space"):
        rows_of(tmp_path, b"\n" * CHUNK)


@pytest.mark.parametrize("laid_out", [as_array, as_ndjson])
def test_a_damaged_gzip_names_the_first_row_that_was_lost(tmp_path: Path, laid_out: Callable[[list[Any]], bytes]):
    values = [{"n": n, "noise": random.Random(n).random()} for n in range(10_000)]
    content = gzip.compress(laid_out(values))
    rows = read_rows(put(tmp_path, content[: len(content) * 3 // 4]))
    taken = []

    with pytest.raises(InputError) as refused:
        taken.extend(rows)

    assert 1000 < len(taken) < 10_000
    assert [row.value for row in taken] == values[: len(taken)]
    assert f"row {len(taken) + 1}: the gzip stream is truncated" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.json", "no such file"),
        ("folder", "is a directory; name a file"),
        ("empty.json", "is empty"),
        ("n" * 300, "cannot be read (File name too long)"),
    ],
)
def test_a_path_that_is_no_file_with_content_is_refused_before_it_is_read(tmp_path: Path, name: str, words: str):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.json").touch()

    with pytest.raises(InputError) as refused:
        check_readable(UPath(tmp_path / name))

    assert str(refused.value) == f"{tmp_path / name}: {words}"


@pytest.mark.parametrize("name", ["missing.json", "folder"])
def test_reading_what_is_no_file_is_refused_too(tmp_path: Path, name: str):
    (tmp_path / "folder").mkdir()

    with pytest.raises(InputError, match=r"row 1: cannot be read \(.+\)"):
        list(read_rows(UPath(tmp_path / name)))


@contextmanager
def without_permissions(path: UPath) -> Iterator[None]:
    """Nobody may read the file; root lays its rights down for as long."""
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(0o600)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may enter, which pytest's are not."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_a_file_without_permission_is_refused(open_folder: Path):
    path = put(open_folder, b"[]")

    with without_permissions(path), pytest.raises(InputError) as refused:
        list(read_rows(path))

    assert str(refused.value) == f"{path}: row 1: cannot be read (Permission denied)"


def test_a_file_without_permission_is_refused_before_any_is_taken(open_folder: Path):
    path = put(open_folder, b"[]")

    with without_permissions(path), pytest.raises(InputError, match="Permission denied"):
        SourceFile.of(path)


@pytest.mark.parametrize("uri", ["nosuch://bucket/in.json", "abfs://bucket/in.json"])
def test_a_place_that_no_installed_file_system_reads_is_refused(uri: str):
    with pytest.raises(InputError, match=uri):
        check_readable(locate(uri))


def test_a_good_file_passes_the_check(tmp_path: Path):
    check_readable(put(tmp_path, b"[]"))


def test_the_digest_is_that_of_the_bytes(tmp_path: Path):
    known = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"

    assert file_digest(put(tmp_path, b"[]")) == known
    assert file_digest(put(tmp_path, b"[] ")) != known


# --- memory


def peak_of_reading(path: UPath) -> tuple[int, int]:
    """Rows read, and the most bytes held meanwhile."""
    tracemalloc.start()
    try:
        rows = sum(1 for _ in read_rows(path))
        return rows, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_array(folder: Path, rows: int, row_chars: int) -> UPath:
    path = UPath(folder / f"{rows}x{row_chars}.json")
    with path.open("w") as file:
        file.write("[")
        for number in range(rows):
            file.write(("," if number else "") + json.dumps({"id": number, "text": "x" * row_chars}))
        file.write("]")
    return path


def test_a_large_array_is_read_in_little_memory(tmp_path: Path):
    path = write_array(tmp_path, rows=30_000, row_chars=2000)
    assert path.stat().st_size > 60_000_000

    rows, peak = peak_of_reading(path)

    assert rows == 30_000
    assert peak < 8 * 2**20


def test_memory_depends_on_the_rows_not_on_the_file(tmp_path: Path):
    _, small = peak_of_reading(write_array(tmp_path, rows=200, row_chars=30_000))
    _, large = peak_of_reading(write_array(tmp_path, rows=2000, row_chars=30_000))

    assert large < 1.5 * small
