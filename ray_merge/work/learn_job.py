"""What a worker that learns is told: the job once, and one unit per call. All of it is small, frozen and picklable.

phi is the one thing that changes from call to call, so it travels with the unit, as arrays of the sites that the
stage may run; its gradients come back the same way. Hidden states and their gradients pass from worker to worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ray_merge.identity import digest
from ray_merge.plan.learn import LearnPlan
from ray_merge.plan.moments import TaskData
from ray_merge.recipe import SPREAD, Calibration, Placement
from ray_merge.spec import Adapter, Site

Phi = Mapping[str, NDArray[Any]]
"""Site -> its phi, float32 or float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnJob:
    """The part of learning that never changes.

    Args:
        plan: merges, tasks and stages.
        adapters: by name.
        sites: of those adapters, by name.
        versions: task -> digest of the content of its data, which must still be that when they are read.
        cache: node-local folder.
        device: torch device for the arithmetic.
        placement: of the stages over a cluster's nodes.
    """

    plan: LearnPlan
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]
    versions: Mapping[str, str]
    cache: str
    device: str = "cpu"
    placement: Placement = SPREAD


@dataclass(frozen=True, slots=True)
class ReadUnit:
    """Read the data of one task and look at every row that is sampled; any place of any plan of the base can do it.

    Args:
        task: whose data; without its adapter, which is large and tells nothing about them.
        calibration: which rows.
        version: digest of the content that the data must still have.
    """

    task: TaskData
    calibration: Calibration
    version: str

    @property
    def sample(self) -> tuple[str, str]:
        """What tells samples apart."""
        return self.task.name, self.calibration.model_dump_json()

    @property
    def id(self) -> str:
        """Unit id; of the calibration a digest, which a line of the log has room for."""
        return f"read/{self.task.name}/{digest(self.calibration.model_dump())[:12]}"


@dataclass(frozen=True, slots=True)
class DataRead:
    """What a task's data held: the tokens of each row that was taken; 1 for an image."""

    task: str
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batched:
    """One batch of one task on its way through the model of one merge.

    Args:
        learning: index of the merge in the plan.
        task: whose rows.
        rows: places in the sample, in the order of the batch.
        name: unique among the batches of one step.
        alone: True for the model with this task's adapter alone, at its full size; phi is then not looked at.
        share: of the rows of the step's batch of the task, where that is cut into micro-batches: means over rows count
            so much.
        token_share: of its tokens that are looked at: means over tokens count so much.
    """

    learning: int
    task: str
    rows: tuple[int, ...]
    name: str
    alone: bool = False
    share: float = 1.0
    token_share: float = 1.0


@dataclass(frozen=True, slots=True)
class PassUnit:
    """Run one batch forward through one stage, without gradients.

    Args:
        batch: which.
        stage: which.
        phi: of the sites that the stage may run.
        predict: whether the last stage hands on what it predicts, log p (N, C), in place of measuring it.
    """

    batch: Batched
    stage: int
    phi: Phi = field(hash=False, compare=False)
    predict: bool = False

    @property
    def id(self) -> str:
        """Unit id."""
        return f"{self.batch.name}/stage-{self.stage}"


@dataclass(frozen=True, slots=True)
class GradUnit:
    """Run one batch through one stage, and the gradient of what is minimised back through it.

    Args:
        batch: which.
        stage: which.
        phi: of the sites that the stage may run.
        from_above: whether a later stage hands its gradient down.
        compared: whether the last thing given is what the task's own adapter predicts, log p (N, C).
        hand_on: whether the stage before needs the gradient.
    """

    batch: Batched
    stage: int
    phi: Phi = field(hash=False, compare=False)
    from_above: bool
    hand_on: bool
    compared: bool = False

    @property
    def id(self) -> str:
        """Unit id."""
        return f"{self.batch.name}/backward-{self.stage}"


@dataclass(frozen=True, slots=True)
class PenaltyUnit:
    """The penalty on the effective rank of the merged updates of one stage, and its gradient."""

    learning: int
    stage: int
    phi: Phi = field(hash=False, compare=False)

    @property
    def id(self) -> str:
        """Unit id."""
        return f"penalty/stage-{self.stage}"


LearnUnit = ReadUnit | PassUnit | GradUnit | PenaltyUnit


@dataclass(frozen=True, slots=True)
class Graded:
    """What a unit gives back.

    Args:
        value: its part of the loss.
        phi: gradients by site; empty of a `PassUnit`.
    """

    value: float
    phi: Phi = field(default_factory=dict)
