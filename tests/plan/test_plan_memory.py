import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ray_merge.plan import DEFAULT_MEMORY_BYTES, make_plan, read_inputs
from ray_merge.plan.estimate import flops
from ray_merge.plan.memory import MAX_GROUP
from ray_merge.recipe import expand, load_recipe
from tiny import Q0, V1, factors, llama_tensors, plan_of, write_adapter, write_base, write_recipe_files


@pytest.fixture
def recipe(tmp_path):
    return write_recipe_files(tmp_path)


def plan_within(recipe, memory_bytes):
    parsed, source = load_recipe(recipe)
    merges = expand(parsed, source)
    return make_plan(parsed, merges, *read_inputs(parsed, merges), memory_bytes=memory_bytes)


def test_merges_share_passes_over_the_base_and_exports_need_none(recipe):
    recipe["merges"] = [
        {"name": "s", "merge_method": "cat", "sweep": {"lambda": list(range(70))}},
        {"name": "x", "merge_method": "cat", "export": "adapter"},
    ]
    plan = plan_of(recipe)
    assert [len(group) for group in plan.groups] == [MAX_GROUP] * 4 + [6]
    assert sorted(index for group in plan.groups for index in group) == list(range(70))
    assert plan.read_bytes == 5 * plan.base.n_bytes
    assert plan.peak_bytes <= DEFAULT_MEMORY_BYTES


def test_too_little_memory_makes_groups_of_one_and_a_warning(recipe):
    recipe["merges"][0]["sweep"] = {"lambda": [1, 2, 3]}
    tight = plan_within(recipe, 10**6)
    assert tight.groups == ((0,), (1,), (2,))
    assert any("more than the ceiling of 1 MB" in warning for warning in tight.warnings)


def test_a_basis_is_counted_for_methods_that_have_only_one_space(recipe):
    recipe["merges"][0] |= {"merge_method": "knots_ties", "parameters": {"scope": "tensor"}}
    knots = plan_of(recipe).peak_bytes
    recipe["merges"][0] |= {"merge_method": "cat", "parameters": {}}
    assert knots > plan_of(recipe).peak_bytes


def test_a_gram_matrix_of_a_conv1d_has_as_many_rows_as_the_weight(recipe, tmp_path):
    """Its inputs are the rows of the weight as it is stored: 512 of `mlp.c_proj`, not 128."""
    path = "transformer.h.0.mlp.c_proj"
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=128, n_layer=1, n_head=2, n_positions=8))
    model.save_pretrained(tmp_path / "base")
    for name in "ab":
        lora = factors(path, rows=128, columns=512)
        write_adapter(tmp_path / name, lora, fan_in_fan_out=True, target_modules=["c_proj"])
        recipe["adapters"][name] = {"path": str(tmp_path / name), "data": str(tmp_path / "x.jsonl")}
    plain = plan_of(recipe)
    recipe["merges"][0]["merge_method"] = "regmean"
    plan = plan_of(recipe)
    assert plan.sites["transformer.h.0.mlp.c_proj"].shape == (512, 128)
    assert plan.peak_bytes - plain.peak_bytes > 2 * 8 * 512**2
    assert flops(plan) - flops(plain) > 512**3


@pytest.mark.parametrize("kind", ["dora", "saved"])
def test_the_base_weight_is_counted_where_an_update_depends_on_it(recipe, tmp_path, kind):
    # Both adapters at one site of 512 x 512: the plain one needs no base weight.
    wide = llama_tensors() | {f"{Q0}.weight": torch.zeros(512, 512, dtype=torch.bfloat16)}
    bias = f"{Q0}.bias"
    write_base(tmp_path / "base", wide | {bias: torch.zeros(512)})
    plain = factors(Q0, rows=512, columns=512)
    for name in "ab":
        write_adapter(tmp_path / name, plain)
    without = plan_of(recipe).peak_bytes
    if kind == "dora":
        magnitude = {f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(512)}
        write_adapter(tmp_path / "a", plain | magnitude, use_dora=True)
        assert plan_of(recipe).peak_bytes - without == 512 * 512 * 2
    else:
        # A trained bias is a site of its own, far smaller than the weight's: the most expensive one stays.
        write_adapter(tmp_path / "a", plain | {f"base_model.model.{bias}": torch.ones(512)}, bias="all")
        assert plan_of(recipe).peak_bytes == without


def test_every_set_of_adapters_in_a_group_is_counted_once(recipe, tmp_path):
    for name in "ab":
        write_adapter(tmp_path / name, factors(Q0) | factors(V1))

    def peak(*chosen):
        recipe["merges"] = [
            {"name": f"m{i}", "merge_method": "cat", "adapters": list(names)}
            for i, names in enumerate(chosen)
        ]
        return plan_of(recipe).peak_bytes

    one, same, other = peak("a"), peak("a", "a"), peak("a", "b")
    assert one < same < other
