"""Sums of squared gradients, example by example, of the watched modules of one stage.

Owns: which rows of a module's input belong to which example, and F = mean over n of (sum over l delta_nl^T x_nl)^2.
The square is of each example's own gradient, never of a batch's; the sums are float64. Legend: B examples, L rows of
each, O outputs, I inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ray_merge.errors import RunFailed


class Squares:
    """Takes what `Stage.backward` tells of its modules.

    Args:
        sites: module path -> site.
        outside: sites outside of the blocks, which may be called with one row for each example (a pooler, a head).
        conv1d: sites whose weight is stored (in, out).
        calls: module path -> how often it runs for one input; once where it is not among them.
    """

    def __init__(
        self,
        sites: Mapping[str, str],
        outside: frozenset[str],
        conv1d: frozenset[str],
        calls: Mapping[str, int],
    ) -> None:
        self._sites, self._outside, self._conv1d, self._calls = sites, outside, conv1d, calls
        self._sums: dict[str, Tensor] = {}
        self._held: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._told: Counter[str] = Counter()
        self._batch = (0, 0)

    def begin(self, n_examples: int, n_tokens: int) -> None:
        """A backward pass begins: of so many examples, of so many tokens each."""
        self._batch = (n_examples, n_tokens)
        self._told.clear()

    def __call__(self, module: str, x: Tensor, grad_out: Tensor) -> None:
        """The input of a module and the gradient of its output."""
        site = self._sites.get(module)
        if site is None:
            return
        self._told[module] += 1
        calls = max(1, self._calls.get(module, 1))
        if self._told[module] > calls:
            raise RunFailed(
                f"{site}: {module} runs {self._told[module]} times for one batch and {calls} time(s) for another, so "
                "gradients of an example cannot be told apart; write calibration: {batch_size: 1}"
            )
        pair = (self._by_example(site, x), self._by_example(site, grad_out))
        self._held.setdefault(site, []).append(pair)
        if self._told[module] == calls:
            self._add(site)

    def end(self) -> None:
        """The backward pass is through."""
        for site in list(self._held):
            self._add(site)

    def called(self, sites: Mapping[str, str]) -> bool:
        """Whether any of these sites (site -> module) was seen."""
        return any(site in self._sums for site in sites)

    def means(self, sites: Mapping[str, str], n_examples: int) -> dict[str, Tensor]:
        """The diagonals of some sites (site -> module), float64, as the weights are stored.

        Raises:
            RunFailed: a site was never seen, or its gradients are not finite.
        """
        found = {}
        for site in sites:
            if site not in self._sums:
                raise RunFailed(
                    f"{site} got no gradient while the data ran through the model, so it has no Fisher information; "
                    "leave it out of the adapters' modules"
                )
            mean = self._sums[site] / n_examples
            if not bool(torch.isfinite(mean).all()):
                raise RunFailed(
                    f"{site}: gradients are Inf or NaN; the base with this adapter overflows on this data"
                )
            found[site] = mean
        return found

    def _by_example(self, site: str, x: Tensor) -> Tensor:
        """(B, L, I) of a module's rows; L is 1 for one row of each example."""
        n_examples, n_tokens = self._batch
        by_example = x.dim() >= 3 and x.shape[0] == n_examples
        flat = x.dim() == 2 and x.shape[0] == n_examples * n_tokens
        single = x.dim() == 2 and x.shape[0] == n_examples and site in self._outside
        if n_examples == 1 or by_example or flat or single:
            return x.reshape(n_examples, -1, x.shape[-1])
        raise RunFailed(
            f"{site} is called with {tuple(x.shape)} for {n_examples} examples of {n_tokens} tokens, so rows cannot be "
            "told apart by example; write calibration: {batch_size: 1}"
        )

    def _add(self, site: str) -> None:
        held = self._held.pop(site)
        for example in range(self._batch[0]):
            gradient = sum(
                torch.mm(x_BLI[example].T, delta_BLO[example])
                if site in self._conv1d
                else torch.mm(delta_BLO[example].T, x_BLI[example])
                for x_BLI, delta_BLO in held
            )
            assert isinstance(gradient, Tensor)
            if site not in self._sums:
                self._sums[site] = torch.zeros_like(gradient, dtype=torch.float64)
            self._sums[site].addcmul_(gradient, gradient)
