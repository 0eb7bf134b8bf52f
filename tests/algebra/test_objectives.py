"""Losses of learning against naive float64 formulas and autograd."""

import math

import numpy as np
import pytest
import torch

from ray_merge.algebra.objectives import (
    condition_number,
    divergence,
    effective_rank,
    entropy,
    information,
    linear,
    misalignment,
    null_space_ratio,
    rank_penalty,
    row_basis,
    tchebycheff,
)

F64 = torch.float64


def projector(A):
    return torch.eye(A.shape[1], dtype=F64) - torch.linalg.pinv(A.double()) @ A.double()


def made(rows, columns, seed=0):
    return torch.randn(rows, columns, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_omega_is_the_share_outside_of_the_rows(rank):
    A, Z = made(rank, 8), made(50, 8, 1)
    explicit = (Z @ projector(A)).norm(dim=1) / Z.norm(dim=1)
    torch.testing.assert_close(null_space_ratio(Z, row_basis(A)), explicit.clamp(min=1e-6), rtol=0, atol=2e-6)


def test_omega_is_0_inside_and_1_outside():
    A = made(3, 10)
    inside, outside = made(5, 3, 1) @ A, made(5, 10, 2) @ projector(A)
    assert float(null_space_ratio(inside, row_basis(A)).max()) < 1e-5
    torch.testing.assert_close(null_space_ratio(outside, row_basis(A)), torch.ones(5, dtype=F64))


def test_omega_does_not_see_scale_or_gauge_or_order_of_rows():
    A, Z = made(4, 12), made(20, 12, 1)
    first = null_space_ratio(Z, row_basis(A))
    for other in (
        1e6 * A,
        1e-6 * A,
        made(4, 4, 5) @ A,
        A[[2, 0, 3, 1]],
        torch.diag(torch.tensor([1e4, 1, 1e-4, 7], dtype=F64)) @ A,
    ):
        torch.testing.assert_close(null_space_ratio(Z, row_basis(other)), first, rtol=0, atol=1e-8)
    torch.testing.assert_close(null_space_ratio(1e5 * Z, row_basis(A)), first)


DEPENDENT = (
    torch.cat([made(2, 9)] * 2),
    torch.zeros(3, 9, dtype=F64),
    made(0, 9),
    made(5, 9) * torch.tensor([[1.0], [0.0], [1.0], [1.0], [0.0]], dtype=F64),
)


@pytest.mark.parametrize("A", DEPENDENT, ids=("twice", "zero", "empty", "some zero"))
def test_dependent_rows_span_what_they_span(A):
    basis, Z = row_basis(A), made(6, 9, 3)
    assert len(basis) == (int(torch.linalg.matrix_rank(A)) if len(A) else 0)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=F64), rtol=0, atol=1e-10)
    explicit = (Z @ projector(A)).norm(dim=1) / Z.norm(dim=1) if len(A) else torch.ones(6, dtype=F64)
    torch.testing.assert_close(null_space_ratio(Z, basis), explicit)


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-5, 3e-6, 1e-8])
def test_rows_that_nearly_depend_still_give_an_orthonormal_basis(apart):
    A = made(6, 20)
    A[1] = A[0] + apart * A[1]
    A[4] = A[3] - A[2] + apart * A[4]
    basis = row_basis(A)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=F64), rtol=0, atol=1e-12)
    assert len(basis) == 6 or apart < 1e-5
    assert len(row_basis(A.float())) == 4 or apart > 1e-6  # what float32 cannot tell apart is one direction


def test_gradients_of_omega_are_right_and_finite_everywhere():
    A = made(3, 6)
    basis = row_basis(A)
    assert torch.autograd.gradcheck(lambda z: null_space_ratio(z, basis), (made(4, 6, 1).requires_grad_(),))
    for odd in (A[:1].clone(), torch.zeros(1, 6, dtype=F64)):
        z = odd.requires_grad_()
        null_space_ratio(z, basis).sum().backward()
        assert bool(torch.isfinite(z.grad).all())
    assert float(null_space_ratio(torch.zeros(1, 6, dtype=F64), basis)) == 1.0


def test_entropies_are_the_formulas():
    logits = 3 * made(7, 5)
    p = logits.softmax(-1)
    each, mean = -(p * p.log()).sum(-1), p.mean(0)
    torch.testing.assert_close(entropy(logits), each)
    torch.testing.assert_close(information(logits), each.mean())
    expected = (each.mean() + 0.7 * (mean * mean.log()).sum()) / math.log(5)
    torch.testing.assert_close(information(logits, diversity=0.7, normalise=True), expected)
    assert torch.autograd.gradcheck(
        lambda z: information(z, diversity=0.7, normalise=True), (logits.requires_grad_(),)
    )
    assert math.isfinite(float(information(torch.tensor([[1e4, -1e4, 0.0]]))))
    uniform = information(torch.zeros(4, 9, dtype=F64), normalise=True)
    torch.testing.assert_close(uniform, torch.tensor(1.0, dtype=F64))


