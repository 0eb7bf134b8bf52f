import pytest
import torch
from algebra_cases import random_factors

from ray_merge.algebra.delta import BlockDelta, LowRankDelta, product_norm
from ray_merge.algebra.grid import MIN_ROWS, chunk_rows, chunk_spans

SHAPES = [(1, 1), (7, 3), (5000, 700), (40, 300_000)]


def low_rank(shape, rank=5, dtype=torch.float32):
    (factor,) = random_factors(shape, [rank], dtype=dtype)
    return LowRankDelta(factor.B, factor.A)


def by_rule(shape):
    inner = low_rank(shape)
    return BlockDelta(shape, torch.float32, torch.device("cpu"), lambda index: inner.chunk(index).sin())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [low_rank, by_rule])
def test_rows_have_the_bits_of_the_whole_however_they_are_cut(make, shape):
    delta = make(shape)
    dense = delta.dense()
    step, rows = delta.chunk_rows, shape[0]
    for start, stop in [
        (0, rows),
        (0, 1),
        (rows - 1, rows),
        (rows // 3, rows // 2),
        (0, min(step + 1, rows)),
        (1, 1),
    ]:
        assert torch.equal(delta.rows(start, stop), dense[start:stop])


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_cover_every_row_once(shape):
    spans = chunk_spans(shape)
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(shape[0]))


def test_the_grid_depends_on_columns_alone_and_has_a_least_size():
    assert chunk_rows(2**20) == MIN_ROWS
    assert chunk_rows(1024) == 256


def test_rows_outside_the_site_are_refused():
    with pytest.raises(IndexError, match="6:8 of a site with 7 rows"):
        low_rank((7, 3)).rows(6, 8)


def test_dense_in_a_storage_dtype_is_the_work_result_rounded_once():
    delta = low_rank((700, 300))
    assert torch.equal(delta.dense(torch.bfloat16), delta.dense().to(torch.bfloat16))


def test_a_delta_of_rank_zero_is_zero_everywhere():
    delta = LowRankDelta(torch.zeros(4, 0), torch.zeros(0, 3))
    assert delta.norm() == 0.0
    assert delta.rank == 0
    assert torch.equal(delta.dense(), torch.zeros(4, 3))


def test_factors_give_the_delta_back():
    delta = low_rank((9, 8))
    factor = delta.factors()
    assert factor.scale == 1.0
    assert torch.equal(factor.B @ factor.A, delta.dense())


def test_a_rule_has_no_factors():
    delta = by_rule((9, 8))
    assert delta.factors() is None
    assert delta.rank == -1


@pytest.mark.parametrize("make", [low_rank, by_rule])
def test_the_norm_is_that_of_the_dense_update(make):
    delta = make((300, 5000))
    # dense() is rounded to float32 entry by entry; the norm of those errors is below eps * norm.
    assert delta.norm() == pytest.approx(float(delta.dense().double().norm()), rel=1e-6)


def test_the_norm_of_factors_that_cancel_keeps_its_digits():
    (factor,) = random_factors((50, 40), [4])
    tiny = 1e-9
    B = torch.cat([factor.B, factor.B * (1 + tiny)], dim=1)
    A = torch.cat([factor.A, -factor.A], dim=0)
    want = float(((1 + tiny - 1) * factor.B @ factor.A).norm())
    # B and A are of norm 1e9 times the result: eps * 1e9 is 2e-7.
    assert product_norm(B, A) == pytest.approx(want, rel=1e-6)


def test_multiples_of_one_update_make_each_chunk_once():
    made = []

    def rule(index):
        made.append(index)
        rows = min(chunk_rows(1024), 600 - index * chunk_rows(1024))
        return torch.full((rows, 1024), float(index + 1))

    one = BlockDelta((600, 1024), torch.float32, torch.device("cpu"), rule)
    multiples = [one.scaled(factor) for factor in (1.0, -0.5, 3.0)]
    for index in range(3):
        start, stop = index * chunk_rows(1024), min(600, (index + 1) * chunk_rows(1024))
        rows = [delta.rows(start, stop) for delta in multiples]
        assert [float(part[0, 0]) for part in rows] == [index + 1, -0.5 * (index + 1), 3.0 * (index + 1)]
    assert made == [0, 1, 2]
    assert multiples[1].norm() == pytest.approx(0.5 * one.norm())


def test_a_multiple_has_the_factors_of_the_whole():
    B, A = torch.ones(3, 2), torch.ones(2, 4)
    multiple = LowRankDelta(B, A, truncation_error=0.25).scaled(0.5)
    assert torch.equal(multiple.factors().B @ multiple.factors().A, multiple.dense())
    assert (multiple.rank, multiple.truncation_error) == (2, 0.25)
