"""adapter_model.bin on a node: converted once, and merged like the same tensors in safetensors."""

from __future__ import annotations

import hashlib
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

import ray_merge
from ray_merge.storage.store import open_store
from ray_merge.work.pickles import converted, unpickler
from tiny import Q0, factors, write_adapter, write_recipe_files


def write_pickle(path, tensors):
    torch.save(dict(tensors), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_pickle_is_converted_once(tmp_path):
    path, sha256 = write_pickle(tmp_path / "adapter_model.bin", factors(Q0))
    target = converted(path, sha256, tmp_path / "cache")
    assert target.name == f"{sha256}.safetensors"
    found = load_file(target)
    assert found.keys() == factors(Q0).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in factors(Q0).items())
    before = os.stat(target)
    assert converted(path, sha256, tmp_path / "cache") == target
    assert os.stat(target).st_mtime_ns == before.st_mtime_ns
    assert [item.name for item in target.parent.iterdir()] == [target.name]


def test_the_same_pickle_gives_the_same_bytes_everywhere(tmp_path):
    path, sha256 = write_pickle(tmp_path / "adapter_model.bin", factors(Q0))
    one, other = (converted(path, sha256, tmp_path / name).read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_pickle_that_is_refused_leaves_nothing(tmp_path):
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(ray_merge.Refusal):
        converted(path, "0" * 64, tmp_path / "cache")
    assert list((tmp_path / "cache" / "converted").iterdir()) == []


def test_planning_converts_what_the_store_holds(tmp_path):
    write_pickle(tmp_path / "adapter_model.bin", factors(Q0))
    store = open_store(str(tmp_path))
    path = unpickler(tmp_path / "cache")(store, store.info("adapter_model.bin"))
    assert load_file(path).keys() == factors(Q0).keys()


def test_a_pickled_adapter_is_merged_like_the_same_tensors_in_safetensors(tmp_path):
    recipe = write_recipe_files(tmp_path, ("a",))
    tensors = {name: torch.randn(tensor.shape) for name, tensor in factors(Q0).items()}
    results = []
    for kind in ("safetensors", "pickle"):
        write_adapter(tmp_path / "a", tensors)
        if kind == "pickle":
            (tmp_path / "a" / "adapter_model.safetensors").unlink()
            write_pickle(tmp_path / "a" / "adapter_model.bin", tensors)
            recipe["adapters"]["a"] = {"path": str(tmp_path / "a"), "allow_pickle": True}
        recipe["output"] = str(tmp_path / kind)
        ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache")
        ray_merge.verify(str(tmp_path / kind), cache_dir=tmp_path / "cache")
        results.append([path.read_bytes() for path in sorted((tmp_path / kind / "m").glob("model-*"))])
    assert results[0] == results[1]
