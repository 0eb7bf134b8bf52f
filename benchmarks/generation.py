"""Merges of text-to-text adapters of a real causal LM, scored by what they write and by their perplexity.

    python benchmarks/generation.py --suite FOLDER [--smollm2 FOLDER] [--output DIR] [--tasks sentiment question]
        [--steps 25] [--rows 40]

SmolLM2-135M-Instruct as get_smollm2.py makes it: its weights are de-quantised 4-bit ones, so figures are those of
that checkpoint. FOLDER is laid out as for real_suite.py; prompts are made of its texts (generation_adapters.py).
Each task gets a LoRA adapter of few steps; these are merged by NSC, which sees prompts without their completions, and
by methods without data. `ray_merge.evaluate` scores all of them on held-out rows: exact_match of the completion, and
perplexity of prompt and completion together. With --output a stopped run of the same options goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from generation_adapters import PROMPTS, Training, train, write_data

import ray_merge

METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "task_arithmetic_0.5": ("task_arithmetic", {"weight": 0.5}),
    "task_arithmetic_1": ("task_arithmetic", {"weight": 1.0}),
    "ties": ("ties", {}),
    "knots_ties": ("knots_ties", {}),
    "tsv_m": ("tsv_m", {}),
    "iso_c": ("iso_c", {}),
}
"""Merge name -> method and parameters, of those without data."""

MAX_LENGTH = 64
TRAIN_ROWS = 400
METRICS = ("exact_match", "perplexity")

Scores = Mapping[str, Mapping[str, Any]]
"""The content of evaluation.json, by metric."""


def main() -> None:
    """Train, merge, score, print."""
    options = arguments()
    torch.set_num_threads(1)
    folder = Path(options.output or tempfile.mkdtemp(prefix="generation-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        seconds = {"training": prepare(options, folder)}
        recipe = recipe_of(options, folder)
        seconds |= merge(recipe, folder)
        scores: dict[str, Mapping[str, Any]] = {}
        for metric in METRICS:
            began = time.process_time()
            scores[metric] = score(recipe, folder, metric)
            seconds[metric] = time.process_time() - began
            say(f"scored {metric}: {seconds[metric]:.0f} s")
    finally:
        if options.output is None:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(report(options, scores, seconds)))


def arguments() -> argparse.Namespace:
    """Command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray-merge"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", type=Path, required=True)
    add("--smollm2", type=Path, default=cache / "smollm2", help="default: where get_smollm2.py puts it")
    add("--output", type=Path, help="kept, and gone on from; default: a temporary folder")
    add("--tasks", nargs="+", choices=list(PROMPTS), default=["sentiment", "question"])
    add("--targets", nargs="+", default=["q_proj", "v_proj"])
    add("--rank", type=int, default=8)
    add("--steps", type=int, default=25, help="of training each adapter")
    add("--learning-rate", type=float, default=2e-3, help="of training each adapter")
    add("--batch-size", type=int, default=4, help="of training and of nsc")
    add("--nsc-steps", type=int, default=30)
    add("--nsc-learning-rate", type=float, default=5e-3)
    add("--rows", type=int, default=40, help="held-out rows of each task")
    add("--words", nargs=2, type=int, default=[4, 12], help="fewest and most of a text")
    options = parser.parse_args()
    if not (options.smollm2 / "config.json").is_file():
        parser.error(f"{options.smollm2} holds no config.json; run benchmarks/get_smollm2.py first")
    if len(options.tasks) < 2 or len(set(options.tasks)) < len(options.tasks):
        parser.error(f"--tasks {' '.join(options.tasks)}: two or more different ones")
    return options


def prepare(options: argparse.Namespace, folder: Path) -> float:
    """Data and adapters; returns the CPU seconds of training, of this run or of the one that trained."""
    settings = Training(
        base=str(options.smollm2.absolute()),
        targets=tuple(options.targets),
        rank=options.rank,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
    )
    seconds = 0.0
    for task in options.tasks:
        rows = {"train": TRAIN_ROWS, "test": options.rows}
        write_data(options.suite, folder, task, rows, tuple(options.words))
        seconds += train(settings, folder / f"{task}-train.jsonl", folder / "adapters" / task)
        say(f"{task}: {(folder / 'adapters' / task / 'training.json').read_text().strip()}")
    return seconds


