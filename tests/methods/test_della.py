"""DELLA. Numbers of the authors' code: github.com/declare-lab/della at 80675156d6742edb81548c8037947d92dc79dc66, made
by `benchmarks/parity/della.py`, with "the probability is above 0.6801" in place of a random draw.
"""

import dataclasses
import math

import pytest
import torch
from entrywise_cases import (
    CLOSE,
    NAMES,
    SHAPES_AND_RANKS,
    SPACES,
    WEIGHTS,
    check_rows_in_any_block,
    check_zero_adapters,
    dora_error,
    float32_error,
    gauge_moves,
    in_space,
    merged_as,
    order_moves,
)
from method_cases import deltas, elect_dense, random_factors, relative, weighted

from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.sparsify import mask_seed
from ray_merge.errors import MethodError
from ray_merge.methods.catalogue.della import DellaLinear
from ray_merge.methods.dare import weighted_sum
from ray_merge.methods.della import probabilities, sampled
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import at_site, get, resolve_parameters
from ray_merge.spec import Factor

METHODS = ["della", "della_linear"]
DENSITY, EPSILON = [0.3, 0.6, 1.0], [0.1, 0.0, 0.2]


def ranked(values, density, epsilon):
    """Keep probabilities, one row after another: from density - epsilon to density + epsilon by rank."""
    out = torch.empty_like(values)
    n = values.shape[1]
    for row, magnitudes in zip(out, values.abs(), strict=True):
        order = sorted(range(n), key=lambda column: (float(magnitudes[column]), column))
        for rank, column in enumerate(order):
            row[column] = density + epsilon * (2 * rank / (n - 1) - 1) if n > 1 else density
    return out


def masks_and_probabilities(values, density, epsilon, names, site, seed):
    """Of sites that are one chunk."""
    for own, share, width, name in zip(values, density, epsilon, names, strict=True):
        p = ranked(own, share, width if share < 1 else 0.0)
        generator = torch.Generator().manual_seed(mask_seed(seed, site, name, 0))
        yield torch.rand(own.shape, generator=generator, dtype=torch.float32) < p, p


def reference(
    method, density=(0.7,) * 3, epsilon=(0.07,) * 3, weights=(1.0,) * 3, compat="paper", names="012"
):
    def merged(values, site="", seed=0):
        n = len(values)
        draws = masks_and_probabilities(values, density[:n], epsilon[:n], names[:n], site, seed)
        kept = []
        for own, (mask, p) in zip(values, draws, strict=True):
            chosen = own * mask
            if compat == "mergekit" and bool(chosen.any()):
                kept.append(chosen * float(own.abs().sum() / chosen.abs().sum()))
            else:
                kept.append(chosen / p)
        stacked = weighted(torch.stack(kept), weights[:n])
        return stacked.sum(0) if method == "della_linear" else elect_dense(stacked)

    return merged


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_entries_are_drawn_by_the_rank_of_their_magnitude_in_their_row(method, space, shape, ranks):
    # Singular vectors have no sign of their own; ranks and masks do not see it.
    factors = random_factors(shape, ranks)
    merged = merged_as(
        method, factors, weight=WEIGHTS, density=DENSITY, epsilon=EPSILON, space=space, **{"lambda": 0.6}
    )
    rule = reference(method, DENSITY, EPSILON, WEIGHTS, names=NAMES)
    want = 0.6 * in_space(space, factors, lambda values: rule(values, "layers.0", 3))
    assert relative(merged.dense(), want) < CLOSE
    assert (merged.factors() is None) is (space == "dense")


