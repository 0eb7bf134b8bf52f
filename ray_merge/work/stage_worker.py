"""The worker of one stage: holds the frozen weights of its blocks, runs one unit per call.

A call is pure: inputs come as arguments, hidden states and gradients go out as values, moments and Fisher diagonals
as committed objects; sums live inside the call. So any call may be repeated, in any process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ray_merge.calibration import Batch, Calibrated, load_batches
from ray_merge.models.conversion import Slot
from ray_merge.models.skeleton import build_skeleton
from ray_merge.models.stage import Stage
from ray_merge.models.stage_calls import Alter, StageInput
from ray_merge.models.stored_weights import StoredWeights
from ray_merge.plan.moments import Part, TaskData
from ray_merge.pool import Turn
from ray_merge.storage.store import Stores
from ray_merge.work.altered import altered_by
from ray_merge.work.collect import Collector
from ray_merge.work.device import ONE_THREAD, STAGING, check_device, tune_malloc
from ray_merge.work.fisher_units import ROWS, Descent, drawing, model_inputs, stated_pad, with_rows
from ray_merge.work.hand_on import Handed, handed_on, stage_input
from ray_merge.work.moments_file import write_fisher, write_moments
from ray_merge.work.squares import Squares
from ray_merge.work.stage_job import (
    BackwardUnit,
    CheckUnit,
    DataCheck,
    ForwardUnit,
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
        self._stage: Stage | None = None
        self._slots: Mapping[str, Sequence[Slot]] = {}
        self._text_config: Any = None
        self._pad: int | None = None

    def run(self, unit: StageUnit, given: Sequence[Any], turn: Turn) -> tuple[Any, Any]:
        """Do one unit; returns its small result and what it hands on."""
        # Not inference mode: what is loaded there can never be saved for a backward pass.
        with ONE_THREAD, torch.no_grad():
            if isinstance(unit, CheckUnit):
                return self._check(unit), None
            if isinstance(unit, BackwardUnit):
                return self._backward(unit, given, turn)
            return self._forward(unit, given, turn)

    def _check(self, unit: CheckUnit) -> DataCheck:
        task = self._task(unit.task)
        found = self._load(task)
        self._batches(task, found)
        return DataCheck(unit.task, found.rows, found.tokens, found.sha256)

    def _load(self, task: TaskData) -> Calibrated:
        plan = self._job.plan
        return load_batches(
            task.data, plan.calibration, task.name, plan.base, Path(self._job.cache), self._stores
        )

    def _batches(self, task: TaskData, found: Calibrated) -> list[Mapping[str, Any]]:
        """What the first stage gets, as arrays; with rows and labels where likelihoods are differentiated."""
        batches = [_as_input(batch) for batch in found.batches]
        likelihood = self._job.likelihoods.get(task.name)
        if likelihood is None:
            return batches
        names = self._job.plan.base.config.get("label2id") or {}
        return with_rows(batches, found.row_numbers, likelihood, task.name, names, self._stores)

    def _task(self, name: str) -> TaskData:
        return next(task for task in self._job.plan.tasks if task.name == name)

    def _forward(self, unit: ForwardUnit, given: Sequence[Any], turn: Turn) -> tuple[list[Stored], Handed]:
        started = time.perf_counter()
        plan, task = self._job.plan, self._task(unit.task)
        parts = [part for part in plan.parts_of(self._place) if part.name in dict(unit.wanted)]
        inputs = given[0] if given else self._batches(task, self._load(task))
        collect = Collector(
            {module: site for part in parts for site, module in part.modules.items()}, plan.calibration
        )
        to_end = self._place == len(plan.stages) - 1 and any(part.block is None for part in parts)
        handed: list[Mapping[str, Any]] = []
        self._held()
        with altered_by(self._job, task, self._slots, self._stores) as altered:
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
        wanted = dict(unit.wanted)
        parts = [part for part in plan.parts_of(self._place) if part.name in wanted]
        inputs = given[0] if self._place else self._batches(task, self._load(task))
        above = given[-1] if self._place < len(plan.stages) - 1 else None
        stage = self._held()
        with altered_by(self._job, task, self._slots, self._stores) as altered:
            descent = Descent(
                stage=stage,
                config=self._text_config,
                pad=self._pad,
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

    def _through(
        self, given: StageInput, altered: Alter | None, collect: Collector, *, to_end: bool
    ) -> Tensor | None:
        stage = self._held()
        collect.begin(given.attention_mask)
        out = stage.forward(given, altered=altered, watch=collect, to_end=to_end)
        collect.end()
        return out.hidden

    def _held(self) -> Stage:
        """The frozen weights, read on first use."""
        if self._stage is None:
            plan = self._job.plan
            base = plan.base
            shapes = {name: entry.shape for name, entry in base.tensors.items()}
            skeleton = build_skeleton(base.config, shapes, name=plan.class_name)
            weights = StoredWeights(base, self._stores.open(base.url), skeleton.slots, skeleton.unsupported)
            watched = [path for part in plan.parts for path in part.modules.values()]
            config: Any = skeleton.model.config
            self._text_config = config.get_text_config()
            self._pad = stated_pad(self._text_config)
            self._slots = skeleton.slots
            blocks = range(*plan.stages[self._place])
            self._stage = Stage(skeleton, blocks, weights, watched=watched, device=self._job.device)
        return self._stage

    def _commit_all(
        self, unit: ForwardUnit | BackwardUnit, parts: Sequence[Part], write: Write, started: float
    ) -> list[Stored]:
        """Commit what was found for some parts; sites outside of the blocks run in the first stage or in the last."""
        wanted = dict(unit.wanted)
        return [self._commit(unit.task, part, wanted[part.name], write, started) for part in parts]

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


def _as_input(batch: Batch) -> Mapping[str, Any]:
    tensors = {
        "input_ids": batch.input_ids,
        "token_type_ids": batch.token_type_ids,
        "pixel_values": batch.pixel_values,
        "attention_mask": batch.attention_mask,
    }
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
