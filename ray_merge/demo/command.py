"""`ray-merge demo`: prepare adapters, run a recipe through Ray, verify it, score everything, print one table.

The recipe is written to the cache as a file, and everything after it is what a user would do with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from ray_merge import api, logs
from ray_merge.demo.score import load_backbone, normalised_mean, score
from ray_merge.demo.suite import DemoSuite, prepare
from ray_merge.drive.events import Event
from ray_merge.engines import Engine
from ray_merge.storage.cache import cache_folder
from ray_merge.verify import verify

LAMBDAS = (0.2, 0.3, 0.4, 0.6, 1.0)

Scores = dict[str, dict[str, float]]
"""Row name -> task -> test score."""


def demo_recipe(suite: DemoSuite, output: Path) -> dict[str, Any]:
    """The recipe of the demo: a sweep, two kinds of TIES, and a merge that is exported as an adapter too."""
    return {
        "base_model": str(suite.base),
        "base_model_names": [suite.base_name],
        "output": str(output),
        "adapters": {
            material.task.name: {
                "path": str(material.adapter),
                **({"task": "regression"} if material.task.is_regression else {}),
            }
            for material in suite.tasks
        },
        "merges": [
            {
                "name": "task_arithmetic",
                "merge_method": "task_arithmetic",
                "sweep": {"lambda": list(LAMBDAS)},
            },
            {"name": "ties", "merge_method": "ties", "parameters": {"scope": "tensor", "lambda": 1.0}},
            {
                "name": "knots_ties",
                "merge_method": "knots_ties",
                "parameters": {"scope": "tensor", "lambda": 1.0},
                "export": "both",
            },
        ],
    }


def run_demo(*, output: Path | None, cache_dir: Path | None, engine: Engine) -> None:
    """Everything that `ray-merge demo` does.

    Args:
        output: folder for the results; by default inside the cache.
        cache_dir: where tasks and adapters are kept from one run to the next.
        engine: "ray" for an embedded Ray, "local" for this process.
    """
    started = time.monotonic()
    cache = cache_folder(cache_dir)
    suite = prepare(cache / "demo", _say)
    # The folder of results is named after the adapters: other adapters may not land on an older demo's merges.
    results = (output or suite.folder / "results").expanduser().absolute()
    recipe = suite.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(demo_recipe(suite, results), sort_keys=False))
    _say(f"recipe {recipe}")
    run = api.run(recipe, engine=engine, cache_dir=cache, progress=_progress)
    checked = verify(str(results), cache_dir=cache)
    _say(
        f"verified {sum(c.files for c in checked)} files of {len(checked)} merges by sha256, and (W + dW) x at "
        f"{sum(c.probed for c in checked)} sites"
    )
    scores = {"base": _scores(suite, suite.base), "single adapter": suite.single_scores()}
    scores |= {merge.name: _scores(suite, Path(merge.url)) for merge in run.merges}
    print_table(suite, scores)
    best = max((merge.name for merge in run.merges), key=lambda name: _mean(suite, scores[name]))
    Console(highlight=False, soft_wrap=True, markup=False).print(
        f"best merge: {best}; results in {results}; {time.monotonic() - started:.0f} s in all"
    )


def _scores(suite: DemoSuite, folder: Path) -> dict[str, float]:
    backbone = load_backbone(folder)
    result = {}
    for material in suite.tasks:
        head = folder / "heads" / f"{material.task.name}.safetensors"
        # The base has no heads of its own: it is scored with each adapter's, as every merge is.
        result[material.task.name] = score(
            backbone, head if head.is_file() else material.head, material.task, material.test
        )
    return result


def _mean(suite: DemoSuite, row: Mapping[str, float]) -> float:
    return normalised_mean(row, suite.single_scores())


def print_table(suite: DemoSuite, scores: Scores) -> None:
    """One row per model: its score on each task's test rows, and the mean in percent of the single adapters."""
    table = Table(title="test scores (accuracy; Pearson's r for a regression)", box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for material in suite.tasks:
        table.add_column(f"{material.task.name}\n({material.task.metric})", justify="right")
    table.add_column("normalised\nmean %", justify="right")
    for name, row in scores.items():
        cells = [f"{row[material.task.name]:.3f}" for material in suite.tasks]
        table.add_row(name, *cells, f"{_mean(suite, row):.1f}")
    width = None if sys.stdout.isatty() else 120  # a log has no width of its own; 80 would cut the names
    Console(highlight=False, width=width).print(table)


def _say(line: str) -> None:
    logs.say(line)


def _progress(event: Event) -> None:
    if event.kind not in ("unit", "select"):
        _say(("published " if event.kind == "merge" else "starting ") + event.text)
