"""Sizes of pods that fit together, and what no pod can read. Schemas and rules: tests/cluster."""

import re
from dataclasses import replace

import pytest
import yaml

from ray_merge.errors import Refusal
from ray_merge.plan import kuberay
from ray_merge.plan.estimate import Cluster, estimate
from ray_merge.plan.kuberay import Target, emit, job_name, rayjob, refuse_local
from ray_merge.plan.kuberay_sizes import MIB, NODE_BYTES, pod_sizes
from ray_merge.plan.moments import StageFacts
from ray_merge.recipe import load_recipe
from tiny import plan_of, write_recipe_files

STAGES = StageFacts(
    kind="gram", class_name="X", tasks=2, parts=9, stages=12, peak_bytes=10**9, handed_bytes=50 * 10**6
)


@pytest.fixture
def recipe(tmp_path):
    document = write_recipe_files(tmp_path)
    document["max_shard_size"] = 300  # many shards
    document["merges"][0]["sweep"] = {"lambda": [1, 2, 3]}
    return document


@pytest.fixture
def plan(recipe):
    return plan_of(recipe)


@pytest.mark.parametrize("workers", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pods_hold_all_workers_and_a_container_all_that_they_take(plan, workers, device):
    plan = replace(plan, shards=plan.shards * 10)
    sizes = pod_sizes(plan, Cluster(workers=workers), device)
    assert sizes.workers == workers
    assert workers <= sizes.pods * sizes.workers_per_pod < workers + sizes.pods
    together = sizes.workers_per_pod * sizes.worker_bytes + sizes.store_bytes + NODE_BYTES
    assert sizes.worker_bytes >= plan.peak_bytes
    assert together <= 0.9 * sizes.memory_bytes
    assert sizes.gpus == (1 if device == "cuda" else 0)


def test_there_are_no_more_workers_than_units(plan):
    assert pod_sizes(plan, Cluster(workers=500), "cpu").workers == plan.n_units


def test_one_per_node_is_one_per_pod(recipe):
    sizes = pod_sizes(plan_of({**recipe, "placement": "one_per_node"}), Cluster(workers=3), "cpu")
    assert (sizes.pods, sizes.workers_per_pod) == (3, 1)


def test_stages_have_a_place_each_and_room_for_what_they_hand_on(plan):
    few = pod_sizes(plan, Cluster(workers=2), "cpu")
    sizes = pod_sizes(replace(plan, moments=(STAGES,)), Cluster(workers=2), "cpu")
    assert sizes.workers == STAGES.stages
    assert sizes.worker_bytes == STAGES.peak_bytes
    assert sizes.store_bytes >= few.store_bytes + 2 * sizes.workers_per_pod * STAGES.handed_bytes
    assert sizes.disk_bytes > sizes.store_bytes
    assert sizes.deadline_seconds >= few.deadline_seconds + 12 * 3600


def test_the_disk_holds_two_unfinished_shards_of_each_merge_that_shares_a_pass(plan):
    large = replace(plan, shards=tuple(replace(shard, n_bytes=10**9) for shard in plan.shards))
    sizes = pod_sizes(large, Cluster(workers=4), "cpu")
    assert sizes.disk_bytes >= 4 * 2 * 3 * 10**9
    assert (
        sizes.disk_bytes - pod_sizes(plan, Cluster(workers=4), "cpu").disk_bytes
        < 4 * 2 * 3 * 10**9 + 256 * MIB
    )


def test_the_deadline_follows_the_rates_of_the_cluster(plan):
    fast, slow = (Cluster(read_bytes_per_second=rate) for rate in (10**9, 1))
    sizes = pod_sizes(plan, slow, "cpu")
    assert sizes.deadline_seconds >= 4 * 3600 * estimate(plan, replace(slow, workers=sizes.workers)).hours
    assert sizes.deadline_seconds > pod_sizes(plan, fast, "cpu").deadline_seconds


def test_a_device_by_number_is_refused(plan):
    with pytest.raises(Refusal, match="cuda:1: a pod sees its own GPUs only"):
        pod_sizes(plan, Cluster(), "cuda:1")


def remote(document):
    """The recipe with every path on a store."""
    adapters = {name: {"path": f"s3://b/{name}"} for name in document["adapters"]}
    adapters["a"] |= {"data": "s3://b/x.jsonl", "initial": "s3://b/i", "head": "s3://b/h.safetensors"}
    return {
        **document,
        "base_model": "hf://o/m@1",
        "output": "gs://b/out",
        "store": "s3://b/s",
        "adapters": adapters,
    }


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("base_model", "/models/base", "base_model is /models/base"),
        ("output", "out", "output is out"),
        ("output", "file:///out", "output is file:///out"),
        ("store", "state", "store is state"),
        ("path", "mnli", "path of adapter a is mnli"),
        ("data", "x.jsonl", "data of adapter a is x.jsonl"),
        ("initial", "/i", "initial of adapter a is /i"),
        ("head", "/h", "head of adapter a is /h"),
    ],
)
def test_a_path_of_this_machine_is_refused_by_name(recipe, key, value, what):
    document = remote(recipe)
    refuse_local("s3://b/r.yaml", load_recipe(document)[0])
    place = document if key in ("base_model", "output", "store") else document["adapters"]["a"]
    place[key] = value
    with pytest.raises(Refusal, match=re.escape(f"{what}, a path of this machine that no pod can read")):
        refuse_local("s3://b/r.yaml", load_recipe(document)[0])


