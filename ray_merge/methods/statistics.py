"""What kernels do with statistics of an adapter's data: get them, and do without them where that was asked for.

Owns: the form in which a kernel takes them. `Context.inputs["moments"]` is a sequence in adapter order, None at a site
that has no statistics. Gram matrices are asked for once and in order, so that the sequence may load each when it is
asked for; rows of Fisher information are asked for whenever rows of the update are, as long as the update is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import MethodError
from ray_merge.methods.context import Context

InputSide = Literal["columns", "rows"]
"""Which side of a stored weight its inputs are: columns, or rows of a HF Conv1D, which is stored (in, out)."""


class FisherRows(Protocol):
    """The Fisher diagonal of one weight: the mean of the squared gradients over examples, as the weight is stored.

    Attributes:
        norm: Frobenius norm over all merged weights of the adapter, as in fusion_bench; what `normalize` divides by.
    """

    norm: float

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, (stop - start, I), any floating dtype, nowhere negative."""
        ...


def statistics(site: SiteFactors, context: Context, without_moments: str) -> Sequence[Any] | None:
    """What was given for the site, or None where the deltas are to be averaged.

    Raises:
        MethodError: nothing was given and an average was not asked for, or not one item for each adapter.
    """
    found: Sequence[Any] | None = context.inputs.get("moments")
    place = f" at {context.site}" if context.site else ""
    if found is None:
        if without_moments == "average":
            return None
        raise MethodError(
            f"there are no statistics of data{place}, which this method needs; write `without_moments: average` to "
            "average the deltas there"
        )
    if len(found) != len(site):
        raise MethodError(
            f"there are {len(found)} moments for {len(site)} adapters{place}; give one for each"
        )
    return found


def weighted_mean(site: SiteFactors, weight: Sequence[float]) -> Delta:
    """sum_i weight_i tau_i / sum_i weight_i."""
    total = sum(weight)
    return site.sum([own / total for own in weight])
