"""A run of the pipeline over a file, in a process of its own, with the model loaded before: prints what it took.

`python -m benchmarks.references.run_once FILE`, with the stores' addresses in the environment.
"""

import json
import logging
import resource
import sys
import time

import structlog
from personalization.encoder import get_encoder
from personalization.pipeline.run import run_pipeline
from personalization.settings import get_settings


def main() -> None:
    """Take the file."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    settings = get_settings()
    started = time.perf_counter()
    encoder = get_encoder(settings.embedding_model, settings.embedding_dim)
    encoder.encode(["a text, so that everything is there"])
    loaded, cpu = time.perf_counter(), time.process_time()
    summary = run_pipeline(sys.argv[1], settings)
    took = {
        "load": loaded - started,
        "seconds": time.perf_counter() - loaded,
        "cpu": time.process_time() - cpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "summary": summary,
    }
    print(json.dumps(took))


if __name__ == "__main__":
    main()
