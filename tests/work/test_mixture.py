"""A mixture that notices layers whose weight is used without a call."""

import pytest
import torch

from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import RunFailed
from ray_merge.models.conversion import Slot
from ray_merge.spec import Factor, Site
from ray_merge.work.mixture import Ingredients, Mixture


class Files:
    """Factors of two adapters at every site."""

    def site(self, names, site, base):
        torch.manual_seed(0)
        return SiteFactors([Factor(torch.randn(4, 2), torch.randn(2, 3), 1.0) for _ in names])


def mixture():
    site = Site(name="a.out", tensor="a.out.weight", shape=(4, 3))
    made_of = Ingredients(
        names=("x", "y"),
        coefficients="adapter",
        beside={"a.out": "model.a.out"},
        conv1d=frozenset(),
        inside=(),
        sites={"a.out": site},
    )
    return Mixture(made_of, Files(), None, {"model.a.out.weight": (Slot(tensor="a.out.weight"),)})


def test_a_layer_that_is_called_gets_its_update_and_one_that_is_not_is_refused():
    mixed, phi, x = mixture(), {"a.out": torch.tensor([0.5, 2.0])}, torch.randn(5, 3)
    weight = torch.randn(4, 3)
    assert mixed.altered(phi, {})("model.a.out.weight", weight) is weight
    with pytest.raises(RunFailed, match=r"model\.a\.out is never called"):
        mixed.check_called(phi)
    B, A = mixed.update("a.out", phi["a.out"])
    torch.testing.assert_close(mixed.added(phi)("model.a.out", x), x @ (B @ A).T)
    assert mixed.added(phi)("model.other", x) is None
    mixed.check_called(phi)
