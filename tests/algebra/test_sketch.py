import pytest
import torch

from ray_merge.algebra.moments import MomentSums
from ray_merge.algebra.sketch import FrequentDirections, SketchedMoments, as_sketch


def decaying(count, columns, seed=0, decay=0.1):
    """Rows whose covariance has a falling spectrum, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    lengths = torch.exp(-decay * torch.arange(columns, dtype=torch.float64))
    return (torch.randn(count, columns, generator=generator, dtype=torch.float64) * lengths) @ basis + 0.1


def sketched(X, rows, parts=1):
    directions = FrequentDirections(X.shape[1], rows)
    for part in X.chunk(parts):
        directions.add(part)
    return directions.finish()


def assert_certified(got: SketchedMoments, X):
    lost = torch.linalg.eigvalsh(X.T @ X - got.sketch.T @ got.sketch)
    rounding = 1e-12 * float(torch.linalg.matrix_norm(X.T @ X, 2))
    assert float(lost[0]) >= -rounding
    assert float(lost[-1]) <= got.shrinkage + rounding
    error = float(torch.linalg.matrix_norm(got.gram - X.T @ X, 2))
    assert error <= got.gram_error + rounding


# Fewer rows than the sketch holds, exactly that many, a full buffer, many; wide and tall buffers; a flat spectrum.
@pytest.mark.parametrize("count", [0, 3, 8, 16, 17, 200])
@pytest.mark.parametrize(("columns", "decay"), [(40, 0.1), (10, 0.1), (5, 0.5), (40, 0.0), (1, 0.0)])
def test_the_bound_holds(count, columns, decay):
    X = decaying(count, columns, decay=decay)
    got = sketched(X, 8)
    assert got.sketch.shape[0] <= 8
    assert got.count == count
    assert_certified(got, X)
    torch.testing.assert_close(got.mean * max(count, 1), X.sum(0), rtol=1e-12, atol=1e-12)


def test_the_shrinkage_is_within_the_papers_guarantee_and_not_trivial():
    X = decaying(400, 40)
    got = sketched(X, 8)
    tails = torch.linalg.svdvals(X).square().flip(0).cumsum(0).flip(0)
    best = min(float(tails[k]) / (9 - k) for k in range(9))
    assert 0 < got.shrinkage <= best
    # The bound is used: the error is of its size.
    lost = torch.linalg.matrix_norm(X.T @ X - got.sketch.T @ got.sketch, 2)
    assert float(lost) > 0.3 * got.shrinkage


@pytest.mark.parametrize("rows", [6, 40, 41])
def test_nothing_is_lost_where_the_rank_fits(rows):
    X = decaying(100, 40) @ decaying(40, 6, 1) @ decaying(6, 40, 2)
    got = sketched(X, rows)
    largest = float(torch.linalg.matrix_norm(X.T @ X, 2))
    assert got.shrinkage <= 1e-12 * largest
    assert float((got.gram - X.T @ X).norm()) <= 1e-12 * largest


def test_the_sketch_depends_on_the_rows_and_not_on_the_calls():
    X = decaying(200, 40)
    one, many = sketched(X, 8), sketched(X, 8, parts=23)
    assert torch.equal(one.sketch, many.sketch)
    assert one.shrinkage == many.shrinkage


def test_a_sketch_of_two_sketches_is_certified_too():
    X = decaying(150, 40)
    both = FrequentDirections(40, 8)
    both.add(X[:70])
    both.add_sketch(sketched(X[70:], 8))
    got = both.finish()
    assert got.count == 150
    assert_certified(got, X)
    torch.testing.assert_close(got.mean, X.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 8, 40, 50])
def test_a_known_gram_matrix_has_a_best_sketch(rows):
    X = decaying(100, 40)
    sums = MomentSums(40)
    sums.add(X)
    exact = sums.finish()
    got = as_sketch(exact, rows)
    assert_certified(got, X)
    assert got.shrinkage <= sketched(X, rows).shrinkage * (1 + 1e-9) + 1e-9
    assert got.count == 100
    assert torch.equal(got.mean, exact.mean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("count", [4, 40])
def test_what_is_not_finite_is_noticed(bad, count):
    X = decaying(count, 6)
    X[2, 3] = bad
    with pytest.raises(OverflowError, match="not finite"):
        sketched(X, 8)


def test_bfloat16_rows_are_taken_as_they_are():
    X = decaying(60, 20).bfloat16()
    assert_certified(sketched(X, 8), X.double())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least 1 row"):
        FrequentDirections(4, 0)
    with pytest.raises(ValueError, match=r"4 columns .* \(2, 3\)"):
        FrequentDirections(4, 2).add(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="4 and of 3 columns"):
        FrequentDirections(4, 2).add_sketch(FrequentDirections(3, 2).finish())
    with pytest.raises(ValueError, match="shrinkage >= 0"):
        SketchedMoments(torch.zeros(2, 3), -1.0, torch.zeros(3), 1)
