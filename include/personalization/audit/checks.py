"""Checks: where the stores disagree, as cases in scratch's table `drift`.

One cause is one finding: what may follow from another is left out, and shows in the next audit if it did not.
"""

from collections.abc import Iterator

from personalization.audit.evidence import IN_FLUX, LEFT_BEHIND, SETTLED, Evidence
from personalization.audit.findings import KINDS, Finding, Sample, Scope
from personalization.audit.scratch import Scratch, merged

_SAMPLES = 10

# (expected, found, (missing, too much, different)) as queries of (id, user_id, value).
_SAID = "SELECT id, user_id, user_id || ' at ' || datetime(at, 'unixepoch') AS value FROM"
_TAKEN = "SELECT id, user_id, user_id || ' at ' || datetime(at, 'unixepoch') || ' by ' || run_id AS value FROM"
_KEPT = "SELECT id, user_id, user_id AS value FROM"
_KNOWN = """SELECT user_id FROM messages UNION SELECT user_id FROM events WHERE run_id IS NOT NULL"""
_LAST_SEEN = """SELECT '{0}/' || user_id AS id, user_id, 'last message at ' || datetime(max(at), 'unixepoch') AS value
    FROM messages GROUP BY user_id"""
_PROFILE = """SELECT '{0}/' || user_id AS id, user_id,
    CASE WHEN min(last_seen) = max(last_seen) THEN 'last message at ' || datetime(max(last_seen), 'unixepoch')
         ELSE 'of several times' END AS value
    FROM profiles WHERE id LIKE '{0}/%' GROUP BY user_id"""
_PAIRS = "SELECT id, user_id, value FROM"
_CATALOG = "SELECT id, NULL AS user_id, value FROM"
_COMPARISONS: tuple[tuple[str, str, tuple[str, str, str]], ...] = (
    (f"{_SAID} messages", f"{_SAID} vectors", ("message_without_vector", "vector_without_message", "vector_differs")),
    (
        f"{_TAKEN} messages",
        f"{_TAKEN} intents",
        ("message_without_intents", "intents_without_message", "intents_differ"),
    ),
    (
        f"{_PAIRS} events WHERE run_id IS NOT NULL",
        f"{_PAIRS} sql_events",
        ("event_missing", "event_without_source", "event_differs"),
    ),
    *(
        (
            _LAST_SEEN.format(alias),
            _PROFILE.format(alias),
            ("user_without_profile", "profile_without_user", "profile_stale"),
        )
        for alias in ("users", "interests")
    ),
    (
        f"SELECT user_id AS id, user_id, 'a node' AS value FROM ({_KNOWN})",  # noqa: S608
        "SELECT user_id AS id, user_id, 'a node' AS value FROM nodes",
        ("user_without_node", "node_without_user", "node_without_user"),
    ),
)
_BY_CATALOG: tuple[tuple[str, str, str], ...] = (
    ("expressed", "expressed_edges", "expressed_differs"),
    ("engaged", "engaged_edges", "engaged_differs"),
    ("engagement", "engagement_rows", "engagement_differs"),
)
_ROOTS = (
    "message_left_behind",
    "erased_user_left",
    "message_without_vector",
    "vector_invalid",
    "vector_differs",
    "vector_without_message",
    "message_without_intents",
    "intents_without_message",
    "intents_differ",
    "event_missing",
    "event_without_source",
    "event_differs",
)
"""Of messages and events, from which everything about a user follows."""


def find_drift(evidence: Evidence) -> Iterator[str]:
    """Fill the table `drift`; yield what comes next. Two external sorts a comparison, whatever the sizes."""
    scratch = evidence.scratch
    for expected, found, kinds in _COMPARISONS:
        yield kinds[0].replace("_", " ")
        _compare(scratch, expected, found, *kinds)
    if evidence.keeps is not None:
        kinds = ("kept_vector_missing", "kept_vector_without_message", "kept_vector_missing")
        _compare(scratch, f"{_KEPT} messages", f"{_KEPT} kept_vectors", *kinds)
    _find_left_behind(scratch)
    _find_erased(scratch)
    if not evidence.is_catalog_in_flux:
        for expected, found, kind in _BY_CATALOG:
            yield kind.replace("_", " ")
            _compare(scratch, f"{_PAIRS} {expected}", f"{_PAIRS} {found}", kind, kind, kind)
        _compare(scratch, f"{_CATALOG} catalog_sql", f"{_CATALOG} catalog_graph", *["graph_catalog_differs"] * 3)
        if evidence.serves is not None:
            _compare(scratch, f"{_CATALOG} catalog_served", f"{_CATALOG} catalog_sql", *["catalog_differs"] * 3)
    if evidence.serving_problem is not None and evidence.has_published:
        evidence.drift("knowledge_not_served", [("served", None, "published and announced", evidence.serving_problem)])
    yield "what is in flux"
    _excuse(evidence)


