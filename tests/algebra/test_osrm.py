import peft
import pytest
import torch

from ray_merge.algebra.moments import Moments, MomentSums
from ray_merge.algebra.osrm import osrm_directions, osrm_project, scaled_rows
from ray_merge.algebra.sketch import FrequentDirections, as_sketch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(count, columns, condition, seed=0):
    """Rows whose Gram matrix has exactly this condition number, in turned axes."""
    U = torch.linalg.qr(normal(count, columns, seed=seed))[0]
    V = torch.linalg.qr(normal(columns, columns, seed=seed + 1))[0]
    exponents = torch.linspace(0, -0.5, columns, dtype=torch.float64)
    return (U * condition**exponents * 30) @ V.T


def moments_of(X):
    sums = MomentSums(X.shape[1])
    sums.add(X)
    return sums.finish()


def sketch_of(X, rows):
    directions = FrequentDirections(X.shape[1], rows)
    directions.add(X)
    return directions.finish()


def mean_reach(A, tasks):
    """Mean over tasks of the mean over their tokens of |A h|^2."""
    return sum(float((A.double() @ H.T).square().sum()) / len(H) for H in tasks) / len(tasks)


def orthonormality(A):
    return float((A.double() @ A.double().T - torch.eye(len(A))).abs().max())


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("r", [1, 8, 48])
def test_the_rows_reach_exactly_the_tail_of_the_spectrum(condition, r):
    tasks = [spread(200, 48, condition, seed=2 * t) for t in range(2)]
    tasks[1] = tasks[1][:150]
    got = osrm_directions([moments_of(H) for H in tasks], r, mode="covariance")
    assert got.A_RI.shape == (r, 48)
    assert got.A_RI.dtype == torch.float32
    assert orthonormality(got.A_RI) <= 1e-6
    assert mean_reach(got.A_RI, tasks) == pytest.approx(got.tail, rel=1e-4)
    mean = sum(H.T @ H / len(H) for H in tasks) / 2
    torch.testing.assert_close(got.eigenvalues, torch.linalg.eigvalsh(mean)[:r], rtol=1e-4, atol=0)
    assert (got.null, got.null_space, got.error) == (0, 0, 0.0)


def test_one_other_task_of_a_condition_of_1e8_is_resolved():
    H = spread(200, 48, 1e8)
    got = osrm_directions([moments_of(H)], 4, mode="covariance")
    want = torch.linalg.svdvals(H).flip(0)[:4].square() / 200
    torch.testing.assert_close(got.eigenvalues, want, rtol=1e-4, atol=0)
    assert mean_reach(got.A_RI, [H]) == pytest.approx(float(want.sum()), rel=1e-4)


def test_random_rows_reach_more():
    tasks = [spread(300, 64, 1e3, seed=7), spread(300, 64, 1e3, seed=9)]
    best = mean_reach(osrm_directions([moments_of(H) for H in tasks], 8, mode="covariance").A_RI, tasks)
    for seed in range(100):
        other = torch.linalg.qr(normal(64, 8, seed=seed))[0].T
        assert best < mean_reach(other, tasks)


def test_every_task_counts_the_same_however_many_tokens_it_has():
    few, many = spread(60, 20, 100.0, seed=1), spread(60, 20, 100.0, seed=5)
    once = osrm_directions([moments_of(few), moments_of(many)], 3, mode="covariance")
    again = osrm_directions([moments_of(few), moments_of(many.repeat(9, 1))], 3, mode="covariance")
    torch.testing.assert_close(once.A_RI, again.A_RI, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["covariance", "means"])
def test_with_few_features_the_rows_lie_in_their_null_space(mode):
    tasks = [normal(5, 40, seed=t) + 1 for t in range(3)]
    got = osrm_directions([moments_of(H) for H in tasks], 8, mode=mode, seed=1)
    features = torch.cat(tasks) if mode == "covariance" else torch.stack([H.mean(0) for H in tasks])
    assert float((got.A_RI.double() @ features.T).abs().max()) < 1e-6
    assert orthonormality(got.A_RI) <= 1e-6
    assert (got.null, got.null_space, got.tail) == (8, 40 - len(features), 0.0)


