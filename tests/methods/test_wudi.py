import pytest
import torch
from method_cases import deltas, random_factors, relative, weighted

from ray_merge.errors import MethodError
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

CLOSE = 1e-9
SHAPES_AND_RANKS = [
    ((24, 17), (3, 5, 2)),  # the stacked A has full row rank: no interference is left
    ((17, 24), (0, 4, 1)),
    ((12, 6), (3, 4, 2)),  # ranks add up to more than I
    ((5, 4), (7, 1, 3)),
    ((1, 1), (1, 1, 1)),
]
WEIGHTS = [0.5, -1.0, 2.0]


def solved(values, power=2):
    """N H^+ on dense deltas: the normal equations of sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^power."""
    H = torch.zeros(values.shape[2], values.shape[2], dtype=values.dtype)
    N = torch.zeros_like(values[0])
    for delta in values:
        if delta.norm() > 0:
            share = 1 / delta.norm() ** power
            H += share * delta.T @ delta
            N += share * delta @ delta.T @ delta
    return N @ torch.linalg.pinv(H, hermitian=True, rtol=1e-12)


def objective(merged, values):
    return float(sum(((merged - d) @ d.T).square().sum() / d.norm().square() for d in values))


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize(("compat", "power"), [("paper", 2), ("authors", 1)])
def test_wudi_solves_the_normal_equations(shape, ranks, compat, power):
    factors = random_factors(shape, ranks)
    merged = merge_factors("wudi", factors, weight=WEIGHTS, lambda_=0.4, compat=compat)
    assert relative(merged.dense(), 0.4 * solved(weighted(deltas(factors), WEIGHTS), power)) < CLOSE
    assert merged.rank == sum(ranks)


@pytest.mark.parametrize("columns", [5, 12])
def test_gradient_descent_on_the_dense_problem_ends_where_the_closed_form_is(columns):
    values = deltas(random_factors((8, columns), (2, 2, 2), seed=4))
    shares = [1 / delta.norm().square() for delta in values]
    H = sum(share * delta.T @ delta for share, delta in zip(shares, values, strict=True))
    step = 0.5 / float(torch.linalg.eigvalsh(H)[-1])
    tau = values.sum(0)
    for _ in range(20000):
        gradient = sum(2 * share * (tau - d) @ d.T @ d for share, d in zip(shares, values, strict=True))
        tau = tau - step * gradient
        if float(gradient.norm()) < 1e-13:
            break
    merged = merge_factors("wudi", random_factors((8, columns), (2, 2, 2), seed=4)).dense()
    assert relative(merged, tau) < 1e-6
    assert objective(merged, values) <= objective(tau, values) * (1 + 1e-9) + 1e-20
    # The start is another point: the test could not pass by standing still.
    assert relative(values.sum(0), tau) > 0.05


def test_without_overlap_of_inputs_wudi_is_the_sum():
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    factors = [
        Factor(torch.randn(9, 3, generator=generator, dtype=torch.float64), Q[start : start + 3] * 2, 0.7)
        for start in (0, 3, 6)
    ]
    merged = merge_factors("wudi", factors, weight=WEIGHTS)
    assert relative(merged.dense(), merge_factors("task_arithmetic", factors, weight=WEIGHTS).dense()) < CLOSE


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_equal_adapters_merge_to_themselves(copies):
    (factor,) = random_factors((9, 8), [3])
    assert relative(merge_factors("wudi", [factor] * copies).dense(), deltas([factor])[0]) < CLOSE


def test_adapters_of_one_frozen_factor_are_solved_too():
    first, second = random_factors((9, 8), [3, 3])
    factors = [first, Factor(second.B, first.A, 1.5)]
    assert relative(merge_factors("wudi", factors).dense(), solved(deltas(factors))) < CLOSE


def test_where_ranks_fit_no_adapter_is_disturbed_on_its_own_inputs():
    factors = random_factors((10, 20), (4, 5, 6))
    merged = merge_factors("wudi", factors).dense()
    for factor, delta in zip(factors, deltas(factors), strict=True):
        assert relative(merged @ factor.A.T, delta @ factor.A.T) < CLOSE


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_a_ridge_pulls_towards_the_sum(shape, ranks, ridge):
    factors = random_factors(shape, ranks)
    values = weighted(deltas(factors), WEIGHTS)
    shares = [1 / delta.norm().square() if delta.norm() else 0.0 for delta in values]
    H = sum(share * delta.T @ delta for share, delta in zip(shares, values, strict=True))
    N = sum(share * delta @ delta.T @ delta for share, delta in zip(shares, values, strict=True))
    identity = torch.eye(shape[1], dtype=torch.float64)
    want = (N + ridge * values.sum(0)) @ torch.linalg.inv(H + ridge * identity)
    merged = merge_factors("wudi", factors, weight=WEIGHTS, ridge=ridge)
    assert relative(merged.dense(), want) < CLOSE


def test_a_huge_ridge_leaves_the_sum():
    factors = random_factors((24, 17), (3, 5, 2))
    merged = merge_factors("wudi", factors, ridge=1e12)
    assert relative(merged.dense(), merge_factors("task_arithmetic", factors).dense()) < CLOSE


