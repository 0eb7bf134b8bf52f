import pytest
import torch
from method_cases import deltas, random_factors, relative, weighted

from ray_merge.errors import MethodError
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

CLOSE = 1e-10
SHAPES_AND_RANKS = [
    ((24, 17), (3, 5, 2)),
    ((17, 24), (0, 4, 1)),
    ((5, 4), (7, 1, 3)),
    ((1, 1), (1, 1, 1)),
]
WEIGHTS = [0.5, -1.0, 2.0]


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("method", ["task_arithmetic", "cat"])
def test_the_sum_is_the_weighted_sum_of_deltas(method, shape, ranks):
    factors = random_factors(shape, ranks)
    merged = merge_factors(method, factors, weight=WEIGHTS, lambda_=0.4)
    assert relative(merged.dense(), 0.4 * weighted(deltas(factors), WEIGHTS).sum(0)) < CLOSE
    assert merged.rank == sum(ranks)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_linear_divides_by_the_sum_of_weights(shape, ranks):
    factors = random_factors(shape, ranks)
    want = weighted(deltas(factors), WEIGHTS).sum(0) / sum(WEIGHTS)
    assert relative(merge_factors("linear", factors, weight=WEIGHTS).dense(), want) < CLOSE
    same = merge_factors("task_arithmetic", factors, weight=WEIGHTS, normalize=True)
    assert torch.equal(merge_factors("linear", factors, weight=WEIGHTS).dense(), same.dense())


def test_one_adapter_of_weight_one_is_itself_under_every_sum():
    (factor,) = random_factors((9, 8), [3])
    for method, given in [("task_arithmetic", {}), ("linear", {}), ("cat", {}), ("svd", {"rank": 3})]:
        assert relative(merge_factors(method, [factor], **given).dense(), deltas([factor])[0]) < CLOSE


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "cat"])
def test_sums_do_not_depend_on_the_gauge_of_the_factors(method):
    factors = random_factors((20, 15), (3, 4))
    generator = torch.Generator().manual_seed(9)
    turned = []
    for factor in factors:
        G = torch.randn(factor.B.shape[1], factor.B.shape[1], generator=generator, dtype=torch.float64)
        turned.append(Factor(factor.B @ G, torch.linalg.solve(G, factor.A), factor.scale))
    assert relative(merge_factors(method, turned).dense(), merge_factors(method, factors).dense()) < CLOSE


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_svd_is_the_best_approximation_of_the_sum_and_reports_its_error(rank):
    factors = random_factors((24, 17), (3, 5, 2))
    total = weighted(deltas(factors), WEIGHTS).sum(0)
    merged = merge_factors("svd", factors, weight=WEIGHTS, rank=rank)
    singular = torch.linalg.svdvals(total)
    best = float(singular[rank:].norm() / singular.norm())
    assert merged.rank == rank
    assert merged.truncation_error == pytest.approx(best, rel=1e-9)
    assert relative(merged.dense(), total) == pytest.approx(best, rel=1e-9)


def test_svd_that_keeps_everything_is_the_exact_sum():
    factors = random_factors((24, 17), (3, 5, 2))
    merged = merge_factors("svd", factors, rank=10)
    assert merged.truncation_error == 0.0
    assert relative(merged.dense(), deltas(factors).sum(0)) < CLOSE


def test_linear_with_peft_arithmetic_has_the_cross_terms():
    factors = random_factors((12, 10), (4, 4))
    weight = [0.7, -0.3]
    roots = [abs(w * f.scale) ** 0.5 for w, f in zip(weight, factors, strict=True)]
    B = sum(root * f.B for root, f in zip(roots, factors, strict=True))
    A = sum(root * f.A * (1 if w >= 0 else -1) for root, w, f in zip(roots, weight, factors, strict=True))
    merged = merge_factors("linear", factors, weight=weight, compat="peft")
    assert relative(merged.dense(), B @ A) < CLOSE
    assert merged.rank == 4


def test_linear_with_peft_arithmetic_leaves_out_adapters_that_do_not_touch_the_site():
    factors = random_factors((12, 10), (4, 0, 4))
    with_untouched = merge_factors("linear", factors, compat="peft").dense()
    assert torch.equal(
        with_untouched, merge_factors("linear", [factors[0], factors[2]], compat="peft").dense()
    )
    untouched = random_factors((12, 10), (0, 0))
    assert not merge_factors("linear", untouched, compat="peft").dense().any()


def test_linear_with_peft_arithmetic_refuses_different_ranks():
    with pytest.raises(MethodError, match="needs equal ranks, but they are 0 4, 1 3"):
        merge_factors("linear", random_factors((12, 10), (4, 3)), compat="peft")
