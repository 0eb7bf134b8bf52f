"""`ray_merge.evaluate`: every model of a recipe on every task's labelled data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_merge.drive.events import Event
from ray_merge.engines import Engine, counted, evaluate_pools
from ray_merge.errors import RecipeError
from ray_merge.evaluate.command import Called, check_command, run_commands
from ray_merge.evaluate.document import Scored, make_document, shown_models
from ray_merge.evaluate.models import Found, changed_bytes, find_merges, models_of
from ray_merge.evaluate.tasks import check_hits, chosen_tasks, joint_pool, plan_tasks
from ray_merge.plan import Plan, make_plan, read_named
from ray_merge.plan.stages import PASSING_COPIES, STAGE_RUNTIME_BYTES
from ray_merge.pool import Pool, Task
from ray_merge.recipe import Calibration, expand, select
from ray_merge.recipe.arguments import check_count, check_list
from ray_merge.recipe.names import BASE, SINGLE
from ray_merge.recipe.read import read_recipe
from ray_merge.storage.cache import cache_folder
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.commit import EVALUATION, pretty_json
from ray_merge.storage.store import Stores, join
from ray_merge.work.evaluate_job import EvaluateJob, Score, ScoredModel, ScoredTask, ScoreUnit
from ray_merge.work.pickles import unpickler

LOGITS_BYTES = 3 * 128 * 10**6
"""Of a causal model's logits, as given out and in the work on them (work/evaluate_answers.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Args:
        url: of evaluation.json.
        document: its content.
        missing: merges that are not complete, and were left out.
        failed: merges whose hook command ended with another exit code than 0.
        seconds: wall.
    """

    url: str
    document: Mapping[str, Any]
    missing: tuple[str, ...]
    failed: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be scored."""

    plan: Plan
    found: Found
    tasks: Mapping[str, ScoredTask]
    models: Mapping[str, ScoredModel]
    units: Sequence[ScoreUnit]
    held_out: tuple[str, ...]
    called: Sequence[Called]


def evaluate(
    recipe: str | Path | dict[str, Any],
    *,
    output: str | None = None,
    only: Sequence[str] = (),
    held_out: Sequence[str] = (),
    hits: bool = False,
    limit: int | None = None,
    command: str | None = None,
    engine: Engine = "ray",
    address: str = "local",
    workers: int | None = None,
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    date: str | None = None,
    progress: Callable[[Event], None] = lambda _: None,
) -> Evaluation:
    """Score the base, each single adapter and every complete merge on the tasks that have `eval`.

    Writes `<output>/ray_merge/evaluation.json`, in place of an earlier one.

    Args:
        recipe: path, URL, or the recipe as a mapping.
        output: in place of the recipe's own.
        only: names or globs of merges; all of them when empty.
        held_out: tasks that merges without them are scored on too.
        hits: also the joint Hits@1, 3 and 5 over the labels of all classification tasks together.
        limit: rows of each task, from the first; all by default.
        command: a line of sh for each complete merge, with {path} (its checkpoint's folder) and {name}.
        engine: "ray", or "local" for everything in this process.
        address: "local" embeds a Ray of this machine, "auto" or "HOST:PORT" joins a cluster.
        workers: how many; by default one per CPU.
        device: "cpu", "cuda" or "cuda:N".
        cache_dir: node-local folder for adapters, digests and tokenizers.
        date: UTC day for `{date}` in `output`.
        progress: called with every event.

    Raises:
        Refusal: nothing was scored.
        RunFailed: a model has no score, or a worker failed.
    """
    started = time.monotonic()
    check_count("workers", workers)
    check_count("limit", limit)
    check_list("held_out", held_out)
    progress = counted(engine, progress)
    stores, cache = Stores(), cache_folder(cache_dir)
    plan, base, asked_for = _plan(recipe, output, only, held_out, cache, with_command=command is not None)
    tasks = plan_tasks(plan, asked_for, limit)
    if hits:
        check_hits(tasks)
    found = find_merges(plan, cache, date, stores)
    called = [] if command is None else check_command(command, found.complete, stores)
    models = models_of(plan, base, asked_for, found, stores)
    units = _units(models, tasks, found, held_out, hits=hits)
    asked = _Asked(plan, found, tasks, models, units, tuple(held_out), called)
    job = _job(asked, cache, device)
    looked = _look(job, stores)
    if warning := _cut_warning(looked, job.calibration):
        progress(Event(kind="warning", text=warning))
    job = replace(job, versions={name: one.sha256 for name, one in looked.items()})
    scores = _score(job, units, evaluate_pools(engine, address, workers), progress)
    commands = {} if command is None else run_commands(command, called, progress)
    document = make_document(_scored(asked, scores, looked), commands)
    root = stores.open(found.root)
    root.replace(EVALUATION, pretty_json(document))
    return Evaluation(
        url=join(root.url, EVALUATION),
        document=document,
        missing=found.missing,
        failed=tuple(name for name, one in commands.items() if one["exit_code"] != 0),
        seconds=time.monotonic() - started,
    )


def _plan(
    recipe: str | Path | dict[str, Any],
    output: str | None,
    only: Sequence[str],
    held_out: Sequence[str],
    cache: Path,
    *,
    with_command: bool,
) -> tuple[Plan, Checkpoint, list[str]]:
    """The plan with the adapters of all tasks, the base as it lies there, and the tasks."""
    parsed, source = read_recipe(recipe, output)
    merges = select(expand(parsed, source), only)
    tasks = chosen_tasks(parsed, merges, held_out)
    if not tasks and not with_command:
        raise RecipeError(
            f"{source.name}: no adapter of the selected merges has eval, so there is nothing to score; add eval: "
            "{path: URL, label: label, metric: accuracy} to the tasks that have labelled data"
        )
    base, stored = read_named(
        parsed,
        {*tasks, *(name for merge in merges for name in merge.adapters)},
        unpickler(cache / "adapters"),
    )
    return make_plan(parsed, merges, base, stored), base, tasks


