import pytest
import torch

from ray_merge.errors import RecipeError
from ray_merge.methods import at_site, get
from ray_merge.plan.depth import with_depths
from ray_merge.spec import Site
from tiny import factors, llama_tensors, plan_of, write_adapter, write_base, write_recipe_files

LAYERS = 5


def depths(tensors, touched):
    sites = {name: Site(name, name, (2, 2)) for name in touched}
    return {name: site.depth for name, site in with_depths(sites, tensors).items()}


def test_depth_is_the_block_among_the_blocks_of_its_list():
    blocks = [f"model.layers.{layer}.q.weight" for layer in range(LAYERS)]
    found = depths(["model.embed.weight", *blocks, "model.norm.weight", "lm_head.weight"],
                   [*blocks, "model.embed.weight", "lm_head.weight"])  # fmt: skip
    assert [found[name] for name in blocks] == [0, 0.25, 0.5, 0.75, 1]
    assert (found["model.embed.weight"], found["lm_head.weight"]) == (0, 0)  # as in mergekit's plan_module


def test_encoder_decoder_and_tower_count_for_themselves_and_experts_do_not():
    tensors = [f"encoder.block.{block}.layer.0.q.weight" for block in range(3)]
    tensors += [f"decoder.block.{block}.layer.1.q.weight" for block in range(2)]
    tensors += [
        f"model.layers.{layer}.experts.{expert}.w.weight" for layer in range(2) for expert in range(4)
    ]
    tensors += ["vision.layers.0.q.weight", "head.0.weight", "head.2.weight"]
    found = depths(tensors, tensors)
    assert found["encoder.block.1.layer.0.q.weight"] == 0.5
    assert found["decoder.block.1.layer.1.q.weight"] == 1
    assert found["model.layers.1.experts.0.w.weight"] == 1
    assert found["vision.layers.0.q.weight"] == 1  # the one block of a list, as for mergekit
    assert found["head.2.weight"] == 0


def test_a_base_without_blocks_has_no_depth():
    assert depths(["a.weight", "b.weight"], ["a.weight"]) == {"a.weight": None}


@pytest.fixture
def recipe(tmp_path):
    made = write_recipe_files(tmp_path)
    write_base(tmp_path / "base", llama_tensors(LAYERS))
    tensors = {}
    for layer in range(LAYERS):
        tensors |= factors(f"model.layers.{layer}.self_attn.q_proj")
    for name in "ab":
        write_adapter(tmp_path / name, tensors)
    return made


def test_every_site_of_a_plan_takes_its_value_at_its_depth(recipe):
    recipe["merges"][0]["parameters"] = {"weight": {"a": [0, 1], "b": 2}, "lambda": [1, 0.5, 1]}
    plan = plan_of(recipe)
    merge = plan.merges[0]
    found = [
        at_site(get(merge.method), merge.parameters, merge.adapters, site.name, site.depth)
        for site in plan.touched(merge)
    ]
    assert [one.weight for one in found] == [(0, 2), (0.25, 2), (0.5, 2), (0.75, 2), (1, 2)]
    assert [one.lambda_ for one in found] == [1, 0.75, 0.5, 0.75, 1]
    assert plan.warnings == ()


def test_a_gradient_for_a_base_without_blocks_is_refused(tmp_path):
    recipe = write_recipe_files(tmp_path)
    write_base(tmp_path / "base", {"only.weight": torch.ones(8, 8)}, {"model_type": "of_no_library"})
    for name in "ab":
        write_adapter(tmp_path / name, factors("only"))
    plan_of(recipe)
    recipe["merges"][0]["parameters"] = {"lambda": [{"filter": "only", "value": [0, 1]}]}
    with pytest.raises(RecipeError, match=r"merge 'm': lambda changes with depth, but .* no list of blocks"):
        plan_of(recipe)


@pytest.mark.parametrize(
    ("weight", "warned"),
    [([0.7, 0.3], True), ([0.7, 0.5, 0.3], False), ({"a": [0.7, 0.3], "b": 1}, False), (0.7, False)],
)
def test_a_list_with_as_many_numbers_as_adapters_is_pointed_out(recipe, weight, warned):
    recipe["merges"][0]["parameters"] = {"weight": weight}
    warnings = plan_of(recipe).warnings
    assert ["weight is a gradient of 2 values" in text for text in warnings] == [True] * warned


def test_a_filter_with_a_gradient_that_matches_nothing_is_warned_of_once(recipe):
    recipe["merges"][0]["parameters"] = {"lambda": [{"filter": "nowhere", "value": [0, 1, 2]}]}
    assert [text for text in plan_of(recipe).warnings if "nowhere" in text] == [
        "merge 'm': lambda filter 'nowhere' matches no site"
    ]


def test_combinations_take_their_part_of_gradients_by_adapter(recipe):
    recipe["merges"][0] |= {
        "combinations": {"choose": 1},
        "parameters": {"weight": {"a": [0, 1], "b": [1, 0]}},
    }
    plan = plan_of(recipe)
    assert [merge.parameters["weight"][0]["value"] for merge in plan.merges] == [{"a": 0.0}, {"b": 1.0}]
