"""Resident memory of a run: driver + workers, without Ray's own daemons, sampled 20 times a second.

    python benchmarks/memory.py FOLDER [--methods task_arithmetic,ties,...] [--merges 1,16] [--engine ray]

Merges 8 rank-16 adapters into a synthetic 2.2 GB bfloat16 Llama (see synthetic.py) with `ray-merge run` as a
separate process, and adds up VmRSS of that process and of its descendants. What counts as Ray's daemons: the
processes whose command line names gcs_server, raylet, an agent, a monitor or the dashboard; worker processes
that Ray keeps ready and never uses ("idle") are counted. The columns are those of the moment of the peak. Shared
pages are counted once per process, so the sum is an upper bound; PSS (shared pages divided) is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import synthetic
from watch import watch

DENSE = {"scope": "tensor", "space": "dense"}
METHODS = {
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.4}),
    "ties_dense": ("ties", DENSE),
    "ties_core": ("ties", {"scope": "tensor", "space": "core"}),
    "knots_ties": ("knots_ties", {"scope": "tensor"}),
    "dare_ties": ("dare_ties", {"density": 0.5}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--merges", default="1")
    parser.add_argument("--engine", default="ray")
    synthetic.add_options(parser)
    given = parser.parse_args()
    base, adapters = synthetic.make(
        given.folder, layers=given.layers, hidden=given.hidden, adapters=given.adapters, rank=given.rank
    )
    base_bytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(
        f"base {base_bytes / 1e9:.2f} GB, {len(adapters)} adapters of rank {given.rank}, engine {given.engine}"
    )
    print(
        f"{'method':18}{'merges':>7}{'RSS MB':>9}{'driver':>9}{'workers':>9}{'idle':>9}{'PSS MB':>9}{'seconds':>9}"
    )
    for name in given.methods.split(","):
        for count in map(int, given.merges.split(",")):
            method, parameters = METHODS[name]
            swept = {k: v for k, v in parameters.items() if k != "lambda"}
            entry = {"name": "m", "merge_method": method, "parameters": swept}
            entry["sweep"] = {"lambda": [round(0.1 + 0.05 * i, 2) for i in range(count)]}
            out = given.folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            recipe = given.folder / "recipe.json"
            document = {"base_model": str(base), "output": str(out), "merges": [entry]}
            recipe.write_text(json.dumps({**document, "adapters": {k: str(v) for k, v in adapters.items()}}))
            command = [sys.executable, "-m", "ray_merge", "run", str(recipe), "--engine", given.engine]
            cost = watch([*command, "--cache-dir", str(given.folder / "cache")], pss=True)
            sizes = [cost.peak_bytes[key] for key in ("total", "driver", "worker", "idle")]
            figures = "".join(f"{size / 2**20:9.0f}" for size in [*sizes, cost.pss_bytes])
            print(f"{name:18}{count:7}{figures}{cost.seconds:9.1f}", flush=True)
            shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