def recipe_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All merges, without eval."""
    nsc = {
        "layers": "last_quarter",
        "steps": options.nsc_steps,
        "learning_rate": options.nsc_learning_rate,
        "batch_size": options.batch_size,
    }
    return {
        "base_model": str(options.smollm2.absolute()),
        "output": str(folder / "merged"),
        "store": str(folder / "store"),
        "calibration": {"max_length": MAX_LENGTH, "batch_size": options.batch_size},
        "stages": 1,
        "adapters": {
            task: {
                "path": str(folder / "adapters" / task),
                "task": "generation",
                "data": str(folder / f"{task}-train.jsonl"),
            }
            for task in options.tasks
        },
        "merges": [
            {"name": name, "merge_method": method, "parameters": dict(given)}
            for name, (method, given) in [*METHODS.items(), ("nsc", ("nsc", nsc))]
        ],
    }


def merge(recipe: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Run each merge by itself; returns its CPU seconds, from the run that made it."""
    notes = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(notes.read_text()) if notes.is_file() else {}
    for one in recipe["merges"]:
        name, began = one["name"], time.process_time()
        done = ray_merge.run(dict(recipe), only=[name], engine="local", workers=1, cache_dir=folder / "cache")
        if done.units_run or name not in seconds:
            seconds[name] = time.process_time() - began
            notes.write_text(json.dumps(seconds) + "\n")
        say(f"merged {name}: {seconds[name]:.0f} s")
    return seconds


def score(recipe: Mapping[str, Any], folder: Path, metric: str) -> Mapping[str, Any]:
    """Every model of the recipe by one metric."""
    tail = "test-whole" if metric == "perplexity" else "test"
    adapters = {
        task: {**source, "eval": {"path": str(folder / f"{task}-{tail}.jsonl"), "metric": metric}}
        for task, source in recipe["adapters"].items()
    }
    given = {**recipe, "adapters": adapters}
    return ray_merge.evaluate(given, engine="local", workers=1, cache_dir=folder / "cache").document


def report(options: argparse.Namespace, scores: Scores, seconds: Mapping[str, float]) -> list[str]:
    """One table."""
    tasks = list(options.tasks)
    lines = [
        f"\nSmolLM2-135M-Instruct (4-bit weights, de-quantised), {len(tasks)} LoRA adapters (r={options.rank}, "
        f"{'+'.join(options.targets)}, {options.steps} steps of {options.batch_size} rows), {options.rows} held-out "
        "rows a task; CPU seconds, one thread\n"
    ]
    head = [*(f"{task} match %" for task in tasks), "mean", *(f"{task} perplexity" for task in tasks), "s"]
    lines += [row("model", head), row("---", ["---"] * len(head))]
    lines.append(row("base", [*cells(scores, ["base"] * len(tasks), tasks), ""]))
    singles = cells(scores, [f"single/{task}" for task in tasks], tasks)
    lines.append(row("single adapters", [*singles, f"{seconds['training']:.0f} (training)"]))
    for name in [*METHODS, "nsc"]:
        lines.append(row(name, [*cells(scores, [name] * len(tasks), tasks), f"{seconds[name]:.0f}"]))
    spent = ", ".join(f"{metric} {seconds[metric]:.0f} s" for metric in METRICS)
    lines.append(
        f"\nScoring all models: {spent}. A match of {options.rows} rows has a standard error of up to "
        f"{error(options):.0f} points."
    )
    return lines


def error(options: argparse.Namespace) -> float:
    """Standard error of a share of one half, in points."""
    return 50 / math.sqrt(options.rows)


def cells(scores: Scores, models: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Exact matches in percent, their mean, and perplexities, of one model for each task."""
    pairs = list(zip(models, tasks, strict=True))
    matches = [100 * scores["exact_match"][model][task]["value"] for model, task in pairs]
    said = [scores["perplexity"][model][task]["value"] for model, task in pairs]
    numbers = [f"{one:.1f}" for one in [*matches, sum(matches) / len(matches)]]
    return [*numbers, *("inf" if one is None else f"{one:.2f}" for one in said)]


def row(name: str, values: Sequence[str]) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join([name, *values]) + " |"


def say(text: str) -> None:
    """Progress."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
