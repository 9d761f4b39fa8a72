"""The log of the API's process: JSON, one object a line, with the request's id.

A request that went well leaves no line: its count and time are in the metrics, a line for each would cost more than a
cached answer does, and it would spread over the logs who was shown what. Requests that were refused, failed or slow
leave one, with the route's template instead of the path, which holds a user's id. What comes in floods, by its nature,
is counted and not logged: requests above a rate or shed, and paths that are none.
"""

import logging
import sys

import structlog

_SHARED: tuple[structlog.typing.Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)


def configure_logs() -> None:
    """Write the platform's log and that of the server and the drivers in one form to standard output."""
    structlog.configure(
        processors=[*_SHARED, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=[*_SHARED, structlog.stdlib.add_logger_name],
        )
    )
    root, server = logging.getLogger(), logging.getLogger("uvicorn")
    root.handlers = root.handlers or [handler]  # a test's own stay
    server.handlers, server.propagate = [handler], False
    # Its lines repeat expressions, which hold ids of users; what fails is raised, and told by whoever asked.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
