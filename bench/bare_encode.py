"""The baseline of a drain: a bare process that encodes all texts in one call.

`python -m bench.bare_encode MODEL TEXTS` prints the seconds; TEXTS is a JSON file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.peer_table import encode, load_model
from bench.processes import REPOSITORY, clean_environment
from bench.progress import BenchError


def bare_seconds(model: Path, texts: Sequence[str], folder: Path) -> float:
    """Seconds that `encode` takes for all texts in a process of its own, loading not counted."""
    file = folder / "texts.json"
    file.write_text(json.dumps(list(texts)))
    finished = subprocess.run(
        [sys.executable, "-m", "bench.bare_encode", str(model), str(file)],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise BenchError(f"the bare encode failed:\n{finished.stderr}")
    return float(finished.stdout)


def _seconds(directory: str, texts: list[str]) -> float:
    model = load_model(directory)
    # The service, too, has encoded one text before it listens.
    encode(model, "dimension")
    began = time.perf_counter()
    encode(model, texts)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(_seconds(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())))
