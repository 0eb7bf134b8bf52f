"""The scenarios; each asserts what its name says, on the stage's cluster, and leaves a whole cluster behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from stage import Stage, Submit, until

from ray_merge.storage.commit import MANIFEST

SMALL_BYTES = 100_000_000
"""Of memory: less than any worker needs."""

SILENCE_MINUTES = "0.3"


def undisturbed(stage: Stage) -> None:
    """Exit 0, the manifests are there, every object hashes to its receipt, and both workers had a part."""
    merges = stage.reference.merges()
    assert len(merges) == 2
    assert stage.workers("undisturbed") == ["worker-1", "worker-2"]
    for merge in merges:
        assert f"{merge}/{MANIFEST}" in stage.reference.files
        check = stage.program("ray-merge", "verify", stage.url(f"undisturbed/{merge}"))
        assert check.end() == 0, check.said


def stream_cut(stage: Stage) -> None:
    """Three log streams are reset; exit 0 for a run that is good, and its log is printed once."""
    stage.door.cut(3)
    call = stage.submit("cut")
    assert call.end() == 0, call.said
    assert stage.door.made == 3
    assert call.printed.count("published sum") == 1, call.printed
    stage.check_published("cut")


def stream_cut_failing(stage: Stage) -> None:
    """The same with a run that fails at work: not exit 0."""
    recipe = stage.recipe("failing", base_model=stage.broken_base())
    stage.door.cut(3)
    call = stage.submit("failing", recipe=recipe)
    assert call.end() == 1, call.said
    stage.notes["cuts"] = stage.door.made
    assert stage.door.made > 0
    assert "NaN" in call.last, call.said
    stage.door.cut(0)


def resubmitted(stage: Stage) -> None:
    """While it runs the same command attaches; when it is complete it does nothing: one job in all."""
    first = stage.submit("twice")
    name = first.job()
    stage.wait_for_work("twice")
    second = stage.submit("twice")
    assert second.job() == name
    assert [first.end(), second.end()] == [0, 0], first.said + second.said
    assert f"attached to job {name}" in second.said
    jobs = stage.cluster.jobs()
    third = stage.submit("twice")
    assert third.end() == 0, third.said
    assert "nothing to do: all 2 merge(s) are complete" in third.said
    assert stage.cluster.jobs() == jobs
    assert [job for job in jobs if job.startswith(name)] == [name]
    stage.check_published("twice")


def terminated(stage: Stage) -> None:
    """SIGTERM leaves the job running, and the same command attaches; with --stop-on-interrupt it stops it."""
    first, name = _in_the_middle(stage, "terminated")
    first.signal(signal.SIGTERM)
    assert first.end() == 1, first.said
    assert f"stopped by SIGTERM; job {name} goes on" in first.last, first.said
    again = stage.submit("terminated", "--stop-on-interrupt")
    assert again.job() == name
    again.signal(signal.SIGTERM)
    assert again.end() == 1, again.said
    assert f"job {name} was told to stop" in again.last, again.said
    until(lambda: stage.cluster.jobs()[name] == "STOPPED", f"stopped job {name}")
    _finishes(stage, "terminated", f"{name}-2")


def stopped(stage: Stage) -> None:
    """`ray job stop` by somebody else: exit 1; submitted again it is finished."""
    call, name = _in_the_middle(stage, "stopped")
    stop = stage.program("ray", "job", "stop", "--address", f"http://{stage.door.address}", name)
    assert stop.end() == 0, stop.said
    assert call.end() == 1, call.said
    assert f"job {name} was stopped" in call.last, call.said
    _finishes(stage, "stopped", f"{name}-2")


def worker_lost(stage: Stage) -> None:
    """The power of a worker's host fails in mid-run: exit 0, the same bytes."""
    call, _ = _in_the_middle(stage, "lost")
    lost = time.monotonic()
    stage.cluster.lose("worker-2")
    assert call.end() == 0, call.said
    stage.notes["seconds_after_the_loss"] = round(time.monotonic() - lost, 1)
    stage.check_published("lost")
    stage.cluster.add_worker("worker-2")
    stage.cluster.wait()


