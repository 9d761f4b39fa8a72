"""Catalog files as entries that know the line they stand on."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from upath import UPath

from personalization.errors import CatalogError, InputError
from personalization.reading import read_rows

SECTIONS = ("intents", "campaigns", "rules")
_LIST_SEPARATOR = "|"
_ADVICE = {
    "cannot start any token": "indent with spaces instead of tabs, and put text that starts with @, % or ` in "
    "quotation marks",
    "mapping values are not allowed": "put text that holds `: ` in quotation marks",
    "another document": "keep one document in a file: remove the line `---`",
    "determine a constructor": "remove the word that starts with !",
    "undefined alias": "put text that starts with * in quotation marks",
}


class Place(NamedTuple):
    """A line of a file."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Entry:
    """An intent, a campaign, or the rules, as written."""

    section: str
    value: Any
    place: Place
    node: yaml.Node | None = None

    def place_of(self, path: tuple[int | str, ...]) -> Place:
        """Where a part of it stands, or the nearest part around that."""
        return Place(self.place.file, _line(self.node, path, self.place.line))


@dataclass(frozen=True)
class Problem:
    """What is wrong at a place."""

    place: Place
    text: str
    unknown: str = ""
    """A word that is none of `known`; the advice names the nearest of those."""
    known: tuple[str, ...] = ()


def entries_of(file: Path) -> Iterator[Entry | Problem]:
    """Yield what a file holds, by its suffix, and what in it cannot be an entry."""
    try:
        yield from FILE_KINDS[file.suffix.lower()](file)
    except OSError as error:
        raise CatalogError(f"{file}: cannot be read ({error.strerror or error})") from error


# YAML and JSON: positions are those of PyYAML's nodes.


class _TextLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Takes scalars as they are written, but for null: the id 007 is no number, the name No no truth value."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _from_yaml(file: Path) -> Iterator[Entry | Problem]:
    loader = None
    text = _text(file)
    try:
        loader = _TextLoader(text)
        root = loader.get_single_node()
        repeats = list(_repeated_keys(root, file))  # before a merge key (`<<`) is resolved into its mapping
        content = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise CatalogError(_explain(error, file)) from error
    except yaml.reader.ReaderError as error:
        place = Place(file, text.encode().count(b"\n", 0, error.position) + 1)
        raise CatalogError(f"{place}: holds a control character; remove it") from error
    except (ValueError, RecursionError) as error:  # a `!!timestamp` no calendar has; nested too deeply
        raise CatalogError(f"{file}:1: cannot be read as YAML ({error}); write plain text and lists") from error
    finally:
        if loader is not None:
            loader.dispose()
    yield from repeats
    yield from _entries(file, content, root)


def _from_json(file: Path) -> Iterator[Entry | Problem]:
    text = _text(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}:{error.lineno}:{error.colno}"
        advice = "check the commas, brackets and quotation marks near there"
        raise CatalogError(f"{place}: cannot be read as JSON ({error.msg}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise CatalogError(
            f"{file}:1: cannot be read as JSON ({error}); write plain text, numbers and lists"
        ) from error
    root = _positions(text)
    yield from _repeated_keys(root, file)
    yield from _entries(file, content, root)


def _positions(text: str) -> yaml.Node | None:
    """JSON's nodes: it is YAML but for tabs, escapes and some characters of strings, which say nothing of places."""
    masked = re.sub(r"\\.|[^\x20-\x7e\n]", lambda found: "x" * len(found[0]) if found[0][0] == "\\" else " ", text)
    try:
        return yaml.compose(masked, Loader=_TextLoader)
    except yaml.YAMLError:  # such as a line break between key and colon
        return None


def _text(file: Path) -> str:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = Place(file, raw.count(b"\n", 0, error.start) + 1)
        raise CatalogError(f"{place}: is not UTF-8; save the file as UTF-8") from error
    if not text.strip():
        raise CatalogError(f"{file}:1: is empty; write `intents:` or `campaigns:` into it, or remove it")
    return text


def _explain(error: yaml.MarkedYAMLError, file: Path) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
    problem = error.problem or "no valid YAML"
    context = ""
    if mark and error.context_mark and error.context_mark.line < mark.line:
        context = f"{error.context}, from line {error.context_mark.line + 1} on: "
    advice = (words for sign, words in _ADVICE.items() if sign in problem)
    default = "check the indentation, brackets and quotation marks near there"
    return f"{place}: cannot be read as YAML ({context}{problem}); {next(advice, default)}"


def _repeated_keys(root: yaml.Node | None, file: Path) -> Iterator[Problem]:
    """A key that stands twice in a mapping, of which YAML and JSON would silently take the last."""
    to_see, seen = [root], set[int]()
    while to_see:
        node = to_see.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            to_see += node.value
            continue
        first: dict[str, int] = {}
        for key, value in node.value:
            to_see.append(value)
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                text = f"`{key.value}` stands here a second time, first in line {first[key.value]}; keep one"
                yield Problem(Place(file, line), text)
            else:
                first[key.value] = line


def _entries(file: Path, content: Any, root: yaml.Node | None) -> Iterator[Entry | Problem]:
    if content is None:
        yield Problem(Place(file, 1), "is empty; write `intents:` or `campaigns:` into it, or remove it")
        return
    if not isinstance(content, dict):
        text = "must hold the sections `intents`, `campaigns` or `rules`; put a list under one of these names"
        yield Problem(Place(file, 1), text)
        return
    for section, found in content.items():
        place = Place(file, _line(root, (section,), 1))
        if section not in SECTIONS:
            yield Problem(place, f"unknown section `{section}`", str(section), SECTIONS)
        elif found is None:
            continue
        elif section == "rules":
            yield Entry(section, found, place, _part(root, section))
        elif not isinstance(found, list):
            yield Problem(place, f"`{section}` must be a list; start each entry under it with `- id: …`")
        else:
            nodes = _part(root, section)
            for at, value in enumerate(found):
                where = Place(file, _line(nodes, (at,), place.line))
                yield Entry(section, value, where, _part(nodes, at))


def _part(node: yaml.Node | None, step: int | str) -> yaml.Node | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
        return node.value[step]  # type: ignore[no-any-return]
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == step), None)
    return None


def _line(node: yaml.Node | None, path: tuple[int | str, ...], default: int) -> int:
    """Line from 1 of what `path` leads to, or of the last step that is there."""
    line = default
    for step in path:
        part = _part(node, step)
        if part is None:
            break
        line = part.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            line = next(key.start_mark.line + 1 for key, _ in node.value if key.value == step)
        node = part
    return line


# Campaigns a line.


def _from_rows(file: Path) -> Iterator[Entry | Problem]:
    try:
        for row in read_rows(UPath(file)):
            place = Place(file, row.number)
            if row.problem is not None:
                yield Problem(place, f"{row.problem}; correct or remove the line")
                continue
            value = row.value
            if row.of_strings and "intents" in value:
                value["intents"] = [one.strip() for one in value["intents"].split(_LIST_SEPARATOR) if one.strip()]
            yield Entry("campaigns", value, place)
    except InputError as error:
        raise CatalogError(f"{error}; write one campaign a line") from error


FILE_KINDS: dict[str, Callable[[Path], Iterator[Entry | Problem]]] = {
    ".yaml": _from_yaml,
    ".yml": _from_yaml,
    ".json": _from_json,
    ".jsonl": _from_rows,
    ".csv": _from_rows,
}
