"""Stream rows out of JSON arrays, NDJSON and CSV, plain or gzipped, in memory bounded by the largest row."""

import codecs
import csv
import errno
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from upath import UPath

from personalization.errors import InputError

MAX_ROW_BYTES = 64 * 2**20
_CHUNK = 2**16
_DECODER = json.JSONDecoder()
_LINES_BEFORE_GIVING_UP = 1000
_FINAL = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
"""Errors that no retry mends; others, such as a network share's, are raised as they are."""
_BEHIND_A_NUMBER = tuple(" \t\r\n,]")


@dataclass(frozen=True)
class Row:
    """One row as found: its parsed value, or the problem that kept it from being parsed."""

    number: int
    """Place in the file from 1: of the element in an array, of the line in NDJSON or CSV."""
    raw: str
    value: Any = None
    problem: str | None = None
    of_strings: bool = False
    """Whether the values are all strings because the format has no types, as in CSV."""


def locate(place: str) -> UPath:
    """The file at a local path or URI. Raises an `InputError` for a kind of place nothing here reads."""
    try:
        return UPath(place)
    except (ImportError, ValueError) as error:
        raise InputError(f"{place}: cannot be read ({error})") from error


def check_readable(path: UPath) -> None:
    """Raise an `InputError` that says why `path` cannot be read, if so."""
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file")
        if path.is_dir():
            raise InputError(f"{path}: is a directory; name a file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: is empty")
        path.open("rb").close()
    except OSError as error:
        if error.errno not in _FINAL:
            raise
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ImportError, ValueError) as error:  # no package for this kind of place, or no such kind
        raise InputError(f"{path}: cannot be read ({error})") from error


