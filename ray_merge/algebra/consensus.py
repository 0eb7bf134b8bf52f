"""Sign election and disjoint mean of several tensors, one after another.

Owns: running sums from which both sides follow, so that T tensors are merged in the memory of one. Formula: TIES
(arXiv 2306.01708): gamma = sign of the sum of values; the mean of entries with sign gamma.

With V the sum of values, M the sum of values * sign(vote), S and N the sums of shares with and without the vote's sign,
the side gamma has the sum (V + gamma M) / 2 and the share (N + gamma S) / 2. Only whole passes of add, sign and
multiply are needed: comparisons and `torch.where` take ten to thirty times as long.
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
        self._votes = torch.zeros_like(like)
        self._values: Tensor | None = None
        self._signed_values = torch.zeros_like(like)
        self._shares = torch.zeros_like(like)
        self._signed_shares = torch.zeros_like(like)
        self._work = torch.empty_like(like)
        self._counted = True

    def add(self, values: Tensor, votes: Tensor | None = None, share: float = 1.0) -> None:
        """Add one adapter.

        Args:
            values: what is averaged if this adapter agrees.
            votes: what its sign is taken from and what is added up for the election; default: `values`.
            share: what it adds to the divisor where it agrees.
        """
        self._counted = self._counted and share == 1.0
        if votes is not None and votes is not values and self._values is None:
            self._values = self._votes.clone()  # so far they were the same
        votes = values if votes is None else votes
        self._votes += votes
        if self._values is not None:
            self._values += values
        sign = torch.sign(votes, out=self._work)
        self._signed_values.addcmul_(values, sign)
        self._signed_shares.add_(sign, alpha=share)
        self._shares.add_(sign.abs_(), alpha=share)

    def signs(self) -> Tensor:
        """-1, 0 or 1: the sign of the sum of votes."""
        return self._votes.sign()

    def elect(self, zero_sign: int = 0, *, divide: bool = True) -> Tensor:
        """The mean of the entries whose sign won; the ballot is used up.

        Args:
            zero_sign: what wins where the votes cancel exactly: 1, -1, or 0 for nobody (the result is 0).
            divide: by the shares of those that agree; False leaves their sum.
        """
        winner = self.signs()
        if zero_sign:
            winner.masked_fill_(winner == 0, float(zero_sign))
        values = self._votes if self._values is None else self._values
        merged = self._signed_values.mul_(winner).add_(values)
        if divide:
            shares = self._signed_shares.mul_(winner).add_(self._shares)
            # Where nobody won, both are zero. Counts are at least 2 elsewhere; other shares may be anything.
            merged /= shares.clamp_min_(1.0) if self._counted else shares.masked_fill_(shares == 0, 1.0)
        else:
            merged *= 0.5
        if zero_sign == 0 and self._values is not None:
            merged.mul_(winner.abs_())
        return merged

    @property
    def has_undecided(self) -> bool:
        """Whether votes cancel exactly somewhere."""
        return bool(((self._votes == 0) & (self._shares != 0)).any())
