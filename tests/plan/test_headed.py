"""`heads: <adapter>`: what is written loads as a classifier, and is the plain merge with that head put on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

import ray_merge
from ray_merge.errors import Refusal
from tiny import factors, write_adapter
from zoo import lora, tiny_bert, tiny_llama

LABELS = {"a": 3, "b": 2}
IDS = torch.tensor([[5, 9, 17, 2], [8, 30, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
TARGETS = {"bert": ["query", "output.dense"], "llama": ["q_proj", "down_proj"]}
HEADS = {"bert": ["classifier.bias", "classifier.weight"], "llama": ["score.weight"]}


def make(folder: Path, kind: str, **options: Any) -> dict[str, Any]:
    """A base, two classifiers of different numbers of labels on it, and a merge without and with a head."""
    base = tiny_bert(folder / "base", **options) if kind == "bert" else tiny_llama(folder / "base", **options)
    for seed, (name, labels) in enumerate(LABELS.items()):
        torch.manual_seed(seed + 7)
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels, pad_token_id=2, ignore_mismatched_sizes=True
        )
        lora(model, folder / name, TARGETS[kind], seed=seed, task_type="SEQ_CLS")
    plain = {"name": "plain", "merge_method": "task_arithmetic"}
    return {
        "base_model": str(base),
        "output": str(folder / "out"),
        "adapters": {name: str(folder / name) for name in LABELS},
        "merges": [
            plain,
            {**plain, "name": "headed", "heads": "a"},
            {**plain, "name": "other", "heads": "b"},
        ],
    }


def run(folder: Path, recipe: dict[str, Any]) -> Path:
    ray_merge.run(recipe, engine="local", workers=1, cache_dir=folder / "cache")
    return Path(recipe["output"])


def loaded(folder: Path, **more: Any) -> tuple[Any, Any]:
    """The classifier, and what transformers missed, did not use or found in another shape."""
    model, about = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, **more
    )
    return model.eval(), about


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, attention_mask=MASK).logits
    return found


def check_equal(out: Path, merge: str, adapter: str) -> dict[str, Any]:
    """The head's checkpoint against the plain one with the head attached; returns its config."""
    model, about = loaded(out / merge)
    assert not about["missing_keys"]
    assert not about["mismatched_keys"]
    plain, _ = loaded(out / "plain", num_labels=LABELS[adapter], pad_token_id=2, ignore_mismatched_sizes=True)
    ray_merge.load_head(plain, out / "plain" / "heads" / f"{adapter}.safetensors")
    assert torch.equal(logits(model), logits(plain))
    config: dict[str, Any] = json.loads((out / merge / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert model.config.num_labels == config["num_labels"] == len(config["id2label"]) == LABELS[adapter]
    assert {str(number): label for label, number in config["label2id"].items()} == config["id2label"]
    assert config["problem_type"] == "single_label_classification"
    return config


def index_of(folder: Path) -> dict[str, str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return dict(index["weight_map"])


@pytest.mark.parametrize("kind", TARGETS)
def test_it_is_the_merged_base_with_that_head(tmp_path, kind):
    recipe = make(tmp_path, kind)
    out = run(tmp_path, recipe)
    for merge, adapter in (("headed", "a"), ("other", "b")):
        config = check_equal(out, merge, adapter)
        assert sorted(load_file(out / merge / "model-head.safetensors")) == HEADS[kind]
        places = index_of(out / merge)
        files = {name: load_file(out / merge / name) for name in {*places.values()}}
        assert {name: file for file, some in files.items() for name in some} == places
    names = [index_of(out / merge) for merge in ("plain", "headed")]
    if kind == "bert":  # transformers 4 refuses a head beside names without the prefix of its class
        assert {*names[1]} == {f"bert.{name}" for name in names[0]} | {*HEADS[kind]}
    if kind == "llama":
        assert {*names[1]} == {*names[0], *HEADS[kind]}
        assert config["pad_token_id"] == 2  # eos: neither the base nor its tokenizer has one
    assert not (out / "plain" / "model-head.safetensors").exists()
    assert "with the head of `b` (2 label(s))" in (out / "other" / "README.md").read_text()
    assert "\n  heads: a\n" in (out / "headed/ray_merge/recipe.yaml").read_text()
    assert "heads" not in (out / "plain/ray_merge/recipe.yaml").read_text()
    assert len(ray_merge.verify(str(out))) == 3
    manifests = [
        json.loads((out / name / "ray_merge/MANIFEST.json").read_text()) for name in ("plain", "headed")
    ]
    assert manifests[0]["id"] != manifests[1]["id"]
    assert manifests[1]["tensors"] == manifests[0]["tensors"] + len(HEADS[kind])
    again = ray_merge.run(recipe, engine="local", workers=1, cache_dir=tmp_path / "cache")
    assert again.units_run == 0


@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_takes_the_place_of_the_bases_own(tmp_path, labels):
    recipe = make(tmp_path, "bert", labels=labels)
    out = run(tmp_path, recipe)
    for merge, adapter in (("headed", "a"), ("other", "b")):
        check_equal(out, merge, adapter)
        assert not (out / merge / "model-head.safetensors").exists()
    assert len(ray_merge.verify(str(out))) == 3


def test_its_weights_are_as_long_as_planned(tmp_path):
    recipe = make(tmp_path, "bert")
    planned = ray_merge.plan(recipe)
    out = run(tmp_path, recipe)
    written = sum(path.stat().st_size for path in out.glob("*/model-*.safetensors"))
    assert written == planned.write_bytes


def refusal(recipe: dict[str, Any], **changed: Any) -> str:
    merge = {"name": "m", "merge_method": "task_arithmetic", "heads": "a", **changed}
    with pytest.raises(Refusal) as caught:
        ray_merge.plan({**recipe, "merges": [merge]})
    return str(caught.value)


def test_what_cannot_have_that_head_is_refused_while_planning(tmp_path):
    recipe = make(tmp_path, "bert")
    assert "heads: 'aa' is none of its adapters" in refusal(recipe, heads="aa")
    assert "heads: 'a' is none of its adapters" in refusal(recipe, adapters=["b"])
    assert "but export: adapter writes none" in refusal(recipe, export="adapter")
    assert "combinations leave a out of some merges" in refusal(recipe, combinations={"choose": 1})
    adapters = {**recipe["adapters"], "a": {"path": recipe["adapters"]["a"], "task": "TOKEN_CLS"}}
    assert "its head is of task type TOKEN_CLS" in refusal({**recipe, "adapters": adapters})


def test_an_adapter_without_a_head_and_a_head_of_another_width_are_refused(tmp_path):
    recipe = make(tmp_path, "llama")
    lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "c", ["q_proj"], seed=9)
    recipe["adapters"]["c"] = str(tmp_path / "c")
    assert f"{tmp_path / 'c'} saved no head" in refusal(recipe, heads="c")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.score.weight"] = torch.ones(3, 16)
    save_file(tensors, path, metadata={"format": "pt"})
    assert "score.weight of" in (words := refusal(recipe))
    assert "is (3, 16), but (3, 32) in LlamaForSequenceClassification" in words


@pytest.mark.parametrize("kind", TARGETS)
def test_evaluate_scores_every_task_by_its_own_head_on_it(tmp_path, kind):
    recipe = make(tmp_path, kind)
    draw = torch.Generator().manual_seed(4)
    for name, labels in LABELS.items():
        ids = torch.randint(3, 64, (40, 5), generator=draw).tolist()
        rows = [{"input_ids": row, "label": index % labels} for index, row in enumerate(ids)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"path": str(tmp_path / f"{name}.jsonl"), "metric": "accuracy"}
        recipe["adapters"][name] = {"path": str(tmp_path / name), "eval": data}
    run(tmp_path, recipe)
    found = ray_merge.evaluate(recipe, engine="local", workers=1, cache_dir=tmp_path / "cache").document
    assert {*found["plain"]} == {*LABELS}
    assert found["headed"] == found["other"] == found["plain"]


def test_an_update_of_what_the_head_replaces_is_refused(tmp_path):
    recipe = make(tmp_path, "bert", labels=5)
    write_adapter(tmp_path / "c", factors("classifier", rows=5, columns=32), task_type=None)
    recipe["adapters"] = {"a": recipe["adapters"]["a"], "c": str(tmp_path / "c")}
    assert "puts its own classifier.weight in the base's place, which adapter c updates" in refusal(recipe)


def test_a_layer_that_neither_adapter_nor_base_holds_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")  # it has no pooler
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    lora(model, tmp_path / "a", ["query"], seed=1, task_type="SEQ_CLS")
    recipe = {
        "base_model": str(tmp_path / "base"),
        "output": str(tmp_path / "out"),
        "adapters": {"a": str(tmp_path / "a")},
    }
    assert "holds bert.pooler.dense.weight of BertForSequenceClassification; save it with the adapter" in (
        refusal(recipe)
    )


def edit(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_a_base_with_as_many_labels_says_what_they_are(tmp_path):
    recipe = make(tmp_path, "bert", labels=3)
    names = {"0": "x", "1": "y", "2": "z"}
    problem = "multi_label_classification"
    edit(
        tmp_path / "base/config.json", id2label=names, label2id={"x": 0, "y": 1, "z": 2}, problem_type=problem
    )
    out = run(tmp_path, recipe)
    configs = {name: json.loads((out / name / "config.json").read_text()) for name in ("headed", "other")}
    assert (configs["headed"]["id2label"], configs["headed"]["problem_type"]) == (names, problem)
    assert configs["other"]["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert configs["other"]["problem_type"] == "single_label_classification"
    with safe_open(out / "plain/heads/a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (json.loads(metadata["id2label"]), metadata["problem_type"]) == (names, problem)


@pytest.mark.parametrize("owner", LABELS)
def test_a_vocabulary_that_any_of_its_adapters_saved_is_that_of_the_plain_merge(tmp_path, owner):
    recipe = make(tmp_path, "llama", tied=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=LABELS[owner], pad_token_id=2
    )
    model.resize_token_embeddings(70)
    saved = ["embed_tokens", "score"]
    lora(model, tmp_path / owner, ["q_proj"], seed=5, task_type="SEQ_CLS", modules_to_save=saved)
    (tmp_path / owner / "tokenizer_config.json").write_text('{"of": "owner"}')
    out = run(tmp_path, recipe)
    check_equal(out, "headed", "a")
    config = json.loads((out / "headed/config.json").read_text())
    assert (config["vocab_size"], loaded(out / "headed")[0].model.embed_tokens.num_embeddings) == (70, 70)
    assert (out / "headed/tokenizer_config.json").read_text() == '{"of": "owner"}'


def test_what_another_adapter_saved_without_a_task_is_not_lost_under_the_head(tmp_path):
    recipe = make(tmp_path, "bert", labels=2)  # so that b's head has the base's shape, and a's another
    edit(tmp_path / "b/adapter_config.json", task_type=None)
    words = refusal(recipe)
    assert "puts its own classifier.bias in the base's place, where adapter b saved another value" in words
    assert "leave b out of the merge" in words
    words = refusal(recipe, heads="b", adapters=["b"])
    assert f"{tmp_path / 'b'} names no task_type, so its classifier.bias is a weight like any other" in words


def test_a_head_of_no_dimension_is_refused(tmp_path):
    recipe = make(tmp_path, "llama")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.score.weight": torch.tensor(1.0)}, path)
    assert "score.weight of" in (words := refusal(recipe))
    assert "is (), but (2, 32) in LlamaForSequenceClassification" in words


def test_a_padding_token_of_minus_one_is_none(tmp_path):
    recipe = make(tmp_path, "llama")
    edit(tmp_path / "base/config.json", pad_token_id=-1)
    planned = ray_merge.plan(recipe)
    assert planned.headed["headed"].pad_id == 2
    assert any("pad_token_id is eos_token_id (2)" in warning for warning in planned.warnings)


def test_names_that_transformers_changes_by_a_rule_of_the_class_stay(tmp_path):
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, **heads},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    base = tmp_path / "base"
    Gemma3ForConditionalGeneration(config).save_pretrained(base)
    assert any(name.startswith("language_model.model.") for name in load_file(base / "model.safetensors"))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    lora(model, tmp_path / "a", ["q_proj"], seed=1, task_type="SEQ_CLS")
    recipe = {
        "base_model": str(base),
        "output": str(tmp_path / "out"),
        "adapters": {"a": str(tmp_path / "a")},
    }
    out = run(
        tmp_path, {**recipe, "merges": [{"name": "m", "merge_method": "task_arithmetic", "heads": "a"}]}
    )
    # transformers 4 finds `language_model.model` and no other name, and starts afresh what it does not find.
    assert not any("language_model" in name.removeprefix("language_model.") for name in index_of(out / "m"))
    model, about = loaded(out / "m")
    assert not about["missing_keys"]
    assert model.config.num_labels == 3
