"""phi on directions of a site against dense float64 references."""

import pytest
import torch

from ray_merge.algebra.directions import Directions
from ray_merge.algebra.phi_shape import phi_shape
from ray_merge.algebra.site import SiteFactors
from ray_merge.spec import Factor

KINDS = ("direction", "shared", "adapter")
CASES = {
    "plain": ((12, 9), (2, 3, 4), (0.5, 2.0, 1.0)),
    "fewer rows than ranks": ((5, 30), (4, 4, 4), (1.0, 0.3, -2.0)),
    "one adapter does not touch it": ((12, 9), (2, 0, 3), (1.0, 1.0, 4.0)),
    "one adapter": ((6, 7), (3,), (2.0,)),
}


def site_of(case, dtype=torch.float64, *, deficient=False):
    shape, ranks, scales = CASES[case]
    torch.manual_seed(7)
    factors = [
        Factor(torch.randn(shape[0], r, dtype=dtype), torch.randn(r, shape[1], dtype=dtype), s)
        for r, s in zip(ranks, scales, strict=True)
    ]
    if deficient:
        factors[0].A[-1] = factors[0].A[0]
        factors[-1].B[:, 0] = 0
    return SiteFactors(factors)


def dense(site):
    return [B @ A for B, A in site.pairs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("deficient", [False, True])
def test_a_constant_phi_is_that_multiple_of_the_sum(kind, case, deficient):
    site = site_of(case, deficient=deficient)
    directions = Directions(site, kind)
    B, A = directions.update(torch.full(directions.phi_shape, 0.4, dtype=torch.float64))
    torch.testing.assert_close(B @ A, 0.4 * sum(dense(site)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_shared_form_is_that_of_a_dense_svd(case):
    site = site_of(case)
    directions = Directions(site, "shared")
    n_adapters, n_shared = directions.phi_shape
    phi = torch.randn(directions.phi_shape, dtype=torch.float64)
    U, s, Vt = torch.linalg.svd(torch.cat(dense(site), dim=1), full_matrices=False)
    parts = Vt.split(site.shape[1], dim=1)
    expected = sum(
        (U[:, :n_shared] * (phi[i] * s[:n_shared])) @ parts[i][:n_shared] for i in range(n_adapters)
    )
    B, A = directions.update(phi)
    assert B.shape[1] == min(site.shape[0], sum(site.ranks))
    torch.testing.assert_close(B @ A, expected, rtol=0, atol=1e-11)


def test_directions_and_adapters_are_weighed_one_by_one():
    site = site_of("plain")
    phi = torch.randn(9, dtype=torch.float64)
    B, A = Directions(site, "direction").update(phi)
    pairs = [(B_i[:, j], A_i[j]) for B_i, A_i in site.pairs for j in range(len(A_i))]
    torch.testing.assert_close(B @ A, sum(p * torch.outer(*pair) for p, pair in zip(phi, pairs, strict=True)))
    phi = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    B, A = Directions(site, "adapter").update(phi)
    torch.testing.assert_close(B @ A, sum(p * d for p, d in zip(phi, dense(site), strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_phi_and_shapes_are_those_of_the_plan(kind):
    site = site_of("one adapter does not touch it")
    directions = Directions(site, kind)
    assert directions.phi_shape == phi_shape(kind, site.shape, site.ranks)
    phi = torch.randn(directions.phi_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: torch.tanh(torch.matmul(*directions.update(p))), (phi,))


def test_an_adapter_with_a_magnitude_is_refused():
    base = torch.randn(6, 7)
    factor = Factor(torch.randn(6, 2), torch.randn(2, 7), 1.0, torch.ones(6, 1))
    with pytest.raises(ValueError, match="DoRA"):
        Directions(SiteFactors([factor], base), "direction")