def test_nearly_equal_inputs_make_the_minimum_large_and_a_ridge_does_not_let_them():
    first, second, moved = random_factors((24, 40), (4, 4, 4))
    factors = [first, Factor(second.B, first.A + 1e-3 * moved.A, first.scale)]
    plain = merge_factors("task_arithmetic", factors).norm()
    assert merge_factors("wudi", factors).norm() > 100 * plain
    assert merge_factors("wudi", factors, ridge=0.01).norm() < 2 * plain


def test_wudi_does_not_depend_on_gauge_order_or_the_place_of_a_scale():
    factors = random_factors((20, 9), (3, 4, 5))
    want = merge_factors("wudi", factors, weight=WEIGHTS).dense()
    generator = torch.Generator().manual_seed(9)
    turned = []
    for factor in factors:
        G = torch.randn(factor.B.shape[1], factor.B.shape[1], generator=generator, dtype=torch.float64)
        turned.append(Factor(factor.B @ G, torch.linalg.solve(G, factor.A), factor.scale))
    scaled = [Factor(f.B, f.A, f.scale * own) for f, own in zip(factors, WEIGHTS, strict=True)]
    order = [2, 0, 1]
    shuffled = [factors[place] for place in order]
    assert relative(merge_factors("wudi", turned, weight=WEIGHTS).dense(), want) < CLOSE
    assert relative(merge_factors("wudi", scaled).dense(), want) < CLOSE
    weights = [WEIGHTS[place] for place in order]
    assert relative(merge_factors("wudi", shuffled, weight=weights).dense(), want) < CLOSE


def test_an_adapter_without_update_or_weight_has_no_say():
    first, second, third = random_factors((9, 8), [3, 2, 4])
    want = merge_factors("wudi", [first, second]).dense()
    fresh = Factor(torch.zeros_like(third.B), third.A, 1.0)
    silent = Factor(third.B, torch.zeros_like(third.A), 1.0)
    for extra, own in ((fresh, 1.0), (silent, 1.0), (third, 0.0), (Factor(third.B, third.A, 0.0), 1.0)):
        merged = merge_factors("wudi", [first, extra, second], weight=[1.0, own, 1.0])
        assert relative(merged.dense(), want) < CLOSE
    nothing = merge_factors("wudi", [fresh, silent])
    assert torch.equal(nothing.dense(), torch.zeros(9, 8, dtype=torch.float64))
    assert nothing.norm() == 0
    assert merge_factors("wudi", random_factors((9, 8), [0, 0])).norm() == 0


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_float32_factors_give_float32_accuracy(shape, ranks):
    single = random_factors(shape, ranks, dtype=torch.float32)
    merged = merge_factors("wudi", single)
    assert merged.dense().dtype == torch.float32
    assert relative(merged.dense(), solved(deltas(single))) < 1e-5


def test_bad_parameters_are_refused():
    factors = random_factors((4, 4), [2])
    with pytest.raises(MethodError, match="wudi: compat is 'fusion_bench', expected one of paper, authors"):
        merge_factors("wudi", factors, compat="fusion_bench")
    with pytest.raises(MethodError, match="wudi has no parameter 'density'"):
        merge_factors("wudi", factors, density=0.5)
    with pytest.raises(MethodError, match="wudi: ridge is -1, expected a number in"):
        merge_factors("wudi", factors, ridge=-1)
    dora = Factor(factors[0].B, factors[0].A, 1.0, magnitude=torch.ones(4, 1, dtype=torch.float64))
    with pytest.raises(MethodError, match="wudi works on factors, but a DoRA delta is dense"):
        merge_factors("wudi", [dora], base=torch.eye(4, dtype=torch.float64))


# Printed by `benchmarks/parity/wudi.py --columns C`: their Adam inside the row space of the deltas.
# fusion_bench 54c9e8c9d9621620c720452cd8533332a32d3689, nathanielyvo/WUDI-Merging
# dc3cd1204a68d1930a32da11c5cddb0cbd7410bb (vit/coef.py, divides by |tau_i|).
# columns, compat, their norm, their entry [3, 5], their relative distance to our minimum
PARITY = [
    (40, "paper", 0.108810653571, -0.00150585603323, 1e-10),
    (40, "authors", 0.108810653571, -0.00150585603323, 1e-10),
    (7, "paper", 0.0602779055394, -0.00356737935988, 2e-5),
    (7, "authors", 0.0603389892812, -0.00334696729947, 1e-10),
]


@pytest.mark.parametrize(("columns", "compat", "norm", "entry", "distance"), PARITY)
def test_their_adam_ends_at_the_closed_form(columns, compat, norm, entry, distance):
    generator = torch.Generator().manual_seed(2)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    factors = [Factor(normal(32, 3) / columns * (1e-3 * columns), normal(3, columns), 1.0) for _ in range(3)]
    merged = merge_factors("wudi", factors, compat=compat)
    # The recorded numbers have 12 digits.
    assert merged.norm() == pytest.approx(norm, rel=distance + 1e-11)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=20 * distance + 1e-10)
