"""Run the benchmarks: `make bench`."""

import sys
from pathlib import Path

from benchmarks import ingest

MESSAGES = 10_000
RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    if not ingest.DATA.exists():
        sys.exit(f"{ingest.DATA} is not here; PERSONALIZATION_TEST_DATA may name the folder of the real data sets")
    ingest.main(MESSAGES, RESULTS)
