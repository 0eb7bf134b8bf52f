import gc
import os
import time
from itertools import pairwise

import numpy as np
import pytest
from ray.exceptions import ObjectReconstructionFailedError

from pool_workers import (
    Die,
    Echo,
    Mix,
    PlaceFactory,
    PlaceWorker,
    Raise,
    RaiseAtFirst,
    Seal,
    SleepAfterFirst,
    Write,
)
from ray_merge.errors import AdapterError, NotFinite, Refusal, RunFailed, UnitFailed
from ray_merge.pool_steps import LocalStepPool, Step
from ray_merge.recipe import SPREAD
from ray_merge.runtime import step_pool
from ray_merge.runtime.placement import Demand, shared_cpus
from ray_merge.runtime.step_pool import RayStepPool

pytestmark = pytest.mark.ray

PLACES = 3
IN_FLIGHT = 3


@pytest.fixture(scope="module")
def step_pool_(ray_session):
    with RayStepPool(
        PlaceWorker, PLACES, session=ray_session, memory_bytes=None, in_flight=IN_FLIGHT, attempts=2
    ) as pool:
        yield pool


@pytest.fixture(params=["local", "ray"])
def pool(request):
    if request.param == "ray":
        return request.getfixturevalue("step_pool_")
    return LocalStepPool(PlaceWorker, PLACES, threads=2)


def there_and_back(n_chains, before=None):
    """Steps through all places and back, each on the way back with what the way there had made too.

    Args:
        n_chains: how many chains.
        before: what a step does first, by its id.
    """
    steps, last = [], 2 * PLACES - 1
    for chain in range(n_chains):
        for at in range(2 * PLACES):
            needs = [f"{chain}/{at - 1}"] if at else []
            needs += [f"{chain}/{last - at - 1}"] if PLACES <= at < last else []
            unit = Mix(10 * chain + at, (before or {}).get(f"{chain}/{at}", Echo(None)))
            steps.append(Step(f"{chain}/{at}", unit, min(at, last - at), tuple(needs), str(chain)))
    return steps


def expected(steps):
    """The results of the steps, without a pool."""
    rows, sums = {}, {}
    for step in steps:
        result, rows[step.id] = Mix(step.unit.seed)(step.place, [rows[need] for need in step.needs])
        sums[step.id] = result[0]
    return sums


def sums(done):
    assert len({result.id for result in done}) == len(done)
    return {result.id: result.value[0] for result in done}


def pids(done):
    return {result.value[1] for result in done}


def test_steps_get_what_the_steps_before_them_handed_on(pool):
    steps = there_and_back(5)
    done = list(pool.run(steps))
    assert sums(done) == expected(steps)
    assert {result.attempts for result in done} == {1}
    assert list(pool.run([])) == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [(NotFinite("mnli", "B", 7, "s3://a"), NotFinite), (OSError(28, "No space left"), UnitFailed)],
)
def test_an_error_arrives_as_it_was_raised_or_names_its_step(pool, error, kind):
    with pytest.raises(kind) as caught:
        list(pool.run(there_and_back(3, {"1/2": Raise(error)})))
    if kind is UnitFailed:
        assert caught.value.args[:2] == ("1/2", 1)
        assert "OSError: [Errno 28] No space left" in caught.value.args[2]
    else:
        assert caught.value.args == error.args
    assert len(list(pool.run(there_and_back(1)))) == 2 * PLACES


def test_the_steps_of_one_place_run_in_one_process_and_one_at_a_time(step_pool_, tmp_path):
    steps = there_and_back(6)
    steps = [
        Step(s.id, Mix(0, Write(str(tmp_path), f"{s.place}-{i}", 0.02), 10), s.place, s.needs, s.chain)
        for i, s in enumerate(steps)
    ]
    place_of = {step.id: step.place for step in steps}
    done = list(step_pool_.run(steps))
    assert len({(place_of[result.id], result.worker) for result in done}) == PLACES
    assert os.getpid() not in pids(done)
    for place in range(PLACES):
        files = [path.read_text().split() for path in tmp_path.glob(f"{place}-*")]
        spans = sorted((float(start), float(end)) for start, end in files)
        assert len(spans) == 12
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    spans = [tuple(map(float, path.read_text().split())) for path in tmp_path.iterdir()]
    most_at_once = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert most_at_once >= 2  # the places work side by side


