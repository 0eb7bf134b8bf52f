"""The KnOTS authors' results, as numbers: github.com/gstoica27/KnOTS at baa35e85768b8841820d35edc3e41b25304248c5.

Made by `benchmarks/parity/knots.py` (its float64 form): topK 20, scaling coefficient 0.6.
"""

import pytest
import torch

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

CASES = [
    # size, rank, adapters, seed, their norm, their entry [3, 5]
    (192, 8, 4, 3, 2.52494811621, -0.00982434076687),
    (2048, 16, 8, 0, 4.07659016361, 0.00228392842207),
]


def adapters(size, rank, count, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [Factor(normal(size, rank) / size, normal(rank, size), 1.0) for _ in range(count)]


@pytest.mark.parametrize(("size", "rank", "count", "seed", "norm", "entry"), CASES)
def test_knots_ties_gives_the_authors_numbers(size, rank, count, seed, norm, entry):
    factors = adapters(size, rank, count, seed)
    merged = merge_factors("knots_ties", factors, density=0.2, lambda_=0.6, compat="authors")
    # The recorded numbers have 12 digits.
    assert merged.norm() == pytest.approx(norm, rel=1e-10)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=1e-9)


def test_the_paper_form_differs_from_the_authors_code_by_single_entries():
    factors = adapters(192, 8, 4, 3)
    paper = merge_factors("knots_ties", factors, density=0.2, lambda_=0.6).dense()
    code = merge_factors("knots_ties", factors, density=0.2, lambda_=0.6, compat="authors").dense()
    # One more entry is kept per adapter: 4 of 4 * 0.2 * 32 * 192 = 4915, and they are the smallest.
    assert 0 < float((paper - code).norm() / code.norm()) < (4 / 4915) ** 0.5
