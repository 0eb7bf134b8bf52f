"""The shape of phi at a site, without torch: a plan knows it from headers.

    direction   (S,)      one for each rank-1 direction of each adapter, adapter-major: TARA-A
    shared      (T, R)    one for each adapter and shared singular direction, R = min(O, S): TARA-B
    adapter     (T,)      one for each adapter: AdaMerging, NSC

T adapters, S the sum of their ranks at the site, O its rows. An adapter that does not touch the site has rank 0 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Coefficients = Literal["direction", "shared", "adapter"]


def phi_shape(kind: Coefficients, shape: tuple[int, int], ranks: Sequence[int]) -> tuple[int, ...]:
    """The shape of phi at a site.

    Args:
        kind: what phi multiplies.
        shape: (O, I) of the site.
        ranks: of each adapter there.
    """
    if kind == "direction":
        return (sum(ranks),)
    if kind == "shared":
        return len(ranks), min(shape[0], sum(ranks))
    return (len(ranks),)
