import dataclasses
import math

import pytest
import torch
from method_cases import core_dense, deltas, random_factors, relative, weighted

from ray_merge.errors import MethodError
from ray_merge.methods import registry
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

CLOSE = 1e-10
SHAPES_AND_RANKS = [
    ((24, 17), (3, 5, 2)),
    ((17, 24), (0, 4, 1)),
    ((9, 30), (8, 6, 3)),
    ((1, 1), (1, 1, 1)),
    ((30, 20), (4,)),
]
WEIGHTS = [0.5, -1.0, 2.0]


def cart_dense(values, rank, centred=1.0):
    """The formula on dense deltas."""
    mean = values.mean(0)
    U, s, Vt = torch.linalg.svd(values - mean, full_matrices=False)
    return mean + centred * (U[..., :rank] * s[:, None, :rank] @ Vt[:, :rank]).sum(0)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("space", ["dense", "core"])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_formula_on_dense_deltas(shape, ranks, space, rank):
    factors, weights = random_factors(shape, ranks), WEIGHTS[: len(ranks)]
    want = 0.4 * cart_dense(weighted(deltas(factors), weights), rank, 0.7)
    merged = merge_factors("cart", factors, weight=weights, lambda_=0.4, centred=0.7, rank=rank, space=space)
    assert relative(merged.dense(), want) < CLOSE
    assert merged.rank == min(*shape, sum(ranks))


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("share", [0.04, 0.3])
def test_a_share_is_of_the_singular_values_of_the_space(shape, ranks, share):
    factors = random_factors(shape, ranks)
    want = cart_dense(deltas(factors), math.ceil(share * min(shape)))
    assert relative(merge_factors("cart", factors, share=share).dense(), want) < CLOSE
    U, core, Vt = core_dense(factors)
    want = U @ cart_dense(core, math.ceil(share * min(core.shape[1:]))) @ Vt
    assert relative(merge_factors("cart", factors, share=share, space="core").dense(), want) < CLOSE


def test_by_default_the_published_share_is_kept():
    factors = random_factors((60, 55), (5, 6, 4))
    merged = merge_factors("cart", factors).dense()
    assert torch.equal(merged, merge_factors("cart", factors, share=0.04).dense())
    assert relative(merged, cart_dense(deltas(factors), 3)) < CLOSE  # 0.04 * 55 = 2.2


@pytest.mark.parametrize("given", [{"centred": 0.0, "rank": 1}, {"rank": 10}, {"rank": 99}, {"share": 0.6}])
def test_it_is_the_mean_where_nothing_is_added_or_nothing_cut_off(given):
    # A share of a dense delta is easily more than low-rank deltas have: 0.6 of 17 is 11, and the ranks add up to 10.
    factors = random_factors((24, 17), (3, 5, 2))
    mean = merge_factors("task_arithmetic", factors, lambda_=1 / 3).dense()
    assert relative(merge_factors("cart", factors, **given).dense(), mean) < CLOSE
    assert relative(merge_factors("cart", factors, rank=1).dense(), mean) > 1e-3


@pytest.mark.parametrize("count", [1, 4])
def test_copies_of_one_adapter_merge_to_it(count):
    (factor,) = random_factors((24, 17), (3,))
    merged = merge_factors("cart", [factor] * count, rank=1).dense()
    assert relative(merged, deltas([factor])[0]) < CLOSE


def test_opposite_adapters_cancel():
    factors = random_factors((24, 17), (3,)) * 2
    merged = merge_factors("cart", factors, weight=[1.0, -1.0], rank=2)
    assert merged.norm() < CLOSE * float(deltas(factors)[0].norm())


def in_another_gauge(factors, seed=9):
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for factor in factors:
        G = torch.randn(factor.B.shape[1], factor.B.shape[1], generator=generator, dtype=torch.float64)
        turned.append(Factor(factor.B @ G, torch.linalg.solve(G, factor.A), factor.scale))
    return turned


@pytest.mark.parametrize("given", [{"rank": 2}, {"share": 0.2}, {"share": 0.2, "space": "core"}])
def test_neither_gauge_nor_order_matters(given):
    factors = random_factors((20, 15), (3, 4, 2))
    want = merge_factors("cart", factors, weight=WEIGHTS, **given).dense()
    turned = merge_factors("cart", in_another_gauge(factors), weight=WEIGHTS, **given).dense()
    assert relative(turned, want) < CLOSE
    reverse = merge_factors("cart", factors[::-1], weight=WEIGHTS[::-1], **given).dense()
    assert relative(reverse, want) < CLOSE


