"""Run the genuine Milvus standalone of the PyPI package `milvus` in the foreground, for the supervisor.

python -m personalization.local.milvus_standalone DATA_DIR PORT
"""

import signal
import sys
from pathlib import Path

from milvus import MilvusServer

from personalization.local.config import HOST


def main(data_dir: Path, port: int) -> int:
    """Serve until the server ends; return its exit status."""
    data_dir.mkdir(parents=True, exist_ok=True)
    # Ports that components use among themselves are chosen by the package; these are not loopback-only.
    server = MilvusServer(wait_for_started=False, data_dir=str(data_dir), proxy_port=port)
    server.config.set("proxy.ip", HOST)
    server.config.set("common.session.ttl", 5)  # seconds; with the default a restart after a crash takes a minute
    server.start()
    # The supervisor signals the whole group, and kills it if the server hangs; so wait for the server.
    signal.signal(signal.SIGTERM, lambda *_: None)
    return int(server.server_proc.wait())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