def findings_of(scratch: Scratch) -> list[Finding]:
    """What is in `drift`, by kind in their order, each with its first cases."""
    counts = dict(scratch.rows("SELECT kind, count(DISTINCT id) FROM drift GROUP BY kind"))
    return [
        Finding(
            kind,
            counts[name],
            [
                Sample(*row)
                for row in scratch.rows(
                    "SELECT id, max(user_id), max(expected), max(found) FROM drift WHERE kind = ? "
                    "GROUP BY id ORDER BY id LIMIT ?",
                    name,
                    _SAMPLES,
                )
            ],
        )
        for name, kind in KINDS.items()
        if name in counts
    ]


def _compare(scratch: Scratch, expected: str, found: str, missing: str, too_much: str, different: str) -> None:
    scratch.run(
        f"""INSERT INTO drift
            SELECT CASE WHEN found IS NULL THEN ? WHEN expected IS NULL THEN ? ELSE ? END, id, user_id, expected, found
            FROM (SELECT id, user_id, expected, found FROM ({merged(expected, found)}))""",  # noqa: S608
        missing,
        too_much,
        different,
    )


def _find_left_behind(scratch: Scratch) -> None:
    scratch.run(
        """INSERT INTO drift
           SELECT 'message_left_behind', id, user_id, 'published', 'taken by ' || run_id
           FROM messages LEFT JOIN runs USING (run_id) WHERE coalesce(for_messages, ?) = ?""",
        LEFT_BEHIND,
        LEFT_BEHIND,
    )


def _find_erased(scratch: Scratch) -> None:
    """Whoever was erased and settled, and is in a store again. A digest for each user of any store."""
    if not scratch.rows("SELECT 1 FROM erased LIMIT 1"):
        return
    tables = (
        "messages",
        "events",
        "vectors",
        "kept_vectors",
        "profiles",
        "intents",
        "sql_events",
        "nodes",
        "engagement_rows",
        "answers",
    )
    users = " UNION ".join(f"SELECT user_id FROM {table}" for table in tables)  # noqa: S608
    scratch.run(
        f"""INSERT INTO drift SELECT 'erased_user_left', user_id, user_id, NULL, 'something of theirs'
            FROM ({users}) WHERE erasure_id(user_id) IN (SELECT digest FROM erased)"""  # noqa: S608
    )


def _excuse(evidence: Evidence) -> None:
    """Forget what a run at work or an open erasure is about to settle, and what follows from another finding."""
    scratch = evidence.scratch
    scratch.run("CREATE INDEX drift_kind ON drift (kind, user_id)")
    scratch.run("DELETE FROM drift WHERE user_id IN (SELECT user_id FROM erasing)")
    scratch.run(
        """DELETE FROM drift WHERE kind <> 'erased_user_left'
           AND user_id IN (SELECT user_id FROM drift WHERE kind = 'erased_user_left')"""
    )
    settled = "SELECT run_id FROM runs WHERE {} = ?"
    scratch.run(
        f"""DELETE FROM drift WHERE kind IN ({_of("message")}) AND id IN
            (SELECT id FROM messages WHERE run_id NOT IN ({settled.format("for_messages")}))""",  # noqa: S608
        SETTLED,
    )
    scratch.run(
        f"""DELETE FROM drift WHERE kind IN ({_of("event")}) AND id IN
            (SELECT id FROM events WHERE run_id IS NULL OR run_id NOT IN ({settled.format("for_events")}))""",  # noqa: S608
        SETTLED,
    )
    # An orphan of a user in flux may be a message that was read before it was taken.
    scratch.run("CREATE TABLE unsettled (user_id TEXT PRIMARY KEY) WITHOUT ROWID")
    scratch.run(
        "INSERT OR IGNORE INTO unsettled SELECT user_id FROM messages JOIN runs USING (run_id) WHERE for_messages = ?",
        IN_FLUX,
    )
    scratch.run(
        "INSERT OR IGNORE INTO unsettled SELECT user_id FROM events JOIN runs USING (run_id) WHERE for_events = ?",
        IN_FLUX,
    )
    roots = ", ".join(f"'{one}'" for one in _ROOTS)
    scratch.run(f"INSERT OR IGNORE INTO unsettled SELECT user_id FROM drift WHERE kind IN ({roots})")  # noqa: S608
    scratch.run(
        f"DELETE FROM drift WHERE kind IN ({_of('user')}) AND user_id IN (SELECT user_id FROM unsettled)"  # noqa: S608
    )
    if scratch.rows("SELECT 1 FROM unsettled LIMIT 1") or scratch.rows("SELECT 1 FROM erasing LIMIT 1"):
        scratch.run("DELETE FROM drift WHERE kind = 'campaign_totals_differ'")  # they are summed up at the end


def _of(scope: Scope) -> str:
    """SQL list of the kinds of a scope."""
    return ", ".join(f"'{one.name}'" for one in KINDS.values() if one.scope == scope)
