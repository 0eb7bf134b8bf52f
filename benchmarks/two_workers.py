"""How much faster two Ray workers are than one on merges that are bound by arithmetic, on this machine's cores.

    python benchmarks/two_workers.py FOLDER [--methods tsv_m knots_ties] [--rounds 3] [--layers 12] [--hidden 1024]

One embedded Ray of two CPUs is kept; runs with one and with two workers take turns, every second round in the
opposite order. Seconds are read from the receipts: from the first unit's begin to the last unit's end, so neither
the start of Ray and its processes nor planning counts. `speed-up` is the median over rounds of t(1) / t(2); the bar
is 1.7. `ceiling` is what the cores themselves allow: the same product of matrices in one process against the same in
each of two at once, twice the work over the time's growth. A shared machine, or cores that are two threads of one,
cannot give 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import synthetic
import torch

import ray_merge
from ray_merge.runtime.session import open_session

BAR = 1.7


def main() -> None:
    """Print one row for each method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=["tsv_m", "knots_ties"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    base, adapters = synthetic.make(
        options.folder, layers=options.layers, hidden=options.hidden, adapters=8, rank=16
    )
    print(f"ceiling of two processes: {ceiling():.2f}; load {os.getloadavg()[0]:.1f}", flush=True)
    print("\n| method | one worker s | two workers s | speed-up (rounds) | |\n|---|---|---|---|---|")
    with open_session("local", num_cpus=2):
        for method in options.methods:
            taken: dict[int, list[float]] = {1: [], 2: []}
            for turn in range(options.rounds):
                for workers in (1, 2) if turn % 2 == 0 else (2, 1):
                    taken[workers].append(seconds(options.folder, base, adapters, method, workers))
            ratios = [one / two for one, two in zip(taken[1], taken[2], strict=True)]
            found = statistics.median(ratios)
            words = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            medians = " | ".join(f"{statistics.median(taken[workers]):.2f}" for workers in (1, 2))
            print(
                f"| {method} | {medians} | {found:.2f} ({words}) | {'held' if found >= BAR else 'MISSED'} |"
            )
    print(f"\nload {os.getloadavg()[0]:.1f}, ceiling again {ceiling():.2f}")


def seconds(folder: Path, base: Path, adapters: dict[str, Path], method: str, workers: int) -> float:
    """From the first unit's begin to the last unit's end."""
    output = folder / "merged"
    shutil.rmtree(output, ignore_errors=True)
    recipe = {
        "base_model": str(base),
        "output": str(output),
        "adapters": {name: {"path": str(path)} for name, path in adapters.items()},
        "merges": [{"name": "m", "merge_method": method}],
        "max_shard_size": "8MB",
    }
    ray_merge.run(recipe, engine="ray", workers=workers, cache_dir=folder / "cache")
    receipts = [json.loads(path.read_text()) for path in output.glob("**/receipts/*.json")]
    units = [(one["began"], one["began"] + sum(one["seconds"].values())) for one in receipts if one["began"]]
    return max(end for _, end in units) - min(begin for begin, _ in units)


def ceiling() -> float:
    """Speed-up of products in two processes over one, the best of three."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        [*pool.map(products, [1, 1])]
        alone = min(pool.submit(products, 40).result() for _ in range(3))
        together = min(max(pool.map(products, [40, 40])) for _ in range(3))
    return 2 * alone / together


def products(n: int) -> float:
    """Seconds of n products of 1024^2 on one thread."""
    torch.set_num_threads(1)
    a = torch.randn(1024, 1024)
    began = time.perf_counter()
    for _ in range(n):
        torch.linalg.norm(a @ a)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
