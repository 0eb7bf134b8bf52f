import pytest
import torch
from method_cases import deltas, random_factors, relative, weighted

from ray_merge.errors import MethodError
from ray_merge.methods import free as kernel
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

CLOSE = 1e-10
SHAPES_AND_RANKS = [
    ((24, 18), (3, 5, 2)),
    ((31, 40), (0, 4, 1)),
    ((40, 31), (3, 3, 3)),
    ((21, 21), (2, 0, 1)),
    ((5, 4), (7, 1, 3)),
    ((1, 30), (1, 1, 1)),
    ((1, 1), (1, 1, 1)),
]
WEIGHTS = [0.5, -1.0, 2.0]


def filtered(values, mask):
    return torch.stack([torch.fft.ifft2(torch.fft.fft2(delta) * mask).real for delta in values])


def distance(shape):
    """From the middle of a spectrum, in steps."""
    rows, columns = (torch.arange(size) - size // 2 for size in shape)
    return (rows[:, None] ** 2 + columns[None] ** 2).double().sqrt()


def high_pass(shape, cutoff):
    """Zero frequency is in the middle after fftshift: the mask is made there and shifted back."""
    return torch.fft.ifftshift((distance(shape) >= round(cutoff * min(shape), 9)).double())


def tara_mask(shape, cutoff):
    return (distance(shape) >= max(1, int(min(shape) * cutoff))).double()


def authors_mask(shape, ratio):
    far, ring = distance(shape), min(shape) // 10
    return (far <= ring).double() + ((far >= ring) & (far <= min(shape) * ratio)).double()


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("cutoff", [0.1, 0.37, 1.0])
def test_free_sums_deltas_without_their_low_frequencies(shape, ranks, cutoff):
    factors = random_factors(shape, ranks)
    merged = merge_factors("free", factors, weight=WEIGHTS, lambda_=0.4, cutoff=cutoff)
    want = 0.4 * weighted(filtered(deltas(factors), high_pass(shape, cutoff)), WEIGHTS).sum(0)
    scale = float(deltas(factors).norm())
    assert float((merged.dense() - want).norm()) < CLOSE * scale
    assert merged.factors() is None


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize(
    ("compat", "key", "share", "mask"),
    [
        ("tara", "cutoff", 0.1, tara_mask),
        ("tara", "cutoff", 0.5, tara_mask),
        ("authors", "filter_ratio", 0.7, authors_mask),
        ("authors", "filter_ratio", 0.05, authors_mask),
    ],
)
def test_the_published_masks_are_reproduced(shape, ranks, compat, key, share, mask):
    factors = random_factors(shape, ranks)
    merged = merge_factors("free", factors, weight=WEIGHTS, compat=compat, **{key: share})
    want = weighted(filtered(deltas(factors), mask(shape, share)), WEIGHTS).sum(0)
    assert float((merged.dense() - want).norm()) < CLOSE * float(deltas(factors).norm())


def test_with_no_frequency_removed_free_is_task_arithmetic():
    factors = random_factors((24, 18), (3, 5, 2))
    merged = merge_factors("free", factors, weight=WEIGHTS, cutoff=0.0)
    assert torch.equal(merged.dense(), merge_factors("task_arithmetic", factors, weight=WEIGHTS).dense())


def test_what_passes_is_what_the_names_say():
    rows, columns = torch.arange(20.0), torch.arange(30.0)
    flat = Factor(torch.ones(20, 1), torch.ones(1, 30), 1.0)
    checkered = Factor((-1.0) ** rows[:, None], (-1.0) ** columns[None], 1.0)
    assert merge_factors("free", [flat]).norm() < 1e-5
    assert relative(merge_factors("free", [checkered]).dense(), deltas([checkered])[0]) < 1e-6
    # TARA's code leaves the spectrum unshifted: it removes the checkers and keeps the constant.
    assert merge_factors("free", [checkered], compat="tara").norm() < 1e-5
    assert relative(merge_factors("free", [flat], compat="tara").dense(), deltas([flat])[0]) < 1e-6


@pytest.mark.parametrize("compat", ["paper", "tara"])
def test_filtering_twice_is_filtering_once(compat):
    once = merge_factors("free", random_factors((24, 18), (3, 5)), compat=compat).dense()
    as_factor = Factor(once, torch.eye(18, dtype=torch.float64), 1.0)
    assert relative(merge_factors("free", [as_factor], compat=compat).dense(), once) < CLOSE


def test_free_does_not_depend_on_gauge_or_order():
    factors = random_factors((24, 18), (3, 5, 2))
    want = merge_factors("free", factors, weight=WEIGHTS).dense()
    generator = torch.Generator().manual_seed(9)
    turned = []
    for factor in factors:
        G = torch.randn(factor.B.shape[1], factor.B.shape[1], generator=generator, dtype=torch.float64)
        turned.append(Factor(factor.B @ G, torch.linalg.solve(G, factor.A), factor.scale))
    assert relative(merge_factors("free", turned, weight=WEIGHTS).dense(), want) < CLOSE
    reversed_ = merge_factors("free", factors[::-1], weight=WEIGHTS[::-1])
    assert relative(reversed_.dense(), want) < CLOSE


def test_rows_do_not_depend_on_what_is_asked_for_at_once():
    factors = random_factors((40, 65536), (1, 2), dtype=torch.float32)
    merged = merge_factors("free", factors)
    assert merged.chunk_rows < 24
    whole = merged.dense()
    assert torch.equal(merged.rows(11, 35), whole[11:35])
    want = filtered(deltas(factors), high_pass((40, 65536), 0.1)).sum(0)
    assert relative(whole, want) < 1e-6


@pytest.mark.parametrize("compat", ["paper", "authors"])
def test_frequencies_may_be_worked_on_in_small_blocks_and_made_anew(monkeypatch, compat):
    factors = random_factors((40, 31), (3, 3))
    whole = merge_factors("free", factors, compat=compat).dense()
    monkeypatch.setattr(kernel, "BLOCK_ENTRIES", 64)
    blocks = merge_factors("free", factors, compat=compat).dense()
    monkeypatch.setattr(kernel, "HELD_ENTRIES", 0)
    assert torch.equal(merge_factors("free", factors, compat=compat).dense(), blocks)
    assert relative(blocks, whole) < CLOSE


@pytest.mark.parametrize("compat", ["paper", "authors", "tara"])
@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS[:4])
def test_float32_factors_give_float32_accuracy(shape, ranks, compat):
    single = random_factors(shape, ranks, dtype=torch.float32)
    merged = merge_factors("free", single, compat=compat).dense()
    exact = merge_factors(
        "free", [Factor(f.B.double(), f.A.double(), f.scale) for f in single], compat=compat
    )
    assert merged.dtype == torch.float32
    assert relative(merged, exact.dense()) < 2e-6


