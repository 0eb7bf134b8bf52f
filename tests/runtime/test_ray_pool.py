import os
import signal
import time
from unittest import mock

import pytest

from pool_workers import ClaimVersion, Die, Echo, Factory, Raise, SleepAfterFirst, StepWorker, Write
from ray_merge.errors import AdapterError, Refusal, RunFailed, UnitFailed
from ray_merge.pool import UNITS_PER_WORKER, Task
from ray_merge.recipe import SPREAD, Placement
from ray_merge.runtime import ray_pool as ray_pool_module
from ray_merge.runtime.merge_pool import JobPool
from ray_merge.runtime.ray_pool import RayPool

pytestmark = pytest.mark.ray


def test_units_run_in_the_actors_at_most_one_each_at_a_time(ray_pool, tmp_path):
    done = list(ray_pool.run([Task(str(i), Write(str(tmp_path), str(i), 0.05)) for i in range(10)]))
    assert len({result.worker for result in done}) == ray_pool.size == 2
    assert not any(result.worker.endswith(f":{os.getpid()}") for result in done)
    spans = [tuple(map(float, path.read_text().split())) for path in tmp_path.iterdir()]
    most = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert most <= ray_pool.size


def test_no_more_is_submitted_than_was_taken_plus_the_window(ray_pool, tmp_path):
    results = ray_pool.run([Task(str(i), Write(str(tmp_path), str(i))) for i in range(40)])
    taken = [next(results).id for _ in range(3)]
    time.sleep(0.5)  # what was submitted has run by now
    window = 2 * ray_pool.size
    assert len(taken) <= len(list(tmp_path.iterdir())) <= len(taken) + window
    assert len(list(results)) == 37


def test_tasks_are_done_in_their_order_but_for_the_two_that_one_worker_is_given_at_once(
    ray_session, tmp_path
):
    with RayPool(StepWorker, session=ray_session, workers=1, memory_bytes=None) as pool:
        done = list(pool.run([Task(str(i), Write(str(tmp_path), f"{i:02d}", 0.01)) for i in range(10)]))
    places = [int(result.value) for result in done]
    assert sorted(places) == list(range(10))
    assert max(abs(place - now) for now, place in enumerate(places)) < UNITS_PER_WORKER


def test_a_pool_refuses_a_second_run_inside_the_first(ray_pool):
    first = ray_pool.run([Task(str(i), Echo(i)) for i in range(4)])
    next(first)
    with pytest.raises(RuntimeError, match="another run"):
        next(ray_pool.run([Task("x", Echo(0))]))
    first.close()
    assert len(list(ray_pool.run([Task("x", Echo(0))]))) == 1


def test_a_killed_worker_changes_no_result(ray_pool, tmp_path):
    tasks = [Task(str(i), Echo(i)) for i in range(8)]
    tasks.insert(3, Task("killer", Die(str(tmp_path / "marker"), times=1, value="survived")))
    done = {result.id: result for result in ray_pool.run(tasks)}
    assert {key: result.value for key, result in done.items()} == {
        **{str(i): i for i in range(8)},
        "killer": "survived",
    }
    # Two units are in flight at a worker; the death is laid at the older one's door.
    assert max(result.attempts for result in done.values()) == 2


def test_a_unit_that_always_kills_its_worker_fails_after_the_bound(ray_pool, tmp_path):
    marker = tmp_path / "marker"
    tasks = [Task("poison", Die(str(marker), times=99))] + [Task(str(i), Echo(i)) for i in range(6)]
    with pytest.raises(UnitFailed) as caught:
        list(ray_pool.run(tasks))
    unit, attempts, reason = caught.value.args
    assert (unit, attempts) == ("poison", 4)
    assert len(marker.read_text()) == 4
    assert "died 4 times" in reason
    assert "ActorDiedError" in reason


def test_a_worker_that_was_killed_while_idle_is_replaced(ray_pool):
    before = {
        result.worker
        for result in ray_pool.run([Task(str(i), Write("/dev", "null", 0.05)) for i in range(6)])
    }
    for worker in before:
        os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
    time.sleep(0.5)
    done = list(ray_pool.run([Task(str(i), Echo(i)) for i in range(6)]))
    assert sorted(result.value for result in done) == list(range(6))
    assert not before & {result.worker for result in done}


