"""Imports nothing heavy: the workers that are spawned here import this file."""

import os
import signal
from pathlib import Path

import pytest

from ray_merge.demo import crew
from ray_merge.demo.tasks import TASKS
from ray_merge.demo.train import Settings
from ray_merge.errors import RunFailed

JOBS = [
    crew.Job(task=task, base=Path("base"), data=Path("data"), target=Path("target"), settings=Settings())
    for task in TASKS
]


def _die(_job, _channel):
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(_job, channel):
    channel.send("ValueError: no rows")


def _succeed(_job, channel):
    channel.send("")


@pytest.mark.parametrize(("worker", "reason"), [(_die, "exit code -9"), (_fail, "ValueError: no rows")])
def test_a_worker_that_dies_or_fails_ends_the_preparation_with_the_reason(monkeypatch, worker, reason):
    monkeypatch.setattr(crew, "_work", worker)
    with pytest.raises(RunFailed, match=f"adapter docstring failed: .*{reason}"):
        list(crew.train_all(JOBS[:1]))


def test_every_job_is_reported_once(monkeypatch):
    monkeypatch.setattr(crew, "_work", _succeed)
    done = [job.task.name for job in crew.train_all(JOBS)]
    assert sorted(done) == sorted(job.task.name for job in JOBS)


def test_there_are_as_many_hands_as_cores_and_never_more_than_jobs():
    assert crew.hands(1) == 1
    assert 1 <= crew.hands(64) <= (os.cpu_count() or 1)
