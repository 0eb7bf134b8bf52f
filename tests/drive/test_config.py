"""config.json of a merged checkpoint: the base's own bytes, or what the merge changed of it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from quantised_files import FP8_SINGLE
from ray_merge.drive.config import checkpoint_config, vocabulary_owner
from ray_merge.storage.store import open_store
from tiny import (
    HIDDEN,
    Q0,
    V1,
    factors,
    llama_tensors,
    plan_of,
    tables,
    write_adapter,
    write_base,
    write_recipe_files,
)  # fmt: skip

P = "base_model.model."
TABLE = "model.embed_tokens.weight"


def text_of(recipe, number=0):
    plan = plan_of(recipe)
    return checkpoint_config(plan, plan.merges[number], open_store(recipe["base_model"])).decode()


def config_of(recipe, number=0):
    return json.loads(text_of(recipe, number))


@pytest.fixture
def recipe(tmp_path):
    return write_recipe_files(tmp_path)


def test_it_is_the_bases_own_byte_for_byte_where_nothing_changes(recipe, tmp_path):
    text = '{ "model_type":"llama",  "b": 1, "vocab_size": 16}'
    (tmp_path / "base" / "config.json").write_text(text)
    assert text_of(recipe) == text


@pytest.mark.parametrize(("key", "other"), [("dtype", "torch_dtype"), ("torch_dtype", "dtype")])
def test_the_output_dtype_stands_wherever_the_base_has_one(recipe, tmp_path, key, other):
    config = {
        "model_type": "x",
        key: "float32",
        "text_config": {key: "float32", "n": 1},
        "limit": [0.0, math.inf],
    }
    write_base(tmp_path / "base", config=config)
    found = config_of({**recipe, "out_dtype": "bfloat16"})
    assert found == {**config, key: "bfloat16", "text_config": {key: "bfloat16", "n": 1}}
    assert other not in found


def test_an_output_dtype_is_written_where_the_base_says_none(recipe):
    assert config_of({**recipe, "out_dtype": "float16"})["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "x", "vocab_size": 16},
        {"model_type": "x", "text_config": {"vocab_size": 16, "n": 1}},
        {"model_type": "x", "vocab_size": 16, "text_config": {"vocab_size": 16}},
    ],
)
def test_a_resized_vocabulary_changes_its_size_wherever_it_stands(recipe, tmp_path, config):
    write_base(tmp_path / "base", config=config)
    write_adapter(tmp_path / "a", factors(Q0) | tables(20))
    recipe["merges"].append({"name": "n", "merge_method": "cat", "adapters": ["b"]})
    found = json.dumps(config_of(recipe), sort_keys=True)
    assert found == json.dumps(config, sort_keys=True).replace('"vocab_size": 16', '"vocab_size": 20')
    assert config_of(recipe, 1) == config


def test_a_size_that_is_not_the_tables_is_left_alone(recipe, tmp_path):
    # The vocabulary of an audio part, or rows that were padded: 17 is not the 16 rows that were resized.
    config = {"model_type": "x", "vocab_size": 16, "text_config": {"vocab_size": 17}}
    write_base(tmp_path / "base", config=config)
    write_adapter(tmp_path / "a", factors(Q0) | tables(20))
    assert config_of(recipe) == {**config, "vocab_size": 20}


def test_a_saved_table_of_the_same_size_changes_nothing(recipe, tmp_path):
    write_adapter(tmp_path / "a", factors(Q0) | tables(16))
    assert text_of(recipe) == (tmp_path / "base" / "config.json").read_text()


def test_an_untied_head_is_said(recipe, tmp_path):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    tensors = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    write_base(tmp_path / "base", tensors, config)
    assert config_of({**recipe, "tied": "untie"}) == {**config, "tie_word_embeddings": False}
    assert config_of(recipe) == config


@pytest.mark.parametrize(("said", "dtype"), [("float16", "float16"), (None, "bfloat16")])
def test_a_dequantised_base_has_no_quantisation_and_names_its_dtype(recipe, tmp_path, said, dtype):
    weight = {
        f"{Q0}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
        f"{Q0}.weight_scale_inv": torch.tensor(0.5),
    }
    named = {} if said is None else {"torch_dtype": said}
    config = {"model_type": "x", "quantization_config": dict(FP8_SINGLE), **named}
    write_base(tmp_path / "base", llama_tensors() | weight, config)
    found = config_of({**recipe, "base_numerics": "dequantise"})
    assert found == {"model_type": "x", "torch_dtype": dtype}
    wide = config_of({**recipe, "base_numerics": "dequantise", "out_dtype": "float32"})
    assert wide == {"model_type": "x", "torch_dtype": "float32"}


def test_the_tokenizer_is_of_the_adapter_that_resized_the_vocabulary(recipe, tmp_path):
    write_adapter(tmp_path / "b", factors(V1) | tables(20))
    recipe["merges"].append({"name": "n", "merge_method": "cat", "adapters": ["a"]})
    plan = plan_of(recipe)
    assert vocabulary_owner(plan, plan.merges[0]) is plan.adapters["b"]
    assert vocabulary_owner(plan, plan.merges[1]) is None
