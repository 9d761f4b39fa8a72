"""Staged files: tasks get what was handed over, whole and unchanged, or a clear refusal."""

import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from personalization.errors import StagingError, StoreError
from personalization.schemas import Ref
from personalization.staging import Staging, count_staged, erase_staged, read, read_column, write_atomically
from upath import UPath

DAY_S = 86_400


def table(*numbers: int) -> pa.Table:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([float(one) for one in numbers] * 2, pa.float32()), 2)
    return pa.table({"number": list(numbers), "text": [f"é{one}" for one in numbers], "vector": vectors})


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(str(tmp_path / "staging"), "manual__2026-10-01T09:00:00+00:00")


def files_in(folder: UPath) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- writing and reading


@pytest.mark.parametrize("numbers", [[1, 2, 3], []], ids=["rows", "no rows"])
def test_what_was_written_is_read_back(staging: Staging, numbers: list[int]):
    ref = staging.write("messages/000000.parquet", table(*numbers))

    assert read(ref).equals(table(*numbers))
    assert ref["rows"] == len(numbers)


def test_a_reference_is_plain_data_that_travels_through_xcom(staging: Staging):
    ref = staging.write("messages/000000.parquet", table(1))

    assert {name: type(value) for name, value in ref.items()} == {"uri": str, "rows": int, "sha256": str}
    assert Path(ref["uri"]).is_absolute()
    assert Path(ref["uri"]) == Path(str(staging.root)) / "messages" / "000000.parquet"


