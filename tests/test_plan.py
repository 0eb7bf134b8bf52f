import json
import pickle

import pytest
import torch

from ray_merge.errors import AdapterError, AdapterShapeError, CheckpointError, RecipeError
from ray_merge.plan import DEFAULT_MEMORY_BYTES, SHARD_METADATA, make_plan, shard_layout
from ray_merge.spec import DTYPE_BYTES
from ray_merge.storage.headers import make_header
from tiny import (
    HIDDEN,
    Q0,
    V1,
    factors,
    llama_tensors,
    plan_of,
    write_adapter,
    write_base,
    write_recipe_files,
)


@pytest.fixture
def recipe(tmp_path):
    return write_recipe_files(tmp_path)


def test_a_plan_knows_sites_shards_and_bytes_without_reading_weights(recipe):
    plan = plan_of(recipe)
    assert {site.name: tensor for tensor, site in plan.sites.items()} == {
        Q0: f"{Q0}.weight",
        V1: f"{V1}.weight",
    }
    assert plan.touched(plan.merges[0]) == {f"{Q0}.weight", f"{V1}.weight"}
    assert [shard.name for shard in plan.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert sum(t.n_bytes for shard in plan.shards for t in shard.tensors) == plan.base.n_bytes
    assert plan.read_bytes == plan.base.n_bytes
    assert plan.write_bytes == plan.checkpoint_bytes
    assert plan.warnings == ()


def test_planned_sizes_are_those_of_the_files_to_be_written(recipe):
    for shard in plan_of({**recipe, "out_dtype": "bfloat16"}).shards:
        header, entries = make_header(shard_layout(shard.tensors), SHARD_METADATA)
        assert shard.n_bytes == max(entry.end for entry in entries.values())
        assert all(entry.start % DTYPE_BYTES[entry.dtype] == 0 for entry in entries.values())
        assert len(header) < shard.n_bytes


def test_the_output_dtype_changes_floats_only(recipe, tmp_path):
    tensors = llama_tensors() | {"model.ids": torch.arange(4)}
    write_base(tmp_path / "base", tensors)
    dtypes = {
        t.source.name: t.dtype for s in plan_of({**recipe, "out_dtype": "float16"}).shards for t in s.tensors
    }
    assert dtypes.pop("model.ids") == "I64"
    assert set(dtypes.values()) == {"F16"}


def test_a_shard_of_mixed_dtypes_keeps_every_tensor_aligned(recipe, tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.0.scale"] = torch.zeros(3, dtype=torch.uint8)
    tensors["model.layers.0.wide"] = torch.zeros(3, dtype=torch.float64)
    write_base(tmp_path / "base", tensors)
    for shard in plan_of(recipe).shards:
        _, entries = make_header(shard_layout(shard.tensors), SHARD_METADATA)
        assert all(entry.start % DTYPE_BYTES[entry.dtype] == 0 for entry in entries.values())


def test_a_plan_can_be_sent_to_another_process(recipe):
    plan = plan_of(recipe)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_only_the_adapters_that_a_merge_uses_are_opened(recipe):
    recipe["adapters"]["gone"] = "/nowhere"
    recipe["merges"][0]["adapters"] = ["a"]
    plan = plan_of(recipe)
    assert list(plan.adapters) == ["a"]
    assert plan.touched(plan.merges[0]) == {f"{Q0}.weight"}


def test_an_adapter_without_a_path_cannot_be_merged(recipe):
    recipe["adapters"]["a"] = {"data": "/data.parquet"}
    with pytest.raises(RecipeError, match="adapter a has no path"):
        plan_of(recipe)


def test_factors_that_do_not_fit_name_site_shapes_and_both_files(recipe, tmp_path):
    write_adapter(tmp_path / "a", factors(Q0, columns=HIDDEN + 1))
    with pytest.raises(AdapterShapeError) as caught:
        plan_of(recipe)
    for part in (
        Q0,
        "lora_A",
        "(2, 9)",
        "takes 8 inputs",
        f"{tmp_path}/a/adapter_model.safetensors",
        str(tmp_path / "base"),
    ):
        assert part in str(caught.value)
    write_adapter(tmp_path / "a", factors(Q0, rows=HIDDEN - 1))
    with pytest.raises(AdapterShapeError, match="gives 8 outputs"):
        plan_of(recipe)


def test_a_weight_that_is_no_matrix_is_refused(recipe, tmp_path):
    write_adapter(tmp_path / "a", factors("model.norm"))
    with pytest.raises(AdapterError, match=r"model\.norm\.weight has shape \(8,\); only matrices are merged"):
        plan_of(recipe)


def test_a_weight_that_is_not_stored_as_floats_is_refused(recipe, tmp_path):
    write_base(tmp_path / "base", llama_tensors() | {f"{Q0}.weight": torch.zeros(8, 8, dtype=torch.int8)})
    with pytest.raises(AdapterError, match="is stored as I8, not as floats"):
        plan_of(recipe)


def test_transposed_models_are_refused_by_their_type(recipe, tmp_path):
    write_base(tmp_path / "base", config={"model_type": "gpt2"})
    with pytest.raises(AdapterError, match="gpt2 stores linear weights transposed"):
        plan_of(recipe)


@pytest.mark.parametrize(("tied", "refused"), [(True, True), (False, False)])
def test_a_tied_head_is_refused_and_an_untied_one_is_a_site(recipe, tmp_path, tied, refused):
    write_base(tmp_path / "base", config={"model_type": "llama", "tie_word_embeddings": tied})
    write_adapter(tmp_path / "a", factors("lm_head", rows=16))
    if refused:
        with pytest.raises(AdapterError, match="lm_head is tied to the input embedding"):
            plan_of(recipe)
    else:
        assert "lm_head.weight" in plan_of(recipe).sites


def test_a_saved_head_beside_the_base_is_kept_apart(recipe, tmp_path):
    head = {"base_model.model.score.weight": torch.ones(3, 8)}
    write_adapter(tmp_path / "a", factors(Q0) | head, modules_to_save=["score"])
    assert [entry.name for entry in plan_of(recipe).adapters["a"].heads] == ["score.weight"]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_a_saved_module_that_replaces_a_base_weight_is_refused(recipe, tmp_path, name):
    saved = {f"base_model.model.{name}": torch.ones(llama_tensors()[name].shape)}
    write_adapter(tmp_path / "a", factors(Q0) | saved, modules_to_save=[name.split(".")[-2]])
    with pytest.raises(AdapterError, match=f"{name} .*replaces a weight of the base"):
        plan_of(recipe)


def test_a_saved_module_is_recognised_through_the_base_model_prefix(recipe, tmp_path):
    bare = {
        name.removeprefix("model."): tensor
        for name, tensor in llama_tensors().items()
        if name != "lm_head.weight"
    }
    write_base(tmp_path / "base", bare)
    saved = {"base_model.model.model.norm.weight": torch.ones(8)}
    write_adapter(tmp_path / "a", factors(Q0) | saved, modules_to_save=["norm"])
    with pytest.raises(AdapterError, match=r"model\.norm\.weight \(modules_to_save\) replaces a weight"):
        plan_of(recipe)


def named_base(tmp_path, recipe, **names):
    for index, (adapter, name) in enumerate(names.items()):
        write_adapter(tmp_path / adapter, factors((Q0, V1)[index]), base_model_name_or_path=name)
    return recipe


def test_adapters_of_two_hub_models_are_refused_unless_they_are_declared_equal(recipe, tmp_path):
    named_base(tmp_path, recipe, a="org/one", b="org/two")
    with pytest.raises(AdapterError, match="adapter a was trained on org/one, adapter b on org/two"):
        plan_of(recipe)
    assert plan_of({**recipe, "base_model_names": ["Org/One", "org/two"]}).warnings == ()


def test_an_unproven_base_is_a_warning(recipe, tmp_path):
    named_base(tmp_path, recipe, a="org/one", b="org/one")
    (warning,) = plan_of(recipe).warnings
    assert "org/one" in warning
    assert "base_model_names" in warning
    named_base(tmp_path, recipe, a="org/base", b="/elsewhere/base")
    assert plan_of(recipe).warnings == ()


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("org/model", "fine"),
        ("Org/Model", "fine"),
        ("org/other", "refused"),
        ("/mnt/other", "warned"),
        ("/mnt/model", "fine"),
    ],
)
def test_a_hub_base_is_compared_with_what_the_adapter_says(recipe, name, verdict):
    plan = plan_of(recipe)
    adapters = {
        key: type(adapter)(
            **{f: getattr(adapter, f) for f in adapter.__slots__}
            | {"config": {"base_model_name_or_path": name}}
        )
        for key, adapter in plan.adapters.items()
    }
    hub = plan.recipe.model_copy(update={"base_model": "hf://org/model@main"})
    if verdict == "refused":
        with pytest.raises(AdapterError, match="trained on org/other, the recipe's base is org/model"):
            make_plan(hub, plan.merges, plan.base, adapters)
    else:
        assert bool(make_plan(hub, plan.merges, plan.base, adapters).warnings) == (verdict == "warned")


