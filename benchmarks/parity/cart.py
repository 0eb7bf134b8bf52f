"""CART: the Core Space authors' implementation beside ours, on the same tensors, one thread each.

    python benchmarks/parity/cart.py --repo CLONE_OF_apanariello4/core-space-merging

Theirs is get_cart_delta_w, on dense deltas and on core matrices (then U_B M V_A^T). CART's own repository
could not be had.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import core_space
import torch
from peer import adapters, best_of, checked_out, functions_module, relative_error
from torch import Tensor

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

LAMBDA, CENTRED, SEED = 0.6, 0.7, 3


def dense_theirs(factors: Sequence[Factor], share: float) -> Tensor:
    deltas = [factor.scale * factor.B @ factor.A for factor in factors]
    return LAMBDA * core_space.their_merger().get_cart_delta_w(deltas, share, CENTRED)


def core_theirs(factors: Sequence[Factor], share: float) -> Tensor:
    merger = core_space.their_merger()
    pairs = [{"site": (factor.A, factor.B)} for factor in factors]
    M, U, Vt = merger.get_core_matrices(pairs, "site", {})
    return LAMBDA * (U @ merger.get_cart_delta_w(M, share, CENTRED) @ Vt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--size", type=int, default=192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stubs = {
        "utils": functions_module("utils", get_mask_fn=None),
        "einops": functions_module("einops", rearrange=None),
    }
    with checked_out(options.repo, core_space.COMMIT, core_space.FILES, stubs):
        report(options.size)


def report(size: int) -> None:
    factors = adapters(size, size, 8, 4, SEED, torch.float64)
    for space, theirs in (("dense", dense_theirs), ("core", core_theirs)):
        for share in (0.04, 0.32):
            reference, theirs_in = best_of(lambda theirs=theirs, share=share: theirs(factors, share), 3)
            given = {"space": space, "share": share, "lambda_": LAMBDA, "centred": CENTRED}
            merged, ours_in = best_of(lambda given=given: merge_factors("cart", factors, **given), 3)
            print(
                f"cart, {space}, share {share}: error {relative_error(merged.dense(), reference):.1e}  "
                f"norm {float(reference.norm()):.12g}  probe [3, 5] {float(reference[3, 5]):.12g}\n"
                f"    theirs {theirs_in}, ours {ours_in}: {theirs_in.times_slower_than(ours_in)}"
            )


if __name__ == "__main__":
    main()