def test_a_demand_that_no_wait_would_meet_is_refused_with_both_numbers(ray_session):
    started = time.monotonic()
    with pytest.raises(Refusal, match=r"(?s)64 worker.*1 CPU.*room for 4.*4 CPU"):
        RayPool(StepWorker, session=ray_session, workers=64, memory_bytes=None)
    with pytest.raises(
        Refusal, match=r"1000000000000000 bytes of memory.*room for 0.*bytes of memory in all"
    ):
        RayPool(StepWorker, session=ray_session, workers=1, memory_bytes=10**15)
    with pytest.raises(Refusal, match=r"1 GPU.*room for 0"):
        RayPool(StepWorker, session=ray_session, workers=1, memory_bytes=None, num_gpus=1)
    with pytest.raises(Refusal, match=r"2 worker.*one per node.*room for 1.*1 node"):
        RayPool(
            StepWorker,
            session=ray_session,
            workers=2,
            memory_bytes=None,
            placement=Placement(mode="one_per_node"),
        )
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("share", "placement", "workers"),
    [(0.0, SPREAD, 4), (0.4, SPREAD, 2), (0.6, SPREAD, 1), (0.0, Placement(mode="one_per_node"), 1)],
)
def test_by_default_there_are_as_many_workers_as_fit_the_nodes(ray_session, share, placement, workers):
    """A node of 4 CPUs; `share` of its memory is what one worker takes."""
    import ray

    memory_bytes = int(share * ray.cluster_resources()["memory"])
    options = {"kind": "merge", "placement": placement, "device": "cpu", "address": "auto", "workers": None}
    with (
        mock.patch.dict(os.environ, RAY_ADDRESS=ray.get_runtime_context().gcs_address),
        JobPool(StepWorker, 9, memory_bytes=memory_bytes, **options) as pool,
    ):
        assert pool.size == workers


def test_workers_beyond_what_is_enough_may_lack_a_place(ray_session, monkeypatch):
    import ray

    monkeypatch.setattr(ray_pool_module, "LATE_SECONDS", 0.1)
    options = {
        "session": ray_session,
        "workers": 2,
        "memory_bytes": int(0.6 * ray.cluster_resources()["memory"]),
    }
    with RayPool(StepWorker, **options, enough=1) as pool:
        assert [result.value for result in pool.run([Task("a", Echo(7))])] == [7]
    with pytest.raises(Refusal, match=r"2 worker.*room for 1"):
        RayPool(StepWorker, **options)


def test_places_that_others_hold_are_waited_for_and_then_refused(ray_session, ray_pool):
    with RayPool(StepWorker, session=ray_session, workers=2, memory_bytes=None) as pool:
        assert len(list(pool.run([Task("a", Echo(1))]))) == 1
        with pytest.raises(Refusal, match=r"started none of them in 0\.3 s"):
            RayPool(StepWorker, session=ray_session, workers=1, memory_bytes=None, start_seconds=0.3)
        with pytest.raises(Refusal, match=r"did not free them in 0\.3 s"):
            RayPool(
                StepWorker,
                session=ray_session,
                workers=1,
                memory_bytes=None,
                placement=Placement(mode="one_per_node"),
                start_seconds=0.3,
            )


def test_one_per_node_runs_and_gives_its_places_back(ray_session, ray_pool):
    options = {
        "session": ray_session,
        "workers": 1,
        "memory_bytes": 10**6,
        "placement": Placement(mode="one_per_node"),
    }
    for _ in range(3):  # two CPUs are free: two places that are not given back would leave none for the third
        with RayPool(StepWorker, **options, start_seconds=10) as pool:
            assert [result.value for result in pool.run([Task("a", Echo(7))])] == [7]


def test_an_error_of_the_factory_arrives_with_its_type(ray_session):
    with pytest.raises(AdapterError, match="no such adapter"):
        RayPool(
            Factory(Raise(AdapterError("no such adapter"))), session=ray_session, workers=1, memory_bytes=None
        )
    with pytest.raises(RunFailed, match="could not make its worker: ValueError: bad"):
        RayPool(Factory(Raise(ValueError("bad"))), session=ray_session, workers=1, memory_bytes=None)


def test_a_worker_with_another_ray_is_refused_with_both_versions(ray_session):
    import ray

    with pytest.raises(Refusal, match=rf"has Ray 0\.0\.1 .* driver has Ray {ray.__version__}"):
        RayPool(Factory(ClaimVersion("0.0.1")), session=ray_session, workers=1, memory_bytes=None)


def test_a_worker_that_dies_as_it_starts_is_not_started_for_ever(ray_session, tmp_path):
    marker = tmp_path / "marker"
    factory = Factory(Die(str(marker), times=99))
    with (
        pytest.raises((Refusal, RunFailed), match=r"died 2 time\(s\) as it started"),
        RayPool(factory, session=ray_session, workers=1, memory_bytes=None, attempts=2) as pool,
    ):
        list(pool.run([Task("a", Echo(1))]))
    assert len(marker.read_text()) == 2


def test_a_run_gives_up_when_no_worker_answers_until_the_deadline(ray_session, tmp_path):
    factory = Factory(SleepAfterFirst(str(tmp_path / "first"), 60))
    with RayPool(factory, session=ray_session, workers=1, memory_bytes=None, deadline_seconds=1) as pool:
        started = time.monotonic()
        with pytest.raises(RunFailed, match=r"none that answers for 1 s \(last: .*ActorDiedError"):
            list(pool.run([Task("a", Die(str(tmp_path / "marker"), times=1))]))
        assert time.monotonic() - started < 15


def test_closing_a_pool_ends_its_processes(ray_session):
    import psutil

    with RayPool(StepWorker, session=ray_session, workers=2, memory_bytes=None) as pool:
        done = list(pool.run([Task(str(i), Write("/dev", "null", 0.05)) for i in range(6)]))
    pids = {int(result.worker.rpartition(":")[2]) for result in done}
    assert len(pids) == 2
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not alive
    pool.close()