def test_no_more_chains_are_begun_than_are_finished_plus_the_bound(step_pool_, tmp_path):
    steps = [
        Step(f"{c}/{p}", Mix(0, Write(str(tmp_path), f"{c}-{p}")), p, (f"{c}/{p - 1}",) if p else (), str(c))
        for c in range(20)
        for p in range(PLACES)
    ]
    results = step_pool_.run(steps)
    taken = [next(results).id for _ in range(12)]
    time.sleep(0.3)  # what was submitted has run by now
    finished = sum(one.endswith(f"/{PLACES - 1}") for one in taken)
    assert finished < len(list(tmp_path.glob("*-0"))) <= finished + IN_FLIGHT
    assert len(list(results)) == len(steps) - 12


def test_what_is_handed_on_never_comes_to_the_driver_and_no_reference_stays(step_pool_):
    from ray._private.worker import global_worker

    def n_references():
        gc.collect()  # errors of earlier tests hold some in their frames
        return len(global_worker.core_worker.get_all_reference_counts())

    before = n_references()
    n_bytes = 300_000  # Ray sends results below 100 kB to the driver, unread
    steps = [
        Step(f"{c}/{p}", Seal(os.getpid(), n_bytes), p, tuple(f"{c}/{q}" for q in range(p)), str(c))
        for c in range(4)
        for p in range(PLACES)
    ]
    done = list(step_pool_.run(steps))
    assert {result.id: result.value for result in done} == {
        step.id: n_bytes * len(step.needs) for step in steps
    }
    end = time.monotonic() + 5  # Ray lets go of arguments a moment after their call
    while n_references() > before and time.monotonic() < end:
        time.sleep(0.02)
    assert n_references() <= before


def test_an_actor_that_is_killed_in_mid_step_at_any_place_changes_no_result(step_pool_, tmp_path, capfd):
    victims = {"0/1": "b", "1/3": "c", "2/5": "a"}
    steps = there_and_back(5, {one: Die(str(tmp_path / name), times=1) for one, name in victims.items()})
    assert sorted(step.place for step in steps if step.id in victims) == list(range(PLACES))
    done = list(step_pool_.run(steps))
    assert sums(done) == expected(steps)
    assert [len((tmp_path / name).read_text()) for name in "abc"] == [2, 2, 2]
    assert max(result.attempts for result in done) == 2
    assert "Unhandled error" not in capfd.readouterr().err


def test_a_step_that_always_kills_its_actor_fails_after_the_bound(step_pool_, tmp_path):
    with pytest.raises(UnitFailed) as caught:
        list(step_pool_.run(there_and_back(2, {"0/1": Die(str(tmp_path / "marker"), times=99)})))
    unit, attempts, reason = caught.value.args
    assert (unit, attempts) == ("0/1", 2)
    assert len((tmp_path / "marker").read_text()) == 2
    assert "died 2 times" in reason
    assert "ActorDiedError" in reason


def gone():
    """What Ray raises in place of a call whose argument was on a lost node."""
    return ObjectReconstructionFailedError("ff" * 28, None, "", 1)


