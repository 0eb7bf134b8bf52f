import json
from pathlib import Path

import pytest
import torch

from ray_merge.drive.identify import merge_id, merge_inputs, read_inputs_identity
from ray_merge.errors import AdapterError
from ray_merge.identity import difference
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores
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


def document(recipe, tmp_path, number=0):
    plan = plan_of(recipe)
    inputs = read_inputs_identity(plan, DigestCache(tmp_path / "digests", settle_seconds=0), Stores())
    return merge_inputs(plan, plan.merges[number], inputs)


def ident(recipe, tmp_path):
    return merge_id(document(recipe, tmp_path))


def test_the_same_inputs_give_the_same_id(recipe, tmp_path):
    assert ident(recipe, tmp_path) == ident(recipe, tmp_path)
    assert len(ident(recipe, tmp_path)) == 64


def test_moving_everything_keeps_the_id(recipe, tmp_path):
    before = ident(recipe, tmp_path)
    (tmp_path / "moved").mkdir()
    for name in ("base", "a", "b"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    recipe["base_model"] = str(tmp_path / "moved" / "base")
    recipe["adapters"] = {name: str(tmp_path / "moved" / name) for name in "ab"}
    recipe["output"] = "/elsewhere"
    assert ident(recipe, tmp_path) == before


def test_a_default_written_out_and_another_spelling_keep_the_id(recipe, tmp_path):
    before = ident(recipe, tmp_path)
    recipe["merges"][0] |= {
        "parameters": {"lambda": 1, "weight": {"a": 1, "b": 1.0}, "normalize": None},
        "seed": 0,
    }
    recipe["max_shard_size"] = "1GB"
    assert ident(recipe, tmp_path) == before


CHANGES = {
    "lambda": (
        lambda r: r["merges"][0].update(parameters={"lambda": 0.5}),
        "parameters.lambda: 1.0 there, 0.5 here",
    ),
    "weight": (
        lambda r: r["merges"][0].update(parameters={"weight": {"a": 1, "b": 2}}),
        "parameters.weight.b",
    ),
    "method": (
        lambda r: r["merges"][0].update(merge_method="cat"),
        'method: "task_arithmetic" there, "cat" here',
    ),
    "seed": (lambda r: r["merges"][0].update(seed=1), "seed: 0 there, 1 here"),
    "export": (lambda r: r["merges"][0].update(export="both"), "export"),
    "order": (lambda r: r["merges"][0].update(adapters=["b", "a"]), "adapters[0]"),
    "fewer": (lambda r: r["merges"][0].update(adapters=["a"]), "adapters[1]"),
    "dtype": (lambda r: r.update(dtype="float64"), 'dtype: "float32" there, "float64" here'),
    "out_dtype": (lambda r: r.update(out_dtype="bfloat16"), 'out_dtype: null there, "bfloat16" here'),
    "max_shard_size": (lambda r: r.update(max_shard_size=10**6), "max_shard_size"),
    "tied": (lambda r: r.update(tied="untie"), "tied"),
    "base_numerics": (lambda r: r.update(base_numerics="dequantise"), "base_numerics"),
    "key_mapping": (lambda r: r.update(key_mapping={"^nothing$": "x"}), "key_mapping"),
    "an adapter's key_mapping": (
        lambda r: r["adapters"].update(a={"path": r["adapters"]["a"], "key_mapping": {"^nothing$": "x"}}),
        "adapters[0].key_mapping",
    ),
    "the packing of experts": (
        lambda r: r["adapters"].update(a={"path": r["adapters"]["a"], "moe_lora_b_layout": "rank_major"}),
        "adapters[0].moe_lora_b_layout",
    ),
    "base": (
        lambda r: write_base(Path(r["base_model"]), {**llama_tensors(), "x": torch.ones(1)}),
        "base.model.safetensors",
    ),
    "side file": (
        lambda r: (Path(r["base_model"]) / "tokenizer_config.json").write_text("{ }"),
        "base.tokenizer_config.json",
    ),
    "config": (
        lambda r: write_base(Path(r["base_model"]), config={"model_type": "llama", "x": 1}),
        "base.config.json",
    ),
    "adapter": (
        lambda r: write_adapter(Path(r["adapters"]["b"]), factors(Q0)),
        "adapters[1].files.adapter_model.safetensors",
    ),
    "scale": (
        lambda r: write_adapter(Path(r["adapters"]["b"]), factors(V1), lora_alpha=5),
        "adapters[1].files.adapter_config.json",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_result_changes_the_id_and_is_named(recipe, tmp_path, change):
    before = document(recipe, tmp_path)
    apply, words = CHANGES[change]
    apply(recipe)
    after = document(recipe, tmp_path)
    assert merge_id(before) != merge_id(after)
    assert difference(before, after).startswith(words)


def test_the_id_is_that_of_plain_json(recipe, tmp_path):
    found = document(recipe, tmp_path)
    assert json.loads(json.dumps(found)) == found


def test_the_task_of_an_adapter_counts_where_it_is_written_into_a_head(recipe, tmp_path):
    before = ident(recipe, tmp_path)
    recipe["adapters"]["a"] = {"path": recipe["adapters"]["a"], "task": "regression"}
    assert ident(recipe, tmp_path) == before
    head = {"base_model.model.score.weight": torch.ones(3, 8)}
    write_adapter(tmp_path / "a", factors(Q0) | head, modules_to_save=["score"])
    with_task = ident(recipe, tmp_path)
    del recipe["adapters"]["a"]["task"]
    assert ident(recipe, tmp_path) != with_task


def test_an_export_s_rank_and_tolerance_count_where_there_is_an_export(recipe, tmp_path):
    ids = []
    for keys in ({}, {"export_rank": 2}, {"export_rank": 3}, {"export_tolerance": 0.1}):
        recipe["merges"] = [{"name": "m", "merge_method": "cat", "export": "both", **keys}]
        ids.append(ident(recipe, tmp_path))
    assert len(set(ids)) == 4
    assert "export_rank" not in document(
        recipe | {"merges": [{"name": "m", "merge_method": "cat"}]}, tmp_path
    )


def test_the_initial_adapter_is_an_input(recipe, tmp_path):
    write_adapter(tmp_path / "a", factors(Q0), init_lora_weights="pissa")
    write_adapter(tmp_path / "initial", factors(Q0), init_lora_weights="pissa")
    recipe["adapters"]["a"] = {"path": recipe["adapters"]["a"], "initial": str(tmp_path / "initial")}
    before = document(recipe, tmp_path)
    changed = {name: tensor + 1 for name, tensor in factors(Q0).items()}
    write_adapter(tmp_path / "initial", changed, init_lora_weights="pissa")
    after = document(recipe, tmp_path)
    assert difference(before, after).startswith("adapters[0].files.initial/adapter_model.safetensors")


@pytest.mark.parametrize(("rows", "counts"), [(16, False), (20, True)])
def test_an_adapter_s_tokenizer_counts_where_it_grew_the_vocabulary(recipe, tmp_path, rows, counts):
    write_adapter(tmp_path / "a", factors(Q0) | tables(rows))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    before = ident(recipe, tmp_path)
    (tmp_path / "a" / "tokenizer.json").write_text("{ }")
    assert (ident(recipe, tmp_path) != before) is counts


def train_on(tmp_path, name):
    write_adapter(tmp_path / "a", factors(Q0), base_model_name_or_path=str(name))


def test_an_adapter_trained_on_a_local_folder_with_other_weights_is_refused(recipe, tmp_path):
    write_base(tmp_path / "other", {name: tensor + 1 for name, tensor in llama_tensors().items()})
    train_on(tmp_path, tmp_path / "other")
    with pytest.raises(AdapterError, match=r"adapter a was trained on .*other, whose weights differ"):
        ident(recipe, tmp_path)
    recipe["base_model_names"] = [str(tmp_path / "other")]
    assert ident(recipe, tmp_path)


def test_a_copy_of_the_base_is_the_same_base(recipe, tmp_path):
    write_base(tmp_path / "copy")
    train_on(tmp_path, tmp_path / "copy")
    assert ident(recipe, tmp_path)


@pytest.mark.parametrize("name", ["", "x" * 5000, "bad\0name", "/root/secret/base", "org/model"])
def test_a_training_base_that_cannot_be_looked_at_is_no_error(recipe, tmp_path, monkeypatch, name):
    write_base(tmp_path)  # so that an empty name, taken for the working directory, would find another model
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    train_on(tmp_path, name)
    assert ident(recipe, tmp_path)


def test_a_folder_that_holds_no_model_any_more_is_no_error(recipe, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    train_on(tmp_path, tmp_path / "other")
    assert ident(recipe, tmp_path)