def test_the_nominal_rank_matters_only_to_a_share_of_core_space():
    factors = random_factors((20, 18), (3, 4, 2))
    rows = torch.randn(4, 18, generator=torch.Generator().manual_seed(1)).double()
    longer = Factor(
        torch.nn.functional.pad(factors[0].B, (0, 4)), torch.cat([factors[0].A, rows]), factors[0].scale
    )
    changes = {}
    for name, given in {
        "rank": {"rank": 2},
        "dense": {"share": 0.1},
        "core": {"share": 0.1, "space": "core"},
    }.items():
        want = merge_factors("cart", factors, **given).dense()
        changes[name] = relative(merge_factors("cart", [longer, *factors[1:]], **given).dense(), want)
    assert changes["rank"] < CLOSE
    assert changes["dense"] < CLOSE
    assert changes["core"] > 1e-3  # 0.1 of 9 is 1 singular value, 0.1 of 13 is 2


def test_an_adapter_without_a_delta_is_a_delta_of_zero_that_pulls_the_mean():
    factors = random_factors((24, 17), (3, 5))
    B, A = torch.zeros(24, 2, dtype=torch.float64), torch.ones(2, 17, dtype=torch.float64)
    values = torch.cat([deltas(factors), torch.zeros(1, 24, 17, dtype=torch.float64)])
    want = cart_dense(values, 2)
    for nothing in (Factor(B, A, 1.0), Factor(B[:, :0], A[:0], 1.0)):
        assert relative(merge_factors("cart", [*factors, nothing], rank=2).dense(), want) < CLOSE
    other = random_factors((24, 17), (3, 5, 1))[2]
    zero_weight = merge_factors("cart", [*factors, other], weight=[1, 1, 0], rank=2).dense()
    assert relative(zero_weight, want) < CLOSE
    assert not merge_factors("cart", [Factor(B, A, 1.0)] * 2, rank=1).dense().any()
    assert not merge_factors("cart", [Factor(B[:, :0], A[:0], 1.0)] * 2).dense().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_factors_are_merged_to_float32(dtype):
    factors = random_factors((60, 48), (8, 4, 6), dtype=dtype)
    merged = merge_factors("cart", factors, weight=WEIGHTS, rank=4).dense()
    assert merged.dtype == torch.float32
    assert relative(merged, cart_dense(weighted(deltas(factors), WEIGHTS), 4)) < 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 2, "share": 0.5}, "share 0.5 and rank 2 both say how many singular values are kept"),
        ({"rank": 0}, r"rank is 0, expected a number in \[1, inf\)"),
        ({"share": 0.0}, r"share is 0.0, expected a number in \(0, 1\]"),
        ({"share": 1.5}, "share is 1.5, expected a number"),
        ({"space": "knots"}, "space is 'knots', expected one of dense, core"),
    ],
)
def test_what_it_cannot_do_is_refused(given, message):
    with pytest.raises(MethodError, match=message):
        merge_factors("cart", random_factors((6, 5), (2, 2)), **given)


@pytest.mark.parametrize("given", [{}, {"rank": 3}, {"share": 0.5}])
def test_resolved_parameters_resolve_to_themselves(given):
    method = registry.get("cart")
    once = registry.resolve_parameters(method, given, ["a", "b"])
    assert registry.resolve_parameters(method, once, ["a", "b"]) == once


def test_dora_is_refused():
    (factor,) = random_factors((6, 5), (2,))
    dora = dataclasses.replace(factor, magnitude=torch.ones(6, 1))
    with pytest.raises(MethodError, match="cart works on factors, but a DoRA delta is dense"):
        merge_factors("cart", [dora], base=torch.ones(6, 5))


def seeded(size, rank, count, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [Factor(normal(size, rank) / size, normal(rank, size), 1.0) for _ in range(count)]


# Made by `benchmarks/parity/cart.py` with github.com/apanariello4/core-space-merging at
# 85176fab749578b0b54a027ea89495846e79757d: float64, 192 x 192, 4 adapters of rank 8, seed 3.
@pytest.mark.parametrize(
    ("space", "share", "norm", "entry"),
    [
        ("dense", 0.04, 2.47263495887, -0.0165440279528),
        ("dense", 0.32, 0.854092256982, -0.00546720226264),
        ("core", 0.04, 1.66764185459, -0.0102012660781),
        ("core", 0.32, 2.16685651447, -0.00953804477248),
    ],
)
def test_it_gives_the_core_space_authors_numbers(space, share, norm, entry):
    given = {"space": space, "share": share, "lambda_": 0.6, "centred": 0.7}
    merged = merge_factors("cart", seeded(192, 8, 4, 3), **given)
    assert merged.norm() == pytest.approx(norm, rel=1e-10)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=1e-9)
