import json
import pickle
import re

import pytest
import torch

from ray_merge.errors import CheckpointError, RecipeError
from ray_merge.plan import make_plan, read_inputs
from ray_merge.recipe import expand, load_recipe
from tiny import (
    Q0,
    V1,
    factors,
    llama_tensors,
    plan_of,
    tables,
    write_adapter,
    write_base,
    write_recipe_files,
)


@pytest.fixture
def recipe(tmp_path):
    return write_recipe_files(tmp_path)


def test_a_plan_knows_sites_shards_and_bytes_without_reading_weights(recipe):
    plan = plan_of(recipe)
    assert {name: site.tensor for name, site in plan.sites.items()} == {
        Q0: f"{Q0}.weight",
        V1: f"{V1}.weight",
    }
    assert [site.name for site in plan.touched(plan.merges[0])] == [Q0, V1]
    assert [shard.name for shard in plan.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert sum(t.n_bytes for shard in plan.shards for t in shard.tensors) == plan.base.n_bytes
    assert plan.read_bytes == plan.base.n_bytes
    assert plan.write_bytes == plan.checkpoint_bytes
    assert plan.warnings == ()
    assert plan.renamed == {"a": {}, "b": {}}


def test_names_that_differ_from_the_disk_are_listed(recipe, tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    write_base(tmp_path / "base", bare)
    disk = Q0.removeprefix("model.")
    plan = plan_of(recipe)
    assert plan.renamed["a"] == {f"{Q0}.weight": (f"{disk}.weight",)}
    assert plan.sites[disk].tensor == f"{disk}.weight"
    assert plan.adapters["a"].modules == {disk: Q0}
    assert plan.adapters["a"].names == "runtime model.* -> disk *"


def test_a_plan_can_be_sent_to_another_process(recipe):
    plan = plan_of(recipe)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_only_the_adapters_that_a_merge_uses_are_opened(recipe):
    recipe["adapters"]["gone"] = "/nowhere"
    recipe["merges"][0]["adapters"] = ["a"]
    plan = plan_of(recipe)
    assert list(plan.adapters) == ["a"]
    assert [site.name for site in plan.touched(plan.merges[0])] == [Q0]


def test_an_adapter_without_a_path_cannot_be_merged(recipe):
    recipe["adapters"]["a"] = {"data": "/data.parquet"}
    with pytest.raises(RecipeError, match="adapter a has no path"):
        plan_of(recipe)


def test_a_pickle_is_converted_only_where_the_recipe_allows_it(recipe, tmp_path):
    converted = tmp_path / "converted.safetensors"
    (tmp_path / "a" / "adapter_model.safetensors").rename(converted)
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"pickle")
    parsed, source = load_recipe(recipe)
    with pytest.raises(CheckpointError, match="allow_pickle: true"):
        read_inputs(parsed, expand(parsed, source), lambda store, info: converted)
    recipe["adapters"]["a"] = {"path": recipe["adapters"]["a"], "allow_pickle": True}
    parsed, source = load_recipe(recipe)
    _, stored = read_inputs(parsed, expand(parsed, source), lambda store, info: converted)
    assert (stored["a"].pickled, stored["b"].pickled) == (True, False)


def saved_norm(tmp_path, name):
    saved = {"base_model.model.model.norm.weight": torch.ones(8)}
    write_adapter(tmp_path / name, factors((Q0, V1)[name == "b"]) | saved, modules_to_save=["norm"])


def test_a_saved_module_takes_the_place_of_the_bases(recipe, tmp_path):
    saved_norm(tmp_path, "a")
    recipe["merges"].append({"name": "n", "merge_method": "cat", "adapters": ["b"]})
    plan = plan_of(recipe)
    owners = [
        {
            t.name: (t.owner, t.source.name)
            for shard in plan.shards
            for t in plan.tensors(merge, shard)
            if t.owner
        }
        for merge in plan.merges
    ]
    key = "base_model.model.model.norm.weight"
    assert owners == [{"model.norm.weight": ("a", key)}, {}]


def test_heads_of_several_adapters_stay_apart_and_the_bases_stays(recipe, tmp_path):
    write_base(tmp_path / "base", llama_tensors() | {"score.weight": torch.zeros(3, 8)})
    head = {"base_model.model.score.weight": torch.ones(3, 8)}
    for name, module in (("a", Q0), ("b", V1)):
        write_adapter(tmp_path / name, factors(module) | head, modules_to_save=["score"], task_type="SEQ_CLS")
    recipe["merges"].append({"name": "n", "merge_method": "cat", "adapters": ["b"]})
    plan = plan_of(recipe)
    assert plan.replaced(plan.merges[0]) == {}
    assert {tensor: name for tensor, (name, _) in plan.replaced(plan.merges[1]).items()} == {
        "score.weight": "b"
    }
    assert [len(plan.adapters[name].heads) for name in "ab"] == [1, 1]


def test_a_resized_table_counts_in_the_bytes_of_its_merge_alone(recipe, tmp_path):
    write_adapter(tmp_path / "a", factors(Q0) | tables(20))
    recipe["merges"].append({"name": "n", "merge_method": "cat", "adapters": ["b"]})
    plan = plan_of(recipe)
    assert plan.merge_bytes(plan.merges[1]) == plan.checkpoint_bytes
    assert plan.write_bytes == plan.merge_bytes(plan.merges[0]) + plan.checkpoint_bytes
    grew = plan.merge_bytes(plan.merges[0]) - plan.checkpoint_bytes
    assert (
        2 * 4 * 8 * 4 <= grew < 2 * 4 * 8 * 4 + 64
    )  # four rows of two float32 tables, and digits in the header


def test_grown_rows_without_a_tokenizer_are_a_warning(recipe, tmp_path):
    write_adapter(tmp_path / "a", factors(Q0) | tables(20))
    (warning,) = plan_of(recipe).warnings
    assert re.search(r"adapter a has 20 rows in \S+\.weight and no tokenizer beside it", warning)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert plan_of(recipe).warnings == ()


def test_dora_is_refused_where_a_method_works_on_factors(recipe, tmp_path):
    magnitude = {f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(8)}
    write_adapter(tmp_path / "a", factors(Q0) | magnitude, use_dora=True)
    for method, parameters, dense in (
        ("task_arithmetic", {}, True),
        ("linear", {}, True),
        ("linear", {"compat": "peft"}, False),
        ("ties", {"scope": "tensor"}, True),
        ("ties", {"scope": "tensor", "space": "core"}, False),
        ("dare_ties", {}, True),
        ("knots_ties", {"scope": "tensor"}, False),
        ("cat", {}, False),
        ("svd", {"rank": 2}, False),
    ):
        recipe["merges"] = [{"name": "m", "merge_method": method, "parameters": parameters}]
        if dense:
            assert plan_of(recipe).merges
        else:
            with pytest.raises(
                RecipeError, match=rf"{method} works on factors, but an adapter is DoRA \(at {Q0}"
            ):
                plan_of(recipe)


def test_a_filter_that_matches_no_site_is_a_warning(recipe):
    recipe["merges"][0]["parameters"] = {
        "lambda": [{"filter": "k_proj", "value": 1}, {"filter": "q_proj", "value": 2}]
    }
    assert plan_of(recipe).warnings == ("merge 'm': lambda filter 'k_proj' matches no site",)


def test_two_owners_of_one_parameter_are_refused_in_a_merge_and_not_in_a_recipe(recipe, tmp_path):
    for name in "ab":
        saved_norm(tmp_path, name)
    with pytest.raises(RecipeError, match="adapters a and b both saved a value of its own"):
        plan_of(recipe)
    recipe["merges"] = [{"name": name, "merge_method": "cat", "adapters": [name]} for name in "ab"]
    assert len(plan_of(recipe).merges) == 2


def test_a_damaged_index_is_found_by_planning(recipe, tmp_path):
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "m.safetensors")
    index = {"weight_map": {"lm_head.weight": "m.safetensors"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="stale index"):
        plan_of(recipe)


def test_a_plan_is_made_of_headers_alone(recipe, tmp_path):
    # The files may be gone by then: everything that planning needs was read before.
    parsed, source = load_recipe(recipe)
    merges = expand(parsed, source)
    inputs = read_inputs(parsed, merges)
    expected = plan_of(recipe)
    for name in ("base", "a", "b"):
        (tmp_path / name).rename(tmp_path / f"{name}-gone")
    assert make_plan(parsed, merges, *inputs) == expected


def test_cross_terms_of_biases_are_refused(tmp_path):
    recipe = write_recipe_files(tmp_path, ("a",))
    write_base(tmp_path / "base", llama_tensors() | {f"{Q0}.bias": torch.zeros(8)})
    write_adapter(tmp_path / "a", factors(Q0) | {f"base_model.model.{Q0}.bias": torch.ones(8)}, bias="all")
    recipe["merges"] = [{"name": "m", "merge_method": "linear", "parameters": {"compat": "peft"}}]
    with pytest.raises(RecipeError, match="remove compat: peft"):
        plan_of(recipe)


@pytest.mark.parametrize(("method", "compat"), [("robustmerge", "authors"), ("linear", "peft")])
def test_factors_of_different_ranks_are_not_added_up(tmp_path, method, compat):
    recipe = write_recipe_files(tmp_path, ("a", "b", "c", "d", "e", "f"))
    write_adapter(tmp_path / "e", factors(Q0) | factors(V1, rank=3), r=3, rank_pattern={"q_proj": 2})
    for name in "bd":
        write_adapter(tmp_path / name, factors(V1))
    write_adapter(tmp_path / "c", factors(V1) | factors(Q0))
    recipe["merges"] = [
        {"name": "fits", "merge_method": method, "adapters": ["a", "b", "c", "d", "f"]},
        {"name": "exact", "merge_method": method, "adapters": ["b", "e"]},
        {"name": "wide", "merge_method": method, "adapters": ["b", "c", "d", "f", "e", "a"]},
    ]
    for merge in recipe["merges"][::2]:
        merge["parameters"] = {"compat": compat}
    refusal = (
        rf"merge 'wide': {method} with compat {compat} adds up factors and needs equal ranks, but at {re.escape(V1)} "
        rf"b c d \.\.\. \(4\) have rank 2, e has rank 3; remove `compat: {compat}`"
    )
    with pytest.raises(RecipeError, match=refusal):
        plan_of(recipe)
    del recipe["merges"][2]
    assert len(plan_of(recipe).merges) == 2


def test_ranks_of_headers_that_were_not_fitted_themselves_are_compared(tmp_path):
    recipe = write_recipe_files(tmp_path, ("a", "b", "c"))
    for name, rank in (("a", 2), ("b", 2), ("c", 5)):
        write_adapter(tmp_path / name, factors(Q0, rank), r=rank)
    recipe["merges"] = [{"name": "m", "merge_method": "robustmerge", "parameters": {"compat": "authors"}}]
    with pytest.raises(RecipeError, match=rf"at {re.escape(Q0)} a b have rank 2, c has rank 5"):
        plan_of(recipe)
    recipe["merges"][0]["adapters"] = ["a", "b"]
    assert plan_of(recipe).merges


def test_a_resized_table_without_a_vocabulary_size_to_follow_is_refused(tmp_path):
    recipe = write_recipe_files(tmp_path, ("a",))
    write_base(tmp_path / "base", config={"model_type": "llama", "vocab_size": 99})
    tables = {f"base_model.model.{n}.weight": torch.ones(20, 8) for n in ("model.embed_tokens", "lm_head")}
    write_adapter(tmp_path / "a", factors(Q0) | tables)
    with pytest.raises(RecipeError, match="no vocab_size of 16"):
        plan_of(recipe)