def file_digest(path: UPath) -> str:
    """SHA-256 of the file's bytes, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(cast("Any", stream), "sha256").hexdigest()


def read_rows(path: UPath) -> Iterator[Row]:
    """Yield the rows of a file in order.

    A file named `*.csv` or `*.csv.gz` has a header line; its empty cells count as absent. A broken
    NDJSON or CSV line is a row with a `problem`; what breaks the file itself (a truncated gzip, an
    array that is not JSON) ends in an `InputError` naming the file and the row reached.
    """
    reached = 0
    try:
        with path.open("rb") as raw, _decompressed(cast("IO[bytes]", raw)) as stream:
            head = _first_bytes(stream, path)
            if path.name.lower().endswith((".csv", ".csv.gz")):
                rows = _csv_rows(stream, path)
            else:
                rows = _array_rows(stream, path) if head == b"[" else _lines(stream, path)
            for row in rows:
                yield row
                reached = row.number
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: row {reached + 1}: the gzip stream is truncated or damaged ({error})") from error
    except OSError as error:
        if error.errno not in _FINAL:
            raise
        raise InputError(f"{path}: row {reached + 1}: cannot be read ({error.strerror or error})") from error


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    magic = raw.read(2)
    raw.seek(0)
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if magic == b"\x1f\x8b" else raw


def _first_bytes(stream: IO[bytes], path: UPath) -> bytes:
    """The first character that is not white space; the stream is left before it."""
    head = stream.read(_CHUNK)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: is UTF-16; save it as UTF-8")
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    body = head[start:].lstrip()
    while not body and head:
        head = stream.read(_CHUNK)
        body = head.lstrip()
    if not body:
        raise InputError(f"{path}: holds nothing but white space")
    stream.seek(start)
    return body[:1]


class _Window:
    """The part of a text that is being parsed: grows by doubling, forgets what is behind."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        # Undecodable bytes become lone surrogates, which validation refuses row by row.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._chunk = _CHUNK
        self.text = ""
        self.at = 0
        self.ended = False

    def grow(self) -> bool:
        if self.ended:
            return False
        data = self._stream.read(self._chunk)
        self.ended = not data
        left_over = self.text[self.at :]
        self.text = left_over + self._decode(data, final=self.ended)
        self.at = 0
        self._chunk = max(_CHUNK, len(left_over))  # doubles while one row does not fit
        return True

    def peek(self) -> str:
        """The next character that is not white space, or '' at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""


def _array_rows(stream: IO[bytes], path: UPath) -> Iterator[Row]:
    window = _Window(stream)
    window.peek()
    window.at += 1  # the opening bracket
    number = 0
    while (char := window.peek()) != "]":
        if number and char == ",":
            window.at += 1
            window.peek()
        elif number:
            _refuse(path, number, "the array is cut off" if not char else f"expected a comma, found {char!r}")
        number += 1
        value = _next_value(window, path, number)
        yield Row(number, *value)
    window.at += 1
    if rest := window.peek():
        _refuse(path, number, f"found {rest!r} behind the end of the array")


def _next_value(window: _Window, path: UPath, number: int) -> tuple[str, Any]:
    while True:
        try:
            value, end = _DECODER.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            if len(window.text) - window.at > MAX_ROW_BYTES:
                _refuse(path, number, f"is larger than {MAX_ROW_BYTES // 2**20} MiB, or the JSON breaks here")
            if not window.grow():
                _refuse(
                    path,
                    number,
                    "the array is cut off" if _at_end(error) else f"not valid JSON ({error.msg})",
                )
            continue
        except (RecursionError, ValueError):
            _refuse(path, number, "is nested too deeply or holds a number with too many digits")
        if isinstance(value, int | float) and window.text[end : end + 1] not in _BEHIND_A_NUMBER and window.grow():
            continue  # it may go on in the next chunk
        raw, window.at = window.text[window.at : end], end
        return _printable(raw), value


def _at_end(error: json.JSONDecodeError) -> bool:
    return error.pos >= len(error.doc) - 1 or error.msg.startswith("Unterminated string")


def _refuse(path: UPath, number: int, problem: str) -> None:
    raise InputError(f"{path}: row {number}: {problem}")


def _lines(stream: IO[bytes], path: UPath) -> Iterator[Row]:
    number = parsed = 0
    unparsed: list[Row] = []  # held back until one line proves that this is NDJSON at all
    for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW_BYTES), b""), start=1):
        if not line.strip():
            continue
        row = _line_row(number, line)
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            _refuse(path, number, f"is larger than {MAX_ROW_BYTES // 2**20} MiB")
        if row.problem is None:
            parsed += 1
        if parsed:
            yield from unparsed
            unparsed.clear()
            yield row
        else:
            unparsed.append(row)
            if len(unparsed) >= _LINES_BEFORE_GIVING_UP:
                break
    if not parsed and unparsed:
        expected = "expected a JSON array, or one JSON object a line"
        _refuse(path, unparsed[0].number, f"{unparsed[0].problem}; {expected}")


def _line_row(number: int, line: bytes) -> Row:
    text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
    try:
        return Row(number, _printable(text), json.loads(text))
    except json.JSONDecodeError as error:
        return Row(number, _printable(text), problem=f"not valid JSON ({error.msg}, column {error.colno})")
    except (RecursionError, ValueError):
        return Row(number, _printable(text), problem="nested too deeply, or a number with too many digits")


def _csv_rows(stream: IO[bytes], path: UPath) -> Iterator[Row]:
    text = io.TextIOWrapper(cast("Any", stream), encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                _refuse(path, number, f"not valid CSV ({error})")
            yield Row(number, "", problem=f"not valid CSV ({error})")
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header) or not all(header):
                _refuse(path, number, "the header must name every column once")
        elif cells:
            raw = _printable(",".join(cells))
            if len(cells) != len(header):
                yield Row(number, raw, problem=f"has {len(cells)} cells where the header has {len(header)}")
            else:
                named = zip(header, cells, strict=True)
                yield Row(number, raw, {name: cell for name, cell in named if cell}, of_strings=True)


def _printable(raw: str) -> str:
    """The row as text that every store can keep; undecodable bytes show as `\\xNN`."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
