"""Weights, votes and averages after entries were trimmed or dropped: shared by the TIES and DARE families.

Owns: what `compat` means for weights, ties of the vote and divisors; the table is in `ties.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

from ray_merge.algebra.consensus import Ballot
from ray_merge.algebra.spaces import Rule, Space

Kept = Callable[[int, int], Tensor]
"""(adapter, chunk) -> that adapter's entries after trimming or dropping."""


def election(space: Space, kept: Kept, weight: Sequence[float], *, compat: str, divide: bool) -> Rule:
    """The rule that elects a sign per entry and merges the entries that agree, chunk by chunk.

    Args:
        space: whose chunks are merged.
        kept: the sparse entries.
        weight: per adapter.
        compat: paper, peft, mergekit or authors.
        divide: by what agrees; False leaves the sum.
    """

    def ballot(index: int) -> Ballot:
        first = kept(0, index)
        cast = Ballot(first)
        for adapter, own in enumerate(weight):
            values = kept(adapter, index) if adapter else first
            _vote(cast, values, own, compat)
        return cast

    @cache
    def majority() -> int:
        signs = sum(float(ballot(index).signs().sum()) for index in range(space.n_chunks))
        return 1 if signs > 0 else -1

    def rule(index: int) -> Tensor:
        cast = ballot(index)
        zero_sign = {"paper": 0, "peft": 1, "mergekit": 1}.get(compat)
        if zero_sign is None:
            # The KnOTS code lets the site's majority win a tie; it is counted only if a tie needs it.
            zero_sign = majority() if cast.has_undecided else 0
        merged = cast.elect(zero_sign, divide=divide)
        return merged.mul_(weight[0]) if compat == "authors" else merged

    return rule


def _vote(cast: Ballot, values: Tensor, weight: float, compat: str) -> None:
    if compat == "peft":
        cast.add(values if weight == 1.0 else values * weight, votes=values)
    elif compat == "authors":
        cast.add(values)
    else:
        cast.add(values if weight == 1.0 else values * weight, share=weight if compat == "mergekit" else 1.0)
