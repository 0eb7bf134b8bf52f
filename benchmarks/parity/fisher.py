"""Fisher merging: fusion_bench's code beside ours, on the same weights and Fisher diagonals, one thread each.

    python benchmarks/parity/fisher.py --repo CLONE_OF_tanganke/fusion_bench

Theirs is run in float64 on whole weights W0 + delta of two sites, because the norm that it divides by is that of all
parameters; the difference from W0 at the first site is compared. Ours has `floor: absolute` and is given that norm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from excerpts import function, source
from peer import adapters, best_of, relative_error, timed
from torch import Tensor

from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.registry import at_site, get, resolve_parameters
from ray_merge.spec import Factor

COMMIT = "54c9e8c9d9621620c720452cd8533332a32d3689"
FILE = "fusion_bench/method/fisher_merging/fisher_merging.py"
SITES = ("first", "second")


class Rows:
    """A Fisher diagonal in memory, with the norm over all sites."""

    def __init__(self, values: Tensor, norm: float) -> None:
        self.values, self.norm = values, norm

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows that a kernel asks for."""
        return self.values[start:stop]


def fishers(count: int, rows: int, columns: int, seed: int) -> list[Tensor]:
    """Squares over several decades, of another scale in each task; float64."""
    generator = torch.Generator().manual_seed(seed + 1)

    def normal() -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    return [(0.1 ** (1 + task) * normal() * normal().exp()).square() for task in range(count)]


def theirs(
    repo: Path,
    weights: Sequence[Sequence[Tensor]],
    diagonals: Sequence[Sequence[Tensor]],
    shares: Sequence[float],
    normalize: bool,
) -> Tensor:
    text = source(repo, COMMIT, FILE)
    names: dict[str, Any] = {"torch": torch, "Tensor": Tensor, "List": list, "Dict": dict}
    function(text, "get_models_fisher_norm", names)
    merge = function(text, "merging_with_fisher_weights", names)
    parameters = {site: list(found) for site, found in zip(SITES, weights, strict=True)}
    by_model = [dict(zip(SITES, found, strict=True)) for found in zip(*diagonals, strict=True)]
    coefficients = torch.tensor(shares, dtype=torch.float64)
    return merge(parameters, by_model, coefficients, normalize)[SITES[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, columns, count = options.size, options.size // 2, options.adapters
    factors = [
        adapters(size, columns, options.rank, count, options.seed + site, torch.float64) for site in (0, 1)
    ]
    diagonals = [fishers(count, size, columns, options.seed + site) for site in (0, 1)]
    print(f"{size} x {columns}, {count} adapters of rank {options.rank}, float64, one thread")
    for shares in ([1 / count] * count, [0.4, 0.3, 0.2, 0.1][:count]):
        for normalize in (True, False):
            report(options.repo, factors, diagonals, shares, normalize)


def report(
    repo: Path,
    factors: Sequence[Sequence[Factor]],
    diagonals: Sequence[Sequence[Tensor]],
    shares: Sequence[float],
    normalize: bool,
) -> None:
    shape = diagonals[0][0].shape
    base = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = [[base + f.scale * f.B @ f.A for f in of_site] for of_site in factors]
    merged, theirs_in = timed(lambda: theirs(repo, weights, diagonals, shares, normalize))
    want = merged - base
    norms = [float(torch.stack([one, other]).norm()) for one, other in zip(*diagonals, strict=True)]
    given = [Rows(F, norm) for F, norm in zip(diagonals[0], norms, strict=True)]
    names = [str(place) for place in range(len(shares))]
    chosen = {
        "weight": dict(zip(names, shares, strict=True)),
        "normalize": normalize,
        "floor": "absolute",
    }
    parameters = at_site(get("fisher"), resolve_parameters(get("fisher"), chosen, names), names, "")

    def ours() -> Tensor:
        site = SiteFactors(factors[0])
        inputs = {"moments": given}
        return merge_site("fisher", site, parameters, names=names, site="", seed=0, inputs=inputs).dense()

    got, ours_in = best_of(ours, 3)
    print(f"weights {shares}, normalize {normalize}: theirs {theirs_in}, ours {ours_in}")
    print(f"  relative error {relative_error(got, want):.1e}")
    print(f"  their norm {float(want.norm()):.12g}, entry [3, 5] {float(want[3, 5]):.12g}")


if __name__ == "__main__":
    main()
