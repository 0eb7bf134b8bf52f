"""`export_class`: one adapter of inputs that were trained in different model classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import ray_merge
from ray_merge.errors import RecipeError
from tiny import factors, write_adapter
from zoo import lora, tiny_bert, tiny_llama

IDS = torch.tensor([[5, 9, 17, 30]])


@pytest.fixture
def recipe(tmp_path) -> dict[str, Any]:
    """A BERT, a classifier of it (`bert.encoder...`) and an encoder (`encoder...`) that share some sites."""
    base = tiny_bert(tmp_path / "base")
    classifier = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    lora(classifier, tmp_path / "a", ["query", "value"], seed=1, task_type="SEQ_CLS")
    lora(
        BertModel.from_pretrained(base),
        tmp_path / "b",
        ["value", "key"],
        seed=2,
        task_type="FEATURE_EXTRACTION",
    )
    return {
        "base_model": str(base),
        "output": str(tmp_path / "out"),
        "adapters": {name: str(tmp_path / name) for name in "ab"},
        "merges": [{"name": "m", "merge_method": "task_arithmetic", "export": "both"}],
    }


def of_class(recipe: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
    return {**recipe, "merges": [{**recipe["merges"][0], "export_class": name, **more}]}


def run(recipe: dict[str, Any], folder: Path) -> Path:
    ray_merge.run(recipe, engine="local", workers=1, cache_dir=folder / "cache")
    return Path(recipe["output"]) / "m"


def refusal(recipe: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        ray_merge.plan(recipe)
    return str(caught.value)


@torch.no_grad()
def hidden(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, output_hidden_states=True).hidden_states[-1]
    return found


@pytest.mark.parametrize(
    ("name", "cls", "written"),
    [
        ("SEQ_CLS", BertForSequenceClassification, None),
        ("FEATURE_EXTRACTION", BertModel, "FEATURE_EXTRACTION"),
    ],
)
def test_the_adapter_loads_into_that_class_and_is_the_merged_checkpoint(tmp_path, recipe, name, cls, written):
    out = run(of_class(recipe, name), tmp_path)
    model = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), out / "adapter")
    wanted = hidden(cls.from_pretrained(out).eval())
    assert torch.allclose(hidden(model.eval()), wanted, atol=1e-5)
    assert not torch.allclose(hidden(cls.from_pretrained(tmp_path / "base").eval()), wanted, atol=1e-2)
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (written, None)
    assert f"  export_class: {name}\n" in (out / "ray_merge/recipe.yaml").read_text()
    assert ray_merge.verify(str(out))[0].probed


def test_without_it_both_classes_and_the_ways_out_are_named(recipe):
    message = refusal(recipe)
    assert "adapter a has task_type SEQ_CLS, adapter b FEATURE_EXTRACTION" in message
    assert "write export_class: SEQ_CLS or export_class: FEATURE_EXTRACTION" in message
    assert "export_class: CAUSAL_LM is the task_type of none" in refusal(of_class(recipe, "CAUSAL_LM"))
    config = Path(recipe["adapters"]["b"]) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": None}))
    assert refusal(of_class(recipe, "None")).endswith("known: SEQ_CLS")
    assert "export_class belongs to an exported adapter" in refusal(
        of_class(recipe, "SEQ_CLS", export="checkpoint")
    )


def test_it_is_part_of_the_id(tmp_path, recipe):
    run(of_class(recipe, "SEQ_CLS"), tmp_path)
    with pytest.raises(ray_merge.errors.OutputConflict, match="export_class"):
        run(of_class(recipe, "FEATURE_EXTRACTION"), tmp_path)


def test_a_site_that_the_class_does_not_have_is_refused(tmp_path):
    base = tiny_llama(tmp_path / "base")
    write_adapter(
        tmp_path / "a", factors("lm_head", rows=64, columns=32)
    )  # PEFT would save the whole table beside it
    classifier = LlamaForSequenceClassification.from_pretrained(base)
    lora(classifier, tmp_path / "b", ["v_proj"], seed=2, task_type="SEQ_CLS")
    recipe = {
        "base_model": str(base),
        "output": str(tmp_path / "out"),
        "adapters": {name: str(tmp_path / name) for name in "ab"},
        "merges": [
            {"name": "m", "merge_method": "task_arithmetic", "export": "adapter", "export_class": "SEQ_CLS"}
        ],
    }
    assert "adapter a changes lm_head.weight, which LlamaForSequenceClassification does not have" in refusal(
        recipe
    )
    recipe["merges"][0]["export_class"] = "CAUSAL_LM"
    plan = ray_merge.plan(recipe)
    assert plan.module(plan.merges[0], "model.layers.0.self_attn.v_proj") == "model.layers.0.self_attn.v_proj"


def test_a_tied_embedding_is_the_embedding_and_not_the_head(tmp_path):
    base = tiny_llama(tmp_path / "base", tied=True)
    lora(LlamaForCausalLM.from_pretrained(base), tmp_path / "a", ["q_proj"], seed=1, task_type="CAUSAL_LM")
    write_adapter(
        tmp_path / "b",
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(2, 64),
            "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(32, 2),
        },
        task_type="SEQ_CLS",
    )
    recipe = {
        "base_model": str(base),
        "output": str(tmp_path / "out"),
        "adapters": {name: str(tmp_path / name) for name in "ab"},
        "merges": [{"name": "m", "merge_method": "task_arithmetic", "export": "both"}],
    }
    out = run(of_class(recipe, "CAUSAL_LM"), tmp_path)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), out / "adapter")
    wanted = LlamaForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.allclose(model.merge_and_unload().eval()(IDS).logits, wanted(IDS).logits, atol=1e-4)