def worker_lost_before(stage: Stage) -> None:
    """A worker's host fails just before the call, so that the head still counts it: the other one does it all."""
    assert stage.reference.files
    stage.cluster.lose("worker-2")
    call = stage.submit("before")
    assert call.end() == 0, call.said
    assert stage.workers("before") == ["worker-1"]
    stage.check_published("before")
    stage.cluster.add_worker("worker-2")
    stage.cluster.wait()


def head_lost(stage: Stage) -> None:
    """The head's host fails: exit 3 once its silence is too long; on a new cluster the same command finishes."""
    call, _ = _in_the_middle(stage, "headless", "--contact-minutes", SILENCE_MINUTES)
    lost = time.monotonic()
    stage.cluster.lose("head")
    assert call.end() == 3, call.said
    stage.notes["seconds_after_the_loss"] = round(time.monotonic() - lost, 1)
    assert "its state is unknown" in call.last, call.said
    stage.cluster.lose_all()
    stage.cluster.start()
    _finishes(stage, "headless")


def small_host(stage: Stage) -> None:
    """One host has too little memory for a worker: none is placed there, and the other one does it all."""
    _make_small(stage)
    call = stage.submit("small")
    assert call.end() == 0, call.said
    assert stage.workers("small") == ["worker-1"]
    stage.check_published("small")
    _make_whole(stage)


def unmeetable(stage: Stage) -> None:
    """More memory than the hosts have, and GPUs that they do not have: exit 2 with both numbers."""
    _make_small(stage)
    calls = [
        stage.submit("memory", options=("--workers", "2")),
        stage.submit("gpus", options=("--workers", "2", "--device", "cuda")),
        stage.submit("gpu", options=("--device", "cuda")),
    ]
    assert [call.end() for call in calls] == [2, 2, 2], "\n".join(call.said for call in calls)
    stage.notes["said"] = [call.last for call in calls]
    assert "2 worker(s) with 1 CPU" in calls[0].last
    assert "room for 1: 3 node(s) with 2 CPU" in calls[0].last
    assert "2 worker(s) with 1 CPU, 1 GPU" in calls[1].last
    assert "room for 0: 3 node(s) with 2 CPU" in calls[1].last
    assert "has no GPU" in calls[2].last
    for output in ("memory", "gpus", "gpu"):
        assert [path for path in stage._paths(output) if not path.endswith("recipe.yaml")] == []
    _make_whole(stage)


def _in_the_middle(stage: Stage, output: str, *words: str) -> tuple[Submit, str]:
    """A run that has work behind it and before it, and the name of its job."""
    assert stage.reference.files
    call = stage.submit(output, *words)
    name = call.job()
    stage.wait_for_work(output)
    assert stage.cluster.jobs()[name] == "RUNNING"
    return call, name


def _finishes(stage: Stage, output: str, name: str = "") -> None:
    call = stage.submit(output)
    assert call.end() == 0, call.said
    assert not name or f"submitted job {name} " in call.said
    stage.check_published(output)


def _make_small(stage: Stage) -> None:
    stage.cluster.lose("worker-2")
    stage.cluster.add_worker("worker-2", memory=SMALL_BYTES)
    stage.cluster.wait()


def _make_whole(stage: Stage) -> None:
    stage.cluster.lose("worker-2")
    stage.cluster.add_worker("worker-2")
    stage.cluster.wait()


PLAYS: tuple[Callable[[Stage], None], ...] = (
    undisturbed,
    stream_cut,
    stream_cut_failing,
    resubmitted,
    terminated,
    stopped,
    worker_lost,
    worker_lost_before,
    small_host,
    unmeetable,
    head_lost,
)
