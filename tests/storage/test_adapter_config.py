import dataclasses
import json
import math
import re

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ray_merge.errors import AdapterError
from ray_merge.storage.adapter_config import (
    HANDLED,
    HARMLESS,
    MUTATED_INITS,
    PLAIN_INITS,
    REFUSED,
    TRAINING_ONLY,
    read_settings,
)
from ray_merge.storage.patterns import pattern_matches

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def settings(**config):
    return read_settings({**PLAIN, **config}, "adapter a")


def scaling(**config):
    return settings(**config).scaling


def refusal(**config):
    with pytest.raises(AdapterError) as caught:
        settings(**config)
    assert str(caught.value).startswith("adapter a: ")
    return str(caught.value)


def test_what_peft_saves_by_default_is_accepted(tmp_path):
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="SEQ_CLS").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert read_settings(config, "x").scaling.scale_of("q_proj", 4) == 2.0


def test_every_setting_that_peft_knows_has_a_verdict():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert sorted(fields - (HARMLESS | HANDLED | REFUSED.keys())) == []


def test_the_tables_do_not_contradict_each_other():
    assert not HARMLESS & REFUSED.keys()
    assert not HANDLED & (HARMLESS | REFUSED.keys())


@pytest.mark.parametrize("key", sorted(REFUSED))
@pytest.mark.parametrize("value", [True, {"x": 1}, [1]])
def test_a_setting_that_changes_the_delta_is_refused_by_name_and_reason(key, value):
    message = refusal(**{key: value})
    assert f"{key} is set" in message
    assert REFUSED[key] in message


@pytest.mark.parametrize("key", sorted(REFUSED))
@pytest.mark.parametrize("value", [None, False, {}, []])
def test_a_setting_that_is_off_is_no_reason_to_refuse(key, value):
    assert scaling(**{key: value}).r == 4


def test_an_unknown_setting_is_refused_by_name_as_soon_as_it_is_set():
    assert "unknown setting 'use_next_lora' = True" in refusal(use_next_lora=True)
    assert scaling(use_next_lora=False, other_future_key=None).r == 4


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "lora", None, 3])
def test_other_kinds_of_adapters_are_refused(kind):
    assert f"peft_type is {kind!r}" in refusal(peft_type=kind)


@pytest.mark.parametrize("init", [True, False, None, *PLAIN_INITS])
def test_initialisations_that_leave_the_base_alone_are_accepted(init):
    assert settings(init_lora_weights=init, eva_config={"rho": 2.0}).mutated == ""


@pytest.mark.parametrize("init", [*MUTATED_INITS, "pissa_niter_4"])
def test_initialisations_that_change_the_base_are_named(init):
    # Whether such an adapter can be merged depends on its initial adapter: fit/adapters.py.
    assert settings(init_lora_weights=init).mutated == init


@pytest.mark.parametrize("init", ["loftq", "next_init", 3, [], {}])
def test_initialisations_whose_base_no_checkpoint_holds_or_that_nobody_knows_are_refused(init):
    assert f"init_lora_weights is {init!r}" in refusal(init_lora_weights=init)


@pytest.mark.parametrize(
    ("bias", "read"), [("all", "all"), ("lora_only", "lora_only"), ("none", "none"), (None, "none")]
)
def test_which_biases_were_trained_is_read(bias, read):
    assert settings(bias=bias).bias == read
    assert settings().bias == "none"


@pytest.mark.parametrize("bias", ["some", True, 1, ["all"]])
def test_another_word_for_bias_is_refused(bias):
    assert f"bias is {bias!r}" in refusal(bias=bias)


@pytest.mark.parametrize(
    ("key", "attribute"),
    [
        ("lora_bias", "lora_bias"),
        ("use_dora", "dora"),
        ("fan_in_fan_out", "transposed"),
        ("ensure_weight_tying", "tied"),
    ],
)
def test_a_flag_is_true_or_false(key, attribute):
    assert [getattr(settings(**{key: value}), attribute) for value in (True, False, None)] == [
        True,
        False,
        False,
    ]
    assert f"{key} is 'yes', expected true or false" in refusal(**{key: "yes"})


@pytest.mark.parametrize("given", [True, {}, {"nblocks": 0}, {"nblocks": 2.0}, {"n": 2}, [2]])
def test_bdlora_needs_its_number_of_blocks(given):
    if not given:
        assert settings(use_bdlora=given).blocks == 0
    else:
        assert "expected a mapping with nblocks >= 1" in refusal(use_bdlora=given)
    assert settings(use_bdlora={"nblocks": 4, "target_modules_bd_a": ["q"]}).blocks == 4


