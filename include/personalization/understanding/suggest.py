"""Propose intents where there is no catalog yet: groups of messages that are alike, named by their telling words."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import yaml
from pydantic import ValidationError
from sklearn import config_context
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.neighbors import kneighbors_graph
from sklearn.preprocessing import normalize
from upath import UPath

from personalization.encoder import Vectors
from personalization.errors import InputError
from personalization.reading import check_readable, read_rows
from personalization.schemas import OTHER_INTENT, Message

SAMPLE = 20_000
"""Different messages that are grouped; of more, a sample is taken."""
LEAST_SIZE = 10
_LEAST_SHARE = 0.0025
_SEED = 0
_DIMENSIONS = 50
_NEIGHBOURS = 15
_WORKING_MEMORY_MIB = 256
# At modularity's own scale (1) small groups of many messages are joined (Fortunato & Barthélemy, "Resolution limit
# in community detection", PNAS 2007), at 3 those of few topics are split.
_RESOLUTION = 2.0
_EXAMPLES = 10
_EXAMPLES_AT_LEAST = 8
_TYPICAL = 0.6
"""Share of a group, nearest to its middle, that examples are taken from."""
_EXAMPLE_CHARS = 120
_SAME_AS_CHOSEN = 0.95
_NAMING_WORDS = 3
# A word that one in twenty messages says in a quarter of the groups tells none of them apart, in any language.
_SAID = 0.05
_EVERYWHERE = 0.25
_GROUPS_TO_COMPARE = 8
_SAME_WORD = 4
"""Letters at the start that make two words one, such as movie and movies."""

_E_MAIL = re.compile(r"[^\s@<>]+@[^\s@<>]+\.\w+")
_NUMBER = re.compile(r"\+?\d(?:[ ()./-]{0,2}\d){5,}")
_WORD = r"(?u)\b[^\W\d_]+(?:['’]?[^\W\d_]+)+\b"
_MASKS = ("[e-mail]", "[number]")


@dataclass(frozen=True)
class Messages:
    """The different messages of a file, e-mail addresses and long numbers masked."""

    texts: list[str]
    times: list[int]
    """How often each was said."""
    refused: Counter[str]
    """Rows that are no messages, by reason."""

    @property
    def total(self) -> int:
        """Messages in all."""
        return sum(self.times)


@dataclass(frozen=True)
class Proposal:
    """A group of messages that may be an intent."""

    intent_id: str
    name: str
    examples: list[str]
    messages: int
    share: float
    """Of the messages that were grouped."""
    alike: float
    """Mean cosine of its messages to their middle."""


@dataclass(frozen=True)
class Suggestion:
    """What a file of messages suggests."""

    source: str
    messages: Messages
    grouped: int
    """Different messages that were grouped: all, or a sample."""
    proposals: list[Proposal]
    """Most messages first."""
    left_out: int
    """Groups beyond the number asked for."""

    @property
    def coverage(self) -> float:
        """Share of the messages that are in a proposed group."""
        return sum(one.share for one in self.proposals)


def read_messages(path: UPath, max_chars: int) -> Messages:
    """The messages of a file that the pipeline would take.

    Raises:
        InputError: the file cannot be read, or no row is a message.
    """
    check_readable(path)
    spelling: dict[str, str] = {}
    times: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for row in read_rows(path):
        try:
            text = Message.model_validate(row.value).message if row.problem is None else ""
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            refused[f"{place} {first['msg'].removeprefix('Value error, ')}".strip()] += 1
            continue
        if row.problem is not None:
            refused[row.problem] += 1
        elif len(text) > max_chars:
            refused[f"message is longer than {max_chars} characters"] += 1
        else:
            masked = _masked(text)
            key = masked.casefold().strip(" .!?")
            spelling.setdefault(key, masked)
            times[key] += 1
    if not times:
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in refused.most_common(3))
        raise InputError(f"{path}: holds no message: {reasons or 'no rows'}")
    return Messages([spelling[key] for key in times], list(times.values()), refused)


def suggest(
    source: str,
    messages: Messages,
    encode: Callable[[list[str]], Vectors],
    *,
    min_size: int | None = None,
    max_intents: int,
) -> Suggestion:
    """Group the messages and propose the largest groups as intents. The same messages give the same proposals.

    Raises:
        InputError: no group is large enough.
    """
    texts, times = _sample(messages)
    total = int(times.sum())
    least = min_size if min_size is not None else max(LEAST_SIZE, math.ceil(_LEAST_SHARE * total))
    groups = []
    if len(texts) > 1:
        vectors = _reduced(encode(texts))
        groups = [group for group in _groups(vectors) if times[group].sum() >= least]
    groups.sort(key=lambda group: (-int(times[group].sum()), int(group[0])))
    if not groups:
        raise InputError(
            f"{source}: no group of {least} messages or more that are alike among {len(texts):,} different ones; take "
            "more messages, or a smaller --min-size"
        )
    shown = groups[:max_intents]
    names = _names([[texts[at] for at in group] for group in shown])
    proposals = []
    for (intent_id, name), group in zip(names, shown, strict=True):
        size, middle = int(times[group].sum()), normalize(vectors[group].mean(axis=0, keepdims=True))[0]
        near = vectors[group] @ middle
        examples = [texts[at] for at in _examples(texts, vectors, group[np.argsort(-near, kind="stable")])]
        proposals.append(Proposal(intent_id, name, examples, size, size / total, float(near.mean())))
    return Suggestion(source, messages, len(texts), proposals, len(groups) - len(shown))


def _masked(text: str) -> str:
    """The message on one line, without e-mail addresses and long numbers."""
    return " ".join(_NUMBER.sub(_MASKS[1], _E_MAIL.sub(_MASKS[0], text)).split())


def _sample(messages: Messages) -> tuple[list[str], np.ndarray[Any, np.dtype[np.int64]]]:
    times = np.asarray(messages.times, dtype=np.int64)
    if len(times) <= SAMPLE:
        return messages.texts, times
    chosen = np.sort(np.random.default_rng(_SEED).choice(len(times), SAMPLE, replace=False))
    return [messages.texts[at] for at in chosen], times[chosen]


def _reduced(vectors: Vectors) -> Vectors:
    """Unit vectors of their principal components: less noise, faster neighbours."""
    dimensions = min(_DIMENSIONS, *vectors.shape)
    reduced: Vectors = normalize(PCA(dimensions, random_state=_SEED).fit_transform(vectors))
    return reduced


def _groups(vectors: Vectors) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Communities of the graph of nearest neighbours, its edges weighted by the neighbours they share.

    Jaccard weights and Louvain as in Levine et al., "Data-driven phenotypic dissection of AML", Cell 2015.
    """
    neighbours = min(_NEIGHBOURS, max(1, len(vectors) // 4))
    with config_context(working_memory=_WORKING_MEMORY_MIB):
        near = kneighbors_graph(vectors, neighbours, metric="cosine", mode="connectivity")
    own = near.copy()
    own.setdiag(1)
    shared = (own @ own.T).multiply(near.maximum(near.T)).tocoo()
    jaccard = shared.data / (2 * (neighbours + 1) - shared.data)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(vectors)))
    edges = zip(shared.row.tolist(), shared.col.tolist(), jaccard.tolist(), strict=True)
    graph.add_weighted_edges_from(edge for edge in edges if edge[0] < edge[1])
    found = nx.community.louvain_communities(graph, resolution=_RESOLUTION, seed=_SEED)
    return [np.sort(np.fromiter(one, dtype=np.int64)) for one in found]


