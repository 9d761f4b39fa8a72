"""Run the benchmarks: `make bench` for all, `python -m benchmarks NAME` for one."""

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import anomalies, audit, dashboard, encoder, ingest, intents, migration, recommendation, serving

RESULTS = Path(__file__).parent / "results"
BENCHMARKS: dict[str, tuple[Path, Callable[[], None]]] = {
    "dashboard": (RESULTS, lambda: dashboard.main(RESULTS)),
    "anomalies": (anomalies.DATA, lambda: anomalies.main(RESULTS)),
    "audit": (audit.DATA, lambda: audit.main(RESULTS)),
    "encoder": (encoder.DATA, lambda: encoder.main(RESULTS)),
    "ingest": (ingest.DATA, lambda: ingest.main(RESULTS)),
    "intents": (intents.DATA, lambda: intents.main(RESULTS)),
    "migration": (audit.DATA, lambda: migration.main(RESULTS)),
    "recommendation": (recommendation.REDIAL, lambda: recommendation.main(RESULTS)),
    "serving": (serving.DATA, lambda: serving.main(RESULTS)),
}

if __name__ == "__main__":
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        sys.exit(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    for name in names:
        data, measure = BENCHMARKS[name]
        if data.exists():
            measure()
        else:
            print(f"{name}: {data} is not here; PERSONALIZATION_TEST_DATA may name the folder of the real data sets")
