"""The pool of steps in this process; what it has in common with Ray's is in runtime/test_step_pool.py."""

import gc
import threading
import time
import weakref

import pytest

from ray_merge.errors import AdapterError, RunFailed, UnitFailed
from ray_merge.pool import worker_label
from ray_merge.pool_steps import LocalStepPool, Step


class Value:
    """Something large; a plain object, so that its end can be watched."""


class Watched:
    """Workers that note what happens, and the handed-on values that are alive at each step."""

    def __init__(self):
        self.made, self.order, self.most_values, self.most_workers = [], [], 0, 0
        self.values, self.workers = weakref.WeakSet(), weakref.WeakSet()
        self.running, self.lock = [], threading.Lock()
        self.most_at_once, self.seconds = 0, 0.0

    def __call__(self, place):
        self.made.append(place)
        worker = WatchedWorker(self, place)
        self.workers.add(worker)
        self.most_workers = max(self.most_workers, len(self.workers))
        return worker


class WatchedWorker:
    def __init__(self, watched, place):
        self.watched, self.place = watched, place

    def run(self, unit, given, turn):
        watched = self.watched
        with watched.lock:
            assert self.place not in watched.running
            watched.running.append(self.place)
            watched.most_at_once = max(watched.most_at_once, len(watched.running))
            watched.order.append(unit)
        time.sleep(watched.seconds)
        value = Value()
        watched.values.add(value)
        watched.most_values = max(watched.most_values, len(watched.values))
        with watched.lock:
            watched.running.remove(self.place)
        return (unit, len(given)), value


def pipeline(n_chains, n_places, by_place=False):
    """Each chain through all places; listed chain by chain, or place by place."""
    steps = [
        Step(f"{c}/{p}", (c, p), p, (f"{c}/{p - 1}",) if p else (), str(c))
        for c in range(n_chains)
        for p in range(n_places)
    ]
    return sorted(steps, key=lambda step: step.place) if by_place else steps


@pytest.mark.parametrize("by_place", [False, True])
def test_one_thread_follows_the_list_and_keeps_no_value_longer_than_it_is_needed(by_place):
    watched, steps = Watched(), pipeline(5, 3, by_place)
    with LocalStepPool(watched, 3, in_flight=5) as pool:
        done = list(pool.run(steps))
    assert watched.order == [step.unit for step in steps] == [result.value[0] for result in done]
    assert [result.value[1] for result in done] == [len(step.needs) for step in steps]
    assert {(result.worker, result.attempts) for result in done} == {(worker_label(), 1)}
    # The value in hand and the one that it is made from, for each chain that waits.
    assert watched.most_values == (5 + 1 if by_place else 2)
    assert watched.made == [0, 1, 2]
    gc.collect()
    assert not watched.values


def test_the_chains_under_way_are_bounded_and_so_are_the_values():
    watched = Watched()
    list(LocalStepPool(watched, 3, in_flight=2).run(pipeline(6, 3, by_place=True)))
    assert watched.most_values == 3
    assert [chain for chain, place in watched.order if place == 0] == list(range(6))


@pytest.mark.parametrize(("keep", "threads"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_workers_are_made_once_for_all_chains_where_not_all_can_be_kept(keep, threads):
    watched, steps = Watched(), pipeline(4, 5)
    watched.seconds = 0.002 if threads > 1 else 0.0
    with LocalStepPool(watched, 5, threads=threads, keep_workers=keep) as pool:
        assert len(list(pool.run(steps))) == 20
    assert sorted(watched.made) == [0, 1, 2, 3, 4]
    assert watched.most_workers <= keep
    assert watched.most_at_once == min(keep, threads)


def test_groups_of_chains_bound_the_values_where_not_all_workers_can_be_kept():
    watched = Watched()
    with LocalStepPool(watched, 3, in_flight=2, keep_workers=1) as pool:
        list(pool.run(pipeline(4, 3)))
    assert watched.made == [0, 1, 2] * 2
    assert watched.most_values == 3


def test_places_work_side_by_side_each_on_one_step_at_a_time():
    watched = Watched()
    watched.seconds = 0.005
    with LocalStepPool(watched, 3, threads=3) as pool:
        assert len(list(pool.run(pipeline(8, 3)))) == 24
    assert watched.most_at_once == 3


def test_what_succeeded_beside_a_failed_step_counts_and_what_is_behind_it_is_dropped():
    begun = []

    class Failing:
        def run(self, unit, given, turn):
            begun.append(unit)
            if unit == (1, 1):
                raise ValueError("no")
            return unit, None

    results, pool = [], LocalStepPool(lambda place: Failing(), 2)
    with pytest.raises(UnitFailed, match=r"unit 1/1 failed after 1 attempt\(s\): ValueError: no"):
        results += [result.id for result in pool.run(pipeline(9, 2))]
    assert begun == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [result.id for result in pool.run([Step("next", (0, 0), 0)])] == ["next"]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (AdapterError("no such adapter"), AdapterError, "^no such adapter$"),
        (KeyError("x"), RunFailed, "could not make its worker: KeyError: 'x'"),
    ],
)
def test_an_error_of_the_factory_arrives_and_the_next_run_tries_again(error, kind, text):
    errors, watched = [error], Watched()

    def factory(place):
        if errors:
            raise errors.pop()
        return watched(place)

    pool = LocalStepPool(factory, 2)
    with pytest.raises(kind, match=text):
        list(pool.run(pipeline(1, 2)))
    assert len(list(pool.run(pipeline(1, 2)))) == 2


def test_workers_outlive_a_run_but_not_the_pool_and_runs_do_not_overlap():
    watched = Watched()
    with LocalStepPool(watched, 2) as pool:
        first = pool.run(pipeline(3, 2))
        assert next(first).id == "0/0"
        with pytest.raises(RuntimeError, match="another run"):
            next(pool.run(pipeline(1, 2)))
        first.close()
        assert len(list(pool.run(pipeline(1, 2)))) == 2
        assert watched.made == [0, 1]
    gc.collect()
    assert not watched.workers


@pytest.mark.parametrize("options", [{"threads": 0}, {"in_flight": 0}, {"keep_workers": 0}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=0"):
        LocalStepPool(Watched(), 2, **options)