def test_trained_tokens_are_rows_of_the_embedding_or_of_each_layer_named():
    assert settings(trainable_token_indices=[3, 0]).tokens == {"": (3, 0)}
    by_layer = {"embed_tokens": [1], "lm_head": [2, 4]}
    assert settings(trainable_token_indices=by_layer).tokens == {"embed_tokens": (1,), "lm_head": (2, 4)}
    assert settings(trainable_token_indices=None).tokens == {}
    for wrong in ("12", [1.0], [-1], [True], {"embed": 3}, {"embed": ["1"]}):
        assert "trainable_token_indices is" in refusal(trainable_token_indices=wrong)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.21.2", (0, 21, 2)), ("0.19", (0, 19, 0)), ("0.19.0@UNKNOWN", (0, 19, 0)), ("0.20.1.dev0", (0, 20, 1)),
        (None, ()), ("", ()),
    ],
)  # fmt: skip
def test_the_version_of_peft_is_read_as_numbers(text, numbers):
    assert settings(peft_version=text).version == numbers


@pytest.mark.parametrize("text", ["new", "v0.19", 0.19, "1", ["0.19.1"]])
def test_a_version_that_is_none_is_refused(text):
    assert "peft_version is" in refusal(peft_version=text)


@pytest.mark.parametrize("layout", ["rank_major", "grouped_by_expert", "", None])
def test_the_order_of_experts_in_b_is_read_in_unsloths_words(layout):
    assert settings(lora_B_layout=layout).expert_layout == (layout or "")
    assert "lora_B_layout is 'expert_major'" in refusal(lora_B_layout="expert_major")


def test_target_parameters_are_sorted_names():
    assert settings(target_parameters=["b.x", "a.y", "b.x"]).parameters == ("a.y", "b.x")
    assert "target_parameters is" in refusal(target_parameters="a.y")


@pytest.mark.parametrize(("key", "part"), sorted(TRAINING_ONLY.items()))
def test_tensors_of_training_alone_are_expected_only_where_the_config_says_so(key, part):
    assert settings(**{key: {"n": 4}}).training_only == (part,)
    assert settings(**{key: None}).training_only == ()


@pytest.mark.parametrize("r", [0, -1, 4.0, "4", None, True])
def test_a_rank_that_is_no_whole_number_is_refused(r):
    assert f"r is {r!r}" in refusal(r=r)


@pytest.mark.parametrize("alpha", [math.inf, math.nan, "8", None, True])
def test_an_alpha_that_is_no_finite_number_is_refused(alpha):
    assert f"lora_alpha is {alpha!r}" in refusal(lora_alpha=alpha)


@pytest.mark.parametrize("saved", ["classifier", [1], {"a": 1}])
def test_modules_to_save_must_be_a_list_of_names(saved):
    assert "modules_to_save is" in refusal(modules_to_save=saved)


def test_the_scale_is_alpha_over_r_and_over_its_root_for_rslora():
    assert scaling().scale_of("q", 4) == 2.0
    assert scaling(use_rslora=True).scale_of("q", 4) == 4.0
    assert scaling(r=64, lora_alpha=16, use_rslora=True).scale_of("q", 64) == 2.0
    assert scaling(lora_alpha=-8.0).scale_of("q", 4) == -2.0


def test_patterns_override_rank_and_alpha_per_module():
    found = scaling(rank_pattern={"q_proj": 8}, alpha_pattern={"layers.1.q_proj": 2}, use_rslora=True)
    assert (found.rank_of("model.layers.1.q_proj"), found.rank_of("model.layers.1.v_proj")) == (8, 4)
    assert found.scale_of("model.layers.1.q_proj", 8) == 2 / math.sqrt(8)
    assert found.scale_of("model.layers.0.q_proj", 8) == 8 / math.sqrt(8)


MODULES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "q_proj",
    "xq_proj",
    "model.q_proj.x",
]
PATTERNS = [
    "q_proj",
    "layers.1.self_attn.q_proj",
    r".*\.1\..*",
    "self_attn.q_proj|v_proj",
    "model",
    r"layers\.\d+\..*",
    ".*",
]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_where_peft_says_so(pattern, module):
    assert pattern_matches(pattern, module) == (get_pattern_key([pattern], module) == pattern)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("order", [PATTERNS, PATTERNS[::-1], sorted(PATTERNS)])
def test_the_first_pattern_in_file_order_wins_as_in_peft(order, module):
    ranks = {pattern: index + 10 for index, pattern in enumerate(order)}
    expected = ranks.get(get_pattern_key(list(ranks), module), 4)
    assert scaling(rank_pattern=ranks).rank_of(module) == expected


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (["q"], "expected a mapping"), ("q", "expected a mapping"), ({"q": "8"}, r"expected a \w+ number"),
        ({"q": None}, r"expected a \w+ number"), ({"q": True}, r"expected a \w+ number"),
        ({"(": 8}, "not a regular expression"), ({"(?i)q": 8}, "not a regular expression"), ({"*": 8}, None),
    ],
)  # fmt: skip
def test_a_broken_pattern_is_refused(field, pattern, words):
    if words is None:  # PEFT's own form, `(.*\.)?(*)$`, is not valid either
        words = "not a regular expression"
    assert re.search(words, refusal(**{field: pattern}))


@pytest.mark.parametrize("rank", [0, -2, 2.5])
def test_a_rank_in_a_pattern_is_a_whole_number(rank):
    assert "rank_pattern 'q'" in refusal(rank_pattern={"q": rank})
