"""Core Space: the authors' code beside ours, on the same factors, one thread each.

    python benchmarks/parity/core_space.py --repo CLONE_OF_apanariello4/core-space-merging

Theirs is MatrixPerLayerMerger.get_core_matrices (float64) and its TIES and DARE on the core matrices, then
U_B M V_A^T. Ours runs `ties` and `task_arithmetic` with `space: core`; DARE gets the mask that their code
draws. Singular vectors are defined up to sign, which no rule here sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peer import adapters, best_of, checked_out, functions_module, import_peer, relative_error
from torch import Tensor

from ray_merge.algebra.grid import chunk_rows
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.dare import dropped
from ray_merge.methods.election import election
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "85176fab749578b0b54a027ea89495846e79757d"
FILES = ["masking_ops.py", "merging_functions.py", "task_merger.py"]
DENSITY, LAMBDA, DARE_KEPT = 0.2, 0.6, 0.7  # their TIES default topK 10 is a parameter; DARE's drop is 0.3
KEY = "site"


def their_merger() -> Any:
    """Their merger without a model: only the functions of one layer are called."""
    task_merger = import_peer("task_merger")
    merger = task_merger.MatrixPerLayerMerger.__new__(task_merger.MatrixPerLayerMerger)
    torch.nn.Module.__init__(merger)
    merger.cache, merger.lmc = {}, False
    return merger


def theirs(factors: Sequence[Factor], config: dict[str, Any]) -> Tensor:
    merger = their_merger()
    M, U, Vt = merger.get_core_matrices([{KEY: (factor.A, factor.B)} for factor in factors], KEY, config)
    return LAMBDA * (U @ merger._merge_tensors(M, config) @ Vt)


def dare_ties_with_their_masks(factors: Sequence[Factor], seed: int) -> Tensor:
    space = SiteFactors(factors).space("core")
    torch.manual_seed(seed)
    masks = [
        torch.randint(2, size=space.shape, dtype=torch.float32).bernoulli(DARE_KEPT).bool() for _ in factors
    ]
    step = chunk_rows(space.shape[1])
    kept = dropped(
        space,
        [DARE_KEPT] * len(factors),
        "authors",
        lambda i, c, shape: masks[i][c * step : c * step + shape[0]],
    )
    return space.lift(
        election(space, kept, [1.0] * len(factors), LAMBDA, compat="authors", divide=True)
    ).dense()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--commit", default=COMMIT)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    factors = adapters(
        options.size, options.size, options.rank, options.adapters, options.seed, torch.float64
    )
    # einops is imported by their file and used by none of the functions called here.
    stubs = {
        "utils": functions_module("utils", get_mask_fn=None),
        "einops": functions_module("einops", rearrange=SimpleNamespace()),
    }
    with checked_out(options.repo, options.commit, FILES, stubs):
        report(factors)


def report(factors: Sequence[Factor]) -> None:
    shape = tuple(factors[0].B.shape[:1] + factors[0].A.shape[1:])
    print(f"core space, {shape}, {len(factors)} adapters, float64, one thread")
    ties = {"merge_method": "ties", "topK": 100 * DENSITY}
    rows = [
        ("sum", {"merge_method": "sum"}, lambda: merge_factors("task_arithmetic", factors, lambda_=LAMBDA)),
        (
            "ties",
            ties,
            lambda: merge_factors(
                "ties", factors, density=DENSITY, lambda_=LAMBDA, space="core", compat="authors"
            ),
        ),
    ]
    for name, config, ours in rows:
        reference, theirs_in = best_of(lambda config=config: theirs(factors, config), 3)
        delta, to_factors = best_of(ours, 3)
        dense, to_dense = best_of(lambda ours=ours: ours().dense(), 3)
        print(
            f"  {name:9} error {relative_error(dense, reference):7.1e}  norm {float(reference.norm()):.12g}  "
            f"probe [3, 5] {float(delta.rows(3, 4)[0, 5]):.12g}\n"
            f"            theirs {theirs_in}\n"
            f"            ours to factors {to_factors}: {theirs_in.times_slower_than(to_factors)}\n"
            f"            ours to dense   {to_dense}: {theirs_in.times_slower_than(to_dense)}"
        )
    torch.manual_seed(7)
    dare = {"merge_method": "dare-ties", "dare_pruning_coeffs": 1 - DARE_KEPT, "topK": 100}
    reference = theirs(factors, dare)
    print(f"  dare-ties error {relative_error(dare_ties_with_their_masks(factors, 7), reference):7.1e}")


if __name__ == "__main__":
    main()
