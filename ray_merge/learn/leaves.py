"""phi as the optimiser sees it: leaves, each shared by the sites of one group.

Owns: init, sharing and bounds of phi, and how gradients by site become gradients of leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ray_merge.plan.learn import Learning, LearnPlan
from ray_merge.work.learn_job import Phi


class Leaves:
    """The learned coefficients of one merge.

    Args:
        plan: names the block of each site.
        learning: the merge; `init`, `sharing`, `low`, `high` and `hold_sum` of its parameters are read.

    Attributes:
        tensors: group -> its phi, requires_grad; in order of the first site of each.
    """

    def __init__(self, plan: LearnPlan, learning: Learning) -> None:
        parameters = learning.merge.parameters
        dtype = torch.float64 if plan.dtype == "float64" else torch.float32
        self._low, self._high = parameters["low"], parameters["high"]
        self._init, self._holds = float(parameters["init"]), bool(parameters.get("hold_sum"))
        self._group = leaf_names(plan, learning)
        self._touching: dict[str, set[int]] = {}
        for site, group in self._group.items():
            self._touching.setdefault(group, set()).update(learning.touching[site])
        self.tensors: dict[str, Tensor] = {}
        for site, group in self._group.items():
            if group not in self.tensors:
                filled = torch.full(learning.shapes[site], self._init, dtype=dtype)
                self.tensors[group] = filled.requires_grad_()

    def by_site(self, sites: Sequence[str]) -> Phi:
        """Phi of some sites, as it travels."""
        return {site: self.tensors[self._group[site]].detach().numpy() for site in sites}

    def set_gradients(self, by_site: Mapping[str, Tensor]) -> None:
        """Sum the gradients of each group's sites, in order.

        A leaf that the loss does not depend on (NSC: behind the last site that is measured) gets none, so that the
        optimiser leaves it at its init, weight decay included, as autograd would.
        """
        for group, leaf in self.tensors.items():
            parts = [by_site[site] for site, own in self._group.items() if own == group and site in by_site]
            total = torch.zeros_like(leaf)
            for part in parts:
                total += part.to(leaf.dtype)
            leaf.grad = total if bool(total.any()) else None

    def project(self) -> None:
        """Bring phi back to [low, high], or to the sum that its adapters had at the start, whichever is asked for.

        The null-space ratio compares directions, so it can tell how much of each adapter there should be and not how
        much of all; left free, the sum grows until the tasks disturb each other.
        """
        with torch.no_grad():
            for group, leaf in self.tensors.items():
                if self._low is not None or self._high is not None:
                    leaf.clamp_(self._low, self._high)
                if self._holds and leaf.grad is not None:
                    places = sorted(self._touching[group])
                    leaf[places] -= leaf[places].mean() - self._init

    def all_finite(self) -> bool:
        """Whether every coefficient and its gradient is a number."""
        return all(
            bool(torch.isfinite(leaf).all()) and (leaf.grad is None or bool(torch.isfinite(leaf.grad).all()))
            for leaf in self.tensors.values()
        )


def leaf_names(plan: LearnPlan, learning: Learning) -> dict[str, str]:
    """Site -> the name of its leaf; sites share where phi has the same shape."""
    sharing = str(learning.merge.parameters["sharing"])
    blocks = {site: part.name for part in plan.stages.parts for site in part.modules}
    found = {}
    for site, shape in learning.shapes.items():
        size = "x".join(map(str, shape))
        named = {"site": site, "block": f"{blocks.get(site, site)}/{size}", "model": f"model/{size}"}
        found[site] = named[sharing]
    return found
