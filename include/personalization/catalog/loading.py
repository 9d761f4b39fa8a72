"""Read a catalog from its folder."""

import hashlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from personalization.catalog.entries import FILE_KINDS, SECTIONS, Entry, Place, Problem, entries_of
from personalization.errors import CatalogError
from personalization.schemas import OTHER_INTENT, Campaign, Catalog, CatalogRules, Intent, VectorSpace
from personalization.settings import Settings
from personalization.understanding import CLASSIFIER_VERSION

_MODELS: dict[str, type[BaseModel]] = {"intents": Intent, "campaigns": Campaign, "rules": CatalogRules}
_NAMING_INTENTS = (("intents",), ("audience", "include_intents"), ("audience", "exclude_intents"))
_PROBLEMS_SHOWN = 10
_KNOWN_SHOWN = 12
_VALUE_SHOWN = 60
_ID_ADVICE = "write 1 to 128 printable characters, no quotation mark, backtick or backslash, no space at its ends"
_ADVICE = {  # by the end of pydantic's name of the problem
    "string_too_short": "write its text",
    "too_short": "write one at least",
    "too_long": "shorten it",
    "string_type": "write one text, in quotation marks if it holds `: ` or ` #`",
    "list_type": "write a list, such as `[one, another]`",
    "_parsing": "write a number",
    "_from_float": "write a whole number",
    "_than_equal": "write a number within the bounds",
    "_than": "write a number within the bounds",
}


