"""Analytics databases for the tests of the dashboard and its reports."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from personalization.audit.command import record
from personalization.audit.findings import KINDS, AuditReport, Finding, Sample
from personalization.evaluation.recording import result_rows
from personalization.schemas import OTHER_INTENT, Campaign, Catalog, Intent
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore

from benchmarks import api_history

NOW = datetime.now(UTC).replace(microsecond=0)

_SECONDS_PER_ROW = {
    "prepare": 0.0,
    "ingest": 0.0004,
    "ingest_events": 0.0002,
    "embed_catalog": 0.0,
    "embed": 0.011,
    "upsert_vectors": 0.0012,
    "detect_intents": 0.0007,
    "build_graph": 0.0018,
    "roll_up_engagement": 0.0003,
    "refresh_profiles": 0.0006,
    "learn": 0.0008,
    "publish": 0.0,
}
_INTENTS = {
    "card_delivery": ("cards", "Travel card, no fees abroad", "Metal card"),
    "card_lost_or_stolen": ("cards", "Card protection plan", "Instant virtual card"),
    "loan": ("credit", "Home loan at 2.9 %", "Spring car loan"),
    "savings": ("savings", "Saver account 3 %", "Round-up savings", "Black Friday pot"),
    "travel": ("travel", "City breaks", "Airport lounge pass"),
    "insurance": ("insurance", "Phone insurance", "Family health cover"),
}
_ACTS: tuple[tuple[str, ...], ...] = (("click",), ("click",), ("click", "conversion"), ("dismiss",), *[()] * 19)
_UNSAID = {"position": None, "propensity": None, "policy": None}
_ENDED = {"Spring car loan", "Airport lounge pass"}


def open_store(path: Path) -> AnalyticsStore:
    """An analytics database with its tables and nothing in them."""
    store = AnalyticsStore.from_settings(Settings(_env_file=None, sqlite_path=path, analytics_url=None))
    store.ensure_schema()
    return store


def run_rows(
    run_id: str, started_at: datetime = NOW, messages: int = 1000, **changes: dict[str, Any]
) -> list[dict[str, Any]]:
    """The lineage of one run; `changes` set columns of a stage. Nothing runs after a failed stage."""
    rows: list[dict[str, Any]] = []
    clock = started_at
    for position, (stage, seconds_per_row) in enumerate(_SECONDS_PER_ROW.items()):
        seconds = 0.4 + messages * seconds_per_row * (1 + 0.3 * ((len(run_id) + position * 7 + messages) % 5))
        row = {
            "run_id": run_id,
            "stage": stage,
            "position": position,
            "status": "success",
            "rows_in": messages,
            "rows_out": messages,
            "rejected": 0,
            "skipped": 0,
            "shards": 1 + messages // 5000,
            "attempt": 1,
            "started_at": clock,
            "finished_at": clock + timedelta(seconds=seconds),
            "seconds": seconds,
            "error_type": None,
            "error": None,
            "details": _details(stage, messages),
            **changes.get(stage, {}),
        }
        if rows and rows[-1]["status"] != "success":
            row |= {
                "status": "not_run",
                "rows_in": 0,
                "rows_out": 0,
                "rejected": 0,
                "skipped": 0,
                "seconds": 0.0,
            }
            row |= {"started_at": None, "finished_at": None, "details": {}}
        clock += timedelta(seconds=seconds + 0.8)
        rows.append(row)
    return rows


def evaluation_rows(evaluation_id: str, created_at: datetime = NOW, drift: float = 0.0) -> list[dict[str, Any]]:
    """An evaluation of four policies as it is recorded; `drift` moves all of them."""

    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean + drift, "low": mean + drift - 0.03, "high": mean + drift + 0.03}

    means = {"shipped": 0.34, "fusion": 0.31, "popularity": 0.22, "random": 0.06}
    names = ("ndcg@10", "recall@5", "recall@10", "mrr", "hit_rate@10", "novelty@10")
    policies: dict[str, Any] = {
        policy: {name: interval(mean) for name in names}
        | {"coverage@10": 0.5}
        | {"segments": {one: {"answers": 400, "ndcg@10": interval(mean)} for one in ("cold", "warm")}}
        for policy, mean in means.items()
    }
    policies["shipped"]["calibration"] = {
        "expected_calibration_error": 0.004,
        "brier": 0.03,
        "mean_probability": 0.031,
        "engaged": 0.033,
    }
    report = {
        "task": "new",
        "splits": [(created_at - timedelta(days=28)).isoformat()],
        "horizon_days": 7.0,
        "users": 610,
        "answers": 800,
        "policies": policies,
        "differences": {
            f"shipped - {policy}": {"ndcg@10": {"mean": 0.34 - mean, "low": 0.32 - mean, "high": 0.36 - mean}}
            for policy, mean in means.items()
            if policy != "shipped"
        },
    }
    return [row | {"created_at": created_at} for row in result_rows(evaluation_id, report)]


def seed(path: Path) -> None:
    """A store as it is after some weeks: good runs, every kind of anomaly, and engagement."""
    store = open_store(path)
    for number in range(24):
        started_at = NOW - timedelta(hours=9 * (24 - number))
        messages = 900 + (number * 577) % 1400
        skipped, rejected = number * 37 % 400, number % 5 * 6
        ingest = {"rows_in": messages + skipped + rejected, "skipped": skipped, "rejected": rejected}
        changes: dict[str, dict[str, Any]] = {
            "ingest": ingest,
            "detect_intents": {"rows_out": messages * 4 // 5, "skipped": messages - messages * 4 // 5},
            "roll_up_engagement": {"rows_out": messages * 2},
            "publish": {
                "details": _details("publish", messages)
                | {"generation": number + 1, "messages": 1500 * (number + 1), "vectors": 1500 * (number + 1)}
            },
        }
        if number == 9:
            ingest |= {"rejected": 460, "rows_in": ingest["rows_in"] + 460}
        if number == 14:
            changes["upsert_vectors"] = {"rows_out": messages - 40}
        if number == 18:
            changes["roll_up_engagement"] = {"rows_out": 0}
        if number == 20:
            changes["build_graph"] = {
                "status": "failed",
                "rows_out": 0,
                "error_type": "StoreError",
                "error": "neo4j: does not answer at bolt://127.0.0.1:7687 (ServiceUnavailable)",
            }
        run_id = f"scheduled__{started_at:%Y-%m-%dT%H:%M:%S}+00:00"
        store.record_runs(run_rows(run_id, started_at, messages, **changes))
    _seed_engagement(store)
    for week in range(6):
        store.record_evaluation(evaluation_rows(f"week {week}", NOW - timedelta(weeks=5 - week), 0.01 * (week % 3)))
    store.engine.dispose()


def seed_everything(path: Path) -> None:
    """As `seed`, with events, traffic of the API and audits: no page has an empty part."""
    seed(path)
    store = open_store(path)
    _seed_events(store)
    api_history.fill(store, NOW, 2)
    compared = {
        "mongodb": {"messages": 36_000, "events": 4_800},
        "milvus": {"vectors": 35_999, "profiles": 633},
        "neo4j": {"users": 211, "expressed": 640, "engaged": 512},
        "analytics": {"messages": 36_000, "events": 4_800, "engagement": 905},
        "redis": {"answers": 118},
    }
    message = Sample("m-1207", "customer-042", "customer-042 at 2026-11-20 18:41:36", None)
    count = Sample("customer-017 → travel", "customer-017", "count 4, last 2026-11-21", "count 77, last 2026-11-21")
    drift = [
        Finding(KINDS[kind], 1, [sample])
        for kind, sample in (("message_without_vector", message), ("expressed_differs", count))
    ]
    for number in range(9):
        began = NOW - timedelta(hours=9 * (9 - number) - 1)
        found = drift if number == 8 else []
        status: Any = "drift" if found else "clean"
        report = AuditReport(f"audit {number}", began, began + timedelta(seconds=94), status, False, compared, 0, found)
        record(report, store)
    store.engine.dispose()


def _seed_events(store: AnalyticsStore) -> None:
    names = [_campaign_id(name) for _, *some in _INTENTS.values() for name in some]
    rows = []
    for number in range(1600):
        # What is shown is at times acted upon.
        kinds = ("impression", *_ACTS[(number * 5 + number // 31) % len(_ACTS)])
        user, campaign = f"customer-{number * 7 % 211:03d}", names[number * number % 23 % len(names)]
        moment = int((NOW - timedelta(minutes=27 * number)).timestamp() * 1000)
        key = {"user_id": user, "campaign_id": campaign, "timestamp": moment, "run_id": "r"}
        rows += [{**key, **_UNSAID, "event_id": f"{number} {kind}", "event": kind} for kind in kinds]
    store.set_events(rows)
    store.roll_up_engagement(sorted({row["user_id"] for row in rows}), half_life_days=30)
    store.refresh_campaign_totals()


def _seed_engagement(store: AnalyticsStore) -> None:
    this_year = NOW.date().replace(month=1, day=1)
    campaigns = [
        Campaign(
            id=_campaign_id(name),
            name=name,
            category=category,
            intents=[intent],
            active_from=this_year - timedelta(days=400),
            active_until=NOW.date() - timedelta(days=40) if name in _ENDED else None,
        )
        for intent, (category, *names) in _INTENTS.items()
        for name in names
    ]
    later = Campaign(
        id="next_year_bonus",
        name="Next year's bonus",
        category="savings",
        intents=["savings"],
        active_from=NOW.date() + timedelta(days=30),
    )
    intents = [Intent(id=one, name=one.replace("_", " "), examples=["…"]) for one in _INTENTS]
    store.sync_catalog(Catalog(intents=intents, campaigns=[*campaigns, later]))
    names = [*_INTENTS, OTHER_INTENT]
    rows = [
        {
            "message_id": f"m{number}",
            "intent_id": names[(number * number) % 31 % len(names)],
            "user_id": f"customer-{number * 7 % 211:03d}",
            "timestamp": int((NOW - timedelta(hours=number)).timestamp() * 1000),
            "confidence": 0.7,
            "run_id": "r",
        }
        for number in range(1500)
    ]
    store.replace_message_intents([row["message_id"] for row in rows], rows)
    store.roll_up_engagement(sorted({row["user_id"] for row in rows}), half_life_days=30)
    store.refresh_campaign_totals()


def _campaign_id(name: str) -> str:
    return name.lower().translate({ord(mark): "_" for mark in " ,.%-"})


def _details(stage: str, messages: int) -> dict[str, Any]:
    details: dict[str, dict[str, Any]] = {
        "ingest": {
            "files": [{"uri": "file:///data/inbox/conversations.jsonl", "sha256": "9f2c" * 16}],
            "new": messages,
            "changed": 0,
            "unchanged": 0,
            "duplicates": 0,
        },
        "embed": {"model": "all-roberta-large-v1", "device": "cpu", "dtype": "float32"},
        "publish": {
            "generation": 1,
            "messages": messages,
            "vectors": messages,
            "users": 211,
            "users_without_intent": 9,
            "nothing_new": False,
        },
    }
    return details.get(stage, {})