def test_a_method_without_a_low_rank_form_cannot_be_exported_as_an_adapter(recipe):
    recipe["merges"][0] |= {"merge_method": "ties", "export": "adapter", "parameters": {"scope": "tensor"}}
    with pytest.raises(
        RecipeError, match=r"ties in dense space has no exact low-rank form.*space: core or space: knots"
    ):
        plan_of(recipe)
    recipe["merges"][0]["parameters"]["space"] = "core"
    assert plan_of(recipe).groups == ()


def test_adapters_of_two_model_classes_have_no_common_adapter(recipe, tmp_path):
    write_adapter(tmp_path / "b", factors(V1), task_type="SEQ_CLS")
    recipe["merges"][0]["export"] = "both"
    with pytest.raises(RecipeError, match="adapter a has task_type CAUSAL_LM, adapter b SEQ_CLS"):
        plan_of(recipe)
    recipe["merges"][0]["export"] = "checkpoint"
    assert plan_of(recipe).merges


def test_a_filter_that_matches_no_site_is_a_warning(recipe):
    recipe["merges"][0]["parameters"] = {
        "lambda": [{"filter": "k_proj", "value": 1}, {"filter": "q_proj", "value": 2}]
    }
    assert plan_of(recipe).warnings == ("merge 'm': lambda filter 'k_proj' matches no site",)


