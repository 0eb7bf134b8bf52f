"""Merges a set of adapters of osrm_suite.py in memory and scores each task with its own head.

Owns: the methods, their grids of lambda, and the rows of a merge. A merge is made once, site by site with
`merge_factors` at lambda 1, and multiplied: these methods are linear in lambda. No checkpoint is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from osrm_moments import eager, factors_of, fisher_of, moments_of, sites_of
from osrm_tasks import Home, Merging, Training
from torch import Tensor

from ray_merge.demo import models
from ray_merge.demo.score import Backbone, load_backbone, normalised_mean, score
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

GRIDS: Mapping[str, tuple[float, ...]] = {
    "base": (0.0,),
    "task_arithmetic": (0.2, 0.3, 0.4, 0.6, 1.0),
    "ties": (0.25, 0.5, 0.75, 1.0, 1.5),
    "regmean": (1.0,),
    "fisher": (1.0,),
    "emr": (1.0,),
}
"""Method -> lambdas. `base` is the base model with each task's head; emr gives each task back by its mask."""

ALWAYS, EXTRAS = ("base", "task_arithmetic", "ties"), ("regmean", "fisher", "emr")

STATISTIC_ROWS = 256
"""Train rows of each task for RegMean's Grams and Fisher's diagonals, as in fusion_bench."""

Deltas = dict[str, Tensor]
"""Site -> (O, I) float32."""


def merge(home: Home, merging: Merging) -> list[dict[str, Any]]:
    """One row for each lambda: scores by task, and their mean in percent of the single adapters."""
    start, names = merging.start, home.settings.tasks[: merging.start.n_tasks]
    trainings = [Training(start, name) for name in names]
    single = {name: float(str(home.note(one)["score"])) for name, one in zip(names, trainings, strict=True)}
    began = time.process_time()
    with models.one_thread():
        made = _merged(home, merging, trainings)
    merged_seconds = time.process_time() - began
    backbone = load_backbone(home.base)
    eager(backbone.model)
    sites = sites_of(backbone.model, home.settings.targets)
    first = {name: site.weight.detach().clone() for name, site in sites.items()}
    rows = []
    for lambda_ in GRIDS[merging.method]:
        scores = {}
        for training, deltas in zip(trainings, made, strict=True):
            for name, site in sites.items():
                site.weight.data = first[name] + lambda_ * deltas[name] if deltas else first[name]
            scores[training.task] = _score(home, training, backbone)
        rows.append(
            {
                "init": start.init,
                "seed": start.seed,
                "tasks": start.n_tasks,
                "samples": start.samples,
                "method": merging.method,
                "lambda": lambda_,
                "scores": scores,
                "mean": math.fsum(scores.values()) / len(scores),
                "normalised": normalised_mean(scores, single),
                "merge_cpu_seconds": round(merged_seconds, 2),
            }
        )
    return rows


def _score(home: Home, training: Training, backbone: Backbone) -> float:
    task = home.settings.task(training.task)
    return score(backbone, home.adapter(training) / "head.safetensors", task, home.file(task.name, "test"))


def _merged(home: Home, merging: Merging, trainings: Sequence[Training]) -> list[Deltas]:
    """The merged update as each task gets it; the same one for all of them but with emr."""
    by_task = [factors_of(home.adapter(training), home.settings) for training in trainings]
    sites = {name: [factors[name] for factors in by_task] for name in by_task[0]}
    return MERGES[merging.method](home, trainings, sites)


Sites = Mapping[str, list[Factor]]
"""Site -> factors in the order of the tasks."""


def _base(home: Home, trainings: Sequence[Training], sites: Sites) -> list[Deltas]:
    return [{} for _ in trainings]


def _plain(method: str, **parameters: Any) -> Callable[[Home, Sequence[Training], Sites], list[Deltas]]:
    def merged(home: Home, trainings: Sequence[Training], sites: Sites) -> list[Deltas]:
        one = {name: merge_factors(method, factors, **parameters).dense() for name, factors in sites.items()}
        return [one for _ in trainings]

    return merged


def _emr(home: Home, trainings: Sequence[Training], sites: Sites) -> list[Deltas]:
    """Each task's own part; one rescaler for each weight, because every weight is merged by itself here."""
    found: list[Deltas] = [{} for _ in trainings]
    for name, factors in sites.items():
        for deltas, part in zip(found, merge_factors("emr", factors).per_adapter, strict=True):  # type: ignore[attr-defined]
            deltas[name] = part.dense()
    return found


def _regmean(home: Home, trainings: Sequence[Training], sites: Sites) -> list[Deltas]:
    """Grams of each adapter's own inputs, its update active, as RegMean takes them."""
    statistics = [
        moments_of(home, one.task, rows=STATISTIC_ROWS, adapter=home.adapter(one)) for one in trainings
    ]
    return _with_statistics("regmean", sites, statistics)


def _fisher(home: Home, trainings: Sequence[Training], sites: Sites) -> list[Deltas]:
    statistics = [
        fisher_of(home, one.task, home.adapter(one), rows=STATISTIC_ROWS, seed=one.start.seed)
        for one in trainings
    ]
    return _with_statistics("fisher", sites, statistics)


def _with_statistics(method: str, sites: Sites, statistics: Sequence[Mapping[str, Any]]) -> list[Deltas]:
    one = {
        name: merge_factors(method, factors, moments=[some[name] for some in statistics]).dense()
        for name, factors in sites.items()
    }
    return [one for _ in statistics]


MERGES: Mapping[str, Callable[[Home, Sequence[Training], Sites], list[Deltas]]] = {
    "base": _base,
    "task_arithmetic": _plain("task_arithmetic"),
    "ties": _plain("ties", density=0.2),
    "regmean": _regmean,
    "fisher": _fisher,
    "emr": _emr,
}
