import pytest
import torch
from algebra_cases import SHAPES_AND_RANKS, delta_of, random_factors

from ray_merge.algebra.bases import SMALLEST_SINGULAR_VALUE
from ray_merge.algebra.site import SiteFactors
from ray_merge.spec import Factor

CLOSE = 1e-10


def relative(got, want):
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_knots_coordinates_give_every_delta_back(shape, ranks):
    factors = random_factors(shape, ranks)
    basis = SiteFactors(factors).knots
    for factor, (left, right) in zip(factors, basis.coordinates, strict=True):
        assert relative(basis.left_vectors @ (left @ right), delta_of(factor)) < CLOSE


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_knots_singular_values_are_those_of_the_stacked_dense_deltas(shape, ranks):
    factors = random_factors(shape, ranks)
    dense = torch.linalg.svdvals(torch.cat([delta_of(factor) for factor in factors], dim=1))
    basis = SiteFactors(factors).knots
    kept = dense[dense > SMALLEST_SINGULAR_VALUE]
    torch.testing.assert_close(basis.S_R, kept, rtol=CLOSE, atol=0)
    eye = torch.eye(len(kept), dtype=torch.float64)
    torch.testing.assert_close(basis.left_vectors.T @ basis.left_vectors, eye, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_knots_left_vectors_have_the_bits_of_a_whole_qr(shape, ranks):
    factors = random_factors(shape, ranks)
    basis = SiteFactors(factors).knots
    rights = [torch.linalg.qr(A.double().T) for _, A in SiteFactors(factors).pairs]
    lefts = [B.double() @ T.T for (B, _), (_, T) in zip(SiteFactors(factors).pairs, rights, strict=True)]
    Q, T = torch.linalg.qr(torch.cat(lefts, dim=1))
    left = torch.linalg.svd(T, full_matrices=False).U
    assert torch.equal(basis.left_vectors, Q @ left[:, : len(basis.S_R)])


def test_knots_drops_directions_at_or_below_the_absolute_bound():
    eye = torch.eye(3, dtype=torch.float64)
    sizes = torch.tensor([1.0, 2 * SMALLEST_SINGULAR_VALUE, SMALLEST_SINGULAR_VALUE / 2], dtype=torch.float64)
    basis = SiteFactors([Factor(eye * sizes, eye)]).knots
    assert basis.S_R.tolist() == pytest.approx([1.0, 2 * SMALLEST_SINGULAR_VALUE])


def test_knots_of_adapters_that_are_still_zero_has_no_direction():
    (factor,) = random_factors((6, 5), [2])
    basis = SiteFactors([Factor(torch.zeros_like(factor.B), factor.A)]).knots
    assert basis.left_vectors.shape == (6, 0)
    assert basis.coordinates[0][0].shape[0] == 0


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_core_matrices_give_every_delta_back(shape, ranks):
    factors = random_factors(shape, ranks)
    basis = SiteFactors(factors).core
    assert basis.U_OP.shape == (shape[0], min(shape[0], sum(ranks)))
    assert basis.Vt_QI.shape == (min(shape[1], sum(ranks)), shape[1])
    for factor, (left, right) in zip(factors, basis.coordinates, strict=True):
        assert relative(basis.U_OP @ (left @ right) @ basis.Vt_QI, delta_of(factor)) < CLOSE


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_core_bases_are_orthonormal_and_span_the_stacked_factors(shape, ranks):
    factors = random_factors(shape, ranks)
    basis = SiteFactors(factors).core
    stacked = torch.cat([factor.B for factor in factors], dim=1)
    U, Vt = basis.U_OP, basis.Vt_QI
    torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64), rtol=0, atol=CLOSE)
    torch.testing.assert_close(Vt @ Vt.T, torch.eye(Vt.shape[0], dtype=torch.float64), rtol=0, atol=CLOSE)
    torch.testing.assert_close(
        U @ (U.T @ stacked), stacked, rtol=0, atol=CLOSE * max(1.0, float(stacked.norm()))
    )


def test_core_left_vectors_are_singular_vectors_in_order():
    factors = random_factors((30, 20), [3, 4])
    stacked = torch.cat([factor.B for factor in factors], dim=1)
    coefficients = SiteFactors(factors).core.U_OP.T @ stacked
    torch.testing.assert_close(coefficients.norm(dim=1), torch.linalg.svdvals(stacked), rtol=CLOSE, atol=0)


def test_bases_are_float64_for_bfloat16_adapters():
    site = SiteFactors(random_factors((12, 10), [2, 3], dtype=torch.bfloat16))
    assert site.knots.left_vectors.dtype == torch.float64
    assert site.core.U_OP.dtype == torch.float64
