"""Learning through three stages in three actors: equal to one process, to the last bit, also when a stage is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ray_merge.moments
from lessons import learned_phi, lesson, make_school
from ray_merge.pool import Turn
from ray_merge.runtime.step_pool import RayStepPool
from ray_merge.work.learn_job import GradUnit, LearnJob
from ray_merge.work.learn_worker import LearnWorker

pytestmark = pytest.mark.ray

NAMES = ("two", "three")
PARAMETERS = {"steps": 3, "batch_size": 4, "commit_every": 2, "samples": 0}


@dataclass(frozen=True)
class Killed:
    """Makes workers; the one at the second place kills itself once, in the second step, after it did its work."""

    job: LearnJob
    marker: str

    def __call__(self, place: int) -> Any:
        return KilledWorker(LearnWorker(self.job, place), place, self.marker)


class KilledWorker:
    def __init__(self, worker: LearnWorker, place: int, marker: str) -> None:
        self._worker, self._place, self._marker = worker, place, marker

    def run(self, unit: Any, given: Sequence[Any], turn: Turn) -> tuple[Any, Any]:
        made = self._worker.run(unit, given, turn)
        if self._place == 1 and isinstance(unit, GradUnit) and unit.batch.name.startswith("1/three/"):
            try:
                os.close(os.open(self._marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return made
            os.kill(os.getpid(), signal.SIGKILL)
        return made


@pytest.mark.slow
def test_phi_from_three_actors_one_of_which_dies_is_that_of_one_process(ray_session, tmp_path, monkeypatch):
    school = make_school(tmp_path / "school")
    whole = lesson(
        school, tmp_path / "whole", "tara_b", NAMES, stages=1, parameters=PARAMETERS, dtype="float32"
    )
    ray_merge.run(whole, engine="local", cache_dir=tmp_path / "cache")
    marker = tmp_path / "killed"
    used = []

    def pool(_: Any, job: Any) -> Any:
        used.append(job)
        made = RayStepPool(Killed(job, str(marker)), 3, session=ray_session, memory_bytes=None)
        return made

    monkeypatch.setattr(ray_merge.moments.Engines, "make_pool", pool)
    cut = lesson(school, tmp_path / "cut", "tara_b", NAMES, stages=3, parameters=PARAMETERS, dtype="float32")
    ray_merge.run(cut, engine="local", cache_dir=tmp_path / "cache")
    assert marker.exists()
    assert len(used) == 2  # to look at data, and to learn
    assert [len(job.plan.stages.stages) for job in used] == [3, 3]
    one, three = learned_phi(tmp_path / "whole"), learned_phi(tmp_path / "cut")
    assert list(one) == list(three)
    assert all(torch.equal(three[site], value) for site, value in one.items())
    assert not all(bool((value == 0.4).all()) for value in one.values())
    assert Path(tmp_path / "cut" / "m" / "ray_merge" / "MANIFEST.json").exists()
