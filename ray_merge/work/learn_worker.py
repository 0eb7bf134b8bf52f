"""The worker of one stage while phi is learned: frozen weights and factors, one unit per call.

A call is pure: phi comes with the unit, hidden states and gradients come and go as values. So any call may be
repeated, in any process, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_merge.algebra.objectives import rank_penalty, row_basis
from ray_merge.models.stage_calls import StageInput
from ray_merge.plan.learn import Learning
from ray_merge.plan.moments import TaskData
from ray_merge.pool import Turn
from ray_merge.storage.store import Stores
from ray_merge.work.device import ONE_THREAD, STAGING, check_device, tune_malloc
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.hand_on import as_array, handed_on, stage_input
from ray_merge.work.held import Held
from ray_merge.work.learn_job import (
    Batched,
    DataRead,
    Graded,
    GradUnit,
    LearnJob,
    LearnUnit,
    PassUnit,
    PenaltyUnit,
    Phi,
    ReadUnit,
)
from ray_merge.work.learn_loss import EntropyLoss, NullSpaceLoss
from ray_merge.work.mixture import Ingredients, Mixture, head_of
from ray_merge.work.read_task import TaskRows, read_task
from ray_merge.work.text_head import read_text_head

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class LearnWorker:
    """Runs units at one stage.

    Args:
        job: what to do.
        place: which stage.

    Raises:
        Refusal: the device that was asked for is not there.
    """

    def __init__(self, job: LearnJob, place: int) -> None:
        tune_malloc(*STAGING)
        check_device(job.device)
        torch.backends.cuda.matmul.allow_tf32 = False
        self._job, self._place = job, place
        self._stores = Stores()
        self._dtype = DTYPES[job.plan.dtype]
        self._kept: Held | None = None
        self._rows: dict[tuple[str, str], TaskRows] = {}
        self._mixtures: dict[tuple[Any, ...], Mixture] = {}
        self._heads: dict[str, Mapping[str, Tensor]] = {}
        self._matrices: dict[str, Tensor] = {}
        self._bases: dict[tuple[int, str], dict[str, Tensor]] = {}

    def run(self, unit: LearnUnit, given: Sequence[Any], turn: Turn) -> tuple[Any, Any]:
        """Do one unit; returns its small result and what it hands on."""
        # Not inference mode: what is loaded there can never be saved for a backward pass.
        with ONE_THREAD, torch.no_grad():
            turn.check()
            if isinstance(unit, ReadUnit):
                return self._read(unit), None
            if isinstance(unit, PassUnit):
                return self._pass(unit, given)
            if isinstance(unit, PenaltyUnit):
                return self._penalty(unit), None
            return self._grad(unit, given)

    # ---- the four units

    def _read(self, unit: ReadUnit) -> DataRead:
        base, cache = self._job.plan.stages.base, Path(self._job.cache)
        found = read_task(unit.task, unit.calibration, base, unit.version, cache, self._stores)
        return DataRead(unit.task.name, TaskRows(found).lengths())

    def _pass(self, unit: PassUnit, given: Sequence[Any]) -> tuple[Graded, Any]:
        batch, learning = unit.batch, self._learning(unit.batch.learning)
        arrays = given[0] if given else self._first(batch)
        through, phi = self._given(learning, arrays), self._phi(unit.batch, unit.phi)
        mixture = self._mixture(batch)
        measured = self._is_last and batch.task in learning.heads
        out = self._held().stage.forward(
            through,
            altered=mixture.altered(phi, self._head(batch, learning)),
            added=mixture.added(phi),
            to_end=measured,
        )
        if measured:
            loss = self._entropy(batch, learning, through)
            if unit.predict:
                return Graded(0.0), as_array(torch.log_softmax(loss.predictions(out), dim=-1))
            return Graded(float(loss(out))), None
        return Graded(0.0), handed_on(arrays, out.hidden)

    def _grad(self, unit: GradUnit, given: Sequence[Any]) -> tuple[Graded, Any]:
        batch, learning = unit.batch, self._learning(unit.batch.learning)
        arrays = given[0] if self._place else self._first(batch)
        above = given[-1] if unit.from_above else None
        through, phi = self._given(learning, arrays), self._phi(batch, unit.phi)
        leaves = {site: value.requires_grad_() for site, value in phi.items()}
        mixture = self._mixture(batch)
        ratios = self._null_space(batch, learning, through)
        loss = None
        if self._is_last and learning.heads:
            own = torch.tensor(given[-1], device=self._job.device) if unit.compared else None
            loss = self._entropy(batch, learning, through, own)
        made = self._held().stage.backward(
            through,
            None if above is None else torch.tensor(above, device=self._job.device),
            altered=mixture.altered(leaves, self._head(batch, learning)),
            added=mixture.added(leaves),
            phi=list(leaves.values()),
            loss=loss,
            on_input=None if learning.heads else ratios,
            recompute=self._job.plan.recompute,
        )
        mixture.check_called(leaves)
        value = ratios.value(list(ratios.bases)) if made.loss is None else float(made.loss)
        gradients = {site: as_array(one) for site, one in zip(leaves, made.phi, strict=True)}
        handed = as_array(made.hidden) if unit.hand_on and made.hidden is not None else None
        return Graded(value, gradients), handed

    def _penalty(self, unit: PenaltyUnit) -> Graded:
        """Sum over this stage's sites of 1 - erank / attainable rank, over the number of sites of the model."""
        learning = self._learning(unit.learning)
        batch = Batched(unit.learning, "", (), "")
        mixture, gradients, value = self._mixture(batch), {}, 0.0
        sites = [site for site in self._job.plan.sites_of(learning, self._place) if site in unit.phi]
        for site in sites:
            with torch.enable_grad():
                leaf = torch.tensor(unit.phi[site], device=self._job.device).requires_grad_()
                one = rank_penalty(*mixture.update(site, leaf)) / len(learning.shapes)
                (gradient,) = torch.autograd.grad(one, leaf)
            gradients[site] = as_array(gradient)
            value += float(one.detach())
        return Graded(value, gradients)

    # ---- what they are made of

    def _learning(self, index: int) -> Learning:
        return self._job.plan.learnings[index]

    @property
    def _is_last(self) -> bool:
        return self._place == len(self._job.plan.stages.stages) - 1

    def _held(self) -> Held:
        if self._kept is None:
            job = self._job
            autocast = torch.bfloat16 if job.plan.precision == "bfloat16" else None
            self._kept = Held(job.plan.stages, self._place, self._stores, job.device, self._dtype, autocast)
        return self._kept

    def _task(self, name: str) -> TaskData:
        return next(task for task in self._job.plan.stages.tasks if task.name == name)

    def _load(self, learning: Learning, name: str) -> Any:
        plan, task = self._job.plan, self._task(name)
        calibration, version = plan.calibration(learning), self._job.versions.get(name)
        return read_task(task, calibration, plan.stages.base, version, Path(self._job.cache), self._stores)

    def _first(self, batch: Batched) -> Mapping[str, Any]:
        """What the first stage gets of a batch."""
        learning = self._learning(batch.learning)
        key = batch.task, self._job.plan.calibration(learning).model_dump_json()
        if key not in self._rows:
            self._rows[key] = TaskRows(self._load(learning, batch.task))
        return self._held().decoding(self._rows[key].batch(batch.rows))

    def _given(self, learning: Learning, arrays: Mapping[str, Any]) -> StageInput:
        given = stage_input(arrays, self._job.device)
        if any(head.kind == "causal" for head in learning.heads.values()):
            return given
        return self._held().padded(given)

    def _phi(self, batch: Batched, phi: Phi) -> dict[str, Tensor]:
        device = self._job.device
        if not batch.alone:
            return {site: torch.tensor(value, device=device) for site, value in phi.items()}
        factors = self._task_adapter(batch.task).factors
        learning = self._learning(batch.learning)
        one = torch.ones(1, dtype=self._dtype, device=device)
        return {site: one for site in self._job.plan.sites_of(learning, self._place) if site in factors}

    def _task_adapter(self, name: str) -> Any:
        return self._job.adapters[name]

    def _mixture(self, batch: Batched) -> Mixture:
        learning = self._learning(batch.learning)
        names = (batch.task,) if batch.alone else learning.merge.adapters
        key = names, "adapter" if batch.alone else learning.coefficients, tuple(learning.shapes)
        if key not in self._mixtures:
            # One merge and each of its adapters alone; what an earlier merge had goes.
            while len(self._mixtures) > len(learning.merge.adapters):
                del self._mixtures[next(iter(self._mixtures))]
            self._mixtures[key] = self._mix(learning, names, alone=batch.alone)
        self._mixtures[key] = self._mixtures.pop(key)  # the most recently used one is last
        return self._mixtures[key]

    def _mix(self, learning: Learning, names: Sequence[str], *, alone: bool) -> Mixture:
        job, stages = self._job, self._job.plan.stages
        beside = {
            site: path
            for part in stages.parts_of(self._place)
            for site, path in part.modules.items()
            if site in learning.shapes
        }
        own = self._job.adapters[names[0]].replaced
        made_of = Ingredients(
            names=names,
            coefficients="adapter" if alone else learning.coefficients,
            beside=beside,
            conv1d=stages.conv1d,
            inside=[site for site in stages.unwatched if site in learning.shapes],
            sites=job.sites,
            replaced={tensor: (names[0], entry) for tensor, entry in own.items()}
            if alone
            else learning.replaced,
        )
        with self._files() as files:
            return Mixture(made_of, files, self._held().weights, self._held().slots)

    def _files(self) -> AdapterFiles:
        job = self._job
        return AdapterFiles(
            Path(job.cache) / "adapters", job.adapters, self._stores, device=job.device, dtype=self._dtype
        )

    def _head(self, batch: Batched, learning: Learning) -> Mapping[str, Tensor]:
        """The saved head of a batch's task, where predictions count."""
        if not learning.heads:
            return {}
        if batch.task not in self._heads:
            with self._files() as files:
                self._heads[batch.task] = head_of(self._task_adapter(batch.task), files)
        return self._heads[batch.task]

    def _entropy(
        self, batch: Batched, learning: Learning, given: StageInput, own: Tensor | None = None
    ) -> EntropyLoss:
        head = learning.heads[batch.task]
        matrix = None
        if head.file is not None:
            if batch.task not in self._matrices:
                self._matrices[batch.task] = read_text_head(head.file, Path(self._job.cache), self._stores)
            matrix = self._matrices[batch.task]
        return EntropyLoss(
            head=head,
            given=given,
            parameters=learning.merge.parameters,
            share=batch.token_share if head.kind == "causal" else batch.share,
            own=own,
            matrix=matrix,
        )

    def _null_space(self, batch: Batched, learning: Learning, given: StageInput) -> NullSpaceLoss:
        targets = learning.targets.get(batch.task, ())
        return NullSpaceLoss(
            bases=self._row_bases(batch, learning, targets) if targets else {},
            n_sites=len(targets),
            mask=given.attention_mask,
            unmasked=self._job.plan.stages.unmasked,
            share=batch.share,
            token_share=batch.token_share,
        )

    def _row_bases(self, batch: Batched, learning: Learning, targets: Sequence[str]) -> dict[str, Tensor]:
        """Module path -> orthonormal rows of the task's own A, at the target sites of this stage."""
        key = batch.learning, batch.task
        if key not in self._bases:
            job, stages = self._job, self._job.plan.stages
            self._held()
            with self._files() as files:
                self._bases[key] = {
                    path: row_basis(_inputs_side(files, job, batch.task, site, stages.conv1d)).to(self._dtype)
                    for part in stages.parts_of(self._place)
                    for site, path in part.modules.items()
                    if site in targets
                }
        return self._bases[key]


def _inputs_side(files: AdapterFiles, job: LearnJob, task: str, site: str, conv1d: frozenset[str]) -> Tensor:
    """The factor of an adapter that its inputs meet first, (R, I): A, or B^T where the weight is stored (in, out)."""
    factors = files.site([task], job.sites[site], _no_base)
    return factors.B[0].T if site in conv1d else factors.A[0]


def _no_base() -> Tensor:
    raise AssertionError("nsc measures at sites of LoRA alone")
