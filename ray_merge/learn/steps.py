"""One learning step as steps of a pool: each batch forward through the stages and back, and what came out, in order.

The gradient of Psi is sum_i w_i grad f_i with weights w that depend on the values alone, so every task goes forward
and back once, one after another through the stages, and the driver weighs the gradients of phi afterwards. Memory does
not grow with the number of tasks but for one phi each, which also is the Jacobian that kappa(J) and xi are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ray_merge.learn.leaves import Leaves
from ray_merge.learn.order import Order, cut
from ray_merge.plan.learn import Learning, LearnPlan
from ray_merge.pool_steps import Step, StepPool
from ray_merge.work.learn_job import Batched, Graded, GradUnit, PassUnit, PenaltyUnit, Phi


@dataclass(frozen=True, slots=True)
class TaskGradients:
    """f_i of every task and its gradient of phi.

    Args:
        values: one for each task.
        by_site: for each task, site -> gradient.
    """

    values: list[float]
    by_site: list[dict[str, Tensor]]

    def jacobian(self) -> Tensor:
        """J (T, K): the gradients as rows, K coefficients of all sites in order; float64."""
        return torch.stack(
            [torch.cat([one.flatten().double() for one in task.values()]) for task in self.by_site]
        )


class Passes:
    """Makes the steps of one merge for a pool and collects their results.

    Args:
        plan: stages.
        index: of the merge in the plan.
        pool: one place for each stage.
        orders: of each task's rows, in the order of the merge's adapters.
        lengths: of each task, the tokens of each row of its sample.
    """

    def __init__(
        self,
        plan: LearnPlan,
        index: int,
        pool: StepPool,
        orders: Sequence[Order],
        lengths: Sequence[Sequence[int]],
    ) -> None:
        self._plan, self._index, self._pool, self._orders = plan, index, pool, orders
        self._lengths = lengths
        self._last = plan.last_stage(self.learning)
        self._sites = [plan.sites_of(self.learning, stage) for stage in range(len(plan.stages.stages))]

    @property
    def learning(self) -> Learning:
        """The merge."""
        return self._plan.learnings[self._index]

    def gradients(self, leaves: Leaves, step: int) -> TaskGradients:
        """Values and gradients of every task at phi, on the batches of a step."""
        batches = [batch for place in range(len(self._orders)) for batch in self._micro(place, step)]
        phi = [leaves.by_site(sites) for sites in self._sites]
        steps = [one for batch in batches for one in self._there_and_back(batch, phi)]
        found = {done.id: done.value for done in self._pool.run(steps)}
        return self._collected(batches, found)

    def values(self, place: int, batches: Sequence[int], *, alone: bool, leaves: Leaves) -> list[float]:
        """F of one task on the batches of some steps, without gradients.

        Args:
            place: of the task among the merge's adapters.
            batches: numbers of steps.
            alone: with this task's adapter alone, at its full size; else at phi.
            leaves: phi.
        """
        phi: list[Phi] = [{} if alone else leaves.by_site(sites) for sites in self._sites]
        made = [batch for step in batches for batch in self._micro(place, step, alone=alone)]
        steps = [one for batch in made for one in self._there(batch, phi, self._last, batch.name)]
        found = {done.id: done.value for done in self._pool.run(steps)}
        sums = dict.fromkeys(batches, 0.0)
        for batch in made:
            sums[int(batch.name.split("/")[0])] += found[f"{batch.name}/stage-{self._last}"].value
        return list(sums.values())

    def penalty(self, leaves: Leaves) -> tuple[float, dict[str, Tensor]]:
        """The penalty on the rank of the merged updates, and its gradient by site."""
        steps = []
        seen: set[str] = set()
        for stage, sites in enumerate(self._sites):
            own = [site for site in sites if site not in seen]
            seen |= set(own)
            unit = PenaltyUnit(self._index, stage, leaves.by_site(own))
            steps.append(Step(unit.id, unit, stage))
        found = {done.id: done.value for done in self._pool.run(steps)}
        ordered: list[Graded] = [found[step.id] for step in steps]
        gradients = {site: torch.tensor(one) for graded in ordered for site, one in graded.phi.items()}
        return sum(graded.value for graded in ordered), gradients

    def _micro(self, place: int, step: int, *, alone: bool = False) -> list[Batched]:
        task = self.learning.tasks[place]
        rows = self._orders[place].batch(step)
        size = int(self.learning.merge.parameters["micro_batch_size"])
        return [
            Batched(
                self._index,
                task,
                some,
                f"{step}/{task}/{number}",
                alone,
                len(some) / len(rows),
                self._tokens(place, some) / self._tokens(place, rows),
            )
            for number, some in enumerate(cut(rows, size))
        ]

    def _tokens(self, place: int, rows: Sequence[int]) -> int:
        """Tokens of some rows that the loss looks at: the first ones of a causal model, or all of them."""
        task, lengths = self.learning.tasks[place], self._lengths[place]
        head = self.learning.heads.get(task)
        if head is not None and head.kind == "causal":
            at_most = int(self.learning.merge.parameters["tokens"])
            return sum(min(lengths[row], at_most) for row in rows)
        return sum(lengths[row] for row in rows)

    def _there(
        self, batch: Batched, phi: Sequence[Phi], last: int, chain: str, *, predict: bool = False
    ) -> list[Step]:
        steps: list[Step] = []
        for stage in range(last + 1):
            unit = PassUnit(batch, stage, phi[stage], predict)
            steps.append(Step(unit.id, unit, stage, (steps[-1].id,) if steps else (), chain))
        return steps

    def _there_and_back(self, batch: Batched, phi: Sequence[Phi]) -> list[Step]:
        own: list[Step] = []
        if self.learning.compares:
            alone = replace(batch, name=f"{batch.name}/own", alone=True)
            nothing: list[Phi] = [{} for _ in phi]
            own = self._there(alone, nothing, self._last, batch.name, predict=True)
        steps = self._there(batch, phi, self._last - 1, batch.name)
        back: list[Step] = []
        for stage in range(self._last, -1, -1):
            unit = GradUnit(
                batch,
                stage,
                phi[stage],
                from_above=bool(back),
                hand_on=stage > 0,
                compared=bool(own) and not back,
            )
            before = [steps[stage - 1].id] if stage else []
            behind = [back[-1].id] if back else [one.id for one in own[-1:]]
            back.append(Step(unit.id, unit, stage, (*before, *behind), batch.name))
        return [*own, *steps, *back]

    def _collected(self, batches: Sequence[Batched], found: dict[str, Graded]) -> TaskGradients:
        """Sum up by task, over micro-batches and stages in order: never as they arrived."""
        shapes = self.learning.shapes
        values, gradients = [], []
        for task in self.learning.tasks:
            total, sums = (
                0.0,
                {site: torch.zeros(shape, dtype=torch.float64) for site, shape in shapes.items()},
            )
            for batch in batches:
                if batch.task != task:
                    continue
                for stage in range(self._last + 1):
                    graded = found[f"{batch.name}/backward-{stage}"]
                    total += graded.value
                    for site, one in graded.phi.items():
                        sums[site] += torch.tensor(one).double()
            values.append(total)
            gradients.append(sums)
        return TaskGradients(values, gradients)
