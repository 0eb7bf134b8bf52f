"""What a stage's worker is told: the job once, and one unit per call. All of it is small, frozen and picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray_merge.plan.fisher import Likelihood
from ray_merge.plan.moments import MomentsPlan, TaskData
from ray_merge.recipe import SPREAD, Placement
from ray_merge.spec import Adapter, Site

METADATA_KEY = "ray_merge"
"""Where the header of an object says what it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """The part of a computation of moments or Fisher diagonals that never changes.

    Args:
        plan: tasks, parts and stages.
        adapters: by name, those that are active while their task's inputs run.
        sites: of those adapters, by name.
        likelihoods: task -> what its Fisher diagonals are of; empty for moments.
        versions: task -> digest of the content of its data, which must still be that when they are read.
        store: URL of the store that moments go to.
        scratch: folder for unfinished files where the store is remote.
        cache: node-local folder.
        attempt: names this run among others on the same store.
        device: torch device for the arithmetic.
        placement: of the stages over a cluster's nodes.
    """

    plan: MomentsPlan
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]
    likelihoods: Mapping[str, Likelihood]
    versions: Mapping[str, str]
    store: str
    scratch: str
    cache: str
    attempt: str
    device: str = "cpu"
    placement: Placement = SPREAD


@dataclass(frozen=True, slots=True)
class CheckUnit:
    """Read the data of one task and look at every row, before anything is written; any place can do it.

    Args:
        task: whose data.
        likelihood: what is to be differentiated, whose labels are looked at too.
    """

    task: TaskData
    likelihood: Likelihood | None = None

    @property
    def id(self) -> str:
        """Unit id."""
        labels = "" if self.likelihood is None else f"/{self.likelihood.labels}"
        return f"check/{self.task.name}{labels}"


@dataclass(frozen=True, slots=True)
class RehearsalUnit:
    """Run the first input of one task through one stage, to find out whether the model can be cut at all."""

    task: str
    stage: int
    hand_on: bool

    @property
    def id(self) -> str:
        """Unit id."""
        return f"rehearsal/stage-{self.stage}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One object to be made.

    Args:
        part: of the base.
        id: of the object, 64 hex digits.
        sites: of the part that it is to hold; others may be there already.
    """

    part: str
    id: str
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ForwardUnit:
    """Run all inputs of one task through one stage.

    Args:
        task: whose inputs.
        stage: which.
        wanted: the objects to make; empty where this stage only hands on.
        hand_on: whether a later step needs the hidden states.
    """

    task: str
    stage: int
    wanted: tuple[Wanted, ...]
    hand_on: bool

    @property
    def id(self) -> str:
        """Unit id."""
        return f"{self.task}/stage-{self.stage}"


@dataclass(frozen=True, slots=True)
class BackwardUnit:
    """Run all inputs of one task through one stage and its gradients back through it.

    Args:
        task: whose inputs.
        stage: which.
        wanted: the objects to make; empty where this stage only hands on.
        hand_on: whether the stage before needs the gradients.
    """

    task: str
    stage: int
    wanted: tuple[Wanted, ...]
    hand_on: bool

    @property
    def id(self) -> str:
        """Unit id."""
        return f"{self.task}/backward-{self.stage}"


StageUnit = CheckUnit | RehearsalUnit | ForwardUnit | BackwardUnit


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What a task's data held: rows that were taken, their tokens, and a digest of the batches."""

    task: str
    rows: int
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Stored:
    """One committed object of moments.

    Args:
        id: 64 hex digits.
        part: which part of the base.
        path: in the store.
        n_bytes: its length.
        sha256: of its content.
        seconds: that the whole unit took.
        adopted: True when it was there already.
    """

    id: str
    part: str
    path: str
    n_bytes: int
    sha256: str
    seconds: float
    adopted: bool


def moments_path(moments_id: str) -> str:
    """Where the moments with that id lie in a store."""
    return f"moments/{moments_id}.safetensors"