def test_a_reference_holds_wherever_the_reader_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ref = Staging("relative/staging", "run").write("a.parquet", table(1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert read(ref).equals(table(1))


def test_the_same_table_has_the_same_digest(staging: Staging):
    first = staging.write("a.parquet", table(1, 2))

    assert staging.write("b.parquet", table(1, 2))["sha256"] == first["sha256"]
    assert staging.write("c.parquet", table(1, 3))["sha256"] != first["sha256"]


def test_a_rewrite_replaces_the_file_and_leaves_nothing_beside_it(staging: Staging):
    before = staging.write("a.parquet", table(1))
    after = staging.write("a.parquet", table(2, 3))

    assert before["uri"] == after["uri"]
    assert read(after).equals(table(2, 3))
    assert files_in(staging.root) == ["a.parquet"]


def test_columns_are_read_a_file_at_a_time(staging: Staging):
    refs = [staging.write(f"{at}.parquet", table(at, at + 10)) for at in range(3)]

    columns = read_column(refs, "number")

    assert next(columns) == [0, 10]
    Path(refs[2]["uri"]).unlink()
    assert next(columns) == [1, 11]
    with pytest.raises(StagingError):
        next(columns)


# --- what was not handed over


def test_a_missing_file_is_refused_with_what_to_do(staging: Staging):
    ref = staging.write("a.parquet", table(1))
    Path(ref["uri"]).unlink()

    with pytest.raises(StagingError) as refused:
        read(ref)

    assert str(refused.value) == (f"staged file {ref['uri']} is gone; clear the run's first task to stage it again")


@pytest.mark.parametrize("change", ["rewritten", "cut", "one bit", "other digest"])
def test_a_file_that_is_not_the_one_handed_over_is_refused(staging: Staging, change: str):
    ref = staging.write("a.parquet", table(1, 2, 3))
    path = Path(ref["uri"])
    content = path.read_bytes()
    if change == "rewritten":
        staging.write("a.parquet", table(1, 2, 4))
    elif change == "cut":
        path.write_bytes(content[:-1])
    elif change == "one bit":
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    else:
        ref = Ref(uri=ref["uri"], rows=3, sha256="0" * 64)

    with pytest.raises(StagingError) as refused:
        read(ref)

    assert str(refused.value) == f"staged file {ref['uri']} is not the one that was handed over"


# --- finding


def test_a_file_staged_earlier_is_found_again(staging: Staging):
    ref = staging.write("catalog/known.parquet", table(1, 2))

    assert staging.find("catalog/known.parquet") == ref


def test_what_was_never_staged_is_not_found(staging: Staging):
    assert staging.find("known.parquet") is None
    staging.write("other.parquet", table(1))
    assert staging.find("known.parquet") is None


# --- crashes


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The operating system lets no file grow beyond `size`, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_breaks_off_leaves_no_half_file_under_the_name(staging: Staging):
    with files_up_to(4096), pytest.raises(OSError, match="File too large"):
        staging.write("a.parquet", table(*range(50_000)))

    assert not (staging.root / "a.parquet").exists()
    assert staging.find("a.parquet") is None


def test_a_rewrite_that_breaks_off_leaves_the_former_file(staging: Staging):
    ref = staging.write("a.parquet", table(1))
    with files_up_to(4096), pytest.raises(OSError, match="File too large"):
        staging.write("a.parquet", table(*range(50_000)))

    assert staging.find("a.parquet") == ref
    assert read(ref).equals(table(1))


def test_no_reader_ever_sees_half_a_file(tmp_path: Path):
    path = UPath(tmp_path / "folder" / "report.json")
    contents = [b"a" * 300_000, b"b" * 200_000]
    write_atomically(path, contents[0])

    def rewrite() -> None:
        for number in range(200):
            write_atomically(path, contents[number % 2])

    seen = set()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(rewrite)
        while not writing.done():
            seen.add(path.read_bytes())
        writing.result()

    assert seen <= set(contents)


# --- pruning


def age(folder: UPath, days: float) -> None:
    then = time.time() - days * DAY_S
    for path in [*folder.rglob("*"), folder]:
        os.utime(str(path), (then, then))


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Staging]:
    """Runs of 1, 6 and 8 days ago."""
    staged = {}
    for days in (1, 6, 8):
        run = Staging(str(tmp_path), f"run-{days}")
        run.write("messages/000000.parquet", table(days))
        age(run.root, days)
        staged[f"run-{days}"] = run
    return staged


@pytest.mark.parametrize(
    ("keep_days", "kept"), [(7, ["run-1", "run-6"]), (2, ["run-1"]), (30, ["run-1", "run-6", "run-8"]), (0, [])]
)
def test_pruning_deletes_the_runs_that_are_older(
    runs: dict[str, Staging], tmp_path: Path, keep_days: int, kept: list[str]
):
    deleted = Staging(str(tmp_path), "current").prune(keep_days)

    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert deleted == 3 - len(kept)


def test_a_run_in_which_any_file_is_fresh_is_kept(runs: dict[str, Staging], tmp_path: Path):
    runs["run-8"].write("users/000000.parquet", table(1))

    assert Staging(str(tmp_path), "current").prune(7) == 0


def test_a_run_does_not_prune_itself(runs: dict[str, Staging], tmp_path: Path):
    assert runs["run-8"].prune(7) == 0
    assert runs["run-8"].find("messages/000000.parquet")


def test_files_beside_the_runs_are_left_alone(tmp_path: Path):
    note = tmp_path / "README"
    note.write_text("do not delete")
    os.utime(note, (0, 0))

    assert Staging(str(tmp_path), "current").prune(0) == 0
    assert note.exists()


def test_there_may_be_nothing_to_prune(tmp_path: Path):
    assert Staging(str(tmp_path / "never written"), "current").prune(0) == 0


# --- erased users


def rows_of(*users: str) -> pa.Table:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0] * 2 * len(users), pa.float32()), 2)
    ids = pa.array(users, pa.string())
    return pa.table({"user_id": ids, "text": ids, "embedding": vectors})


def test_erased_users_are_in_no_file_of_any_run_and_others_are_untouched(tmp_path: Path):
    runs = [Staging(str(tmp_path), run_id) for run_id in ("first", "second")]
    for run in runs:
        run.write("messages/000000.parquet", rows_of("ann", "bob", "ann", "anna"))
        run.write("users/000000.parquet", pa.table({"user_id": ["bob", "zoë"]}))
    catalog = Staging(str(tmp_path), "catalog").write("utterances.parquet", table(1, 2))
    bobs = Path(str(runs[0].root)) / "users" / "000000.parquet"
    before = bobs.read_bytes()

    assert count_staged(str(tmp_path), ["ann", "carl"]) == {"ann": 4}
    assert erase_staged(str(tmp_path), ["ann", "carl"]) == {"ann": 4}
    assert erase_staged(str(tmp_path), ["ann", "carl"]) == count_staged(str(tmp_path), ["ann"]) == {}

    assert count_staged(str(tmp_path), ["bob", "anna", "zoë"]) == {"bob": 4, "anna": 2, "zoë": 2}
    assert bobs.read_bytes() == before
    assert read(catalog).equals(table(1, 2))


