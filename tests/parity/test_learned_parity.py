"""Results of the TARA and NSC authors' code, as numbers; made by `benchmarks/parity/tara.py` and `nsc.py`.

github.com/wooseong97/TARA-Merge at efbae686f73d2d2c9487d38f8caff24cb43383fd,
github.com/wonyoung01/nsc_merging at 412098bda9b1126b0e054e2d6970e9014ef7b90e: their `train_merged_model`, float32.
"""

import sys
from pathlib import Path

import pytest
import torch

from ray_merge.algebra.objectives import information, null_space_ratio, row_basis

PARITY = Path(__file__).parent.parent.parent / "benchmarks" / "parity"
ANCHORS = [0.91313529, 0.66153264, 0.777398586]
PHI = {
    # |phi - 0.4| of the first site and of all, and a weighed sum, after 5 steps of 2e-2
    "tara_a": (0.251507678, 0.659495021, 0.00924512659),
    "tara_b": (0.445913443, 1.22491917, -0.336761994),
    "adamerging": (0.154845703, 0.400581, -0.0037320742),
    "nsc": (0.0432084134, 0.212280463, -0.018906758),
}
ROUNDING = {"tara_b": 2e-5}
"""Their basis is an SVD in float32; its phi are within 2e-6 of ours, and a probe sums 288 of them."""


@pytest.fixture(scope="module")
def school():
    sys.path.insert(0, str(PARITY))
    try:
        import clip_school

        yield clip_school
    finally:
        sys.path.remove(str(PARITY))


def test_learned_coefficients_are_the_authors(school, tmp_path):
    small = school.make_school(school.School.small(tmp_path / "small"))
    last = {"modules": "v_proj", "layers": "last_quarter"}
    phi = school.learn(small, {name: school.SMALL | (last if name == "nsc" else {}) for name in PHI})
    assert list(school.anchors(small).values()) == pytest.approx(ANCHORS, abs=5e-7)
    for name, theirs in PHI.items():
        assert school.probes(phi[name]) == pytest.approx(theirs, abs=ROUNDING.get(name, 3e-6)), name


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.4, 2.0, 1e-5])
def test_the_null_space_ratio_is_the_authors_at_scale_one_whatever_the_scale(scale):
    A, x = normal(16, 32, seed=3), normal(5, 32, seed=4)
    # Theirs: 0.943308 at 0.5, NaN at 1.4 and 2; 0.950138 where A itself is 1e-5 of this.
    assert float(null_space_ratio(x, row_basis(scale * A).float()).mean()) == pytest.approx(
        0.746755, abs=2e-6
    )


def test_the_entropy_on_a_tasks_own_classes_is_the_authors_anchor():
    logits = torch.tensor([[0.2, 1.5, 0.4], [1.0, 1.2, -0.3], [0.1, 2.0, 0.6]])
    assert float(information(logits[:, [0, 2]])) == pytest.approx(0.623481, abs=2e-6)
    # What their training looks at, where the class that the task does not have is not masked.
    assert float(information(logits)) == pytest.approx(0.888220, abs=2e-6)
