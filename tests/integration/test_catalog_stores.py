"""Catalogs of all kinds on their way into the real stores."""

from pathlib import Path
from typing import Any

from conftest import Stores, stage, write_rows
from personalization.pipeline.run import run_pipeline
from personalization.settings import Settings


def rows() -> list[dict[str, Any]]:
    texts = ("I want to book a flight to Lisbon", "Which film should I watch?", "My car won't start")
    return [
        {"user_id": f"u{at}", "message": text, "timestamp": "2026-10-01T09:00:00Z"} for at, text in enumerate(texts)
    ]


def test_a_catalog_of_campaigns_alone_reaches_every_store(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    (tmp_path / "campaigns.csv").write_text("id,name,description\n119144,City breaks,Flight and hotel\nSale! 2,Sale,\n")
    settings = settings.model_copy(update={"catalog_path": tmp_path})

    summary = run_pipeline(write_rows(tmp_path / "in.ndjson", rows()), settings)

    assert summary["status"] == "success", summary
    assert stage(summary, "prepare")["details"]["intents"] == 0
    assert {one for (one,) in stores.sql("SELECT campaign_id FROM campaigns")} == {"119144", "Sale! 2"}
    assert stores.cypher("MATCH (c:Campaign) RETURN count(c)") == 2
    assert {one for (one,) in stores.sql("SELECT intent_id FROM message_intents")} == {"other"}


def test_a_catalog_whose_campaigns_lose_their_intents_is_followed(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    catalog = tmp_path / "all.yaml"
    settings = settings.model_copy(update={"catalog_path": tmp_path})
    path = write_rows(tmp_path / "in.ndjson", rows())
    intents = "intents: [{id: flights, name: Flights, examples: [I want to fly to Rome, book a flight to Lisbon]}]\n"
    catalog.write_text(f"{intents}campaigns: [{{id: sale, name: Sale, intents: [flights]}}]")
    run_pipeline(path, settings)
    assert stores.cypher("MATCH ()-[t:TARGETS]->() RETURN count(t)") == 1

    catalog.write_text("campaigns: [{id: sale, name: Sale}]")
    summary = run_pipeline(path, settings)

    assert summary["status"] == "success", summary
    assert stores.cypher("MATCH ()-[t:TARGETS]->() RETURN count(t)") == 0
    assert stores.cypher("MATCH (i:Intent) RETURN count(i)") == 0
    assert stores.sql("SELECT count(*) FROM campaign_targets")[0][0] == 0
