"""Every number from thin factors against a dense float64 reference."""

import math

import pytest
import torch
from algebra_cases import SHAPES_AND_RANKS, delta_of, random_factors

from ray_merge.algebra.diagnose import (
    chance_overlap,
    effective_rank,
    frobenius_norm,
    inner_product,
    norm_on_inputs_of,
    overlap,
    spectral_norm,
    thin_svd,
)

CLOSE = {"rel": 1e-10, "abs": 1e-10}


def thin(factor):
    return thin_svd(factor.B, factor.A * factor.scale)


def dense_bases(delta):
    """Column and row space of a dense delta, as projections."""
    U, s, Vt = torch.linalg.svd(delta, full_matrices=False)
    keep = int((s > 1e-10 * s.max()).sum()) if s.numel() and float(s.max()) else 0
    return U[:, :keep] @ U[:, :keep].T, Vt[:keep].T @ Vt[:keep], keep


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_norms_and_effective_rank_are_those_of_the_dense_delta(shape, ranks):
    for factor in random_factors(shape, ranks):
        svd, delta = thin(factor), delta_of(factor)
        singular = torch.linalg.svdvals(delta)
        assert frobenius_norm(svd.S_K) == pytest.approx(float(delta.norm()), **CLOSE)
        assert spectral_norm(svd.S_K) == pytest.approx(float(singular.max()), **CLOSE)
        shares = [float(s / singular.sum()) for s in singular if s > 1e-12 * singular.max()]
        entropy = -math.fsum(share * math.log(share) for share in shares)
        assert effective_rank(svd.S_K) == pytest.approx(math.exp(entropy) if shares else 0.0, **CLOSE)
        torch.testing.assert_close(svd.U_OK * svd.S_K @ svd.V_IK.T, delta, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_pairs_are_those_of_the_dense_deltas(shape, ranks):
    factors = random_factors(shape, ranks)
    for one in factors:
        for other in factors:
            first, second = thin(one), thin(other)
            d1, d2 = delta_of(one), delta_of(other)
            (P1, R1, k1), (P2, R2, k2) = dense_bases(d1), dense_bases(d2)
            assert inner_product(first, second) == pytest.approx(float((d1 * d2).sum()), rel=1e-10, abs=1e-9)
            assert norm_on_inputs_of(first, second) == pytest.approx(float((d1 @ R2).norm()), **CLOSE)
            if not min(k1, k2):
                assert overlap(first.U_OK, second.U_OK) is None
                assert chance_overlap(first.V_IK, second.V_IK) is None
                continue
            # trace(P1 P2) is the sum of squared cosines of the principal angles.
            assert overlap(first.U_OK, second.U_OK) == pytest.approx(
                float((P1 * P2).sum()) / min(k1, k2), **CLOSE
            )
            assert overlap(first.V_IK, second.V_IK) == pytest.approx(
                float((R1 * R2).sum()) / min(k1, k2), **CLOSE
            )


def test_an_update_has_everything_in_common_with_itself():
    (factor,) = random_factors((24, 17), [3])
    svd = thin(factor)
    norm = frobenius_norm(svd.S_K)
    assert overlap(svd.U_OK, svd.U_OK) == pytest.approx(1.0, **CLOSE)
    assert inner_product(svd, svd) == pytest.approx(norm**2, **CLOSE)
    assert norm_on_inputs_of(svd, svd) == pytest.approx(norm, **CLOSE)


def test_updates_that_read_other_inputs_do_not_meet():
    B, A = torch.ones(4, 1), torch.eye(6)
    one, other = thin_svd(B, A[:1]), thin_svd(B, A[1:2])
    assert overlap(one.U_OK, other.U_OK) == pytest.approx(1.0)
    assert overlap(one.V_IK, other.V_IK) == 0.0
    assert inner_product(one, other) == 0.0
    assert norm_on_inputs_of(one, other) == 0.0


def test_the_numbers_do_not_depend_on_how_an_update_is_factored():
    (factor,) = random_factors((24, 17), [4])
    generator = torch.Generator().manual_seed(5)
    G = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    one, other = thin_svd(factor.B, factor.A), thin_svd(factor.B @ G, torch.linalg.inv(G) @ factor.A)
    torch.testing.assert_close(one.S_K, other.S_K, rtol=1e-9, atol=1e-9)
    assert effective_rank(one.S_K) == pytest.approx(effective_rank(other.S_K), rel=1e-9)
    assert overlap(one.V_IK, other.V_IK) == pytest.approx(1.0, rel=1e-9)


def test_equal_directions_count_and_unequal_ones_count_less():
    assert effective_rank(torch.ones(5, dtype=torch.float64)) == pytest.approx(5.0)
    assert effective_rank(torch.tensor([1.0, 1e-9], dtype=torch.float64)) == pytest.approx(1.0, abs=1e-6)


def test_directions_of_rounding_size_span_nothing():
    (factor,) = random_factors((24, 17), [3])
    twice = thin_svd(torch.cat([factor.B, factor.B], dim=1), torch.cat([factor.A, factor.A], dim=0))
    assert len(twice.S_K) == 3
    assert len(thin_svd(torch.zeros(5, 2), torch.ones(2, 4)).S_K) == 0


def test_random_subspaces_overlap_as_much_as_chance_says():
    generator = torch.Generator().manual_seed(1)

    def subspace(rank):
        return torch.linalg.qr(torch.randn(40, rank, generator=generator, dtype=torch.float64)).Q

    pairs = [(subspace(3), subspace(8)) for _ in range(400)]
    mean = math.fsum(overlap(one, other) or 0.0 for one, other in pairs) / len(pairs)
    # One overlap has a standard deviation below 0.1: the mean of 400 lies within 4 * 0.1 / 20.
    assert mean == pytest.approx(chance_overlap(*pairs[0]), abs=0.02)
    assert chance_overlap(*pairs[0]) == 8 / 40


@pytest.mark.parametrize("value", [1e200, math.inf, math.nan])
def test_a_product_beyond_float64_is_an_error_of_its_own(value):
    with pytest.raises(OverflowError, match="not finite in float64"):
        thin_svd(
            torch.full((3, 2), value, dtype=torch.float64), torch.full((2, 4), value, dtype=torch.float64)
        )


def test_large_singular_values_have_a_norm():
    assert frobenius_norm(torch.tensor([3e200, 4e200], dtype=torch.float64).flip(0)) == pytest.approx(5e200)