def test_a_recipe_on_this_machine_is_refused_before_anything_in_it(plan):
    with pytest.raises(Refusal, match=r"the recipe is recipe\.yaml"):
        emit(plan, Cluster(), Target(recipe="recipe.yaml", image="x:1"))


@pytest.mark.parametrize(
    "url",
    [
        "s3://b/nightly.yaml",
        "s3://b/UPPER case & more.yml",
        "s3://b/no-ending",
        f"s3://b/{'x' * 90}.yaml",
        "s3://b/_.yaml",
    ],
)
def test_a_job_has_a_name_that_kuberay_takes(url):
    name = job_name(Target(recipe=url, image="x:1"))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47
    assert name == job_name(Target(recipe=url, image="x:1"))


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "s3://other/r.yaml"},
        {"device": "cuda"},
        {"options": ("--only", "a")},
        {"options": ("--only", "b")},
        {"merges": ("0123 s3://out/m",)},
    ],
)
def test_a_job_that_does_something_else_has_another_name(change):
    target = Target(recipe="s3://b/r.yaml", image="x:1")
    assert job_name(target) != job_name(replace(target, **change))
    assert job_name(target) == job_name(replace(target, image="y:2"))


@pytest.mark.parametrize(
    "word", ["12e4", "5e10", "0x1", "1_000", "on", "y", "No", "0o7", ".inf", "~", "1:30", ""]
)
def test_what_another_reader_would_take_for_a_number_is_quoted(plan, monkeypatch, word):
    monkeypatch.setattr(kuberay, "refuse_local", lambda *_: None)  # the tiny plan lies on this disk
    target = Target(recipe="s3://b/r.yaml", image="x:1", namespace=word, options=(word,))
    text = emit(plan, Cluster(), target)
    assert f'namespace: "{word}"' in text
    assert yaml.safe_load(text)["metadata"]["namespace"] == word
    assert "kind: RayJob\n" in text


def test_the_header_says_what_to_delete_before_it_is_applied_again(plan, monkeypatch):
    monkeypatch.setattr(kuberay, "refuse_local", lambda *_: None)
    target = Target(recipe="s3://b/r.yaml", image="x:1", namespace="team")
    text = emit(plan, Cluster(), target)
    assert (
        f"delete it first, `kubectl -n team delete rayjob {yaml.safe_load(text)['metadata']['name']}`" in text
    )


def test_the_entrypoint_is_one_shell_word_for_each_argument(plan):
    target = Target(recipe="s3://b/a b.yaml", image="x:1", device="cuda", options=("--only", "m/*"))
    spec = rayjob(pod_sizes(plan, Cluster(), "cuda"), Cluster(), target)["spec"]
    assert spec["entrypoint"] == (
        "python jobs/merge.py 's3://b/a b.yaml' --workers 8 --device cuda --only 'm/*'"
    )
