"""evaluation.json: scores of every model on every task, normalised by the single adapters, and what follows of them.

    {<model>: {<task>: {metric, value, n, normalised}},                 base, single/<task>, <merge>
     "means": {<model>: mean of normalised over its own tasks},
     "held_out": [<task>], "hits": {...}, "pareto": {...}, "command": {...}, "missing": [<merge>],
     "cut_rows": {<task>: rows}, "notes": [...]}

Pure: numbers in, plain data out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_merge.recipe.names import BASE, LOWER_IS_BETTER, SINGLE
from ray_merge.spec import Merge
from ray_merge.work.evaluate_job import HITS_AT, Score, ScoredTask, ScoreUnit

NORMALISED = (
    "normalised = 100 * value / the single adapter's value, of perplexity 100 * the single adapter's / value; null "
    "where the single adapter's value is not above 0"
)
F1 = "f1 is the mean of F1 over classes (macro)"
HITS = (
    "hits@k: share of rows whose label is among the first k of the labels of all classification tasks of the model "
    "together, by the softmax of each task's own head (of text heads by their cosines); mean over tasks"
)
PERPLEXITY = "perplexity is of all tokens of a row but its first, over all rows together"
EXACT_MATCH = (
    "exact_match is the share of rows whose answer begins with the label, blanks at the ends aside, where no letter or "
    "digit follows a last letter or digit of it: '12' is right in '12.', wrong in '123'"
)
CUT = "cut_rows: rows that have more than calibration.max_length tokens (by the base's tokenizer) and were cut there"
ARITHMETIC = "scores are computed in float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """All that a document is made of.

    Args:
        models: names of models, in the order in which they are shown.
        merges: those of them that are merges, by name.
        tasks: by name.
        scores: by model and task.
        units: what was asked, by model and task.
        held_out: tasks that merges were scored on without holding them.
        missing: merges that are not complete.
        cut: how many rows of a task were cut, for those that have any.
    """

    models: Sequence[str]
    merges: Mapping[str, Merge]
    tasks: Mapping[str, ScoredTask]
    scores: Mapping[tuple[str, str], Score]
    units: Mapping[tuple[str, str], ScoreUnit]
    held_out: Sequence[str]
    missing: Sequence[str]
    cut: Mapping[str, int]


def make_document(scored: Scored, commands: Mapping[str, Any]) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        scored: what was found.
        commands: merge -> what the hook command did; empty without one.
    """
    rows = {model: _rows(scored, model) for model in scored.models}
    document: dict[str, Any] = dict(rows)
    document["means"] = {model: _mean(scored, model, rows[model]) for model in scored.models}
    if scored.held_out:
        document["held_out"] = list(scored.held_out)
    hits = {model: found for model in scored.models if (found := _hits(scored, model))}
    if hits:
        document["hits"] = hits
    pareto = pareto_tables(list(scored.merges.values()), rows)
    if pareto:
        document["pareto"] = pareto
    if commands:
        document["command"] = dict(commands)
    if scored.missing:
        document["missing"] = list(scored.missing)
    if scored.cut:
        document["cut_rows"] = dict(scored.cut)
    return {**document, "notes": _notes(scored, with_hits=bool(hits))}


def _rows(scored: Scored, model: str) -> dict[str, dict[str, Any]]:
    found = {}
    for task, one in scored.tasks.items():
        score = scored.scores.get((model, task))
        if score is None:
            continue
        metric, single = one.evaluation.metric, scored.scores[f"{SINGLE}/{task}", task].value
        found[task] = {
            "metric": metric,
            "value": score.value if math.isfinite(score.value) else None,
            "n": score.n,
            "normalised": normalised(metric, score.value, single),
        }
    return found


def normalised(metric: str, value: float, single: float) -> float | None:
    """Percent of the single adapter's score; None where that is not above 0."""
    if not single > 0:
        return None
    if metric not in LOWER_IS_BETTER:
        return 100 * value / single
    return 100 * single / value if math.isfinite(single) else None


def _mean(scored: Scored, model: str, rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Over the tasks that the model holds; those held out are no part of it."""
    merge = scored.merges.get(model)
    values = [
        row["normalised"]
        for task, row in rows.items()
        if row["normalised"] is not None and (merge is None or task in merge.adapters)
    ]
    return math.fsum(values) / len(values) if values else None


def _hits(scored: Scored, model: str) -> dict[str, Any] | None:
    pool = next((unit.pool for (name, _), unit in scored.units.items() if name == model and unit.pool), ())
    if not pool:
        return None
    tasks = {
        task: {f"hits@{k}": share for k, share in zip(HITS_AT, scored.scores[model, task].hits, strict=True)}
        for task in pool
    }
    return {
        "labels": sum(scored.tasks[task].n_outputs for task in pool),
        "tasks": tasks,
        "mean": {
            f"hits@{k}": math.fsum(one[f"hits@{k}"] for one in tasks.values()) / len(tasks) for k in HITS_AT
        },
    }


def pareto_tables(
    merges: Sequence[Merge], rows: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Parent name -> its merges with their preferences and scores, and which are dominated by another one.

    Merges whose parameters hold a `preference`, and that share the name before their last slash, are compared.
    """
    groups: dict[str, list[Merge]] = {}
    for merge in merges:
        if merge.parameters.get("preference") is not None and "/" in merge.name:
            groups.setdefault(merge.name.rpartition("/")[0], []).append(merge)
    tables = {}
    for parent, some in groups.items():
        tasks = [
            task
            for task in some[0].adapters
            if all(rows[one.name].get(task, {}).get("value") is not None for one in some)
        ]
        different = [
            one for index, one in enumerate(some)
            if all(one.parameters["preference"] != other.parameters["preference"] for other in some[:index])
        ]  # fmt: skip
        if tasks and len(different) > 1:
            tables[parent] = _table(some, tasks, rows)
    return tables


def _table(
    merges: Sequence[Merge], tasks: Sequence[str], rows: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    scores = {one.name: {task: rows[one.name][task]["value"] for task in tasks} for one in merges}
    better = {
        name: [
            -value if rows[name][task]["metric"] in LOWER_IS_BETTER else value for task, value in own.items()
        ]
        for name, own in scores.items()
    }
    return {
        "metrics": {task: rows[merges[0].name][task]["metric"] for task in tasks},
        "points": [
            {
                "merge": one.name,
                "preference": one.parameters["preference"],
                "scores": scores[one.name],
                "dominated": any(_dominates(other, better[one.name]) for other in better.values()),
            }
            for one in merges
        ],
    }


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _notes(scored: Scored, *, with_hits: bool) -> list[str]:
    metrics = {task.evaluation.metric for task in scored.tasks.values()}
    notes = [NORMALISED, ARITHMETIC]
    notes += [F1] if "f1" in metrics else []
    notes += [PERPLEXITY] if "perplexity" in metrics else []
    notes += [EXACT_MATCH] if "exact_match" in metrics else []
    notes += [CUT] if scored.cut else []
    notes += [HITS] if with_hits else []
    emr = [name for name, merge in scored.merges.items() if merge.method == "emr"]
    if emr:
        notes.append(
            f"{', '.join(emr)}: emr keeps a model for each task (ray_merge.load_emr); scored is the unified checkpoint"
        )
    return notes


def shown_models(tasks: Sequence[str], merges: Sequence[str]) -> list[str]:
    """Names of all models in the order in which they are shown."""
    return [BASE, *(f"{SINGLE}/{task}" for task in tasks), *merges]