def test_the_choice_in_a_null_space_is_a_function_of_it_and_of_the_seed():
    H = normal(6, 40)
    # The same features, scaled and mixed: other rounding, the same null space.
    mixed = normal(9, 6, seed=3) @ H
    one, same = (osrm_directions([moments_of(X)], 4, mode="covariance", seed=5).A_RI for X in (H, mixed))
    torch.testing.assert_close(one, same, rtol=0, atol=1e-5)
    other = osrm_directions([moments_of(H)], 4, mode="covariance", seed=6).A_RI
    assert float((one @ other.T).square().sum()) / 4 < 0.5


@pytest.mark.parametrize("mode", ["covariance", "means"])
def test_where_the_null_space_is_too_small_the_least_reached_rows_follow(mode):
    tasks = [normal(1, 6, seed=t) for t in range(4)]
    got = osrm_directions([moments_of(H) for H in tasks], 4, mode=mode)
    values = torch.linalg.svdvals(torch.cat(tasks)).square() / 4
    assert (got.null, got.null_space) == (2, 2)
    assert got.eigenvalues[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(got.eigenvalues[2:], values.flip(0)[:2], rtol=1e-6, atol=0)
    assert mean_reach(got.A_RI, tasks) == pytest.approx(got.tail, rel=1e-4)
    assert orthonormality(got.A_RI) <= 1e-6


def test_features_of_zero_leave_everything_free():
    got = osrm_directions([moments_of(torch.zeros(3, 5))], 2, mode="covariance")
    assert (got.null, got.null_space, got.tail) == (2, 5, 0.0)
    assert orthonormality(got.A_RI) <= 1e-6


@pytest.mark.parametrize("mode", ["covariance", "means"])
def test_signs_are_fixed_and_calls_repeat(mode):
    others = [moments_of(normal(80, 24)), moments_of(normal(80, 24, seed=1))]
    one, two = (osrm_directions(others, 5, mode=mode).A_RI for _ in range(2))
    assert torch.equal(one, two)
    assert bool((one.gather(1, one.abs().argmax(1, keepdim=True)) > 0).all())


def test_the_published_steps_give_the_same_span_where_the_null_space_leaves_no_choice():
    means = normal(3, 20)
    published = torch.linalg.svd(means, full_matrices=True)[2][-17:]
    others = [Moments(torch.outer(m, m) * 4, m, 4) for m in means]
    got = osrm_directions(others, 17, mode="means").A_RI.double()
    torch.testing.assert_close(got.T @ got, published.T @ published, rtol=0, atol=1e-6)
    fewer = osrm_directions(others, 5, mode="means")
    assert fewer.null_space == 17
    assert float((fewer.A_RI.double() @ means.T).abs().max()) < 1e-6


@pytest.mark.parametrize("rows", [40, 12])
def test_sketches_bound_what_the_rows_reach(rows):
    tasks = [spread(200, 40, 1e6, seed=3), spread(200, 40, 1e6, seed=11)]
    exact = osrm_directions([moments_of(H) for H in tasks], 6, mode="covariance")
    got = osrm_directions([sketch_of(H, rows) for H in tasks], 6, mode="covariance")
    reached = mean_reach(got.A_RI, tasks)
    assert exact.tail * (1 - 1e-4) <= reached <= got.tail + 6 * got.error + 1e-9
    assert float((got.eigenvalues - exact.eigenvalues).abs().max()) <= got.error + 1e-9
    assert (got.error == 0.0) == (rows == 40)


def test_a_sketch_beside_exact_moments_counts_like_them():
    tasks = [spread(200, 40, 100.0, seed=3), spread(150, 40, 100.0, seed=11)]
    whole = as_sketch(moments_of(tasks[0]), 40)
    exact = osrm_directions([moments_of(H) for H in tasks], 6, mode="covariance")
    mixed = osrm_directions([whole, moments_of(tasks[1])], 6, mode="covariance")
    torch.testing.assert_close(mixed.A_RI, exact.A_RI, rtol=0, atol=1e-5)


def test_what_cannot_be_solved_is_refused():
    good = moments_of(normal(9, 6))
    with pytest.raises(ValueError, match="r is 1 to 6"):
        osrm_directions([good], 7, mode="covariance")
    with pytest.raises(ValueError, match="r is 1 to 6"):
        osrm_directions([good], 0, mode="means")
    with pytest.raises(ValueError, match="at least one other task"):
        osrm_directions([], 2, mode="covariance")
    with pytest.raises(ValueError, match=r"\[6, 5\]"):
        osrm_directions([good, moments_of(normal(9, 5))], 2, mode="covariance")
    with pytest.raises(ValueError, match="other task 1 hold no token rows"):
        osrm_directions([good, MomentSums(6).finish()], 2, mode="covariance")


def test_rows_are_scaled_to_the_norm_that_peft_starts_from():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(512, 4))
    config = peft.LoraConfig(r=256, target_modules=["0"])
    drawn = peft.get_peft_model(layer, config).base_model.model[0].lora_A["default"].weight
    A = torch.linalg.qr(normal(512, 8))[0].T
    theirs = drawn.detach().norm(dim=1).square().mean().sqrt()
    # 256 rows of 512 uniform entries: the mean square is known to 0.25 %.
    torch.testing.assert_close(
        scaled_rows(A, "peft").norm(dim=1), theirs.double().expand(8), rtol=0.01, atol=0
    )
    assert scaled_rows(A, "orthonormal") is A


