"""The contract that both pools keep; what only Ray can do wrong is in runtime/test_ray_pool.py."""

import threading
import time

import pytest

from pool_workers import Echo, Raise, StepWorker, Write
from ray_merge.errors import AdapterShapeError, NotFinite, UnitFailed
from ray_merge.pool import UNITS_PER_WORKER, Dropped, LocalPool, Task, worker_label


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def pool(request):
    return LocalPool(StepWorker()) if request.param == "local" else request.getfixturevalue("ray_pool")


def test_every_task_comes_back_once_with_its_value(pool):
    done = list(pool.run([Task(f"unit-{i}", Echo(i * i)) for i in range(12)]))
    assert {result.id: result.value for result in done} == {f"unit-{i}": i * i for i in range(12)}
    assert len(done) == 12
    assert {result.attempts for result in done} == {1}


def test_a_run_without_tasks_ends_at_once(pool):
    assert list(pool.run([])) == []


def test_a_pool_takes_one_run_after_another(pool):
    for start in (0, 5):
        done = pool.run([Task(str(i), Echo(i)) for i in range(start, start + 5)])
        assert {result.value for result in done} == set(range(start, start + 5))


@pytest.mark.parametrize(
    "error",
    [
        AdapterShapeError(
            "layers.3.q_proj", "lora_A", (16, 4096), "the base takes 5120", "s3://a/x", "s3://m/y"
        ),
        NotFinite("mnli", "layers.0.lora_B", 7, "s3://a/mnli"),
        UnitFailed("an inner unit", 3, "why"),
    ],
)
def test_an_error_of_the_tree_arrives_with_type_and_arguments_and_is_not_retried(pool, error):
    with pytest.raises(type(error)) as caught:
        list(pool.run([Task("bad", Raise(error))]))
    assert type(caught.value) is type(error)
    assert caught.value.args == error.args
    assert str(caught.value) == str(error)


def test_another_error_becomes_unit_failed_with_type_and_text(pool):
    with pytest.raises(UnitFailed) as caught:
        list(pool.run([Task("bad", Raise(OSError(28, "No space left on device")))]))
    unit, attempts, reason = caught.value.args
    assert (unit, attempts) == ("bad", 1)
    assert reason.startswith("OSError")
    assert "No space left on device" in reason


def test_units_behind_a_failed_one_are_dropped_and_the_pool_goes_on(pool, tmp_path):
    tasks = [Task("bad", Raise(ValueError("no")))]
    tasks += [Task(str(i), Write(str(tmp_path), str(i), 0.02)) for i in range(40)]
    with pytest.raises(UnitFailed):
        list(pool.run(tasks))
    assert [result.value for result in pool.run([Task("next", Echo("fine"))])] == ["fine"]
    # Ray: those that ran beside the failed unit, and those that were queued behind it while its error travelled.
    assert len(list(tmp_path.iterdir())) < 20


def test_a_repeated_id_is_refused_with_both_positions(pool):
    with pytest.raises(ValueError, match="'a' stands at positions 0 and 2"):
        pool.run([Task("a", Echo(1)), Task("b", Echo(2)), Task("a", Echo(3))])


def test_the_local_pool_keeps_the_order_of_the_tasks_and_names_this_process():
    with LocalPool(StepWorker()) as pool:
        done = list(pool.run([Task(str(i), Echo(i)) for i in range(20)]))
    assert [result.value for result in done] == list(range(20))
    assert {result.worker for result in done} == {worker_label()}
    assert pool.size == 1


def test_the_local_pool_runs_at_most_one_unit_ahead_of_the_results_that_are_asked_for(tmp_path):
    results = LocalPool(StepWorker()).run([Task(str(i), Write(str(tmp_path), str(i))) for i in range(5)])
    assert list(tmp_path.iterdir()) == []
    assert next(results).value == "0"
    results.close()
    assert len(list(tmp_path.iterdir())) <= UNITS_PER_WORKER


class Uploading:
    """Computes for a moment, then ends its turn and uploads until the next unit has computed."""

    def __init__(self):
        self.log: list[str] = []
        self.second_computed = threading.Event()

    def run(self, unit, turn):
        self.log.append(f"{unit} computes")
        if unit == 1:
            self.second_computed.set()
        turn.end()
        if unit == 0:
            assert self.second_computed.wait(10)
        self.log.append(f"{unit} is there")
        return unit


def test_a_unit_begins_while_the_one_before_is_uploaded():
    worker = Uploading()
    done = list(LocalPool(worker).run([Task(str(i), i) for i in range(2)]))
    assert sorted(result.value for result in done) == [0, 1]
    assert worker.log.index("1 computes") < worker.log.index("0 is there")


@pytest.mark.parametrize("room", [1, 3])
def test_no_more_units_than_there_is_room_for_compute_at_once_and_they_begin_in_order(room):
    running, most, order, lock = 0, 0, [], threading.Lock()

    class Counting:
        def run(self, unit, turn):
            nonlocal running, most
            with lock:
                running, most = running + 1, max(most, running + 1)
                order.append(unit)
            time.sleep(0.002)
            with lock:
                running -= 1

    list(LocalPool(Counting(), room).run([Task(str(i), i) for i in range(30)]))
    assert most <= room
    assert order == sorted(order) or room > 1


def test_a_failure_drops_the_units_whose_turn_has_not_come():
    begun = []

    class Failing:
        def run(self, unit, turn):
            begun.append(unit)
            raise ValueError("no")

    with pytest.raises(UnitFailed, match="ValueError: no"):
        list(LocalPool(Failing()).run([Task(str(i), i) for i in range(10)]))
    assert len(begun) <= UNITS_PER_WORKER


def test_a_unit_under_way_stops_at_its_next_check_when_the_pool_does():
    begun, stopped = threading.Event(), threading.Event()

    class Checking:
        def run(self, unit, turn):
            if unit == "fails":
                assert begun.wait(10)
                raise ValueError("no")
            begun.set()
            try:
                while True:
                    turn.check()
                    time.sleep(0.001)
            except Dropped:
                stopped.set()
                raise

    with pytest.raises(UnitFailed, match="ValueError: no"):
        list(LocalPool(Checking(), 2).run([Task("endless", "endless"), Task("fails", "fails")]))
    assert stopped.is_set()
