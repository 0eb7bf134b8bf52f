"""Which padding token a checkpoint with a head names where config.json names none."""

from __future__ import annotations

import json

import pytest

from ray_merge.plan.padding import padding_token
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import open_store
from tiny import Q0, factors, plan_of, tables, write_adapter, write_base, write_recipe_files

BY_NUMBER = {"pad_token": "<pad>", "added_tokens_decoder": {"3": {"content": "<pad>"}}}
NAMED = {"pad_token": {"content": "<pad>", "lstrip": False}}


@pytest.fixture
def found(tmp_path):
    def of(config, **files):
        write_base(tmp_path / "base", config={"model_type": "llama", "vocab_size": 16, **config})
        for name, document in files.items():
            (tmp_path / "base" / f"{name}.json").write_text(json.dumps(document))
        return padding_token(read_checkpoint(open_store(str(tmp_path / "base"))), [])

    return of


def test_it_is_the_tokenizers_own(found):
    assert found({"eos_token_id": 2}, tokenizer_config=BY_NUMBER) == (3, "")
    listed = {"added_tokens": [{"id": 1, "content": "<s>"}, {"id": 4, "content": "<pad>"}]}
    assert found({"eos_token_id": 2}, tokenizer_config=NAMED, tokenizer=listed) == (4, "")
    assert found({}, tokenizer_config={}, special_tokens_map=NAMED, tokenizer=listed) == (4, "")


@pytest.mark.parametrize(
    "config", [{"eos_token_id": 2}, {"eos_token_id": [2, 7]}, {"text_config": {"eos_token_id": 2}}]
)
def test_without_one_it_is_eos_and_that_is_said(found, config):
    number, warning = found(config)
    assert number == 2
    assert "pad_token_id is eos_token_id (2)" in warning


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({}, {}, "neither config.json nor the tokenizer names a padding token"),
        (
            {"eos_token_id": 2},
            {"tokenizer_config": NAMED},
            "'<pad>' is not numbered in the tokenizer's files",
        ),
        ({"vocab_size": 3}, {"tokenizer_config": BY_NUMBER}, "'<pad>' is 3 of 3 tokens"),
        ({"eos_token_id": 16}, {}, "and eos_token_id is 16 of 16 tokens"),
        ({"eos_token_id": [-1]}, {}, "and eos_token_id is -1 of 16 tokens"),
    ],
)
def test_nothing_is_guessed_where_the_tokenizer_pads_with_what_nobody_knows(found, config, files, words):
    number, warning = found(config, **files)
    assert number is None
    assert words in warning
    assert "set model.config.pad_token_id" in warning


def test_an_adapter_that_resized_the_vocabulary_brings_its_tokenizer(tmp_path):
    recipe = write_recipe_files(tmp_path)
    write_adapter(tmp_path / "a", factors(Q0) | tables(20))
    decoder = {"17": {"content": "<pad>"}}
    about = {"pad_token": "<pad>", "added_tokens_decoder": decoder}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(about))
    plan = plan_of(recipe)
    assert padding_token(plan.base, [plan.adapters["b"], plan.adapters["a"]]) == (17, "")
    about["added_tokens_decoder"] = {"20": {"content": "<pad>"}}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(about))
    number, warning = padding_token(plan.base, [plan.adapters["a"]])
    assert number is None
    assert "'<pad>' is 20 of 20 tokens" in warning
