import pytest
import torch
from algebra_cases import delta_of, random_factors

from ray_merge.algebra.interference import interference, mean_product, mean_square
from ray_merge.algebra.moments import MomentSums
from ray_merge.algebra.osrm import osrm_directions
from ray_merge.algebra.sketch import FrequentDirections
from ray_merge.spec import Factor


def tokens(count, seed, columns=17):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator, dtype=torch.float64) + 0.3


def moments_of(X):
    sums = MomentSums(X.shape[1])
    sums.add(X)
    return sums.finish()


def sketch_of(X, rows):
    directions = FrequentDirections(X.shape[1], rows)
    directions.add(X)
    return directions.finish()


def root_mean_square(Y):
    return float(Y.square().sum(1).mean().sqrt())


TASKS = [tokens(60, 1), tokens(35, 2)]


def test_the_means_are_those_over_the_tokens():
    factors = random_factors((24, 17), (3, 0, 5))
    got = interference(factors, [moments_of(H) for H in TASKS])
    updates = [[root_mean_square(H @ delta_of(f).T) for f in factors] for H in TASKS]
    activations = [[root_mean_square(H @ f.A.double().T) for f in factors] for H in TASKS]
    torch.testing.assert_close(got.updates, torch.tensor(updates, dtype=torch.float64), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        got.activations, torch.tensor(activations, dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_sketches_are_within_their_bound():
    X = torch.randn(6, 17, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for rows in (17, 6):
        sketch, exact = sketch_of(TASKS[0], rows), moments_of(TASKS[0])
        error = mean_product(X, sketch) - mean_product(X, exact)
        bound = sketch.gram_error / exact.count * float(torch.linalg.matrix_norm(X, 2)) ** 2
        assert float(torch.linalg.matrix_norm(error, 2)) <= bound + 1e-10
        assert mean_square(X, sketch) == pytest.approx(float(mean_product(X, sketch).trace()), rel=1e-10)
        torch.testing.assert_close(
            mean_product(X, sketch), X @ sketch.gram @ X.T / sketch.count, rtol=1e-10, atol=1e-10
        )


def test_osrm_makes_an_adapter_deaf_to_the_other_tasks_tokens():
    H = tokens(80, 5) * torch.logspace(0, -3, 17, dtype=torch.float64)
    random = random_factors((24, 17), (3,))[0]
    rows = torch.linalg.qr(random.A.T)[0].T
    deaf = osrm_directions([moments_of(H)], 3, mode="covariance").A_RI
    got = interference([Factor(random.B, rows, 1.0), Factor(random.B, deaf, 1.0)], [moments_of(H)])
    assert float(got.activations[0, 1]) < 0.05 * float(got.activations[0, 0])
    assert float(got.updates[0, 1]) < 0.1 * float(got.updates[0, 0])


def test_an_adapter_in_the_null_space_gives_zero_and_not_nan():
    H = torch.zeros(4, 17)
    H[:, 0] = 1
    A = torch.zeros(1, 17)
    A[0, 3] = 1
    got = interference([Factor(torch.ones(5, 1), A, 1.0)], [moments_of(H)])
    assert got.updates.item() == got.activations.item() == 0.0


def test_what_does_not_fit_is_refused():
    one = random_factors((24, 17), (3,))[0]
    with pytest.raises(ValueError, match="got 0 and 1"):
        interference([], [moments_of(TASKS[0])])
    with pytest.raises(ValueError, match="DoRA"):
        interference([Factor(one.B, one.A, 1.0, magnitude=torch.ones(24, 1))], [moments_of(TASKS[0])])
    with pytest.raises(ValueError, match=r"\(3, 17\) was given moments of 16 columns"):
        interference([one], [moments_of(tokens(9, 1, 16))])
    with pytest.raises(ValueError, match="0 token rows"):
        mean_square(one.A, MomentSums(17).finish())
