"""The worker of `evaluate`: one model answers for the rows of one task.

The whole model runs as one stage, read from wherever it lies, with float32 arithmetic; a worker keeps the model that it
used last. An active adapter and a task's head are changed weights, so nothing of a model is written to disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from ray_merge.errors import RunFailed
from ray_merge.models.stage_calls import Alter
from ray_merge.plan.moments import MomentsPlan, TaskData
from ray_merge.pool import Turn
from ray_merge.recipe import DataSource
from ray_merge.spec import Adapter, Site
from ray_merge.storage.checkpoint import Checkpoint, read_json
from ray_merge.storage.store import Stores
from ray_merge.work.altered import altered_by
from ray_merge.work.device import ONE_THREAD, STAGING, check_device, tune_malloc
from ray_merge.work.evaluate_heads import Heads, remembered
from ray_merge.work.evaluate_job import (
    EvaluateJob,
    Score,
    ScoredModel,
    ScoredTask,
    ScoreUnit,
    head_alone,
    without_head,
)
from ray_merge.work.evaluate_rows import LabelledRows, read_rows
from ray_merge.work.evaluate_scoring import Scoring
from ray_merge.work.held import Held
from ray_merge.work.stage_job import StageJob
from ray_merge.work.text_head import read_text_head

KEPT_ROWS_BYTES = 256 * 2**20
"""Of inputs that a worker keeps for the next model; images beyond that are read again."""

GENERATION_FILE = "generation_config.json"


class Shelf:
    """Loaded models, at most so many; of those that nobody uses, the one that was put back first goes first.

    Args:
        room: how many.
    """

    def __init__(self, room: int) -> None:
        self._room, self._out = room, 0
        self._idle: list[tuple[tuple[str, str], Held]] = []
        self._lock = Lock()

    @contextmanager
    def take(self, key: tuple[str, str], load: Callable[[], Held]) -> Iterator[Held]:
        """A model for one user at a time; loaded where it is not there."""
        with self._lock:
            place = next((index for index, (one, _) in enumerate(self._idle) if one == key), None)
            held = None if place is None else self._idle.pop(place)[1]
            self._out += 1
            while held is None and self._idle and self._out + len(self._idle) > self._room:
                self._idle.pop(0)
        try:
            held = load() if held is None else held
            yield held
        finally:
            with self._lock:
                self._out -= 1
                if held is not None:
                    self._idle.append((key, held))


class EvaluateWorker:
    """Scores models.

    Args:
        job: what to do.

    Raises:
        Refusal: the device that was asked for is not there.
    """

    def __init__(self, job: EvaluateJob) -> None:
        tune_malloc(*STAGING)
        check_device(job.device)
        torch.backends.cuda.matmul.allow_tf32 = False
        self._job, self._stores = job, Stores()
        self._shelf = Shelf(job.room)
        self._rows: dict[tuple[str, str], LabelledRows] = {}

    def run(self, unit: ScoreUnit, turn: Turn) -> Score:
        """Score one model on one task."""
        model, task = self._job.models[unit.model], self._job.tasks[unit.task]
        rows = self._read(task, model.texts)
        key, plan = (model.checkpoint.url, task.class_name), self._whole(model.checkpoint, task)
        with ONE_THREAD, torch.no_grad(), ExitStack() as stack:
            held = stack.enter_context(self._shelf.take(key, partial(self._load, plan)))

            def altered(adapter: Adapter, sites: Mapping[str, Site]) -> Alter | None:
                return self._altered(stack, plan, adapter, sites, held)

            body = None if model.adapter is None else altered(without_head(model.adapter), model.sites)
            asked = [self._job.tasks[name] for name in unit.pool] or [task]
            own = {one.name: altered(head_alone(one.adapter), {}) for one in asked}
            scoring = Scoring(
                model=model,
                task=task,
                held=held,
                heads=Heads(asked, body, own, self._texts(asked)),
                device=self._job.device,
            )
            if task.answer == "causal":
                return Score(scoring.text(rows, turn, self._ends(model, held)), rows.n_rows)
            return scoring.labels(rows, turn)

    def _texts(self, tasks: Sequence[ScoredTask]) -> dict[str, Tensor]:
        """The matrices of those heads that are texts."""
        cache = Path(self._job.cache)
        return {
            one.name: read_text_head(one.text.file, cache, self._stores).to(self._job.device)
            for one in tasks
            if one.text is not None and one.text.file is not None
        }

    def _read(self, task: ScoredTask, texts: Checkpoint) -> LabelledRows:
        key = (task.name, texts.url)
        if key in self._rows:
            return self._rows[key]
        rows = read_rows(task, texts, self._job.calibration, Path(self._job.cache), self._stores)
        wanted = self._job.versions.get(task.name)
        if wanted is not None and texts.url == self._job.base.url and rows.sha256 != wanted:
            raise RunFailed(f"{task.source.path} changed while it was evaluated; run again")
        if sum(one.n_bytes for one in self._rows.values()) + rows.n_bytes <= KEPT_ROWS_BYTES:
            self._rows[key] = rows
        return rows

    def _load(self, plan: MomentsPlan) -> Held:
        return Held(plan, 0, self._stores, self._job.device)

    def _whole(self, checkpoint: Checkpoint, task: ScoredTask) -> MomentsPlan:
        """One stage of all blocks, that watches nothing."""
        return MomentsPlan(
            base=checkpoint,
            class_name=task.class_name,
            tasks=(),
            parts=(),
            stages=((0, task.n_blocks),),
            conv1d=frozenset(),
            unwatched={},
            unmasked=frozenset(),
            calibration=self._job.calibration,
            handed_bytes=0,
            peak_bytes=self._job.peak_bytes,
        )

    def _altered(
        self, stack: ExitStack, plan: MomentsPlan, adapter: Adapter, sites: Mapping[str, Site], held: Held
    ) -> Alter | None:
        """What an adapter makes of the weights, read while the stack is open."""
        job = StageJob(
            plan=plan,
            adapters={adapter.name: adapter},
            sites=sites,
            likelihoods={},
            versions={},
            store="",
            scratch="",
            cache=self._job.cache,
            attempt="",
            device=self._job.device,
        )
        data = TaskData(adapter.name, DataSource(path=""), adapter)
        alter = stack.enter_context(altered_by(job, data, held.slots, self._stores))
        return None if alter is None else remembered(alter)

    def _ends(self, model: ScoredModel, held: Held) -> frozenset[int]:
        """The tokens that end a text, where `generate` looks for them."""
        checkpoint = model.checkpoint
        there = any(info.path == GENERATION_FILE for info in checkpoint.side_files)
        told = read_json(self._stores.open(checkpoint.url), GENERATION_FILE) if there else {}
        found = told.get("eos_token_id", getattr(held.text_config, "eos_token_id", None))
        return frozenset(one for one in (found if isinstance(found, list) else [found]) if type(one) is int)
