import numpy as np
import pytest

from ray_merge.algebra.radix import Histogram, Prefix, narrow


def patterns(values, total_bits):
    kind = (np.float32, np.int32) if total_bits == 31 else (np.float64, np.int64)
    return np.abs(values.astype(kind[0])).view(kind[1]).astype(np.int64)


def counted(pattern, prefix):
    inside = (
        pattern[pattern >> (prefix.total_bits - prefix.n_bits) == prefix.value] if prefix.n_bits else pattern
    )
    digits = (inside >> (prefix.total_bits - prefix.n_bits - prefix.width)) & ((1 << prefix.width) - 1)
    return Histogram.of(np.bincount(digits, minlength=1 << prefix.width))


def added(histograms, width):
    counts = np.zeros(1 << width, np.int64)
    for one in histograms:
        counts[one.digits] += one.counts
    return Histogram.of(counts)


@pytest.mark.parametrize("total_bits", [31, 63])
@pytest.mark.parametrize("k", [1, 2, 499, 1000])
def test_narrowing_until_the_prefix_is_complete_names_the_kth_largest_magnitude(total_bits, k):
    values = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-20, 20, 0.04)
    pattern, prefix, place = patterns(values, total_bits), Prefix(total_bits=total_bits), k
    rounds = 0
    while not prefix.complete:
        prefix, place, _ = narrow(prefix, place, counted(pattern, prefix))
        rounds += 1
    exact = np.sort(np.abs(values.astype(np.float32 if total_bits == 31 else np.float64)))[-k]
    assert prefix.magnitude == float(exact)
    assert rounds == (2 if total_bits == 31 else 4)


def test_histograms_of_parts_may_be_added_up():
    pattern = patterns(np.random.default_rng(1).normal(size=999), 31)
    start = Prefix(total_bits=31)
    whole = narrow(start, 100, counted(pattern, start))
    assert (
        narrow(start, 100, added([counted(part, start) for part in np.array_split(pattern, 7)], start.width))
        == whole
    )


def test_a_place_that_no_candidate_has_is_an_error():
    with pytest.raises(ValueError, match="the 3-th largest of 2 entries"):
        narrow(Prefix(), 3, Histogram.of(np.array([1, 0, 1])))
