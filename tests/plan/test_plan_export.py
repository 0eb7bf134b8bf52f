import re

import pytest
import torch

from ray_merge.errors import RecipeError
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

P = "base_model.model."


@pytest.fixture
def recipe(tmp_path):
    found = write_recipe_files(tmp_path)
    found["merges"][0]["export"] = "adapter"
    return found


def refusal(recipe):
    with pytest.raises(RecipeError) as caught:
        plan_of(recipe)
    return str(caught.value)


def test_an_exported_merge_needs_no_pass_over_the_base(recipe):
    assert plan_of(recipe).groups == ()


def test_a_method_without_a_low_rank_form_cannot_be_exported_as_an_adapter(recipe):
    recipe["merges"][0] |= {"merge_method": "ties", "parameters": {"scope": "tensor"}}
    assert re.search(
        r"ties in dense space has no exact low-rank form.*space: core or space: knots", refusal(recipe)
    )
    recipe["merges"][0]["parameters"]["space"] = "core"
    assert plan_of(recipe).groups == ()


def test_adapters_of_two_model_classes_have_no_common_adapter(recipe, tmp_path):
    write_adapter(tmp_path / "b", factors(V1), task_type="SEQ_CLS")
    recipe["merges"][0]["export"] = "both"
    assert "adapter a has task_type CAUSAL_LM, adapter b SEQ_CLS" in refusal(recipe)
    assert "write export_class: CAUSAL_LM or export_class: SEQ_CLS for the class" in refusal(recipe)
    recipe["merges"][0]["export"] = "checkpoint"
    assert plan_of(recipe).merges


def test_adapters_that_call_one_module_by_two_names_have_no_common_adapter(recipe, tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    write_base(tmp_path / "base", bare)
    disk = Q0.removeprefix("model.")
    write_adapter(tmp_path / "b", factors(disk))
    assert f"{disk} is {Q0} in adapter a and {disk} in b" in refusal(recipe)
    recipe["merges"][0]["export"] = "checkpoint"
    assert len(plan_of(recipe).sites) == 1


TABLE = llama_tensors()["model.embed_tokens.weight"]
BEYOND = {
    "DoRA": (
        factors(Q0) | {f"{P}{Q0}.lora_magnitude_vector": torch.ones(HIDDEN)},
        {"use_dora": True},
        f"a DoRA magnitude at {Q0}",
    ),
    "a trained bias": (
        factors(Q0) | {f"{P}{Q0}.bias": torch.ones(HIDDEN)},
        {"bias": "all"},
        f"a trained {Q0}.bias",
    ),
    "a bias on B": (
        factors(Q0) | {f"{P}{Q0}.lora_B.bias": torch.ones(HIDDEN)},
        {"lora_bias": True},
        f"a bias on B at {Q0}.bias",
    ),
    "a saved table": (
        factors(Q0) | {f"{P}model.embed_tokens.weight": TABLE},
        {},
        "a saved model.embed_tokens.weight",
    ),
    "tokens": (
        factors(Q0) | {f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, HIDDEN)},
        {"trainable_token_indices": [1, 3]},
        "trained tokens of model.embed_tokens.weight",
    ),
    "MultiheadAttention": (
        factors("attn", rows=3 * HIDDEN),
        {},
        "factors of a MultiheadAttention at attn.in_proj_weight",
    ),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_a_plain_lora_adapter_cannot_hold_is_not_exported(recipe, tmp_path, case):
    tensors, config, words = BEYOND[case]
    extra = {f"{Q0}.bias": torch.zeros(HIDDEN), "attn.in_proj_weight": torch.zeros(3 * HIDDEN, HIDDEN)}
    write_base(tmp_path / "base", llama_tensors() | extra)
    write_adapter(tmp_path / "a", tensors, **config)
    message = refusal(recipe)
    assert (
        f"adapter a has {words}, which a merged LoRA adapter cannot hold; use export: checkpoint" in message
    )
    recipe["merges"][0]["export"] = "checkpoint"
    assert plan_of(recipe).merges


def test_heads_are_kept_apart_and_are_no_reason_to_refuse(recipe, tmp_path):
    head = {f"{P}score.weight": torch.ones(3, HIDDEN)}
    for name, module in (("a", Q0), ("b", V1)):
        write_adapter(tmp_path / name, factors(module) | head, modules_to_save=["score"], task_type="SEQ_CLS")
    assert plan_of(recipe).merges


def test_a_head_that_the_base_has_too_is_no_reason_to_refuse(recipe, tmp_path):
    write_base(tmp_path / "base", llama_tensors() | {"score.weight": torch.zeros(3, HIDDEN)})
    head = {f"{P}score.weight": torch.ones(3, HIDDEN)}
    for name, module in (("a", Q0), ("b", V1)):
        write_adapter(tmp_path / name, factors(module) | head, modules_to_save=["score"], task_type="SEQ_CLS")
    assert plan_of(recipe).merges


def test_a_rank_and_a_tolerance_belong_to_an_export_and_exclude_each_other(recipe):
    for keys in ({"export_rank": 2}, {"export_tolerance": 0.1}):
        recipe["merges"] = [{"name": "m", "merge_method": "cat", "export": "checkpoint", **keys}]
        assert "export_rank and export_tolerance belong to an exported adapter" in refusal(recipe)
        recipe["merges"][0]["export"] = "both"
        assert plan_of(recipe).merges
    recipe["merges"] = [
        {"name": "m", "merge_method": "cat", "export": "both", "export_rank": 2, "export_tolerance": 0.1}
    ]
    assert "give export_rank or export_tolerance, not both" in refusal(recipe)


def test_a_merge_without_factors_is_no_adapter(recipe, tmp_path):
    head = {f"{P}score.weight": torch.ones(3, HIDDEN)}
    for name in "ab":
        write_adapter(tmp_path / name, head, modules_to_save=["score"])
    assert "its adapters have no factors to export; use export: checkpoint" in refusal(recipe)
    recipe["merges"][0]["export"] = "checkpoint"
    assert plan_of(recipe).merges