@pytest.mark.parametrize("new_scale", [None, 0.25])
@pytest.mark.parametrize("mode", ["covariance", "means"])
def test_a_trained_adapter_is_projected_without_its_scale_twice(mode, new_scale):
    B, A, scale = normal(30, 4), normal(4, 24, seed=1), 2.0
    others = [moments_of(normal(50, 24, seed=2)), moments_of(normal(50, 24, seed=3) + 1)]
    new_B, new_A, lost = osrm_project(B, A, scale, others, 10, mode=mode, new_scale=new_scale)
    assert torch.equal(new_A, osrm_directions(others, 10, mode=mode).A_RI)
    delta = scale * B @ A
    want = delta @ torch.linalg.pinv(new_A.double()) @ new_A.double()
    torch.testing.assert_close((new_scale or scale) * new_B @ new_A.double(), want, rtol=1e-9, atol=1e-9)
    assert lost == pytest.approx(float((delta - want).norm() / delta.norm()), rel=1e-9)
    assert 0.1 < lost < 1


def test_an_adapter_that_the_others_never_reach_loses_nothing():
    others = [moments_of(normal(3, 24))]
    A = osrm_directions(others, 21, mode="covariance").A_RI[:4]
    B, _, lost = osrm_project(normal(30, 4).float(), A, 1.0, others, 21, mode="covariance")
    assert lost < 1e-6
    assert B.dtype == torch.float32


def test_an_update_of_zero_loses_nothing_and_a_new_scale_of_zero_is_refused():
    others = [moments_of(normal(9, 6))]
    assert osrm_project(torch.zeros(5, 2), normal(2, 6), 1.0, others, 3, mode="covariance")[2] == 0.0
    assert osrm_project(torch.zeros(5, 0), torch.zeros(0, 6), 1.0, others, 3, mode="covariance")[2] == 0.0
    with pytest.raises(ValueError, match="new scale 0"):
        osrm_project(normal(5, 2), normal(2, 6), 1.0, others, 3, mode="covariance", new_scale=0.0)
