import os
import signal
import sys

import pytest
import torch
import transformers
from fit_cases import LLAMA, UNKNOWN, P, dense, fit, inputs, pair, random, refusal

from ray_merge.errors import AdapterError, RunFailed
from ray_merge.fit import fit_adapters
from ray_merge.fit.resolver import example
from ray_merge.interrupts import Interrupts
from tiny import Q0, V1, factors, llama_tensors, write_adapter

renames = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="transformers 4 has no other names for these modules",
)

DISK = Q0.removeprefix("model.")
BARE = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}


def test_equal_names_need_no_rule_and_no_model_class(tmp_path):
    fitted, adapter = fit(tmp_path, llama_tensors(), UNKNOWN, factors(Q0))
    assert fitted.renamed == {"a": {}}
    assert adapter.names == "runtime names = disk names"


def test_the_prefix_of_another_class_is_found_from_the_names(tmp_path):
    fitted, adapter = fit(tmp_path, BARE, UNKNOWN, factors(Q0) | factors(V1))
    assert adapter.names == "runtime model.* -> disk *"
    assert fitted.renamed["a"][f"{Q0}.weight"] == (f"{DISK}.weight",)
    assert adapter.modules[DISK] == Q0
    assert fitted.sites[DISK].tensor == f"{DISK}.weight"


def test_adapters_of_different_classes_meet_at_the_disk_name(tmp_path):
    given = {"a": (factors(Q0), {}), "b": (factors(DISK), {})}
    fitted = fit_adapters(*inputs(tmp_path, BARE, UNKNOWN, given))
    assert list(fitted.sites) == [DISK]
    assert fitted.adapters["a"].modules == {DISK: Q0}
    assert fitted.adapters["b"].modules == {DISK: DISK}


def test_modules_that_match_nothing_name_adapter_module_base_and_an_example(tmp_path):
    missing = "model.layers.9.self_attn.q_proj"
    message = refusal(AdapterError, fit, tmp_path, llama_tensors(), UNKNOWN, factors(Q0) | factors(missing))
    assert message.startswith("adapter a: ")
    assert f"{missing} matches nothing in {tmp_path}/base" in message
    assert f"for example, {Q0}.weight" in message
    assert "key_mapping" in message


def test_a_part_of_a_module_name_is_never_enough(tmp_path):
    for module in ("model.layers.0.self_attn.q_pro", "0.self_attn.q_proj", "lora_unet_x"):
        assert "matches nothing" in refusal(
            AdapterError, fit, tmp_path, llama_tensors(), UNKNOWN, factors(module)
        )


def test_an_example_is_a_tensor_that_looks_like_what_was_sought():
    tensors = [
        "lm_head.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    assert example("bert.layer.0.q_proj.weight", tensors) == "model.layers.1.self_attn.q_proj.weight"
    assert example("bert.pooler.dense.weight", tensors) == "lm_head.weight"


LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {**LLAMA},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 8,
    },
}  # fmt: skip


@renames
@pytest.mark.parametrize(
    "module", ["model.language_model.layers.0.self_attn.q_proj", f"language_model.{Q0}"], ids=["new", "old"]
)
def test_names_that_only_the_model_class_knows_are_resolved_through_it(tmp_path, module):
    base = random({f"language_model.{Q0}.weight": (8, 8), "multi_modal_projector.linear_1.weight": (8, 8)})
    fitted, adapter = fit(tmp_path, base, LLAVA, pair(module, 2, 8, 8))
    assert list(fitted.sites) == [f"language_model.{Q0}"]
    assert adapter.modules == {f"language_model.{Q0}": module}
    if module.startswith("model."):
        assert adapter.names.endswith("as LlavaForConditionalGeneration of transformers loads them")


