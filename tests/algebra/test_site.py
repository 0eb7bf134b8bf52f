import pytest
import torch
from algebra_cases import random_factors

from ray_merge.algebra.site import SiteFactors
from ray_merge.spec import Factor


def test_each_decomposition_is_computed_once():
    site = SiteFactors(random_factors((9, 8), [2, 3]))
    assert site.knots is site.knots
    assert site.core is site.core
    assert site.pairs is site.pairs


def test_no_factors_are_refused():
    with pytest.raises(ValueError, match="at least one adapter"):
        SiteFactors([])


@pytest.mark.parametrize(
    "odd",
    [
        Factor(torch.zeros(9, 2), torch.zeros(3, 8)),
        Factor(torch.zeros(9, 2), torch.zeros(2, 7)),
        Factor(torch.zeros(10, 2), torch.zeros(2, 8)),
    ],
)
def test_factors_of_another_weight_are_refused(odd):
    with pytest.raises(ValueError, match="do not fit together"):
        SiteFactors([*random_factors((9, 8), [2]), odd])
