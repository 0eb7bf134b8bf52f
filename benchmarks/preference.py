"""Does a preference steer? Two real adapters, merged once for each share of the first one, and each task's test score.

    python benchmarks/preference.py --suite FOLDER [--tasks trec subj] [--shares 0.1 0.3 0.5 0.7 0.9] [--seeds 0]
        [--method tara_a] [--objective agreement] [--steps 40] [--learning-rate X] [--alpha X] [--test-rows 1000]

FOLDER is laid out as for real_suite.py. All merges of a seed are one recipe, with `preference` among their parameters,
so that they share anchors, the base and the data. They learn from the texts of train.parquet, no label is read.

Printed: scores by share, Spearman's rho of each task's own share with its score (1: every raise raised the score), the
slope of a straight line through them in points for the whole way from 0 to 1, and the points that no other point beats.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from real_suite_merging import Home, Scorer, is_regression

import ray_merge
from ray_merge.algebra.metrics import spearman
from ray_merge.demo.suite import base_folder

TAKERS = ("tara_a", "tara_b", "adamerging")

Scores = Mapping[str, float]
"""Percent by task."""


def main() -> None:
    """Merge, score, print."""
    options = arguments()
    torch.set_num_threads(1)
    home = Home(
        suite=str(options.suite),
        base=str(options.base or base_folder()),
        scratch=str(options.scratch or tempfile.mkdtemp(prefix="preference-")),
        val_rows=1,
        test_rows=options.test_rows,
        max_length=options.max_length,
    )
    try:
        found = {seed: sweep(home, options, seed) for seed in options.seeds}
        alone = Scorer(home).singles(options.tasks, "test")
    finally:
        if options.scratch is None:
            shutil.rmtree(home.scratch, ignore_errors=True)
    for line in report(options, found, alone):
        print(line)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", type=Path, required=True)
    add("--base", type=Path, help="default: all-MiniLM-L6-v2 from its package")
    add("--scratch", type=Path, help="kept, and gone on from; default: a temporary folder")
    add("--tasks", nargs=2, default=["trec", "subj"])
    add("--shares", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7, 0.9], help="of the first task")
    add("--method", choices=TAKERS, default="tara_a")
    add("--objective", choices=("agreement", "entropy"), default="agreement")
    add("--steps", type=int, default=40)
    add("--learning-rate", type=float, help="default: the method's")
    add("--alpha", type=float, help="default: the method's")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--test-rows", type=int, default=1000, help="of each task, the first ones; 0 for all")
    add("--max-length", type=int, default=128)
    options = parser.parse_args()
    if any(not 0 < share < 1 for share in options.shares) or len(set(options.shares)) < 2:
        parser.error(f"--shares {options.shares}: at least two different ones, between 0 and 1")
    return options


def sweep(home: Home, options: argparse.Namespace, seed: int) -> dict[float, Scores]:
    """Test scores by share of the first task; one recipe for all of them."""
    first, second = options.tasks
    folder = Path(home.scratch) / f"seed{seed}"
    merges = {f"share{number}": share for number, share in enumerate(options.shares)}
    recipe = {
        "base_model": home.base,
        "output": str(folder),
        "store": str(Path(home.scratch) / "store"),
        "calibration": {"max_length": home.max_length},
        "stages": 1,
        "adapters": {task: source(home, task) for task in options.tasks},
        "merges": [
            {
                "name": name,
                "merge_method": options.method,
                "adapters": list(options.tasks),
                "parameters": {**given(options), "preference": {first: share, second: round(1 - share, 12)}},
                "seed": seed,
            }
            for name, share in merges.items()
        ],
    }
    began = time.process_time()
    ray_merge.run(recipe, engine="local", workers=1, cache_dir=Path(home.scratch) / "cache")
    print(f"seed {seed}: {len(merges)} merges in {time.process_time() - began:.0f} s of CPU", flush=True)
    scorer = Scorer(home)
    return {share: scorer.merged(folder / name, options.tasks, "test") for name, share in merges.items()}


def source(home: Home, task: str) -> dict[str, str]:
    """One entry of the recipe's adapters."""
    suite = Path(home.suite)
    found = {
        "path": str(suite / "adapters" / task),
        "data": str(suite / "tasks" / task / "train.parquet"),
    }
    return {**found, "task": "regression"} if is_regression(home, task) else found


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Parameters that all merges share."""
    found = {"objective": options.objective, "scalarisation": "tchebycheff", "steps": options.steps}
    more = {"learning_rate": options.learning_rate, "alpha": options.alpha}
    return {**found, **{key: value for key, value in more.items() if value is not None}}


def report(
    options: argparse.Namespace, by_seed: Mapping[int, Mapping[float, Scores]], alone: Scores
) -> list[str]:
    """The table and what it says."""
    first, second = options.tasks
    shares = sorted(options.shares)
    means = {
        share: {
            task: statistics.fmean(found[share][task] for found in by_seed.values()) for task in options.tasks
        }
        for share in shares
    }
    best = non_dominated([tuple(means[share].values()) for share in shares])
    lines = [
        f"\n{options.method} {json.dumps(given(options))}, {len(by_seed)} seed(s), test scores in percent\n",
        f"| share of {first} | {first} | {second} | mean | beaten by none |",
        "| --- | --- | --- | --- | --- |",
    ]
    for share, kept in zip(shares, best, strict=True):
        one, two = means[share].values()
        lines.append(
            f"| {share:g} | {one:.1f} | {two:.1f} | {(one + two) / 2:.1f} | {'yes' if kept else ''} |"
        )
    lines.append(f"| adapter alone | {alone[first]:.1f} | {alone[second]:.1f} | | |\n")
    for task in options.tasks:
        own = shares if task == first else [1 - share for share in shares]
        lines.append(says(task, own, [means[share][task] for share in shares]))
    return lines


def says(task: str, shares: Sequence[float], scores: Sequence[float]) -> str:
    """Whether raising a task's share raises its score on average."""
    if len(set(scores)) < 2:
        return f"{task}: the same score at every share"
    slope = statistics.linear_regression(shares, scores).slope
    rho = spearman(torch.tensor(shares), torch.tensor(scores))
    return f"{task}: Spearman {rho:+.2f} of share and score, {slope:+.1f} points from share 0 to 1"


def non_dominated(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """For each point whether none is at least as good in all scores and better in one."""
    return [
        not any(other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in points)
        for point in points
    ]


if __name__ == "__main__":
    main()
