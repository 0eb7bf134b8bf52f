"""How many outputs a task's head gives, from headers of adapters whose heads have a hidden layer."""

from functools import partial

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from ray_merge.errors import RecipeError
from ray_merge.moments import fit_all
from ray_merge.plan.fisher import plan_fisher
from ray_merge.plan.moments import TaskData
from ray_merge.recipe import load_recipe

HIDDEN = 8
SIZES = {
    "Roberta": {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    },
    "DistilBert": {"dim": HIDDEN, "n_layers": 1, "n_heads": 2, "hidden_dim": 8},
}
LABELS = {"few": 3, "as_many": HIDDEN, "many": 12}
"""Classes: fewer than units of the hidden layer, as many, and more."""


@pytest.fixture(scope="module", params=SIZES)
def plan(request, tmp_path_factory):
    """(labels, names) -> the plan."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=40, **SIZES[family])
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder / "base")
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    for name, count in {**LABELS, "too_many": 101}.items():
        model = kind.from_pretrained(folder / "base", num_labels=count)
        lora = LoraConfig(r=2, target_modules=["query", "q_lin"], task_type="SEQ_CLS")
        get_peft_model(model, lora).save_pretrained(folder / name)
    return partial(plan_of, folder)


def plan_of(folder, labels, names):
    adapters = {name: {"path": str(folder / name), "data": str(folder / "x.jsonl")} for name in names}
    recipe, _ = load_recipe(
        {"base_model": str(folder / "base"), "output": str(folder / "out"), "adapters": adapters}
    )
    fitted = fit_all(recipe, folder / "cache")
    tasks = [TaskData(name, one.data, fitted.adapters[name]) for name, one in recipe.adapters.items()]
    return plan_fisher(recipe, fitted.base, tasks, fitted.sites, labels)


def test_outputs_are_those_of_the_last_layer_of_the_head(plan):
    (found,) = plan("expected", LABELS)
    assert {name: one.n_outputs for name, one in found.likelihoods.items()} == LABELS
    assert {one.head for one in found.likelihoods.values()} == {"classification"}


def test_more_labels_than_are_run_are_counted_behind_a_narrow_layer_too(plan):
    with pytest.raises(RecipeError, match=r"adapters\.too_many: .* each of its 101 labels, at most 100"):
        plan("expected", ["too_many"])
