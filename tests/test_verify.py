"""What `verify` notices: every kind of damage, unfinished merges, changed inputs, updates that are not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ray_merge
from ray_merge.storage.commit import MANIFEST, RECIPE, REMOVING
from zoo import llama_adapters, tiny_llama

SHARDS = [f"model-{number:05d}-of-00004.safetensors" for number in (2, 3)]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Two merges of a tiny Llama whose updates mostly drown in the rounding to bfloat16."""
    folder = tmp_path_factory.mktemp("published")
    tiny_llama(folder / "base", hidden=128)
    recipe = {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "out_dtype": "bfloat16",
        "adapters": llama_adapters(folder / "base", folder / "adapters", 2),
        "merges": [
            {
                "name": "sum",
                "merge_method": "task_arithmetic",
                "sweep": {"lambda": [0.002, 1.0]},
                "export": "both",
            }
        ],
    }
    ray_merge.run(recipe, engine="local", cache_dir=folder / "cache")
    return folder / "out"


@pytest.fixture
def copy(published, tmp_path) -> Path:
    shutil.copytree(published, tmp_path / "out")
    return tmp_path / "out"


def check(output: Path, **options):
    return ray_merge.verify(str(output), cache_dir=output.parent / "cache", **options)


def test_what_was_published_passes(published):
    results = check(published)
    assert [result.name for result in results] == ["sum/lambda=0.002", "sum/lambda=1.0"]
    assert all(result.probed == 8 and 0 < result.worst <= 1 for result in results)


def test_a_flipped_byte_is_named(copy):
    path = copy / "sum" / "lambda=1.0" / SHARDS[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ray_merge.RunFailed, match=f"{SHARDS[0]} is not what was published"):
        check(copy, probe=False)


def test_swapped_shards_are_named(copy):
    one, other = (copy / "sum" / "lambda=1.0" / name for name in SHARDS)
    assert one.stat().st_size == other.stat().st_size
    one.rename(copy / "aside")
    other.rename(one)
    (copy / "aside").rename(other)
    with pytest.raises(ray_merge.RunFailed, match=f"{SHARDS[0]} is not what was published"):
        check(copy, probe=False)


def test_a_missing_file_is_named(copy):
    (copy / "sum" / "lambda=1.0" / "config.json").unlink()
    with pytest.raises(ray_merge.RunFailed, match=r"config\.json is missing"):
        check(copy, probe=False)


def test_an_unfinished_merge_is_named(copy):
    (copy / "sum" / "lambda=1.0" / MANIFEST).unlink()
    with pytest.raises(
        ray_merge.RunFailed, match=r"1 of 2 merge\(s\) are not complete, first sum/lambda=1\.0"
    ):
        check(copy)


def test_a_folder_without_a_merge_is_refused(tmp_path):
    with pytest.raises(ray_merge.Refusal, match="holds no complete merge"):
        check(tmp_path)


def test_a_changed_adapter_is_named(published):
    path = published.parent / "adapters" / "a1" / "adapter_model.safetensors"
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ray_merge.Refusal, match=r"adapters\[1\]\.files"):
            check(published)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_another_update_than_the_stored_one_is_noticed_under_the_rounding(published, monkeypatch, factor):
    right = ray_merge.verify.__globals__["site_deltas"]

    def wrong(*arguments):
        return [delta.scaled(factor) for delta in right(*arguments)]

    monkeypatch.setitem(ray_merge.verify.__globals__, "site_deltas", wrong)
    # The checkpoint alone: the exported factors beside it would give the game away.
    monkeypatch.setitem(ray_merge.verify.__globals__, "_merged_tensors", _shards_only)
    with pytest.raises(ray_merge.RunFailed, match=r"off by .* times what rounding allows"):
        check(published / "sum" / "lambda=0.002")


def _shards_only(store, manifest):
    from ray_merge.storage.headers import read_header

    names = [entry["name"] for entry in manifest["files"] if entry["name"].startswith("model-0")]
    return {entry.name: entry for name in names for entry in read_header(store, name).tensors.values()}


def test_a_manifest_without_its_recipe_is_no_complete_merge(copy):
    (copy / "sum" / "lambda=1.0" / RECIPE).unlink()
    with pytest.raises(ray_merge.RunFailed, match=r"ray_merge/recipe\.yaml is missing"):
        check(copy, probe=False)


def test_a_merge_that_gc_removes_does_not_pass(copy):
    (copy / "sum" / "lambda=1.0" / REMOVING).write_bytes(b"")
    with pytest.raises(ray_merge.RunFailed, match="being removed"):
        check(copy, probe=False)
