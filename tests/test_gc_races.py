"""`gc` and runs on one output at the same moment, on a real S3 server: no manifest may stand for what is gone."""

from __future__ import annotations

import uuid

import pytest

import ray_merge
from fault_proxy import fault_proxy
from ray_merge.status import status
from ray_merge.storage.commit import MANIFEST, RECIPE, REMOVING
from ray_merge.storage.store import open_store
from s3_server import BUCKET, make_client
from tiny import write_recipe_files

pytestmark = pytest.mark.s3


@pytest.fixture
def recipe(s3, tmp_path):
    return write_recipe_files(tmp_path) | {"output": f"{s3.url}/{uuid.uuid4().hex}"}


@pytest.fixture
def run(recipe, tmp_path):
    return lambda: ray_merge.run(recipe, engine="local", workers=1, cache_dir=tmp_path / "cache")


@pytest.fixture
def drop(s3, recipe):
    """Remove objects of merge `m` as if a run had been killed before it put them."""
    client, prefix = make_client(s3.endpoint), recipe["output"].removeprefix(f"s3://{BUCKET}/")

    def drop(*names: str) -> None:
        for name in names:
            client.delete_object(Bucket=BUCKET, Key=f"{prefix}/m/{name}")

    return drop


def once(s3, method: str, end: str, do):
    """A rule that calls `do`, which asks the server itself, before the first such request reaches it."""
    done = []

    def rule(call):
        if call.method == method and call.target.partition("?")[0].endswith(end) and not done:
            done.append(call)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
                do()

    return done, rule


def through(s3, rule, call):
    with fault_proxy(s3.endpoint, rule) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        return call()


def check_whole(output: str) -> None:
    (merge,) = ray_merge.verify(output, probe=False)
    assert merge.name == "m"
    assert open_store(output).info(f"m/{REMOVING}") is None


def test_a_manifest_that_lands_when_gc_is_done_is_a_failed_run_and_no_complete_merge(s3, recipe, run, drop):
    run()
    drop(MANIFEST)
    gone = []
    done, rule = once(
        s3, "PUT", MANIFEST, lambda: gone.append(ray_merge.gc(recipe["output"], remove=True, older_than=0))
    )
    with pytest.raises(
        ray_merge.RunFailed, match=r"was removed while its manifest was written .*recipe.yaml"
    ):
        through(s3, rule, run)
    assert done
    assert [one.removed for one in gone[0].leftovers] == [True]
    store = open_store(f"{recipe['output']}/m")
    assert [info.path for info in store.list()] == [MANIFEST]
    assert [merge.complete for merge in status(recipe["output"])] == [False]
    with pytest.raises(ray_merge.RunFailed, match="is missing"):
        ray_merge.verify(recipe["output"])
    assert run().merges[0].done
    check_whole(recipe["output"])


def test_a_driver_that_is_started_again_and_again_while_gc_removes_is_refused_each_time(
    s3, recipe, run, drop
):
    run()
    drop(MANIFEST, "config.json", "model-00002-of-00002.safetensors")
    refused = []

    def start_twice():
        for _ in range(2):
            with pytest.raises(ray_merge.Refusal, match="being removed") as caught:
                run()
            refused.append(caught)

    done, rule = once(s3, "DELETE", "model-00001-of-00002.safetensors", start_twice)
    through(s3, rule, lambda: ray_merge.gc(recipe["output"], remove=True, older_than=0))
    assert done
    assert len(refused) == 2
    assert run().merges[0].done
    check_whole(recipe["output"])


def test_a_recipe_that_is_put_again_while_gc_removes_lets_no_driver_in(s3, recipe, run, drop):
    run()
    drop(MANIFEST, "config.json", "model-00002-of-00002.safetensors")
    store = open_store(f"{recipe['output']}/m")
    first = store.read(RECIPE)
    refused = []

    def put_and_start():
        store.put_if_absent(RECIPE, first, {})
        with pytest.raises(ray_merge.Refusal, match="being removed") as caught:
            run()
        refused.append(caught)

    done, rule = once(s3, "DELETE", "README.md", put_and_start)
    through(s3, rule, lambda: ray_merge.gc(recipe["output"], remove=True, older_than=0))
    assert (len(done), len(refused)) == (1, 1)
    assert run().merges[0].done
    check_whole(recipe["output"])


def test_a_manifest_that_lands_while_gc_begins_keeps_its_merge(s3, recipe, run, drop):
    run()
    store = open_store(f"{recipe['output']}/m")
    manifest = store.read(MANIFEST)
    drop(MANIFEST)
    done, rule = once(s3, "DELETE", RECIPE, lambda: store.put_if_absent(MANIFEST, manifest, {}))
    found = through(s3, rule, lambda: ray_merge.gc(recipe["output"], remove=True, older_than=0))
    assert done
    assert [one.kept for one in found.leftovers] == ["a run has completed it"]
    check_whole(recipe["output"])
    assert run().units_run == 0


def test_a_look_at_a_complete_merge_costs_three_requests(s3, recipe, run):
    run()
    with fault_proxy(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert run().units_run == 0
        assert [call.method for call in proxy.calls] == ["GET", "HEAD", "GET"]
