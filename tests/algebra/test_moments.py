import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_merge.algebra import moments as module
from ray_merge.algebra.moments import Moments, MomentSums, added, pack, token_rows, unpack


def rows(count, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, columns, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


def summed(*parts):
    sums = MomentSums(parts[0].shape[1])
    for part in parts:
        sums.add(part)
    return sums.finish()


def relative(got, want):
    return float((got - want).norm() / want.norm())


# One column, a block less one, a block, several with a rest.
@pytest.mark.parametrize("columns", [1, module.BLOCK_COLUMNS - 1, module.BLOCK_COLUMNS, 250])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_sums_are_those_of_float64(columns, dtype):
    X = rows(300, columns, dtype=dtype)
    got = summed(X[:120], X[120:120], X[120:])
    exact = X.double()
    assert relative(got.gram, exact.T @ exact) < 1e-14
    assert relative(got.mean, exact.mean(0)) < 1e-13
    assert (got.count, got.gram.dtype, got.mean.dtype) == (300, torch.float64, torch.float64)
    assert torch.equal(got.gram, got.gram.T)


def test_rows_are_taken_in_chunks_of_bounded_memory(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_VALUES", 1)
    X = rows(3 * module.BLOCK_COLUMNS + 5, 7, dtype=torch.float64)
    assert relative(summed(X).gram, X.T @ X) < 1e-14


def test_large_float16_activations_do_not_overflow():
    X = torch.full((4, 2), 60000.0, dtype=torch.float16)
    exact = float(X[0, 0])
    assert summed(X).gram[0, 1] == 4 * exact**2


def test_gradients_stay_out():
    assert not summed(rows(4, 3).requires_grad_()).gram.requires_grad


def test_a_module_that_no_token_reached_has_moments_of_zero():
    got = MomentSums(3).finish()
    assert got.count == 0
    assert torch.equal(got.mean, torch.zeros(3, dtype=torch.float64))


def test_two_parts_add_up():
    X = rows(90, 20, dtype=torch.float64)
    got = added(summed(X[:13]), summed(X[13:]))
    assert relative(got.gram, X.T @ X) < 1e-14
    assert relative(got.mean, X.mean(0)) < 1e-13
    assert got.count == 90
    assert torch.equal(added(got, MomentSums(20).finish()).gram, got.gram)
    with pytest.raises(ValueError, match="20 and of 21 columns"):
        added(got, MomentSums(21).finish())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_what_is_not_finite_is_noticed(bad):
    X = rows(5, 4, dtype=torch.float64)
    X[2, 3] = bad
    with pytest.raises(OverflowError, match="5 token rows"):
        summed(X)


def test_nothing_can_be_added_after_the_sums_were_handed_over():
    sums = MomentSums(3)
    sums.add(rows(2, 3))
    kept = sums.finish().gram.clone()
    with pytest.raises(ValueError, match="rows of 0 columns"):
        sums.add(rows(2, 3))
    assert relative(kept, rows(2, 3).double().T @ rows(2, 3).double()) < 1e-14


@pytest.mark.parametrize("X", [torch.zeros(2, 4), torch.zeros(3), torch.zeros(1, 2, 3)])
def test_other_columns_are_refused(X):
    with pytest.raises(ValueError, match="3 columns"):
        MomentSums(3).add(X)


@pytest.mark.parametrize(
    ("gram", "mean", "count"), [((3, 2), (3,), 1), ((3, 3), (2,), 1), ((4, 4), (2, 2), 1), ((2, 2), (2,), -1)]
)
def test_moments_of_shapes_that_do_not_fit_are_refused(gram, mean, count):
    with pytest.raises(ValueError, match="Gram matrix"):
        Moments(torch.zeros(gram), torch.zeros(mean), count)


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_rows_of_padding_are_dropped():
    x = rows(6, 4).reshape(2, 3, 4)
    want = torch.stack([x[0, 0], x[0, 1], x[1, 0]])
    assert torch.equal(token_rows(x, MASK), want)
    assert torch.equal(token_rows(x.reshape(6, 4), MASK), want)
    assert torch.equal(token_rows(x, MASK.bool()), want)
    assert torch.equal(token_rows(x, None), x.reshape(6, 4))
    assert torch.equal(token_rows(x[None], None), x.reshape(6, 4))


def test_a_row_for_each_example_is_not_masked():
    x = rows(2, 4)
    assert torch.equal(token_rows(x, MASK), x)
    assert torch.equal(token_rows(x, torch.tensor([[1], [0]])), x[:1])


@pytest.mark.parametrize(
    ("shape", "mask"),
    [((2, 4, 5), (2, 3)), ((5, 4), (2, 3)), ((4,), None), ((2, 3, 4, 5), (2, 3)), ((2, 3, 4), (2, 3, 1))],
)
def test_inputs_without_known_token_rows_are_refused(shape, mask):
    with pytest.raises(ValueError, match="no known token rows") as caught:
        token_rows(torch.zeros(shape), None if mask is None else torch.ones(mask))
    assert str(shape) in str(caught.value)
    assert mask is None or str(mask) in str(caught.value)


@pytest.mark.parametrize("columns", [0, 1, 2, 130])
def test_a_packed_triangle_unpacks_to_the_same_bits(columns):
    gram = rows(columns + 1, columns, dtype=torch.float64)
    gram = summed(gram).gram
    packed = pack(gram)
    assert packed.shape == (columns * (columns + 1) // 2,)
    assert torch.equal(unpack(packed, columns), gram)


def test_a_triangle_is_packed_row_by_row():
    assert pack(torch.tensor([[1.0, 2.0], [2.0, 3.0]])).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"\(6,\), but got \(5,\)"):
        unpack(torch.zeros(5), 3)


def test_the_triangle_takes_fewer_products_than_the_full_square():
    X, sums = rows(768, 768), MomentSums(768)
    added = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=added) as counted:
        sums.add(X)
    full = 2 * 768**3
    assert full / 2 < counted.get_total_flops() < 0.8 * full
