import pytest
import yaml

from ray_merge.drive.identify import merge_id, merge_inputs, read_inputs_identity
from ray_merge.drive.resolved import resolved_recipe
from ray_merge.plan import make_plan, read_inputs
from ray_merge.recipe import expand, load_recipe
from ray_merge.storage.commit import id_line
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores
from tiny import Q0, factors, plan_of, write_adapter, write_recipe_files

ENTRIES = {
    "plain": {"merge_method": "task_arithmetic", "parameters": {"weight": {"a": 0.7, "b": 0.3}}},
    "sweep": {"merge_method": "cat", "sweep": {"lambda": [0.2, 1, 1e-3], "weight": [0.5, {"a": 1, "b": 2}]}},
    "pairs": {"merge_method": "cat", "combinations": {"choose": [1, 2]}, "parameters": {"weight": {"a": 1, "b": 2}}},
    "both": {
        "merge_method": "dare_ties", "seed": 7, "combinations": {"choose": 1}, "sweep": {"compat": ["paper", "peft"]},
        "parameters": {"density": [{"filter": "q_proj|v_proj", "value": {"a": 0.5, "b": 0.25}}]},
    },
    "part": {
        "merge_method": "cat", "combinations": {"choose": 1},
        "sweep": {"weight": [{"a": 1, "b": 2}, [{"filter": "q", "value": {"a": 3, "b": 4}}]]},
    },
    "export": {"merge_method": "svd", "parameters": {"rank": 2}, "export": "both", "adapters": ["b", "a"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ENTRIES)
def test_the_resolved_recipe_makes_the_same_merge_with_the_same_id(tmp_path, kind):
    recipe = write_recipe_files(tmp_path) | {
        "merges": [{"name": "m", **ENTRIES[kind]}],
        "out_dtype": "bfloat16",
    }
    plan = plan_of(recipe)
    digests = DigestCache(tmp_path / "digests")
    inputs = read_inputs_identity(plan, digests, Stores())
    for merge in plan.merges:
        ident = merge_id(merge_inputs(plan, merge, inputs))
        again, source = load_recipe("recipe.yaml", resolved_recipe(plan, merge, ident).decode())
        (same,) = expand(again, source)
        assert (same.name, same.parameters, same.adapters) == (merge.name, merge.parameters, merge.adapters)
        second = make_plan(again, [same], *read_inputs(again, [same]))
        assert merge_id(merge_inputs(second, same, read_inputs_identity(second, digests, Stores()))) == ident


def test_the_first_line_names_the_id_and_a_second_writing_gives_the_same_bytes(tmp_path):
    plan = plan_of(write_recipe_files(tmp_path))
    text = resolved_recipe(plan, plan.merges[0], "c" * 64)
    assert text.startswith(id_line("c" * 64).encode())
    assert text == resolved_recipe(plan, plan.merges[0], "c" * 64)


def test_every_default_is_written_out(tmp_path):
    plan = plan_of(write_recipe_files(tmp_path))
    (merge,) = yaml.safe_load(resolved_recipe(plan, plan.merges[0], "c" * 64))["merges"]
    assert merge["parameters"] == {"weight": {"a": 1.0, "b": 1.0}, "lambda": 1.0, "normalize": False}
    assert (merge["seed"], merge["export"]) == (0, "checkpoint")


def test_a_relative_recipe_is_resolved_to_where_its_inputs_are(tmp_path, monkeypatch):
    recipe = write_recipe_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = plan_of(recipe | {"base_model": "base", "adapters": {"a": "a", "b": "./b/"}})
    document = yaml.safe_load(resolved_recipe(plan, plan.merges[0], "c" * 64))
    assert document["base_model"] == str(tmp_path / "base")
    assert [adapter["path"] for adapter in document["adapters"].values()] == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    ]


def test_bases_that_were_declared_equal_stay_declared(tmp_path):
    plan = plan_of(write_recipe_files(tmp_path) | {"base_model_names": ["org/one", "org/two"]})
    document = yaml.safe_load(resolved_recipe(plan, plan.merges[0], "c" * 64))
    assert document["base_model_names"] == ["org/one", "org/two"]


def test_what_decides_how_adapters_are_read_is_kept_and_defaults_are_not_written(tmp_path):
    recipe = write_recipe_files(tmp_path)
    plain = yaml.safe_load(resolved_recipe(plan_of(recipe), plan_of(recipe).merges[0], "c" * 64))
    assert not {"tied", "base_numerics", "key_mapping"} & plain.keys()
    assert list(plain["adapters"]["a"]) == ["path"]
    write_adapter(tmp_path / "a", factors(Q0), init_lora_weights="olora")
    write_adapter(tmp_path / "initial", factors(Q0), init_lora_weights="olora")
    own = {"initial": str(tmp_path / "initial"), "key_mapping": {"^x$": "y", "^a$": "b"}, "allow_pickle": True,
           "moe_lora_b_layout": "rank_major"}  # fmt: skip
    recipe["adapters"]["a"] = {"path": recipe["adapters"]["a"], **own}
    whole = {"tied": "untie", "base_numerics": "dequantise", "key_mapping": {"^z$": "w", "^c$": "d"}}
    plan = plan_of(recipe | whole)
    document = yaml.safe_load(resolved_recipe(plan, plan.merges[0], "c" * 64))
    assert {key: document[key] for key in whole} == whole
    assert document["adapters"]["a"] == {"path": str(tmp_path / "a"), **own}
    for mapping in (document["key_mapping"], document["adapters"]["a"]["key_mapping"]):
        assert list(mapping) in (["^z$", "^c$"], ["^x$", "^a$"])  # rules are applied in order


@pytest.mark.parametrize("keys", [{"export_rank": 2}, {"export_tolerance": 0.25}])
def test_how_far_an_export_may_be_truncated_is_kept(tmp_path, keys):
    recipe = write_recipe_files(tmp_path)
    recipe["merges"][0] |= {"export": "both", **keys}
    plan = plan_of(recipe)
    (merge,) = yaml.safe_load(resolved_recipe(plan, plan.merges[0], "c" * 64))["merges"]
    assert {key: merge[key] for key in keys} == keys


def test_adapters_of_other_merges_are_left_out(tmp_path):
    recipe = write_recipe_files(tmp_path)
    recipe["merges"].append({"name": "n", "merge_method": "cat", "adapters": ["b"]})
    plan = plan_of(recipe)
    assert list(yaml.safe_load(resolved_recipe(plan, plan.merges[1], "c" * 64))["adapters"]) == ["b"]