def test_divergence_is_kl_and_vanishes_with_its_gradient_at_equality():
    own, merged = made(6, 4).log_softmax(-1), made(6, 4, 1)
    expected = torch.nn.functional.kl_div(merged.log_softmax(-1), own, log_target=True, reduction="batchmean")
    torch.testing.assert_close(divergence(merged, own), expected)
    torch.testing.assert_close(divergence(merged, own, normalise=True), expected / math.log(4))
    same = own.clone().requires_grad_()
    value = divergence(same, own)
    value.backward()
    assert abs(float(value.detach())) < 1e-15
    assert float(same.grad.abs().max()) < 1e-15


@pytest.mark.parametrize("call", [information, lambda z: divergence(z, z)])
def test_one_class_has_no_entropy(call):
    with pytest.raises(ValueError, match="1 class"):
        call(torch.zeros(3, 1))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("alpha", [0.01, 1.0, 50.0])
def test_tchebycheff_and_its_weights_are_those_of_autograd(absolute, alpha):
    values = torch.tensor([0.3, 1.1, 0.05], dtype=F64, requires_grad=True)
    rho, z = torch.tensor([0.2, 0.5, 0.3], dtype=F64), torch.tensor([0.1, 1.2, 0.0], dtype=F64)
    gaps = (values - z).abs() if absolute else values - z
    naive = alpha * torch.log(torch.exp(rho * gaps / alpha).sum())
    naive.backward()
    value, weights = tchebycheff(values.detach(), rho, z, alpha=alpha, absolute=absolute)
    torch.testing.assert_close(value, naive.detach())
    torch.testing.assert_close(weights, values.grad)


def test_tchebycheff_becomes_the_maximum_without_overflow():
    values, rho = torch.tensor([1e3, -1e3, 5.0]), torch.full((3,), 1 / 3)
    value, weights = tchebycheff(values, rho, torch.zeros(3), alpha=1e-6)
    assert float(value) == pytest.approx(1e3 / 3, rel=1e-6)
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 0, 0], dtype=F64), rtol=0, atol=1e-7)
    value, weights = linear(values, rho, torch.ones(3))
    assert float(value) == pytest.approx((1e3 - 1e3 + 5 - 3) / 3, rel=1e-6)
    torch.testing.assert_close(weights, rho.double())


def test_effective_rank_is_that_of_the_dense_matrix():
    B, A = made(9, 4), made(4, 7, 1)
    s = np.linalg.svd((B @ A).numpy(), compute_uv=False)[:4]
    p = s / s.sum()
    expected = math.exp(-(p * np.log(p)).sum())
    assert float(effective_rank(B, A)) == pytest.approx(expected, rel=1e-10)
    assert float(rank_penalty(B, A)) == pytest.approx(1 - expected / 4, rel=1e-10)
    wide = made(9, 20)
    assert 0 <= float(rank_penalty(wide, made(20, 7, 1))) < 1  # no more than 7 directions can be reached


@pytest.mark.parametrize("shape", [(9, 4, 7), (3, 5, 8), (8, 5, 3)])
def test_gradients_of_effective_rank_are_right_and_finite_everywhere(shape):
    B, A = made(shape[0], shape[1]).requires_grad_(), made(shape[1], shape[2], 1).requires_grad_()
    assert torch.autograd.gradcheck(rank_penalty, (B, A))
    halves = torch.ones(shape[1], 1, dtype=F64)
    halves[0], halves[-1] = 0, 1e-20
    for share in (halves, 0 * halves):
        phi = share.clone().requires_grad_()
        penalty = rank_penalty(B.detach(), phi * A.detach())
        penalty.backward()
        assert 0 <= float(penalty.detach()) < 1
        assert bool(torch.isfinite(phi.grad).all())
    assert float(rank_penalty(made(4, 0), made(0, 5))) == 0


def test_condition_number_and_misalignment():
    J = made(3, 11).numpy()
    assert float(condition_number(torch.tensor(J))) == pytest.approx(np.linalg.cond(J), rel=1e-10)
    xi = misalignment(torch.tensor(J)).numpy()
    cosine = J[0] @ J[2] / np.linalg.norm(J[0]) / np.linalg.norm(J[2])
    assert xi[0, 2] == pytest.approx(1 - abs(cosine), rel=1e-10)
    assert np.abs(np.diag(xi)).max() < 1e-12
    assert float(condition_number(torch.zeros(2, 5))) != float(condition_number(torch.eye(2)))
