"""RegMean: fusion_bench's code beside ours, on the same weights and the same inputs, one thread each.

    python benchmarks/parity/regmean.py --repo CLONE_OF_tanganke/fusion_bench

Theirs is run in float64 on whole weights W0 + delta and Gram matrices divided by their number of rows, as their hook
makes them; its difference from W0 is compared. Its weights count alike and it has no ridge, so ours has 0. It draws up
the factors of what is off the diagonal in torch's default dtype; `float32` is the error with that as it is found.
`transposed`: weights stored (in, out), as for GPT-2 (`weight_transpose: false`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from excerpts import function, source
from peer import adapters, best_of, relative_error, timed
from torch import Tensor

from ray_merge import Moments
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "54c9e8c9d9621620c720452cd8533332a32d3689"
FILE = "fusion_bench/method/regmean/regmean.py"
KEY = "site"


def inputs(count: int, columns: int, tokens: int, seed: int) -> list[Tensor]:
    """Correlated inputs with a mean, (tokens, columns) float64, of another scale in each task."""
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = [normal(columns, columns) / columns**0.5 for _ in range(count)]
    return [(1 + task) * (normal(tokens, columns) @ mix[task] + 0.3) for task in range(count)]


def theirs(
    repo: Path, weights: Sequence[Tensor], grams: Sequence[Tensor], ratio: float, turn: bool
) -> Tensor:
    text = source(repo, COMMIT, FILE)
    names = {"torch": torch}
    function(text, "reduce_non_diagonal_elements", names)
    merge = function(text, "merging_with_regmean_weights", names)
    merged = merge({f"{KEY}.weight": list(weights)}, [{KEY: gram} for gram in grams], ratio, turn)
    return merged[f"{KEY}.weight"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, columns = options.size, options.size // 2
    factors = adapters(size, columns, options.rank, options.adapters, options.seed, torch.float64)
    samples = inputs(options.adapters, columns, options.tokens, options.seed)
    moments = [Moments(X.T @ X, X.mean(0), len(X)) for X in samples]
    print(f"{size} x {columns}, {options.adapters} adapters of rank {options.rank}, float64, one thread")
    for ratio in (0.1, 0.9, 0.95, 1.0):
        for turned in (False, True):
            report(options.repo, factors, moments, ratio, turned)


def report(
    repo: Path, factors: Sequence[Factor], moments: Sequence[Moments], ratio: float, turned: bool
) -> None:
    if turned:
        factors = [Factor(f.A.T.contiguous(), f.B.T.contiguous(), f.scale) for f in factors]
    shape = (factors[0].B.shape[0], factors[0].A.shape[1])
    base = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = [base + f.scale * f.B @ f.A for f in factors]
    grams = [one.gram / one.count for one in moments]
    rounded = theirs(repo, weights, grams, ratio, not turned) - base
    torch.set_default_dtype(torch.float64)
    merged, theirs_in = timed(lambda: theirs(repo, weights, grams, ratio, not turned))
    torch.set_default_dtype(torch.float32)
    want = merged - base
    given = {"moments": moments, "off_diagonal": ratio, "ridge": 0.0}
    side = "rows" if turned else "columns"
    got, ours_in = best_of(lambda: merge_factors("regmean", factors, input_side=side, **given).dense(), 3)
    print(f"off_diagonal {ratio:g}{', transposed' if turned else ''}: theirs {theirs_in}, ours {ours_in}")
    print(f"  relative error {relative_error(got, want):.1e}, float32 {relative_error(got, rounded):.1e}")
    print(f"  their norm {float(want.norm()):.12g}, entry [3, 5] {float(want[3, 5]):.12g}")


if __name__ == "__main__":
    main()
