"""The worker of one stage: holds the frozen weights of its blocks, runs one unit per call.

A call is pure: inputs come as arguments, hidden states and gradients go out as values, moments and Fisher diagonals
as committed objects; sums live inside the call. So any call may be repeated, in any process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from ray_merge.calibration import Calibrated
from ray_merge.errors import NotCuttable, RayMergeError, RecipeError
from ray_merge.models.stage_calls import Alter, StageInput
from ray_merge.plan.fisher import Likelihood
from ray_merge.plan.moments import Part, TaskData
from ray_merge.pool import Turn
from ray_merge.storage.store import Stores
from ray_merge.work.altered import altered_by
from ray_merge.work.collect import Collector
from ray_merge.work.device import ONE_THREAD, STAGING, check_device, tune_malloc
from ray_merge.work.fisher_units import ROWS, Descent, drawing, model_inputs, with_rows
from ray_merge.work.hand_on import Handed, handed_on, stage_input
from ray_merge.work.held import Held
from ray_merge.work.moments_file import write_fisher, write_moments
from ray_merge.work.read_task import arrays_of, read_task
from ray_merge.work.squares import Squares
from ray_merge.work.stage_job import (
    BackwardUnit,
    CheckUnit,
    DataCheck,
    ForwardUnit,
    RehearsalUnit,
    StageJob,
    StageUnit,
    Stored,
    moments_path,
)

Write = Callable[[Path, Part, Mapping[str, Any]], tuple[int, str]]
"""Writes what was found for a part to a path, with what a person should know; returns its bytes and sha256."""


class StageWorker:
    """Runs units at one stage.

    Args:
        job: what to do.
        place: which stage.

    Raises:
        Refusal: the device that was asked for is not there, or the model cannot be built.
    """

    def __init__(self, job: StageJob, place: int) -> None:
        tune_malloc(*STAGING)
        check_device(job.device)
        torch.backends.cuda.matmul.allow_tf32 = False
        self._job, self._place = job, place
        self._stores = Stores()
        self._kept: Held | None = None

    def run(self, unit: StageUnit, given: Sequence[Any], turn: Turn) -> tuple[Any, Any]:
        """Do one unit; returns its small result and what it hands on."""
        # Not inference mode: what is loaded there can never be saved for a backward pass.
        with ONE_THREAD, torch.no_grad():
            if isinstance(unit, CheckUnit):
                return self._check(unit), None
            if isinstance(unit, RehearsalUnit):
                return None, self._rehearse(unit, given)
            if isinstance(unit, BackwardUnit):
                return self._backward(unit, given, turn)
            return self._forward(unit, given, turn)

    def _check(self, unit: CheckUnit) -> DataCheck:
        found = self._load(unit.task)
        self._batches(unit.task, found, unit.likelihood)
        if unit.likelihood is not None and unit.likelihood.head == "causal" and found.tokens <= found.rows:
            raise RecipeError(
                f"adapters.{unit.task.name}.data: none of the {found.rows} rows has two tokens, so no token follows "
                "another and there is no likelihood; give longer texts"
            )
        return DataCheck(unit.task.name, found.rows, found.tokens, found.sha256)

    def _load(self, task: TaskData) -> Calibrated:
        plan, versions = self._job.plan, self._job.versions
        version, cache = versions.get(task.name), Path(self._job.cache)
        return read_task(task, plan.calibration, plan.base, version, cache, self._stores)

    def _rehearse(self, unit: RehearsalUnit, given: Sequence[Any]) -> Handed | None:
        """Through this stage with one input and the base's own weights; a model that cannot be cut is refused here."""
        self._held()
        inputs = given[0] if given else self._first_inputs(self._task(unit.task))
        one = {name: values[:1] for name, values in model_inputs(inputs[0]).items() if name != "pixel_shape"}
        if "pixel_shape" in inputs[0]:
            one["pixel_shape"] = np.array([1, *inputs[0]["pixel_shape"][1:]])
        try:
            hidden = self._held().stage.forward(stage_input(one, self._job.device)).hidden
        except RayMergeError:
            raise
        except Exception as error:
            if not self._place:
                raise
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise NotCuttable(
                f"{self._job.plan.class_name} cannot be cut into stages: stage {self._place} failed with what stage "
                f"{self._place - 1} handed on ({why}); write `stages: 1` in the recipe"
            ) from error
        return [handed_on(one, hidden)] if unit.hand_on else None

    def _first_inputs(self, task: TaskData) -> list[Mapping[str, Any]]:
        """What the first stage gets of a task."""
        inputs = self._batches(task, self._load(task), self._job.likelihoods.get(task.name))
        return [self._held().decoding(one) for one in inputs]

    def _batches(
        self, task: TaskData, found: Calibrated, likelihood: Likelihood | None
    ) -> list[Mapping[str, Any]]:
        """The batches as arrays; with rows and labels where likelihoods are differentiated."""
        batches = [arrays_of(batch) for batch in found.batches]
        if likelihood is None:
            return batches
        names = self._job.plan.base.config.get("label2id") or {}
        return with_rows(batches, found.row_numbers, likelihood, task.name, names, self._stores)

    def _task(self, name: str) -> TaskData:
        return next(task for task in self._job.plan.tasks if task.name == name)

    def _forward(self, unit: ForwardUnit, given: Sequence[Any], turn: Turn) -> tuple[list[Stored], Handed]:
        started = time.perf_counter()
        plan, task = self._job.plan, self._task(unit.task)
        parts = self._wanted_parts(unit)
        inputs = given[0] if given else self._first_inputs(task)
        collect = Collector(
            {module: site for part in parts for site, module in part.modules.items()},
            plan.calibration,
            plan.unmasked,
        )
        to_end = self._place == len(plan.stages) - 1 and any(part.block is None for part in parts)
        handed: list[Mapping[str, Any]] = []
        with altered_by(self._job, task, self._held().slots, self._stores) as altered:
            for one in inputs:
                turn.check()
                through = stage_input(model_inputs(one), self._job.device)
                hidden = self._through(through, altered, collect, to_end=to_end)
                if unit.hand_on:
                    handed.append(handed_on(one, hidden))
        made = [part for part in parts if part.block is not None or collect.called(part.modules)]

        def write(path: Path, part: Part, about: Mapping[str, Any]) -> tuple[int, str]:
            return write_moments(path, collect.collected(part.modules), {**about, "kind": "moments"})

        return self._commit_all(unit, made, write, started), handed

    def _backward(
        self, unit: BackwardUnit, given: Sequence[Any], turn: Turn
    ) -> tuple[list[Stored], list[Any]]:
        started = time.perf_counter()
        plan, task = self._job.plan, self._task(unit.task)
        parts = self._wanted_parts(unit)
        inputs = given[0] if self._place else self._first_inputs(task)
        above = given[-1] if self._place < len(plan.stages) - 1 else None
        with altered_by(self._job, task, self._held().slots, self._stores) as altered:
            descent = Descent(
                held=self._held(),
                altered=altered,
                likelihood=self._job.likelihoods[task.name],
                device=self._job.device,
                draw=drawing(plan.calibration.seed, task.name),
            )
            squares = Squares(
                {module: site for part in parts for site, module in part.modules.items()},
                frozenset(site for part in parts if part.block is None for site in part.modules),
                plan.conv1d,
                descent.calls(inputs[0]),
            )
            handed = descent.run(inputs, above, squares, turn, hand_on=unit.hand_on)
        n_examples = sum(len(one[ROWS]) for one in inputs)
        made = [part for part in parts if part.block is not None or squares.called(part.modules)]

        def write(path: Path, part: Part, about: Mapping[str, Any]) -> tuple[int, str]:
            means = squares.means(part.modules, n_examples)
            return write_fisher(path, means, {**about, "kind": "fisher", "count": n_examples})

        return self._commit_all(unit, made, write, started), handed

    def _wanted_parts(self, unit: ForwardUnit | BackwardUnit) -> list[Part]:
        """The parts that this stage makes of a task, with the sites that are wanted."""
        wanted = {one.part: set(one.sites) for one in unit.wanted}
        return [
            replace(
                part, modules={site: path for site, path in part.modules.items() if site in wanted[part.name]}
            )
            for part in self._job.plan.parts_of(self._place)
            if part.name in wanted
        ]

    def _through(
        self, given: StageInput, altered: Alter | None, collect: Collector, *, to_end: bool
    ) -> Tensor | None:
        collect.begin(given.attention_mask)
        out = self._held().stage.forward(given, altered=altered, watch=collect, to_end=to_end)
        collect.end()
        return out.hidden

    def _held(self) -> Held:
        """The frozen weights, read on first use."""
        if self._kept is None:
            self._kept = Held(self._job.plan, self._place, self._stores, self._job.device)
        return self._kept

    def _commit_all(
        self, unit: ForwardUnit | BackwardUnit, parts: Sequence[Part], write: Write, started: float
    ) -> list[Stored]:
        """Commit what was found for some parts; sites outside of the blocks run in the first stage or in the last."""
        ids = {one.part: one.id for one in unit.wanted}
        return [self._commit(unit.task, part, ids[part.name], write, started) for part in parts]

    def _commit(self, task: str, part: Part, moments_id: str, write: Write, started: float) -> Stored:
        store = self._stores.open(self._job.store)
        scratch = self._scratch(store.local_root) / f"{moments_id[:12]}-{uuid4().hex[:8]}"
        try:
            n_bytes, sha256 = write(scratch, part, {"id": moments_id, "task": task, "part": part.name})
            # Another driver may have been first: the id says that its moments are the same.
            put = store.put_if_absent(moments_path(moments_id), scratch, {"sha256": sha256})
        finally:
            scratch.unlink(missing_ok=True)
        seconds = round(time.perf_counter() - started, 3)
        return Stored(moments_id, part.name, moments_path(moments_id), n_bytes, sha256, seconds, not put)

    def _scratch(self, root: Path | None) -> Path:
        folder = Path(self._job.scratch) if root is None else root
        folder = folder / "attempts" / self._job.attempt
        folder.mkdir(parents=True, exist_ok=True)
        return folder