@pytest.mark.parametrize("shape", [(7, 9), (3, 1), (1, 2)])
def test_probabilities_rise_with_rank_and_average_to_the_density(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    p = probabilities(values, 0.6, 0.25)
    assert relative(p, ranked(values, 0.6, 0.25)) < 1e-14
    assert p.mean(dim=1).tolist() == pytest.approx([0.6] * shape[0])


def test_entries_of_equal_magnitude_are_ranked_by_column():
    p = probabilities(torch.tensor([[2.0, -1.0, 0.0, 1.0, 0.0]]), 0.5, 0.2)
    assert p[0].tolist() == pytest.approx([0.7, 0.5, 0.3, 0.6, 0.4])


@pytest.mark.parametrize("space", SPACES)
def test_without_a_window_it_is_dare(space):
    factors = random_factors((24, 17), (3, 5, 2))
    given = {"weight": WEIGHTS, "density": [0.3, 0.6, 1.0], "space": space}
    want = merge_factors("dare_linear", factors, **given).dense()
    assert relative(merge_factors("della_linear", factors, epsilon=0.0, **given).dense(), want) < CLOSE
    want = merge_factors("dare_ties", factors, **given).dense()
    assert relative(merge_factors("della", factors, epsilon=0.0, **given).dense(), want) < CLOSE


@pytest.mark.parametrize(("method", "plain"), [("della_linear", "task_arithmetic"), ("della", "ties")])
def test_density_one_drops_nothing(method, plain):
    factors = random_factors((24, 17), (3, 5))
    given = {"density": 1.0} if plain == "ties" else {}
    want = merge_factors(plain, factors, **given).dense()
    assert relative(merge_factors(method, factors, density=1.0).dense(), want) < CLOSE


def test_what_is_kept_makes_up_for_what_is_dropped_on_average():
    factors = random_factors((20, 15), (4, 3))
    values = deltas(factors)
    runs = torch.stack(
        [
            merge_factors("della_linear", factors, density=0.5, epsilon=0.3, seed=seed).dense()
            for seed in range(200)
        ]
    )
    p = torch.stack([ranked(own, 0.5, 0.3) for own in values])
    spread = (values.square() * (1 - p) / p).sum().div(200).sqrt()
    assert float((runs.mean(0) - values.sum(0)).norm()) < 1.3 * float(spread)


@pytest.mark.parametrize("method", METHODS)
def test_seed_and_site_decide_the_result(method):
    factors = random_factors((24, 17), (3, 5, 2))
    first = merged_as(method, factors).dense()
    assert torch.equal(merged_as(method, factors).dense(), first)
    assert not torch.equal(merged_as(method, factors, seed=4).dense(), first)
    assert not torch.equal(merged_as(method, factors, site="layers.1").dense(), first)


@pytest.mark.parametrize("method", METHODS)
def test_mergekit_keeps_the_l1_norm_of_each_delta(method):
    factors = random_factors((24, 17), (3, 5, 2))
    density, epsilon = [0.3, 0.6, 0.5], [0.1, 0.0, 0.4]
    merged = merge_factors(method, factors, density=density, epsilon=epsilon, compat="mergekit")
    want = reference(method, density, epsilon, compat="mergekit")(deltas(factors))
    assert relative(merged.dense(), want) < CLOSE


def test_mergekit_divides_by_the_weights_unless_told_otherwise():
    factors, weights = random_factors((24, 17), (3, 5, 2)), [0.5, 2.0, 3.0]
    given = {"weight": weights, "compat": "mergekit"}
    kept = merge_factors("della", factors, normalize=False, **given).dense()
    divided = merge_factors("della", factors, **given).dense()
    ratio = (kept / divided)[divided != 0]
    sums = torch.tensor([0.5, 2.0, 3.0, 2.5, 3.5, 5.0, 5.5], dtype=ratio.dtype)
    assert bool(((ratio[:, None] - sums).abs().amin(dim=1) < 1e-9).all())
    linear = merge_factors("della_linear", factors, normalize=True, **given).dense()
    assert relative(linear * 5.5, merge_factors("della_linear", factors, **given).dense()) < CLOSE


def test_the_authors_probabilities():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = [Factor(normal(192, 8) / 192, normal(8, 192), 1.0) for _ in range(4)]
    space = SiteFactors(factors).space("dense")
    p = DellaLinear(
        weight=(1.0,) * 4,
        density=(0.7,) * 4,
        epsilon=(0.07,) * 4,
        lambda_=1.0,
        scope="tensor",
        space="dense",
        compat="paper",
        normalize=None,
    )
    kept = sampled(space, p, lambda adapter, index, shape: torch.full(shape, 0.6801))
    merged = space.lift(weighted_sum(kept, p.weight))
    # Theirs is computed in float32.
    assert merged.norm() == pytest.approx(7.53915191025, rel=1e-6)
    assert float(merged.dense()[3, 5]) == pytest.approx(-0.0425354242325, rel=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_are_zero_are_harmless(method, space):
    check_zero_adapters(method, space)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_move_a_mask(method, space):
    assert order_moves(method, space, weight=WEIGHTS, density=DENSITY, epsilon=EPSILON) < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_it_sees_deltas_and_in_core_space_also_the_gauge_of_their_factors(method):
    assert gauge_moves(method, "dense") < 1e-9
    assert gauge_moves(method, "knots") < 1e-9
    assert gauge_moves(method, "core") > 1e-2


def test_rows_have_the_same_bits_in_any_block():
    check_rows_in_any_block("della_linear")


@pytest.mark.parametrize("method", METHODS)
def test_float32_factors_are_merged_in_float32(method):
    assert float32_error(method, reference(method)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_dora_delta_is_treated_like_any_other(method):
    assert dora_error(method, reference(method)) < CLOSE


def test_probabilities_outside_0_to_1_are_refused():
    method = get("della")
    for given in ({"density": 0.1, "epsilon": 0.1}, {"density": 0.9, "epsilon": 0.2}):
        with pytest.raises(MethodError, match=r"for a give probabilities from .* must lie in \(0, 1\]"):
            resolve_parameters(method, given, ["a"])
    with pytest.raises(MethodError, match=r"epsilon .*is 0.6, expected a number in \[0, 0.5\]"):
        resolve_parameters(method, {"epsilon": 0.6}, ["a"])
    # Nothing is drawn at density 1.
    resolve_parameters(method, {"density": 1.0, "epsilon": 0.2}, ["a"])


def test_probabilities_are_checked_for_the_sites_that_they_meet_at():
    method = get("della_linear")
    mlp = {"filter": "mlp", "value": 0.95}
    with pytest.raises(MethodError, match=r"density 0\.95 and epsilon 0\.07 for a"):
        resolve_parameters(method, {"density": [mlp, {"value": 0.5}]}, ["a"])
    small = [{"filter": "mlp", "value": 0.05}, {"value": 0.4}]
    resolved = resolve_parameters(method, {"density": [mlp, {"value": 0.5}], "epsilon": small}, ["a"])
    assert resolve_parameters(method, resolved, ["a"]) == resolved
    with pytest.raises(MethodError, match=r"density 0\.95 and epsilon 0\.4 for a"):
        resolve_parameters(method, {"density": [mlp, {"value": 0.5}], "epsilon": 0.4}, ["a"])


def gradient(*knots):
    return [{"depth": depth, "value": value} for depth, value in knots]


def least_and_most(density, epsilon):
    """By the definition, at many depths."""
    method = get("della_linear")
    lowest, highest = 1.0, 0.0
    # della_linear without its rule, so that nothing is refused.
    free = dataclasses.replace(method, rule=None)
    parameters = resolve_parameters(free, {"density": density, "epsilon": epsilon}, ["a"])
    for place in range(2001):
        p = at_site(free, parameters, ["a"], "s", place / 2000)
        if p.density[0] < 1:
            lowest = min(lowest, p.density[0] - p.epsilon[0])
            highest = max(highest, p.density[0] + p.epsilon[0])
    return lowest, highest


@pytest.mark.parametrize(
    ("density", "epsilon", "where"),
    [
        # A probability of 0 at depth 0.5, where epsilon has no knot.
        (gradient((0, 0.5), (0.5, 0.25), (1, 0.9)), gradient((0, 0.375), (0.75, 0.1875), (1, 0.05)), "0.5"),
        (gradient((0, 0.5), (0.5, 0.1), (1, 0.9)), gradient((0, 0.4), (0.99, 0.05), (1, 0.05)), "0.5"),
        (gradient((0, 0.3), (1, 0.7)), gradient((0, 0.1), (0.25, 0.45), (1, 0.1)), "0.25"),
        ([0.1, 0.5, 0.9], 0.2, "0"),
        # Nothing is drawn at density 1, but just before it.
        ([0.5, 1.0], 0.2, "1"),
        ([0.1, 0.5, 0.9], [0.05, 0.1], None),
        ([0.5, 1.0], [0.2, 0.0], None),
        ([1.0, 1.0, 0.7], [0.5, 0.0, 0.1], None),
        (gradient((0, 0.6), (1, 0.9)), gradient((0, 0.4), (0.3, 0.31), (1, 0.1)), None),
        (0.5, [0.1, 0.4, 0.2], None),
    ],
)
def test_gradients_are_compared_at_the_same_depth(density, epsilon, where):
    lowest, highest = least_and_most(density, epsilon)
    assert (lowest > 0 and highest <= 1 + 1e-12) is (where is None)
    for method in map(get, METHODS):
        if where is None:
            resolved = resolve_parameters(method, {"density": density, "epsilon": epsilon}, ["a"])
            assert resolve_parameters(method, resolved, ["a"]) == resolved
            continue
        with pytest.raises(MethodError, match=rf"for a near depth {where} give probabilities from"):
            resolve_parameters(method, {"density": density, "epsilon": epsilon}, ["a"])


def test_filters_that_cannot_meet_are_not_compared():
    method = get("della")
    density = [{"filter": "mlp", "value": 0.95}, {"filter": "attn", "value": 0.2}, {"value": 0.5}]
    # A site that matches mlp has both values of mlp, whatever stands behind it or between.
    epsilon = [{"filter": "mlp", "value": 0.05}, {"filter": "head", "value": 0.1}, {"value": 0.15}]
    resolve_parameters(method, {"density": density, "epsilon": epsilon}, ["a"])
    with pytest.raises(MethodError, match=r"density 0\.95 and epsilon 0\.1 for a give"):  # mlp and head
        resolve_parameters(
            method, {"density": density, "epsilon": [epsilon[1], epsilon[0], epsilon[2]]}, ["a"]
        )
    deep = [{"filter": "mlp", "value": [0.95, 0.5]}, *density[1:]]
    with pytest.raises(MethodError, match=r"epsilon 0\.06 for a near depth 0 give"):
        resolve_parameters(
            method, {"density": deep, "epsilon": [{"filter": "mlp", "value": 0.06}, {"value": 0.15}]}, ["a"]
        )
    shallow = [{"filter": "mlp", "value": [0.05, 0.3, 0.3]}, {"value": 0.15}]
    resolve_parameters(
        method, {"density": deep, "epsilon": [{"filter": "mlp", "value": 0.05}, shallow[1]]}, ["a"]
    )
    with pytest.raises(MethodError, match=r"density 0\.725 and epsilon 0\.3 for a near depth 0\.5"):
        resolve_parameters(method, {"density": deep, "epsilon": shallow}, ["a"])


def test_weights_that_cancel_are_not_divided_by():
    with pytest.raises(MethodError, match="sum to 0"):
        resolve_parameters(
            get("della_linear"),
            {"weight": {"a": 1, "b": -1}, "normalize": True, "compat": "mergekit"},
            ["a", "b"],
        )
    assert math.isclose(resolve_parameters(get("della"), {}, ["a"])["epsilon"]["a"], 0.07)