def test_a_reference_from_before_an_erasure_stays_good(staging: Staging, tmp_path: Path):
    ref = staging.write("messages/000000.parquet", rows_of("ann", "bob", "carl"))
    base = str(tmp_path / "staging")

    erase_staged(base, ["ann"])
    between = staging.find("messages/000000.parquet")
    erase_staged(base, ["carl"])

    assert between is not None
    for one in (ref, between):
        assert read(one).equals(rows_of("bob"))
    erase_staged(base, ["bob"])
    assert read(ref).equals(rows_of())


def test_what_a_task_makes_of_a_file_without_erased_users_stands_for_no_other(staging: Staging, tmp_path: Path):
    ref = staging.write("messages/000000.parquet", rows_of("ann", "bob"))
    erase_staged(str(tmp_path / "staging"), ["ann"])
    made = staging.write("embedded/000000.parquet", read(ref).drop_columns("text"))

    with pytest.raises(StagingError, match="not the one"):
        read(Ref(uri=made["uri"], rows=2, sha256=ref["sha256"]))


def test_a_damaged_file_is_refused_after_an_erasure_too(staging: Staging, tmp_path: Path):
    ref = staging.write("messages/000000.parquet", rows_of("ann", "bob"))
    erase_staged(str(tmp_path / "staging"), ["ann"])
    path = Path(ref["uri"])
    content = path.read_bytes()
    at = content.index(b"bob")
    for damaged in (content[:-1], content[: at + 1] + b"u" + content[at + 2 :]):
        path.write_bytes(damaged)

        with pytest.raises(StagingError, match="not the one that was handed over"):
            read(ref)


def test_an_erasure_deletes_what_a_killed_task_left_aside_but_not_what_is_being_written(tmp_path: Path):
    folder = tmp_path / "run" / "messages"
    folder.mkdir(parents=True)
    left, written = folder / ".000000.parquet.17", folder / ".000001.parquet.18"
    for path in (left, written):
        path.write_bytes(b"half a file")
    os.utime(left, (time.time() - 7200,) * 2)

    erase_staged(str(tmp_path), ["ann"])

    assert [path.name for path in folder.iterdir()] == [written.name]


def test_a_staged_file_that_nobody_can_read_keeps_an_erasure_from_being_called_done(tmp_path: Path):
    path = tmp_path / "run" / "a.parquet"
    path.parent.mkdir()
    path.write_bytes(b"no parquet")

    for work in (erase_staged, count_staged):
        with pytest.raises(StoreError, match=f"{path}.*delete it"):
            work(str(tmp_path), ["ann"])


def test_there_may_be_nothing_staged_to_erase_from(tmp_path: Path):
    assert erase_staged(str(tmp_path / "never written"), ["ann"]) == {}


# --- names of runs


@pytest.mark.parametrize(
    "run_id",
    [
        "scheduled__2026-10-01T00:00:00+00:00",
        "a run with spaces",
        "../../etc/passwd",
        "/absolute",
        "back\\slash",
        "quote\"s and 's",
        "per%cent #hash ?query",
        "s3://bucket/run",
        "new\nline",
        "Zoë's 東京",
        ".hidden",
        "..",
        ".",
    ],
)
def test_any_run_id_makes_one_folder_inside_the_staging_folder(tmp_path: Path, run_id: str):
    staging = Staging(str(tmp_path / "staging"), run_id)

    ref = staging.write("a.parquet", table(1))

    assert read(ref).equals(table(1))
    [folder] = (tmp_path / "staging").iterdir()
    assert folder.is_dir()
    assert Path(ref["uri"]).resolve() == folder / "a.parquet"


def test_runs_do_not_share_files(tmp_path: Path):
    first, second = (Staging(str(tmp_path), run_id) for run_id in ("run:1", "run:2"))
    first.write("a.parquet", table(1))

    assert second.find("a.parquet") is None
