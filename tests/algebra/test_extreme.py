import pytest
import torch

from ray_merge.algebra.extreme import largest_eigenvalue


def gram(rows, columns, shift=0.0):
    X = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64) + shift
    return X.T @ X


@pytest.mark.parametrize(
    "square",
    [
        gram(9, 1),
        gram(3, 7),
        gram(300, 7),
        gram(500, 200),
        gram(500, 200, shift=0.5),
        torch.zeros(3, 3).double(),
    ],
    ids=["1 column", "singular", "7", "no gap", "one direction", "zero"],
)
def test_it_is_the_largest_of_all_eigenvalues(square):
    want = float(torch.linalg.eigvalsh(square)[-1])
    assert largest_eigenvalue(square) == pytest.approx(want, rel=1e-9, abs=1e-30)


def test_a_spectrum_without_a_gap_is_close_after_the_last_step_and_from_below():
    even = torch.diag(1 - (torch.arange(1500, dtype=torch.float64) / 1500) ** 2)
    assert 1 - 1e-4 < largest_eigenvalue(even) <= 1.0 + 1e-12
    assert largest_eigenvalue(even) == largest_eigenvalue(even.clone())