def test_merges_share_passes_over_the_base_and_exports_need_none(recipe):
    recipe["merges"] = [
        {"name": "s", "merge_method": "cat", "sweep": {"lambda": list(range(70))}},
        {"name": "x", "merge_method": "cat", "export": "adapter"},
    ]
    plan = plan_of(recipe)
    assert [len(group) for group in plan.groups] == [16, 16, 16, 16, 6]
    assert sorted(index for group in plan.groups for index in group) == list(range(70))
    assert plan.read_bytes == 5 * plan.base.n_bytes
    assert plan.peak_bytes <= DEFAULT_MEMORY_BYTES


def test_too_little_memory_makes_groups_of_one_and_a_warning(recipe):
    recipe["merges"][0]["sweep"] = {"lambda": [1, 2, 3]}
    plan = plan_of(recipe)
    tight = make_plan(plan.recipe, plan.merges, plan.base, plan.adapters, memory_bytes=10**6)
    assert tight.groups == ((0,), (1,), (2,))
    assert any("more than the ceiling of 1 MB" in warning for warning in tight.warnings)


def test_a_basis_is_counted_for_methods_that_have_only_one_space(recipe):
    recipe["merges"][0] |= {"merge_method": "knots_ties", "parameters": {"scope": "tensor"}}
    knots = plan_of(recipe).peak_bytes
    recipe["merges"][0] |= {"merge_method": "cat", "parameters": {}}
    assert knots > plan_of(recipe).peak_bytes


def test_the_layout_depends_on_the_base_alone(recipe, tmp_path):
    shards = plan_of(recipe).shards
    recipe["merges"] = [{"name": "other", "merge_method": "cat", "adapters": ["b"]}]
    assert plan_of(recipe).shards == shards


def test_a_damaged_index_is_found_by_planning(recipe, tmp_path):
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "m.safetensors")
    index = {"weight_map": {"lm_head.weight": "m.safetensors"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="stale index"):
        plan_of(recipe)
