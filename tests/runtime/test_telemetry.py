"""What a unit's result says that it took; that nothing which goes wrong there reaches the unit."""

from __future__ import annotations

import logging

import pytest
from ray.cloudpickle import dumps
from ray.util.metrics import Counter

from pool_workers import Echo, StepWorker
from ray_merge.pool import Task
from ray_merge.runtime.actors import UnitActor
from ray_merge.runtime.telemetry import Account, Label, account_of, harmless
from ray_merge.spec import Receipt
from ray_merge.work.osrm_job import Made
from ray_merge.work.stage_job import Stored


def receipt(n_bytes: int, seconds: dict[str, float], *, adopted: bool = False) -> Receipt:
    return Receipt(
        merge_id="m", name="n", n_bytes=n_bytes, sha256="s", tensors=1, unit="u", seconds=seconds,
        unit_bytes={"read": 7, "decoded": 5}, adopted=adopted,
    )  # fmt: skip


def test_the_objects_of_one_unit_share_its_clock_and_what_it_read():
    result = [
        receipt(100, {"read": 1.0, "upload": 1.0}),
        receipt(50, {"read": 1.0, "upload": 3.0}),
        receipt(900, {"read": 1.0, "upload": 3.5}, adopted=True),
    ]
    assert account_of(result, 4.5) == Account({"read": 1.0, "upload": 3.5, "whole": 4.5}, 7, 150)


def test_moments_and_init_count_what_they_stored_and_other_results_the_whole_alone():
    for adopted, written in ((False, 7), (True, 0)):
        assert account_of(Made(7, adopted), 2.0) == Account({"whole": 2.0}, 0, written)
    stored = [Stored("i", "p", "x", 10, "s", 1.0, False), Stored("j", "q", "y", 20, "s", 1.0, True)]
    assert account_of(stored, 2.0) == Account({"whole": 2.0}, 0, 10)
    for result in (None, [], {"a": 1}, ["x"]):
        assert account_of(result, 0.12345) == Account({"whole": 0.123})


def test_a_metric_that_cannot_be_counted_is_said_once_and_raises_nothing(caplog):
    @harmless
    def count() -> None:
        Counter("merge_of_nothing_total").inc(-1)

    with caplog.at_level(logging.WARNING, "ray_merge.telemetry"):
        count()
        count()
    (record,) = caplog.records
    assert "metrics are incomplete: ValueError" in record.getMessage()


@pytest.mark.ray
def test_a_result_that_no_metric_understands_arrives(ray_pool):
    (done,) = ray_pool.run([Task("odd", Echo([object]))])
    assert done.value == [object]


def test_a_worker_shows_its_kind_in_the_dashboard():
    assert repr(UnitActor(Label("merge"), dumps(StepWorker))) == "ray-merge merge worker"
