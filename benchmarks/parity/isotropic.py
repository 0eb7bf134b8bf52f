"""Iso-C and Iso-CTS: fusion_bench's code beside ours, on the same tensors, one thread each.

    python benchmarks/parity/isotropic.py --repo CLONE_OF_tanganke/fusion_bench

Theirs works on matrices of full rank. It is run on dense deltas that have full rank together, and on core matrices
(which have full rank) of adapters of low rank, as the Core Space paper does. On dense deltas of low rank it gives
the null space the same singular value as the rest, in an arbitrary basis; there the part of its result on the
spaces of the deltas is compared with `spectrum: full`, and the norm of the rest is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peer import adapters, best_of, checked_out, functions_module, import_peer, relative_error
from torch import Tensor

from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "54c9e8c9d9621620c720452cd8533332a32d3689"
MODULE = "fusion_bench/method/isotropic_merging/iso_utils.py"
LAMBDA, SEED, COMMON = 0.6, 3, 0.8


def theirs(method: str, matrices: Sequence[Tensor]) -> Tensor:
    """Their function for whole models, on models of one weight."""
    merge = getattr(import_peer(MODULE.removesuffix(".py").replace("/", ".")), method)
    given = {"common_space_fraction": COMMON} if method == "iso_cts" else {}
    models = [{"site": matrix} for matrix in matrices]
    with contextlib.redirect_stdout(io.StringIO()):
        return LAMBDA * merge(models, accelerator="cpu", **given)["site"]


def dense_theirs(method: str, factors: Sequence[Factor]) -> Tensor:
    return theirs(method, [factor.scale * factor.B @ factor.A for factor in factors])


def core_theirs(method: str, factors: Sequence[Factor]) -> Tensor:
    core = SiteFactors(factors).core
    return core.U_OP @ theirs(method, [left @ right for left, right in core.coordinates]) @ core.Vt_QI


def dense_theirs_without_null_space(method: str, factors: Sequence[Factor]) -> Tensor:
    core, merged = SiteFactors(factors).core, dense_theirs(method, factors)
    return core.U_OP @ (core.U_OP.T @ merged @ core.Vt_QI.T) @ core.Vt_QI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--size", type=int, default=192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stubs = {
        "fusion_bench.utils": functions_module(
            "utils", timeit_context=lambda *_, **__: contextlib.nullcontext()
        ),
        "fusion_bench.utils.type": functions_module("type", StateDictType=dict),
    }
    with checked_out(options.repo, COMMIT, [MODULE], stubs):
        report(options.size)


def report(size: int) -> None:
    low = (size, size, 8, 4)
    row(f"iso_c, core, {size} x {size}", "iso_c", low, {"space": "core"}, core_theirs)
    row(f"iso_cts, core, {size} x {size}", "iso_cts", low, {"space": "core"}, core_theirs)
    for method in ("iso_c", "iso_cts"):
        row(f"{method}, dense, T r = min(O, I)", method, (40, 32, 8, 4), {}, dense_theirs)
        given = {"spectrum": "full"}
        row(f"{method}, dense, T r > min(O, I)", method, (24, 20, 8, 4), given, dense_theirs)
    factors = adapters(*low, SEED, torch.float64)
    whole, kept = dense_theirs("iso_c", factors), dense_theirs_without_null_space("iso_c", factors)
    print(
        f"iso_c, dense, {size} x {size}: their norm outside the deltas' spaces {float((whole - kept).norm()):.3g}"
    )
    row(
        f"iso_c, dense, {size} x {size}, the rest",
        "iso_c",
        low,
        {"spectrum": "full"},
        dense_theirs_without_null_space,
    )


def row(
    name: str,
    method: str,
    shape: tuple[int, int, int, int],
    given: dict[str, str],
    reference: Callable[[str, Sequence[Factor]], Tensor],
) -> None:
    factors = adapters(*shape, SEED, torch.float64)
    expected, theirs_in = best_of(lambda: reference(method, factors), 3)
    merged, ours_in = best_of(lambda: merge_factors(method, factors, lambda_=LAMBDA, **given), 3)
    print(
        f"{name}: error {relative_error(merged.dense(), expected):.1e}  norm {float(expected.norm()):.12g}  "
        f"probe [3, 5] {float(expected[3, 5]):.12g}\n"
        f"    theirs {theirs_in}, ours {ours_in}: {theirs_in.times_slower_than(ours_in)}"
    )


if __name__ == "__main__":
    main()
