import math

import pytest
import torch

from ray_merge.algebra.rounding import Rounding, add_update


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("work", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_sum_is_rounded_once(base, stored, work):
    base_NI, update_NI = random(8, 16, dtype=base), 0.01 * random(8, 16, seed=1, dtype=work)
    result = add_update(base_NI, update_NI, stored, Rounding())
    assert result.dtype == stored
    assert torch.equal(result, (base_NI.to(work) + update_NI).to(stored))


def test_the_inputs_stay_as_they_were():
    base_NI, update_NI = random(4, 4), random(4, 4, seed=1)
    copies = base_NI.clone(), update_NI.clone()
    stored_NI = add_update(base_NI, update_NI, torch.float32, Rounding())
    assert torch.equal(base_NI, copies[0])
    assert torch.equal(update_NI, copies[1])
    assert torch.equal(stored_NI, copies[0] + copies[1])


def test_norm_and_loss_agree_with_float64():
    base_NI, update_NI = random(64, 64, dtype=torch.bfloat16), 0.005 * random(64, 64, seed=1)
    sums = Rounding()
    stored_NI = add_update(base_NI, update_NI, torch.bfloat16, sums)
    exact = update_NI.double()
    lost = stored_NI.double() - base_NI.double() - exact
    # float32 subtraction of numbers up to 4 next to an update of 0.005: 2^-24 * 4 / 0.005 = 5e-5 of the update.
    assert sums.update_norm == pytest.approx(exact.norm().item(), rel=1e-6)
    assert sums.lost_share == pytest.approx((lost.norm() / exact.norm()).item(), rel=1e-3)
    assert 0.05 < sums.lost_share < 0.5


def test_blocks_of_rows_add_up_to_the_whole():
    base_NI, update_NI = random(32, 8, dtype=torch.bfloat16), 0.01 * random(32, 8, seed=1)
    whole, parts = Rounding(), Rounding()
    stored_NI = add_update(base_NI, update_NI, torch.bfloat16, whole)
    rows = [
        add_update(base_NI[i : i + 8], update_NI[i : i + 8], torch.bfloat16, parts) for i in range(0, 32, 8)
    ]
    assert torch.equal(torch.cat(rows), stored_NI)
    assert parts.update_norm == pytest.approx(whole.update_norm, rel=1e-12)
    assert parts.lost_share == pytest.approx(whole.lost_share, rel=1e-12)


def test_an_update_of_zero_loses_nothing():
    sums = Rounding()
    base_NI = random(4, 4, dtype=torch.bfloat16)
    assert torch.equal(add_update(base_NI, torch.zeros(4, 4), torch.bfloat16, sums), base_NI)
    assert (sums.update_norm, sums.lost_share, sums.finite) == (0.0, 0.0, True)


def test_an_update_far_below_the_base_is_lost_whole():
    sums = Rounding()
    add_update(torch.ones(4, 4, dtype=torch.bfloat16), torch.full((4, 4), 1e-6), torch.bfloat16, sums)
    assert sums.lost_share == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["base", "update"])
def test_numbers_that_are_not_finite_are_noticed(place, value):
    base_NI, update_NI = random(4, 4), random(4, 4, seed=1)
    (base_NI if place == "base" else update_NI)[2, 1] = value
    sums = Rounding()
    add_update(base_NI, update_NI, torch.float32, sums)
    assert not sums.finite


def test_a_result_that_does_not_fit_its_dtype_is_noticed():
    sums = Rounding()
    add_update(
        torch.full((2, 2), 60000.0, dtype=torch.float16), torch.full((2, 2), 9000.0), torch.float16, sums
    )
    assert not sums.finite


def test_an_update_whose_square_overflows_is_noticed_and_raises_nothing():
    sums = Rounding()
    add_update(
        torch.zeros(2, 2, dtype=torch.float64),
        torch.full((2, 2), 1e200, dtype=torch.float64),
        torch.float64,
        sums,
    )
    assert not sums.finite
