"""The merged model's logits against PEFT's merge_and_unload, in float32."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import ray_merge
from zoo import llama_adapters, lora, minilm, relative_error, suite, tiny_bert, tiny_llama

TOLERANCE = 1e-5
SPACES = [
    ("task_arithmetic", {}),
    ("linear", {}),
    ("cat", {}),
    ("ties", {"density": 1.0, "scope": "tensor", "space": "dense"}),
    ("ties", {"density": 1.0, "scope": "tensor", "space": "core"}),
    ("knots_ties", {"density": 1.0, "scope": "tensor"}),
    ("dare_linear", {"density": 1.0}),
    ("dare_ties", {"density": 1.0, "space": "core"}),
]
ONE_PER_SPACE = [SPACES[0], SPACES[3], SPACES[4], SPACES[5]]  # of factors, dense, core, knots


def merge(tmp_path: Path, base: Path, adapters: dict[str, str], methods, **recipe) -> Path:
    entries = [
        {"name": f"m{index}", "merge_method": method, "parameters": parameters}
        for index, (method, parameters) in enumerate(methods)
    ]
    ray_merge.run(
        {
            "base_model": str(base),
            "output": str(tmp_path / "out"),
            "adapters": adapters,
            "merges": entries,
            **recipe,
        },
        engine="local",
        cache_dir=tmp_path / "cache",
    )
    return tmp_path / "out"


def causal_logits(model) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) % 64
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_one_adapter_in_any_space_equals_merge_and_unload_on_llama(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_llama(tmp_path / "base")
    adapter = llama_adapters(base, tmp_path / "adapters", 1)
    out = merge(tmp_path, base, adapter, SPACES)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter["a0"])
    want = causal_logits(peft_model.merge_and_unload())
    assert relative_error(causal_logits(AutoModelForCausalLM.from_pretrained(base)), want) > 0.01
    for index, (method, parameters) in enumerate(SPACES):
        got = causal_logits(AutoModelForCausalLM.from_pretrained(out / f"m{index}"))
        assert relative_error(got, want) <= TOLERANCE, (method, parameters)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {"alpha_pattern": {".*layers.0.*q_proj": 5, "q_proj": 11}, "use_rslora": True},
    ],
)
def test_scaling_variants_equal_merge_and_unload(tmp_path, options):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_llama(tmp_path / "base")
    path = lora(
        AutoModelForCausalLM.from_pretrained(base),
        tmp_path / "a",
        ["q_proj", "v_proj"],
        seed=3,
        r=8,
        **options,
    )
    out = merge(tmp_path, base, {"a": str(path)}, [("task_arithmetic", {})])
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    want = causal_logits(peft_model.merge_and_unload())
    assert relative_error(causal_logits(AutoModelForCausalLM.from_pretrained(out / "m0")), want) <= TOLERANCE


def test_task_arithmetic_of_three_adapters_equals_peft_cat(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_llama(tmp_path / "base")
    weights = {"a0": 0.7, "a1": 0.3, "a2": -0.4}
    paths = {}
    for index, name in enumerate(weights):
        model = AutoModelForCausalLM.from_pretrained(base)
        paths[name] = str(
            lora(model, tmp_path / name, ["q_proj", "up_proj"], seed=index, r=2 + index, alpha=5)
        )
    out = merge(tmp_path, base, paths, [("task_arithmetic", {"weight": weights})])
    peft_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), paths["a0"], adapter_name="a0"
    )
    for name in ("a1", "a2"):
        peft_model.load_adapter(paths[name], adapter_name=name)
    peft_model.add_weighted_adapter(list(weights), list(weights.values()), "all", combination_type="cat")
    peft_model.set_adapter("all")
    want = causal_logits(peft_model.merge_and_unload())
    assert relative_error(causal_logits(AutoModelForCausalLM.from_pretrained(out / "m0")), want) <= TOLERANCE


def classify(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def check_classifier(
    tmp_path: Path, base: Path, adapter: Path, labels: int, ids: torch.Tensor, spaces=SPACES
) -> None:
    """Base + adapter in each of `spaces`, its head attached by load_head, against PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    out = merge(tmp_path, base, {"it": str(adapter)}, spaces)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
        want = classify(PeftModel.from_pretrained(start, adapter).merge_and_unload(), ids)
        for index, (method, parameters) in enumerate(spaces):
            model = AutoModelForSequenceClassification.from_pretrained(out / f"m{index}", num_labels=labels)
            head = ray_merge.load_head(model, out / f"m{index}" / "heads" / "it.safetensors")
            assert relative_error(classify(head, ids), want) <= TOLERANCE, (method, parameters)


def test_bert_with_a_head_equals_merge_and_unload(tmp_path):
    from transformers import AutoModelForSequenceClassification

    base = tiny_bert(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapter = lora(model, tmp_path / "a", ["query", "intermediate.dense"], seed=1, task_type="SEQ_CLS")
    check_classifier(tmp_path, base, adapter, 3, torch.arange(20).reshape(2, 10))


# The six have the same sites and ranks, so that one of them tries all spaces: that of the most classes.
@pytest.mark.parametrize(
    ("task", "spaces"),
    [
        ("banking77", SPACES),
        *((task, ONE_PER_SPACE) for task in ("trec", "subj", "sst2", "sst_score", "sick_entailment")),
    ],
)
def test_real_adapters_on_minilm_equal_merge_and_unload(tmp_path, task, spaces):
    adapter = suite() / "adapters" / task
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        labels = file.get_slice("base_model.model.classifier.weight").get_shape()[0]
    check_classifier(tmp_path, minilm(), adapter, labels, torch.randint(1000, 20000, (2, 16)), spaces)


def test_exported_adapter_loads_in_peft_and_equals_the_checkpoint(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_llama(tmp_path / "base")
    adapters = llama_adapters(base, tmp_path / "adapters", 3)
    entries = [
        ("task_arithmetic", {"lambda": 0.4}),
        ("knots_ties", {"scope": "tensor"}),
        ("svd", {"rank": 5}),
    ]
    recipe = {
        "base_model": str(base),
        "output": str(tmp_path / "out"),
        "adapters": adapters,
        "merges": [
            {"name": f"m{i}", "merge_method": m, "parameters": p, "export": "both"}
            for i, (m, p) in enumerate(entries)
        ],
    }
    ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache")
    for index in range(len(entries)):
        folder = tmp_path / "out" / f"m{index}"
        want = causal_logits(AutoModelForCausalLM.from_pretrained(folder))
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
        assert relative_error(causal_logits(loaded), want) <= TOLERANCE


def test_an_exported_classifier_adapter_loads_in_peft_with_its_head_attached_after(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = tiny_bert(tmp_path / "base")
    for index in range(2):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        lora(model, tmp_path / f"a{index}", ["query", "value"], seed=index, task_type="SEQ_CLS")
    recipe = {
        "base_model": str(base),
        "output": str(tmp_path / "out"),
        "adapters": {f"a{index}": str(tmp_path / f"a{index}") for index in range(2)},
        "merges": [{"name": "m", "merge_method": "task_arithmetic", "export": "both"}],
    }
    ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache")
    folder, ids = tmp_path / "out" / "m", torch.arange(20).reshape(2, 10)
    head = folder / "heads" / "a1.safetensors"
    merged = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    want = classify(ray_merge.load_head(merged, head), ids)
    start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    loaded = PeftModel.from_pretrained(ray_merge.load_head(start, head), folder / "adapter")
    assert relative_error(classify(loaded, ids), want) <= TOLERANCE
