"""Against the installed PEFT: its merge functions on tensors, and add_weighted_adapter on a small model."""

import warnings

import pytest
import torch
from method_cases import deltas, random_factors, relative
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from torch import nn

from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.dare import dropped, weighted_sum
from ray_merge.methods.election import election
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

WEIGHTS = [0.7, 0.3, -0.4]
OUT, IN = 20, 14

# Both sides multiply and add float32 in another order: R * eps * a few, far below what a wrong rule would give.
FLOAT32 = 2e-6


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_with_peft_arithmetic_is_peft_ties(density):
    factors = random_factors((OUT, IN), (3, 5, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = merge_utils.ties(list(deltas(factors)), torch.tensor(WEIGHTS, dtype=torch.float64), density)
    merged = merge_factors("ties", factors, weight=WEIGHTS, density=density, compat="peft")
    assert relative(merged.dense(), want) < 1e-12


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_with_the_masks_of_peft_is_peft_dare(method):
    factors = random_factors((OUT, IN), (3, 5, 2))
    torch.manual_seed(11)
    want = getattr(merge_utils, method)(
        list(deltas(factors)), torch.tensor(WEIGHTS, dtype=torch.float64), 0.4
    )
    torch.manual_seed(11)
    masks = [torch.bernoulli(torch.full((OUT, IN), 0.4, dtype=torch.float64)).bool() for _ in factors]
    space = SiteFactors(factors).space("dense")
    kept = dropped(space, [0.4] * 3, "paper", lambda adapter, index, shape: masks[adapter])
    if method == "dare_linear":
        rule = weighted_sum(kept, WEIGHTS)
    else:
        rule = election(space, kept, WEIGHTS, compat="peft", divide=True)
    assert relative(space.lift(rule).dense(), want) < 1e-12


class TinyModel(nn.Module):
    """One linear layer, as small as PEFT takes it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(IN, OUT, bias=False)

    def forward(self, x):
        return self.linear(x)


def peft_model(ranks):
    """A PEFT model with one adapter per rank, alpha 3, and the same adapters as factors."""
    torch.manual_seed(0)
    configs = [
        LoraConfig(r=rank, lora_alpha=3, target_modules=["linear"], init_lora_weights=False) for rank in ranks
    ]
    model = get_peft_model(TinyModel(), configs[0], adapter_name="0")
    for index, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(index), config)
    layer = model.base_model.model.linear
    factors = [
        Factor(layer.lora_B[name].weight.data, layer.lora_A[name].weight.data, layer.scaling[name])
        for name in map(str, range(len(ranks)))
    ]
    return model, layer, factors


def combined(ranks, combination, **options):
    model, layer, factors = peft_model(ranks)
    names = [str(index) for index in range(len(ranks))]
    model.add_weighted_adapter(
        names, WEIGHTS[: len(ranks)], "merged", combination_type=combination, **options
    )
    return layer.get_delta_weight("merged"), factors


@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 3)])
@pytest.mark.parametrize("method", ["cat", "task_arithmetic"])
def test_the_exact_sum_is_peft_cat(method, ranks):
    want, factors = combined(ranks, "cat")
    merged = merge_factors(method, factors, weight=WEIGHTS)
    assert relative(merged.dense(), want) < FLOAT32
    assert merged.rank == sum(ranks)


@pytest.mark.parametrize("rank", [2, 6])
def test_svd_is_peft_svd(rank):
    want, factors = combined((2, 5, 3), "svd", svd_rank=rank)
    assert relative(merge_factors("svd", factors, weight=WEIGHTS, rank=rank).dense(), want) < 10 * FLOAT32


def test_linear_with_peft_arithmetic_is_peft_linear_also_for_negative_weights():
    want, factors = combined((4, 4, 4), "linear")
    merged = merge_factors("linear", factors, weight=WEIGHTS, compat="peft")
    assert relative(merged.dense(), want) < FLOAT32
    exact = merge_factors("task_arithmetic", factors, weight=WEIGHTS).dense()
    assert relative(exact, want) > 0.1


def test_ties_with_peft_arithmetic_is_peft_ties_svd_at_full_rank():
    want, factors = combined((2, 5, 3), "ties_svd", density=0.3, svd_rank=min(OUT, IN))
    assert (
        relative(merge_factors("ties", factors, weight=WEIGHTS, density=0.3, compat="peft").dense(), want)
        < 1e-5
    )
