"""Read a catalog from its folder."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from personalization.errors import CatalogError
from personalization.schemas import Campaign, Catalog, Intent
from personalization.settings import Settings

_KINDS: dict[str, type[Intent] | type[Campaign]] = {"intents": Intent, "campaigns": Campaign}
_PROBLEMS_SHOWN = 5


def load_catalog(folder: Path) -> Catalog:
    """Read all `*.yaml` files of a folder as one catalog.

    Raises:
        CatalogError: no file, not YAML, or a catalog that does not hold together; names the place.
    """
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    if not files:
        raise CatalogError(f"{folder}: holds no *.yaml file; name the folder with the campaign catalog")
    entries: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
    problems: list[str] = []
    for file in files:
        for kind, found in _read_file(file).items():
            for place, entry in enumerate(found):
                try:
                    entries[kind].append(_KINDS[kind].model_validate(entry))
                except ValidationError as error:
                    problems += [f"{file}: {problem}" for problem in _explain(error, f"{kind}.{place}")]
    if not problems:
        try:
            return Catalog.model_validate(entries)
        except ValidationError as error:
            problems = [f"{folder}: {problem}" for problem in _explain(error, "")]
    raise CatalogError("; ".join(problems[:_PROBLEMS_SHOWN]))


def _read_file(file: Path) -> dict[str, list[Any]]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, OSError) as error:  # ValueError: not UTF-8, or a day no calendar has
        raise CatalogError(f"{file}: is not readable YAML: {error}") from error
    if not isinstance(content, dict) or not set(content) <= set(_KINDS):
        raise CatalogError(f"{file}: must hold lists named `intents` or `campaigns`, nothing else")
    for kind, found in content.items():
        if not isinstance(found, list):
            raise CatalogError(f"{file}: `{kind}` must be a list")
    return content


def _explain(error: ValidationError, place: str) -> list[str]:
    return [
        f"{'.'.join(filter(None, [place, *map(str, problem['loc'])])) or 'catalog'}: "
        f"{problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors()
    ]


def catalog_version(catalog: Catalog) -> str:
    """Digest of everything the catalog says."""
    return hashlib.blake2b(catalog.model_dump_json().encode(), digest_size=8).hexdigest()


def intents_version(catalog: Catalog, settings: Settings) -> str:
    """Digest of what decides a message's intent."""
    return f"{catalog.intents_version}:{settings.intent_threshold}"