def load_catalog(folder: Path) -> Catalog:
    """Read all YAML, JSON and JSON Lines files and CSV tables of a folder, or a single one, as one catalog.

    Raises:
        CatalogError: what is wrong, each with file, line and remedy; the first ten of all problems.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    for file in _files(folder):
        for found in entries_of(file):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                entries.append(found)
    problems += [*_repeated_ids(entries), *_unknown_intents(entries)]
    parts: dict[str, list[Any]] = {section: [] for section in SECTIONS}
    for entry in entries:
        one = _validated(entry)
        if isinstance(one, list):
            problems += one
        else:
            parts[entry.section].append(one)
    if problems:
        raise CatalogError(_summary(problems))
    if not parts["intents"] and not parts["campaigns"]:
        raise CatalogError(f"{folder}: holds neither intents nor campaigns; write some under `campaigns:`")
    rules = parts["rules"] or [CatalogRules()]
    return Catalog(intents=parts["intents"], campaigns=parts["campaigns"], rules=rules[0])


def _files(folder: Path) -> list[Path]:
    if folder.is_file() and folder.suffix.lower() in FILE_KINDS:
        return [folder]
    found = folder.iterdir() if folder.is_dir() else ()
    # A name that starts with a dot is an editor's or a copying tool's.
    files = sorted(one for one in found if one.suffix.lower() in FILE_KINDS and not one.name.startswith("."))
    if not files:
        kinds = ", ".join(f"*{suffix}" for suffix in FILE_KINDS)
        raise CatalogError(f"{folder}: holds no catalog file ({kinds}); name the folder with the campaign catalog")
    return files


def _repeated_ids(entries: list[Entry]) -> Iterator[Problem]:
    first: dict[tuple[str, str], Place] = {}
    for entry in entries:
        if entry.section == "rules":
            place = first.setdefault((entry.section, ""), entry.place)
            if place is not entry.place:
                yield Problem(entry.place, f"`rules` stand already at {place}; keep them in one file")
        elif one := _id(entry):
            place = first.setdefault((entry.section, one), entry.place)
            if place is not entry.place:
                text = f"{_name(entry)}: the id is taken already at {place}; give one of the two another id"
                yield Problem(entry.place_of(("id",)), text)
            if (entry.section, one) == ("intents", OTHER_INTENT):
                text = f"{_name(entry)}: the id is reserved for messages that match no intent; take another"
                yield Problem(entry.place_of(("id",)), text)


def _unknown_intents(entries: list[Entry]) -> Iterator[Problem]:
    # An intent that is refused for something else is not unknown on top.
    known = tuple(sorted({_id(entry) for entry in entries if entry.section == "intents"} - {""}))
    ids = set(known)
    for entry in entries:
        for path in _NAMING_INTENTS if entry.section == "campaigns" else ():
            names = entry.value
            for step in path:
                names = names.get(step) if isinstance(names, dict) else None
            for at, name in enumerate(names if isinstance(names, list) else ()):
                if isinstance(name, str | int) and str(name) not in ids:
                    text = f"{_name(entry)}: `{'.'.join(path)}` names the unknown intent `{name}`"
                    yield Problem(entry.place_of((*path, at)), text, str(name), known)


def _validated(entry: Entry) -> Any:
    """The entry as a model, or a list of what is wrong with it."""
    model = _MODELS[entry.section]
    if not isinstance(entry.value, dict):
        fields = ", ".join(model.model_fields)
        return [Problem(entry.place, f"{_name(entry)}: must be a mapping; write its fields under it, of {fields}")]
    try:
        # A field left empty is a field left out.
        return model.model_validate({field: value for field, value in entry.value.items() if value is not None})
    except ValidationError as error:
        return [_problem(entry, model, one) for one in error.errors(include_url=False)]


def _problem(entry: Entry, model: type[BaseModel], error: ErrorDetails) -> Problem:
    """What pydantic found, with the remedy."""
    path, kind, found = error["loc"], error["type"], error["input"]
    field = ".".join(step for step in path if isinstance(step, str))
    known: tuple[str, ...] = ()
    if kind == "missing":
        text = f"`{field}` is missing; add `{path[-1]}: …`"
    elif kind == "extra_forbidden":
        text, known = f"unknown field `{field}`", _fields(model, path[:-1])
    elif kind == "value_error":
        text = f"`{field}` {error['msg'].removeprefix('Value error, ')}"
    elif kind == "string_pattern_mismatch":
        text = f"`{field}` is no id: {_shortened(found)}; {_ID_ADVICE}"
    elif kind == "model_type":
        known_fields = ", ".join(_fields(model, path))
        text = f"`{field}` must be a mapping, found {_shortened(found)}; indent its fields under it: {known_fields}"
    else:
        said = f"{error['msg'][0].lower()}{error['msg'][1:]}"
        advice = next((words for sign, words in _ADVICE.items() if kind.endswith(sign)), "correct it")
        text = f"`{field}`: {said}, found {_shortened(found)}; {advice}"
    return Problem(entry.place_of(path), f"{_name(entry)}: {text}", str(path[-1]) if known else "", known)


def _fields(model: type[BaseModel], path: tuple[int | str, ...]) -> tuple[str, ...]:
    for step in path:
        annotation = model.model_fields[str(step)].annotation
        model = next(one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields"))
    return tuple(model.model_fields)


def _id(entry: Entry) -> str:
    one = entry.value.get("id") if isinstance(entry.value, dict) else None
    return str(one) if isinstance(one, str | int) else ""


def _name(entry: Entry) -> str:
    if entry.section == "rules":
        return "rules"
    kind = entry.section.removesuffix("s")
    return f"{kind} `{_id(entry)}`" if _id(entry) else f"{kind} without an id"


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _VALUE_SHOWN else f"{shown[:_VALUE_SHOWN]}…"


def _summary(problems: list[Problem]) -> str:
    problems = sorted(problems, key=lambda one: one.place)
    lines = [f"{one.place}: {one.text}{_nearest(one)}" for one in problems[:_PROBLEMS_SHOWN]]
    if more := len(problems) - len(lines):
        lines.append(f"and {more} more")
    return "\n".join(lines)


def _nearest(problem: Problem) -> str:
    """Advice on a word nobody knows."""
    if not problem.unknown:
        return ""
    if near := get_close_matches(problem.unknown, problem.known, n=1):
        return f"; did you mean `{near[0]}`?"
    if not problem.known:
        return "; there are no intents in this catalog: add it under `intents:`"
    shown = ", ".join(problem.known[:_KNOWN_SHOWN])
    return f"; there are {shown}{' …' if len(problem.known) > _KNOWN_SHOWN else ''}"


def catalog_version(catalog: Catalog) -> str:
    """Digest of everything the catalog says."""
    return hashlib.blake2b(catalog.model_dump_json().encode(), digest_size=8).hexdigest()


def intents_version(catalog: Catalog, space: VectorSpace, settings: Settings) -> str:
    """Digest of what decides a message's intent."""
    return f"{catalog.intents_version}:{CLASSIFIER_VERSION}:{settings.intent_keep}:{space.digest}"
