"""Perplexity and exact match: a tiny causal LM against transformers' own `generate` and loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import AutoModelForCausalLM

import ray_merge
from ray_merge.errors import RecipeError
from zoo import lora, tiny_llama

ROWS = 9
PROMPTS = [[5 + (7 * index + 3 * place) % 50 for place in range(2 + index % 4)] for index in range(ROWS)]


def words(ids: list[int]) -> str:
    # Of one length: the tokenizer takes special tokens out first, and w2 stands in w22.
    return " ".join(f"w{one:02d}" for one in ids)


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({words([one]): one for one in range(64)}, unk_token="w03"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "w00", "eos_token": "w02"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def generated(model: Any, prompt: list[int], n_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, max_new_tokens=n_tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    return [one for one in made[0, len(prompt) :].tolist() if one != 2]


def rows(models: list[Any]) -> list[dict[str, str]]:
    """Labels of one to three words that one of the models says, blanks around them."""
    made = []
    for index, prompt in enumerate(PROMPTS):
        label = generated(models[index % len(models)], prompt, 1 + index % 2)
        made.append({"text": words(prompt), "label": f" {words(label or [9])} "})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    base = tiny_llama(folder / "base", layers=2, hidden=16)
    write_tokenizer(base)
    for seed, name in enumerate(("says", "reads")):
        model = AutoModelForCausalLM.from_pretrained(base)
        lora(model, folder / name, ["v_proj", "down_proj"], seed=seed, alpha=40, task_type="CAUSAL_LM")
    ray_merge.run(recipe_of(folder), engine="local", cache_dir=folder / "cache")
    with torch.no_grad():
        made = rows([loaded(folder), loaded(folder, "says"), loaded(folder, base="out/both")])
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in made))
    return folder


def loaded(folder: Path, adapter: str | None = None, base: str = "base") -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / base)
    return (model if adapter is None else PeftModel.from_pretrained(model, folder / adapter)).eval()


def recipe_of(folder: Path) -> dict[str, Any]:
    path = str(folder / "rows.jsonl")
    return {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "calibration": {"batch_size": 3, "max_length": 16},
        "adapters": {
            "says": {"path": str(folder / "says"), "eval": {"path": path, "metric": "exact_match"}},
            "reads": {
                "path": str(folder / "reads"),
                "eval": {"path": path, "label": "unused", "metric": "perplexity"},
            },
        },
        "merges": [{"name": "both", "merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}],
    }


def evaluate(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    found = ray_merge.evaluate(recipe, engine="local", workers=1, cache_dir=folder / "cache")
    return dict(found.document)


@torch.no_grad()
def test_text_scores_are_those_of_generate_and_of_the_loss(folder):
    document = evaluate(folder, recipe_of(folder))
    made = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    said = {
        "base": loaded(folder),
        "single/says": loaded(folder, "says"),
        "both": loaded(folder, base="out/both"),
    }
    for name, model in said.items():
        right = [
            words(generated(model, prompt, len(row["label"].split()))) == row["label"].strip()
            for prompt, row in zip(PROMPTS, made, strict=True)
        ]
        assert document[name]["says"]["value"] == pytest.approx(sum(right) / ROWS), name
        assert document[name]["says"]["n"] == ROWS
        assert 0 < sum(right) < ROWS, "the case cannot tell the models apart"
    assert document["both"]["reads"]["metric"] == "perplexity"
    wanted = {}
    read = {"base": said["base"], "single/reads": loaded(folder, "reads"), "both": said["both"]}
    for name, model in read.items():
        nats = [
            functional.cross_entropy(
                model(torch.tensor([ids])).logits[0, :-1].double(), torch.tensor(ids[1:])
            )
            * (len(ids) - 1)
            for ids in PROMPTS
        ]
        wanted[name] = math.exp(float(sum(nats)) / sum(len(ids) - 1 for ids in PROMPTS))
        assert document[name]["reads"]["value"] == pytest.approx(wanted[name], rel=1e-6), name
    lower = 100 * wanted["single/reads"] / wanted["both"]
    assert document["both"]["reads"]["normalised"] == pytest.approx(lower, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "metric", "message"),
    [
        ([{"text": "w05", "label": " "}], "exact_match", "holds ' ', an empty text"),
        ([{"text": "w05", "label": 0.5}], "exact_match", r"holds 0\.5, but exact_match needs the text"),
        (
            [{"text": words([5] * 20), "label": "w06"}],
            "exact_match",
            "1 of the 1 texts of .* have more than 16 tokens and are cut there",
        ),
        ([{"text": "w05"}], "perplexity", "none of the 1 rows .* has two tokens"),
        (
            [{"text": "w05", "label": "w06"}],
            "accuracy",
            "metric accuracy does not fit .* the token that follows",
        ),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(folder, tmp_path, rows, metric, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = recipe_of(folder)
    del recipe["adapters"]["reads"]["eval"]
    recipe["adapters"]["says"]["eval"] = {"path": str(path), "metric": metric}
    with pytest.raises(RecipeError, match=rf"adapters\.says\.eval.*{message}"):
        evaluate(folder, recipe)


def test_a_causal_adapter_whose_task_is_classification_is_scored_by_the_text_of_its_labels(folder):
    plain = evaluate(folder, recipe_of(folder))
    recipe = recipe_of(folder)
    for source in recipe["adapters"].values():
        source["task"] = "classification"
    # The task is part of no id where nothing was learned.
    assert evaluate(folder, recipe) == plain
    recipe["adapters"]["says"]["eval"]["metric"] = "accuracy"
    with pytest.raises(
        RecipeError, match=r"score\.weight of Llama.*write metric: exact_match with the label's"
    ):
        evaluate(folder, recipe)


def test_texts_that_are_cut_are_counted_and_told(folder):
    recipe = recipe_of(folder)
    del recipe["adapters"]["says"]["eval"]
    recipe["calibration"]["max_length"] = 3
    events: list[Any] = []
    found = ray_merge.evaluate(recipe, engine="local", cache_dir=folder / "cache", progress=events.append)
    longer = sum(len(prompt) > 3 for prompt in PROMPTS)
    assert 0 < longer < ROWS
    assert found.document["cut_rows"] == {"reads": longer}
    assert any(note.startswith("cut_rows: ") for note in found.document["notes"])
    (told,) = [event.text for event in events if event.kind == "warning"]
    assert told.startswith(f"{longer} of {ROWS} rows of reads have more than 3 tokens and are cut there")
    assert not any(event.kind == "unit" for event in events[: [one.kind for one in events].index("warning")])


def test_a_text_of_as_many_tokens_as_may_be_is_not_cut(folder, tmp_path):
    path = tmp_path / "exact.jsonl"
    path.write_text(json.dumps({"text": words([5] * 16), "label": "w06"}) + "\n")
    recipe = recipe_of(folder)
    del recipe["adapters"]["reads"]["eval"]
    recipe["adapters"]["says"]["eval"]["path"] = str(path)
    document = evaluate(folder, recipe)
    assert "cut_rows" not in document
    assert document["base"]["says"]["n"] == 1
    assert any(note.startswith("exact_match is the share") for note in document["notes"])
