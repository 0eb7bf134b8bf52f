"""How long a run takes when every merge is complete: the whole process, five times.

    python benchmarks/noop.py FOLDER [--engine ray]

Runs a recipe of 4 merges on the synthetic 2.2 GB base once (see synthetic.py), then five times again. A run
with nothing to do starts neither Ray nor torch; what is left is Python's start, the headers of base and
adapters, and one look at each output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", default="ray")
    synthetic.add_options(parser)
    given = parser.parse_args()
    base, adapters = synthetic.make(
        given.folder, layers=given.layers, hidden=given.hidden, adapters=given.adapters, rank=given.rank
    )
    out = given.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = given.folder / "recipe.json"
    document = {
        "base_model": str(base),
        "base_model_names": ["synthetic/llama"],
        "output": str(out),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "merges": [
            {"name": "m", "merge_method": "task_arithmetic", "sweep": {"lambda": [0.2, 0.4, 0.6, 0.8]}}
        ],
    }
    recipe.write_text(json.dumps(document))
    command = [sys.executable, "-m", "ray_merge", "run", str(recipe), "--engine", given.engine]
    command += ["--cache-dir", str(given.folder / "cache")]
    seconds = []
    for _ in range(6):
        started = time.monotonic()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds.append(time.monotonic() - started)
    assert "nothing to do" in done.stdout
    shutil.rmtree(out, ignore_errors=True)
    print(
        f"first run {seconds[0]:.1f} s; with nothing to do, median of 5: {statistics.median(seconds[1:]):.2f} s"
    )


if __name__ == "__main__":
    main()