def _examples(texts: Sequence[str], vectors: Vectors, group: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
    """The most typical message and others far from one another, short ones first. `group`: most typical first."""
    typical = group[: max(_EXAMPLES_AT_LEAST, math.ceil(_TYPICAL * len(group)))]
    plain = [at for at in typical if len(texts[at]) <= _EXAMPLE_CHARS and not any(one in texts[at] for one in _MASKS)]
    candidates = np.asarray(plain if len(plain) >= _EXAMPLES_AT_LEAST else typical)
    if len(candidates) > 3 * _EXAMPLES:  # the shorter half
        lengths = np.asarray([len(texts[at]) for at in candidates])
        candidates = candidates[lengths <= np.median(lengths)]
    chosen = [int(candidates[0])]
    nearest = vectors[candidates] @ vectors[chosen[0]]
    while len(chosen) < min(_EXAMPLES, len(candidates)) and nearest.min() < _SAME_AS_CHOSEN:
        chosen.append(int(candidates[nearest.argmin()]))
        nearest = np.maximum(nearest, vectors[candidates] @ vectors[chosen[-1]])
    return chosen


def _names(groups: list[list[str]]) -> list[tuple[str, str]]:
    """An id and a name for each group from the words that tell it from the others (class-based TF-IDF)."""
    texts = [text for group in groups for text in group]
    for mask in _MASKS:
        texts = [text.replace(mask, " ") for text in texts]
    counter = CountVectorizer(binary=True, token_pattern=_WORD)
    try:
        said = counter.fit_transform(texts)
        words = counter.get_feature_names_out().tolist()
    except ValueError:  # not a word in any of them
        return [(f"intent_{number}", f"Intent {number}") for number in range(1, len(groups) + 1)]
    ends = np.cumsum([len(group) for group in groups])
    counts = np.stack([np.asarray(part.sum(axis=0)).ravel() for part in _parts(said, ends)]).astype(np.float64)
    sizes = np.asarray([[len(group)] for group in groups])
    said_everywhere = np.mean(counts >= _SAID * sizes, axis=0) > _EVERYWHERE
    weights = normalize(counts, norm="l1") * np.log1p(counts.sum() / len(groups) / counts.sum(axis=0))
    if len(groups) >= _GROUPS_TO_COMPARE:
        weights[:, said_everywhere] = 0
    taken: Counter[str] = Counter({OTHER_INTENT: 1})
    names = []
    for number, row in enumerate(weights, start=1):
        telling: list[str] = []
        for at in np.argsort(-row, kind="stable"):
            if len(telling) == _NAMING_WORDS or not row[at]:
                break
            if not any(words[at][:_SAME_WORD] == one[:_SAME_WORD] for one in telling):
                telling.append(words[at])
        intent_id = re.sub("['’]", "", "_".join(telling)) or f"intent_{number}"
        taken[intent_id] += 1
        if taken[intent_id] > 1:
            intent_id = f"{intent_id}_{taken[intent_id]}"
        names.append((intent_id, ", ".join(telling).capitalize() or f"Intent {number}"))
    return names


def _parts(rows: Any, ends: np.ndarray[Any, np.dtype[np.int64]]) -> list[Any]:
    return [rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def to_yaml(suggestion: Suggestion) -> str:
    """The proposals as a catalog that a person edits, with comments that say what to do."""
    messages, grouped = suggestion.messages, suggestion.grouped
    different = len(messages.texts)
    sampled = f" (a sample of {grouped:,} of {different:,} different ones)" if grouped < different else ""
    rest = f" {suggestion.left_out:,} smaller groups are left out (--max-intents)." if suggestion.left_out else ""
    source = " ".join(suggestion.source.split())
    lines = [
        f"# {len(suggestion.proposals)} intents proposed from the {messages.total:,} messages of {source}{sampled}.",
        f"# They hold {suggestion.coverage:.0%} of them.{rest} E-mail addresses and long numbers are masked.",
        "#",
        "# What to do next:",
        "# 1. Read each group. Remove what is no wish (greetings, thanks, small talk): such messages are `other` then.",
        "# 2. Give it an id that stays, a name and a description; make groups that want the same one intent.",
        "# 3. Take out examples that say something else or are private; reword or add some, 8 to 14 in all.",
        "# 4. Write campaigns at the end of this file, put it into the catalog's folder, and run",
        "#    `personalization catalog check`, which names intents that overlap.",
        "#",
        "# `alike` is the mean cosine of a group's messages to their middle: below 0.5 it may be of several things.",
        "intents:",
    ]
    for one in suggestion.proposals:
        lines += [
            f"  # {one.messages:,} messages, {one.share:.1%}, alike {one.alike:.2f}",
            f"  - id: {_quoted(one.intent_id)}",
            f"    name: {_quoted(one.name)}",
            "    examples:",
            *(f"      - {_quoted(example)}" for example in one.examples),
            "",
        ]
    first = suggestion.proposals[0].intent_id
    lines += [
        "# Campaigns: remove the # and the brackets, and write your own.",
        "campaigns: []",
        "#  - id: my_first_campaign",
        "#    name: My first campaign",
        "#    description: What it offers, in a sentence.",
        f"#    intents: [{_quoted(first)}]",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A YAML scalar on one line."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")
