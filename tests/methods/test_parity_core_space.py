"""The Core Space authors' results, as numbers: github.com/apanariello4/core-space-merging at
85176fab749578b0b54a027ea89495846e79757d.

Made by `benchmarks/parity/core_space.py`: 192 x 192, 4 adapters of rank 8, seed 3, topK 20, scale 0.6, float64.
"""

import pytest
import torch

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor


@pytest.fixture(scope="module")
def factors():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [Factor(normal(192, 8) / 192, normal(8, 192), 1.0) for _ in range(4)]


@pytest.mark.parametrize(
    ("method", "given", "norm", "entry"),
    [
        ("task_arithmetic", {}, 3.41636902793, -0.0218688090505),
        ("ties", {"space": "core", "density": 0.2, "compat": "authors"}, 2.46248402035, -0.023575103932),
    ],
)
def test_merging_in_core_space_gives_the_authors_numbers(factors, method, given, norm, entry):
    merged = merge_factors(method, factors, lambda_=0.6, **given)
    assert merged.norm() == pytest.approx(norm, rel=1e-10)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=1e-9)
