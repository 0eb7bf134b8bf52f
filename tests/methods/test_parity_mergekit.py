"""mergekit's results, as numbers: github.com/arcee-ai/mergekit at a6e402884ba9bc30da7f23e8304a35f19485de95.

Made by `benchmarks/parity/mergekit.py --size 64 --rank 4 --seed 3`; the factors hold whole numbers, so the
deltas are exact in float32. mergekit's random drops come from a global generator and are not recorded here: the
benchmark gives its masks to ours.
"""

import pytest
import torch

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

WEIGHTS = [0.5, 1.0, 0.75, 0.25, 1.0, 0.5, 0.8, 0.6]


@pytest.fixture(scope="module")
def factors():
    generator = torch.Generator().manual_seed(3)

    def whole(*shape):
        return torch.randint(-1024, 1025, shape, generator=generator).float()

    return [Factor(whole(64, 4), whole(4, 64), 1.0) for _ in WEIGHTS]


@pytest.mark.parametrize(
    ("method", "given", "norm"),
    [
        ("task_arithmetic", {}, 52727205.4),
        ("linear", {}, 9764297.14),
        ("ties", {"density": 0.2, "compat": "mergekit"}, 43582858.4),
        ("ties", {"density": 0.2, "compat": "mergekit", "normalize": False}, 50924742.0),
    ],
)
def test_mergekit_arithmetic_gives_the_numbers_of_mergekit(factors, method, given, norm):
    merged = merge_factors(method, factors, weight=WEIGHTS, lambda_=0.6, **given)
    # Theirs is computed and recorded in float32.
    assert merged.norm() == pytest.approx(norm, rel=1e-6)
