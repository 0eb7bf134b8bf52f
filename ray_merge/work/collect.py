"""Sums of what goes into the watched modules of one stage, while one task runs through it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from ray_merge.algebra.moments import MomentSums, token_rows
from ray_merge.algebra.sketch import FrequentDirections
from ray_merge.errors import RunFailed
from ray_merge.recipe import Calibration
from ray_merge.work.moments_file import AnyMoments, Collected


class Collector:
    """Sums by group of sites: modules that are called with one and the same tensor share them.

    Args:
        sites: module path -> site.
        calibration: whether and how Grams are sketched.
        unmasked: modules whose rows are no tokens (parts of images beside a text): all of them count.
    """

    def __init__(
        self, sites: Mapping[str, str], calibration: Calibration, unmasked: Collection[str] = ()
    ) -> None:
        self._sites = sites
        self._unmasked = frozenset(unmasked)
        self._calibration = calibration
        self._sums: dict[str, MomentSums | FrequentDirections] = {}
        self._done: dict[str, AnyMoments] = {}
        self._leaders: dict[str, str] = {}
        # The inputs of this forward pass that were summed already; kept, so that their identity stays theirs.
        self._seen: list[tuple[Tensor, int, str]] = []
        self._mask: Tensor | None = None

    def begin(self, mask: Tensor | None) -> None:
        """The next batch begins, with this mask of tokens (B, L)."""
        self._mask = mask
        self._seen.clear()

    def __call__(self, module: str, x: Tensor) -> None:
        """A module is called with `x`."""
        site = self._sites.get(module)
        if site is None:
            return
        version = 0 if x.is_inference() else x._version
        shared = (leader for seen, then, leader in self._seen if seen is x and then == version)
        leader = next(shared, site)
        if self._leaders.setdefault(site, leader) != leader:
            raise RunFailed(
                f"{site} shared its input with {self._leaders[site]} in one batch and with {leader} in another, so its "
                "moments cannot be told apart; watch fewer modules"
            )
        if leader != site:
            return
        self._seen.append((x, version, site))
        try:
            rows_NI = token_rows(x, None if module in self._unmasked else self._mask)
        except ValueError as error:
            raise RunFailed(f"{site}: {error}; leave {module} out of the adapters' modules") from error
        if site not in self._sums:
            self._sums[site] = self._new(rows_NI.shape[1])
        self._sums[site].add(rows_NI)

    def end(self) -> None:
        """The batch is through."""
        self._seen.clear()

    def called(self, sites: Mapping[str, str]) -> bool:
        """Whether any of these sites (site -> module) was called."""
        return any(site in self._leaders for site in sites)

    def collected(self, sites: Mapping[str, str]) -> Collected:
        """The finished moments of some sites (site -> module); those of others stay.

        Raises:
            RunFailed: a site was never called, or its inputs are not finite.
        """
        silent = [site for site in sites if site not in self._leaders]
        if silent:
            raise RunFailed(
                f"{silent[0]} was not called while the data ran through the model, so it has no moments; leave it out "
                "of the adapters' modules"
            )
        leaders = {site: self._leaders[site] for site in sites}
        outside = [site for site, leader in leaders.items() if leader not in sites]
        if outside:  # the leader is stored in another part: this one gets a copy of its own
            leaders = {
                site: next(s for s in sites if self._leaders[s] == lead) for site, lead in leaders.items()
            }
        moments: dict[str, AnyMoments] = {}
        for site, leader in leaders.items():
            if site == leader:
                moments[site] = self._finished(self._leaders[site])
        return Collected(moments, leaders)

    def _new(self, n_columns: int) -> MomentSums | FrequentDirections:
        rows = self._calibration.sketch_rows
        if self._calibration.precision == "sketch" and n_columns > 2 * rows:
            return FrequentDirections(n_columns, rows)
        return MomentSums(n_columns)

    def _finished(self, site: str) -> AnyMoments:
        try:
            if site not in self._done:  # a shared input may be asked for by two parts
                self._done[site] = self._sums[site].finish()
            return self._done[site]
        except OverflowError as error:
            raise RunFailed(
                f"{site}: {error}; the base or the adapter makes Inf or NaN of this data"
            ) from error