@renames
@pytest.mark.parametrize("function", ["_model_class", "eager", "tie_weights"])
def test_a_signal_while_transformers_builds_the_class_is_no_class_that_cannot_be_built(tmp_path, function):
    base = random({f"language_model.{Q0}.weight": (8, 8), "multi_modal_projector.linear_1.weight": (8, 8)})
    module = "model.language_model.layers.0.self_attn.q_proj"
    given = inputs(tmp_path, base, LLAVA, {"a": (pair(module, 2, 8, 8), {})})
    sent = []

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_name == function and not sent:
            sent.append(function)
            os.kill(os.getpid(), signal.SIGINT)

    def stopped():
        sys.setprofile(watch)
        try:
            fit_adapters(*given)
        finally:
            sys.setprofile(None)

    with Interrupts(), pytest.raises(RunFailed, match="stopped by SIGINT"):
        stopped()
    assert sent == [function]


def test_a_key_mapping_renames_before_anything_is_looked_up(tmp_path):
    strange = "block.0.q"
    source = {"key_mapping": {r"block\.(\d+)\.q": r"model.layers.\1.self_attn.q_proj"}}
    fitted, adapter = fit(tmp_path, llama_tensors(), UNKNOWN, factors(strange), source=source)
    assert list(fitted.sites) == [Q0]
    assert adapter.modules == {Q0: Q0}
    assert torch.equal(dense(adapter, tmp_path / "a")[Q0], torch.full((8, 8), 4.0).double())


def test_the_recipes_mapping_is_for_all_adapters_and_an_adapters_own_goes_on_from_it(tmp_path):
    given = {"a": (factors("q"), {}), "b": (factors("q"), {})}
    sources = {"b": {"key_mapping": {"^half$": V1}}, "a": {"key_mapping": {"^half$": Q0}}}
    fitted = fit_adapters(
        *inputs(tmp_path, llama_tensors(), UNKNOWN, given, sources=sources, key_mapping={"^q$": "half"})
    )
    assert (list(fitted.adapters["a"].factors), list(fitted.adapters["b"].factors)) == ([Q0], [V1])


def test_a_mapping_reaches_saved_parameters_tokens_and_the_initial_adapter(tmp_path):
    tensors = factors("m.layers.0.self_attn.q_proj") | {
        f"{P}m.norm.weight": torch.ones(8),
        f"{P}m.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 8),
    }
    settings = {
        "modules_to_save": ["norm"],
        "trainable_token_indices": [3],
        "init_lora_weights": "pissa",
    }
    write_adapter(tmp_path / "initial", factors("m.layers.0.self_attn.q_proj"), init_lora_weights="pissa")
    source = {"key_mapping": {r"^m\.": "model."}, "initial": str(tmp_path / "initial")}
    _, adapter = fit(tmp_path, llama_tensors(), UNKNOWN, tensors, settings, source=source)
    assert list(adapter.factors) == [Q0]
    assert adapter.factors[Q0].initial == 1
    assert list(adapter.replaced) == ["model.norm.weight"]
    assert list(adapter.tokens) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    "tensors",
    [
        factors(Q0) | factors(V1),
        factors(Q0) | {f"{P}x.norm.weight": torch.ones(8), f"{P}y.norm.weight": torch.ones(8)},
    ],
)
def test_a_mapping_that_makes_two_tensors_one_is_refused(tmp_path, tensors):
    source = {"key_mapping": {r"^[xy]\.norm": "model.norm", r".*[qv]_proj$": Q0}}
    message = refusal(
        AdapterError,
        fit,
        tmp_path,
        llama_tensors(),
        UNKNOWN,
        tensors,
        {"modules_to_save": ["norm"]},
        source=source,
    )
    assert "key_mapping gives two tensors the name" in message


def test_patterns_are_matched_to_the_names_that_the_adapter_was_trained_with(tmp_path):
    source = {"key_mapping": {"^block.q$": Q0, "^block.v$": V1}}
    settings = {"alpha_pattern": {"block.q": 6}}
    _, adapter = fit(
        tmp_path, llama_tensors(), UNKNOWN, factors("block.q") | factors("block.v"), settings, source=source
    )
    assert adapter.factors[Q0].products[0].scale == 3.0
    assert adapter.factors[V1].products[0].scale == 2.0
