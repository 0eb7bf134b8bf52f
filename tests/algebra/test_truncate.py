import pytest
import torch
from algebra_cases import delta_of, random_factors

from ray_merge.algebra.truncate import truncate
from ray_merge.spec import Factor


def made(shape=(30, 20), rank=9):
    (factor,) = random_factors(shape, [rank])
    return factor.B, factor.A, factor.B @ factor.A


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_truncation_is_the_best_of_its_rank_and_reports_what_it_lost(rank):
    B, A, dense = made()
    left, right, error = truncate(B, A, rank=rank)
    singular = torch.linalg.svdvals(dense)
    best = float(singular[rank:].norm() / singular.norm())
    assert (left.shape, right.shape) == ((30, rank), (rank, 20))
    assert error == pytest.approx(best, rel=1e-10)
    assert float((left @ right - dense).norm() / dense.norm()) == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize("rank", [9, 50])
def test_a_rank_that_holds_everything_loses_nothing(rank):
    B, A, dense = made()
    left, right, error = truncate(B, A, rank=rank)
    assert error == 0.0
    assert left.shape[1] == 9
    torch.testing.assert_close(left @ right, dense, rtol=1e-12, atol=1e-12)


def test_directions_that_are_zero_are_not_kept():
    B, A, _ = made()
    left, _, error = truncate(torch.cat([B, B], dim=1), torch.cat([A, A], dim=0), rank=18)
    assert left.shape[1] == 9
    assert error == 0.0


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.5, 0.9])
def test_a_tolerance_gives_the_least_rank_that_keeps_it(tolerance):
    B, A, dense = made()
    left, _, error = truncate(B, A, tolerance=tolerance)
    singular = torch.linalg.svdvals(dense)[:9]
    losses = [float(singular[rank:].norm() / singular.norm()) for rank in range(10)]
    assert error <= tolerance
    assert left.shape[1] == next(rank for rank, loss in enumerate(losses) if loss <= tolerance + 1e-12)


def test_the_truncation_of_nothing_is_nothing():
    left, right, error = truncate(torch.zeros(5, 3), torch.ones(3, 4), rank=2)
    assert (left.shape, right.shape, error) == ((5, 0), (0, 4), 0.0)
    left, right, error = truncate(torch.zeros(5, 0), torch.zeros(0, 4), tolerance=0.1)
    assert (left.shape, right.shape, error) == ((5, 0), (0, 4), 0.0)


@pytest.mark.parametrize("asked", [{}, {"rank": 1, "tolerance": 0.1}, {"rank": 0}, {"tolerance": 1.0}])
def test_an_unclear_truncation_is_refused(asked):
    with pytest.raises(ValueError, match="rank"):
        truncate(torch.ones(2, 1), torch.ones(1, 2), **asked)


def test_the_result_has_the_dtype_of_the_factors():
    (factor,) = random_factors((8, 7), [3], dtype=torch.float32)
    left, right, _ = truncate(factor.B, factor.A, rank=3)
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close(
        left @ right, delta_of(Factor(factor.B, factor.A)).float(), rtol=1e-5, atol=1e-5
    )
