"""phi given to `merge_factors`, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ray_merge.algebra.phi_shape import phi_shape
from ray_merge.errors import MethodError
from ray_merge.methods.declare import Method
from ray_merge.spec import Factor

AXES = {
    "direction": "one for each rank-1 direction, adapter after adapter",
    "shared": "adapters, and directions of the shared basis: the smaller of rows and summed ranks",
    "adapter": "one for each adapter",
}


def given_phi(method: Method, phi: Any, factors: Sequence[Factor]) -> Tensor:
    """Phi as a tensor.

    Raises:
        MethodError: no numbers, or another shape than the method takes with these factors.
    """
    assert method.learned, f"{method.name} takes no phi"
    try:
        found = phi if isinstance(phi, Tensor) else torch.tensor(phi)
    except (TypeError, ValueError) as error:
        raise MethodError(f"phi is a {type(phi).__name__}, expected a tensor or numbers ({error})") from error
    if not isinstance(phi, Tensor) and not found.is_floating_point() and found.dtype != torch.bool:
        found = found.float()
    if not found.is_floating_point() or not bool(torch.isfinite(found).all()):
        raise MethodError(f"phi holds NaN or Inf, or is no floating tensor ({found.dtype})")
    site = factors[0].B.shape[0], factors[0].A.shape[1]
    ranks = [factor.B.shape[1] for factor in factors]
    wanted = phi_shape(method.learned, site, ranks)
    if tuple(found.shape) != wanted:
        raise MethodError(
            f"phi is {tuple(found.shape)}, but {method.name} takes {wanted} for {len(factors)} factors of ranks "
            f"{ranks}: {AXES[method.learned]}"
        )
    return found
