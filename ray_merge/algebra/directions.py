"""The merged update of a site as a function of learned coefficients phi.

Formulas (TARA, arXiv 2603.26299; AdaMerging and NSC scale whole adapters), tau_i = s_i B_i A_i:

    direction   sum_i sum_j phi_ij s_i b_ij a_ij^T
    shared      sum_i sum_k phi_ik sigma_k u_k v_ki^T      where [tau_1 .. tau_T] = U S [V_1 .. V_T]
    adapter     sum_i phi_i tau_i

At a constant phi all three are phi times the sum of the updates. Factors stay factors: the shared form multiplies U
once by one (R, I) matrix, the sum over adapters, so that its cost does not grow with T copies of U.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ray_merge.algebra.bases import knots_basis
from ray_merge.algebra.phi_shape import Coefficients, phi_shape
from ray_merge.algebra.site import SiteFactors


class Directions:
    """What phi multiplies at one site.

    Args:
        site: the factors of T adapters.
        kind: which coefficients.

    Raises:
        ValueError: an adapter is DoRA at the site, whose update is no sum of products.
    """

    def __init__(self, site: SiteFactors, kind: Coefficients) -> None:
        if site.is_dense:
            raise ValueError("DoRA at a site: its update is no sum of products that phi could weigh")
        self.kind = kind
        self.phi_shape = phi_shape(kind, site.shape, site.ranks)
        if kind == "shared":
            basis = knots_basis(site.pairs, smallest=None)
            self._B_OP = basis.left_vectors.to(site.dtype)
            self._left_RS = torch.cat([left for left, _ in basis.coordinates], dim=1).to(site.dtype)
            self._right_SI = torch.cat([right for _, right in basis.coordinates]).to(site.dtype)
            widths = [left.shape[1] for left, _ in basis.coordinates]
        else:
            self._B_OP = torch.cat(site.B, dim=1)
            self._right_SI = torch.cat([A_RI for _, A_RI in site.pairs])
            widths = list(site.ranks)
        owners = [index for index, width in enumerate(widths) for _ in range(width)]
        self._owner_S = torch.tensor(owners, dtype=torch.int64, device=site.device)

    def update(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """B (O, P) and A (P, I) of the update, differentiable in phi.

        P is S, or min(O, S) of the shared form.

        Args:
            phi: of `phi_shape`.
        """
        if self.kind == "direction":
            return self._B_OP, phi[:, None] * self._right_SI
        if self.kind == "adapter":
            return self._B_OP, phi[self._owner_S][:, None] * self._right_SI
        weighed_RS = phi.T[:, self._owner_S] * self._left_RS
        return self._B_OP, weighed_RS @ self._right_SI
