"""What a worker is told: the job once, and one unit per call. All of it is small, frozen and picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_merge.algebra.radix import Prefix
from ray_merge.methods.context import Thresholds
from ray_merge.plan import Plan
from ray_merge.storage.store import ObjectInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentsIndex:
    """Where the moments of a run lie, for its workers.

    Args:
        store: URL.
        objects: task -> site -> the object that holds it.
        conv1d: sites whose weight is stored (in, out).
        unwatched: site -> why it has none.
        norms: of Fisher diagonals: task -> Frobenius norm over all sites.
    """

    store: str
    objects: Mapping[str, Mapping[str, ObjectInfo]]
    conv1d: frozenset[str]
    unwatched: Mapping[str, str]
    norms: Mapping[str, float] = field(default_factory=dict)


LEAF = "phi."
"""In front of a leaf's name in the object of a state (learn/state.py), and of a site's in what is published."""


@dataclass(frozen=True, slots=True)
class PhiIndex:
    """Where the learned coefficients of a merge lie, for the workers of a run.

    Args:
        store: URL.
        info: the object.
        leaves: site -> the tensor that holds its phi.
        tasks: those that had a loss, in order.
    """

    store: str
    info: ObjectInfo
    leaves: Mapping[str, str]
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The part of a run that never changes.

    Args:
        plan: what to merge.
        merge_ids: merge name -> 64 hex digits.
        outputs: merge name -> URL of its folder.
        roots: merge name -> URL of the output that the folder lies in.
        scratch: folder for unfinished files where the output is remote; local outputs use their own.
        cache: node-local folder for adapters.
        attempt: names this run among others on the same output.
        device: torch device for the arithmetic.
        moments: by kind of statistics ("gram", "fisher/sampled" ...), for the methods that need them.
        phi: merge name -> its learned coefficients, for the methods that have some.
    """

    plan: Plan
    merge_ids: Mapping[str, str]
    outputs: Mapping[str, str]
    roots: Mapping[str, str]
    scratch: str
    cache: str
    attempt: str
    device: str = "cpu"
    moments: Mapping[str, MomentsIndex] = field(default_factory=dict)
    phi: Mapping[str, PhiIndex] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreflightUnit:
    """Fetch, hash and check every tensor of one adapter."""

    adapter: str

    @property
    def id(self) -> str:
        """Unit id."""
        return f"preflight/{self.adapter}"


@dataclass(frozen=True, slots=True)
class Series:
    """The entries of one adapter over all sites that a merge touches, in one space.

    Args:
        merge: whose sites, and whose base tensors where an update depends on them.
        space: dense, core or knots.
        adapters: that span the space; the adapter alone where its entries do not depend on the others.
        adapter: whose entries.
    """

    merge: str
    space: str
    adapters: tuple[str, ...]
    adapter: str


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a series' entries at the sites of one shard.

    Args:
        series: whose entries.
        prefix: what candidates share (algebra/radix.py).
        gather: how many candidates there are in all, to ask for their magnitudes; 0 asks for counts.
    """

    series: Series
    prefix: Prefix
    gather: int = 0


@dataclass(frozen=True, slots=True)
class SelectUnit:
    """Count the entries of some series at the sites of one shard, by the bits of their magnitudes."""

    shard: int
    questions: tuple[Question, ...]
    round: int

    @property
    def id(self) -> str:
        """Unit id."""
        return f"select-{self.round}/shard-{self.shard + 1:05d}"


@dataclass(frozen=True, slots=True)
class ShardUnit:
    """Make one output shard of some merges of a group, reading its base tensors once."""

    shard: int
    merges: tuple[str, ...]
    group: int
    thresholds: Mapping[str, Thresholds] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        """Unit id."""
        return f"group-{self.group:03d}/shard-{self.shard + 1:05d}"


@dataclass(frozen=True, slots=True)
class AdapterUnit:
    """Make the exported adapter of one merge."""

    merge: str
    thresholds: Mapping[str, Thresholds] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        """Unit id."""
        return f"adapter/{self.merge}"


@dataclass(frozen=True, slots=True)
class EmrUnit:
    """Make the unified update and the masks beside one shard of an emr merge."""

    merge: str
    shard: int

    @property
    def id(self) -> str:
        """Unit id."""
        return f"emr/{self.merge}/shard-{self.shard + 1:05d}"


Unit = PreflightUnit | SelectUnit | ShardUnit | AdapterUnit | EmrUnit


@dataclass(frozen=True, slots=True)
class AdapterCheck:
    """What preflight found: the content of the adapter's weights file, and of each table that PEFT saved by itself."""

    adapter: str
    sha256: str
    n_bytes: int
    tensors: int
    tables: Mapping[str, str] = field(default_factory=dict)
