"""What a worker of `init` is told: the job once, and one unit per call. All of it is small, frozen and picklable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_merge.identity import canonical_json
from ray_merge.plan.osrm import OsrmTask
from ray_merge.pool import Worker
from ray_merge.recipe.model import Init
from ray_merge.spec import Adapter, Site
from ray_merge.work.job import MomentsIndex

STATE_KEY = "ray_merge"
"""Of the metadata of what is written: the id, what an adapter is made of, and what was found at each site."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OsrmJob:
    """The part of an init that never changes.

    Args:
        init: the recipe's.
        seed: of the recipe's calibration; it also decides among directions that no other task reaches.
        tasks: by name.
        inputs: task -> everything that decides its factors.
        ids: task -> the digest of that, 64 hex digits.
        index: where the moments lie.
        adapters: by name, those that are projected.
        sites: of those adapters, by name.
        output: URL of the folder of folders that adapters are written to.
        scratch: folder for unfinished files where the store is remote.
        cache: node-local folder.
        attempt: names this run among others on the same store.
        peak_bytes: estimated resident bytes of one worker.
    """

    init: Init
    seed: int
    tasks: Mapping[str, OsrmTask]
    inputs: Mapping[str, Mapping[str, Any]]
    ids: Mapping[str, str]
    index: MomentsIndex
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]
    output: str
    scratch: str
    cache: str
    attempt: str
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class PartUnit:
    """Find the factors of one task at the sites of one part."""

    task: str
    part: str

    @property
    def id(self) -> str:
        """Unit id."""
        return f"osrm/{self.task}/{self.part}"


@dataclass(frozen=True, slots=True)
class JoinUnit:
    """Put the factors of one task together and publish them."""

    task: str

    @property
    def id(self) -> str:
        """Unit id."""
        return f"join/{self.task}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteInit:
    """What was found at one site.

    Args:
        null: how many rows lie in the numerical null space of the others' inputs.
        null_space: its dimension; which of its directions were taken is arbitrary where it is above `null`.
        reach: mean square of the others' inputs along the rows, as a share of what random orthonormal rows get; of
            sketched moments the most that it can be.
        sketched: the moments of the others are sketches, so "null" means that these hold nothing there.
        lost: of an adapter that was projected, the share of its update's norm that is gone; None if it was not.
    """

    null: int
    null_space: int
    reach: float
    sketched: bool
    lost: float | None


@dataclass(frozen=True, slots=True)
class Made:
    """What a unit gives back.

    Args:
        n_bytes: of the object that it wrote.
        adopted: True when it was there already.
        found: site -> what was found there; empty of a `PartUnit`.
    """

    n_bytes: int
    adopted: bool
    found: Mapping[str, SiteInit] = field(default_factory=dict)


def part_path(job_id: str, part: int) -> str:
    """Where the factors of the part with that number lie in a store."""
    return f"osrm/{job_id}/{part:05d}.safetensors"


def state_text(about: Mapping[str, Any], found: Mapping[str, SiteInit]) -> str:
    """What `read_state` and `read_inputs` read, for a file's header."""
    return canonical_json({**about, "sites": {site: asdict(one) for site, one in found.items()}})


def read_state(metadata: Mapping[str, str]) -> tuple[str, dict[str, SiteInit]]:
    """The id in the header of a file that `init` wrote, and what it found; "" and nothing for any other file."""
    try:
        state = json.loads(metadata[STATE_KEY])
        return str(state["id"]), {site: SiteInit(**one) for site, one in state["sites"].items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return "", {}


def read_inputs(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What an adapter that `init` wrote is made of, from its header; empty where it does not say."""
    try:
        return dict(json.loads(metadata[STATE_KEY])["inputs"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


@dataclass(frozen=True, slots=True)
class OsrmWorkerFactory:
    """Makes the worker in the process where it will run; picklable, and torch is imported only there."""

    job: OsrmJob

    def __call__(self) -> Worker:
        """The worker of this process."""
        from ray_merge.work.osrm_unit import OsrmWorker

        return OsrmWorker(self.job)
