"""Adapters that share a fit must be fitted as each is by itself."""

import dataclasses
import pickle
import random as random_numbers

import pytest
import torch
from fit_cases import GPT2, UNKNOWN, inputs, pair, random

from ray_merge.errors import AdapterError
from ray_merge.fit import adapters as fitting
from ray_merge.fit import fit_adapters
from ray_merge.fit.ranked import RankedFactors, alike, distinct
from ray_merge.storage.family import MemberModules

SHAPES = {
    "self_attn.q_proj": (8, 6),
    "mlp.up_proj": (12, 6),
    "mlp.down_proj": (6, 12),
    "self_attn.o_proj": (6, 6),
}
LAYERS = 3
BASE = {
    f"model.layers.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in SHAPES.items()
}
BASE |= {"model.embed_tokens.weight": (16, 6), "lm_head.weight": (16, 6), "model.norm.weight": (6,)}


def some(rank, layers=range(LAYERS), names=tuple(SHAPES), strip=""):
    found = {}
    for layer in layers:
        for name in names:
            module = f"model.layers.{layer}.{name}".removeprefix(strip)
            found |= pair(module, rank, *SHAPES[name])
    return found


def plain(fitted):
    """Adapters with their factors made, so that they compare with those of a fit of their own."""
    return {
        name: dataclasses.replace(one, factors=dict(one.factors)) for name, one in fitted.adapters.items()
    }


def both(folder, adapters, base=BASE, config=UNKNOWN, **recipe):
    """The fit with families and the one without; the latter read by the parser."""
    parsed, checkpoint, stored = inputs(folder, random(base), config, adapters, **recipe)
    alone = {
        name: dataclasses.replace(one, member=None, modules=tuple(one.modules))
        for name, one in stored.items()
    }
    return fit_adapters(parsed, checkpoint, stored), fit_adapters(parsed, checkpoint, alone), stored


def assert_same(shared, alone):
    assert plain(shared) == plain(alone)
    assert shared.sites == alone.sites
    assert list(shared.sites) == list(alone.sites)
    assert shared.renamed == alone.renamed
    for name, adapter in shared.adapters.items():
        other = alone.adapters[name]
        assert list(adapter.factors) == list(other.factors) if not isinstance(adapter.factors, dict) else True
        assert (adapter.layouts, adapter.names, adapter.file_version) == (
            other.layouts, other.names, other.file_version,
        )  # fmt: skip


MIXED = {
    "a": (some(2), {"r": 2}),
    "same": (some(2), {"r": 2}),
    "alpha": (some(2), {"r": 2, "lora_alpha": 7}),
    "rank": (some(5), {"r": 5, "lora_alpha": 1}),
    "rs": (some(5), {"r": 5, "use_rslora": True}),
    "fewer": (some(3, layers=[0, 2]), {"r": 3}),
    "other": (some(4, names=["mlp.up_proj", "self_attn.q_proj"]), {"r": 4}),
    "one": (some(1, layers=[1], names=["mlp.down_proj"]), {"r": 1}),
    "pattern": (some(2), {"r": 4, "rank_pattern": {".*proj": 2}}),
    "dora": (some(2) | {f"base_model.model.model.layers.{layer}.{name}.lora_magnitude_vector": torch.ones(shape[0])
             for layer in range(LAYERS) for name, shape in SHAPES.items()}, {"r": 2, "use_dora": True}),
    "bfloat16": ({name: tensor.bfloat16() for name, tensor in some(6).items()}, {"r": 6}),
}  # fmt: skip


def test_a_recipe_of_many_kinds_is_fitted_as_each_adapter_by_itself(tmp_path):
    shared, alone, _ = both(tmp_path, MIXED)
    assert_same(shared, alone)


def test_only_what_is_new_is_fitted(tmp_path, monkeypatch):
    calls = []
    fit = fitting._fit
    monkeypatch.setattr(
        fitting, "_fit", lambda draft, layout: (calls.append(draft.adapter.name), fit(draft, layout))
    )
    parsed, checkpoint, stored = inputs(tmp_path, random(BASE), UNKNOWN, MIXED)
    fit_adapters(parsed, checkpoint, stored)
    assert calls == ["a", "pattern", "dora"]
    assert [isinstance(stored[name].modules, MemberModules) for name in ("a", "pattern")] == [True, False]


