"""Sign election and disjoint mean of several tensors, one after another.

Owns: running sums of the positive and of the negative side, so that T tensors are merged in the memory of
one. Formula: TIES (arXiv 2306.01708): gamma = sign of the sum of values; the mean of entries with sign gamma.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Ballot:
    """Adds up one tensor per adapter, then elects.

    Args:
        like: gives shape, dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._total = torch.zeros_like(like)
        self._positive = torch.zeros_like(like)
        self._negative = torch.zeros_like(like)
        self._positive_share = torch.zeros_like(like)
        self._negative_share = torch.zeros_like(like)

    def add(self, values: Tensor, votes: Tensor | None = None, share: float = 1.0) -> None:
        """Add one adapter.

        Args:
            values: what is averaged if this adapter agrees.
            votes: what its sign is taken from and what is added up for the election; default: `values`.
            share: what it adds to the divisor where it agrees.
        """
        votes = values if votes is None else votes
        self._total += votes
        # Clamped signs instead of masks: torch.where with a scalar is thirty times slower than clamp.
        signs = votes.sign()
        above, below = signs.clamp_min(0), signs.clamp_max(0)
        self._positive_share.add_(above, alpha=share)
        self._negative_share.add_(below, alpha=-share)
        if values is votes:
            self._positive += values.clamp_min(0)
            self._negative += values.clamp_max(0)
        else:
            self._positive.addcmul_(values, above)
            self._negative.addcmul_(values, below, value=-1)

    def signs(self) -> Tensor:
        """-1, 0 or 1: the sign of the sum of votes."""
        return self._total.sign()

    def elect(self, zero_sign: int = 0, *, divide: bool = True) -> Tensor:
        """The mean of the entries whose sign won.

        Args:
            zero_sign: what wins where the votes cancel exactly: 1, -1, or 0 for nobody (the result is 0).
            divide: by the shares of those that agree; False leaves their sum.
        """
        upper = self._total > 0 if zero_sign <= 0 else self._total >= 0
        merged = torch.where(upper, self._positive, self._negative)
        if divide:
            shares = torch.where(upper, self._positive_share, self._negative_share)
            merged /= shares.masked_fill_(shares == 0, 1.0)
        return merged.masked_fill_(self._total == 0, 0.0) if zero_sign == 0 else merged

    @property
    def has_undecided(self) -> bool:
        """Whether votes cancel exactly somewhere."""
        return bool(((self._total == 0) & (self._positive != 0)).any())
