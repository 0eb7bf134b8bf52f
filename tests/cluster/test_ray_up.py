"""cluster/ray-up: what Ray itself says of the files."""

from __future__ import annotations

import copy

import pytest
import yaml
from cluster_manifests import CLUSTER
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

FILES = sorted(path.name for path in (CLUSTER / "ray-up").glob("*.yaml"))


def read(name):
    return yaml.safe_load((CLUSTER / "ray-up" / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name):
    prepared = prepare_config(read(name))
    validate_config(prepared)
    for kind in prepared["available_node_types"].values():
        assert kind["min_workers"] == kind["max_workers"]


@pytest.mark.parametrize("name", FILES)
def test_a_field_that_is_unknown_is_noticed(name):
    prepared = prepare_config(read(name))
    broken = {**copy.deepcopy(prepared), "max_worker": 3}
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(broken)


@pytest.mark.parametrize("name", FILES)
def test_the_head_takes_no_work_and_spills_go_where_they_are_counted(name):
    document = read(name)
    assert "--num-cpus=0" in document["head_start_ray_commands"][-1]
    starts = [document[f"{role}_start_ray_commands"][-1] for role in ("head", "worker")]
    assert all(
        "--object-spilling-directory=/tmp/spill" in start and "--object-store-memory=" in start
        for start in starts
    )


def test_the_object_store_of_a_machine_is_the_one_that_the_autoscaler_counts_with():
    document = read("aws.yaml")
    start = document["worker_start_ray_commands"][-1]
    for name in ("cpu", "gpu"):
        size = document["available_node_types"][name]["resources"]["object_store_memory"]
        assert f"--object-store-memory={size}" in start
