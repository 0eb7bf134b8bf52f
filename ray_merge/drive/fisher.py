"""Fisher diagonals: what their ids cover, forward and backward steps through the stages, and norms over a task.

The loop, the store and what is reused are those of moments (drive/moments.py). A backward step of a stage needs the
hidden states that the stage before handed on and the gradients that the stage behind handed on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ray_merge.calibration import data_identity
from ray_merge.drive.cover import Key
from ray_merge.drive.moments import (
    Kind,
    MomentsResult,
    Work,
    check_units,
    ensure_moments,
    forward_chain,
    task_inputs,
    wanted_objects,
)
from ray_merge.errors import CheckpointError, RecipeError, RunFailed
from ray_merge.plan.fisher import FisherPlan, Likelihood
from ray_merge.plan.moments import MomentsPlan, TaskData
from ray_merge.pool_steps import Step
from ray_merge.recipe import DataSource
from ray_merge.spec import Adapter
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.headers import read_header
from ray_merge.storage.ordered import in_order
from ray_merge.storage.store import Stores
from ray_merge.work.job import MomentsIndex
from ray_merge.work.stage_job import METADATA_KEY, BackwardUnit, Wanted


def ensure_fisher(plans: Sequence[FisherPlan], work: Work) -> MomentsResult:
    """Compute the Fisher diagonals that the store lacks.

    Args:
        plans: one for each model class; each runs in a pool of its own.
        work: where and how; its adapters are active, each while its own task's inputs run.

    Raises:
        Refusal: found before anything was written: data or labels that cannot be used.
        RunFailed: found later; running again computes what is left.
    """
    kinds = [fisher_kind(plan.likelihoods) for plan in plans]
    checks = work.checks
    if checks is None and len(plans) > 1:  # the data of all classes, before any of them writes
        pairs = zip(plans, kinds, strict=True)
        checks = [unit for plan, kind in pairs for unit in check_units(plan.stages, kind)]
    results = []
    for plan, kind in zip(plans, kinds, strict=True):
        results.append(ensure_moments(plan.stages, replace(work, checks=checks), kind))
        if checks is not None and results[-1].units_run:
            checks = []  # they were looked at in that pool
    found = _joined(results)
    return replace(found, index=replace(found.index, norms=norms(found.index, work.adapters, Stores())))


def fisher_kind(likelihoods: Mapping[str, Likelihood]) -> Kind:
    """Fisher diagonals, as what is computed of every task's inputs."""
    return Kind(
        what="Fisher information",
        inputs=partial(_inputs, likelihoods),
        steps=fisher_steps,
        likelihoods=likelihoods,
    )


def _inputs(
    likelihoods: Mapping[str, Likelihood],
    plan: MomentsPlan,
    task: TaskData,
    digests: DigestCache,
    stores: Stores,
) -> dict[str, Any]:
    one = likelihoods[task.name]
    inputs = task_inputs(plan, task, digests, stores, fisher=True)
    found = {**inputs, "kind": "fisher", "labels": one.labels, "head": one.head, "outputs": one.n_outputs}
    if one.evaluation is not None:
        given = DataSource(path=one.evaluation.path)
        rows = data_identity(given, stores, digests, where=f"adapters.{task.name}.eval")
        if rows["files"] != inputs["data"]["files"]:
            raise RecipeError(
                f"adapters.{task.name}: labels: empirical takes the labels of the very rows that go through the model, "
                f"but data is {task.data.path} and eval is {one.evaluation.path}; give both the same path, or write "
                "labels: sampled"
            )
        found["eval"] = {"files": rows["files"], "label": one.evaluation.label}
    return found


def fisher_steps(plan: MomentsPlan, missing: Mapping[Key, Wanted]) -> list[Step]:
    """The steps that make what is missing: each task through all stages, and back to the first that lacks something."""
    steps: list[Step] = []
    last = len(plan.stages) - 1
    for task in plan.tasks:
        wanted = wanted_objects(plan, task.name, missing)
        first = next((stage for stage, some in enumerate(wanted) if some), None)
        if first is None:
            continue
        forward = forward_chain(task.name, [()] * last, hand_on_last=True)
        steps += forward
        behind = ""
        for stage in range(last, first - 1, -1):
            unit = BackwardUnit(task.name, stage, wanted[stage], hand_on=stage > first)
            before = (forward[stage - 1].id,) if stage else ()
            steps.append(Step(unit.id, unit, stage, (*before, *((behind,) if behind else ())), task.name))
            behind = unit.id
    return steps


def norms(index: MomentsIndex, adapters: Mapping[str, Adapter], stores: Stores) -> dict[str, float]:
    """Task -> Frobenius norm over the sites that its own adapter touches, from the objects' headers.

    Of its own sites alone: a norm over those of all adapters of the recipe would change with adapters that a merge
    does not use.
    """
    store = stores.open(index.store)
    paths = list(dict.fromkeys(info.path for some in index.objects.values() for info in some.values()))
    by_path = dict(zip(paths, in_order(lambda path: _site_norms(store, path), paths), strict=True))
    found = {}
    for task, objects in index.objects.items():
        own = [by_path[info.path][site] for site, info in objects.items() if site in adapters[task].factors]
        found[task] = math.sqrt(math.fsum(one * one for one in own))
        if own and not found[task]:
            raise RunFailed(
                f"the Fisher information of {task} is zero at every site: no gradient of its likelihood reaches the "
                "adapter with this data; give other data, or leave the task out"
            )
    return found


def _site_norms(store: Any, path: str) -> dict[str, float]:
    try:
        about = json.loads(read_header(store, path).metadata[METADATA_KEY])
        return {site: float(norm) for site, norm in about["norm"].items()}
    except (CheckpointError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise RunFailed(
            f"{store.url}/{path} is damaged or holds no Fisher information; remove it and run again"
        ) from error


def _joined(results: Sequence[MomentsResult]) -> MomentsResult:
    """What several pools did, as one."""
    if len(results) == 1:
        return results[0]
    indices = [one.index for one in results]
    return MomentsResult(
        index=MomentsIndex(
            store=indices[0].store,
            objects={task: sites for index in indices for task, sites in index.objects.items()},
            conv1d=frozenset().union(*(index.conv1d for index in indices)),
            unwatched={site: why for index in indices for site, why in index.unwatched.items()},
        ),
        ids={key: one for result in results for key, one in result.ids.items()},
        computed=sum(one.computed for one in results),
        reused=sum(one.reused for one in results),
        units_run=sum(one.units_run for one in results),
        checks=tuple(check for one in results for check in one.checks),
        stages=max(one.stages for one in results),
        seconds=sum(one.seconds for one in results),
        n_bytes=sum(one.n_bytes for one in results),
    )
