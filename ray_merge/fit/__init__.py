"""Does each adapter fit the base, and where does each of its tensors go; from headers alone."""

from ray_merge.fit.adapters import Fitted, fit_adapters
from ray_merge.fit.owners import check_owners
from ray_merge.fit.training_base import check_bases

__all__ = ["Fitted", "check_bases", "check_owners", "fit_adapters"]
