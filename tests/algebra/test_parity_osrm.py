"""The OSRM authors' results, as numbers: github.com/illidanlab/OSRM at bfe8b6ddabb21666cb77e93aee1b5ccd649bcae0.

Made by `benchmarks/parity/osrm.py`: A by their peft_analytical_init on float64 means, B by their
get_post_analytical_init_weights with float64 in the place of bfloat16. r is the dimension of the null space, where
A A^T = 1 and A X^T = 0 leave no choice of the span.
"""

import pytest
import torch

from ray_merge.algebra.moments import Moments
from ray_merge.algebra.osrm import osrm_directions, osrm_project

TASKS, SCALE = 8, 2.0
CASES = [
    # columns, entries [0, 0] and [3, 5] of their A^T A, norm and entry [3, 5] of their B' A'
    (96, 0.957869922078, 0.0211772851938, 321.658059713, -0.646964750096),
    (192, 0.96900541118, 0.0180912471337, 475.083781488, -0.0461854006005),
]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def others(columns):
    means = normal(TASKS, columns, seed=0) + 3
    return [Moments(torch.outer(mean, mean), mean, 1) for mean in means[1:]]


@pytest.mark.parametrize(("columns", "first", "entry", "norm", "projected"), CASES)
def test_the_rows_and_the_projection_are_the_authors(columns, first, entry, norm, projected):
    r, moments = columns - (TASKS - 1), others(columns)
    found = osrm_directions(moments, r, mode="means")
    assert (found.null, found.null_space) == (r, r)
    span = found.A_RI.double().T @ found.A_RI.double()
    # A is float32: entries of the projection are known to 1e-7.
    assert float(span[0, 0]) == pytest.approx(first, abs=2e-7)
    assert float(span[3, 5]) == pytest.approx(entry, abs=2e-7)

    B, A = normal(64, 4, seed=1), normal(4, columns, seed=2) + 3
    new_B, new_A, _ = osrm_project(B, A, SCALE, moments, r, mode="means")
    delta = SCALE * new_B.double() @ new_A.double()
    assert float(delta.norm()) == pytest.approx(norm, rel=1e-6)
    assert float(delta[3, 5]) == pytest.approx(projected, rel=2e-5)


def test_fewer_rows_are_orthogonal_to_the_means_as_the_authors_are():
    moments = others(1024)
    A = osrm_directions(moments, 8, mode="means").A_RI.double()
    reach = [float((A @ one.mean).norm() / one.mean.norm()) for one in moments]
    # Theirs: 6.7e-8 in float32.
    assert max(reach) < 6.7e-8
