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

ALLOWED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def given_phi(method: Method, phi: Any, factors: Sequence[Factor]) -> Tensor:
    """Phi as a tensor.

    Raises:
        MethodError: no numbers, another dtype, NaN or Inf, or another shape than the method takes with these factors.
    """
    assert method.learned, f"{method.name} takes no phi"
    try:
        found = phi if isinstance(phi, Tensor) else torch.tensor(phi)
    except (TypeError, ValueError) as error:
        raise MethodError(f"phi is a {type(phi).__name__}, expected a tensor or numbers ({error})") from error
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if whole and not isinstance(phi, Tensor):  # [2, -1] are numbers; a tensor of another dtype is a mistake
        found = found.float()
    if found.dtype not in ALLOWED:
        allowed = ", ".join(str(one) for one in ALLOWED)
        raise MethodError(f"phi is {found.dtype}, allowed are {allowed}; convert it to float32")
    if not bool(torch.isfinite(found).all()):
        raise MethodError("phi holds NaN or Inf, expected finite numbers; learn it again")
    site = factors[0].B.shape[0], factors[0].A.shape[1]
    ranks = [factor.B.shape[1] for factor in factors]
    wanted = phi_shape(method.learned, site, ranks)
    if tuple(found.shape) != wanted:
        raise MethodError(
            f"phi is {tuple(found.shape)}, but {method.name} takes {wanted} for {len(factors)} factors of ranks "
            f"{ranks}: {AXES[method.learned]}"
        )
    return found
