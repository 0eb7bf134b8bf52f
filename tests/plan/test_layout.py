import pytest
import torch

from ray_merge.plan import SHARD_METADATA, file_bytes, shard_layout
from ray_merge.plan.layout import OutTensor, plan_shards, with_replaced
from ray_merge.spec import DTYPE_BYTES, TensorEntry
from ray_merge.storage.headers import make_header
from tiny import llama_tensors, plan_of, write_base, write_recipe_files


@pytest.fixture
def recipe(tmp_path):
    return write_recipe_files(tmp_path)


def aligned(tensors):
    _, entries = make_header(shard_layout(tensors), SHARD_METADATA)
    return all(entry.start % DTYPE_BYTES[entry.dtype] == 0 for entry in entries.values())


def test_planned_sizes_are_those_of_the_files_to_be_written(recipe):
    for shard in plan_of({**recipe, "out_dtype": "bfloat16"}).shards:
        header, entries = make_header(shard_layout(shard.tensors), SHARD_METADATA)
        assert shard.n_bytes == max(entry.end for entry in entries.values())
        assert aligned(shard.tensors)
        assert len(header) < shard.n_bytes


def test_the_output_dtype_changes_floats_only(recipe, tmp_path):
    tensors = llama_tensors() | {"model.ids": torch.arange(4)}
    write_base(tmp_path / "base", tensors)
    dtypes = {t.name: t.dtype for s in plan_of({**recipe, "out_dtype": "float16"}).shards for t in s.tensors}
    assert dtypes.pop("model.ids") == "I64"
    assert set(dtypes.values()) == {"F16"}


def test_a_shard_of_mixed_dtypes_keeps_every_tensor_aligned(recipe, tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.0.scale"] = torch.zeros(3, dtype=torch.uint8)
    tensors["model.layers.0.wide"] = torch.zeros(3, dtype=torch.float64)
    write_base(tmp_path / "base", tensors)
    assert all(aligned(shard.tensors) for shard in plan_of(recipe).shards)


def test_the_layout_depends_on_the_base_alone(recipe):
    shards = plan_of(recipe).shards
    recipe["merges"] = [{"name": "other", "merge_method": "cat", "adapters": ["b"]}]
    assert plan_of(recipe).shards == shards


def entry(name, shape, dtype="F32"):
    size = DTYPE_BYTES[dtype] * torch.Size(shape).numel()
    return TensorEntry(name, dtype, shape, "f", 0, size)


TABLE = {name: entry(name, shape) for name, shape in (("a", (4, 3)), ("b", (2,)), ("c", (5, 3)))}


def test_a_tensor_that_begins_elsewhere_keeps_its_place_name_and_stored_dtype():
    (shard,) = plan_shards(TABLE, None, 10**9)
    saved = entry("base_model.model.a", (6, 3), "BF16")
    tensors = with_replaced(shard.tensors, {"a": ("x", saved)})
    assert [tensor.name for tensor in tensors] == [tensor.name for tensor in shard.tensors]
    changed = next(tensor for tensor in tensors if tensor.name == "a")
    assert changed == OutTensor("a", saved, "F32", "x")
    assert (changed.shape, changed.n_bytes) == ((6, 3), 6 * 3 * 4)
    assert aligned(tensors)
    assert file_bytes(tensors) - shard.n_bytes == 2 * 3 * 4
    assert with_replaced(shard.tensors, {}) == shard.tensors


def test_the_bytes_of_a_tensor_are_those_of_its_stored_dtype():
    assert OutTensor("a", TABLE["a"], "BF16").n_bytes == 24
    assert OutTensor("s", entry("s", ()), "F64").n_bytes == 8


def test_files_are_cut_at_the_size_asked_for_and_hold_every_tensor_once():
    tensors = {f"t{i}": entry(f"t{i}", (10, 10)) for i in range(7)}
    shards = plan_shards(tensors, None, 900)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert [shard.name for shard in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert sorted(t.name for shard in shards for t in shard.tensors) == sorted(tensors)
    assert all(sum(t.n_bytes for t in shard.tensors) <= 900 for shard in shards)
