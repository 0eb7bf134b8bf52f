r"""TSV-Merge: two implementations by others beside ours, on the same tensors, one thread each.

    python benchmarks/parity/tsv.py --repo CLONE_OF_tanganke/fusion_bench \
        --core-repo CLONE_OF_apanariello4/core-space-merging

fusion_bench works on dense deltas and keeps min(O, I) / T triplets of each, core-space-merging does the same
on core matrices. Where that number is not above the adapters' rank, ours gives the same with `rank` set to it,
and in Core Space it is the adapters' rank itself. Where it is above (dense deltas of low rank), theirs fills up with
an arbitrary basis of the null space; the last row prints how far that moves the result.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import core_space
import torch
from peer import adapters, best_of, checked_out, functions_module, import_peer, relative_error
from torch import Tensor

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "54c9e8c9d9621620c720452cd8533332a32d3689"
MODULE = "fusion_bench/method/task_singular_vector/utils/TSVM_utils.py"
LAMBDA, SEED = 0.6, 3


def dense_theirs(factors: Sequence[Factor]) -> Tensor:
    """Their function for whole models, on models of one weight."""
    models = [{"site": factor.scale * factor.B @ factor.A} for factor in factors]
    merge = import_peer(MODULE.removesuffix(".py").replace("/", ".")).compute_and_sum_svd_mem_reduction
    with contextlib.redirect_stdout(io.StringIO()):
        return LAMBDA * merge(models, accelerator="cpu")["site"]


def core_theirs(factors: Sequence[Factor]) -> Tensor:
    merger = core_space.their_merger()
    pairs = [{"site": (factor.A, factor.B)} for factor in factors]
    M, U, Vt = merger.get_core_matrices(pairs, "site", {})
    return LAMBDA * (U @ merger.get_tsv_delta_w(M) @ Vt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--core-repo", type=Path, required=True)
    parser.add_argument("--size", type=int, default=192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stubs = {"fusion_bench.utils.type": functions_module("type", StateDictType=dict)}
    core_stubs = {
        "utils": functions_module("utils", get_mask_fn=None),
        "einops": functions_module("einops", rearrange=None),
    }
    with (
        checked_out(options.repo, COMMIT, [MODULE], stubs),
        checked_out(options.core_repo, core_space.COMMIT, core_space.FILES, core_stubs),
    ):
        report(options.size)


def report(size: int) -> None:
    cases = [
        ("dense, T r = min(O, I)", (40, 32, 8, 4), {}, dense_theirs),
        ("dense, T r > min(O, I)", (24, 20, 8, 4), {"rank": 5}, dense_theirs),
        (f"core, {size} x {size}", (size, size, 8, 4), {"space": "core"}, core_theirs),
        (f"dense, {size} x {size}, null space in theirs", (size, size, 8, 4), {}, dense_theirs),
    ]
    for name, shape, given, theirs in cases:
        factors = adapters(*shape, SEED, torch.float64)
        reference, theirs_in = best_of(lambda theirs=theirs, factors=factors: theirs(factors), 3)
        merged, ours_in = best_of(
            lambda given=given, factors=factors: merge_factors("tsv_m", factors, lambda_=LAMBDA, **given), 3
        )
        print(
            f"{name}: error {relative_error(merged.dense(), reference):.1e}  norm {float(reference.norm()):.12g}  "
            f"probe [3, 5] {float(reference[3, 5]):.12g}\n"
            f"    theirs {theirs_in}, ours {ours_in}: {theirs_in.times_slower_than(ours_in)}"
        )


if __name__ == "__main__":
    main()
