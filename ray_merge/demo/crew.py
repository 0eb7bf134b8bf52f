"""Trains several adapters side by side, one process and one thread each.

Owns: the worker processes of the demo. Never does: choosing what to train, reading the cache.
Why one thread each: `models.one_thread`.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from ray_merge.demo.score import score_adapter
from ray_merge.demo.tasks import Task
from ray_merge.demo.train import Settings, published_folder, train_adapter
from ray_merge.errors import RunFailed

SCORE_FILE = "score.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One adapter to train: `data` holds the task's parquet files, `target` appears when all is done."""

    task: Task
    base: Path
    data: Path
    target: Path
    settings: Settings


def hands(jobs: int) -> int:
    """How many trainings run at once: one per core that this process may use."""
    return max(
        1,
        min(jobs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
    )


def train_all(jobs: Sequence[Job]) -> Iterator[Job]:
    """Trains all jobs and yields each when its folder is published, in order of completion.

    Raises:
        RunFailed: a worker failed or was killed; the others are stopped, and what is complete stays cached.
    """
    waiting, running = list(jobs), dict[Connection, tuple[Job, SpawnProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < hands(len(jobs)):
                job = waiting.pop(0)
                running.update([_start(job)])
            for channel in wait(list(running)):
                assert isinstance(channel, Connection)
                job, process = running.pop(channel)
                try:
                    failure = channel.recv()
                except EOFError:
                    process.join()
                    failure = f"the process ended with exit code {process.exitcode}"
                process.join()
                if failure:
                    raise RunFailed(f"training adapter {job.task.name} failed: {failure}; run the demo again")
                yield job
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _start(job: Job) -> tuple[Connection, tuple[Job, SpawnProcess]]:
    """Spawned, not forked: the parent may hold threads of torch or Ray."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, theirs), name=f"ray-merge demo {job.task.name}")
    process.start()
    theirs.close()  # so that a killed worker shows as the end of the channel
    return ours, (job, process)


def _work(job: Job, channel: Connection) -> None:
    try:
        train_and_score(job)
        channel.send("")
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent reports it in one sentence
        traceback.print_exc()
        channel.send(f"{type(error).__name__}: {error}")


def train_and_score(job: Job) -> None:
    """Trains in this process, scores the adapter alone, and publishes the folder with its `SCORE_FILE`."""
    with published_folder(job.target) as draft:
        seconds = train_adapter(job.task, job.base, job.data / "train.parquet", draft, job.settings)
        note = {
            "task": job.task.name,
            "regression": job.task.is_regression,
            "num_labels": job.task.num_labels,
            "metric": job.task.metric,
            "test": score_adapter(job.base, draft, job.task, job.data / "test.parquet"),
            "seconds": round(seconds, 1),
        }
        (draft / SCORE_FILE).write_text(json.dumps(note, sort_keys=True) + "\n")
