import math

import pytest
import torch
from method_cases import core_dense, deltas, elect_dense, random_factors, relative, weighted

from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.sparsify import random_mask
from ray_merge.methods.dare import dropped, weighted_sum
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import at_site, get, resolve_parameters

CLOSE = 1e-10
WEIGHTS, DENSITY = [0.5, -1.0, 2.0], [0.3, 0.6, 1.0]
NAMES = ("a", "b", "c")


def merged_as(method, factors, names=NAMES, site="layers.0", seed=3, **given):
    declared = get(method)
    parameters = at_site(declared, resolve_parameters(declared, given, names), names, site)
    return merge_site(method, SiteFactors(factors), parameters, names=names, site=site, seed=seed)


def own_masks(shape, names=NAMES, density=DENSITY, seed=3, site="layers.0"):
    """The masks of a site that is one chunk."""
    return torch.stack(
        [
            random_mask(shape, share, seed=seed, site=site, adapter=name, chunk=0)
            for name, share in zip(names, density, strict=True)
        ]
    )


def dropped_dense(values, masks, density=DENSITY):
    return weighted(values * masks, [1 / share for share in density])


BY_NAME = {
    "weight": dict(zip(NAMES, WEIGHTS, strict=True)),
    "density": dict(zip(NAMES, DENSITY, strict=True)),
    "lambda": 0.6,
}


def test_dare_linear_is_the_weighted_sum_of_dropped_and_rescaled_deltas():
    factors = random_factors((24, 17), (3, 0, 2))
    want = 0.6 * weighted(dropped_dense(deltas(factors), own_masks((24, 17))), WEIGHTS).sum(0)
    assert relative(merged_as("dare_linear", factors, **BY_NAME).dense(), want) < CLOSE


def test_dare_ties_elects_among_dropped_and_rescaled_deltas():
    factors = random_factors((24, 17), (3, 5, 2))
    want = 0.6 * elect_dense(weighted(dropped_dense(deltas(factors), own_masks((24, 17))), WEIGHTS))
    assert relative(merged_as("dare_ties", factors, **BY_NAME).dense(), want) < CLOSE


def test_dare_in_core_space_drops_core_entries():
    factors = random_factors((24, 17), (3, 5, 2))
    U, M, Vt = core_dense(factors)
    # Singular vectors have no sign of their own; dropping is entrywise, so the sign cancels on the way back.
    want = 0.6 * U @ weighted(dropped_dense(M, own_masks(M.shape[1:])), WEIGHTS).sum(0) @ Vt
    merged = merged_as("dare_linear", factors, space="core", **BY_NAME)
    assert relative(merged.dense(), want) < CLOSE
    assert merged.factors() is not None


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "knots_dare_ties"])
def test_density_one_drops_nothing(method):
    factors = random_factors((24, 17), (3, 5))
    plain = "task_arithmetic" if method == "dare_linear" else method.replace("dare_", "")
    given = {} if method == "dare_linear" else {"density": 1.0}
    want = merge_factors(plain, factors, **given).dense()
    assert relative(merge_factors(method, factors, density=1.0).dense(), want) < CLOSE


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "knots_dare_ties"])
def test_the_order_of_adapters_does_not_move_a_mask(method):
    factors = random_factors((24, 17), (3, 5, 2))
    order = [2, 0, 1]
    other = merged_as(method, [factors[i] for i in order], tuple(NAMES[i] for i in order), **BY_NAME)
    assert relative(other.dense(), merged_as(method, factors, **BY_NAME).dense()) < CLOSE


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "knots_dare_ties"])
def test_seed_and_site_decide_the_result(method):
    factors = random_factors((24, 17), (3, 5, 2))
    first = merged_as(method, factors).dense()
    assert torch.equal(merged_as(method, factors).dense(), first)
    assert not torch.equal(merged_as(method, factors, seed=4).dense(), first)
    assert not torch.equal(merged_as(method, factors, site="layers.1").dense(), first)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_rows_have_the_same_bits_in_any_block(method):
    delta = merge_factors(method, random_factors((20, 65_536), (4, 4), dtype=torch.float32))
    dense = delta.dense()
    for start, stop in [(0, 1), (15, 17), (3, 19), (16, 20)]:
        assert torch.equal(delta.rows(start, stop), dense[start:stop])


def test_what_is_kept_makes_up_for_what_is_dropped_on_average():
    factors = random_factors((40, 30), (4, 3))
    want = deltas(factors).sum(0)
    runs = torch.stack(
        [merge_factors("dare_linear", factors, density=0.5, seed=seed).dense() for seed in range(400)]
    )
    # Each entry has variance sum_i tau_i^2 (1 - p) / p = sum_i tau_i^2 here.
    spread = deltas(factors).square().sum(0).sum().sqrt() / math.sqrt(400)
    assert float((runs.mean(0) - want).norm()) < 1.3 * float(spread)


def test_mergekit_keeps_the_l1_norm_of_each_delta():
    factors = random_factors((24, 17), (3, 5, 2))
    values, masks = deltas(factors), own_masks((24, 17), density=[0.3] * 3)
    scales = [float(v.abs().sum() / (v * m).abs().sum()) for v, m in zip(values, masks, strict=True)]
    want = weighted(values * masks, scales)
    merged = merged_as("dare_linear", factors, density=0.3, compat="mergekit")
    assert relative(merged.dense(), want.sum(0)) < CLOSE
    elected = merged_as("dare_ties", factors, density=0.3, compat="mergekit")
    agree = want.sign() == torch.where(want.sum(0) >= 0, 1, -1)
    assert relative(elected.dense(), (want * agree).sum(0)) < CLOSE
    normalised = merged_as("dare_ties", factors, density=0.3, compat="mergekit", normalize=True)
    assert relative(normalised.dense(), (want * agree).sum(0) / agree.sum(0).clamp(min=1)) < CLOSE


def test_mergekit_leaves_a_delta_of_almost_nothing_unscaled():
    (factor,) = random_factors((24, 17), [3])
    factor = type(factor)(factor.B * 1e-12, factor.A, factor.scale)
    merged = merged_as("dare_linear", [factor], ("a",), density=0.3, compat="mergekit")
    want = deltas([factor])[0] * own_masks((24, 17), ("a",), [0.3])[0]
    assert relative(merged.dense(), want) < CLOSE


def test_a_mask_from_elsewhere_can_be_applied():
    factors = random_factors((24, 17), (3, 5, 2))
    masks = torch.rand(3, 24, 17, generator=torch.Generator().manual_seed(8)) < 0.4
    space = SiteFactors(factors).space("dense")
    kept = dropped(space, [0.4] * 3, "paper", lambda adapter, index, shape: masks[adapter])
    merged = space.lift(weighted_sum(kept, WEIGHTS)).dense()
    want = weighted(dropped_dense(deltas(factors), masks, [0.4] * 3), WEIGHTS).sum(0)
    assert relative(merged, want) < CLOSE