def _units(
    models: Mapping[str, ScoredModel],
    tasks: Mapping[str, ScoredTask],
    found: Found,
    held_out: Sequence[str],
    *,
    hits: bool,
) -> list[ScoreUnit]:
    """What is to be done, model by model: a worker keeps the one that it used last."""
    merges = {merge.name: merge for merge, _ in found.complete}
    units = []
    for name in models:
        kind, _, single = name.partition("/")
        if name in merges:
            own: Sequence[str] = merges[name].adapters
        else:
            own = list(tasks) if kind == BASE else [single]
        pool = joint_pool(tasks, own) if hits and kind != SINGLE else ()
        for task in tasks:
            if task in own:
                units.append(ScoreUnit(name, task, pool if task in pool else ()))
            elif name in merges and task in held_out:
                units.append(ScoreUnit(name, task))
    return units


def _job(asked: _Asked, cache: Path, device: str) -> EvaluateJob:
    plan = asked.plan
    calibration = plan.recipe.calibration or Calibration()
    weights = max(model.checkpoint.n_bytes + changed_bytes(model) for model in asked.models.values())
    causal = any(task.answer == "causal" for task in asked.tasks.values())
    tokens = calibration.batch_size * calibration.max_length
    passing = 4 * PASSING_COPIES * tokens * _width(plan.base)
    return EvaluateJob(
        models=asked.models,
        tasks=asked.tasks,
        base=plan.base,
        calibration=calibration,
        versions={},
        cache=str(cache),
        device=device,
        placement=plan.recipe.placement,
        peak_bytes=STAGE_RUNTIME_BYTES + weights + passing + (LOGITS_BYTES if causal else 0),
    )


def _width(base: Checkpoint) -> int:
    """The longest side of any weight but those over the vocabulary."""
    text = base.config.get("text_config") or base.config
    shapes = [entry.shape for entry in base.tensors.values() if len(entry.shape) > 1]
    return max((max(shape) for shape in shapes if text.get("vocab_size") not in shape), default=0)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A task's rows as the base's tokenizer makes them: a digest, how many, and how many were cut."""

    sha256: str
    n_rows: int
    cut: int


def _look(job: EvaluateJob, stores: Stores) -> dict[str, _Rows]:
    """Look at every row of every task, so that a wrong one is refused before a model is loaded."""
    from ray_merge.work.evaluate_rows import read_rows

    found = {}
    for name, task in job.tasks.items():
        rows = read_rows(task, job.base, job.calibration, Path(job.cache), stores)
        found[name] = _Rows(rows.sha256, rows.n_rows, rows.cut)
    return found


def _cut_warning(looked: Mapping[str, _Rows], calibration: Calibration) -> str:
    cut = [f"{one.cut} of {one.n_rows} rows of {name}" for name, one in looked.items() if one.cut]
    if not cut:
        return ""
    return (
        f"{', '.join(cut)} have more than {calibration.max_length} tokens and are cut there; raise "
        "calibration.max_length to score them whole"
    )


def _score(
    job: EvaluateJob,
    units: Sequence[ScoreUnit],
    make_pool: Callable[[EvaluateJob, int], Pool],
    progress: Callable[[Event], None],
) -> dict[tuple[str, str], Score]:
    by_id = {unit.id: unit for unit in units}
    scores: dict[tuple[str, str], Score] = {}
    if not units:
        return scores
    progress(Event(kind="start", text=f"{len(job.models)} model(s)", units=(0, len(units))))
    with make_pool(job, len(units)) as pool:
        for count, done in enumerate(pool.run([_task(job, unit) for unit in by_id.values()]), start=1):
            unit = by_id[done.id]
            scores[unit.model, unit.task] = done.value
            progress(Event(kind="unit", text=done.id, units=(count, len(units))))
    return scores


def _task(job: EvaluateJob, unit: ScoreUnit) -> Task:
    """What stays is the model, see `work.evaluate_unit.Shelf`."""
    model = f"{job.models[unit.model].checkpoint.url} {job.tasks[unit.task].class_name}"
    return Task(unit.id, unit, frozenset({model}))


def _scored(asked: _Asked, scores: Mapping[tuple[str, str], Score], looked: Mapping[str, _Rows]) -> Scored:
    complete = {merge.name: merge for merge, _ in asked.found.complete}
    return Scored(
        models=shown_models(list(asked.tasks), list(complete)),
        merges=complete,
        tasks=asked.tasks,
        scores=scores,
        units={(unit.model, unit.task): unit for unit in asked.units},
        held_out=asked.held_out,
        missing=asked.found.missing,
        cut={name: one.cut for name, one in looked.items() if one.cut},
    )


def unsuccessful(result: Evaluation) -> str:
    """Why an evaluation that ran is no success, in a sentence; empty where it is one."""
    parts = []
    if result.missing:
        names = ", ".join(result.missing[:3]) + (", ..." if len(result.missing) > 3 else "")
        parts.append(
            f"{len(result.missing)} merge(s) are not complete and were left out ({names}): run the recipe to "
            "finish them"
        )
    if result.failed:
        codes = [f"{name} {result.document['command'][name]['exit_code']}" for name in result.failed[:3]]
        parts.append(
            f"the command failed for {len(result.failed)} merge(s) (exit code of {', '.join(codes)}): see {result.url}"
        )
    return "; ".join(parts)
