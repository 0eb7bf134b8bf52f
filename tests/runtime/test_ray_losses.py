"""What needs a cluster of its own: a lost node, a worker that takes too much memory, nodes that differ."""

import json
import os
import re
from pathlib import Path

import psutil
import pytest
from driver_process import TESTS, end, python

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPARE = 3 << 30
"""Bytes that other processes must not take or give back while the worker's memory is watched."""


def output_of(name: str, script: str, **environment: str) -> str:
    folder = Path(f"/tmp/rmt-{os.getpid()}-{name}")
    driver = python(
        TESTS / "runtime" / script,
        folder,
        folder=folder,
        RAY_TMPDIR=str(folder),
        RAY_AUTH_MODE="disabled",
        **environment,
    )
    try:
        output, errors = driver.communicate(timeout=240)
        assert driver.returncode == 0, errors
        return output
    finally:
        end([driver], [folder])


def lose_a_node() -> str:
    return output_of("node", "lost_node_run.py")


def stand_by_label() -> str:
    return output_of("labels", "labelled_nodes_run.py")


def run_out_of_memory() -> str | None:
    memory = psutil.virtual_memory()
    if memory.available < 3 * SPARE:
        return None
    threshold = (memory.total - memory.available + SPARE) / memory.total
    return output_of(
        "oom",
        "out_of_memory_run.py",
        RAY_memory_usage_threshold=f"{threshold:.4f}",
        RAY_memory_monitor_refresh_ms="100",
    )


@pytest.mark.own_process(work=lose_a_node)
def test_the_loss_of_a_node_changes_no_result_and_burns_no_attempt(answer):
    facts = json.loads(answer)
    assert facts["nodes"] == 2
    assert sorted(facts["values"]) == sorted(f"unit-{i}" for i in range(14))
    # attempts=1 in that run: one counted death would have failed it. The other worker went on meanwhile.
    assert sorted(facts["attempts"]) == [1] * 13 + [2]


@pytest.mark.own_process(work=run_out_of_memory)
def test_a_worker_killed_for_memory_ends_the_run_with_the_planned_number(answer):
    if answer is None:
        pytest.skip(f"less than {3 * SPARE} bytes of memory are free, and this test takes up to {2 * SPARE}")
    assert "unit hog failed after 2 attempt(s)" in answer
    assert "OutOfMemoryError" in answer
    assert "the plan gave it 123456789 bytes" in answer


@pytest.mark.own_process(work=stand_by_label)
def test_workers_stand_on_nodes_with_the_labels_and_the_memory_or_are_refused_with_both_numbers(answer):
    facts = json.loads(answer)
    assert facts["spread"] == facts["one_per_node"] == facts["by memory"] == ["big"] * 8
    assert re.search(r"1 worker.*on nodes with tier=huge.*room for 0.*0 node.s. have", facts["absent"])
    assert "all nodes: tier=(none); tier=big; tier=small" in facts["absent"]
    assert re.search(r"5 worker.*on nodes with tier=small.*room for 4.*1 node.s. have", facts["few"])


@pytest.mark.own_process(work=stand_by_label)
def test_units_follow_the_data_that_their_node_has_read(answer):
    read = {(data, node) for data, node in json.loads(answer)["data"]}
    assert {data for data, _ in read} == set("abcdefgh")
    assert {node for _, node in read} == {"small", "big"}
    # In the order of the tasks, each data would be read on both nodes: 16.
    assert 8 <= len(read) <= 10
