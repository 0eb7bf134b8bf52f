import dataclasses
import json
import math

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ray_merge.errors import AdapterError
from ray_merge.storage.adapter_config import (
    HARMLESS,
    REFUSED,
    SETTING_ONLY,
    check_config,
    pattern_matches,
)

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def scaling(**config):
    return check_config({**PLAIN, **config}, "adapter a")


def refusal(**config):
    with pytest.raises(AdapterError) as caught:
        scaling(**config)
    assert str(caught.value).startswith("adapter a: ")
    return str(caught.value)


def test_what_peft_saves_by_default_is_accepted(tmp_path):
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="SEQ_CLS").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert check_config(config, "x").scale_of("q_proj", 4) == 2.0


def test_every_setting_that_peft_knows_has_a_verdict():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    handled = HARMLESS | REFUSED.keys() | SETTING_ONLY.keys() | {"bias", "init_lora_weights"}
    assert sorted(fields - handled) == []


def test_the_tables_do_not_contradict_each_other():
    assert not HARMLESS & REFUSED.keys()
    assert not SETTING_ONLY.keys() & (HARMLESS | REFUSED.keys())


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
    assert "unknown setting use_next_lora = True" in refusal(use_next_lora=True)
    assert scaling(use_next_lora=False, other_future_key=None).r == 4


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "lora", None, 3])
def test_other_kinds_of_adapters_are_refused(kind):
    assert f"peft_type is {kind!r}" in refusal(peft_type=kind)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_alone_are_accepted(init):
    assert scaling(init_lora_weights=init, eva_config={"rho": 2.0}).r == 4


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", [], {}])
def test_initialisations_that_change_the_base_are_refused(init):
    assert f"init_lora_weights is {init!r}" in refusal(init_lora_weights=init)


@pytest.mark.parametrize("bias", ["all", "lora_only", True, None])
def test_trained_biases_are_refused(bias):
    assert f"bias is {bias!r}" in refusal(bias=bias)


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
        (["q"], "expected a mapping"), ("q", "expected a mapping"), ({"q": "8"}, "expected a number"),
        ({"q": None}, "expected a number"), ({"q": True}, "expected a number"), ({"(": 8}, "not a regular expression"),
        ({"(?i)q": 8}, "not a regular expression"), ({"*": 8}, None),
    ],
)  # fmt: skip
def test_a_broken_pattern_is_refused(field, pattern, words):
    if words is None:  # PEFT's own form, `(.*\.)?(*)$`, is not valid either
        words = "not a regular expression"
    assert words in refusal(**{field: pattern})


@pytest.mark.parametrize("rank", [0, -2, 2.5])
def test_a_rank_in_a_pattern_is_a_whole_number(rank):
    assert "rank_pattern 'q'" in refusal(rank_pattern={"q": rank})