@pytest.mark.parametrize(
    ("base", "strip"),
    [({name.removeprefix("model."): shape for name, shape in BASE.items()}, ""), (BASE, "model.")],
)
def test_names_that_differ_by_a_prefix_are_shared_too(tmp_path, base, strip):
    adapters = {
        "a": (some(2, strip=strip), {"r": 2}),
        "b": (some(3, strip=strip), {"r": 3}),
        "c": (some(3, [1], strip=strip), {"r": 3}),
    }
    shared, alone, _ = both(tmp_path, adapters, base)
    assert_same(shared, alone)
    assert shared.renamed["c"]


SPELLINGS = {
    "as PEFT saves": lambda name: name,
    "without the prefix": lambda name: name.removeprefix("base_model.model."),
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "with the adapter's name in B alone": lambda name: name.replace("lora_B.weight", "lora_B.default.weight"),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "sharded": lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "wrapped twice": lambda name: name.replace(".self_attn.", ".base_layer.self_attn."),
}
"""Names of tensors that mean the same module."""


def spelled(tensors, spelling):
    return {SPELLINGS[spelling](name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("second", SPELLINGS)
@pytest.mark.parametrize("first", SPELLINGS)
def test_modules_whose_tensors_are_spelled_in_two_ways_keep_their_own_names(tmp_path, first, second):
    adapters = {
        "learned": (spelled(some(2), first), {"r": 2}),
        "fewer": (spelled(some(3, layers=[1]), second), {"r": 3}),
        "same": (spelled(some(4), second), {"r": 4}),
        "again": (spelled(some(5, layers=[1]), first), {"r": 5}),
    }
    shared, alone, _ = both(tmp_path, adapters)
    assert_same(shared, alone)
    assert isinstance(shared.adapters["again"].factors, RankedFactors)


@pytest.mark.parametrize("seed", range(12))
def test_recipes_of_every_mixture_are_fitted_as_each_adapter_by_itself(tmp_path, seed):
    draw = random_numbers.Random(seed)
    spellings = draw.sample(sorted(SPELLINGS), 2)
    choices = [draw.sample(sorted(SHAPES), draw.randint(1, len(SHAPES))) for _ in range(2)]
    settings = ({}, {}, {"use_rslora": True}, {"bias": "all"}, {"task_type": "SEQ_CLS"}, {"peft_version": "0.19.1"},
                {"modules_to_save": ["score"]}, {"ensure_weight_tying": True}, {"rank_pattern": {}},
                {"alpha_pattern": {".*_proj": 3}})  # fmt: skip
    adapters = {}
    for number in range(8):
        rank = draw.choice([1, 2, 6, 8, 12])  # three of them are lengths of the base
        layers = sorted(draw.sample(range(LAYERS), draw.choice([1, 2, LAYERS])))
        tensors = spelled(some(rank, layers, draw.choice(choices)), draw.choice(spellings))
        if draw.random() < 0.3:
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        extra = {"r": rank, "lora_alpha": draw.choice([4, 4, 9]), **draw.choice(settings)}
        if "rank_pattern" in extra:
            extra["rank_pattern"] = {".*_proj": rank}
        adapters[f"a{number}"] = (tensors, extra)
    shared, alone, _ = both(tmp_path, adapters)
    assert_same(shared, alone)


def test_layers_stored_transposed_are_shared_too(tmp_path):
    base = {"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.c_proj.weight": (8, 8), "wte.weight": (16, 8),
            "h.0.attn.c_attn.bias": (24,), "h.0.mlp.c_proj.bias": (8,)}  # fmt: skip
    made = {
        name: (pair("transformer.h.0.attn.c_attn", rank, 24, 8) | pair("transformer.h.0.mlp.c_proj", rank, 8, 8),
               {"r": rank, "fan_in_fan_out": True})
        for name, rank in (("a", 2), ("b", 3))
    }  # fmt: skip
    made["c"] = (pair("transformer.h.0.attn.c_attn", 4, 24, 8), {"r": 4, "fan_in_fan_out": True})
    shared, alone, _ = both(tmp_path, made, base, GPT2)
    assert_same(shared, alone)
    assert isinstance(shared.adapters["b"].factors, RankedFactors)
    assert shared.adapters["b"].factors["h.0.attn.c_attn"].products[0].B.transpose


def test_a_key_mapping_of_one_adapter_changes_no_other(tmp_path):
    odd = {name.replace("model.layers", "model.blocks"): tensor for name, tensor in some(2).items()}
    odd3 = {name.replace("model.layers", "model.blocks"): tensor for name, tensor in some(3).items()}
    adapters = {"a": (some(2), {"r": 2}), "odd": (odd, {"r": 2}), "odd3": (odd3, {"r": 3})}
    sources = {name: {"key_mapping": {"blocks": "layers"}} for name in ("odd", "odd3")}
    shared, alone, _ = both(tmp_path, adapters, sources=dict(sources))
    assert_same(shared, alone)
    with pytest.raises(AdapterError, match=r"blocks.*matches nothing"):
        both(tmp_path, adapters, sources={"odd": sources["odd"]})


@pytest.mark.parametrize(
    ("tensors", "settings"),
    [
        (some(3) | pair("model.layers.9.mlp.up_proj", 3, 12, 6), {"r": 3}),
        (pair("model.layers.0.mlp.up_proj", 3, 12, 7), {"r": 3}),
        (pair("model.layers.0.mlp.up_proj", 3, 13, 6), {"r": 3}),
        (pair("model.layers.0.mlp.up_proj", 3, 12, 6), {"r": 2}),
        (pair("model.layers.0.mlp.up_proj", 3, 12, 6), {"r": 3, "fan_in_fan_out": True}),
        (pair("lm_head", 3, 16, 6), {"r": 3}),
        (some(2), {"r": 2, "init_lora_weights": "pissa"}),
        (pair("model.layers.0.mlp.up_proj", 2, 12, 6) | pair("layers.0.mlp.up_proj", 2, 12, 6), {"r": 2}),
    ],
)
def test_a_refusal_is_the_same_after_any_number_of_fits(tmp_path, tensors, settings):
    config = {**UNKNOWN, "tie_word_embeddings": True}

    def refusal(adapters, folder):
        with pytest.raises(AdapterError) as caught:
            both(folder, adapters, config=config)
        return str(caught.value).replace(str(folder), "")

    bad = {"z": (tensors, settings)}
    good = {name: MIXED[name] for name in ("a", "rank", "fewer", "other")}
    assert refusal({**good, **bad}, tmp_path / "1") == refusal(bad, tmp_path / "2")


def test_shared_factors_are_a_mapping_that_can_be_sent(tmp_path):
    shared, _, stored = both(tmp_path, MIXED)
    factors = shared.adapters["rank"].factors
    assert isinstance(factors, RankedFactors)
    assert (factors.rank, len(factors), "nowhere" in factors) == (5, LAYERS * len(SHAPES), False)
    assert factors.get("nowhere") is None
    sent = pickle.loads(pickle.dumps(shared.adapters))
    assert sent == shared.adapters
    assert alike(sent["rank"].factors) is alike(sent["a"].factors)
    small, all_of_it = (len(pickle.dumps(one)) for one in ([sent["rank"], sent["alpha"]], plain(shared)))
    assert small < all_of_it
    assert stored["same"].member is stored["a"].member
    assert shared.adapters["same"].factors is shared.adapters["a"].factors


def test_distinct_adapters_are_the_first_of_each_family(tmp_path):
    shared, _, _ = both(tmp_path, MIXED)
    first = [adapter.name for adapter in distinct(shared.adapters.values())]
    assert first == ["a", "rs", "fewer", "other", "one", "pattern", "dora", "bfloat16"]