@pytest.mark.parametrize("known", [True, False])
def test_what_a_lost_value_needs_runs_again_and_each_result_arrives_once(
    step_pool_, tmp_path, monkeypatch, known
):
    marker = tmp_path / "lost"
    # 0/4 needs 0/3, which was made from 0/2 and 0/1; both have been dropped by then, but 0/0 has not.
    steps = there_and_back(2, {"0/4": RaiseAtFirst(str(marker), gone())})
    read = step_pool.lost_argument

    def lost_argument(error):
        return read(error) and (step_pool_._jobs[4].given[0].hex() if known else read(error))

    runs = []
    begin = step_pool.Schedule.begin
    monkeypatch.setattr(step_pool, "lost_argument", lost_argument)
    monkeypatch.setattr(
        step_pool.Schedule, "begin", lambda self, index: (runs.append(index), begin(self, index))[1]
    )
    done = list(step_pool_.run(steps))
    assert sums(done) == expected(steps)
    assert len(marker.read_text()) == 2
    again = sorted(index for index in set(runs) if runs.count(index) > 1)
    assert again == ([1, 2, 3, 4] if known else [0, 1, 2, 3, 4])
    assert len(runs) == len(steps) + len(again)


def test_a_value_that_is_lost_again_and_again_fails_the_step_that_makes_it(step_pool_, tmp_path):
    steps = there_and_back(1, {"0/1": RaiseAtFirst(str(tmp_path / "lost"), gone(), times=99)})
    with pytest.raises(
        UnitFailed, match=r"unit 0/0 .* handed on was lost 2 times.*ObjectReconstructionFailed"
    ):
        list(step_pool_.run(steps))


def test_a_second_run_inside_the_first_is_refused(step_pool_):
    first = step_pool_.run(there_and_back(2))
    next(first)
    with pytest.raises(RuntimeError, match="another run"):
        next(step_pool_.run(there_and_back(1)))
    first.close()
    assert len(list(step_pool_.run(there_and_back(1)))) == 2 * PLACES


def test_places_share_the_cpus_that_there_are(ray_session):
    shares = {n: shared_cpus(Demand(0, None), n, SPREAD).num_cpus for n in (1, 4, 5, 8, 40, 400, 401)}
    assert shares == {1: 1.0, 4: 1.0, 5: 0.8, 8: 0.5, 40: 0.1, 400: 0.01, 401: 1.0}
    assert all(Demand(0, None, share).workers_on({"CPU": 4.0}) >= n for n, share in shares.items() if n < 401)


def test_an_error_of_one_places_factory_arrives_and_a_place_that_does_not_stand_is_refused(
    ray_session, step_pool_
):
    options = {"session": ray_session, "memory_bytes": None}
    factory = PlaceFactory(Raise(AdapterError("no such adapter")), at=0)
    with pytest.raises(AdapterError, match="no such adapter"):
        RayStepPool(factory, 1, **options)
    with pytest.raises(Refusal, match=r"1000000000000000 bytes of memory.*room for 0"):
        RayStepPool(PlaceWorker, 1, session=ray_session, memory_bytes=10**15)
    # The other pool holds three of the four CPUs.
    with pytest.raises(Refusal, match=r"2 worker.*started (none|1) of them in 1 s"):
        RayStepPool(PlaceWorker, 2, **options, start_seconds=1)


def test_a_run_gives_up_when_one_place_does_not_answer_until_the_deadline(ray_session, tmp_path):
    factory = PlaceFactory(SleepAfterFirst(str(tmp_path / "first"), 60), at=0)
    with RayStepPool(factory, 1, session=ray_session, memory_bytes=None, deadline_seconds=0.3) as pool:
        steps = [Step("a", Mix(0, Die(str(tmp_path / "marker"), times=1)), 0)]
        with pytest.raises(RunFailed, match=r"no worker 0 that answers for 0.3 s \(last: .*ActorDiedError"):
            list(pool.run(steps))


def test_arrays_are_given_read_only(step_pool_):
    steps = [
        Step("a", Mix(1), 0),
        Step("b", WriteInto(), 1, ("a",)),
    ]
    with pytest.raises(UnitFailed, match="read-only"):
        list(step_pool_.run(steps))


class WriteInto:
    def __call__(self, place, given):
        given[0] += 1
        return None, np.zeros(1)
