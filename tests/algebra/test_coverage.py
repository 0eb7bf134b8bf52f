import pytest
import torch
from algebra_cases import SHAPES_AND_RANKS, delta_of, random_factors

from ray_merge.algebra.coverage import anisotropy, coverage
from ray_merge.algebra.moments import Moments, MomentSums
from ray_merge.algebra.sketch import as_sketch
from ray_merge.spec import Factor


def entropy_rank(stack):
    """Effective rank of a dense matrix, from its SVD; 0 for nothing."""
    s = torch.linalg.svdvals(stack) if stack.numel() else torch.zeros(1)
    p = s / s.sum() if float(s.sum()) else s
    return float(torch.exp(torch.special.entr(p).sum())) if float(s.sum()) else 0.0


def term_stack(factor):
    """(R, O I): the vectorised rank-1 terms."""
    terms = torch.einsum("or,ri->roi", factor.B.double(), factor.A.double()) * factor.scale
    return terms.flatten(1)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_the_three_ranks_are_those_of_the_dense_stacks(shape, ranks):
    factors = random_factors(shape, ranks)
    got = coverage(factors)
    stacks = [term_stack(factor) for factor in factors]
    assert got.by_task == pytest.approx([entropy_rank(stack) for stack in stacks], rel=1e-6)
    assert got.terms == pytest.approx(entropy_rank(torch.cat(stacks)), rel=1e-6)
    dense = torch.stack([delta_of(factor).reshape(-1) for factor in factors])
    assert got.deltas == pytest.approx(entropy_rank(dense), rel=1e-6)
    assert got.separate == pytest.approx(sum(got.by_task))


def test_adapters_that_are_the_same_span_nothing_more():
    one = random_factors((20, 30), (4,))[0]
    got = coverage([one, one, one])
    # Repeated rows give each direction the root of three times its weight: the shares stay.
    assert got.terms == pytest.approx(got.by_task[0], rel=1e-6)
    assert got.deltas == pytest.approx(1.0, rel=1e-6)


def test_orthogonal_adapters_of_one_norm_add_up():
    B, A = torch.eye(6, 4), torch.eye(4, 8)
    got = coverage([Factor(B[:, :2], A[:2], 1.0), Factor(B[:, 2:], A[2:], 1.0)])
    assert got.by_task == pytest.approx((2.0, 2.0))
    assert (got.terms, got.deltas, got.separate) == pytest.approx((4.0, 2.0, 4.0))


def test_another_splitting_moves_the_terms_but_not_the_deltas():
    one, two = random_factors((20, 30), (4, 4))
    G = torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    split = Factor(one.B @ G, torch.linalg.inv(G) @ one.A, one.scale)
    before, after = coverage([one, two]), coverage([split, two])
    assert abs(before.terms - after.terms) > 0.1
    assert after.deltas == pytest.approx(before.deltas, rel=1e-6)


def test_what_has_no_terms_is_refused():
    one = random_factors((4, 5), (2,))[0]
    with pytest.raises(ValueError, match="at least one adapter"):
        coverage([])
    with pytest.raises(ValueError, match="none of DoRA"):
        coverage([Factor(one.B, one.A, 1.0, magnitude=torch.ones(4, 1))])
    with pytest.raises(OverflowError):
        coverage([Factor(one.B * 1e200, one.A * 1e200, 1.0)])


def moments_of(X):
    sums = MomentSums(X.shape[1])
    sums.add(X)
    return sums.finish()


def test_the_unevenness_of_activations_is_that_of_the_spectrum():
    X = torch.randn(50, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.4
    values = torch.linalg.svdvals(X).square()
    got = anisotropy(moments_of(X))
    assert got.top_share == pytest.approx(float(values[0] / values.sum()), rel=1e-9)
    assert got.directions == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-9)
    sketched = anisotropy(as_sketch(moments_of(X), 12))
    assert sketched.directions == pytest.approx(got.directions, rel=1e-9)
    lossy = as_sketch(moments_of(X), 3)
    values = torch.linalg.eigvalsh(lossy.gram)
    assert lossy.gram_error > 0
    sketched = anisotropy(lossy)
    assert sketched.top_share == pytest.approx(float(values[-1] / values.sum()), rel=1e-9)
    assert sketched.directions == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-9)


def test_the_ends_of_unevenness():
    even = anisotropy(Moments(torch.eye(8, dtype=torch.float64), torch.zeros(8), 4))
    assert (even.top_share, even.directions) == pytest.approx((1 / 8, 8.0))
    single = anisotropy(moments_of(torch.ones(5, 8)))
    assert (single.top_share, single.directions) == pytest.approx((1.0, 1.0))
    with pytest.raises(ValueError, match="0 token rows"):
        anisotropy(MomentSums(3).finish())
    with pytest.raises(ValueError, match="2 token rows with squares of 0"):
        anisotropy(moments_of(torch.zeros(2, 3)))