def test_fresh_adapters_and_untouched_sites_give_zero():
    fresh = [Factor(torch.zeros(9, 2), torch.ones(2, 8), 1.0)] * 2
    assert torch.equal(merge_factors("free", fresh).dense(), torch.zeros(9, 8))
    assert merge_factors("free", random_factors((9, 8), [0, 0])).norm() == 0


def test_bad_parameters_are_refused():
    factors = random_factors((4, 4), [2])
    with pytest.raises(MethodError, match=r"cutoff is 1.5, expected a number in \[0, 1\]"):
        merge_factors("free", factors, cutoff=1.5)
    with pytest.raises(MethodError, match=r"compat paper does not read filter_ratio, got 0\.5"):
        merge_factors("free", factors, filter_ratio=0.5)
    with pytest.raises(MethodError, match=r"compat authors does not read cutoff, got 0\.2"):
        merge_factors("free", factors, cutoff=0.2, compat="authors")
    dora = Factor(factors[0].B, factors[0].A, 1.0, magnitude=torch.ones(4, 1, dtype=torch.float64))
    with pytest.raises(MethodError, match="free works on factors, but a DoRA delta is dense"):
        merge_factors("free", [dora], base=torch.eye(4, dtype=torch.float64))


# Printed by `benchmarks/parity/tara_baselines.py --rows O --columns I` (rank 8, 4 adapters, seed 5).
# tara: wooseong97/TARA-Merge efbae686f73d2d2c9487d38f8caff24cb43383fd, which filters in float32.
# authors: Zhengsh123/FREE-Merging 36c0f415f6b3c4868505c46a2427bfec1ba41fe3, merge_vit, filter_ratio 0.7.
# shape, compat, their norm, their entry [3, 5], accuracy of their arithmetic
PARITY = [
    ((200, 160), "tara", 6.25448438891, 0.0126714888029, 1e-6),
    ((81, 143), "tara", 4.09540160229, 0.0197976534255, 1e-6),
    ((200, 160), "authors", 6.22637305669, 0.0221846602995, 1e-11),
    ((81, 143), "authors", 3.50709367841, 0.0499464390544, 1e-11),
]


@pytest.mark.parametrize(("shape", "compat", "norm", "entry", "accuracy"), PARITY)
def test_free_gives_the_published_codes_numbers(shape, compat, norm, entry, accuracy):
    generator = torch.Generator().manual_seed(5)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    factors = [Factor(normal(shape[0], 8) / shape[1], normal(8, shape[1]), 1.0) for _ in range(4)]
    merged = merge_factors("free", factors, compat=compat)
    assert merged.norm() == pytest.approx(norm, rel=accuracy)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=10 * accuracy)
